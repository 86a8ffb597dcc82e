"""Claude Code's stream-json: its lines as typed events. Pure.

One turn is: `Started`, then for each message of the model its `Piece`s of text and of what it `Thinks`, an
`AssistantBlock` for each of its blocks and a `Stopped`, and the `Results` of its tools; finally a `Finished`. The tools
of sub-agents come as `Called`; their text is not the turn's, and is dropped.

A line of any other kind, or of another shape than expected, is an `Other`: a sign of life. Only a line that is no JSON
object is unreadable. Stray bytes and halves of characters are read as `ksi.providers.json_text` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from ksi.content.blocks import Block
from ksi.providers.json_text import decode_json, encode_clean, repaired
from ksi.request import Usage

MAX_LINE = 64 * 1024 * 1024
"""Bytes of one line beyond which the program is broken, not talkative."""

SYNTHETIC = "<synthetic>"
"""The model of messages that the program made itself, to tell of a fault."""


class StreamJsonError(Exception):
    """The line is not valid stream-json; the message gives the reason."""


class Started(msgspec.Struct, frozen=True):
    """`system/init`: the turn is taken up."""

    session: str
    model: str
    version: str
    failed_servers: tuple[str, ...] = ()
    """MCP servers that did not start: the program continues without their tools."""


class MessageBegins(msgspec.Struct, frozen=True):
    """The model begins a message."""


class Piece(msgspec.Struct, frozen=True):
    """A piece of the message's text. It can end in the first half of a character (see `json_text.TextJoiner`)."""

    text: str


class Tool(msgspec.Struct, frozen=True):
    """A call of a tool; `id` is empty if the program does not tell it."""

    name: str
    id: str = ""


class AssistantBlock(msgspec.Struct, frozen=True):
    """`assistant`: a block of a message, as it is in the transcript; `error` is a word if it tells of a fault."""

    uuid: str
    model: str
    text: str
    error: str | None
    tools: tuple[Tool, ...] = ()
    blocks: tuple[Block, ...] = ()
    """Its contents besides text."""


class Thinks(msgspec.Struct, frozen=True):
    """A piece of the message's thinking."""

    text: str


class Results(msgspec.Struct, frozen=True):
    """`user`: the results of tools that the program ran."""

    blocks: tuple[Block, ...]


class Called(msgspec.Struct, frozen=True):
    """A sub-agent calls tools."""

    tools: tuple[Tool, ...]


class Denied(msgspec.Struct, frozen=True):
    """The program did not run the tool call of this id, for want of a permission."""

    id: str


class HarmlessTools(msgspec.Struct, frozen=True):
    """The tools of MCP servers that are annotated as read-only: an answer to `mcp_status`."""

    names: frozenset[str]


class Asks(msgspec.Struct, frozen=True):
    """`control_request`: the program asks its host, and waits for the answer to this id."""

    id: str
    subtype: str
    request: Mapping[str, Any]


class Stopped(msgspec.Struct, frozen=True):
    """Why the model stopped its message."""

    reason: str | None


class Retrying(msgspec.Struct, frozen=True):
    """The program will ask again after `delay` seconds; `status` is HTTP's, None if no answer came."""

    status: int | None
    error: str
    delay: float


class Limited(msgspec.Struct, frozen=True):
    """The state of the account's quota; `resets_at` in Unix seconds."""

    status: str
    resets_at: float | None
    kind: str | None


class Denial(msgspec.Struct, frozen=True):
    """A tool call that the program did not run, as the `result` lists it."""

    tool: Tool
    input: Any


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """`result`: the turn's end. `usage` is None if none was reported; costs are in US dollars."""

    session: str
    text: str
    is_error: bool
    status: int | None
    subtype: str
    turns: int | None
    """How often the model was asked; None if the program does not tell."""
    stop_reason: str | None
    terminal_reason: str | None
    errors: tuple[str, ...]
    usage: Usage | None
    turn_cost: float | None
    """The cost of this turn, if the program says so."""
    total_cost: float | None
    """The cost since a beginning that differs from version to version."""
    denials: tuple[Denial, ...] = ()
    structured: bool = False
    """The answer is an object by a JSON schema, which the model gave by calling a tool."""
    raw: bytes


class Other(msgspec.Struct, frozen=True):
    """Anything else."""

    type: str


Event = (
    Started
    | MessageBegins
    | Piece
    | AssistantBlock
    | Thinks
    | Results
    | Called
    | Denied
    | HarmlessTools
    | Asks
    | Stopped
    | Retrying
    | Limited
    | Finished
    | Other
)


# -- the lines' shapes: only the fields that are used --------------------------------------------------------------


class _LineHead(msgspec.Struct):
    type: Any = None
    subtype: Any = None
    parent_tool_use_id: Any = None


class _McpServer(msgspec.Struct):
    name: str = ""
    status: str = ""


class _Init(msgspec.Struct):
    session_id: str = ""
    model: str = ""
    claude_code_version: str = ""
    mcp_servers: list[_McpServer] = []


class _RetryLine(msgspec.Struct):
    error_status: int | None = None
    error: str = "unknown"
    retry_delay_ms: float = 0.0


class _LimitInfo(msgspec.Struct, rename="camel"):
    status: str = ""
    resets_at: float | None = None
    rate_limit_type: str | None = None


class _LimitLine(msgspec.Struct):
    rate_limit_info: _LimitInfo


class _Assistant(msgspec.Struct):
    message: Any = None
    uuid: Any = None
    error: Any = None


class _Delta(msgspec.Struct):
    type: str | None = None
    text: str = ""
    thinking: str = ""
    stop_reason: str | None = None


class _ApiEvent(msgspec.Struct):
    type: str
    delta: _Delta | None = None


class _StreamLine(msgspec.Struct):
    event: _ApiEvent


class _UsageDetails(msgspec.Struct):
    thinking_tokens: int | None = None


class _UsageReport(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens_details: _UsageDetails | None = None


class _ModelCost(msgspec.Struct):
    cost: float | None = msgspec.field(default=None, name="costUSD")


class _Result(msgspec.Struct):
    session_id: Any = None
    result: Any = None
    is_error: Any = False
    api_error_status: Any = None
    subtype: Any = None
    num_turns: Any = None
    stop_reason: Any = None
    terminal_reason: Any = None
    errors: Any = None
    usage: Any = None
    total_cost_usd: Any = None
    model_usage_since_last_result: Any = None
    permission_denials: Any = None
    structured_output: Any = None


_T = TypeVar("_T")
_ANY = msgspec.json.Decoder()
_HEAD = msgspec.json.Decoder(_LineHead)
_INIT = msgspec.json.Decoder(_Init)
_RETRY = msgspec.json.Decoder(_RetryLine)
_LIMIT = msgspec.json.Decoder(_LimitLine)
_ASSISTANT = msgspec.json.Decoder(_Assistant)
_STREAM = msgspec.json.Decoder(_StreamLine)
_RESULT = msgspec.json.Decoder(_Result)


def parse(line: bytes) -> Event:
    """A line as an event.

    Raises:
        StreamJsonError: it is no JSON object.
    """
    try:
        head, _ = decode_json(line, _HEAD)
    except msgspec.DecodeError as fault:
        raise StreamJsonError(str(fault)) from None
    kind = _text(head.type)
    try:
        if head.parent_tool_use_id is not None:
            return _of_sub_agent(kind, line)
        return _event(kind, _text(head.subtype), line)
    except msgspec.DecodeError:
        return Other(kind)


def parse_all(line: bytes) -> list[Event]:
    """The events of a line: one as a rule, or several that stand without an end between them or behind other text.

    Raises:
        StreamJsonError: there is none.
    """
    try:
        return [parse(line)]
    except StreamJsonError:
        events = [parse(part) for part in _objects(line)]
        if not events:
            raise
        return events


def _objects(line: bytes) -> Iterator[bytes]:
    """The consecutive JSON objects from the first brace on."""
    text = line.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder(strict=False)
    start = text.find('{"')
    while start >= 0 and text.startswith("{", start):
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return
        yield text[start:end].encode("utf-8", "surrogateescape")
        start = end


def _event(kind: str, subtype: str, line: bytes) -> Event:
    match kind, subtype:
        case "stream_event", _:
            return _api_event(_decode(_STREAM, line).event)
        case "assistant", _:
            return _said(_decode(_ASSISTANT, line))
        case "user", _:
            return _results(_decode(_ASSISTANT, line))
        case "result", _:
            return _finished(line)
        case "system", "init":
            init = _decode(_INIT, line)
            failed = tuple(server.name for server in init.mcp_servers if server.status == "failed")
            return Started(init.session_id, init.model, init.claude_code_version, failed)
        case "system", "api_retry":
            retry = _decode(_RETRY, line)
            return Retrying(retry.error_status, retry.error, retry.retry_delay_ms / 1000)
        case "system", "permission_denied":
            return Denied(_text(_decode(_ANY, line).get("tool_use_id")))
        case "rate_limit_event", _:
            info = _decode(_LIMIT, line).rate_limit_info
            return Limited(info.status, info.resets_at, info.rate_limit_type)
        case "control_request", _:
            return _asks(_decode(_ANY, line))
        case "control_response", _:
            return _harmless_tools(_decode(_ANY, line))
    return Other(kind)


def _decode(decoder: msgspec.json.Decoder[_T], line: bytes) -> _T:
    return decode_json(line, decoder)[0]


def _api_event(event: _ApiEvent) -> Event:
    match event.type:
        case "content_block_delta" if event.delta is not None and event.delta.type == "text_delta":
            return Piece(event.delta.text)
        case "content_block_delta" if event.delta is not None and event.delta.type == "thinking_delta":
            return Thinks(repaired(event.delta.thinking))
        case "message_start":
            return MessageBegins()
        case "message_delta" if event.delta is not None:
            return Stopped(event.delta.stop_reason)
    return Other("stream_event")


# -- messages and tools -----------------------------------------------------------------------------------------------


def _said(line: _Assistant) -> AssistantBlock:
    message = _mapping(line.message)
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(_text(b.get("text")) for b in _blocks(content, "text"))
    model, error = _text(message.get("model")), _text(line.error) or None
    others = _clean(b for b in content if _kind(b) not in ("", "text")) if isinstance(content, list) else ()
    return AssistantBlock(_text(line.uuid), model, repaired(text), error, _tools(content), others)


def _results(line: _Assistant) -> Event:
    blocks = _clean(_blocks(_mapping(line.message).get("content"), "tool_result"))
    return Results(blocks) if blocks else Other("user")


def _kind(block: Any) -> str:
    return _text(_mapping(block).get("type"))


def _clean(blocks: Iterable[Any]) -> tuple[Block, ...]:
    """Blocks without halves of characters."""
    found = list(blocks)
    cleaned: list[Block] = _ANY.decode(encode_clean(found)) if found else []
    return tuple(cleaned)


def _of_sub_agent(kind: str, line: bytes) -> Event:
    tools = _tools(_mapping(_decode(_ASSISTANT, line).message).get("content")) if kind == "assistant" else ()
    return Called(tools) if tools else Other(kind)


def _tools(content: Any) -> tuple[Tool, ...]:
    return tuple(Tool(_text(block.get("name")), _text(block.get("id"))) for block in _blocks(content, "tool_use"))


def _harmless_tools(line: Any) -> Event:
    outer = _mapping(_mapping(line).get("response"))
    servers = _mapping(outer.get("response")).get("mcpServers")
    if not isinstance(servers, list):
        return Other("control_response")
    names: set[str] = set()
    for server in map(_mapping, servers):
        tools = server.get("tools")
        for tool in map(_mapping, tools if isinstance(tools, list) else ()):
            if _mapping(tool.get("annotations")).get("readOnly") is True:
                names.add(f"mcp__{_plain(server.get('name'))}__{_plain(tool.get('name'))}")
    return HarmlessTools(frozenset(names))


def _asks(line: Any) -> Event:
    request = _mapping(_mapping(line).get("request"))
    return Asks(_text(_mapping(line).get("request_id")), _text(request.get("subtype")), request)


def _plain(name: Any) -> str:
    """A name as the program writes it into the name of an MCP tool."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", _text(name))


def _blocks(content: Any, kind: str) -> Iterator[Mapping[str, Any]]:
    """The blocks of one type in a message's content."""
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == kind:
            yield block


# -- the result -------------------------------------------------------------------------------------------------------


def _finished(line: bytes) -> Finished:
    """The `result`. Its side fields may have any shape; they count as missing then."""
    result, clean = decode_json(line, _RESULT)
    errors = result.errors if isinstance(result.errors, list) else [result.errors] if result.errors else []
    return Finished(
        session=_text(result.session_id),
        text=_result_text(result.result),
        is_error=bool(result.is_error),
        status=_as(result.api_error_status, int),
        subtype=_text(result.subtype),
        turns=_as(result.num_turns, int),
        stop_reason=_text(result.stop_reason) or None,
        terminal_reason=_text(result.terminal_reason) or None,
        errors=tuple(repaired(str(error)) for error in errors),
        usage=_usage(_as(result.usage, _UsageReport)),
        turn_cost=_turn_cost(_as(result.model_usage_since_last_result, dict[str, _ModelCost])),
        total_cost=_as(result.total_cost_usd, float),
        denials=_denials(result.permission_denials),
        structured=result.structured_output is not None,
        raw=line if clean else encode_clean(_decode(_ANY, line)),
    )


def _result_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return repaired(value or "")
    return encode_clean(value).decode()


def _denials(value: Any) -> tuple[Denial, ...]:
    return tuple(
        Denial(Tool(_text(denial.get("tool_name")), _text(denial.get("tool_use_id"))), denial.get("tool_input"))
        for denial in (value if isinstance(value, list) else ())
        if isinstance(denial, dict)
    )


def _usage(usage: _UsageReport | None) -> Usage | None:
    """The turn's tokens. The program writes zeros if its endpoint reported nothing: that is unknown."""
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


# -- values -----------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A text; empty if it is none."""
    return repaired(value) if isinstance(value, str) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty if it is none."""
    return value if isinstance(value, dict) else {}


def _as(value: Any, kind: type[_T]) -> _T | None:
    """A value of this type, or a text that spells one; None if it is of another."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return None
