"""Budgets in SQL: their figures, the reservations of running requests, and the waiters."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ksi.budgets import account
from ksi.budgets.rules import (
    UNUSED,
    Amount,
    Ask,
    Caps,
    Demand,
    Facts,
    Hold,
    Notice,
    Over,
    Spent,
    Use,
    decode_demand,
    decode_hold,
    encode_demand,
    encode_hold,
)
from ksi.store.rules.budgets import ask_at, refused, rough
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import Row, read_use
from ksi.store.values import NewRequest

KNOWN = 10_000
"""Figures that are kept in memory after a commit."""

LOOKS = 64
"""Requests that wait for one budget, some of which may continue after the end of a call."""

DEMANDS = "demands"
"""The kept figure of requests that budgets may bind and that have not ended."""


class UseRows:
    """The figures of budgets, read once and written once in a transaction; see `account.Figures`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[account.Place, Use] = {}
        self._changed: dict[account.Place, Use] = {}

    def get(self, place: account.Place, default: Use = UNUSED, /) -> Use:
        """See `account.Figures`."""
        known = self._known.get(place)
        if known is None:
            row = self._ledger.one("budget_use", *place)
            known = self._known[place] = default if row is None else read_use(row)
        return known

    __getitem__ = get

    def __setitem__(self, place: account.Place, use: Use) -> None:
        self._known[place] = self._changed[place] = use

    def write(self) -> None:
        """Write the changes into the transaction."""
        for place, use in self._changed.items():
            self._ledger.run("put_budget_use", *place, *_amount(use.used), *_amount(use.held), use.told, use.told_of)
        self._changed.clear()
        if len(self._known) > KNOWN:
            self._known.clear()

    def forget(self) -> None:
        """The transaction never was."""
        self._known.clear()
        self._changed.clear()


def _amount(amount: Amount) -> Row:
    return amount.calls, amount.tokens, amount.nanos


class Room(msgspec.Struct, frozen=True):
    """Budgets have room for a call."""

    hold: Hold
    ask: Ask
    known: bool = False
    """The request's demand was kept."""

    @property
    def output_cap(self) -> int | None:
        """The maximum output that it may ask for; None if that is all that it wants."""
        return self.hold.output if self.hold.output < self.ask.output else None


class Budgets:
    """The operations of the verbs on budgets. Each decides, then writes, in a transaction that its caller holds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.uses = UseRows(ledger)
        ledger.at_write.append(self.uses.write)
        ledger.at_roll_back.append(self.uses.forget)
        self._waiting = True
        """True if a request may wait for a budget."""
        self._holds: dict[int, Hold] = {}
        """What running requests have set aside, as far as this life knows it."""
        ledger.at_roll_back.append(self._holds.clear)

    # -- coming in ----------------------------------------------------------------------------------------------------

    def check(self, new: NewRequest, conversation: str, head: int | None, caps: Caps) -> None:
        """Check that a new request's budgets have room for it, if they do not let it wait.

        Raises:
            BudgetExceeded: they have none.
        """
        over = refused(self._looks(new.demand, Facts(new.agent_id, conversation), head, caps))
        if over is not None:
            raise over

    def _looks(self, demand: Demand, facts: Facts, head: int | None, caps: Caps) -> list[Hold | Over]:
        context = self._context(head)
        return [account.look(self.uses, caps, facts, ask, context) for ask in demand]

    def room(self, new: NewRequest, provider: str, conversation: str, head: int | None, caps: Caps) -> Room | None:
        """The reservation of a new request that could run at once; None if it has to wait."""
        ask = ask_at(new.demand, provider, new.model, len(new.body))
        found = account.look(self.uses, caps, Facts(new.agent_id, conversation), ask, self._context(head))
        return None if isinstance(found, Over) else Room(found, ask)

    def begin(self, key: int, demand: Demand, hold: Hold) -> None:
        """A new request runs at once."""
        self._ledger.count(DEMANDS, 1)
        self._ledger.run("add_demand", key, encode_demand(demand), encode_hold(hold))
        self._know(key, hold)
        account.set_aside(self.uses, hold)

    def remember(self, key: int, demand: Demand) -> None:
        """A new request waits."""
        if demand:
            self._ledger.count(DEMANDS, 1)
            self._ledger.run("add_demand", key, encode_demand(demand), None)

    # -- starting -----------------------------------------------------------------------------------------------------

    def look(
        self, key: int, facts: Facts, provider: str, model: str, head: int | None, size: int, caps: Caps
    ) -> Room | Over:
        """True if the budgets of a ready request have room for it; nothing is changed."""
        kept = self._ledger.scalar("demand", key)
        ask = ask_at(() if kept is None else decode_demand(kept), provider, model, size)
        found = account.look(self.uses, caps, facts, ask, self._context(head))
        return found if isinstance(found, Over) else Room(found, ask, known=kept is not None)

    def start(self, key: int, room: Room) -> None:
        """A ready request runs: make its reservation."""
        if not room.known:
            self._ledger.count(DEMANDS, 1)
        self._ledger.run("set_hold", key, encode_hold(room.hold))
        self._know(key, room.hold)
        account.set_aside(self.uses, room.hold)

    def wait(self, key: int, over: Over) -> list[Notice]:
        """Set a ready request aside until its budget has room; returns the notices."""
        self._waiting = True
        self._ledger.run("over_budget", key, f"{over.cap.name}\n{over.subject}", over.cap.end)
        return self.exceeded(over) if over.spent else []

    def exceeded(self, over: Over) -> list[Notice]:
        """A request found its budget used up; returns the notices."""
        return account.exceeded(self.uses, over) if not over.never else []

    def _context(self, head: int | None) -> int:
        return 0 if head is None else int(self._ledger.scalar("context_tokens", head) or 0)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _know(self, key: int, hold: Hold) -> None:
        if len(self._holds) >= KNOWN:
            self._holds.clear()
        self._holds[key] = hold

    def settle(self, key: int, spent: Spent | None, caps: Caps, *, final: bool) -> list[Notice]:
        """End a call; what is to be told. `final`: its request ends in the same step, and its row goes with it."""
        hold = self._take_hold(key, final=final)
        if hold is None:
            return []
        notices = account.settle(self.uses, hold, spent, caps)
        self._let_go_on(hold, caps)
        return notices

    def interrupted(self, key: int) -> None:
        """The daemon died under a call."""
        hold = self._take_hold(key)
        if hold is not None:
            account.interrupted(self.uses, hold)

    def _take_hold(self, key: int, *, final: bool = False) -> Hold | None:
        if not self._ledger.totals.get(DEMANDS):
            return None
        hold = self._holds.pop(key, None)
        if hold is None:
            kept = self._ledger.scalar("hold", key)
            if kept is None:
                return None
            hold = decode_hold(kept)
        if not final:
            self._ledger.run("drop_hold", key)
        return hold

    def _let_go_on(self, hold: Hold, caps: Caps) -> None:
        """Let requests be claimed again for which the returned reservation makes room."""
        if self._waiting:
            self._waiting = self._ledger.one("any_over_budget") is not None
        if not self._waiting:
            return
        by_name = {cap.name: cap for cap in caps}
        for share in hold.shares:
            cap = by_name.get(share.name)
            if cap is None or cap.start != share.start:
                continue
            use = self.uses[share.name, share.subject, share.start]
            left = cap.limit_of(share.subject) - use.used.of(cap.unit) - use.held.of(cap.unit)
            for key, asks in self._ledger.all("over_this_budget", f"{share.name}\n{share.subject}", LOOKS):
                demand: Sequence[Ask] = decode_demand(asks) if asks is not None else (rough("", "", 0),)
                # Each by itself: one that is too large, or that another budget stops, holds up nobody behind it.
                if min(account.least(cap, ask) for ask in demand) <= left:
                    self._ledger.run("set_ready", key, 1)

    def bring_back_ended(self, now: int, limit: int) -> int:
        """Let those be claimed again whose budget's window is over; how many."""
        if not self._waiting:
            return 0
        return len(self._ledger.all("bring_back_ended", now, limit))

    def reconsider(self, name: str | None, limit: int) -> int:
        """Let those be claimed again that wait for this budget, or for any; how many."""
        low, high = ("", "\U0010ffff") if name is None else (f"{name}\n", f"{name}\v")
        return len(self._ledger.all("bring_back_of", low, high, limit))

    def next_end(self) -> int | None:
        """The end of the first window that a request waits for."""
        end: int | None = self._ledger.scalar("next_budget_end") if self._waiting else None
        return end
