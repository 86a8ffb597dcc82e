"""OpenAI's chat completions over HTTP: requests to an endpoint of that API, and translations to others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.endpoint import Answer, ScriptedEndpoint
from tests.http_door import door

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def piece(delta: Any, finish: str | None = None, **fields: Any) -> bytes:
    """An event of a streamed chat completion."""
    chunk = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@pytest.mark.promise("A6", "H3")
async def test_a_call_reaches_an_endpoint_of_its_dialect_with_every_field_and_so_does_the_answer() -> None:
    completion = {
        "id": "c1",
        "model": "gpt-x",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop", "logprobs": {}}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        "from_tomorrow": [1.5],
    }
    async with (
        ScriptedEndpoint(Answer(body=json.dumps(completion).encode())) as endpoint,
        door(openai=endpoint) as here,
    ):
        asked = {
            "model": "gpt-x",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Hi.", "name": "me"},
            ],
            "logprobs": True,
            "n": 1,
            "unknown": {"deep": [1]},
            "stream": False,
        }
        reply = await here.post("/v1/chat/completions", asked)
        assert reply.json == completion
        assert endpoint.requests[0].json == asked


@pytest.mark.promise("A6", "H3")
@pytest.mark.parametrize("asks", [True, False])
async def test_a_streamed_answer_of_its_dialect_comes_event_for_event_and_its_counts_if_they_were_requested(
    asks: bool,
) -> None:
    said = (piece({"role": "assistant", "content": "Hi"}), piece({"content": "."}), piece({}, "stop"))
    counts = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}\n\n'
    done = b"data: [DONE]\n\n"
    async with ScriptedEndpoint(Answer(parts=(*said, counts, done))) as endpoint, door(openai=endpoint) as here:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asks else {}
        reply = await here.chat(stream=True, **options)
        assert reply.body == b"".join((*said, *((counts,) if asks else ()), done))
        assert endpoint.requests[0].json["stream_options"]["include_usage"] is True


@pytest.mark.promise("A6", "H3")
async def test_an_answer_of_another_dialect_is_translated_with_its_calls_of_tools_whole_and_streamed() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
    message = {
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "Look."}, call],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 1},
    }
    async with ScriptedEndpoint(Answer(body=json.dumps(message).encode())) as endpoint, door(endpoint) as here:
        reply = await here.chat(model="anthropic/claude-x", tools=TOOLS, tool_choice="required", max_tokens=50)
        [choice] = reply.json["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Look.")
        [made] = choice["message"]["tool_calls"]
        assert (made["id"], json.loads(made["function"]["arguments"])) == ("t1", {"city": "Bonn"})
        assert reply.json["usage"]["prompt_tokens"] == 6
        sent = endpoint.requests[0].json
        assert (sent["tool_choice"], sent["max_tokens"]) == ({"type": "any"}, 50)
        streamed = (await here.chat(model="anthropic/claude-x", tools=TOOLS, stream=True)).events
        assert streamed[-1] == ("", "[DONE]")
        deltas = [data["choices"][0]["delta"] for _, data in streamed[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Look."
        arguments = "".join(part["function"]["arguments"] for delta in deltas for part in delta.get("tool_calls", ()))
        assert json.loads(arguments) == {"city": "Bonn"}


@pytest.mark.promise("H3")
async def test_a_dialogue_with_the_results_of_tools_reaches_another_dialect_in_its_order() -> None:
    calls = [
        {"id": f"t{n}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"n": n})}}
        for n in (1, 2)
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Compare."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "tool", "tool_call_id": "t2", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]
    async with ScriptedEndpoint() as endpoint, door(endpoint) as here:
        body = {"model": "anthropic/claude-x", "messages": messages, "tools": TOOLS}
        assert (await here.post("/v1/chat/completions", body)).status == 200
        sent = endpoint.requests[0].json
        assert sent["system"] == "Be brief."
        assert [m["role"] for m in sent["messages"]] == ["user", "assistant", "user", "user"]
        assert [b["type"] for b in sent["messages"][1]["content"]] == ["tool_use", "tool_use"]
        assert [(b["tool_use_id"], b["content"]) for b in sent["messages"][2]["content"]] == [
            ("t1", "sun"),
            ("t2", "rain"),
        ]


@pytest.mark.promise("H3")
async def test_errors_have_this_apis_form() -> None:
    async with ScriptedEndpoint(Answer(status=400, error_message="odd")) as endpoint, door(openai=endpoint) as here:
        odd = await here.chat()
        assert (odd.status, odd.json["error"]["type"]) == (400, "invalid_request_error")
        assert "odd" in odd.json["error"]["message"]
        assert (await here.chat(model="nobody/x")).status == 404
        assert (await here.chat(headers={"Authorization": "Bearer no"})).json["error"]["type"] == "authentication_error"
        n = await here.chat(model="stub/echo", n=3)
        assert (n.status, n.json["error"]["code"]) == (400, "unsupported")


@pytest.mark.promise("H3")
async def test_an_idempotency_key_is_the_requests_id() -> None:
    async with ScriptedEndpoint() as endpoint, door(openai=endpoint) as here:
        first = await here.chat(headers={"Idempotency_Key": "mine"})
        again = await here.chat(headers={"Idempotency_Key": "mine"})
        assert first.json["choices"][0]["message"]["content"] == again.json["choices"][0]["message"]["content"]
        assert len(endpoint.requests) == 1
        assert (await here.chat("Other.", headers={"Idempotency_Key": "mine"})).status == 422


@pytest.mark.promise("H2", "H3")
async def test_models_are_listed_in_the_form_of_the_client() -> None:
    async with door(http={"models": {"claude-*": "stub/echo", "small": "stub/echo"}}) as here:
        ours = (await here.get("/v1/models")).json
        theirs = (await here.get("/v1/models", anthropic_version="2023-06-01")).json
        assert (
            {item["id"] for item in ours["data"]} == {item["id"] for item in theirs["data"]} == {"stub/echo", "small"}
        )
        assert (ours["object"], theirs["has_more"]) == ("list", False)
        assert (await here.get("/v1/models/stub/echo")).json["id"] == "stub/echo"
        assert (await here.get("/v1/models/none")).status == 404
        assert (await here.chat(model="small")).status == 200
