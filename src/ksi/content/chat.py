"""Requests in the form of OpenAI's chat completions, from and to the normal form. Pure."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ksi.content.blocks import (
    Block,
    Content,
    Message,
    as_blocks,
    compact,
    gathered,
    is_blank,
    text_of,
    without_blank_texts,
)
from ksi.content.features import Asked, Features, Json
from ksi.content.history import unique_calls
from ksi.content.reading import as_list, as_object, as_text, number, whole_number
from ksi.errors import InvalidData

HINTS = frozenset(
    {"metadata", "store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction"}
)
"""Fields that do not change the content: another dialect can omit them."""

_READ = frozenset(
    {
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "stop",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "top_p",
        "top_k",
        "seed",
        "service_tier",
    }
)
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
}
"""Values with which a field asks for nothing."""
_ENCODED = "data:"
_FAILED = "Error: "
"""Goes before the result of a tool that failed: this API has no field for that."""
_LONGEST_ID = 40
"""Characters of a call's id that OpenAI takes."""
_BUDGETS: tuple[tuple[int | None, str], ...] = ((4_000, "low"), (16_000, "medium"), (None, "high"))
"""Tokens of thinking, at most, and the effort that stands for them."""


def read_request(body: Mapping[str, Any]) -> Asked:
    """The content of a body, in the normal form.

    Raises:
        InvalidData: it is no request of this API; with the field's path.
    """
    messages: list[Message] = []
    unmapped: list[str] = []
    for place, item in enumerate(as_list(body.get("messages"), "messages")):
        _read_message(as_object(item, f"messages[{place}]"), f"messages[{place}]", messages, unmapped)
    if not messages:
        raise InvalidData("messages: must not be empty", path="messages")
    leading = 0
    while leading < len(messages) - 1 and messages[leading].role == "system":
        leading += 1
    front = [block for m in messages[:leading] for block in as_blocks(m.content)]
    tools, vendor = _tools(body.get("tools"))
    stop = body.get("stop")
    return Asked(
        model=as_text(body.get("model"), "model"),
        messages=tuple(gathered(messages[leading:])),
        system=_joined(front),
        max_tokens=whole_number(body.get("max_completion_tokens") or body.get("max_tokens"), "max_tokens"),
        temperature=number(body.get("temperature"), "temperature"),
        stop=(stop,) if isinstance(stop, str) else tuple(as_text(s, "stop") for s in as_list(stop or [], "stop")),
        stream=bool(body.get("stream")),
        features=Features(
            tools=tools,
            tool_choice=_tool_choice(body.get("tool_choice"), unmapped),
            parallel_tool_calls=body.get("parallel_tool_calls"),
            response_format=_format(body.get("response_format")),
            reasoning={"effort": body["reasoning_effort"]} if body.get("reasoning_effort") else None,
            top_p=number(body.get("top_p"), "top_p"),
            top_k=whole_number(body.get("top_k"), "top_k"),
            seed=whole_number(body.get("seed"), "seed"),
            service_tier=body.get("service_tier"),
        ),
        unmapped=(*_unknown(body), *vendor, *unmapped),
    )


def _unknown(body: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in body.items()
        if name not in _READ and name not in HINTS and value not in (None, [], {}, *_NOTHING.get(name, ()))
    ]


def _joined(blocks: Sequence[Block]) -> Content | None:
    """Texts of their own keep a blank line between them."""
    content = compact(blocks)
    return ("\n\n".join(str(b["text"]) for b in blocks) if isinstance(content, str) else content) or None


def _read_message(item: Mapping[str, Any], path: str, into: list[Message], unmapped: list[str]) -> None:
    role = as_text(item.get("role"), f"{path}.role")
    if role in ("system", "developer"):
        into.append(Message("system", _parts(item.get("content"), f"{path}.content", unmapped)))
    elif role == "user":
        into.append(Message("user", _parts(item.get("content"), f"{path}.content", unmapped)))
    elif role == "assistant":
        into.append(Message("assistant", _said(item, path, unmapped)))
    elif role == "tool":
        inner = _parts(item.get("content"), f"{path}.content", unmapped)
        result: Block = {
            "type": "tool_result",
            "tool_use_id": as_text(item.get("tool_call_id"), f"{path}.tool_call_id"),
            "content": inner if isinstance(inner, str) else list(inner),
        }
        into.append(Message("user", (result,)))
    else:
        raise InvalidData(
            f"{path}.role: {role[:50]!r} is none of system, developer, user, assistant, tool", path=f"{path}.role"
        )


def _said(item: Mapping[str, Any], path: str, unmapped: list[str]) -> Content:
    content = item.get("content")
    blocks: list[Block] = []
    if content is not None:
        blocks += as_blocks(_parts(content, f"{path}.content", unmapped))
    if isinstance(item.get("refusal"), str):
        blocks.append({"type": "text", "text": item["refusal"]})
    for place, call in enumerate(as_list(item.get("tool_calls") or [], f"{path}.tool_calls")):
        blocks.append(_tool_call(as_object(call, f"{path}.tool_calls[{place}]"), f"{path}.tool_calls[{place}]"))
    for name in ("audio", "function_call"):
        if item.get(name):
            unmapped.append(f"{path}.{name}")
    return compact(blocks)


def _tool_call(call: Mapping[str, Any], path: str) -> Block:
    function = as_object(call.get("function"), f"{path}.function")
    return {
        "type": "tool_use",
        "id": as_text(call.get("id"), f"{path}.id"),
        "name": as_text(function.get("name"), f"{path}.function.name"),
        "input": read_arguments(function.get("arguments"), f"{path}.function.arguments"),
    }


def read_arguments(value: Any, path: str) -> Json:
    """A call's arguments, which this API writes as a text of JSON.

    Raises:
        InvalidData: they are no JSON object.
    """
    text = as_text(value if value is not None else "", path)
    try:
        return as_object(msgspec.json.decode(text) if text.strip() else {}, path)
    except msgspec.DecodeError as error:
        raise InvalidData(f"{path}: not JSON: {error}", path=path) from None


def _parts(value: Any, path: str, unmapped: list[str]) -> Content:
    if isinstance(value, str):
        return value
    blocks = []
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
        case "text":
            return {"type": "text", "text": as_text(part.get("text"), f"{path}.text")}
        case "refusal":
            return {"type": "text", "text": as_text(part.get("refusal"), f"{path}.refusal")}
        case "image_url":
            url = as_object(part.get("image_url"), f"{path}.image_url").get("url")
            return {"type": "image", "source": read_source(as_text(url, f"{path}.image_url.url"), path)}
        case "file":
            file = as_object(part.get("file"), f"{path}.file")
            if not isinstance(file.get("file_data"), str):
                return None
            block: Block = {"type": "document", "source": _document(read_source(file["file_data"], path), path)}
            return {**block, "title": file["filename"]} if file.get("filename") else block
    return None


def read_source(url: str, path: str) -> Json:
    """The place of an image or a file: a data URL, or an address.

    Raises:
        InvalidData: a data URL that is not in base64.
    """
    if not url.startswith(_ENCODED):
        return {"type": "url", "url": url}
    head, comma, data = url.removeprefix(_ENCODED).partition(",")
    media, _, coding = head.partition(";")
    if not comma or coding.rpartition(";")[2] != "base64":
        raise InvalidData(f"{path}: a data URL must be in base64", path=path)
    return {"type": "base64", "media_type": media, "data": data}


def _document(source: Json, path: str) -> Json:
    """Plain text stands as text in the normal form."""
    if source.get("media_type") != "text/plain":
        return source
    try:
        return {"type": "text", "media_type": "text/plain", "data": base64.b64decode(source["data"]).decode()}
    except ValueError as error:
        raise InvalidData(f"{path}: the file is no text in UTF-8: {error}", path=path) from None


def _tools(value: Any) -> tuple[tuple[Json, ...], list[str]]:
    tools: list[Json] = []
    vendor: list[str] = []
    for place, item in enumerate(as_list(value or [], "tools")):
        path = f"tools[{place}]"
        tool = as_object(item, path)
        if tool.get("type") != "function":
            vendor.append(f"{path}.type {str(tool.get('type'))[:50]!r}")
            continue
        function = as_object(tool.get("function"), f"{path}.function")
        read: Json = {"name": as_text(function.get("name"), f"{path}.function.name")}
        if function.get("description"):
            read["description"] = function["description"]
        read["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
        if function.get("strict") is not None:
            read["strict"] = function["strict"]
        tools.append(read)
    return tuple(tools), vendor


def _tool_choice(value: Any, unmapped: list[str]) -> Json | None:
    if value is None:
        return None
    if isinstance(value, str):
        return {"type": "any" if value == "required" else value}
    kind = as_object(value, "tool_choice").get("type")
    if kind != "function":
        unmapped.append(f"tool_choice.type {str(kind)[:50]!r}")
        return None
    function = as_object(value.get("function"), "tool_choice.function")
    return {"type": "tool", "name": as_text(function.get("name"), "tool_choice.function.name")}


def _format(value: Any) -> Json | None:
    if value is None:
        return None
    form = as_object(value, "response_format")
    return None if form.get("type") == "text" else form


# -- writing ----------------------------------------------------------------------------------------------------------


def write_messages(messages: Sequence[Message], system: Content | None) -> list[Json]:
    """The messages of a body. Blocks that a message cannot hold here become messages of their own: the results of
    tools, and the images within them."""
    written: list[Json] = []
    if system:
        written.append({"role": "system", "content": system if isinstance(system, str) else _text_parts(system)})
    for message in unique_calls(messages, lambda given: 0 < len(given) <= _LONGEST_ID, "call_{}".format):
        if is_blank(message.content):
            continue
        if isinstance(message.content, str):
            written.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            said = _write_said(message.content)
            if said["content"] or "tool_calls" in said:
                written.append(said)
        elif message.role == "system":
            written.append({"role": "system", "content": _text_parts(message.content)})
        else:
            _write_user(message.content, written)
    return written


def _text_parts(content: Content) -> list[Json]:
    return [{"type": "text", "text": b["text"]} for b in as_blocks(content) if b.get("type") == "text"]


def _write_said(content: Sequence[Block]) -> Json:
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": msgspec.json.encode(block["input"]).decode()},
        }
        for block in content
        if block.get("type") == "tool_use"
    ]
    text = text_of(tuple(content))
    said: Json = {"role": "assistant", "content": text if text.strip() else None}
    if calls:
        said["tool_calls"] = calls
    return said


def _write_user(content: Sequence[Block], written: list[Json]) -> None:
    parts: list[Json] = []
    for block in as_blocks(without_blank_texts(tuple(content))):
        if block.get("type") == "tool_result":
            inner = block.get("content", "")
            inner = inner if isinstance(inner, str) else tuple(inner)
            said = text_of(inner)
            if block.get("is_error"):
                said = f"{_FAILED}{said}"
            written.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": said})
            parts += [_write_part(b) for b in as_blocks(inner) if b.get("type") in ("image", "document")]
        else:
            parts.append(_write_part(block))
    if parts:
        written.append({"role": "user", "content": parts})


def _write_part(block: Block) -> Json:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": block["text"]}
    source = block["source"]
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": _url_of(source)}}
    if source.get("type") == "text":
        return {"type": "text", "text": source["data"]}
    return {"type": "file", "file": {"filename": block.get("title") or "document.pdf", "file_data": _url_of(source)}}


def _url_of(source: Json) -> str:
    if source.get("type") == "url":
        return str(source["url"])
    return f"{_ENCODED}{source['media_type']};base64,{source['data']}"


def write_features(asked: Features) -> Json:
    """The fields for tools, formats, reasoning and sampling."""
    body: Json = {}
    if asked.tools:
        body["tools"] = [_write_tool(tool) for tool in asked.tools]
    if asked.tool_choice is not None:
        body["tool_choice"] = _write_choice(asked.tool_choice)
    if asked.reasoning is not None:
        body["reasoning_effort"] = _effort(asked.reasoning)
    for name in ("parallel_tool_calls", "response_format", "top_p", "top_k", "seed", "service_tier"):
        value = getattr(asked, name)
        if value is not None:
            body[name] = value
    return body


def _effort(reasoning: Json) -> str:
    """The effort that a budget of tokens is worth; this API knows no budgets."""
    effort = reasoning.get("effort")
    if isinstance(effort, str):
        return "xhigh" if effort == "max" else effort
    budget = reasoning.get("budget_tokens") or 0
    return next(word for most, word in _BUDGETS if most is None or budget <= most)


def _write_tool(tool: Json) -> Json:
    function = {"name": tool["name"], "parameters": tool.get("input_schema") or {"type": "object", "properties": {}}}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _write_choice(choice: Json) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return "required" if kind == "any" else kind
