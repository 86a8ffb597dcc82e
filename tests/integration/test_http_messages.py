"""Anthropic's API over HTTP: requests to an endpoint of that API, and translations of other answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from ksi.http import messages
from ksi.request import Usage
from tests.claude import until
from tests.endpoint import Answer, ScriptedEndpoint
from tests.http_door import Door, door

CLAUDE = {"User-Agent": "claude-cli/2.1.330 (external, sdk-cli)", "x-claude-code-session-id": "s1"}
TOOL_CALL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}


def whole(*content: Any, **fields: Any) -> Answer:
    """A message as the API sends it, with unknown fields."""
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": list(content),
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 2, "server_tool_use": None},
        "new_field": {"of": "tomorrow"},
        **fields,
    }
    return Answer(body=json.dumps(message).encode())


@pytest.mark.promise("A6", "H2")
async def test_a_call_reaches_an_endpoint_of_its_dialect_with_every_field_and_so_does_the_answer() -> None:
    answer = whole({"type": "text", "text": "Hello."}, {"type": "from_tomorrow", "x": [1.5, None]})
    async with ScriptedEndpoint(answer) as endpoint, door(endpoint) as here:
        asked = {
            "model": "claude-x",
            "max_tokens": 9,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi.", "cache_control": {"type": "e"}}]}
            ],
            "unknown": {"deep": [1, 2.5, "x"]},
            "stream": False,
        }
        reply = await here.post("/v1/messages?beta=true", asked, anthropic_beta="b1,b2")
        assert json.loads(reply.body) == json.loads(answer.body or b"")
        assert endpoint.requests[0].json == asked
        assert endpoint.requests[0].headers["anthropic-beta"] == "b1,b2"


@pytest.mark.promise("A6", "H2")
async def test_a_streamed_answer_of_its_dialect_comes_event_for_event() -> None:
    parts = (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":1}}}\n\n',
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"n"}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"new_delta"}}\n\n',
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"x":1}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    )
    async with ScriptedEndpoint(Answer(parts=parts)) as endpoint, door(endpoint) as here:
        reply = await here.message(stream=True)
        assert reply.body == b"".join(parts)
        assert reply.headers["Content-Type"].startswith("text/event-stream")


@pytest.mark.promise("A6", "H2")
async def test_an_answer_of_another_dialect_is_translated_with_its_calls_of_tools() -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    chat = {
        "model": "gpt-x",
        "choices": [{"index": 0, "message": {"content": "Look.", "tool_calls": [call]}, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    tools = [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}]
    async with ScriptedEndpoint(Answer(body=json.dumps(chat).encode())) as endpoint, door(openai=endpoint) as here:
        reply = await here.message(model="openai/gpt-x", tools=tools, system="Be brief.")
        assert reply.status == 200, reply.body
        assert reply.json["content"] == [{"type": "text", "text": "Look."}, TOOL_CALL]
        assert (reply.json["stop_reason"], reply.json["usage"]["input_tokens"]) == ("tool_use", 7)
        sent = endpoint.requests[0].json
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert sent["tools"][0]["function"] == {"name": "weather", "description": "d", "parameters": {"type": "object"}}
        streamed = await here.message(model="openai/gpt-x", tools=tools, stream=True)
        kinds = [name for name, _ in streamed.events]
        assert kinds[0] == "message_start"
        assert kinds[-2:] == ["message_delta", "message_stop"]
        started = [data["content_block"]["type"] for name, data in streamed.events if name == "content_block_start"]
        assert started == ["text", "tool_use"]


@pytest.mark.promise("A2", "H2")
async def test_a_feature_that_no_provider_of_the_model_supports_is_refused_by_name() -> None:
    async with ScriptedEndpoint() as endpoint, door(openai=endpoint) as here:
        search = [{"type": "web_search_20250305", "name": "web_search"}]
        reply = await here.message(model="openai/gpt-x", tools=search)
        assert reply.status == 400
        assert "web_search_20250305" in reply.json["error"]["message"]
        assert reply.headers["x-should-retry"] == "false"
        assert endpoint.requests == []


@pytest.mark.promise("H2")
@pytest.mark.parametrize(
    ("answer", "status", "kind"),
    [
        (Answer(status=400, error_message="odd"), 400, "invalid_request_error"),
        (Answer(status=404, error_message="model: claude-x"), 404, "not_found_error"),
        (Answer(status=402), 402, "billing_error"),
    ],
)
async def test_an_error_of_the_endpoint_has_its_status_and_is_not_to_be_tried_again(
    answer: Answer, status: int, kind: str
) -> None:
    async with ScriptedEndpoint(answer) as endpoint, door(endpoint) as here:
        for stream in (False, True):
            reply = await here.message(stream=stream)
            assert (reply.status, reply.json["error"]["type"]) == (status, kind)
            assert reply.headers["x-should-retry"] == "false"


@pytest.mark.promise("H2")
async def test_a_client_that_leaves_cancels_its_request_unless_it_said_otherwise() -> None:
    async with ScriptedEndpoint(Answer(silent=True)) as endpoint, door(endpoint) as here:
        for number, keep in enumerate(("0", "1")):
            asking = asyncio.create_task(here.message(headers={"x_ksi_keep": keep, "Idempotency_Key": f"r{keep}"}))
            await endpoint.wait_for_requests(number + 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(endpoint.requests[0].gone.wait(), 10)
        assert not endpoint.requests[1].gone.is_set()
        queue = here.daemon.queue
        await until(lambda: set(queue.runs) == {"r1"})


@pytest.mark.promise("H2")
async def test_a_stream_that_waits_shows_claude_code_an_empty_block_that_the_answers_blocks_stand_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "BEGIN_HOLDING", 0.01)
    monkeypatch.setattr("ksi.http.streams.SIGN_OF_LIFE", 0.01)
    answer = Answer(delay=0.2, usage=Usage(input_tokens=10, output_tokens=5))
    async with ScriptedEndpoint(answer) as endpoint, door(endpoint) as here:
        events = (await here.message(stream=True, headers=CLAUDE)).events
        assert events[0][0] == "message_start"
        assert events[1][1]["content_block"] == {"type": "text", "text": ""}
        indexes = [data["index"] for _, data in events if "index" in data]
        assert indexes == sorted(indexes)
        assert set(indexes) == {0, 1}
        texts = [data["delta"]["text"] for name, data in events if name == "content_block_delta" and data["index"] == 1]
        assert "".join(texts) == "Hello there."
        [end] = [data for name, data in events if name == "message_delta"]
        assert (end["usage"]["input_tokens"], end["usage"]["output_tokens"]) == (10, 5)
        pings = (await here.message(stream=True)).events
        assert pings[0] == ("ping", {"type": "ping"})


@pytest.mark.promise("H2")
async def test_a_stream_that_is_refused_late_ends_with_its_error_and_its_second_try_gets_the_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "BEGIN_HOLDING", 0.01)
    answer = Answer(delay=0.2, status=402, error_message="no money")
    async with ScriptedEndpoint(answer) as endpoint, door(endpoint) as here:
        events = (await here.message(stream=True, headers=CLAUDE)).events
        assert events[-1][0] == "error"
        again = await here.message(stream=False, max_tokens=64, headers=CLAUDE)
        assert (again.status, again.headers["x-should-retry"]) == (402, "false")
        assert "no money" in again.json["error"]["message"]
        assert len(endpoint.requests) == 1
        await here.message(stream=False, max_tokens=64, headers=CLAUDE)
        assert len(endpoint.requests) == 2


@pytest.mark.promise("H2")
async def test_the_same_call_is_a_new_one_once_its_answer_was_fetched() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        first, second = await here.message(headers=CLAUDE), await here.message(headers=CLAUDE)
        assert first.headers["request-id"] != second.headers["request-id"]
        assert len(endpoint.requests) == 2
        same = {"Idempotency_Key": "mine"}
        assert (await here.message(headers=same)).body
        assert (await here.message(headers=same)).headers["request-id"] == "mine"
        assert len(endpoint.requests) == 3


@pytest.mark.promise("H2")
async def test_two_tries_at_once_are_one_call() -> None:
    async with ScriptedEndpoint(Answer(delay=0.3)) as endpoint, door(endpoint) as here:
        replies = await asyncio.gather(*(here.message(headers=CLAUDE) for _ in range(2)))
        assert len({reply.headers["request-id"] for reply in replies}) == 1
        assert len(endpoint.requests) == 1


@pytest.mark.promise("H2")
async def test_the_account_and_the_chain_follow_from_claude_codes_headers() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        main = await here.message("main", headers=CLAUDE)
        sub = {**CLAUDE, "x-claude-code-agent-id": "a1"}
        children = [await here.message(f"turn {n}", headers=sub) for n in range(3)]
        deeper = {**CLAUDE, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"}
        grandchild = await here.message("deep", headers=deeper)
        views = [await here.daemon.store.get(r.headers["request-id"]) for r in (*children, grandchild)]
        found = [(view.parent, view.depth, view.agent_id) for view in views if view is not None]
        born = (main.headers["request-id"], 1, "s1/a1")
        assert found == [born, born, born, (children[-1].headers["request-id"], 2, "s1/a2")]


@pytest.mark.promise("H2")
async def test_fleets_of_subagents_end_at_the_depth_of_their_chain() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint, chain={"max_depth": 1}) as here:
        await here.message("main", headers=CLAUDE)
        await here.message("sub", headers={**CLAUDE, "x-claude-code-agent-id": "a1"})
        deeper = {**CLAUDE, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"}
        reply = await here.message("deep", headers=deeper)
        assert (reply.status, reply.headers["x-should-retry"]) == (403, "false")
        assert "depth" in reply.json["error"]["message"]
        assert len(endpoint.requests) == 2


async def test_a_check_of_a_tool_passes_before_the_queue() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        check = await here.message(headers={**CLAUDE, "X_Stainless_Timeout": "60"})
        usual = await here.message("other", headers=CLAUDE)
        words = []
        for reply in (check, usual):
            view = await here.daemon.store.get(reply.headers["request-id"])
            assert view is not None
            words.append(view.priority.word)
        assert words == ["critical", "normal"]


async def test_tokens_are_counted_without_a_call() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        body = {"model": "claude-x", "messages": [{"role": "user", "content": "word " * 100}]}
        reply = await here.post("/v1/messages/count_tokens?beta=true", body)
        assert 100 < reply.json["input_tokens"] < 300
        assert endpoint.requests == []


@pytest.mark.promise("H1")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b'"x"', 400),
        (b'{"model": 7}', 400),
        (b'{"model": "claude-x"}', 200),
        (b"\xff\xfe", 400),
    ],
)
async def test_a_body_that_cannot_be_used_is_answered_in_the_shape(body: bytes, status: int) -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        reply = await here.post("/v1/messages", body)
        assert reply.status == status  # what the vendor's API says to a body is its own word
        if status != 200:
            assert reply.json["type"] == "error"
            assert reply.json["error"]["message"]


@pytest.mark.promise("H1")
async def test_a_client_without_access_is_refused_in_the_form_of_the_api() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint, http={"max_body": 1000}) as here:
        assert (await here.message(headers={"Authorization": "Bearer ksi_wrong"})).status == 401
        assert (await here.message(headers={"Host": "evil.example"})).status == 403
        assert (await here.message(headers={"Origin": "http://evil.example"})).status == 403
        too_large = await here.message("x" * 2000)
        assert (too_large.status, too_large.json["error"]["type"]) == (413, "request_too_large")
        assert (await here.get("/v1/nothing")).status == 404
        async with here.session.head(f"{here.url}/api/hello") as hello:
            assert hello.status == 200
        assert endpoint.requests == []


async def test_a_stop_of_the_daemon_ends_a_held_stream_with_an_error_and_keeps_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "BEGIN_HOLDING", 0.01)

    async def held(here: Door) -> bytes:
        try:
            return (await here.message(stream=True, headers=CLAUDE)).body
        except aiohttp.ClientError:
            return b"cut"

    async with ScriptedEndpoint(Answer(silent=True)) as endpoint:
        async with door(endpoint, service={"default_model": "stub/echo", "shutdown_grace": 0.1}) as here:
            holding = asyncio.create_task(held(here))
            await endpoint.wait_for_requests(1)
        assert b"event: error" in await holding
