"""Budgets' figures in the memory of the database's only writer, and the journal that brings them over a crash.

A claim and an end write no figures: what they change stands in one row of the journal for each transaction, and the
figures of many transactions are written together (`FOLD`), with the reservations of what still runs. So a budget's row
is that of the last fold, and the journal tells what happened since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    Over,
    Share,
    Spent,
    Use,
    bound,
    decode_hold,
    encode_demand,
    encode_hold,
    settled,
    told,
)
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import read_use
from ksi.store.sqlite.tallies import Amounts, Binding, Group, Taken, Tally

FOLD = 16_384
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


class Run:
    """A running call."""

    __slots__ = ("asks", "binding", "group", "has_row", "held", "hold", "in_row")

    def __init__(
        self, hold: Hold, group: Group, binding: Binding | None, asks: Demand, *, has_row: bool, in_row: bool
    ) -> None:
        self.hold, self.group, self.binding, self.asks = hold, group, binding, asks
        self.held = _reserved(hold)
        self.has_row = has_row
        """It has a row in `demand`."""
        self.in_row = in_row
        """Its reservation stands there: it began before the last fold."""


class Ending(NamedTuple):
    """A call ended."""

    key: int
    run: Run
    used: Amounts


class Telling(NamedTuple):
    """Notices were sent; the values before."""

    tally: Tally
    told: int
    told_of: int


Change = int | Ending | Telling
"""A step of this transaction, to be taken back with it; a number is the key of a call that began."""


class BudgetFigures:
    """The figures, as the present transaction has them; see `account.Figures`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tallies: dict[account.Place, Tally] = {}
        self._ahead: dict[int, Group] = {}
        """Groups whose tallies have to catch up, by their ids."""
        self._taken = Taken()
        self._dirty: dict[account.Place, Tally] = {}
        """Changed since the last fold."""
        self._runs: dict[int, Run] = {}
        self._bindings: dict[tuple[str | None, str, str, str], Binding] = {}
        self._caps: Caps = ()
        """The budgets that `_bindings` are of."""
        self._steps: list[Step] = []
        """Of this transaction."""
        self._changes: list[Change] = []
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

    def use(self, place: account.Place) -> Use:
        """The figures of a place."""
        self._catch_up()
        return self._tally(place).use_now

    def _tally(self, place: account.Place) -> Tally:
        known = self._tallies.get(place)
        if known is None:
            row = self._ledger.one("budget_use", *place)
            known = self._tallies[place] = Tally(place, UNUSED if row is None else read_use(row))
        return known

    def _catch_up(self) -> None:
        """Add to all tallies what is ahead of them."""
        for group in self._ahead.values():
            group.catch_up()
            self._touch(group.tallies)
        self._ahead.clear()

    def _touch(self, tallies: Sequence[Tally]) -> None:
        for tally in tallies:
            self._dirty[tally.place] = tally

    def get(self, place: account.Place, _: Use = UNUSED, /) -> Use:
        """See `account.Figures`."""
        return self.use(place)

    __getitem__ = use

    def __setitem__(self, place: account.Place, use: Use) -> None:
        """Note that notices were sent."""
        self._tell(self._tally(place), use)

    def _tell(self, tally: Tally, use: Use) -> None:
        self._changes.append(Telling(tally, tally.told, tally.told_of))
        tally.told, tally.told_of = use.told, use.told_of
        self._touch((tally,))
        self._steps.append(Told(tally.place, use.told, use.told_of))

    def known(self, budget: str, since: int) -> list[tuple[account.Place, Use]]:
        """The figures of a budget that may be newer than their rows."""
        self._catch_up()
        found = list(self._tallies.values())
        return [(one.place, one.use_now) for one in found if one.place[0] == budget and one.place[2] >= since]

    def look(self, caps: Caps, facts: Facts, ask: Ask, context: int) -> tuple[Hold | Over, Binding]:
        """The reservation of a call, or why it does not fit, and the budgets that bind it; nothing is changed."""
        binding = self._binding(caps, facts, ask)
        hold = binding.hold(ask, context, self._taken)
        if hold is None:
            self._measure(binding)
            hold = binding.hold(ask, context, self._taken)
        return hold or account.look(self, caps, facts, ask, context), binding

    def _measure(self, binding: Binding) -> None:
        self._catch_up()
        binding.measure(self._taken)

    def _binding(self, caps: Caps, facts: Facts, ask: Ask) -> Binding:
        if caps is not self._caps or len(self._bindings) >= KNOWN:
            self._bindings.clear()
            self._caps = caps
        key = (facts.agent, facts.session, ask.provider, ask.model)
        found = self._bindings.get(key)
        if found is None:
            bounds = bound(caps, facts, ask)
            tallies = [self._tally((cap.name, subject, cap.start)) for cap, subject in bounds]
            found = self._bindings[key] = Binding(caps, bounds, tallies)
        return found

    @property
    def bind(self) -> bool:
        """True if there are budgets."""
        return bool(self._caps)

    # -- steps --------------------------------------------------------------------------------------------------------

    def begin(self, key: int, hold: Hold, asks: Demand, binding: Binding | None, *, has_row: bool) -> None:
        """A call begins: reserve for it. `asks` are kept for it if it has no row."""
        run = self._begin(key, hold, () if has_row else asks, binding, has_row=has_row)
        self._changes.append(key)
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
        group = self._group_of(hold) if binding is None else binding.group
        run = self._runs[key] = Run(hold, group, binding, asks, has_row=has_row, in_row=False)
        self._reserve(group, run.held, 1)
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
        if run.binding is not None and run.binding.caps is caps and self._is_quiet(run.binding):
            return run.hold, []
        self._catch_up()
        by_name = {cap.name: cap for cap in caps}
        return run.hold, [
            notice
            for share, tally in zip(run.hold.shares, run.group.tallies, strict=True)
            if (cap := by_name.get(share.name)) is not None and cap.start == share.start
            for notice in self._notices(cap, share.subject, tally)
        ]

    def interrupted(self, key: int) -> None:
        """The daemon died under a call: all that was reserved counts."""
        run = self._take(key, final=False)
        if run is not None:
            self._end(key, run, run.held)
            self._steps.append(Ended(key, None, interrupted=True, hold=run.hold if run.in_row else None))

    def _is_quiet(self, binding: Binding) -> bool:
        if not binding.is_quiet(self._taken):
            self._measure(binding)
        return binding.is_quiet(self._taken)

    def _end(self, key: int, run: Run, used: Amounts) -> None:
        self._changes.append(Ending(key, run, used))
        self._use(run.group, used, 1)
        self._reserve(run.group, run.held, -1)

    def _reserve(self, group: Group, held: Amounts, sign: int) -> None:
        if sign > 0:
            self._taken.add(held)
        if isinstance(held, Amount):
            group.ahead.reserve(held, sign)
            self._ahead[id(group)] = group
        else:
            self._touch(group.tallies)
            for tally, amount in zip(group.tallies, held, strict=True):
                tally.reserve(amount, sign)

    def _use(self, group: Group, used: Amounts, sign: int) -> None:
        if sign > 0:
            self._taken.add(used)
        if isinstance(used, Amount):
            group.ahead.use(used, sign)
            self._ahead[id(group)] = group
        else:
            self._touch(group.tallies)
            for tally, amount in zip(group.tallies, used, strict=True):
                tally.use(amount, sign)

    def _notices(self, cap: Cap, subject: str, tally: Tally) -> Iterator[Notice]:
        use, notices = told(cap, subject, tally.use_now)
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
            run = Run(hold, self._group_of(hold), None, (), has_row=True, in_row=True)
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

    def _group_of(self, hold: Hold) -> Group:
        return Group([self._tally((share.name, share.subject, share.start)) for share in hold.shares])

    # -- the journal --------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """A transaction begins."""
        self._changes.clear()
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
        self._catch_up()
        for tally in self._dirty.values():
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
            self._tallies = {tally.place: tally for run in self._runs.values() for tally in run.group.tallies}

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
            tally = self._tally(step.place)
            self._touch((tally,))
            tally.told, tally.told_of = step.told, step.told_of
        else:
            run = self._runs.pop(step.key, None)
            held = step.hold if run is None else run.hold
            if held is None:
                raise ValueError(f"the journal of budgets ends a call that it did not begin: {step.key}")
            group = self._group_of(held)
            reserved = _reserved(held)
            self._use(group, reserved if step.interrupted else _settled(held, step.spent), 1)
            self._reserve(group, reserved, -1)

    def _roll_back(self) -> None:
        self._steps = []
        self._numbered_from = self._number
        if self._folded:
            # Which rows there are, and what they have, is not what is remembered.
            self._loaded = False
            for gathered in (self._tallies, self._ahead, self._dirty, self._runs, self._bindings, self._changes):
                gathered.clear()
            self._journal = 0
            return
        for change in reversed(self._changes):
            if isinstance(change, Telling):
                change.tally.told, change.tally.told_of = change.told, change.told_of
            elif isinstance(change, Ending):
                self._runs[change.key] = change.run
                self._use(change.run.group, change.used, -1)
                self._reserve(change.run.group, change.run.held, 1)
            else:
                run = self._runs.pop(change)
                self._reserve(run.group, run.held, -1)
        self._changes.clear()


def _reserved(hold: Hold) -> Amounts:
    """The reservation of a call: at a known price it is the same for all budgets."""
    if hold.input_rate is not None and hold.shares:
        return hold.used(hold.shares[0], hold.input, hold.output)
    return hold.amounts()


def _settled(hold: Hold, spent: Spent | None) -> Amounts:
    """What an ended call counts as."""
    priced = spent is None or spent.nanos is not None or (spent.tokens is None and hold.input_rate is not None)
    if priced and hold.shares:
        return settled(hold, hold.shares[0], spent)
    return [settled(hold, share, spent) for share in hold.shares]
