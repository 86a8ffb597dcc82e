"""`budget:status`, `budget:set`, `budget:drop`, `budget:raise`: the view and the changes of operators, kept in the
store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec
import structlog

from ksi.budgets.rules import NANO, UNUSED, Budget, Cap, Raise, Unit
from ksi.budgets.settings import budget_of, to_units
from ksi.clock import MICROSECONDS, Clock
from ksi.completion.budget.book import BudgetBook, Kept
from ksi.completion.usage.prices import Prices
from ksi.errors import InvalidData, NotFound
from ksi.events.budget import (
    BudgetBody,
    BudgetNameData,
    BudgetRaiseBody,
    BudgetRaiseData,
    BudgetReply,
    BudgetSetData,
    BudgetStatusData,
    BudgetSubject,
)
from ksi.store.base import Store
from ksi.store.provider_records import KeptRecord, KeptRecords
from ksi.store.rules.budgets import figure
from ksi.store.usage import UsageBy, UsageQuery, UsageSums
from ksi.store.values import BudgetUse

RECORD = ":budgets"
"""The name of the record in the store; no provider can be called that."""

LAST_HOURS = 3 * 3_600 * MICROSECONDS
"""The basis of a forecast."""

_GROUPS: Mapping[str, UsageBy] = {
    "agent": UsageBy.AGENT,
    "token": UsageBy.AGENT,
    "model": UsageBy.MODEL,
    "provider": UsageBy.PROVIDER,
    "session": UsageBy.SESSION,
}

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Kept).decode


class BudgetService:
    """Budgets hold at all daemons of a store and over restarts."""

    def __init__(
        self, store: Store, book: BudgetBook, prices: Prices, on_change: Callable[[], None], clock: Clock
    ) -> None:
        """`on_change` is called when more may be started."""
        self._store = store
        self._book = book
        self._prices = prices
        self._on_change = on_change
        self._clock = clock
        self._kept = KeptRecord()
        self._one = asyncio.Lock()
        self._log = structlog.get_logger("ksi.budgets")

    async def start(self) -> None:
        """Let requests that wait for a budget be checked again: the configuration may have changed.

        Raises:
            StoreError: the store cannot be written.
        """
        await self._reconsider(None)

    # -- events ---------------------------------------------------------------------------------------------------

    async def set(self, data: BudgetSetData) -> BudgetReply:
        """`budget:set`: make a budget, or change one that was set.

        Raises:
            InvalidData: the settings make no budget.
            StoreError: it could not be kept, and holds nowhere.
        """
        try:
            budget = budget_of(
                data.budget,
                scope=data.scope,
                usd=data.usd,
                tokens=data.tokens,
                requests=data.requests,
                per=data.per,
                time_zone=data.time_zone,
                on_exceed=data.on_exceed,
                warn_at=data.warn_at,
                unpriced=data.unpriced,
            )
        except ValueError as error:
            path, reason = error.args
            raise InvalidData(f"{path}: {reason}", path=path) from None
        await self._change(lambda kept: _with_budget(kept, budget))
        self._log.warning("budget set", budget=budget.name, scope=budget.scope, by=data.by)
        await self._reconsider(budget.name)
        return await self.status(BudgetStatusData(budget=budget.name))

    async def drop(self, data: BudgetNameData) -> BudgetReply:
        """`budget:drop`: forget a budget that was set; one that is configured holds again.

        Raises:
            NotFound: none was set under this name.
            StoreError: it could not be kept.
        """
        if all(one.name != data.budget for one in self._book.kept.budgets):
            raise NotFound(f"no budget {data.budget!r} was set; a configured budget is changed in ksi.toml")
        await self._change(lambda kept: _without_budget(kept, data.budget))
        self._log.warning("budget dropped", budget=data.budget)
        await self._reconsider(data.budget)
        return await self.status(BudgetStatusData())

    async def raise_(self, data: BudgetRaiseData) -> BudgetReply:
        """`budget:raise`: more for a budget, until a time.

        Raises:
            NotFound: no such budget.
            InvalidData: the scope is none that it binds by itself.
            StoreError: it could not be kept.
        """
        budget = self._named(data.budget)
        now = self._clock.now()
        cap = next(one for one in self._book.caps(now.wall) if one.name == budget.name)
        if data.scope is not None and not data.scope.startswith(f"{budget.kind}:"):
            raise InvalidData(f"scope: budget {budget.name!r} binds {budget.scope}, not {data.scope!r}", path="scope")
        raised = Raise(
            budget=budget.name,
            subject=data.scope or "",
            amount=to_units(budget.unit, data.amount),
            until=cap.end if data.seconds is None else now.after(data.seconds).wall,
            at=now.wall,
            by=data.by,
            why=data.why,
        )
        await self._change(
            lambda kept: msgspec.structs.replace(
                kept, raises=(*(one for one in kept.raises if one.until > now.wall), raised)
            )
        )
        self._log.warning("budget raised", budget=budget.name, amount=data.amount, by=data.by, why=data.why)
        await self._reconsider(budget.name)
        return await self.status(BudgetStatusData(budget=budget.name))

    async def status(self, data: BudgetStatusData) -> BudgetReply:
        """`budget:status`: how far each budget is.

        Raises:
            NotFound: no such budget.
        """
        if data.budget is not None:
            self._named(data.budget)
        now = self._clock.now().wall
        # Both at once: another daemon's change may be heard while the store is asked.
        caps, budgets = {cap.name: cap for cap in self._book.caps(now)}, self._book.budgets
        waits = {wait.budget: wait.requests for wait in await self._store.budget_waits()}
        wanted = [one for one in budgets if data.budget in (None, one.name)]
        found = [await self._body(one, caps[one.name], waits, data, now) for one in sorted(wanted, key=_name)]
        return BudgetReply(budgets=found)

    def _named(self, name: str) -> Budget:
        found = next((one for one in self._book.budgets if one.name == name), None)
        if found is None:
            known = ", ".join(sorted(one.name for one in self._book.budgets)) or "none"
            raise NotFound(f"no budget {name!r}; there is {known}")
        return found

    async def _body(
        self, budget: Budget, cap: Cap, waits: Mapping[str, int], data: BudgetStatusData, now: int
    ) -> BudgetBody:
        uses = [use for use in await self._store.budget_uses(budget.name, cap.start) if use.start == cap.start]
        known = {use.subject for use in uses}
        lines = {line.partition("\n")[2] for line in waits if line.partition("\n")[0] == budget.name}
        uses += [BudgetUse(subject=subject, start=cap.start, use=UNUSED) for subject in sorted(lines - known)]
        single = "all" if budget.kind == "all" else f"{budget.kind}:{budget.named}"
        if budget.named != "*" and single not in known | lines:
            uses.append(BudgetUse(subject=single, start=cap.start, use=UNUSED))
        uses = [use for use in uses if data.scope in (None, use.subject)]
        uses.sort(key=lambda use: (-use.use.used.of(budget.unit) / max(1, cap.limit_of(use.subject)), use.subject))
        pace = await self._pace(budget, now)
        was_set = any(one.name == budget.name for one in self._book.kept.budgets)
        return BudgetBody(
            budget=budget.name,
            scope=budget.scope,
            unit=budget.unit.value,
            limit=figure(budget.unit, budget.limit),
            per=budget.per.value,
            time_zone=budget.time_zone,
            on_exceed="refuse" if budget.refuse else "wait",
            warn_at=budget.warn_at,
            source="set" if was_set else "configured",
            since=cap.start / MICROSECONDS,
            resets_at=cap.end / MICROSECONDS,
            subjects=[self._subject(cap, use, waits, pace, now) for use in uses[: data.limit]],
            raises=[_raised(budget, one) for one in self._book.kept.raises if _holds(one, budget, now)],
        )

    def _subject(
        self, cap: Cap, use: BudgetUse, waits: Mapping[str, int], pace: Mapping[str, float], now: int
    ) -> BudgetSubject:
        limit, used, held = cap.limit_of(use.subject), use.use.used.of(cap.unit), use.use.held.of(cap.unit)
        speed = pace.get(use.subject, 0.0)
        exhausted = now + (limit - used) / speed if speed > 0 and used < limit else None
        return BudgetSubject(
            scope=use.subject,
            used=figure(cap.unit, used),
            reserved=figure(cap.unit, held),
            limit=figure(cap.unit, limit),
            left=figure(cap.unit, max(0, limit - used - held)),
            requests=use.use.used.calls,
            tokens=use.use.used.tokens,
            cost_usd=use.use.used.nanos / NANO,
            waiting=waits.get(f"{cap.name}\n{use.subject}", 0),
            forecast=figure(cap.unit, round(used + speed * (cap.end - now))) if speed > 0 else None,
            exhausted_at=exhausted / MICROSECONDS if exhausted is not None and exhausted < cap.end else None,
        )

    async def _pace(self, budget: Budget, now: int) -> Mapping[str, float]:
        """The usage of each subject in the last hours, in the budget's unit per microsecond."""
        by = _GROUPS.get(budget.kind)
        query = UsageQuery(since=now - LAST_HOURS, until=now, groups=() if by is None else (by,), limit=1_000)
        report = await self._store.usage(query, self._prices.tariff)
        if by is None:
            return {"all": _counted(budget.unit, report.total) / LAST_HOURS}
        found: dict[str, float] = {}
        for row in report.groups[by].rows:
            name = row.key or ""
            if budget.kind == "token":
                name = name.partition("/")[0]
            if budget.named == "*" or budget.named == name:
                subject = f"{budget.kind}:{name}"
            elif budget.named.endswith("*") and name.startswith(budget.named[:-1]):
                subject = budget.scope
            else:
                continue
            found[subject] = found.get(subject, 0.0) + _counted(budget.unit, row.sums) / LAST_HOURS
        return found

    # -- the record -----------------------------------------------------------------------------------------------

    def hear(self, found: KeptRecords) -> None:
        """Apply the stored settings; called with all records when they were read."""
        self._take(found.records.get(RECORD, KeptRecord()))

    async def _change(self, step: Callable[[Kept], Kept]) -> None:
        """Change the stored settings; again from another daemon's version if that was faster."""
        async with self._one:
            written = False
            while not written:
                value = _encode(step(self._book.kept))
                put = await self._store.put_provider_record(
                    RECORD, self._kept.version, value, self._clock.now(), tell=True
                )
                written = put.written
                self._take(put.kept)

    def _take(self, kept: KeptRecord) -> None:
        if kept == self._kept:
            return
        self._kept = kept
        try:
            self._book.take(_decode(kept.value) if kept.version else Kept())
        except msgspec.MsgspecError as error:
            self._log.error("the operators' budgets cannot be read; they are void", error=str(error))
            self._book.take(Kept())
        self._on_change()

    async def _reconsider(self, name: str | None) -> None:
        """Let requests that wait for a budget be checked again, step by step."""
        while await self._store.reconsider(name, self._clock.now()):
            pass


def _name(budget: Budget) -> str:
    return budget.name


def _with_budget(kept: Kept, budget: Budget) -> Kept:
    return msgspec.structs.replace(kept, budgets=(*_without_budget(kept, budget.name).budgets, budget))


def _without_budget(kept: Kept, name: str) -> Kept:
    return msgspec.structs.replace(kept, budgets=tuple(one for one in kept.budgets if one.name != name))


def _holds(raised: Raise, budget: Budget, now: int) -> bool:
    return raised.budget == budget.name and raised.until > now


def _raised(budget: Budget, raised: Raise) -> BudgetRaiseBody:
    return BudgetRaiseBody(
        amount=figure(budget.unit, raised.amount),
        scope=raised.subject,
        until=raised.until / MICROSECONDS,
        at=raised.at / MICROSECONDS,
        by=raised.by,
        why=raised.why,
    )


def _counted(unit: Unit, sums: UsageSums) -> float:
    if unit is Unit.USD:
        return (sums.cost_usd or 0.0) * NANO
    return sums.total_tokens if unit is Unit.TOKENS else sums.attempts
