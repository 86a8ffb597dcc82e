"""The normal form of a message's content: a text, or blocks as JSON objects. Pure.

Blocks are named as Anthropic's Messages API names them. A block of a type that KSI does not know is kept as it
came, for providers that speak the dialect it came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ksi.errors import InvalidData
from ksi.protocol import split_path

Block = dict[str, Any]
Content = str | tuple[Block, ...]


class Message(msgspec.Struct, frozen=True):
    """One message of a dialogue; `role` is user, assistant or system."""

    role: str
    content: Content


KNOWN = frozenset({"text", "image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"})
"""The types of blocks that every translation knows."""

REASONING = frozenset({"thinking", "redacted_thinking"})
"""Blocks that have a meaning only for the vendor who made them."""


class _Base64(msgspec.Struct, tag_field="type", tag="base64"):
    media_type: str
    data: str


class _Url(msgspec.Struct, tag_field="type", tag="url"):
    url: str


class _Plain(msgspec.Struct, tag_field="type", tag="text"):
    data: str
    media_type: str = "text/plain"


class _File(msgspec.Struct, tag_field="type", tag="file"):
    file_id: str


class _Text(msgspec.Struct):
    text: str


class _Image(msgspec.Struct):
    source: _Base64 | _Url | _File


class _Document(msgspec.Struct):
    source: _Base64 | _Url | _Plain | _File


class _ToolUse(msgspec.Struct):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(msgspec.Struct):
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool = False


class _Thinking(msgspec.Struct):
    thinking: str
    signature: str = ""


class _Redacted(msgspec.Struct):
    data: str


_SHAPES: dict[str, type[msgspec.Struct]] = {
    "text": _Text,
    "image": _Image,
    "document": _Document,
    "tool_use": _ToolUse,
    "tool_result": _ToolResult,
    "thinking": _Thinking,
    "redacted_thinking": _Redacted,
}


class _Tool(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


def check_tools(tools: Sequence[Any], path: str) -> None:
    """Check that each tool has the fields of a tool; a vendor's own, which has a `type`, may have any.

    Raises:
        InvalidData: with the field's path.
    """
    names: set[str] = set()
    for number, tool in enumerate(tools):
        place = f"{path}[{number}]"
        if vendor_tool(tool):
            continue
        _convert(tool, _Tool, place)
        if tool["name"] in names:
            raise InvalidData(f"{place}.name: two tools have the name {tool['name']!r}", path=f"{place}.name")
        names.add(tool["name"])


def vendor_tool(tool: Any) -> str | None:
    """The type of a tool that only its vendor has; None for one that anybody can be given."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return None if kind in (None, "custom") else str(kind)


def check_blocks(blocks: Sequence[Any], path: str) -> None:
    """See that each block of a known type has the fields of that type.

    Raises:
        InvalidData: with the field's path.
    """
    for number, block in enumerate(blocks):
        place = f"{path}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or not kind:
            raise InvalidData(f"{place}: a block is an object with a `type`, such as text or image", path=place)
        shape = _SHAPES.get(kind)
        if shape is None:
            continue
        _convert(block, shape, place)
        if kind == "tool_result" and isinstance(block.get("content"), list):
            check_blocks(block["content"], f"{place}.content")


def _convert(value: Any, shape: type[msgspec.Struct], place: str) -> None:
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        reason, inner = split_path(str(error))
        where = f"{place}.{inner}" if inner else place
        raise InvalidData(f"{where}: {reason}", path=where) from None


def text_of(content: Content) -> str:
    """The text that a content says, its blocks of text joined."""
    if isinstance(content, str):
        return content
    return "".join(str(block.get("text", "")) for block in content if block.get("type") == "text")


def is_blank(content: Content) -> bool:
    """True if the content is empty: no text but blanks, and no block of another type."""
    if isinstance(content, str):
        return not content.strip()
    return all(block.get("type") == "text" and not str(block.get("text", "")).strip() for block in content)


def without_blank_texts(content: Content) -> Content:
    """The content without blocks of blank text, which endpoints refuse; a text stays as it is."""
    if isinstance(content, str):
        return content
    if not any(block.get("type") == "text" and not str(block.get("text", "")).strip() for block in content):
        return content
    return tuple(b for b in content if b.get("type") != "text" or str(b.get("text", "")).strip())


def compact(blocks: Iterable[Block]) -> Content:
    """Blocks as a content: plain text alone becomes a text."""
    kept = tuple(blocks)
    if all(block.get("type") == "text" and block.keys() <= {"type", "text"} for block in kept):
        return text_of(kept)
    return kept


def as_blocks(content: Content) -> tuple[Block, ...]:
    """The content as blocks; an empty text is none."""
    if isinstance(content, str):
        return ({"type": "text", "text": content},) if content else ()
    return content


def before(text: str, content: Content) -> Content:
    """The content with a text before it."""
    if isinstance(content, str):
        return f"{text}\n\n{content}"
    # The API wants the results of tools before all else.
    results = tuple(b for b in content if b.get("type") == "tool_result")
    others = tuple(b for b in content if b.get("type") != "tool_result")
    return (*results, {"type": "text", "text": text}, *others)


def gathered(messages: Iterable[Message]) -> list[Message]:
    """The messages, with results of tools that follow each other as one: they answer one message."""
    kept: list[Message] = []
    for message in messages:
        last = kept[-1] if kept else None
        if (
            last is not None
            and last.role == message.role == "user"
            and _only_results(last.content)
            and tool_answers(message.content)
        ):
            kept[-1] = Message("user", (*as_blocks(last.content), *as_blocks(message.content)))
        else:
            kept.append(message)
    return kept


def _only_results(content: Content) -> bool:
    return not isinstance(content, str) and all(block.get("type") == "tool_result" for block in content)


def size_of(content: Content) -> int:
    """About how many characters of text a content is worth to a model. An image's bytes are no text: it counts as a
    typical one's price at vendors, about 1,600 tokens."""
    if isinstance(content, str):
        return len(content)
    return sum(_block_size(block) for block in content)


def weight_of(content: Any) -> int:
    """About how many characters a content holds in memory, an image's bytes included."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, dict):
        return sum(len(name) + weight_of(value) for name, value in content.items())
    return sum(weight_of(value) for value in content) if isinstance(content, list | tuple) else 8


_PICTURE = 5_600
"""Characters that count as much as an image of usual size."""


def _block_size(block: Block) -> int:
    kind = block.get("type")
    if kind == "image":
        return _PICTURE
    if kind == "text":
        return len(str(block.get("text", "")))
    if kind == "tool_result":
        inner = block.get("content", "")
        return size_of(inner if isinstance(inner, str) else tuple(inner))
    return len(msgspec.json.encode(block))


def tool_calls(content: Content) -> frozenset[str]:
    """The ids of the tools that a content calls."""
    return _ids(content, "tool_use", "id")


def tool_answers(content: Content) -> frozenset[str]:
    """The ids of the calls that a content brings results of."""
    return _ids(content, "tool_result", "tool_use_id")


def _ids(content: Content, kind: Literal["tool_use", "tool_result"], field: str) -> frozenset[str]:
    if isinstance(content, str):
        return frozenset()
    return frozenset(str(block.get(field)) for block in content if block.get("type") == kind)
