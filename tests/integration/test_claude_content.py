"""Blocks, schemas and the trail of its work, with the real Claude Code against a scripted endpoint."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.content.blocks import Message
from ksi.content.features import Features
from ksi.errors import FailureClass, ProviderError
from tests.claude import House, Talk, number_messages, said
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.test_claude_tools import uses

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PAPER = base64.b64encode(
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
).decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
DOCUMENT = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PAPER}}
NOTES = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "notes"}, "title": "n.txt"}
GOOD = Answer(pieces=("All ", "well."))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Scene:
    """A house and its endpoint."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    async def talk(self, *answers: Answer, **options: Any) -> Talk:
        self.endpoint.answers.clear()
        self.endpoint.answers.extend(answers)
        return Talk(await self.house.provider(**options))

    def sent(self, kind: str) -> list[dict[str, Any]]:
        """The blocks of a type in the last request."""
        messages = self.endpoint.requests[-1].json["messages"]
        blocks = [b for m in messages if isinstance(m["content"], list) for b in m["content"]]
        return [{n: v for n, v in b.items() if n != "cache_control"} for b in blocks if b["type"] == kind]


@pytest_asyncio.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint() as endpoint:
        house = House(tmp_path, endpoint.url)
        yield Scene(house, endpoint)
        await house.close()


@pytest.mark.promise("A1")
async def test_images_and_documents_go_in_and_stay_in_the_dialogue(scene: Scene) -> None:
    talk = await scene.talk(GOOD)
    await talk.say((IMAGE, DOCUMENT, NOTES, {"type": "text", "text": "/compare them"}))
    assert scene.sent("image") == [IMAGE]
    assert scene.sent("document") == [DOCUMENT, NOTES]
    assert " /compare them" in said(scene.endpoint.requests[-1])[-1][1]
    assert len(scene.endpoint.requests) == 1
    await talk.say("And again?")
    assert scene.sent("image") == [IMAGE]


@pytest.mark.promise("A1", "A5")
async def test_images_of_a_history_from_elsewhere_come_along(scene: Scene) -> None:
    talk = await scene.talk(GOOD)
    asked = Message("user", (IMAGE, {"type": "text", "text": "What is it?"}))
    history = [asked, Message("assistant", "A dot."), Message("user", "Which colour?")]
    completion = await talk.attempt(talk.call("", messages=history, history=0))
    assert completion.text == "All well."
    assert scene.sent("image") == [IMAGE]
    told = said(scene.endpoint.requests[-1])[-1][1]
    assert "[image]\nWhat is it?" in told and "Which colour?" in told


@pytest.mark.promise("A2")
async def test_an_answer_fits_the_schema_that_the_request_names(scene: Scene) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    talk = await scene.talk(uses("StructuredOutput", a=1))
    completion = await talk.say("Give it.", features=Features(response_format=form))
    assert (json.loads(completion.text), completion.stop_reason) == ({"a": 1}, "end_turn")
    assert completion.content == ()
    names = [tool["name"] for tool in scene.endpoint.requests[0].json["tools"]]
    assert names == ["StructuredOutput"]
    scene.endpoint.answers.clear()
    scene.endpoint.answers.append(GOOD)
    plain = await talk.say("Now in words.")
    assert plain.text == "All well."


@pytest.mark.promise("A2")
async def test_a_schema_that_is_no_argument_any_more_is_refused_by_name(scene: Scene) -> None:
    schema = {**SCHEMA, "description": "x" * 100_000}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    talk = await scene.talk(GOOD)
    with pytest.raises(ProviderError, match="response_format") as caught:
        await talk.say("Give it.", features=Features(response_format=form))
    assert caught.value.failure is FailureClass.INVALID_REQUEST


@pytest.mark.promise("A3")
async def test_its_tools_and_their_results_are_blocks_of_the_answer(scene: Scene) -> None:
    talk = await scene.talk(
        uses("Bash", command="echo found it", description="Look"),
        Answer(pieces=("It ", "is there.")),
        tools=["Bash"],
        allowed_tools=["Bash"],
    )
    completion = await talk.say("Look for it.")
    assert completion.text == "It is there."
    call, result, text = completion.content
    assert (call["type"], call["name"], call["input"]["command"]) == ("server_tool_use", "Bash", "echo found it")
    assert (result["type"], result["tool_use_id"], result["is_error"]) == ("server_tool_result", call["id"], False)
    assert "found it" in result["content"]
    assert text == {"type": "text", "text": "It is there."}


@pytest.mark.promise("A3")
async def test_its_thinking_comes_as_pieces_and_as_a_block(scene: Scene) -> None:
    talk = await scene.talk(thinking("Let me ", "see."))
    completion = await talk.say("Think.")
    assert "".join(talk.thoughts) == "Let me see."
    assert completion.text == "".join(talk.pieces) == "Yes."
    assert [block["type"] for block in completion.content] == ["thinking", "text"]
    assert completion.content[0]["thinking"] == "Let me see."


def thinking(*thoughts: str) -> Answer:
    """An answer that thinks first."""
    message = {"id": "msg_t", "type": "message", "role": "assistant", "model": "claude-scripted", "content": []}
    start = {**message, "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": thought}}
            for thought in thoughts
        ),
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "sig"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Yes."}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 9},
        },
        {"type": "message_stop"},
    ]
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return Answer(body=body.encode(), content_type="text/event-stream")
