"""Requests in the form of OpenAI's Responses API, from and to the normal form. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ksi.content.blocks import Block, Content, Message, as_blocks, compact
from ksi.content.chat import read_arguments, read_source
from ksi.content.features import Asked, Features, Json
from ksi.content.reading import as_list, as_object, as_text, number, whole_number
from ksi.errors import InvalidData

HINTS = frozenset(
    {"metadata", "store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options"}
)
"""Fields that do not change the content."""

_READ = frozenset(
    {
        "model",
        "input",
        "instructions",
        "max_output_tokens",
        "temperature",
        "top_p",
        "stream",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "service_tier",
        "background",
        "conversation",
        "previous_response_id",
        "truncation",
        "include",
    }
)


def read_request(body: Mapping[str, Any]) -> Asked:
    """The content of a body, in the normal form.

    Raises:
        InvalidData: it is no request of this API; with the field's path.
    """
    unmapped = [name for name, value in body.items() if name not in _READ | HINTS and value not in (None, [], {})]
    if body.get("truncation") not in (None, "disabled"):
        unmapped.append("truncation")
    messages = read_items(body.get("input"), "input", unmapped)
    fronted = [block for m in messages if m.role == "system" for block in as_blocks(m.content)]
    instructions = body.get("instructions")
    system = [*as_blocks(as_text(instructions, "instructions"))] if instructions else []
    tools, vendor = _tools(body.get("tools"))
    reasoning = as_object(body.get("reasoning") or {}, "reasoning")
    return Asked(
        model=as_text(body.get("model"), "model"),
        messages=tuple(m for m in messages if m.role != "system"),
        system=compact([*system, *fronted]) or None,
        max_tokens=whole_number(body.get("max_output_tokens"), "max_output_tokens"),
        temperature=number(body.get("temperature"), "temperature"),
        stream=bool(body.get("stream")),
        features=Features(
            tools=tools,
            tool_choice=_tool_choice(body.get("tool_choice")),
            parallel_tool_calls=body.get("parallel_tool_calls"),
            response_format=_format(as_object(body.get("text") or {}, "text").get("format")),
            reasoning={"effort": reasoning["effort"]} if reasoning.get("effort") else None,
            top_p=number(body.get("top_p"), "top_p"),
            service_tier=body.get("service_tier"),
        ),
        unmapped=(*unmapped, *vendor),
    )


def read_items(value: Any, path: str, unmapped: list[str]) -> list[Message]:
    """The messages that input items are: neighbours of one role are one message.

    Raises:
        InvalidData: an item that cannot be read; with its path.
    """
    if isinstance(value, str):
        return [Message("user", value)]
    messages: list[Message] = []
    for place, item in enumerate(as_list(value, path)):
        where = f"{path}[{place}]"
        read = _item(as_object(item, where), where, unmapped)
        if read is None:
            continue
        last = messages[-1] if messages else None
        if last is not None and last.role == read.role and not isinstance(read.content, str):
            messages[-1] = Message(read.role, (*as_blocks(last.content), *read.content))
        else:
            messages.append(read)
    return messages


def _item(item: Mapping[str, Any], path: str, unmapped: list[str]) -> Message | None:
    match item.get("type", "message"):
        case "message":
            role = as_text(item.get("role"), f"{path}.role")
            role = "system" if role == "developer" else role
            if role not in ("user", "assistant", "system"):
                raise InvalidData(f"{path}.role: {role[:50]!r} is no role of this API", path=f"{path}.role")
            return Message(role, _content(item.get("content"), f"{path}.content", unmapped))
        case "function_call":
            call: Block = {
                "type": "tool_use",
                "id": as_text(item.get("call_id"), f"{path}.call_id"),
                "name": as_text(item.get("name"), f"{path}.name"),
                "input": read_arguments(item.get("arguments"), f"{path}.arguments"),
            }
            return Message("assistant", (call,))
        case "function_call_output":
            output = _content(item.get("output"), f"{path}.output", unmapped)
            result: Block = {
                "type": "tool_result",
                "tool_use_id": as_text(item.get("call_id"), f"{path}.call_id"),
                "content": output if isinstance(output, str) else list(output),
            }
            return Message("user", (result,))
        case "reasoning":
            return None  # it means something to its vendor alone
        case kind:
            unmapped.append(f"{path}.type {str(kind)[:50]!r}")
            return None


def _content(value: Any, path: str, unmapped: list[str]) -> Content:
    if isinstance(value, str):
        return value
    blocks: list[Block] = []
    for place, item in enumerate(as_list(value, path)):
        part, where = as_object(item, f"{path}[{place}]"), f"{path}[{place}]"
        block = _part(part, where)
        if block is None:
            unmapped.append(f"{where}.type {str(part.get('type'))[:50]!r}")
        else:
            blocks.append(block)
    return compact(blocks)


def _part(part: Mapping[str, Any], path: str) -> Block | None:
    match part.get("type"):
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": as_text(part.get("text"), f"{path}.text")}
        case "refusal":
            return {"type": "text", "text": as_text(part.get("refusal"), f"{path}.refusal")}
        case "input_image" if isinstance(part.get("image_url"), str):
            return {"type": "image", "source": read_source(part["image_url"], f"{path}.image_url")}
        case "input_file" if isinstance(part.get("file_data") or part.get("file_url"), str):
            source = read_source(part.get("file_data") or part["file_url"], path)
            block: Block = {"type": "document", "source": source}
            return {**block, "title": part["filename"]} if part.get("filename") else block
    return None


def _tools(value: Any) -> tuple[tuple[Json, ...], list[str]]:
    tools: list[Json] = []
    vendor: list[str] = []
    for place, item in enumerate(as_list(value or [], "tools")):
        path = f"tools[{place}]"
        tool = as_object(item, path)
        if tool.get("type") != "function":
            vendor.append(f"{path}.type {str(tool.get('type'))[:50]!r}")
            continue
        read: Json = {"name": as_text(tool.get("name"), f"{path}.name")}
        if tool.get("description"):
            read["description"] = tool["description"]
        read["input_schema"] = tool.get("parameters") or {"type": "object", "properties": {}}
        if tool.get("strict") is not None:
            read["strict"] = tool["strict"]
        tools.append(read)
    return tuple(tools), vendor


def _tool_choice(value: Any) -> Json | None:
    if value is None:
        return None
    if isinstance(value, str):
        return {"type": "any" if value == "required" else value}
    return {"type": "tool", "name": as_text(as_object(value, "tool_choice").get("name"), "tool_choice.name")}


def _format(value: Any) -> Json | None:
    if value is None:
        return None
    form = as_object(value, "text.format")
    if form.get("type") == "text":
        return None
    if form.get("type") != "json_schema":
        return form
    schema = {name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None}
    return {"type": "json_schema", "json_schema": schema}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_items(messages: Sequence[Message]) -> list[Json]:
    """Messages as input items."""
    return [item for message in messages for item in _write_message(message)]


def _write_message(message: Message) -> list[Json]:
    said = "output_text" if message.role == "assistant" else "input_text"
    items: list[Json] = []
    parts: list[Json] = []
    for block in as_blocks(message.content):
        match block.get("type"):
            case "text":
                parts.append({"type": said, "text": block["text"]})
            case "image":
                parts.append({"type": "input_image", "detail": "auto", "image_url": _url_of(block["source"])})
            case "document":
                parts.append({"type": "input_file", "file_data": _url_of(block["source"])})
            case "tool_use":
                arguments = msgspec.json.encode(block["input"]).decode()
                call = {"type": "function_call", "call_id": block["id"], "name": block["name"], "arguments": arguments}
                items.append(call)
            case "tool_result":
                output = block.get("content", "")
                output = output if isinstance(output, str) else msgspec.json.encode(output).decode()
                items.append({"type": "function_call_output", "call_id": block["tool_use_id"], "output": output})
    if parts:
        items.insert(0, {"type": "message", "role": message.role, "content": parts})
    return items


def _url_of(source: Json) -> str:
    if source.get("type") == "url":
        return str(source["url"])
    return f"data:{source.get('media_type', 'text/plain')};base64,{source.get('data', '')}"
