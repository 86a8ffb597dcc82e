"""Reports the usage and cost of completions by group and over time, and the tokens that MCP adds."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from ksi.clock import MICROSECONDS, Clock, Moment, microseconds
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Retention
from ksi.errors import InvalidData
from ksi.events.service import TokenUsageData
from ksi.events.specs import conversation_name
from ksi.events.usage import (
    FirstTurnSample,
    McpDefinitions,
    McpUsage,
    TokenUsageReply,
    UsageBucket,
    UsageFigures,
    UsageGroup,
)
from ksi.request import full_model
from ksi.store.base import Store
from ksi.store.usage import FirstTurns, McpUse, UsageBy, UsageGroups, UsageMark, UsageQuery, UsageReport, UsageSums

MINUTE = 60 * MICROSECONDS
HOUR = 60 * MINUTE
DAY = 24 * HOUR
WEEK = 7 * DAY

MAX_BUCKETS = 1_000
"""In one reply."""

BUCKETS = (1, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1_440, 10_080)
"""Minutes: lengths of buckets to choose from if none is given."""

WANTED_BUCKETS = 24

DIGITS = 9
"""Decimal places of dollars on the wire. Later places hold only rounding noise."""


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The end of a page of groups, and the window, so that all pages of a list show the same moment."""

    group: UsageBy
    since: int
    until: int
    total_tokens: int
    key: str


def write_cursor(cursor: Cursor) -> str:
    """A cursor as an opaque word."""
    return base64.urlsafe_b64encode(msgspec.json.encode(cursor)).decode().rstrip("=")


def read_cursor(word: str) -> Cursor:
    """An opaque word as a cursor.

    Raises:
        InvalidData: it is none.
    """
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)), type=Cursor)
    except (ValueError, msgspec.MsgspecError):
        message = "cursor: it is not from this list; start again without it"
        raise InvalidData(message, path="cursor") from None


class TokenTracker:
    """Makes the report."""

    def __init__(
        self, store: Store, prices: Prices, providers: Collection[str], retention: Retention, clock: Clock
    ) -> None:
        self._store = store
        self._prices = prices
        self._providers = providers
        self._retention = retention
        self._clock = clock
        self._one = asyncio.Lock()
        """Reports are made one at a time: a large one takes long, and many would come to their end in one turn."""

    async def report(self, data: TokenUsageData) -> TokenUsageReply:
        """`completion:token_usage`.

        Raises:
            InvalidData: the cursor is not this list's, or there would be too many buckets.
        """
        now = self._clock.now()
        query, length = _query(data, now)
        await self._prices.ready(self._providers)
        async with self._one:
            found = await self._store.usage(query, self._prices.tariff)
            return self._reply(found, query, length, now)

    def _reply(self, found: UsageReport, query: UsageQuery, length: int, now: Moment) -> TokenUsageReply:
        kept = now.wall - microseconds(self._retention.sessions)
        groups = {by: [_group(by, row.key, row.sums) for row in found.groups[by].rows] for by in found.groups}
        return TokenUsageReply(
            since=query.since / MICROSECONDS,
            until=query.until / MICROSECONDS,
            complete_since=max(query.since, kept) / MICROSECONDS,
            totals=figures(found.total),
            fenced=figures(found.fenced),
            by_agent=groups.get(UsageBy.AGENT, UNSET),
            by_model=groups.get(UsageBy.MODEL, UNSET),
            by_provider=groups.get(UsageBy.PROVIDER, UNSET),
            by_session=groups.get(UsageBy.SESSION, UNSET),
            more={by.value: _cursor(by, page, query) for by, page in found.groups.items() if page.more},
            bucket_minutes=length // MINUTE,
            trend=list(trend(found.buckets, query.since, query.until, length)),
            mcp=McpUsage(totals=figures(found.mcp), definitions=definitions(found.mcp_uses, found.first_turns)),
        )


def _query(data: TokenUsageData, now: Moment) -> tuple[UsageQuery, int]:
    """Return the question to the store, and the length of the buckets."""
    since, until, after = now.wall - round(data.hours * HOUR), now.wall, None
    if data.cursor is not None:
        cursor = read_cursor(data.cursor)
        if data.group_by != cursor.group.value:
            raise InvalidData(f"cursor: it is one of group_by {cursor.group.value!r}", path="cursor")
        since, until = cursor.since, cursor.until
        after = UsageMark(cursor.total_tokens, cursor.key)
    length = bucket_length(data.bucket_minutes, until - since)
    query = UsageQuery(
        since=since,
        until=until,
        agent_id=data.agent_id,
        asked=None if data.model is None else full_model(data.model, data.model),
        answered=data.model,
        provider=data.provider,
        conversation=conversation_name(data.session_id, data.conversation_id),
        chain=data.chain_id,
        groups=tuple(UsageBy) if data.group_by is None else (UsageBy(data.group_by),),
        limit=data.limit,
        after=after,
        bucket=length,
    )
    return query, length


def _cursor(by: UsageBy, page: UsageGroups, query: UsageQuery) -> str:
    mark = page.rows[-1].mark
    return write_cursor(Cursor(by, query.since, query.until, mark.total_tokens, mark.key))


# -- figures ------------------------------------------------------------------------------------------------------


def figures(sums: UsageSums) -> UsageFigures:
    """Sums as they go over the wire."""
    return UsageFigures(**_fields(sums))


def _group(by: UsageBy, key: str | None, sums: UsageSums) -> UsageGroup:
    return UsageGroup(**{**_fields(sums), _KEYS[by]: key})


_KEYS = {UsageBy.AGENT: "agent_id", UsageBy.MODEL: "model", UsageBy.PROVIDER: "provider", UsageBy.SESSION: "session_id"}


def _fields(sums: UsageSums) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(sums),
        "total_tokens": sums.total_tokens,
        "cost_usd": _dollars(sums.cost_usd),
        "cache_saved_usd": _dollars(sums.cache_saved_usd),
    }


def _dollars(amount: float | None) -> float | None:
    """For the wire. A sum is below zero only if no call in it has a known cost (`ksi.request.UNPRICED`)."""
    return None if amount is None or amount < 0 else round(amount, DIGITS)


# -- time ---------------------------------------------------------------------------------------------------------


def bucket_length(minutes: int | None, span: int) -> int:
    """The length of buckets over a span of time, in microseconds: as asked for, else so that there are some twenty.

    Raises:
        InvalidData: there would be too many.
    """
    if minutes is None:
        wanted = span / WANTED_BUCKETS
        return next((m * MINUTE for m in BUCKETS if m * MINUTE >= wanted), math.ceil(wanted / WEEK) * WEEK)
    if span > minutes * MINUTE * MAX_BUCKETS:
        least = math.ceil(span / MAX_BUCKETS / MINUTE)
        message = f"bucket_minutes: this time has more than {MAX_BUCKETS} of them; take {least} or more"
        raise InvalidData(message, path="bucket_minutes")
    return minutes * MINUTE


def trend(found: Mapping[int, UsageSums], since: int, until: int, length: int) -> Iterator[UsageBucket]:
    """Every bucket of a window in order, those without attempts too. The first and the last reach beyond it."""
    for begin in range(since // length * length, until + 1, length):
        yield UsageBucket(start=begin / MICROSECONDS, **_fields(found.get(begin, UsageSums())))


# -- MCP ----------------------------------------------------------------------------------------------------------


def definitions(uses: Sequence[McpUse], turns: Sequence[FirstTurns]) -> list[McpDefinitions]:
    """Estimate the tokens of the tools' definitions for each model: the input that MCP adds to a first turn.

    It is measured in the provider's own counts, and unknown if there is nothing to compare with.
    """
    found = {(turn.provider, turn.model, turn.mcp): turn for turn in turns}
    return [
        _definitions(use, found.get((use.provider, use.model, True)), found.get((use.provider, use.model, False)))
        for use in uses
    ]


def _definitions(use: McpUse, having: FirstTurns | None, lacking: FirstTurns | None) -> McpDefinitions:
    each = None if having is None or lacking is None else having.input_tokens - lacking.input_tokens
    return McpDefinitions(
        provider=use.provider,
        model=use.model,
        attempts=use.attempts,
        tokens_per_request="unknown" if each is None else each,
        tokens="unknown" if each is None else round(each * use.reports),
        with_mcp=_sample(having),
        without_mcp=_sample(lacking),
    )


def _sample(turns: FirstTurns | None) -> FirstTurnSample:
    if turns is None:
        return FirstTurnSample(turns=0, input_tokens=None)
    return FirstTurnSample(turns=turns.turns, input_tokens=turns.input_tokens)
