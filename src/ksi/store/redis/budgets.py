"""Budgets on Redis: how they go into the functions' arguments and come out of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ksi.budgets.rules import Amount, Caps, Demand, Notice, Over, Spent, Use
from ksi.store.values import BudgetUse, BudgetWait


class OverMap(msgspec.Struct, frozen=True, kw_only=True):
    """Why a call does not fit."""

    cap: int
    """Its place among the caps of the call, from 1."""
    subject: str
    limit: int
    used: int
    held: int
    need: int = 0
    unpriced: str = ""
    key: str = ""
    """The request's that waits for it."""

    def over(self, caps: Caps) -> Over:
        """As the rules have it."""
        return Over(
            cap=caps[self.cap - 1],
            subject=self.subject,
            limit=self.limit,
            used=self.used,
            held=self.held,
            need=self.need,
            unpriced=self.unpriced,
        )


class NoticeMap(msgspec.Struct, frozen=True, kw_only=True):
    """The notices to publish."""

    cap: int
    subject: str
    used: int
    limit: int
    threshold: float | None = None


class UsesMap(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `budget_uses`."""

    uses: tuple[tuple[str, int, tuple[int, ...]], ...] = ()

    def found(self) -> list[BudgetUse]:
        """As the protocol has it, by subject and time."""
        rows = [BudgetUse(subject=subject, start=start, use=_use(figures)) for subject, start, figures in self.uses]
        return sorted(rows, key=lambda row: (row.subject, row.start))


class WaitsMap(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `budget_waits`."""

    waits: tuple[tuple[str, int, int], ...] = ()

    def found(self) -> list[BudgetWait]:
        """As the protocol has it."""
        return [BudgetWait(budget=line, requests=requests, until=until) for line, requests, until in self.waits]


def _use(figures: Sequence[int]) -> Use:
    return Use(used=Amount(*figures[:3]), held=Amount(*figures[3:6]), told=figures[6], told_of=figures[7])


def caps_args(caps: Caps) -> list[tuple[object, ...]] | None:
    """Budgets as `lua/12_budgets.lua` takes them; None if there are none."""
    if not caps:
        return None
    return [
        (
            cap.name,
            cap.kind,
            cap.named,
            cap.unit.value,
            cap.limit,
            cap.start,
            cap.end,
            cap.refuse,
            cap.warn_at,
            False if cap.unpriced is None else cap.unpriced,
            cap.raised or False,
        )
        for cap in caps
    ]


def demand_args(demand: Demand) -> list[tuple[object, ...]] | None:
    """The caps of a request at each provider, likewise; None if there are none."""
    if not demand:
        return None
    return [
        (
            ask.provider,
            ask.model,
            ask.input,
            ask.output,
            ask.fixed,
            False if ask.input_rate is None else ask.input_rate,
            ask.output_rate,
            ask.call,
        )
        for ask in demand
    ]


def spent_args(spent: Spent | None) -> tuple[object, ...] | None:
    """The usage of a call, likewise."""
    if spent is None:
        return None
    return (
        False if spent.tokens is None else spent.tokens,
        False if spent.nanos is None else spent.nanos,
        spent.output,
    )


def notices_of(found: Iterable[NoticeMap], caps: Caps) -> tuple[Notice, ...]:
    """The notices to publish, in the form of the rules."""
    return tuple(_notice(one, caps) for one in found)


def _notice(found: NoticeMap, caps: Caps) -> Notice:
    cap = caps[found.cap - 1]
    return Notice(
        name=cap.name,
        subject=found.subject,
        unit=cap.unit,
        used=found.used,
        limit=found.limit,
        start=cap.start,
        end=cap.end,
        threshold=found.threshold,
    )
