"""Requests in the form of Anthropic's Messages API, from and to the normal form. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ksi.content.blocks import (
    REASONING,
    Block,
    Content,
    Message,
    as_blocks,
    check_blocks,
    compact,
    gathered,
    is_blank,
    tool_answers,
    without_blank_texts,
)
from ksi.content.features import Asked, Features, Json
from ksi.content.history import unique_calls
from ksi.content.reading import as_list, as_object, as_text, number, whole_number
from ksi.errors import InvalidData

HINTS = frozenset({"metadata", "cache_control", "context_management", "diagnostics", "safeguards", "inference_geo"})
"""Fields that do not change the content: another dialect can omit them."""

_READ = frozenset(
    {
        "model",
        "messages",
        "system",
        "max_tokens",
        "temperature",
        "stop_sequences",
        "stream",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "top_p",
        "top_k",
        "service_tier",
    }
)
_EFFORTS = {"minimal": "low", "xhigh": "max"}
"""Other vendors' effort levels, by their names here."""
_TIERS = {"default": "standard_only"}
_CALL_ID = re.compile(r"[a-zA-Z0-9_-]{1,200}")
"""Ids of calls that this API accepts."""
_BEGINNING = "(The dialogue goes on.)"
"""Stands before a dialogue that begins with an answer, which this API does not take."""
_ROLES = frozenset({"user", "assistant", "system"})


def read_request(body: Mapping[str, Any]) -> Asked:
    """The content of a body, in the normal form.

    Raises:
        InvalidData: it is no request of this API; with the field's path.
    """
    messages = tuple(_message(m, f"messages[{n}]") for n, m in enumerate(as_list(body.get("messages"), "messages")))
    if not messages:
        raise InvalidData("messages: must not be empty", path="messages")
    tools, vendor_tools = _tools(body.get("tools"))
    choice, parallel = _tool_choice(body.get("tool_choice"))
    output, unread = _output(body.get("output_config"))
    thinking = body.get("thinking")
    reasoning = _thinking(thinking) if thinking is not None else None
    unknown = [f for f in body if f not in _READ and f not in HINTS and body[f] not in (None, [], {})]
    return Asked(
        model=as_text(body.get("model"), "model"),
        messages=tuple(gathered(messages)),
        system=_system(body.get("system")),
        max_tokens=whole_number(body.get("max_tokens"), "max_tokens"),
        temperature=number(body.get("temperature"), "temperature"),
        stop=tuple(as_text(s, "stop_sequences") for s in as_list(body.get("stop_sequences") or [], "stop_sequences")),
        stream=bool(body.get("stream")),
        features=Features(
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            response_format=_format(output.get("format")),
            reasoning=reasoning or ({"effort": output["effort"]} if output.get("effort") else None),
            top_p=number(body.get("top_p"), "top_p"),
            top_k=whole_number(body.get("top_k"), "top_k"),
            service_tier=_tier(body.get("service_tier")),
        ),
        unmapped=(*unknown, *vendor_tools, *unread),
    )


def _message(value: Any, path: str) -> Message:
    message = as_object(value, path)
    role = as_text(message.get("role"), f"{path}.role")
    if role not in _ROLES:
        raise InvalidData(f"{path}.role: {role[:50]!r} is none of user, assistant, system", path=f"{path}.role")
    return Message(role, _content(message.get("content"), f"{path}.content"))


def _content(value: Any, path: str) -> Content:
    if isinstance(value, str):
        return value
    blocks = as_list(value, path)
    check_blocks(blocks, path)
    return compact(without_hints(block) for block in blocks)


def without_hints(block: Block) -> Block:
    """A block without fields that only control its vendor's cache."""
    return {name: value for name, value in block.items() if name != "cache_control"}


def _tier(value: Any) -> str | None:
    return (
        None
        if value is None
        else {word: tier for tier, word in _TIERS.items()}.get(as_text(value, "service_tier"), value)
    )


def _system(value: Any) -> Content | None:
    return _content(value, "system") or None if value is not None else None


def _tools(value: Any) -> tuple[tuple[Json, ...], list[str]]:
    """The tools that anybody can be given, and those that only their vendor has."""
    tools: list[Json] = []
    vendor: list[str] = []
    for place, item in enumerate(as_list(value or [], "tools")):
        tool = as_object(item, f"tools[{place}]")
        kind = tool.get("type") or "custom"
        if kind != "custom":
            vendor.append(f"tools[{place}].type {str(kind)[:50]!r}")
            continue
        kept = {n: v for n, v in tool.items() if n in ("name", "description", "input_schema", "strict")}
        as_text(kept.get("name"), f"tools[{place}].name")
        tools.append(kept)
    return tuple(tools), vendor


def _tool_choice(value: Any) -> tuple[Json | None, bool | None]:
    if value is None:
        return None, None
    choice = dict(as_object(value, "tool_choice"))
    alone = choice.pop("disable_parallel_tool_use", None)
    return choice, None if alone is None else not alone


def _thinking(value: Any) -> Json | None:
    """A budget; that the model may think as it likes asks for nothing."""
    thinking = as_object(value, "thinking")
    budget = thinking.get("budget_tokens")
    return {"budget_tokens": budget} if thinking.get("type") == "enabled" and budget else None


def _output(value: Any) -> tuple[Json, list[str]]:
    output = as_object(value, "output_config") if value is not None else {}
    return output, [f"output_config.{name}" for name in output if name not in ("effort", "format")]


def _format(value: Any) -> Json | None:
    if value is None:
        return None
    form = as_object(value, "output_config.format")
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.get("schema"), "strict": True}}


def write_request(messages: Sequence[Message], system: Content | None, features: Features) -> dict[str, Any]:
    """The content fields of a body: messages, system, tools and similar.

    System messages within the dialogue move to the front, which is their place in this API. Content for which the API
    refuses a whole call is left out or corrected: blank messages, ids of calls with invalid characters or duplicates, a
    dialogue that begins with an answer, and thinking requested in the middle of calls made without it.
    """
    fronted = [block for m in messages if m.role == "system" for block in as_blocks(m.content)]
    said = [m for m in messages if m.role != "system" and not is_blank(m.content)]
    body: dict[str, Any] = {"messages": _write_messages(said)}
    if fronted:
        body["system"] = [*(as_blocks(system) if system else ()), *fronted]
    elif system:
        body["system"] = system
    _write_features(body, features, thinks=not _called_without_thinking(said))
    return body


def _write_messages(said: Sequence[Message]) -> list[Json]:
    messages = unique_calls(said, lambda given: _CALL_ID.fullmatch(given) is not None, "call_{}".format)
    written: list[Json] = [
        {"role": m.role, "content": _results_first(without_blank_texts(m.content))} for m in messages
    ]
    if messages and messages[0].role == "assistant":
        written.insert(0, {"role": "user", "content": _BEGINNING})
    if messages and messages[-1].role == "assistant" and isinstance(messages[-1].content, str):
        written[-1]["content"] = messages[-1].content.rstrip()
    return written


def _results_first(content: Content) -> Content:
    if isinstance(content, str) or not tool_answers(content):
        return content
    return tuple(sorted(content, key=lambda block: block.get("type") != "tool_result"))


def _called_without_thinking(said: Sequence[Message]) -> bool:
    """True if the dialogue continues after tool calls that were made without thinking: this API then accepts none."""
    if len(said) < 2 or not tool_answers(said[-1].content):
        return False
    called = as_blocks(said[-2].content)
    return bool(called) and called[0].get("type") not in REASONING


def _write_features(body: dict[str, Any], asked: Features, *, thinks: bool) -> None:
    if asked.tools:
        body["tools"] = asked.tools
    choice = dict(asked.tool_choice) if asked.tool_choice is not None else None
    if asked.parallel_tool_calls is not None and asked.tools:
        choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": not asked.parallel_tool_calls}
    if choice is not None:
        body["tool_choice"] = choice
    output: dict[str, Any] = {}
    if asked.response_format is not None:
        schema = as_object(asked.response_format.get("json_schema") or {}, "response_format.json_schema")
        output["format"] = {"type": "json_schema", "schema": schema.get("schema")}
    if asked.reasoning is not None:
        effort = asked.reasoning.get("effort")
        if thinks and "budget_tokens" in asked.reasoning:
            body["thinking"] = {"type": "enabled", "budget_tokens": asked.reasoning["budget_tokens"]}
        if effort == "none":
            body["thinking"] = {"type": "disabled"}
        elif effort is not None:
            output["effort"] = _EFFORTS.get(effort, effort)
    if output:
        body["output_config"] = output
    if asked.service_tier is not None:
        body["service_tier"] = _TIERS.get(asked.service_tier, asked.service_tier)
    for name in ("top_p", "top_k"):
        value = getattr(asked, name)
        if value is not None:
            body[name] = value
