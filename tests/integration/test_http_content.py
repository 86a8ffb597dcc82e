"""The content of answers, whole and streamed, is the same in each dialect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from ksi.content.blocks import Message
from ksi.content.features import Features, Native
from ksi.providers.anthropic import Options as MessagesOptions
from ksi.providers.base import Call, Chunk, Completion, Frame, Thought, ToolPiece
from ksi.request import Usage
from tests.endpoint import Answer
from tests.integration.http_calls import HttpProvider, a_call, both_apis, both_ways, pair

LOOK = {"name": "look", "input_schema": {"type": "object"}}
USAGE = Usage(input_tokens=6, output_tokens=5, cache_read_tokens=4)
USAGES: dict[str, dict[str, Any]] = {
    "openai": {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
    "anthropic": {"input_tokens": 6, "output_tokens": 5, "cache_read_input_tokens": 4},
}
STOPS = {
    "end_turn": {"openai": "stop", "anthropic": "end_turn"},
    "tool_use": {"openai": "tool_calls", "anthropic": "tool_use"},
    "max_tokens": {"openai": "length", "anthropic": "max_tokens"},
}
CALLS = (
    {"type": "tool_use", "id": "a1", "name": "look", "input": {"at": "one é"}},
    {"type": "tool_use", "id": "a2", "name": "find", "input": {}},
)
BLOCKS: tuple[dict[str, Any], ...] = ({"type": "text", "text": "Let me see."}, *CALLS)


def chat_whole(blocks: Sequence[dict[str, Any]], stop: str) -> bytes:
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    calls = [
        {"id": b["id"], "type": "function", "function": {"name": b["name"], "arguments": json.dumps(b["input"])}}
        for b in blocks
        if b["type"] == "tool_use"
    ]
    message = {"role": "assistant", "content": text or None, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": STOPS[stop]["openai"]}
    return json.dumps({"model": "m", "choices": [choice], "usage": USAGES["openai"]}).encode()


def message_whole(blocks: Sequence[dict[str, Any]], stop: str) -> bytes:
    message = {"type": "message", "role": "assistant", "model": "m", "content": blocks, "usage": USAGES["anthropic"]}
    return json.dumps({**message, "stop_reason": STOPS[stop]["anthropic"]}).encode()


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'model': 'm', 'choices': choices, **more})}\n\n".encode()


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def halves(value: Any) -> tuple[str, str]:
    text = json.dumps(value)
    return text[: len(text) // 2], text[len(text) // 2 :]


def chat_streamed(blocks: Sequence[dict[str, Any]], stop: str) -> bytes:
    """All calls begin, and then their inputs come by turns."""
    said = [chunk({"content": block["text"]}) for block in blocks if block["type"] == "text"]
    calls = [block for block in blocks if block["type"] == "tool_use"]
    for number, call in enumerate(calls):
        function = {"name": call["name"], "arguments": ""}
        said.append(
            chunk({"tool_calls": [{"index": number, "id": call["id"], "type": "function", "function": function}]})
        )
    for half in (0, 1):
        for number, call in enumerate(calls):
            part = halves(call["input"])[half]
            said.append(chunk({"tool_calls": [{"index": number, "function": {"arguments": part}}]}))
    end = json.dumps({"model": "m", "choices": [], "usage": USAGES["openai"]})
    return b"".join([*said, chunk({}, STOPS[stop]["openai"]), f"data: {end}\n\ndata: [DONE]\n\n".encode()])


def message_streamed(blocks: Sequence[dict[str, Any]], stop: str) -> bytes:
    said = [event("message_start", message={"model": "m", "usage": {**USAGES["anthropic"], "output_tokens": 1}})]
    for index, block in enumerate(blocks):
        if block["type"] == "text":
            said.append(event("content_block_start", index=index, content_block={"type": "text", "text": ""}))
            delta = {"type": "text_delta", "text": block["text"]}
            said.append(event("content_block_delta", index=index, delta=delta))
        else:
            said.append(event("content_block_start", index=index, content_block={**block, "input": {}}))
            for part in halves(block["input"]):
                delta = {"type": "input_json_delta", "partial_json": part}
                said.append(event("content_block_delta", index=index, delta=delta))
        said.append(event("content_block_stop", index=index))
    delta = {"stop_reason": STOPS[stop]["anthropic"]}
    said += [event("message_delta", delta=delta, usage={"output_tokens": 5}), event("message_stop")]
    return b"".join(said)


WRITERS = {
    ("openai", False): chat_whole,
    ("openai", True): chat_streamed,
    ("anthropic", False): message_whole,
    ("anthropic", True): message_streamed,
}


def scripted(api: str, blocks: Sequence[dict[str, Any]], stop: str, *, stream: bool) -> Answer:
    kind = "text/event-stream" if stream else "application/json"
    return Answer(body=WRITERS[api, stream](blocks, stop), content_type=kind)


async def items(provider: HttpProvider, call: Call) -> tuple[list[Any], Completion]:
    *pieces, last = [item async for item in provider.complete(call)]
    assert isinstance(last, Completion)
    return pieces, last


@pytest.mark.promise("A3", "A6")
@both_apis
@both_ways
@pytest.mark.parametrize("stop", STOPS)
async def test_parallel_calls_their_end_and_usage_are_the_same_from_everybody(
    api: str, stream: bool, stop: str
) -> None:
    async with pair(api, scripted(api, BLOCKS, stop, stream=stream)) as (_, provider):
        pieces, completion = await items(provider, a_call(stream=stream, features=Features(tools=(LOOK,))))
    assert completion.content == BLOCKS
    assert (completion.text, completion.stop_reason, completion.usage) == ("Let me see.", stop, USAGE)
    inputs: dict[str, str] = {}
    for piece in pieces:
        if isinstance(piece, ToolPiece):
            inputs[piece.id] = inputs.get(piece.id, "") + piece.json
    if stream:
        assert {call: json.loads(text) for call, text in inputs.items()} == {c["id"]: c["input"] for c in CALLS}
        assert {piece.name for piece in pieces if isinstance(piece, ToolPiece)} == {"look", "find"}
        assert "".join(piece.text for piece in pieces if isinstance(piece, Chunk)) == "Let me see."


@pytest.mark.promise("A4", "A6")
@both_apis
@both_ways
async def test_a_native_answer_is_passed_on_also_where_it_is_a_refusal(api: str, stream: bool) -> None:
    word = {"openai": "content_filter", "anthropic": "refusal"}[api]
    body = WRITERS[api, stream](({"type": "text", "text": "No."},), "end_turn")
    body = body.replace({"openai": b'"stop"', "anthropic": b'"end_turn"'}[api], json.dumps(word).encode())
    answer = Answer(body=body, content_type="text/event-stream" if stream else "application/json")
    messages = [{"role": "user", "content": "Hi"}]
    sent = {"model": "theirs", "messages": messages, "stream": stream, "next_year": {"a": [1]}}
    native = Native(
        dialect="anthropic" if api == "anthropic" else "chat", body=sent, headers={"anthropic-beta": "x-2026"}
    )
    async with pair(api, answer) as (endpoint, provider):
        call = msgspec.structs.replace(a_call(stream=stream), native=native, messages=())
        pieces, completion = await items(provider, call)
    assert (completion.text, completion.stop_reason) == ("No.", word)
    got = endpoint.requests[0].json
    assert {**got, "stream_options": None} == {**sent, "model": "small", "stream_options": None}
    assert endpoint.requests[0].headers["anthropic-beta"] == "x-2026"
    frames = [piece for piece in pieces if isinstance(piece, Frame)]
    assert bool(frames) == stream
    if stream:
        told = b"".join(frame.data for frame in frames)
        assert all(line.removeprefix(b"data: ") in told for line in body.splitlines() if line.startswith(b"data: {"))


@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param(
            [
                [{"index": 0, "id": "a1", "function": {"name": "look", "arguments": '{"at":1}'}}],
                [{"index": 0, "id": "a2", "function": {"name": "look", "arguments": '{"at":2}'}}],
            ],
            id="one index for all",
        ),
        pytest.param(
            [
                [{"index": 0, "id": "a1", "function": {"name": "look", "arguments": '{"at"'}}],
                [{"index": 0, "id": "a1", "function": {"arguments": ":1}"}}],
                [{"index": 0, "id": "a2", "function": {"name": "look", "arguments": '{"at"'}}],
                [{"index": 0, "id": "a2", "function": {"arguments": ":2}"}}],
            ],
            id="one index, and the id each time",
        ),
        pytest.param(
            [
                [{"id": "a1", "function": {"name": "look", "arguments": '{"at"'}}],
                [{"function": {"arguments": ":1}"}}],
                [{"id": "a2", "function": {"name": "look", "arguments": '{"at"'}}],
                [{"function": {"arguments": ":2}"}}],
            ],
            id="no index",
        ),
        pytest.param(
            [
                [{"index": 0, "function": {"name": "look", "arguments": '{"at":1}'}}],
                [{"index": 0, "function": {"name": "look", "arguments": '{"at":2}'}}],
            ],
            id="one index and no id",
        ),
        pytest.param(
            [
                [
                    {"function": {"name": "look", "arguments": {"at": 1}}},
                    {"function": {"name": "look", "arguments": {"at": 2}}},
                ],
            ],
            id="objects, without index and id",
        ),
    ],
)
async def test_calls_are_distinguished_however_an_endpoint_numbers_them(deltas: list[list[dict[str, Any]]]) -> None:
    body = b"".join([*(chunk({"tool_calls": calls}) for calls in deltas), chunk({}, "tool_calls"), b"data: [DONE]\n\n"])
    async with pair("openai", Answer(body=body, content_type="text/event-stream")) as (_, provider):
        pieces, completion = await items(provider, a_call(stream=True, features=Features(tools=(LOOK,))))
    assert [(block["name"], block["input"]) for block in completion.content] == [
        ("look", {"at": 1}),
        ("look", {"at": 2}),
    ]
    ids = [block["id"] for block in completion.content]
    assert len(set(ids)) == 2
    assert list(dict.fromkeys(piece.id for piece in pieces if isinstance(piece, ToolPiece))) == ids


@pytest.mark.promise("A3")
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thinking_comes_as_pieces_and_as_a_block(field: str) -> None:
    thoughts = [chunk({field: "Let me "}), chunk({field: "see."})]
    body = b"".join([*thoughts, chunk({"content": "Yes."}, "stop"), b"data: [DONE]\n\n"])
    async with pair("openai", Answer(body=body, content_type="text/event-stream")) as (_, provider):
        pieces, completion = await items(provider, a_call(stream=True))
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought)) == "Let me see."
    assert [block["type"] for block in completion.content] == ["thinking", "text"]
    assert completion.text == "Yes."


@pytest.mark.promise("A2")
async def test_a_budget_for_thinking_leaves_room_for_an_answer() -> None:
    async with pair("anthropic", scripted("anthropic", BLOCKS[:1], "end_turn", stream=False)) as (endpoint, provider):
        await items(provider, a_call(features=Features(reasoning={"budget_tokens": 10_000})))
    sent = endpoint.requests[0].json
    assert sent["max_tokens"] == MessagesOptions().max_tokens + 10_000


@pytest.mark.promise("A5")
@both_apis
async def test_a_call_s_id_that_a_vendor_does_not_accept_is_replaced(api: str) -> None:
    odd = "functions.look:0" + "x" * 50
    call = {"type": "tool_use", "id": odd, "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": odd, "content": "seen"}
    messages = [Message("user", "Hi"), Message("assistant", (call,)), Message("user", (result,))]
    async with pair(api, scripted(api, BLOCKS[:1], "end_turn", stream=False)) as (endpoint, provider):
        await items(provider, a_call(messages=messages))
    said = endpoint.requests[0].json["messages"]
    made = said[1]["tool_calls"][0]["id"] if api == "openai" else said[1]["content"][0]["id"]
    answered = said[2]["tool_call_id"] if api == "openai" else said[2]["content"][0]["tool_use_id"]
    assert made == answered == "call_1"
