"""What goes out of a conversation's history is what the APIs take, whatever was accepted before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.completion.intake import normalise
from ksi.completion.pool.abilities import takes
from ksi.completion.session_manager import Exchange, Past, count, fit
from ksi.content.anthropic import write_request
from ksi.content.blocks import Content, Message
from ksi.content.chat import write_messages
from ksi.content.features import Features
from ksi.content.history import in_words, sendable
from ksi.errors import InvalidData
from ksi.events.completions import CompletionData
from ksi.providers.anthropic import _FEATURES as ANTHROPIC
from ksi.providers.base import Capabilities
from ksi.providers.openai import _FEATURES as CHAT

VENDOR = Capabilities(dialect="anthropic", features=ANTHROPIC)
OTHER = Capabilities(dialect="chat", features=CHAT)
BARE = Capabilities()


# -- the APIs' rules --------------------------------------------------------------------------------------------------


def check_anthropic(messages: Sequence[dict[str, Any]], own: frozenset[str]) -> None:
    """The rules of the Messages API; `own` are the signatures of thinking that it made."""
    assert messages
    assert messages[0]["role"] == "user"
    merged: list[tuple[str, list[dict[str, Any]]]] = []
    for message in messages:
        assert message["role"] in ("user", "assistant")
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        assert blocks
        if merged and merged[-1][0] == message["role"]:
            merged[-1][1].extend(blocks)
        else:
            merged.append((message["role"], blocks))
    seen: set[str] = set()
    for number, (role, blocks) in enumerate(merged):
        for block in blocks:
            assert block["type"] != "text" or block["text"].strip()
            assert block["type"] != "thinking" or block["signature"] in own
        calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        assert not calls or role == "assistant"
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", call) for call in calls)
        assert len(set(calls)) == len(calls)
        assert not seen & set(calls)
        seen |= set(calls)
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        before = merged[number - 1][1] if number else []
        assert sorted(results) == sorted(block["id"] for block in before if block["type"] == "tool_use")
        kinds = [block["type"] == "tool_result" for block in blocks]
        assert kinds == sorted(kinds, reverse=True)
    assert merged[-1][0] == "user"


def check_chat(messages: Sequence[dict[str, Any]]) -> None:
    """The rules of chat completions."""
    open_calls: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in open_calls
            open_calls.remove(message["tool_call_id"])
            continue
        assert not open_calls
        content = message["content"]
        calls = message.get("tool_calls", [])
        assert content is None or isinstance(content, list) or content.strip()
        assert content or calls
        assert isinstance(content, str | None) or all(
            part["type"] in ("text", "image_url", "file") and (part["type"] != "text" or part["text"].strip())
            for part in content
        )
        open_calls = {call["id"] for call in calls}
        assert len(open_calls) == len(calls)
        assert all(0 < len(call) <= 40 for call in open_calls)
    assert not open_calls
    assert messages[-1]["role"] in ("user", "tool")


# -- dialogues --------------------------------------------------------------------------------------------------------

ids = st.sampled_from(["call_0", "toolu_1", "functions.look:0", "x" * 60, "é"])
texts = st.sampled_from(["", " \n", "words", "more words"])
text_blocks = texts.map(lambda text: {"type": "text", "text": text})
tool_uses = ids.map(lambda call: {"type": "tool_use", "id": call, "name": "look", "input": {}})
pictures = st.just({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}})
answer_blocks = st.one_of(
    text_blocks,
    tool_uses,
    st.just({"type": "thinking", "thinking": "hm", "signature": "vendor"}),
    st.just({"type": "redacted_thinking", "data": "x"}),
    st.just({"type": "server_tool_use", "id": "srv", "name": "search", "input": {}}),
    st.just({"type": "search_result", "tool_use_id": "srv", "content": []}),
)


def distinct(blocks: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Without calls of one id twice, which no endpoint gives in one answer."""
    seen: set[str] = set()
    return tuple(b for b in blocks if b["type"] != "tool_use" or not (b["id"] in seen or seen.add(b["id"])))  # type: ignore[func-returns-value]


answers = texts | st.lists(answer_blocks, min_size=1, max_size=4).map(distinct)
results = ids.map(lambda call: {"type": "tool_result", "tool_use_id": call, "content": "seen"})
asked_blocks = st.lists(st.one_of(text_blocks, pictures, results), min_size=1, max_size=4).map(
    lambda blocks: tuple({b.get("tool_use_id", n): b for n, b in enumerate(blocks)}.values())
)
questions = texts | asked_blocks
turns = st.lists(st.tuples(questions, answers, st.sampled_from(["vendor", "other"])), max_size=6)


def accepted(content: Content) -> tuple[Message, ...] | None:
    """What the door makes of a message of the user in a conversation; None where it refuses it."""
    sent = content if isinstance(content, str) else list(content)
    data = msgspec.convert({"messages": [{"role": "user", "content": sent}], "session_id": "talk"}, CompletionData)
    try:
        return normalise(data).dialogue()
    except InvalidData:
        return None


def past_of(told: list[tuple[Content, Content, str]]) -> Past:
    exchanges = []
    for number, (question, answer, provider) in enumerate(told):
        said = accepted(question)
        if said is not None:
            messages = (*said, Message("assistant", answer))
            exchanges.append(Exchange(number, messages, count(messages), 0, provider))
    flat = tuple(message for exchange in exchanges for message in exchange.messages)
    return Past(len(told), tuple(exchanges), flat, count(flat), 0, True)


@pytest.mark.promise("A5")
@settings(max_examples=400)
@given(told=turns, limit=st.integers(0, 200))
def test_whatever_was_accepted_a_later_turn_is_one_that_the_apis_take(
    told: list[tuple[Content, Content, str]], limit: int
) -> None:
    past, now = past_of(told), (Message("user", "now"),)
    to_vendor = fit(past, limit, "vendor", VENDOR, now)
    body = write_request((*to_vendor, *now), None, Features(reasoning={"budget_tokens": 5}))
    check_anthropic(body["messages"], frozenset({"vendor"}))
    to_other = fit(past, limit, "other", OTHER, now)
    check_chat(write_messages((*to_other, *now), None))
    to_third = fit(past, limit, "third", VENDOR, now)
    check_anthropic(write_request((*to_third, *now), None, Features())["messages"], frozenset())
    assert all(
        block["type"] != "search_result" for m in to_third if not isinstance(m.content, str) for block in m.content
    )
    bare = fit(past, limit, "third", BARE, now)
    assert all(isinstance(m.content, str) and m.content.strip() for m in bare)


@pytest.mark.promise("A5")
@settings(max_examples=200)
@given(told=turns, calls=st.lists(ids, min_size=1, max_size=3, unique=True), limit=st.integers(0, 60), more=texts)
def test_the_results_of_the_last_calls_find_them_however_little_fits(
    told: list[tuple[Content, Content, str]], calls: list[str], limit: int, more: str
) -> None:
    answer = tuple({"type": "tool_use", "id": call, "name": "look", "input": {}} for call in calls)
    past = past_of([*told, ("Look", answer, "vendor")])
    given_ = tuple({"type": "tool_result", "tool_use_id": call, "content": "seen"} for call in calls)
    now = accepted(({"type": "text", "text": more}, *given_))
    assert now is not None
    sent = (*fit(past, limit, "vendor", VENDOR, now), *now)
    written = write_request(sent, None, Features(reasoning={"budget_tokens": 5}))
    check_anthropic(written["messages"], frozenset({"vendor"}))
    assert "thinking" not in written
    check_chat(write_messages((*fit(past, limit, "other", OTHER, now), *now), None))


def talk(*said: tuple[str, Any]) -> list[list[Message]]:
    return [[Message("user", question), Message("assistant", answer)] for question, answer in said]


CALL = {"type": "tool_use", "id": "a", "name": "look", "input": {"at": 1}}
NOW = [Message("user", "now")]


@pytest.mark.promise("A5")
def test_a_turn_that_ended_in_an_unanswered_call_is_left_out() -> None:
    assert sendable(talk(("one", "1"), ("two", (CALL,)), ("three", "3")), NOW) == [
        m for turn in talk(("one", "1"), ("three", "3")) for m in turn
    ]


@pytest.mark.promise("A5")
def test_the_text_next_to_the_call_stays() -> None:
    said = ({"type": "text", "text": "Let me look"}, CALL)
    assert sendable(talk(("two", said)), NOW) == talk(("two", "Let me look"))[0]


@pytest.mark.promise("A5")
def test_a_search_that_was_cut_off_from_its_result_is_left_out() -> None:
    searched = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    text = {"type": "text", "text": "It says"}
    assert sendable(talk(("q", (searched, found, text))), NOW)[1].content == (searched, found, text)
    assert sendable(talk(("q", (text, searched))), NOW)[1].content == "It says"


@pytest.mark.promise("A5")
def test_words_stand_for_blocks_that_a_provider_cannot_take() -> None:
    blocks: tuple[dict[str, Any], ...] = (
        {"type": "text", "text": "See "},
        {"type": "image", "source": {"type": "url", "url": "https://there"}},
        {"type": "document", "source": {"type": "url", "url": "https://there"}, "title": "Plan"},
        CALL,
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "found"}]},
    )
    words = in_words(blocks, takes(BARE))
    assert words == (
        "See [image, left out here]\n[the document Plan, left out here]\n"
        '[called the tool look with {"at":1}]\n[result of the tool: found]\n'
    )
    assert in_words(blocks, takes(VENDOR)) is blocks


@pytest.mark.promise("A5")
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", "Hi"), ("assistant", [CALL]), ("user", "and?")], "a has no result"),
        ([("user", [{"type": "tool_result", "tool_use_id": "b"}])], "b is no call"),
        ([("user", [CALL])], "calls of tools are the assistant's"),
        ([("user", "Hi"), ("assistant", [CALL]), ("user", [{"type": "tool_result", "tool_use_id": "b"}])], "a has no"),
    ],
)
def test_a_dialogue_that_leaves_a_call_open_is_refused_when_it_comes(
    messages: list[tuple[str, Any]], words: str
) -> None:
    data = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(InvalidData, match=words):
        normalise(msgspec.convert(data, CompletionData))
