"""Requests in a vendor's dialect: their content, and the features that they need of a provider of another dialect.
Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ksi.content import anthropic, chat
from ksi.content.blocks import KNOWN, Block, Content, Message, before, vendor_tool
from ksi.content.features import Asked, Dialect, Features, Native
from ksi.errors import InvalidData

_READERS: Mapping[Dialect, Callable[[Mapping[str, Any]], Asked]] = {
    "anthropic": anthropic.read_request,
    "chat": chat.read_request,
}

FEATURES = (
    *Features.__struct_fields__,
    *("json_object", "service_tiers", "images", "documents", "document_urls", "files", "citations"),
)
"""Features that a provider may support; see `needs`. Tools and blocks of a vendor's own need its dialect."""

_TIERS = ("auto", "default")
"""Service tiers that every provider with tiers has."""


def read_native(native: Native) -> Asked:
    """The content of a native request, in the normal form.

    Raises:
        InvalidData: it is no request of its dialect; with the field's path.
    """
    return _READERS[native.dialect](native.body)


def read_dialogue(native: Native) -> tuple[Message, ...]:
    """A native request's messages; empty if it cannot be read. Its endpoint may have understood it all the same."""
    try:
        return read_native(native).messages
    except InvalidData:
        return ()


def needs(features: Features, contents: Iterable[Content]) -> dict[str, str]:
    """The features that a provider must support for a request: the name of each, and the field that asks for it."""
    wanted = {
        name: name
        for name in Features.__struct_fields__
        if getattr(features, name) is not None and getattr(features, name) != ()
    }
    if (features.response_format or {}).get("type") == "json_object":
        del wanted["response_format"]
        wanted["json_object"] = "response_format of type json_object"
    if features.service_tier not in (None, *_TIERS):
        wanted["service_tiers"] = wanted.pop("service_tier")
    for tool in features.tools:
        if kind := vendor_tool(tool):
            wanted[f"tools of type {kind[:50]}"] = f"tools of type {kind[:50]}"
    for content in contents:
        if not isinstance(content, str):
            for block in content:
                _of_block(block, wanted)
    return wanted


def block_needs(block: Block) -> frozenset[str]:
    """The features that a provider must support for a block."""
    wanted: dict[str, str] = {}
    _of_block(block, wanted)
    return frozenset(wanted)


def _of_block(block: Block, wanted: dict[str, str]) -> None:
    kind = str(block.get("type"))
    shown = f"content of type {kind[:50]}"
    if kind in ("image", "document"):
        source = block.get("source") or {}
        wanted.setdefault(f"{kind}s", shown)
        if source.get("type") == "file":
            wanted.setdefault("files", f"{shown} by file_id")
        if kind == "document" and source.get("type") == "url":
            wanted.setdefault("document_urls", f"{shown} by url")
        if (block.get("citations") or {}).get("enabled"):
            wanted.setdefault("citations", f"citations in {shown}")
    elif kind == "tool_use":
        wanted.setdefault("tools", shown)
    elif kind == "tool_result":
        wanted.setdefault("tools", shown)
        inner = block.get("content") or ""
        for part in () if isinstance(inner, str) else inner:
            _of_block(part, wanted)
    elif kind not in KNOWN:
        wanted.setdefault(shown, shown)


def contents_of(messages: Iterable[Message], system: Content | None) -> list[Content]:
    """Everything that is said in a request."""
    return [*(m.content for m in messages), *([system] if system else [])]


def with_reminder(native: Native, text: str) -> Native:
    """A native request with a text before its last user message."""
    messages = list(native.body.get("messages") or ())
    for number in range(len(messages) - 1, -1, -1):
        message = messages[number]
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if not isinstance(content, str):
            content = tuple(content)
        said = before(text, content)
        messages[number] = {**message, "content": said if isinstance(said, str) else list(said)}
        break
    else:
        messages.append({"role": "user", "content": text})
    return Native(dialect=native.dialect, body={**native.body, "messages": messages}, headers=native.headers)
