"""Answers in the form of OpenAI's chat completions, whole and as a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ksi.content.blocks import Block, as_blocks, text_of
from ksi.events.common import UsageReply
from ksi.events.completions import RequestReply
from ksi.http.errors import OPENAI, Refusal
from ksi.providers.base import Chunk, Frame, Piece, Thought, ToolPiece, piece_of

_STOPS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "context_window": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "content_filter": "content_filter",
    "pause_turn": "stop",
}
DONE = b"data: [DONE]\n\n"


def stop_word(reason: str | None) -> str:
    """A stop reason in this API's words."""
    return _STOPS.get(reason or "", "stop")


def usage(found: UsageReply | None) -> dict[str, Any]:
    """Tokens as this API tells them: those of the cache are a part of the prompt's."""
    told = found or UsageReply()
    prompt = told.input_tokens + told.cache_read_tokens + told.cache_write_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": told.output_tokens,
        "total_tokens": prompt + told.output_tokens,
        "prompt_tokens_details": {"cached_tokens": told.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": told.reasoning_tokens},
    }


def _blocks(reply: RequestReply) -> list[Block]:
    return reply.blocks or list(as_blocks(reply.result or ""))


def _call(block: Block) -> dict[str, Any]:
    arguments = msgspec.json.encode(block.get("input", {})).decode()
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def completion(reply: RequestReply, model: str, created: int) -> dict[str, Any]:
    """A whole answer."""
    blocks = _blocks(reply)
    said: dict[str, Any] = {"role": "assistant", "content": text_of(tuple(blocks)) or None, "refusal": None}
    if thoughts := "".join(str(b.get("thinking", "")) for b in blocks if b.get("type") == "thinking"):
        said["reasoning_content"] = thoughts
    if calls := [_call(block) for block in blocks if block.get("type") == "tool_use"]:
        said["tool_calls"] = calls
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": stop_word(reply.stop_reason)}
    return {
        "id": f"chatcmpl-{reply.request_id}",
        "object": "chat.completion",
        "created": created,
        "model": reply.model or model,
        "choices": [choice],
        "usage": usage(reply.usage),
    }


def data(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def frame(text: bytes) -> bytes:
    """An event as it came."""
    return b"".join(b"data: " + line + b"\n" for line in text.splitlines() or [b""]) + b"\n"


class ChatStream:
    """Writes a stream of pieces."""

    def __init__(self, request_id: str, model: str, created: int, *, counts: bool) -> None:
        """`counts`: the client wants the token counts at the end."""
        self._head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion.chunk", "created": created}
        self._model = model
        self._counts = counts
        self._calls: dict[str, int] = {}
        self._ended = False
        self.said = False
        """True if any part of an answer was sent."""

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return data({**self._head, "model": self._model, "choices": [choice]})

    def piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of one piece."""
        if not self.said:
            self.said = True
            yield self._chunk({"role": "assistant", "content": ""})
        match piece:
            case Chunk(text):
                yield self._chunk({"content": text})
            case Thought(text):
                yield self._chunk({"reasoning_content": text})
            case ToolPiece():
                yield self._chunk({"tool_calls": [self._tool(piece)]})

    def _tool(self, piece: ToolPiece) -> dict[str, Any]:
        known = piece.id in self._calls
        index = self._calls.setdefault(piece.id, len(self._calls))
        if known:
            return {"index": index, "function": {"arguments": piece.json}}
        return {
            "index": index,
            "id": piece.id,
            "type": "function",
            "function": {"name": piece.name, "arguments": piece.json},
        }

    def end(self, reply: RequestReply) -> Iterator[bytes]:
        """The events after the last piece; without pieces, the whole answer as events."""
        if not self.said:
            for block in _blocks(reply):
                if (piece := piece_of(block)) is not None:
                    yield from self.piece(piece)
        self._model = reply.model or self._model
        yield self._chunk({}, stop_word(reply.stop_reason))
        if self._counts:
            yield data({**self._head, "model": self._model, "choices": [], "usage": usage(reply.usage)})
        yield DONE

    def waits(self) -> Iterator[bytes]:
        """A sign of life: a comment."""
        yield b": waiting\n\n"

    def refused(self, refusal: Refusal) -> Iterator[bytes]:
        """The event that ends a stream without an answer."""
        yield data(OPENAI.body(refusal))

    def end_of_frames(self) -> Iterator[bytes]:
        """The last event, if the other stream had none."""
        if not self._ended:
            yield DONE

    def frame(self, event_of: Frame) -> Iterator[bytes]:
        """An event of another stream of this dialect. Its counts are left out if the client did not ask for them: they
        come with no choice, which such a client may not expect."""
        text = event_of.data
        if not self._counts and _only_counts(text):
            return
        self.said = True
        self._ended = self._ended or text.strip() == b"[DONE]"
        yield frame(text)


class _Choices(msgspec.Struct):
    choices: list[Any] = []
    usage: Any = None


def _only_counts(text: bytes) -> bool:
    if not text.lstrip().startswith(b"{"):
        return False
    try:
        found = msgspec.json.decode(text, type=_Choices)
    except msgspec.MsgspecError:
        return False
    return not found.choices and found.usage is not None
