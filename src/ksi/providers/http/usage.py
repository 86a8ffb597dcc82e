"""Usage reports of HTTP endpoints as KSI counts. Pure.

A report that cannot be read is no report: usage is then unknown, and the answer stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from ksi.request import UNPRICED, Usage

_MOST_TOKENS = 2**53
_STANDARD = frozenset({"standard", "default", "on_demand", "global", "not_available", ""})
"""Service tiers, speeds and regions that the public list prices are for."""
_INPUT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class _BadCountError(ValueError):
    """A value that is there and is no number of tokens."""


def chat_usage(report: Any, tier: Any = None) -> Usage | None:
    """Usage as OpenAI's chat completions report it; `tier` is the answer's `service_tier`.

    Cached tokens are within the prompt's. Reasoning is part of the completion's tokens, or separate if only that makes
    the sum `total_tokens`.
    """
    if not isinstance(report, Mapping):
        return None
    try:
        return _chat_usage(report, tier)
    except _BadCountError:
        return None


def _chat_usage(report: Mapping[str, Any], tier: Any) -> Usage | None:
    prompt, completion = _count(report.get("prompt_tokens")), _count(report.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    given, made = _details(report, "prompt_tokens_details"), _details(report, "completion_tokens_details")
    cached = _first(given.get("cached_tokens"), report.get("prompt_cache_hit_tokens"), report.get("cached_tokens"))
    written = _count(given.get("cache_write_tokens")) or 0
    reasoning = _count(made.get("reasoning_tokens")) or 0
    total = _count(report.get("total_tokens"))
    if total is not None and total > prompt + completion:
        beside = total - prompt - completion
        if beside == cached + written:
            prompt = total - completion
        elif reasoning in (0, beside):
            completion, reasoning = total - prompt, beside
    elif total is None and reasoning > completion:
        completion += reasoning
    return _priced(
        Usage(
            input_tokens=max(0, prompt - cached - written),
            output_tokens=completion,
            cache_read_tokens=cached,
            cache_write_tokens=written,
            reasoning_tokens=min(reasoning, completion),
        ),
        told=_told_cost(report),
        terms=(tier, report.get("service_tier")),
    )


class MessageUsage(msgspec.Struct, frozen=True):
    """Usage of a message, and how many of its `cache_write_tokens` stay in the cache for an hour."""

    usage: Usage | None = None
    hour_tokens: int = 0


def message_usage(report: Any) -> MessageUsage:
    """Usage as Anthropic's messages report it: input and cache stand side by side, thinking is within the output."""
    if not isinstance(report, Mapping):
        return MessageUsage()
    try:
        return _message_usage(report)
    except _BadCountError:
        return MessageUsage()


def _message_usage(report: Mapping[str, Any]) -> MessageUsage:
    given, made = _count(report.get("input_tokens")), _count(report.get("output_tokens"))
    if given is None or made is None:
        return MessageUsage()
    hour = _count(_details(report, "cache_creation").get("ephemeral_1h_input_tokens")) or 0
    written = max(_count(report.get("cache_creation_input_tokens")) or 0, hour)
    thinking = _count(_details(report, "output_tokens_details").get("thinking_tokens")) or 0
    usage = Usage(
        input_tokens=given,
        output_tokens=made,
        cache_read_tokens=_count(report.get("cache_read_input_tokens")) or 0,
        cache_write_tokens=written,
        reasoning_tokens=min(thinking, made),
    )
    terms = (report.get("service_tier"), report.get("speed"), report.get("inference_geo"))
    usage = _priced(usage, told=_told_cost(report), terms=terms)
    if hour and usage.cost_usd is None:
        return MessageUsage(msgspec.structs.replace(usage, cost_usd=UNPRICED), hour)
    return MessageUsage(usage)


def later_report(before: Any, after: Any) -> Any:
    """Two reports of one answer as one. Counts are running totals, so none of them falls: a closing 0 is no news."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before if after is None or isinstance(before, Mapping) else after
    merged = dict(before)
    for name, value in after.items():
        merged[name] = _later(merged.get(name), value)
    return merged


def later_message_report(before: Any, after: Any) -> Any:
    """As `later_report`, but input may move between fresh and cached tokens while its sum does not fall."""
    merged = later_report(before, after)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        latest = {name: before.get(name) if after.get(name) is None else after[name] for name in _INPUT}
        if _sum(latest.values()) >= _sum(before.get(name) for name in _INPUT):
            merged = {**merged, **{name: value for name, value in latest.items() if value is not None}}
    return merged


def _later(before: Any, after: Any) -> Any:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return later_report(before, after)
    if _is_number(before) and _is_number(after):
        return max(before, after)
    return before if after is None else after


def _sum(counts: Any) -> float:
    return sum(float(value) for value in counts if _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> int | None:
    """A number of tokens; None if there is none."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _BadCountError from None
    if not _is_number(value) or not 0 <= value < _MOST_TOKENS or value != int(value):
        raise _BadCountError
    return int(value)


def _first(*values: Any) -> int:
    return next((found for value in values if (found := _count(value)) is not None), 0)


def _details(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = report.get(name)
    return value if isinstance(value, Mapping) else {}


def _told_cost(report: Mapping[str, Any]) -> float | None:
    """The cost in US dollars, if the endpoint tells it. With a key of the user's own, the model's owner is paid as
    well."""
    cost = report.get("cost")
    if isinstance(cost, Mapping):
        cost = cost.get("total_cost")
    beside: Any = 0.0
    if report.get("is_byok") is True:
        beside = _details(report, "cost_details").get("upstream_inference_cost")
    if cost is None or not _is_number(cost) or not _is_number(beside):
        return None
    total = float(cost) + float(beside)
    return total if math.isfinite(total) and total >= 0 else None


def _priced(usage: Usage, *, told: float | None, terms: tuple[Any, ...]) -> Usage:
    """The cost as reported, or UNPRICED if the terms are not those of the list prices."""
    if told is not None:
        return msgspec.structs.replace(usage, cost_usd=told)
    if all(term is None or (isinstance(term, str) and term.lower() in _STANDARD) for term in terms):
        return usage
    return msgspec.structs.replace(usage, cost_usd=UNPRICED)
