"""What `completion:token_usage` answers: figures, told apart and over time (T2). Times in Unix seconds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class UsageFigures(msgspec.Struct, kw_only=True):
    """Tokens and dollars, summed over attempts. What had no report, or has no price, is counted and not in the sums."""

    requests: int
    attempts: int
    unknown_attempts: int
    fenced_attempts: int
    unpriced_attempts: int
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    cost_usd: float | None
    cache_saved_usd: float | None


class UsageGroup(UsageFigures, kw_only=True):
    """The figures of one agent, model, provider or session; null where attempts have none."""

    agent_id: str | UnsetType | None = UNSET
    model: str | UnsetType | None = UNSET
    provider: str | UnsetType | None = UNSET
    session_id: str | UnsetType | None = UNSET


class UsageBucket(UsageFigures, kw_only=True):
    """The figures of one stretch of time."""

    start: float


class FirstTurnSample(msgspec.Struct, kw_only=True):
    """First turns of conversations: how many, and the median of their input, cached input included."""

    turns: int
    input_tokens: float | None


class McpDefinitions(msgspec.Struct, kw_only=True):
    """What the tools' definitions cost at one model, as far as turns with and without MCP can be compared."""

    provider: str
    model: str | None
    attempts: int
    tokens_per_request: float | Literal["unknown"]
    tokens: int | Literal["unknown"]
    with_mcp: FirstTurnSample
    without_mcp: FirstTurnSample


class McpUsage(msgspec.Struct, kw_only=True):
    """The part with MCP servers, and what they add."""

    totals: UsageFigures
    definitions: list[McpDefinitions]


class TokenUsageReply(msgspec.Struct, kw_only=True):
    """What completions used and cost in a window of time."""

    since: float
    until: float
    complete_since: float
    totals: UsageFigures
    fenced: UsageFigures
    by_agent: list[UsageGroup] | UnsetType = UNSET
    by_model: list[UsageGroup] | UnsetType = UNSET
    by_provider: list[UsageGroup] | UnsetType = UNSET
    by_session: list[UsageGroup] | UnsetType = UNSET
    more: dict[str, str]
    bucket_minutes: int
    trend: list[UsageBucket]
    mcp: McpUsage
    warnings: list[str] | UnsetType = UNSET
