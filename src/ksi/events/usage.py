"""The reply to `completion:token_usage`: figures by group and over time. Times in Unix seconds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class UsageFigures(msgspec.Struct, kw_only=True):
    """Tokens and dollars, summed over attempts. Attempts without a report or a price are counted, but not part of the
    sums."""

    requests: int
    """Number of requests that the attempts belong to."""
    attempts: int
    """Number of attempts."""
    unknown_attempts: int
    """The number of them without a report; their tokens and cost are not in the sums."""
    fenced_attempts: int
    """The number of them that came too late to become their request's answer."""
    unpriced_attempts: int
    """The number of them with a report and no price; their cost is not in the sum."""
    input_tokens: int
    """As in [usage](#usage)."""
    output_tokens: int
    """Likewise."""
    total_tokens: int
    """The sum of these two."""
    cache_read_tokens: int
    """As in usage."""
    cache_write_tokens: int
    """Likewise."""
    reasoning_tokens: int
    """Likewise."""
    cost_usd: float | None
    """US dollars, as the providers reported them, otherwise by price; null if no cost is known."""
    cache_saved_usd: float | None
    """The saving by cached input compared to other input, as far as prices are known."""


class UsageGroup(UsageFigures, kw_only=True):
    """The figures of one agent, model, provider or session; null for attempts without one."""

    agent_id: str | UnsetType | None = UNSET
    """Of `by_agent`: the agent, null for attempts without one."""
    model: str | UnsetType | None = UNSET
    """Of `by_model`: the full name in the request."""
    provider: str | UnsetType | None = UNSET
    """Of `by_provider`: the provider."""
    session_id: str | UnsetType | None = UNSET
    """Of `by_session`: the conversation."""


class UsageBucket(UsageFigures, kw_only=True):
    """The figures of one bucket of time."""

    start: float
    """Unix time when the bucket begins."""


class FirstTurnSample(msgspec.Struct, kw_only=True):
    """First turns of conversations: how many, and the median of their input, cached input included."""

    turns: int
    """The number of first turns."""
    input_tokens: float | None
    """The median of their input, cached input included."""


class McpDefinitions(msgspec.Struct, kw_only=True):
    """The cost of the tools' definitions at one model, as far as turns with and without MCP can be compared."""

    provider: str
    """The provider that answered."""
    model: str | None
    """The model that answered."""
    attempts: int
    """The number of attempts with MCP servers."""
    tokens_per_request: float | Literal["unknown"]
    """The difference; `unknown` if there is nothing to compare with."""
    tokens: int | Literal["unknown"]
    """That number times the attempts that had a report."""
    with_mcp: FirstTurnSample
    """First turns with MCP: how many, and the median of their input, cached input included."""
    without_mcp: FirstTurnSample
    """The same without MCP."""


class McpUsage(msgspec.Struct, kw_only=True):
    """The part with MCP servers, and their additional cost."""

    totals: UsageFigures
    """The part with MCP servers."""
    definitions: list[McpDefinitions]
    """The additional tokens of the tools' definitions, by model."""


class TokenUsageReply(msgspec.Struct, kw_only=True):
    """Tokens and cost of completions in a time window."""

    since: float
    """Unix time of the window's beginning."""
    until: float
    """Unix time of its end."""
    complete_since: float
    """The report is complete from this time on; older attempts may be past `retention.sessions`."""
    totals: UsageFigures
    """Everything in the window, as [figures](#figures-of-usage)."""
    fenced: UsageFigures
    """The part that was spent on answers which came too late."""
    by_agent: list[UsageGroup] | UnsetType = UNSET
    """For each agent, named in `agent_id`; null for attempts without one."""
    by_model: list[UsageGroup] | UnsetType = UNSET
    """For each model, by the full name in the request, in `model`."""
    by_provider: list[UsageGroup] | UnsetType = UNSET
    """For each provider, named in `provider`."""
    by_session: list[UsageGroup] | UnsetType = UNSET
    """For each conversation, named in `session_id`."""
    more: dict[str, str]
    """For each grouping with more rows (`agent`, `model`, `provider`, `session`), the cursor of its next page."""
    bucket_minutes: int
    """The length of a bucket in `trend`."""
    trend: list[UsageBucket]
    """The buckets in order, with the beginning of each in `start`. The first and the last extend beyond the window."""
    mcp: McpUsage
    """The part with MCP servers in `totals`, and their additional tokens in [`definitions`](#the-cost-of-mcp)."""
    warnings: list[str] | UnsetType = UNSET
    """Fields that the event does not have, with a guess at the typo."""
