"""Budgets in SQL: their figures, the reservations of running requests, and the waiters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ksi.budgets import account
from ksi.budgets.rules import (
    Ask,
    Caps,
    Demand,
    Facts,
    Hold,
    Notice,
    Over,
    Spent,
    decode_demand,
    encode_demand,
)
from ksi.request import Attempt
from ksi.store.rules.budgets import LOOKS, REFUSING_LOOKS, ask_at, refused, rough
from ksi.store.sqlite.budget_figures import DEMANDS, BudgetFigures
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.tallies import Binding
from ksi.store.values import NewRequest

CONTEXTS = 20_000
"""Conversations' lengths that are kept in memory."""


class Room(NamedTuple):
    """Budgets have room for a call."""

    hold: Hold
    ask: Ask
    binding: Binding | None
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
        self.figures = BudgetFigures(ledger)
        self._waiting = True
        """True if a request may wait for a budget."""
        self._contexts: dict[int, int] = {}
        """The tokens of conversations, by their heads."""
        ledger.at_roll_back.append(self._contexts.clear)

    # -- coming in ----------------------------------------------------------------------------------------------------

    def check(self, new: NewRequest, conversation: str, head: int | None, caps: Caps) -> None:
        """Check that a new request's budgets have room for it, if they do not let it wait.

        Raises:
            BudgetExceeded: they have none.
        """
        facts, context = Facts(new.agent_id, conversation), self._context(head)
        over = refused([self.figures.look(caps, facts, ask, context)[0] for ask in new.demand])
        if over is not None:
            raise over

    def room(self, new: NewRequest, provider: str, conversation: str, head: int | None, caps: Caps) -> Room | None:
        """The reservation of a new request that could run at once; None if it has to wait."""
        ask = ask_at(new.demand, provider, new.model, len(new.body))
        found, binding = self.figures.look(caps, Facts(new.agent_id, conversation), ask, self._context(head))
        return None if isinstance(found, Over) else Room(found, ask, binding)

    def begin(self, key: int, demand: Demand, room: Room) -> None:
        """A new request runs at once."""
        self.figures.begin(key, room.hold, demand, room.binding, has_row=False)

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
        found, binding = self.figures.look(caps, facts, ask, self._context(head))
        return found if isinstance(found, Over) else Room(found, ask, binding, known=kept is not None)

    def start(self, key: int, room: Room) -> None:
        """A ready request runs: make its reservation."""
        self.figures.begin(key, room.hold, (), room.binding, has_row=room.known)

    def wait(self, key: int, over: Over) -> list[Notice]:
        """Set a ready request aside until its budget has room; returns the notices."""
        self._waiting = True
        self._ledger.run("over_budget", key, f"{over.cap.name}\n{over.subject}", over.cap.end)
        return self.exceeded(over) if over.spent else []

    def exceeded(self, over: Over) -> list[Notice]:
        """A request found its budget used up; returns the notices."""
        return account.exceeded(self.figures, over) if not over.never else []

    def _context(self, head: int | None) -> int:
        if head is None:
            return 0
        known = self._contexts.get(head)
        return int(self._ledger.scalar("context_tokens", head) or 0) if known is None else known

    def know_context(self, head: int, attempt: Attempt) -> None:
        """A conversation got this turn, whose tokens the next call of it begins with."""
        if not self.figures.bind:
            return
        if len(self._contexts) >= CONTEXTS:
            self._contexts.clear()
        usage = attempt.usage
        self._contexts[head] = 0 if usage is None else usage.input_size + usage.output_tokens

    # -- ends ---------------------------------------------------------------------------------------------------------

    def settle(self, key: int, spent: Spent | None, caps: Caps, *, final: bool) -> list[Notice]:
        """End a call; what is to be told. `final`: its request ends in the same step, and its row goes with it."""
        ended = self.figures.settle(key, spent, caps, final=final)
        if ended is None:
            return []
        hold, notices = ended
        self._let_go_on(hold, caps)
        return notices

    def interrupted(self, key: int) -> None:
        """The daemon died under a call."""
        self.figures.interrupted(key)

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
            limit, use = cap.limit_of(share.subject), self.figures.use((share.name, share.subject, share.start))
            used, held = use.used.of(cap.unit), use.held.of(cap.unit)
            looks = REFUSING_LOOKS if cap.refuse else LOOKS
            for key, asks in self._ledger.all("over_this_budget", f"{share.name}\n{share.subject}", looks):
                demand: Sequence[Ask] = decode_demand(asks) if asks is not None else (rough("", "", 0),)
                # Each by itself: one that is too large, or that another budget stops, holds up nobody behind it.
                if account.decided(cap, limit, used, held, min(account.least(cap, ask) for ask in demand)):
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
