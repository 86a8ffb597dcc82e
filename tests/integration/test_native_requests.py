"""Requests as real clients send them, through a daemon: nothing is lost on the way to the vendor they were made for,
and another vendor is asked the same or the request is refused by name.

The files in tests/data/requests were recorded from Claude Code and the two SDKs. Texts in them that are long were cut.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.content import anthropic, chat
from ksi.content.features import Asked
from ksi.testing import running_daemon
from tests.endpoint import ScriptedEndpoint
from tests.integration.wire import Json, Wire

FOLDER = Path(__file__).parents[1] / "data" / "requests"
RECORDED = sorted(path.stem for path in FOLDER.glob("*.json"))
READERS = {"anthropic": anthropic.read_request, "chat": chat.read_request}
WRITTEN = {"model", "stream", "stream_options"}
"""The fields that KSI sets."""


def recorded(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return read


@asynccontextmanager
async def house() -> AsyncIterator[tuple[ScriptedEndpoint, Wire]]:
    async with ScriptedEndpoint() as endpoint:
        settings: dict[str, dict[str, Any]] = {
            "service": {"default_model": "stub/x"},
            "retry": {"max_attempts": 1},
            "providers": {
                "stub": {"kind": "stub"},
                "messages": {"kind": "anthropic", "base_url": endpoint.url},
                "chats": {"kind": "openai", "base_url": f"{endpoint.url}/v1"},
            },
        }
        async with (
            running_daemon(settings=settings, environ={"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k"}) as daemon,
            await Wire.open(daemon.config.socket_path) as wire,
        ):
            yield endpoint, wire


@pytest.mark.promise("A6")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", RECORDED)
async def test_a_client_s_request_reaches_its_vendor_unchanged(name: str, stream: bool) -> None:
    native = recorded(name)
    provider = "messages" if native["dialect"] == "anthropic" else "chats"
    async with house() as (endpoint, wire):
        reply = await wire.ask("completion:request", model=f"{provider}/vendors", native=native, stream=stream)
        assert (reply["status"], reply["result"]) == ("completed", "Hello there.")
        (seen,) = endpoint.requests
    for field in native["body"].keys() | seen.json.keys():
        if field not in WRITTEN:
            assert seen.json[field] == native["body"][field], field
    assert (seen.json["model"], seen.json["stream"]) == ("vendors", stream)
    assert list(seen.json["messages"]) == native["body"]["messages"]
    betas = native["headers"].get("anthropic-beta")
    assert betas is None or seen.headers["anthropic-beta"] == betas


async def whole(wire: Wire, event: str, **data: Any) -> Json:
    """The reply's envelope, be it an error."""
    return await wire.post(event, data)


def said(asked: Asked) -> list[tuple[str, str]]:
    """Each call, result and word of a dialogue, in order, in any dialect."""
    told: list[tuple[str, str]] = []
    for message in asked.messages:
        blocks = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
        for block in blocks:
            if block["type"] == "text" and message.role != "system":
                told.append((message.role, block["text"]))
            elif block["type"] == "tool_use":
                told.append(("call", json.dumps([block["id"], block["name"], block["input"]])))
            elif block["type"] == "tool_result":
                told.append(("result", block["tool_use_id"]))
    return told


@pytest.mark.promise("A2", "A6")
@pytest.mark.parametrize("name", RECORDED)
async def test_another_vendor_gets_the_same_request_or_its_unsupported_fields_are_named(name: str) -> None:
    native = recorded(name)
    other = "chats" if native["dialect"] == "anthropic" else "messages"
    dialect = "chat" if other == "chats" else "anthropic"
    mine = READERS[native["dialect"]](native["body"])
    async with house() as (endpoint, wire):
        fields = {"model": f"{other}/vendors", "native": native}
        answer = await whole(wire, "completion:request", **fields)
        error = answer.get("error")
        if error is not None:
            assert error["code"] == "unsupported"
            assert error["details"]["fields"]
        assert len(endpoint.requests) == (error is None)
        reply = await wire.ask("completion:request", **fields, drop_unsupported=True)
        assert reply["status"] == "completed"
        if error is not None:
            assert all(field in reply["note"] for field in error["details"]["fields"])
        theirs = READERS[dialect](endpoint.requests[-1].json)
    assert said(theirs) == said(mine)
    assert [tool["name"] for tool in theirs.features.tools] == [tool["name"] for tool in mine.features.tools]
    assert (theirs.max_tokens or 8_192) == (mine.max_tokens or 8_192)


@pytest.mark.promise("A2")
async def test_a_feature_that_no_provider_supports_is_refused_by_name_before_anything_is_stored() -> None:
    asked = {"prompt": "Hi", "model": "messages/v", "seed": 4, "response_format": {"type": "json_object"}}
    async with house() as (endpoint, wire):
        answer = await whole(wire, "completion:request", **asked, request_id="r1")
        assert answer["error"]["code"] == "unsupported"
        assert answer["error"]["details"] == {
            "fields": ["seed", "response_format of type json_object"],
            "providers": ["messages"],
        }
        assert (await whole(wire, "completion:get", request_id="r1"))["error"]["code"] == "not_found"
        assert endpoint.requests == []
        dropped = await wire.ask("completion:request", **asked, drop_unsupported=True)
        assert dropped["note"] == "left out, as the provider cannot do it: seed, response_format of type json_object"
        assert not {"seed", "output_config"} & endpoint.requests[0].json.keys()


@pytest.mark.promise("A5")
async def test_a_request_that_only_its_vendor_understands_harms_no_later_turn() -> None:
    body = {"model": "m", "messages": [{"role": "oracle", "content": {"next": "year"}}]}
    native = {"dialect": "anthropic", "body": body}
    async with house() as (endpoint, wire):
        first = await wire.ask("completion:request", model="messages/v", native=native, session_id="talk")
        assert first["status"] == "completed"
        told = await wire.ask("completion:get", request_id=first["request_id"], content=True)
        assert told["content"]["native"]["body"] == body
        for model in ("messages/v", "chats/v", "stub/x"):
            later = await wire.ask("completion:request", model=model, prompt="And now?", session_id="talk")
            assert later["status"] == "completed", later
        assert endpoint.requests[1].json["messages"] == [{"role": "user", "content": "And now?"}]


@pytest.mark.promise("A1", "A5")
async def test_a_dialogue_of_tools_and_images_goes_from_vendor_to_vendor() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aa"}
    asked = [{"type": "image", "source": source}, {"type": "text", "text": "See?"}]
    call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "seen"}
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": "Let me look"}, call]},
        {"role": "user", "content": [result]},
    ]
    async with house() as (endpoint, wire):
        await wire.ask("completion:request", model="messages/v", messages=messages, session_id="talk")
        assert endpoint.requests[-1].json["messages"] == messages
        await wire.ask("completion:request", model="chats/v", prompt="More", session_id="talk")
        roles = [message["role"] for message in endpoint.requests[-1].json["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant", "user"]
        plain = await wire.ask("completion:request", model="stub/x", prompt="More", session_id="talk")
        assert plain["status"] == "completed"
        orphan = await wire.ask("completion:request", model="chats/v", messages=[messages[-1]], session_id="talk")
        assert orphan["error"]["code"] == "invalid_request"
        assert "did not call toolu_1" in orphan["error"]["message"]
        history = await wire.ask("completion:history", session_id="talk")
        assert history["turns"][-1]["content"]["messages"] == messages
