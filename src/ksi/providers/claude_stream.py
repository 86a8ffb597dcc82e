"""What Claude Code writes in stream-json: bytes to lines, lines to typed events. Pure.

One turn is: `Started`, then for each message of the model its `Piece`s of text, the `Said` of each of its blocks and
a `Stopped`; then a `Finished`. A line of any other kind is an `Other`, a sign of life. What is said within a
sub-agent is an `Other` too: the turn's own text is what its user gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from ksi.request import Usage

MAX_LINE = 64 * 1024 * 1024
"""Bytes of one line beyond which the program is broken, not talkative."""

SYNTHETIC = "<synthetic>"
"""The model of messages that the program made itself, to tell of a fault."""


class UnreadableError(Exception):
    """The line is not what stream-json is; the message says how."""


class Started(msgspec.Struct, frozen=True):
    """`system/init`: the turn is taken up."""

    session: str
    model: str
    version: str
    failed_servers: tuple[str, ...] = ()
    """MCP servers that did not start: the program goes on without their tools."""


class MessageBegins(msgspec.Struct, frozen=True):
    """The model begins a message."""


class Piece(msgspec.Struct, frozen=True):
    """A piece of the message's text."""

    text: str


class Said(msgspec.Struct, frozen=True):
    """`assistant`: a block of a message, as it is in the transcript; `error` is a word where it tells of a fault."""

    uuid: str
    model: str
    text: str
    error: str | None


class Stopped(msgspec.Struct, frozen=True):
    """Why the model stopped its message."""

    reason: str | None


class Retrying(msgspec.Struct, frozen=True):
    """The program will ask again after `delay` seconds; `status` is HTTP's, None where no answer came."""

    status: int | None
    error: str
    delay: float


class Limited(msgspec.Struct, frozen=True):
    """What the account's quota allows; `resets_at` in Unix seconds."""

    status: str
    resets_at: float | None
    kind: str | None


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """`result`: the turn's end. `usage` None where none was reported; costs in US dollars."""

    session: str
    text: str
    is_error: bool
    status: int | None
    subtype: str
    turns: int
    stop_reason: str | None
    terminal_reason: str | None
    errors: tuple[str, ...]
    usage: Usage | None
    turn_cost: float | None
    """What this turn cost, where the program says so."""
    total_cost: float | None
    """What it counted since a beginning that differs from version to version."""
    raw: bytes


class Other(msgspec.Struct, frozen=True):
    """Anything else."""

    type: str


Event = Started | MessageBegins | Piece | Said | Stopped | Retrying | Limited | Finished | Other


class LineSplitter:
    """Bytes in, whole lines out, whatever their length up to `limit`."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data` ends, without their ends.

        Raises:
            UnreadableError: a line is longer than the limit.
        """
        *ended, rest = data.split(b"\n")
        for line in ended:
            self._parts.append(line)
            whole = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            if whole:
                yield whole
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
            if self._size > self._limit:
                raise UnreadableError(f"a line is longer than {self._limit} bytes")


# -- the lines' shapes: only what is used of them ------------------------------------------------------------------


class _Head(msgspec.Struct):
    type: str
    subtype: str | None = None
    parent_tool_use_id: str | None = None


class _Server(msgspec.Struct):
    name: str = ""
    status: str = ""


class _Init(msgspec.Struct):
    session_id: str
    model: str = ""
    claude_code_version: str = ""
    mcp_servers: list[_Server] = []


class _Retry(msgspec.Struct):
    error_status: int | None = None
    error: str = "unknown"
    retry_delay_ms: float = 0.0


class _LimitInfo(msgspec.Struct, rename="camel"):
    status: str = ""
    resets_at: float | None = None
    rate_limit_type: str | None = None


class _LimitLine(msgspec.Struct):
    rate_limit_info: _LimitInfo


class _Block(msgspec.Struct):
    type: str = ""
    text: str = ""


class _Message(msgspec.Struct):
    model: str = ""
    content: list[_Block] | str = ""


class _Assistant(msgspec.Struct):
    message: _Message
    uuid: str = ""
    error: str | None = None


class _Delta(msgspec.Struct):
    type: str | None = None
    text: str = ""
    stop_reason: str | None = None


class _ApiEvent(msgspec.Struct):
    type: str
    delta: _Delta | None = None


class _StreamLine(msgspec.Struct):
    event: _ApiEvent


class _UsageDetails(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens_details: _UsageDetails | None = None


class _ModelCost(msgspec.Struct):
    cost: float | None = msgspec.field(default=None, name="costUSD")


class _Result(msgspec.Struct):
    session_id: str | None = None
    result: str | None = None
    is_error: bool = False
    api_error_status: int | None = None
    subtype: str | None = None
    num_turns: int | None = None
    stop_reason: str | None = None
    terminal_reason: str | None = None
    errors: list[Any] | None = None
    usage: _Usage | None = None
    total_cost_usd: float | None = None
    model_usage_since_last_result: dict[str, _ModelCost] | None = None


_T = TypeVar("_T")
_HEAD = msgspec.json.Decoder(_Head)
_INIT = msgspec.json.Decoder(_Init)
_RETRY = msgspec.json.Decoder(_Retry)
_LIMIT = msgspec.json.Decoder(_LimitLine)
_ASSISTANT = msgspec.json.Decoder(_Assistant)
_STREAM = msgspec.json.Decoder(_StreamLine)
_RESULT = msgspec.json.Decoder(_Result)


def parse(line: bytes) -> Event:
    """A line as an event.

    Raises:
        UnreadableError: it is no JSON object with a `type`, or lacks what its type must have.
    """
    head = _decode(_HEAD, line)
    kind = head.type
    if head.parent_tool_use_id is not None:
        return Other(kind)
    match kind, head.subtype:
        case "stream_event", _:
            return _api_event(_decode(_STREAM, line).event)
        case "assistant", _:
            return _said(_decode(_ASSISTANT, line))
        case "result", _:
            return _finished(_decode(_RESULT, line), line)
        case "system", "init":
            init = _decode(_INIT, line)
            failed = tuple(server.name for server in init.mcp_servers if server.status == "failed")
            return Started(init.session_id, init.model, init.claude_code_version, failed)
        case "system", "api_retry":
            retry = _decode(_RETRY, line)
            return Retrying(retry.error_status, retry.error, retry.retry_delay_ms / 1000)
        case "rate_limit_event", _:
            info = _decode(_LIMIT, line).rate_limit_info
            return Limited(info.status, info.resets_at, info.rate_limit_type)
    return Other(kind)


def _decode(decoder: msgspec.json.Decoder[_T], line: bytes) -> _T:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        begin = line[:100].decode("utf-8", "replace")
        raise UnreadableError(f"{fault} in {begin!r}") from None


def _api_event(event: _ApiEvent) -> Event:
    match event.type:
        case "content_block_delta" if event.delta is not None and event.delta.type == "text_delta":
            return Piece(event.delta.text)
        case "message_start":
            return MessageBegins()
        case "message_delta" if event.delta is not None:
            return Stopped(event.delta.stop_reason)
    return Other("stream_event")


def _said(line: _Assistant) -> Said:
    content = line.message.content
    text = content if isinstance(content, str) else "".join(b.text for b in content if b.type == "text")
    return Said(line.uuid, line.message.model, text, line.error)


def _finished(line: _Result, raw: bytes) -> Finished:
    return Finished(
        session=line.session_id or "",
        text=line.result or "",
        is_error=line.is_error,
        status=line.api_error_status,
        subtype=line.subtype or "",
        turns=line.num_turns or 0,
        stop_reason=line.stop_reason,
        terminal_reason=line.terminal_reason,
        errors=tuple(str(error) for error in line.errors or ()),
        usage=_usage(line.usage),
        turn_cost=_turn_cost(line.model_usage_since_last_result),
        total_cost=line.total_cost_usd,
        raw=raw,
    )


def _usage(usage: _Usage | None) -> Usage | None:
    """The turn's tokens. The program writes zeros where its endpoint reported nothing: that is unknown (T1)."""
    if usage is None:
        return None
    counted = Usage(
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=usage.cache_read_input_tokens or 0,
        cache_write_tokens=usage.cache_creation_input_tokens or 0,
        reasoning_tokens=(usage.output_tokens_details and usage.output_tokens_details.thinking_tokens) or 0,
    )
    return counted if counted != Usage() else None


def _turn_cost(by_model: Mapping[str, _ModelCost] | None) -> float | None:
    if by_model is None:
        return None
    costs = [model.cost for model in by_model.values() if model.cost is not None]
    return sum(costs) if len(costs) == len(by_model) else None
