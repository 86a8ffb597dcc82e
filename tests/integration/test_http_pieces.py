"""The pieces of a stream before its fault count, even if both came in one read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing

import msgspec
import pytest

from ksi.content.blocks import Message
from ksi.errors import ProviderError
from ksi.providers.base import Call, Chunk, Completion
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.http_calls import make

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def events(api: str, *words: str) -> bytes:
    """A stream's events: `begin`, a piece of text, `error`, `end`; `junk` is none."""
    return b"".join((_chat if api == "openai" else _message)(word) for word in words)


def _chat(word: str) -> bytes:
    match word:
        case "begin":
            return b""
        case "junk":
            return b"data: {nope\n\n"
        case "error":
            return b'data: {"error":{"type":"overloaded_error","message":"busy"}}\n\n'
        case "end":
            finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            return b"data: " + msgspec.json.encode(finish) + b"\n\ndata: [DONE]\n\n"
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": word}}]}) + b"\n\n"


def _message(word: str) -> bytes:
    said: Mapping[str, object]
    match word:
        case "begin":
            said = {"type": "message_start", "message": {"id": "m", "model": "small", "usage": {"input_tokens": 5}}}
        case "junk":
            return b"event: content_block_delta\ndata: {nope\n\n"
        case "error":
            said = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
        case "end":
            said = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}
            return _event(said) + _event({"type": "message_stop"})
        case _:
            said = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
    return _event(said)


def _event(said: Mapping[str, object]) -> bytes:
    return f"event: {said['type']}\n".encode() + b"data: " + msgspec.json.encode(said) + b"\n\n"


def sent(body: bytes, behind: bytes = b"") -> Answer:
    """One write: the head, one chunk, something behind it; then the connection ends."""
    return Answer(raw=HEAD + b"%x\r\n%b\r\n" % (len(body), body) + behind)


async def heard(api: str, answer: Answer) -> tuple[str, Completion | ProviderError]:
    """The text that came, and how it ended."""
    async with ScriptedEndpoint(answer) as endpoint:
        provider = make(api, endpoint.url)
        await provider.start()
        call = Call(
            request_id="r1",
            attempt=1,
            conversation="c1",
            model="small",
            messages=[Message("user", "Hi")],
            stream=True,
        )
        texts: list[str] = []
        try:
            async with asyncio.timeout(10), aclosing(provider.complete(call)) as answering:
                async for piece in answering:
                    if isinstance(piece, Completion):
                        return "".join(texts), piece
                    assert isinstance(piece, Chunk)
                    texts.append(piece.text)
        except ProviderError as error:
            return "".join(texts), error
        finally:
            await provider.stop()
    raise AssertionError("it ended without an end")


both_apis = pytest.mark.parametrize("api", ["openai", "anthropic"])


@both_apis
@pytest.mark.promise("F1", "R2")
@pytest.mark.parametrize(
    ("last", "behind", "failure"),
    [
        pytest.param("error", b"", "overloaded", id="an error event"),
        pytest.param("junk", b"", "provider_error", id="an event that is none"),
        pytest.param(None, b"", "network_error", id="the end of the connection"),
        pytest.param(None, b"0\r\n\r\n", "network_error", id="the end of the body"),
    ],
)
async def test_the_text_in_the_same_read_as_a_fault_is_delivered(
    api: str, last: str | None, behind: bytes, failure: str
) -> None:
    words = ["begin", "One ", "two ", "three.", *([last] if last is not None else [])]
    text, end = await heard(api, sent(events(api, *words), behind))
    assert text == "One two three."
    assert isinstance(end, ProviderError)
    assert end.failure == failure


@both_apis
@pytest.mark.promise("F10")
@pytest.mark.parametrize("behind", [b"", b"5\r\nhel"], ids=["the end of the connection", "half a chunk"])
async def test_an_answer_that_is_whole_is_not_lost_to_a_fault_behind_it(api: str, behind: bytes) -> None:
    text, end = await heard(api, sent(events(api, "begin", "All ", "of it.", "end"), behind))
    assert text == "All of it."
    assert isinstance(end, Completion)
    assert end.text == "All of it."
