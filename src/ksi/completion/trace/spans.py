"""A request that ended as spans, in the terms of OpenTelemetry's conventions for generative AI. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ksi.clock import MICROSECONDS
from ksi.completion.trace.context import TraceContext, attempt_span, other_span, request_span
from ksi.content.blocks import Content, as_blocks
from ksi.errors import InvalidData
from ksi.providers.base import bare_model
from ksi.request import Attempt, Outcome, Priority, RequestBody, State, decode_body
from ksi.store.chains import InjectionView
from ksi.store.values import RequestView

SHORTEST_WAIT = 1_000
"""Microseconds from which a wait has a span of its own."""

AGENT_KINDS = frozenset({"claude-cli"})
"""Kinds of providers that run an agent, and not one call of a model."""

PROVIDER_NAMES = {"claude-cli": "anthropic"}
"""The conventions' names of kinds that have other ones here."""

Value = str | bool | int | float | Sequence[str]


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A span that is over. Times are microseconds of wall time."""

    name: str
    trace_id: str
    span_id: str
    parent: str | None
    remote_parent: bool = False
    """True if the parent is another program's."""
    kind: Literal["server", "client", "internal"] = "internal"
    start: int
    end: int
    attributes: Mapping[str, Value] = {}
    error: str | None = None
    """The class of a failure."""
    message: str | None = None


def spans_of(
    view: RequestView, place: TraceContext, parent: TraceContext | None, kinds: Mapping[str, str], *, content: bool
) -> list[SpanRecord]:
    """A request's span with those of its waits and attempts below it.

    `place` is the request's own; `parent` the span above it. `kinds` are the kinds of providers by their names. Prompts
    and answers are in it only with `content`.
    """
    body = decode_body(view.body)
    ended = view.finished_at or view.enqueued_at
    common = _common(view)
    failed = view.state not in (State.COMPLETED, State.CANCELLED)
    made = [
        SpanRecord(
            name=f"request {view.model}",
            trace_id=place.trace_id,
            span_id=place.span_id,
            parent=None if parent is None else parent.span_id,
            remote_parent=parent is not None and parent.span_id != request_span(view.parent or ""),
            kind="server",
            start=view.enqueued_at,
            end=max(ended, view.enqueued_at),
            attributes={
                **common,
                "ksi.request.state": view.state.value,
                "ksi.request.priority": Priority(view.priority).name.lower(),
                "ksi.request.attempts": len(view.attempts),
                **({} if view.chain is None else {"ksi.chain.id": view.chain, "ksi.chain.depth": view.depth or 0}),
            },
            error=(view.error or view.state.value) if failed else None,
            message=view.message if failed and content else None,
        )
    ]
    since, why = view.enqueued_at, "queue"
    for attempt in view.attempts:
        if attempt.started_at - since >= SHORTEST_WAIT:
            made.append(_wait(view, place, since, attempt.started_at, why))
        made.append(_attempt(view, body, attempt, place, common, kinds.get(attempt.provider, ""), content=content))
        since, why = attempt.finished_at, attempt.error or attempt.outcome.value
    if not view.attempts and ended - view.enqueued_at >= SHORTEST_WAIT:
        made.append(_wait(view, place, since, ended, why))
    return made


def span_of_delivery(view: InjectionView, trace: str) -> SpanRecord:
    """A delivery of a result that came to its end, below the request whose result it is."""
    return SpanRecord(
        name="inject",
        trace_id=trace,
        span_id=other_span("inject", view.injection_id),
        parent=request_span(view.parent),
        start=view.created_at,
        end=max(view.finished_at or view.created_at, view.created_at),
        attributes={
            "ksi.injection.id": view.injection_id,
            "ksi.injection.mode": view.mode,
            "ksi.injection.trigger": view.trigger,
            "ksi.injection.state": view.state,
            "ksi.injection.target": view.target,
            "ksi.chain.id": view.chain,
        },
        error=None if view.reason is None else view.reason.code,
    )


def _common(view: RequestView) -> dict[str, Value]:
    agent: dict[str, Value] = {} if view.agent_id is None else {"gen_ai.agent.name": view.agent_id}
    return {"ksi.request.id": view.request_id, "gen_ai.conversation.id": view.conversation, **agent}


def _wait(view: RequestView, place: TraceContext, start: int, end: int, why: str) -> SpanRecord:
    return SpanRecord(
        name="wait",
        trace_id=place.trace_id,
        span_id=other_span(f"wait {start}", view.request_id),
        parent=place.span_id,
        start=start,
        end=end,
        attributes={"ksi.request.id": view.request_id, "ksi.wait.reason": why},
    )


def _attempt(
    view: RequestView,
    body: RequestBody,
    attempt: Attempt,
    place: TraceContext,
    common: Mapping[str, Value],
    kind: str,
    *,
    content: bool,
) -> SpanRecord:
    model = bare_model(attempt.asked or view.model)
    operation = "invoke_agent" if kind in AGENT_KINDS else "chat"
    attributes: dict[str, Value] = {
        **common,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER_NAMES.get(kind, kind) or attempt.provider,
        "gen_ai.request.model": model,
        "ksi.provider": attempt.provider,
        "ksi.attempt.number": attempt.number,
        "ksi.attempt.outcome": attempt.outcome.value,
        **_asked(body),
        **_answered(attempt),
        **(_content(body, attempt) if content else {}),
    }
    # A requeue or a stop from outside is no failure of the call.
    failed = attempt.outcome in (Outcome.FAILED, Outcome.PARKED, Outcome.INTERRUPTED)
    return SpanRecord(
        name=f"{operation} {model}",
        trace_id=place.trace_id,
        span_id=attempt_span(view.request_id, attempt.number),
        parent=place.span_id,
        kind="client",
        start=attempt.started_at,
        end=max(attempt.finished_at, attempt.started_at),
        attributes=attributes,
        error=(attempt.error or attempt.outcome.value) if failed else None,
        message=attempt.message if failed and content else None,
    )


def _asked(body: RequestBody) -> dict[str, Value]:
    """The settings of a request, as far as they were given."""
    try:
        asked = body.asked()
    except InvalidData:
        return {}
    given: dict[str, Value | None] = {
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": asked.features.top_p,
        "gen_ai.request.top_k": asked.features.top_k,
        "gen_ai.request.seed": asked.features.seed,
        "gen_ai.request.stop_sequences": list(asked.stop) or None,
        "gen_ai.output.type": None if asked.features.response_format is None else "json",
    }
    return {name: value for name, value in given.items() if value is not None}


def _answered(attempt: Attempt) -> dict[str, Value]:
    """The facts of an attempt's answer."""
    usage = attempt.usage
    told: dict[str, Value | None] = {
        "gen_ai.response.model": attempt.model,
        "gen_ai.response.finish_reasons": None if attempt.stop_reason is None else [attempt.stop_reason],
        "gen_ai.response.time_to_first_chunk": (
            None if attempt.first_token_us is None else attempt.first_token_us / MICROSECONDS
        ),
    }
    if usage is not None:
        told |= {
            "gen_ai.usage.input_tokens": usage.input_size,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cache_read_tokens or None,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens or None,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
            "ksi.cost_usd": usage.cost_usd,
        }
    return {name: value for name, value in told.items() if value is not None}


def _content(body: RequestBody, attempt: Attempt) -> dict[str, Value]:
    """The messages in the form of the conventions: messages made of parts, in JSON."""
    try:
        asked = body.asked()
    except InvalidData:
        return {}
    answer = attempt.content or attempt.text or ""
    output = {"role": "assistant", "parts": _parts(answer), "finish_reason": attempt.stop_reason or ""}
    told: dict[str, Any] = {
        "gen_ai.input.messages": [
            {"role": message.role, "parts": _parts(message.content)} for message in asked.messages
        ],
        "gen_ai.output.messages": [output] if answer else None,
        "gen_ai.system_instructions": None if asked.system is None else _parts(asked.system),
    }
    return {name: msgspec.json.encode(value).decode() for name, value in told.items() if value is not None}


def _parts(content: Content) -> list[dict[str, Any]]:
    return [_part(block) for block in as_blocks(content)]


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    match block.get("type"):
        case "text":
            return {"type": "text", "content": block.get("text")}
        case "thinking":
            return {"type": "reasoning", "content": block.get("thinking")}
        case "tool_use":
            return {
                "type": "tool_call",
                "id": block.get("id"),
                "name": block.get("name"),
                "arguments": block.get("input"),
            }
        case "tool_result":
            return {"type": "tool_call_response", "id": block.get("tool_use_id"), "response": block.get("content")}
    return {"type": str(block.get("type"))}  # images and documents are not copied
