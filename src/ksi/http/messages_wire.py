"""Answers in the form of Anthropic's Messages API, whole and as a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ksi.content.blocks import Block, as_blocks
from ksi.events.common import UsageReply
from ksi.events.completions import RequestReply
from ksi.http.errors import ANTHROPIC, Refusal
from ksi.providers.base import Chunk, Frame, Piece, Thought, ToolPiece, piece_of

_KNOWN_STOPS = frozenset(
    {"end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal", "model_context_window_exceeded"}
)
_STOPS = {"context_window": "model_context_window_exceeded", "content_filter": "refusal"}


def stop_word(reason: str | None) -> str:
    """A stop reason in this API's words."""
    word = _STOPS.get(reason or "", reason or "end_turn")
    return word if word in _KNOWN_STOPS else "end_turn"


def usage(found: UsageReply | None) -> dict[str, Any]:
    """Tokens as this API tells them."""
    told = found or UsageReply()
    return {
        "input_tokens": told.input_tokens,
        "output_tokens": told.output_tokens,
        "cache_read_input_tokens": told.cache_read_tokens,
        "cache_creation_input_tokens": told.cache_write_tokens,
    }


def blocks_of(reply: RequestReply) -> list[Block]:
    """An answer's blocks."""
    return reply.blocks or list(as_blocks(reply.result or ""))


def message(reply: RequestReply, model: str) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": f"msg_{reply.request_id}",
        "type": "message",
        "role": "assistant",
        "model": reply.model or model,
        "content": blocks_of(reply),
        "stop_reason": stop_word(reply.stop_reason),
        "stop_sequence": None,
        "usage": usage(reply.usage),
    }


def sse(name: str, data: Any) -> bytes:
    """One event of a stream."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def frame(name: str, data: bytes) -> bytes:
    """An event as it came."""
    lines = b"".join(b"data: " + line + b"\n" for line in data.splitlines() or [b""])
    return (b"event: " + name.encode() + b"\n" if name else b"") + lines + b"\n"


PING = sse("ping", {"type": "ping"})


class MessageStream:
    """Writes a stream: of pieces, or of another stream's frames after those that were sent while the request waited."""

    def __init__(self, request_id: str, model: str, *, held_by_text: bool = False) -> None:
        """`held_by_text`: its client believes in pieces of text alone, and drops an empty block."""
        self._id = f"msg_{request_id}"
        self._model = model
        self._held_by_text = held_by_text
        self._index = -1
        self._open: str | None = None
        self._tool: str | None = None
        self.started = False
        self.said = False
        """True if any part of an answer was sent."""
        self.held = False
        """True if a first, empty block was sent before the answer's own blocks."""
        self._input: Mapping[str, Any] = {}

    # -- while it waits -------------------------------------------------------------------------------------------

    def waits(self) -> Iterator[bytes]:
        """A sign of life: a ping, or an empty piece of an empty block. Claude Code waits ten minutes for pings, and for
        empty pieces as long as one likes."""
        if self.said or not self._held_by_text:
            yield PING
            return
        if not self.held:
            yield from self._start()
            self.held = True
            self._index = 0
            yield sse("content_block_start", _block_start(0, {"type": "text", "text": ""}))
        yield sse("content_block_delta", _delta(0, {"type": "text_delta", "text": ""}))

    def _end_hold(self) -> Iterator[bytes]:
        if self.held and not self.said:
            yield sse("content_block_stop", {"type": "content_block_stop", "index": 0})
        self.said = True

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _start(self) -> Iterator[bytes]:
        if self.started:
            return
        self.started = True
        empty: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(None),
        }
        yield sse("message_start", {"type": "message_start", "message": empty})

    def piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of one piece."""
        yield from self._start()
        yield from self._end_hold()
        match piece:
            case Chunk(text):
                yield from self._enter("text", None, {"type": "text", "text": ""})
                yield sse("content_block_delta", _delta(self._index, {"type": "text_delta", "text": text}))
            case Thought(text):
                yield from self._enter("thinking", None, {"type": "thinking", "thinking": "", "signature": ""})
                yield sse("content_block_delta", _delta(self._index, {"type": "thinking_delta", "thinking": text}))
            case ToolPiece():
                start = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                yield from self._enter("tool_use", piece.id, start)
                if piece.json:
                    added = {"type": "input_json_delta", "partial_json": piece.json}
                    yield sse("content_block_delta", _delta(self._index, added))

    def _enter(self, kind: str, tool: str | None, start: Block) -> Iterator[bytes]:
        if self._open == kind and self._tool == tool:
            return
        yield from self._leave()
        self._index += 1
        self._open, self._tool = kind, tool
        yield sse("content_block_start", _block_start(self._index, start))

    def _leave(self) -> Iterator[bytes]:
        if self._open is not None:
            yield sse("content_block_stop", {"type": "content_block_stop", "index": self._index})
        self._open = self._tool = None

    def end(self, reply: RequestReply) -> Iterator[bytes]:
        """The events after the last piece; without pieces, the whole answer as events."""
        if not self.said:
            yield from self._start()
            yield from self._end_hold()
            for block in blocks_of(reply):
                yield from self._whole(block)
        yield from self._leave()
        delta = {"stop_reason": stop_word(reply.stop_reason), "stop_sequence": None}
        yield sse("message_delta", {"type": "message_delta", "delta": delta, "usage": usage(reply.usage)})
        yield sse("message_stop", {"type": "message_stop"})

    def _whole(self, block: Block) -> Iterator[bytes]:
        piece = piece_of(block)
        if piece is None or isinstance(piece, Thought):  # a signature, too, has to reach the client
            yield from self._enter(str(block.get("type")), None, block)
        else:
            yield from self.piece(piece)
        yield from self._leave()

    # -- frames ---------------------------------------------------------------------------------------------------

    def frame(self, event_of: Frame) -> Iterator[bytes]:
        """An event of another stream of this dialect. After a held block it is shifted: its message has begun already,
        its blocks have one before them, and the counts of its beginning come with its end."""
        name, data = event_of.event, event_of.data
        if not self.held:
            if self.started and name == "message_start":
                return  # of another attempt, after one without text
            self.started = True
            self.said = self.said or name.startswith("content_block")
            yield frame(name, data)
            return
        event = msgspec.json.decode(data)
        kind = event.get("type", name)
        if kind == "message_start":
            self._input = event.get("message", {}).get("usage") or {}
            return
        if kind == "message_delta":
            event["usage"] = {**self._input, **(event.get("usage") or {})}
        if kind.startswith("content_block"):
            yield from self._end_hold()
            event["index"] = event.get("index", 0) + 1
        elif kind == "message_delta":
            yield from self._end_hold()
        yield sse(name or kind, event)

    def end_of_frames(self) -> Iterator[bytes]:
        """Such a stream has its end."""
        return iter(())

    def refused(self, refusal: Refusal) -> Iterator[bytes]:
        """The event that ends a stream without an answer."""
        yield sse("error", ANTHROPIC.body(refusal))


def _block_start(index: int, block: Block) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}
