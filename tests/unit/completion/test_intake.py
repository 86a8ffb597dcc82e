"""From an event's data to a request."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.clock import MICROSECONDS, Chance, Moment, microseconds
from ksi.completion.intake import Intake, due_time, normalise
from ksi.content.blocks import Message
from ksi.errors import InvalidData
from ksi.events.completions import CompletionData
from ksi.protocol import convert
from ksi.request import HeadStarts, OnBusy, Priority, State, decode_body, encode_body
from ksi.store.values import NewRequest, RequestView

HOUR = 3_600 * MICROSECONDS
HEAD_STARTS = HeadStarts(high=6 * HOUR, normal=3 * HOUR, low=1 * HOUR, background=0)
NOW = Moment(1_800_000_000 * MICROSECONDS, 5_000)


def data(**fields: Any) -> CompletionData:
    """What came over the wire."""
    return convert({"prompt": "hello"} | fields if "messages" not in fields else fields, CompletionData)


def intake() -> Intake:
    return Intake(HEAD_STARTS, Chance(random.Random(1)))


def made(**fields: Any) -> NewRequest:
    given = data(**fields)
    return intake().new_request(given, normalise(given), "stub/echo", "stub", NOW)


def refused(**fields: Any) -> InvalidData:
    with pytest.raises(InvalidData) as caught:
        made(**fields)
    return caught.value


# -- the content that counts (Q4) -------------------------------------------------------------------------------------


@pytest.mark.promise("Q4")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"request_id": "r"}),
        ({}, {"stream": True}),
        ({}, {"priority": "NORMAL"}),
        ({}, {"on_busy": "enqueue", "fork": False, "hold_on_retry": True}),
        ({}, {"system": ""}),
        ({}, {"stop": []}),
        ({}, {"retry": {}}),
        ({"session_id": "c"}, {"conversation_id": "c"}),
        ({"session_id": "c"}, {"conversation_id": "c", "session_id": "c"}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"metadata": {"a": 1, "b": {"c": 2, "d": 3}}}, {"metadata": {"b": {"d": 3, "c": 2}, "a": 1}}),
        (
            {"messages": [{"role": "user", "content": "a b"}]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
                ]
            },
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "system": "be brief"},
            {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]},
        ),
    ],
)
def test_the_same_said_in_another_way_is_the_same_request(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert made(**one).body == made(**other).body


FIELDS: dict[str, Any] = {
    "prompt": "another",
    "messages": [{"role": "user", "content": "hello"}],
    "model": "stub/other",
    "session_id": "c",
    "agent_id": "a",
    "system": "be brief",
    "max_tokens": 5,
    "temperature": 0.0,
    "stop": "x",
    "priority": "high",
    "on_busy": "reject",
    "hold_on_retry": False,
    "not_before": 1.0,
    "delay": 1.0,
    "ttl": 1.0,
    "timeout": 1.0,
    "retry": {"max_attempts": 1},
    "metadata": {"a": 1},
    "provider_options": {"a": 1},
}


@pytest.mark.promise("Q4")
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_of_the_content_counts(field: str) -> None:
    assert made(**{field: FIELDS[field]}).body != made().body


@pytest.mark.promise("Q4")
def test_to_fork_a_conversation_is_not_to_go_on_in_it() -> None:
    assert made(session_id="c", fork=True).body != made(session_id="c").body


@given(st.fixed_dictionaries({}, optional={name: st.just(value) for name, value in FIELDS.items() if name != "delay"}))
def test_a_body_comes_back_from_its_bytes(fields: dict[str, Any]) -> None:
    if "messages" in fields:
        fields.pop("prompt", None)
    body = normalise(data(**fields))
    assert decode_body(encode_body(body)) == body


# -- what is said -----------------------------------------------------------------------------------------------------


def test_leading_system_messages_stand_above_the_dialogue_behind_the_system_text() -> None:
    body = normalise(
        data(
            system="first",
            messages=[
                {"role": "system", "content": "second"},
                {"role": "system", "content": [{"text": "thi"}, {"text": "rd"}]},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
        )
    )
    assert body.system == "first\n\nsecond\n\nthird"
    assert body.messages == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert body.prompt is None


def test_a_prompt_is_a_dialogue_of_one() -> None:
    body = normalise(data(prompt=" hello\n"))
    assert body.dialogue() == (Message("user", " hello\n"),)


USER = {"role": "user", "content": "a"}


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n\t"}, "prompt"),
        ({"prompt": "a", "messages": [USER]}, "prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "messages[1].role"),
        (
            {"messages": [{"role": "system", "content": "x"}, USER, {"role": "system", "content": "x"}]},
            "messages[2].role",
        ),
        ({"fork": True}, "fork"),
        ({"session_id": "a", "conversation_id": "b"}, "conversation_id"),
        ({"priority": "urgent"}, "priority"),
        ({"delay": 1.0, "not_before": 1.0}, "not_before"),
    ],
)
def test_an_invalid_request_is_refused_with_the_field_s_path(fields: dict[str, Any], path: str) -> None:
    assert refused(**fields).path == path


def test_neither_prompt_nor_messages_is_refused() -> None:
    with pytest.raises(InvalidData) as caught:
        normalise(convert({}, CompletionData))
    assert caught.value.path == "prompt"


@pytest.mark.promise("S1")
@pytest.mark.parametrize("field", ["metadata", "provider_options", "mcp_config"])
def test_free_json_that_is_nested_too_deeply_is_refused(field: str) -> None:
    value: dict[str, Any] = {}
    for _ in range(500):
        value = {"a": value}
    assert refused(**{field: value}).path == field


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_named_conversation_keeps_its_name_and_an_unnamed_one_gets_a_new_one() -> None:
    assert made(session_id="talk").conversation == "talk"
    names = {
        intake.new_request(data(), normalise(data()), "m", "r", NOW).conversation
        for intake in [intake()]
        for _ in range(5)
    }
    assert len(names) == 5
    assert all(name.startswith("conv_") for name in names)


@pytest.mark.promise("L7")
def test_a_fork_is_a_new_conversation_next_to_the_named_one() -> None:
    new = made(session_id="talk", fork=True)
    assert new.fork_of == "talk"
    assert new.conversation.startswith("conv_")
    assert made(session_id="talk").fork_of is None


def test_a_request_has_the_id_it_came_with_or_a_new_one() -> None:
    assert made(request_id="mine").request_id == "mine"
    assert made().request_id.startswith("req_")


def test_options_about_queues_and_retries_are_passed_on() -> None:
    new = made(on_busy="interrupt", hold_on_retry=False, agent_id="a", priority="LOW")
    assert (new.on_busy, new.hold_on_retry, new.agent_id, new.priority) == (
        OnBusy.INTERRUPT,
        False,
        "a",
        Priority.LOW,
    )
    assert (new.model, new.route) == ("stub/echo", "stub")


# -- time (Q2, Q7) ----------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q2", "Q7")
@given(
    priority=st.sampled_from(Priority),
    other=st.sampled_from(Priority),
    delay=st.none() | st.floats(0, 1e6),
    not_before=st.none() | st.floats(0, 4e9),
)
def test_a_request_ranks_from_its_due_time_and_never_from_before_it_came(
    priority: Priority, other: Priority, delay: float | None, not_before: float | None
) -> None:
    times = {"delay": delay} if delay is not None else {"not_before": not_before} if not_before is not None else {}
    new = made(priority=priority.word, **times)
    at = max(NOW.wall, new.due or 0)
    assert new.rank == HEAD_STARTS.rank(priority, at)
    if priority <= other:
        assert new.rank <= made(priority=other.word, **times).rank


@pytest.mark.promise("Q7")
def test_a_delay_counts_from_now_and_not_before_is_a_time() -> None:
    assert due_time(data(delay=2.5), NOW) == NOW.wall + 2_500_000
    assert due_time(data(delay=0), NOW) == NOW.wall
    assert due_time(data(not_before=1_900_000_000.25), NOW) == microseconds(1_900_000_000.25)
    assert due_time(data(not_before=0), NOW) == 0
    assert due_time(data(), NOW) is None


@pytest.mark.promise("Q7")
def test_a_time_to_live_counts_from_now_whatever_the_delay() -> None:
    assert made(ttl=10).expires == NOW.wall + 10_000_000
    assert made(ttl=10, delay=60).expires == NOW.wall + 10_000_000
    assert made().expires is None


# -- asking again (F2) ------------------------------------------------------------------------------------------------


@pytest.mark.promise("F2")
def test_a_requeue_is_a_new_request_with_the_old_one_s_content_and_none_of_its_times() -> None:
    old = made(
        request_id="old",
        session_id="talk",
        fork=True,
        agent_id="a",
        priority="high",
        delay=60,
        ttl=5,
        hold_on_retry=False,
    )
    view = RequestView(
        request_id="old",
        conversation="child",
        state=State.FAILED,
        priority=old.priority,
        model=old.model,
        route="old-route",
        body=old.body,
        agent_id=old.agent_id,
    )
    later = NOW.after(100)
    new = intake().requeue(view, "new-route", later)
    assert new.request_id.startswith("req_")
    assert (new.requeued_from, new.conversation, new.fork_of) == ("old", "child", None)
    assert (new.body, new.model, new.agent_id, new.route) == (old.body, old.model, "a", "new-route")
    assert (new.due, new.expires, new.on_busy) == (None, None, OnBusy.ENQUEUE)
    assert new.rank == HEAD_STARTS.rank(Priority.HIGH, later.wall)
    assert new.hold_on_retry is False
