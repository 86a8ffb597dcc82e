"""Answers in the form of OpenAI's Responses API, whole and as a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ksi.completion.replies import HELD, WAITING_INPUT
from ksi.content.blocks import Block, as_blocks
from ksi.events.common import UsageReply
from ksi.events.completions import RequestReply
from ksi.http.errors import Refusal
from ksi.providers.base import Chunk, Frame, Piece, Thought, ToolPiece, piece_of
from ksi.request import State

Json = dict[str, Any]

_STATUS = {
    State.SCHEDULED.value: "queued",
    State.QUEUED.value: "queued",
    State.RETRYING.value: "queued",
    State.PARKED.value: "queued",
    HELD: "queued",
    WAITING_INPUT: "in_progress",
    State.RUNNING.value: "in_progress",
    State.COMPLETED.value: "completed",
    State.CANCELLED.value: "cancelled",
    State.FAILED.value: "failed",
    State.BLOCKED.value: "failed",
    State.EXPIRED.value: "failed",
}
_CODES = {"rate_limited": "rate_limit_exceeded", "invalid_request": "invalid_prompt"}


def response_id(request_id: str) -> str:
    """A request's id in this API."""
    return f"resp_{request_id}"


def request_id(response: str) -> str:
    """The request that a response's id means."""
    return response.removeprefix("resp_")


def usage(found: UsageReply) -> Json:
    """Tokens as this API tells them."""
    told = found.input_tokens + found.cache_read_tokens + found.cache_write_tokens
    return {
        "input_tokens": told,
        "input_tokens_details": {
            "cached_tokens": found.cache_read_tokens,
            "cache_write_tokens": found.cache_write_tokens,
        },
        "output_tokens": found.output_tokens,
        "output_tokens_details": {"reasoning_tokens": found.reasoning_tokens},
        "total_tokens": told + found.output_tokens,
    }


class Told(msgspec.Struct, frozen=True):
    """A response's facts about its request."""

    id: str
    model: str
    created_at: float
    asked: Mapping[str, Any]
    """The fields of the request that the response repeats."""


def response(told: Told, status: str, output: list[Json], **fields: Any) -> Json:
    """A response as it stands."""
    asked = told.asked
    return {
        "id": told.id,
        "object": "response",
        "created_at": told.created_at,
        "status": status,
        "model": told.model,
        "output": output,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata") or {},
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "temperature": asked.get("temperature"),
        "top_p": asked.get("top_p"),
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": asked.get("tools") or [],
        "background": bool(asked.get("background")),
        "max_output_tokens": asked.get("max_output_tokens"),
        "previous_response_id": asked.get("previous_response_id"),
        "conversation": _conversation(asked.get("conversation")),
        "reasoning": asked.get("reasoning"),
        "text": asked.get("text") or {"format": {"type": "text"}},
        "truncation": "disabled",
        "usage": None,
        **fields,
    }


def _conversation(named: Any) -> Json | None:
    if named is None:
        return None
    return {"id": named["id"] if isinstance(named, dict) else named}


def of_reply(told: Told, reply: RequestReply) -> Json:
    """A request as a response, as it stands."""
    status = _STATUS[reply.status]
    fields: Json = {}
    if reply.usage is not None:
        fields["usage"] = usage(reply.usage)
    if reply.finished_at is not None and status == "completed":
        fields["completed_at"] = reply.finished_at
    if status == "failed":
        code = reply.error.code if reply.error is not None else reply.status
        message = reply.error.message if reply.error is not None else f"the request was {reply.status}"
        message = reply.reason.message if reply.reason is not None else message
        fields["error"] = {"code": _CODES.get(code, "server_error"), "message": message}
    if status == "completed" and reply.truncated:
        status = "incomplete"
        fields["incomplete_details"] = {"reason": "max_output_tokens"}
    output = output_of(reply) if reply.status == State.COMPLETED.value else []
    return response(told, status, output, **fields)


def output_of(reply: RequestReply) -> list[Json]:
    """An answer's output items."""
    blocks = reply.blocks or list(as_blocks(reply.result or ""))
    return [item for place, block in enumerate(blocks) if (item := item_of(reply.request_id, place, block)) is not None]


def item_of(request: str, place: int, block: Block) -> Json | None:
    """A block as an output item; None for one that this API has nothing for."""
    match block.get("type"):
        case "text":
            return _message(f"msg_{request}_{place}", [_text(str(block.get("text", "")))], "completed")
        case "tool_use":
            arguments = msgspec.json.encode(block.get("input", {})).decode()
            return _call(f"fc_{request}_{place}", str(block["id"]), str(block["name"]), arguments, "completed")
        case "thinking":
            return _reasoning(f"rs_{request}_{place}", str(block.get("thinking", "")))
    return None


def _message(item: str, content: list[Json], status: str) -> Json:
    return {"type": "message", "id": item, "role": "assistant", "status": status, "content": content}


def _text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(item: str, call: str, name: str, arguments: str, status: str) -> Json:
    return {
        "type": "function_call",
        "id": item,
        "call_id": call,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _reasoning(item: str, text: str) -> Json:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"type": "reasoning", "id": item, "summary": [], "content": content}


class ResponseStream:
    """Writes the events of a response.

    Numbers grow with what was said, so that they do not depend on the pieces of the answer: a client that lost its
    connection continues after the last number it saw, also when the answer is complete by then.
    """

    def __init__(self, told: Told, request: str, after: int = -1) -> None:
        """`after` is the number of the last event that the client has seen."""
        self._told = told
        self._request = request
        self._after = after
        self._number = -1
        self._items: list[Json] = []
        self._open: Json | None = None
        self.said = False
        """True if any part of an answer was written."""

    def begin(self, status: str) -> Iterator[bytes]:
        """The events before the first piece."""
        yield from self._event("response.created", response=response(self._told, status, []))
        yield from self._event("response.in_progress", response=response(self._told, "in_progress", []))

    def waits(self) -> Iterator[bytes]:
        """A sign of life: a comment."""
        yield b": waiting\n\n"

    def frame(self, frame: Frame) -> Iterator[bytes]:
        """No provider speaks this dialect."""
        return iter(())

    def end_of_frames(self) -> Iterator[bytes]:
        """No provider speaks this dialect."""
        return iter(())

    def piece(self, piece: Piece) -> Iterator[bytes]:
        """The events of one piece."""
        self.said = True
        match piece:
            case Chunk(text):
                yield from self._enter("message", None)
                yield from self._delta("response.output_text.delta", text, content_index=0, logprobs=[])
            case Thought(text):
                yield from self._enter("reasoning", None)
                yield from self._delta("response.reasoning_text.delta", text, content_index=0)
            case ToolPiece():
                yield from self._enter("function_call", piece)
                yield from self._delta("response.function_call_arguments.delta", piece.json)

    def end(self, reply: RequestReply) -> Iterator[bytes]:
        """The events after the last piece; without pieces, the whole answer as events."""
        if not self.said:
            for block in reply.blocks or as_blocks(reply.result or ""):
                if (piece := piece_of(block)) is not None:
                    yield from self.piece(piece)
                yield from self._leave()
        yield from self._leave()
        ended = of_reply(self._told, reply)
        yield from self._event(f"response.{ended['status']}", response={**ended, "output": self._items})

    def refused(self, refusal: Refusal) -> Iterator[bytes]:
        """The end without an answer."""
        yield from self._leave()
        error = {"code": _CODES.get(refusal.code, "server_error"), "message": refusal.message}
        failed = response(self._told, "failed", self._items, error=error)
        yield from self._event("response.failed", response=failed)

    # -- items --------------------------------------------------------------------------------------------------------

    def _enter(self, kind: str, call: ToolPiece | None) -> Iterator[bytes]:
        known = self._open
        if known is not None and known["type"] == kind and (call is None or known["call_id"] == call.id):
            return
        yield from self._leave()
        place = len(self._items)
        if call is not None:
            self._open = _call(f"fc_{self._request}_{place}", call.id, call.name, "", "in_progress")
        elif kind == "message":
            self._open = _message(f"msg_{self._request}_{place}", [], "in_progress")
        else:
            self._open = _reasoning(f"rs_{self._request}_{place}", "")
        yield from self._event("response.output_item.added", output_index=place, item=self._open)
        if kind == "message":
            self._open["content"] = [_text("")]
            yield from self._item_event("response.content_part.added", content_index=0, part=_text(""))

    def _delta(self, kind: str, text: str, **fields: Any) -> Iterator[bytes]:
        item = self._open
        if item is None or not text:
            return
        if item["type"] == "message":
            item["content"][0]["text"] += text
        elif item["type"] == "function_call":
            item["arguments"] += text
        else:
            item["content"] = _reasoning("", item["content"][0]["text"] + text if item["content"] else text)["content"]
        seen = self._after - self._number
        if 0 < seen < len(text):
            self._number += seen
            text = text[seen:]
        yield from self._item_event(kind, size=len(text), delta=text, **fields)

    def _leave(self) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        if item["type"] == "message":
            part = item["content"][0]
            yield from self._item_event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield from self._item_event("response.content_part.done", content_index=0, part=part)
        elif item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield from self._item_event("response.function_call_arguments.done", **done)
        elif item["content"]:
            said = item["content"][0]["text"]
            yield from self._item_event("response.reasoning_text.done", content_index=0, text=said)
        if "status" in item:
            item["status"] = "completed"
        place = len(self._items)
        self._items.append(item)
        self._open = None
        yield from self._event("response.output_item.done", output_index=place, item=item)

    def _item_event(self, kind: str, *, size: int = 1, **fields: Any) -> Iterator[bytes]:
        item = self._open or {}
        yield from self._event(kind, size=size, item_id=item.get("id"), output_index=len(self._items), **fields)

    def _event(self, kind: str, *, size: int = 1, **fields: Any) -> Iterator[bytes]:
        self._number += size
        if self._number > self._after:
            data = {"type": kind, "sequence_number": self._number, **fields}
            yield b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
