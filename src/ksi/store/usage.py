"""The queries for a report on usage, and their results. Times in microseconds of wall time.

The sums are over attempts that have ended, each counted once: a failed one is paid too, and so is one whose lock had
passed on. An interrupted attempt whose answer came late after all is one attempt, and its late report counts.

Stores keep tokens, not prices: the caller gives the price of a token, see `Pricing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import msgspec

from ksi.request import Usage

PRICE_SLICE = 1_800 * 1_000_000
"""Prices hold for a half hour at least: attempts that ended in the same one are priced alike."""

MILLION = 1_000_000


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars per million tokens, for calls whose input is larger than `above` tokens, cached input included."""

    above: int = -1
    input: float
    output: float
    cache_read: float
    cache_write: float
    reasoning: float
    """For the part of the output that is reasoning, in place of `output`."""
    call: float = 0.0
    """US dollars for the call itself."""

    def cost(self, usage: Usage) -> float:
        """The price of a call, in US dollars."""
        tokens = (
            usage.input_tokens * self.input
            + (usage.output_tokens - usage.reasoning_tokens) * self.output
            + usage.reasoning_tokens * self.reasoning
            + usage.cache_read_tokens * self.cache_read
            + usage.cache_write_tokens * self.cache_write
        )
        return self.call + tokens / MILLION

    def saved(self, usage: Usage) -> float:
        """The saving by input read from a cache."""
        return usage.cache_read_tokens * (self.input - self.cache_read) / MILLION


Tariff = tuple[Rates, ...]
"""Rates by the size of the input, the smallest first; empty if the price is unknown."""


def rates_for(tariff: Tariff, usage: Usage) -> Rates | None:
    """The rates of a call; None if they are unknown."""
    if len(tariff) == 1 and tariff[0].above < 0:
        return tariff[0]
    return next((rates for rates in reversed(tariff) if usage.input_size > rates.above), None)


Pricing = Callable[[str, str | None, str | None, int], Tariff]
"""(provider, the model that answered, the model asked for, the beginning of a PRICE_SLICE) → tariff. It may be called
from another thread."""


class UsageBy(StrEnum):
    """The properties by which attempts can be grouped."""

    AGENT = "agent"
    MODEL = "model"
    """The full name of the model that was asked for at the provider."""
    PROVIDER = "provider"
    SESSION = "session"
    """The conversation's name."""


class UsageMark(msgspec.Struct, frozen=True):
    """The end of a page of groups."""

    total_tokens: int
    key: str


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts that ended after `since` and not after `until`; of one agent, model, provider, conversation, chain."""

    since: int
    until: int
    agent_id: str | None = None
    asked: str | None = None
    """The full name of the model that was asked for, or ..."""
    answered: str | None = None
    """... the name that its provider gives it: one of the two must fit."""
    provider: str | None = None
    conversation: str | None = None
    chain: str | None = None
    """Its requests are known as long as they are kept; their attempts are for longer."""
    groups: tuple[UsageBy, ...] = ()
    limit: int = 100
    """Rows of each group: those with the most tokens."""
    after: UsageMark | None = None
    """Continue after this row; with one group only."""
    bucket: int | None = None
    """Length of the time buckets; they begin at multiples of it."""


class UsageSums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over attempts."""

    attempts: int = 0
    requests: int = 0
    """Different requests that they belong to."""
    unknown_attempts: int = 0
    """Without a report: their tokens and cost are unknown and not in the sums."""
    fenced_attempts: int = 0
    """Their answer came too late to be their request's."""
    unpriced_attempts: int = 0
    """With a report and without a price: their cost is not in the sum."""
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = 0.0
    """As the providers reported it, otherwise by price; None if it is not known for any."""
    cache_saved_usd: float | None = 0.0
    """The saving by input read from a cache, as far as prices are known."""

    @property
    def total_tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One group; `key` is None for attempts without an agent, or whose model's or conversation's name is not kept."""

    key: str | None
    sums: UsageSums

    @property
    def mark(self) -> UsageMark:
        """Its sort key among the groups."""
        return UsageMark(self.sums.total_tokens, self.key or "")


class UsageGroups(msgspec.Struct, frozen=True, kw_only=True):
    """The groups with the most tokens, in order; `more` says that there are others behind."""

    rows: tuple[UsageRow, ...]
    more: bool = False


class FirstTurns(msgspec.Struct, frozen=True, kw_only=True):
    """Completed first turns of conversations at one model: their input, in the provider's own count."""

    provider: str
    model: str | None
    mcp: bool
    turns: int
    input_tokens: float
    """The median over the turns, cached input included."""


class McpUse(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts with MCP servers at one model; `reports` of them reported their usage."""

    provider: str
    model: str | None
    attempts: int
    reports: int


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a UsageQuery."""

    total: UsageSums
    fenced: UsageSums
    """The part of `total` that went into answers which came too late."""
    mcp: UsageSums
    """The part of `total` with MCP servers."""
    mcp_uses: tuple[McpUse, ...] = ()
    """The models with the most reports with MCP, as many as the query's limit."""
    first_turns: tuple[FirstTurns, ...] = ()
    """The models that had attempts with MCP, with it and without."""
    groups: Mapping[UsageBy, UsageGroups] = {}
    buckets: Mapping[int, UsageSums] = {}
    """By the bucket's beginning; those without attempts are left away."""
