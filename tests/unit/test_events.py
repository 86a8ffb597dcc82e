"""The events' table, and the checks that several of them share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from fnmatch import translate
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.errors import InvalidData
from ksi.events.common import PageData
from ksi.events.completions import CompletionData, GetData, WaitData
from ksi.events.conversations import AcquireLockData, LockStatusData
from ksi.events.service import SubscribeData
from ksi.events.specs import MAX_DEPTH, SPECS, check_depth, conversation_name, parse_priority, schema
from ksi.protocol import convert, field_names
from ksi.request import Priority

# -- the table --------------------------------------------------------------------------------------------------------


def test_every_event_is_named_after_its_part_and_has_a_purpose() -> None:
    for name, spec in SPECS.items():
        assert name == spec.name
        assert re.fullmatch(r"[a-z_]+:[a-z_]+", name)
        assert spec.doc.endswith(".")


def test_an_event_that_only_the_daemon_sends_has_no_request() -> None:
    outgoing = {name for name, spec in SPECS.items() if not spec.incoming}
    assert {"completion:result", "completion:chunk", "completion:progress", "conversation:locked"} <= outgoing
    assert {"completion:request", "completion:async", "system:health", "monitor:subscribe"}.isdisjoint(outgoing)


@pytest.mark.promise("S1")
def test_every_typed_reply_has_room_for_warnings() -> None:
    typed = {name: spec.reply for name, spec in SPECS.items() if spec.incoming and spec.reply is not None}
    assert typed.keys() == {name for name, spec in SPECS.items() if spec.incoming}
    assert len(typed) > 5
    assert [name for name, reply in typed.items() if "warnings" not in field_names(reply)] == []


@pytest.mark.promise("R4")
def test_every_event_has_a_schema_that_is_json_and_complete() -> None:
    for spec in SPECS.values():
        shown = schema(spec)
        assert msgspec.json.decode(msgspec.json.encode(shown)) == shown
        assert ("request" in shown) == spec.incoming
        assert ("reply" in shown) == (spec.incoming and spec.reply is not None)
        assert ("data" in shown) == (not spec.incoming and spec.reply is not None)
        for reference in references(shown):
            assert reference.removeprefix("#/$defs/") in shown["$defs"]


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [r for inner in node.values() for r in references(inner)]
    return [r for inner in node for r in references(inner)] if isinstance(node, list) else []


@pytest.mark.promise("S1")
def test_every_event_without_required_fields_takes_no_data() -> None:
    for spec in SPECS.values():
        if spec.request is not None and not any(field.required for field in msgspec.structs.fields(spec.request)):
            assert isinstance(convert({}, spec.request), spec.request)


# -- fields and their bounds ------------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    ("kind", "data", "path"),
    [
        (CompletionData, {"prompt": 5}, "prompt"),
        (CompletionData, {"messages": []}, "messages"),
        (CompletionData, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CompletionData, {"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        (CompletionData, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (CompletionData, {"session_id": ""}, "session_id"),
        (CompletionData, {"request_id": "x" * 65_537}, "request_id"),
        (CompletionData, {"max_tokens": 0}, "max_tokens"),
        (CompletionData, {"temperature": 2.1}, "temperature"),
        (CompletionData, {"delay": -1}, "delay"),
        (CompletionData, {"not_before": 1e12}, "not_before"),
        (CompletionData, {"ttl": 0}, "ttl"),
        (CompletionData, {"timeout": 1e308}, "timeout"),
        (CompletionData, {"on_busy": "wait"}, "on_busy"),
        (CompletionData, {"retry": {"max_attempts": 0}}, "retry.max_attempts"),
        (CompletionData, {"metadata": []}, "metadata"),
        (GetData, {"request_id": "r", "after_seq": -2}, "after_seq"),
        (GetData, {}, "request_id"),
        (WaitData, {"request_id": "r", "timeout": 0}, "timeout"),
        (AcquireLockData, {"request_id": "r", "timeout": 1e300}, "timeout"),
        (PageData, {"limit": 0}, "limit"),
        (PageData, {"limit": 1_001}, "limit"),
        (LockStatusData, {"cursor": 5}, "cursor"),
        (SubscribeData, {"patterns": []}, "patterns"),
        (SubscribeData, {"patterns": ["*"] * 101}, "patterns"),
    ],
)
def test_a_field_out_of_its_bounds_is_named(kind: type[msgspec.Struct], data: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidData) as caught:
        convert(data, kind)
    assert caught.value.path == path


@pytest.mark.promise("S4")
@pytest.mark.parametrize("field", ["pattern", "patterns"])
def test_a_pattern_that_is_taken_costs_next_to_nothing_to_read(field: str) -> None:
    """Reading a pattern of nothing but brackets takes a time that grows with the square of its length."""

    def subscribe(length: int) -> None:
        pattern = "[" * length
        convert({field: [pattern] if field == "patterns" else pattern}, SubscribeData)

    longest = 200
    subscribe(longest)
    with pytest.raises(InvalidData) as caught:
        subscribe(longest + 1)
    assert caught.value.path.startswith(field)
    begun = time.process_time()
    for _ in range(100):
        translate("[" * longest)
    assert time.process_time() - begun < 1


# -- priorities -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q1")
@given(priority=st.sampled_from(Priority), change=st.sampled_from([str.upper, str.lower, str.title, str.swapcase]))
def test_a_priority_is_its_word_in_any_case(priority: Priority, change: Callable[[str], str]) -> None:
    assert parse_priority(change(priority.word)) is priority


@pytest.mark.promise("Q1")
def test_no_priority_is_normal() -> None:
    assert parse_priority(None) is Priority.NORMAL


@pytest.mark.promise("Q1")
@given(st.text())
def test_another_word_is_an_error_that_lists_them_all(word: str) -> None:
    if word.lower() in {priority.word for priority in Priority}:
        return
    with pytest.raises(InvalidData) as caught:
        parse_priority(word)
    assert caught.value.path == "priority"
    assert all(priority.word in caught.value.message for priority in Priority)


@pytest.mark.promise("Q1")
@pytest.mark.parametrize(("word", "guess"), [("hihg", "high"), ("BACKROUND", "background"), ("criticle", "critical")])
def test_a_misspelt_priority_is_guessed(word: str, guess: str) -> None:
    with pytest.raises(InvalidData, match=f"did you mean {guess!r}"):
        parse_priority(word)


def test_a_long_wrong_word_is_not_said_back_whole() -> None:
    with pytest.raises(InvalidData) as caught:
        parse_priority("x" * 100_000)
    assert len(caught.value.message) < 300


# -- a conversation's two names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "conversation", "name"),
    [(None, None, None), ("a", None, "a"), (None, "a", "a"), ("a", "a", "a")],
)
def test_session_id_and_conversation_id_are_one_name(
    session: str | None, conversation: str | None, name: str | None
) -> None:
    assert conversation_name(session, conversation) == name


def test_two_different_names_for_a_conversation_are_refused() -> None:
    with pytest.raises(InvalidData) as caught:
        conversation_name("a", "b")
    assert caught.value.path == "conversation_id"


# -- nesting ----------------------------------------------------------------------------------------------------------


def nested(levels: int, leaf: Any, *, lists: bool) -> Any:
    value = leaf
    for _ in range(levels):
        value = [value] if lists else {"a": value}
    return value


@pytest.mark.promise("S1")
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("leaf", [5, "x", None])
def test_free_json_may_be_nested_up_to_the_limit_and_no_deeper(lists: bool, leaf: Any) -> None:
    check_depth("metadata", nested(MAX_DEPTH, leaf, lists=lists))
    with pytest.raises(InvalidData) as caught:
        check_depth("metadata", nested(MAX_DEPTH + 1, leaf, lists=lists))
    assert caught.value.path == "metadata"
    with pytest.raises(InvalidData):
        check_depth("metadata", nested(50_000, leaf, lists=lists))


def test_an_empty_innermost_object_is_a_level_too() -> None:
    check_depth("metadata", nested(MAX_DEPTH - 1, {}, lists=False))
    with pytest.raises(InvalidData):
        check_depth("metadata", nested(MAX_DEPTH, {}, lists=False))


@pytest.mark.parametrize("value", [None, 5, "text", {}, [], {"a": [1, {"b": 2}], "c": "d"}])
def test_flat_json_is_fine(value: Any) -> None:
    check_depth("metadata", value)


def test_only_the_deepest_branch_counts() -> None:
    with pytest.raises(InvalidData):
        check_depth("provider_options", {"a": 1, "b": [], "c": {"d": nested(MAX_DEPTH, 1, lists=True)}})


def test_every_field_of_every_event_has_a_description() -> None:
    missing = [
        f"{name}: {part}.{field}"
        for name, spec in SPECS.items()
        for part, found in schema(spec).get("$defs", {}).items()
        for field, shown in found.get("properties", {}).items()
        if not shown.get("description")
    ]
    assert missing == []
