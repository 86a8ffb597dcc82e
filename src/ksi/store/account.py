"""The account of usage as entries, and the report that sums them up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import msgspec

from ksi.request import Attempt, Outcome, Usage
from ksi.store.usage import (
    PRICE_SLICE,
    FirstTurns,
    McpUse,
    Pricing,
    UsageBy,
    UsageGroups,
    UsageMark,
    UsageQuery,
    UsageReport,
    UsageRow,
    UsageSums,
    rates_for,
)

K = TypeVar("K", bound=Hashable)


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """An ended attempt. It stays when its request is pruned."""

    key: int
    """Its request's."""
    conversation: str
    """Empty if it was deleted."""
    agent_id: str | None = None
    first: bool = False
    """The first turn of its conversation, completed."""
    attempt: Attempt


class _Part(msgspec.Struct, frozen=True):
    """One attempt with its price."""

    spent: Spent
    cost: float | None
    saved: float | None

    @property
    def usage(self) -> Usage | None:
        """Its report, if one came."""
        return self.spent.attempt.usage

    @property
    def place(self) -> tuple[str, str | None]:
        """Provider and model."""
        return self.spent.attempt.provider, self.spent.attempt.asked


def report(
    account: Iterable[Spent],
    query: UsageQuery,
    pricing: Pricing,
    *,
    conversation: str | None,
    members: Collection[int] | None,
) -> UsageReport:
    """Sum up the usage for a query; see `Store.usage`.

    `conversation` is the own name of the one that the query names, `members` are the keys of its chain's requests.
    """
    window = _window(account, query, conversation, members)
    parts = _without_replaced([_part(spent, pricing) for spent in window])
    fenced = [part for part in parts if part.spent.attempt.outcome is Outcome.FENCED]
    with_mcp = [part for part in parts if part.spent.attempt.mcp]
    return UsageReport(
        total=_sums(parts),
        fenced=_sums(fenced),
        mcp=_sums(with_mcp),
        mcp_uses=_mcp_uses(with_mcp)[: query.limit],
        first_turns=_first_turns(part for part in parts if part.place in {other.place for other in with_mcp}),
        groups={by: _groups(parts, by, query) for by in query.groups},
        buckets=_buckets(parts, query.bucket) if query.bucket is not None else {},
    )


def _window(
    account: Iterable[Spent], query: UsageQuery, conversation: str | None, members: Collection[int] | None
) -> Iterable[Spent]:
    for spent in account:
        attempt = spent.attempt
        if (
            query.since < attempt.finished_at <= query.until
            and query.agent_id in (None, spent.agent_id)
            and (query.answered is None or attempt.asked == query.asked or attempt.model == query.answered)
            and query.provider in (None, attempt.provider)
            and conversation in (None, spent.conversation)
            and (members is None or spent.key in members)
        ):
            yield spent


def _part(spent: Spent, pricing: Pricing) -> _Part:
    attempt, usage = spent.attempt, spent.attempt.usage
    if usage is None:
        return _Part(spent, None, None)
    begin = attempt.finished_at // PRICE_SLICE * PRICE_SLICE
    rates = rates_for(pricing(attempt.provider, attempt.model, attempt.asked, begin), usage)
    if rates is None:
        return _Part(spent, usage.cost_usd, None if usage.cache_read_tokens else 0.0)
    return _Part(spent, rates.cost(usage) if usage.cost_usd is None else usage.cost_usd, rates.saved(usage))


def _without_replaced(parts: Sequence[_Part]) -> list[_Part]:
    """A late report takes the place of its attempt's interruption."""
    late = {_name(part) for part in parts if part.spent.attempt.outcome is Outcome.FENCED and part.usage is not None}
    return [part for part in parts if part.spent.attempt.outcome is not Outcome.INTERRUPTED or _name(part) not in late]


def _name(part: _Part) -> tuple[int, int]:
    return part.spent.key, part.spent.attempt.number


# -- sums ---------------------------------------------------------------------------------------------------------


def _sums(parts: Sequence[_Part]) -> UsageSums:
    known = [(part, part.usage) for part in parts if part.usage is not None]
    reports = [usage for _, usage in known]
    return UsageSums(
        attempts=len(parts),
        requests=len({part.spent.key for part in parts}),
        unknown_attempts=len(parts) - len(known),
        fenced_attempts=sum(part.spent.attempt.outcome is Outcome.FENCED for part in parts),
        unpriced_attempts=sum(part.cost is None for part, _ in known),
        input_tokens=sum(usage.input_tokens for usage in reports),
        output_tokens=sum(usage.output_tokens for usage in reports),
        cache_read_tokens=sum(usage.cache_read_tokens for usage in reports),
        cache_write_tokens=sum(usage.cache_write_tokens for usage in reports),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in reports),
        cost_usd=_money(part.cost for part in parts),
        cache_saved_usd=_money(part.saved for part in parts),
    )


def _money(amounts: Iterable[float | None]) -> float | None:
    """The sum of the known values; None if there are none."""
    amounts = list(amounts)
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known or not amounts else None


def _told_apart(parts: Iterable[_Part], by: Callable[[_Part], K]) -> Mapping[K, list[_Part]]:
    groups: defaultdict[K, list[_Part]] = defaultdict(list)
    for part in parts:
        groups[by(part)].append(part)
    return groups


def _groups(parts: Sequence[_Part], by: UsageBy, query: UsageQuery) -> UsageGroups:
    groups = _told_apart(parts, lambda part: _key(part.spent, by))
    rows = sorted(
        (UsageRow(key=key, sums=_sums(group)) for key, group in groups.items()), key=lambda row: _order(row.mark)
    )
    behind = query.after
    if behind is not None:
        rows = [row for row in rows if _order(row.mark) > _order(behind)]
    return UsageGroups(rows=tuple(rows[: query.limit]), more=len(rows) > query.limit)


def _order(mark: UsageMark) -> tuple[int, str]:
    return -mark.total_tokens, mark.key


def _key(spent: Spent, by: UsageBy) -> str | None:
    match by:
        case UsageBy.AGENT:
            return spent.agent_id
        case UsageBy.MODEL:
            return spent.attempt.asked
        case UsageBy.PROVIDER:
            return spent.attempt.provider
        case UsageBy.SESSION:
            return spent.conversation or None


def _buckets(parts: Sequence[_Part], length: int) -> dict[int, UsageSums]:
    groups = _told_apart(parts, lambda part: part.spent.attempt.finished_at // length * length)
    return {begin: _sums(group) for begin, group in groups.items()}


def _mcp_uses(parts: Iterable[_Part]) -> tuple[McpUse, ...]:
    uses = (
        McpUse(
            provider=provider,
            model=model,
            attempts=len(group),
            reports=sum(part.usage is not None for part in group),
        )
        for (provider, model), group in _told_apart(parts, lambda part: part.place).items()
    )
    return tuple(sorted(uses, key=lambda use: (-use.reports, use.provider, use.model or "")))


def _first_turns(parts: Iterable[_Part]) -> tuple[FirstTurns, ...]:
    turns = _told_apart(
        (part for part in parts if part.spent.first and part.usage is not None),
        lambda part: (*part.place, part.spent.attempt.mcp),
    )
    return tuple(
        FirstTurns(
            provider=provider,
            model=model,
            mcp=mcp,
            turns=len(group),
            input_tokens=float(median(part.usage.input_size for part in group if part.usage is not None)),
        )
        for (provider, model, mcp), group in sorted(
            turns.items(), key=lambda item: (item[0][0], item[0][1] or "", item[0][2])
        )
    )
