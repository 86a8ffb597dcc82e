"""Budgets' figures in the memory of the database's only writer, and the journal that brings them over a crash.

A claim and an end write no figures: what they change stands in one row of the journal for each transaction, and the
figures of many transactions are written together (`FOLD`), with the reservations of what still runs. So a budget's row
is that of the last fold, and the journal tells what happened since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ksi.budgets import account
from ksi.budgets.rules import (
    UNUSED,
    Amount,
    Ask,
    Cap,
    Caps,
    Demand,
    Facts,
    Hold,
    Notice,
    Share,
    Spent,
    Unit,
    Use,
    bound,
    decode_hold,
    encode_demand,
    encode_hold,
    least_output,
    need,
    output_within,
    settled,
    told,
)
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import read_use

FOLD = 4_096
"""Steps in the journal after which the figures are written."""

KNOWN = 10_000
"""Figures, and bindings, that are kept in memory after a fold."""

DEMANDS = "demands"
"""The kept figure of the rows in `demand`."""


class Named(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A number for the figures that calls count in."""

    number: int
    shares: tuple[Share, ...]


class Began(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A call began; its fields are those of `Hold`."""

    key: int
    asks: Demand
    """Empty if they stand in its row of `demand`."""
    input: int
    output: int
    input_rate: float | None
    output_rate: float
    call: int
    shares: int
    """Their number."""


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A call ended."""

    key: int
    spent: Spent | None
    interrupted: bool
    hold: Hold | None
    """Its reservation if that began before the last fold."""


class Told(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Notices were sent."""

    place: account.Place
    told: int
    told_of: int


Step = Named | Began | Ended | Told
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Step]).decode


class Tally:
    """The figures of a place; see `Use`."""

    __slots__ = ("calls", "held_calls", "held_nanos", "held_tokens", "nanos", "place", "tokens", "told", "told_of")

    def __init__(self, place: account.Place, use: Use) -> None:
        self.place = place
        self.calls, self.tokens, self.nanos = use.used.calls, use.used.tokens, use.used.nanos
        self.held_calls, self.held_tokens, self.held_nanos = use.held.calls, use.held.tokens, use.held.nanos
        self.told, self.told_of = use.told, use.told_of

    @property
    def use(self) -> Use:
        """The figures at this moment."""
        return Use(
            used=Amount(self.calls, self.tokens, self.nanos),
            held=Amount(self.held_calls, self.held_tokens, self.held_nanos),
            told=self.told,
            told_of=self.told_of,
        )

    def left(self, unit: Unit, limit: int) -> int:
        """What is neither used nor reserved."""
        if unit is Unit.USD:
            return limit - self.nanos - self.held_nanos
        if unit is Unit.TOKENS:
            return limit - self.tokens - self.held_tokens
        return limit - self.calls - self.held_calls


class Bound:
    """A budget that binds a call, with the figures of whom it counts for."""

    __slots__ = ("cap", "limit", "notice_at", "subject", "tally", "unit")

    def __init__(self, cap: Cap, subject: str, tally: Tally) -> None:
        self.cap, self.subject, self.tally, self.unit = cap, subject, tally, cap.unit
        self.limit = cap.limit_of(subject)
        self.notice_at = self.limit * (cap.warn_at[0] if cap.warn_at else 1)


class Binding:
    """All budgets that bind the calls of one agent, session, provider and model."""

    __slots__ = ("bounds", "calls", "caps", "dollars", "number", "shares", "tallies", "tokens")

    def __init__(self, caps: Caps, bounds: list[Bound]) -> None:
        self.caps = caps
        self.bounds = bounds
        self.dollars = [one for one in bounds if one.unit is Unit.USD]
        self.tokens = [one for one in bounds if one.unit is Unit.TOKENS]
        self.calls = [one for one in bounds if one.unit is Unit.REQUESTS]
        self.tallies = [one.tally for one in bounds]
        self.number = 0
        """Of its shares, in the journal."""
        self.shares = tuple(Share(one.cap.name, one.subject, one.cap.start, one.cap.unpriced or 0.0) for one in bounds)

    def hold(self, ask: Ask, context: int) -> Hold | None:
        """The reservation of a call; None if `account.look` has to say whether there is room, and why not.

        At a known price all budgets of a unit take the same, so the tightest of each decides.
        """
        if ask.input_rate is None:
            return None
        tightest: list[tuple[int, Cap]] = []
        if self.dollars:
            lefts = [one.limit - one.tally.nanos - one.tally.held_nanos for one in self.dollars]
            tightest.append((min(lefts), self.dollars[0].cap))
        if self.tokens:
            lefts = [one.limit - one.tally.tokens - one.tally.held_tokens for one in self.tokens]
            tightest.append((min(lefts), self.tokens[0].cap))
        if self.calls:
            lefts = [one.limit - one.tally.calls - one.tally.held_calls for one in self.calls]
            tightest.append((min(lefts), self.calls[0].cap))
        size = ask.input + context
        least, output = least_output(ask), ask.output
        for left, cap in tightest:
            wanted = need(ask, cap, size, least)
            if wanted and wanted > left:
                return None
            if cap.unit is not Unit.REQUESTS:
                output = max(least, min(output, output_within(ask, cap, size, left)))
        return Hold(size, output, ask.input_rate, ask.output_rate, ask.call, self.shares)

    @property
    def near(self) -> bool:
        """True if some budget is so far used that there may be notices."""
        return (
            any(one.tally.nanos >= one.notice_at for one in self.dollars)
            or any(one.tally.tokens >= one.notice_at for one in self.tokens)
            or any(one.tally.calls >= one.notice_at for one in self.calls)
        )


class Run:
    """A running call."""

    __slots__ = ("asks", "binding", "has_row", "hold", "in_row", "tallies")

    def __init__(
        self, hold: Hold, tallies: list[Tally], binding: Binding | None, asks: Demand, *, has_row: bool, in_row: bool
    ) -> None:
        self.hold, self.tallies, self.binding, self.asks = hold, tallies, binding, asks
        self.has_row = has_row
        """It has a row in `demand`."""
        self.in_row = in_row
        """Its reservation stands there: it began before the last fold."""


class Undo(msgspec.Struct, frozen=True):
    """What a step added, to be taken back with its transaction."""

    key: int
    run: Run | None
    """None: notices were sent about the one of `tallies`."""
    tallies: Sequence[Tally]
    used: Sequence[Amount] | None
    """None: the call began."""
    told: int = 0
    told_of: int = 0


class BudgetFigures:
    """The figures, as the present transaction has them; see `account.Figures`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tallies: dict[account.Place, Tally] = {}
        self._dirty: dict[int, Sequence[Tally]] = {}
        """Changed since the last fold, by the ids of these lists."""
        self._runs: dict[int, Run] = {}
        self._bindings: dict[tuple[str | None, str, str, str], Binding] = {}
        self._caps: Caps = ()
        """The budgets that `_bindings` are of."""
        self._steps: list[Step] = []
        """Of this transaction."""
        self._undo: list[Undo] = []
        self._journal = 0
        """Steps since the last fold."""
        self._number = 0
        """The last number of shares."""
        self._numbered_from = 0
        """Numbers up to this one are not in the journal."""
        self._shares: dict[int, tuple[Share, ...]] = {}
        """By their number; only while the journal is read."""
        self._folded = False
        """This transaction folds."""
        self._loaded = False
        ledger.at_begin.append(self._begin_anew)
        ledger.at_write.append(self._write)
        ledger.at_roll_back.append(self._roll_back)

    # -- figures ------------------------------------------------------------------------------------------------------

    def tally(self, place: account.Place) -> Tally:
        """The figures of a place."""
        known = self._tallies.get(place)
        if known is None:
            row = self._ledger.one("budget_use", *place)
            known = self._tallies[place] = Tally(place, UNUSED if row is None else read_use(row))
        return known

    def get(self, place: account.Place, _: Use = UNUSED, /) -> Use:
        """See `account.Figures`."""
        return self.tally(place).use

    __getitem__ = get

    def __setitem__(self, place: account.Place, use: Use) -> None:
        """Note that notices were sent."""
        self._tell(self.tally(place), use)

    def _tell(self, tally: Tally, use: Use) -> None:
        self._undo.append(Undo(0, None, (tally,), None, tally.told, tally.told_of))
        tally.told, tally.told_of = use.told, use.told_of
        self._touch((tally,))
        self._steps.append(Told(tally.place, use.told, use.told_of))

    def known(self, budget: str, since: int) -> list[tuple[account.Place, Use]]:
        """The figures of a budget that may be newer than their rows."""
        found = list(self._tallies.values())
        return [(one.place, one.use) for one in found if one.place[0] == budget and one.place[2] >= since]

    def binding(self, caps: Caps, facts: Facts, ask: Ask) -> Binding:
        """The budgets that bind a call."""
        if caps is not self._caps or len(self._bindings) >= KNOWN:
            self._bindings.clear()
            self._caps = caps
        key = (facts.agent, facts.session, ask.provider, ask.model)
        found = self._bindings.get(key)
        if found is None:
            bounds = [
                Bound(cap, subject, self.tally((cap.name, subject, cap.start)))
                for cap, subject in bound(caps, facts, ask)
            ]
            found = self._bindings[key] = Binding(caps, bounds)
        return found

    @property
    def bind(self) -> bool:
        """True if there are budgets."""
        return bool(self._caps)

    # -- steps --------------------------------------------------------------------------------------------------------

    def begin(self, key: int, hold: Hold, asks: Demand, binding: Binding | None, *, has_row: bool) -> None:
        """A call begins: reserve for it. `asks` are kept for it if it has no row."""
        run = self._begin(key, hold, () if has_row else asks, binding, has_row=has_row)
        self._undo.append(Undo(key, run, run.tallies, None))
        number = self._named(hold, binding)
        self._steps.append(
            Began(key, run.asks, hold.input, hold.output, hold.input_rate, hold.output_rate, hold.call, number)
        )

    def _named(self, hold: Hold, binding: Binding | None) -> int:
        """The number of these shares in the journal."""
        if binding is not None and binding.number > self._numbered_from:
            return binding.number
        self._number += 1
        self._steps.append(Named(self._number, hold.shares))
        if binding is not None:
            binding.number = self._number
        return self._number

    def _begin(self, key: int, hold: Hold, asks: Demand, binding: Binding | None, *, has_row: bool) -> Run:
        tallies = self._tallies_of(hold) if binding is None else binding.tallies
        run = self._runs[key] = Run(hold, tallies, binding, asks, has_row=has_row, in_row=False)
        _reserve(tallies, hold.amounts(), 1)
        self._touch(tallies)
        return run

    def settle(self, key: int, spent: Spent | None, caps: Caps, *, final: bool) -> tuple[Hold, list[Notice]] | None:
        """A call ended: what it had reserved, and the notices; None if it had reserved nothing. `final`: its row goes
        with its request in the same step."""
        run = self._take(key, final=final)
        if run is None:
            return None
        used = _settled(run.hold, spent)
        self._end(key, run, used)
        self._steps.append(Ended(key, spent, interrupted=False, hold=run.hold if run.in_row else None))
        if run.binding is not None and run.binding.caps is caps and not run.binding.near:
            return run.hold, []
        by_name = {cap.name: cap for cap in caps}
        return run.hold, [
            notice
            for share, tally in zip(run.hold.shares, run.tallies, strict=True)
            if (cap := by_name.get(share.name)) is not None and cap.start == share.start
            for notice in self._notices(cap, share.subject, tally)
        ]

    def interrupted(self, key: int) -> None:
        """The daemon died under a call: all that was reserved counts."""
        run = self._take(key, final=False)
        if run is not None:
            self._end(key, run, run.hold.amounts())
            self._steps.append(Ended(key, None, interrupted=True, hold=run.hold if run.in_row else None))

    def _end(self, key: int, run: Run, used: Sequence[Amount]) -> None:
        self._undo.append(Undo(key, run, run.tallies, used))
        _use(run.tallies, used, 1)
        _reserve(run.tallies, run.hold.amounts(), -1)
        self._touch(run.tallies)

    def _touch(self, tallies: Sequence[Tally]) -> None:
        self._dirty[id(tallies)] = tallies

    def _notices(self, cap: Cap, subject: str, tally: Tally) -> Iterator[Notice]:
        use, notices = told(cap, subject, tally.use)
        if notices:
            self._tell(tally, use)
        yield from notices

    def _take(self, key: int, *, final: bool) -> Run | None:
        run = self._runs.pop(key, None)
        if run is None:
            kept = self._ledger.scalar("hold", key) if self._ledger.totals.get(DEMANDS) else None
            if kept is None:
                return None
            hold = decode_hold(kept)
            run = Run(hold, self._tallies_of(hold), None, (), has_row=True, in_row=True)
        if not final:
            self._keep_row(key, run)
        return run

    def _keep_row(self, key: int, run: Run) -> None:
        """Let a request that will be claimed again have what it asks for in its row, and no reservation."""
        if run.in_row:
            self._ledger.run("drop_hold", key)
        elif not run.has_row:
            self._ledger.count(DEMANDS, 1)
            self._ledger.run("add_demand", key, encode_demand(run.asks) if run.asks else None, None)

    def _tallies_of(self, hold: Hold) -> list[Tally]:
        return [self.tally((share.name, share.subject, share.start)) for share in hold.shares]

    # -- the journal --------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """A transaction begins."""
        self._undo.clear()
        self._folded = False
        self.load()

    def _write(self) -> None:
        if self._steps:
            self._journal += len(self._steps)
            if self._journal < max(FOLD, 4 * len(self._runs)):
                self._ledger.run("add_budget_steps", _encode(self._steps))
            else:
                self._fold()
            self._steps = []

    def _fold(self) -> None:
        """Write the figures and the reservations, and forget the journal."""
        self._folded = True
        for tally in {tally.place: tally for tallies in self._dirty.values() for tally in tallies}.values():
            self._ledger.run(
                "put_budget_use", *tally.place, tally.calls, tally.tokens, tally.nanos, tally.held_calls,
                tally.held_tokens, tally.held_nanos, tally.told, tally.told_of,
            )  # fmt: skip
        for key, run in self._runs.items():
            if not run.in_row:
                if not run.has_row:
                    self._ledger.count(DEMANDS, 1)
                asks = encode_demand(run.asks) if run.asks else None
                self._ledger.run("set_hold", key, asks, encode_hold(run.hold))
                run.has_row = run.in_row = True
        self._ledger.run("drop_budget_steps")
        self._journal = 0
        self._numbered_from = self._number
        self._dirty.clear()
        if len(self._tallies) > KNOWN:
            self._bindings.clear()
            self._tallies = {tally.place: tally for run in self._runs.values() for tally in run.tallies}

    def load(self) -> None:
        """Read the journal, once and after a rollback that needs it."""
        if self._loaded:
            return
        self._loaded = True
        for (data,) in self._ledger.all("budget_steps"):
            steps = _decode(data)
            self._journal += len(steps)
            for step in steps:
                self._replay(step)
        self._shares.clear()

    def _replay(self, step: Step) -> None:
        if isinstance(step, Named):
            self._shares[step.number] = step.shares
            self._number = self._numbered_from = step.number
        elif isinstance(step, Began):
            hold = Hold(
                step.input, step.output, step.input_rate, step.output_rate, step.call, self._shares[step.shares]
            )
            self._begin(step.key, hold, step.asks, None, has_row=not step.asks)
        elif isinstance(step, Told):
            tally = self.tally(step.place)
            self._touch((tally,))
            tally.told, tally.told_of = step.told, step.told_of
        else:
            run = self._runs.pop(step.key, None)
            held = step.hold if run is None else run.hold
            if held is None:
                raise ValueError(f"the journal of budgets ends a call that it did not begin: {step.key}")
            tallies = self._tallies_of(held)
            _use(tallies, held.amounts() if step.interrupted else _settled(held, step.spent), 1)
            _reserve(tallies, held.amounts(), -1)
            self._touch(tallies)

    def _roll_back(self) -> None:
        self._steps = []
        self._numbered_from = self._number
        if self._folded:
            # Which rows there are, and what they have, is not what is remembered.
            self._loaded = False
            for gathered in (self._tallies, self._dirty, self._runs, self._bindings, self._undo):
                gathered.clear()
            self._journal = 0
            return
        for one in reversed(self._undo):
            if one.run is None:
                one.tallies[0].told, one.tallies[0].told_of = one.told, one.told_of
            elif one.used is None:
                del self._runs[one.key]
                _reserve(one.tallies, one.run.hold.amounts(), -1)
            else:
                self._runs[one.key] = one.run
                _use(one.tallies, one.used, -1)
                _reserve(one.tallies, one.run.hold.amounts(), 1)
        self._undo.clear()


def _settled(hold: Hold, spent: Spent | None) -> list[Amount]:
    """What an ended call counts as, for each share."""
    priced = spent is None or spent.nanos is not None or (spent.tokens is None and hold.input_rate is not None)
    if priced and hold.shares:
        # The same for all.
        return [settled(hold, hold.shares[0], spent)] * len(hold.shares)
    return [settled(hold, share, spent) for share in hold.shares]


def _reserve(tallies: Sequence[Tally], amounts: Sequence[Amount], sign: int) -> None:
    last: Amount | None = None
    calls = tokens = nanos = 0
    for tally, amount in zip(tallies, amounts, strict=True):
        if amount is not last:
            last, calls, tokens, nanos = amount, sign * amount.calls, sign * amount.tokens, sign * amount.nanos
        tally.held_calls += calls
        tally.held_tokens += tokens
        tally.held_nanos += nanos


def _use(tallies: Sequence[Tally], amounts: Sequence[Amount], sign: int) -> None:
    last: Amount | None = None
    calls = tokens = nanos = 0
    for tally, amount in zip(tallies, amounts, strict=True):
        if amount is not last:
            last, calls, tokens, nanos = amount, sign * amount.calls, sign * amount.tokens, sign * amount.nanos
        tally.calls += calls
        tally.tokens += tokens
        tally.nanos += nanos
