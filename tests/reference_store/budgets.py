"""Budgets of the reference store: the figures, the reservations of running requests, and the waiters."""

from __future__ import annotations

from collections.abc import Sequence

from ksi.budgets import account
from ksi.budgets.rules import UNUSED, Caps, Demand, Facts, Hold, Notice, Over, Spent
from ksi.store.image.data import Conversation, Request
from ksi.store.rules.budgets import LOOKS, REFUSING_LOOKS, ask_at, refused, rough
from ksi.store.values import BudgetUse, BudgetWait, NewRequest
from tests.reference_store.data import ASIDE, BudgetWaiter, MemoryData


class Budgets:
    """The operations of the verbs on budgets."""

    def __init__(self, data: MemoryData) -> None:
        self._data = data

    def check(self, new: NewRequest, conversation: Conversation | None, caps: Caps) -> None:
        """Raises `BudgetExceeded` if its budgets do not let it wait."""
        name = new.conversation if conversation is None else conversation.name
        facts, context = Facts(new.agent_id, name), self._context(conversation, new.fork_of)
        over = refused([account.look(self._data.uses, caps, facts, ask, context) for ask in new.demand])
        if over is not None:
            raise over

    def room(self, new: NewRequest, conversation: Conversation | None, provider: str, caps: Caps) -> Hold | Over:
        """True if its budgets have room for a new request that could run at once."""
        name = new.conversation if conversation is None else conversation.name
        ask = ask_at(new.demand, provider, new.model, len(new.body))
        context = self._context(conversation, new.fork_of)
        return account.look(self._data.uses, caps, Facts(new.agent_id, name), ask, context)

    def look(self, request: Request, provider: str, caps: Caps) -> Hold | Over:
        """True if its budgets have room for a request."""
        ask = ask_at(self._demand(request), provider, request.model, len(request.body))
        facts = Facts(request.agent_id, request.conversation.name)
        return account.look(self._data.uses, caps, facts, ask, self._context(request.conversation))

    def output_cap(self, request: Request, provider: str, hold: Hold) -> int | None:
        """The maximum output that it may ask for, if that is less than it wants."""
        ask = ask_at(self._demand(request), provider, request.model, len(request.body))
        return hold.output if hold.output < ask.output else None

    def begin(self, request: Request, hold: Hold) -> None:
        """It runs."""
        self._data.holds[request.key] = hold
        account.set_aside(self._data.uses, hold)

    def wait(self, request: Request, over: Over) -> list[Notice]:
        """It is set aside until its budget has room."""
        self._data.move_ready(request.conversation, ASIDE)
        name = f"{over.cap.name}\n{over.subject}"
        self._data.budget_waiters[request.key] = BudgetWaiter(name, over.cap.end)
        return account.exceeded(self._data.uses, over) if over.spent else []

    def settle(self, request: Request, spent: Spent | None, caps: Caps) -> list[Notice]:
        """Its call ended."""
        hold = self._data.holds.pop(request.key, None)
        if hold is None:
            return []
        notices = account.settle(self._data.uses, hold, spent, caps)
        by_name = {cap.name: cap for cap in caps}
        for share in hold.shares:
            cap = by_name.get(share.name)
            if cap is None or cap.start != share.start:
                continue
            use = self._data.uses.get((share.name, share.subject, share.start), UNUSED)
            limit, used, held = cap.limit_of(share.subject), use.used.of(cap.unit), use.held.of(cap.unit)
            looks = REFUSING_LOOKS if cap.refuse else LOOKS
            for waiter in self._waiting(f"{share.name}\n{share.subject}")[:looks]:
                least = min(account.least(cap, ask) for ask in self._demand(waiter) or (rough("", "", 0),))
                if account.decided(cap, limit, used, held, least):
                    self._bring_back(waiter)
        return notices

    def interrupted(self, request: Request) -> None:
        """The daemon died under its call."""
        hold = self._data.holds.pop(request.key, None)
        if hold is not None:
            account.interrupted(self._data.uses, hold)

    def bring_back_ended(self, now: int, limit: int) -> int:
        """Bring those back whose budget's window is over."""
        over = [one for one in self._waiting() if self._data.budget_waiters[one.key].until <= now]
        over.sort(key=lambda one: self._data.budget_waiters[one.key].until)
        for one in over[:limit]:
            self._bring_back(one)
        return len(over[:limit])

    def next_end(self) -> int | None:
        """The end of the first window that a request waits for."""
        return min((self._data.budget_waiters[one.key].until for one in self._waiting()), default=None)

    def reconsider(self, budget: str | None, limit: int) -> bool:
        """Bring those back that wait for this budget, or for any."""
        found = [
            one
            for one in self._waiting()
            if budget is None or self._data.budget_waiters[one.key].budget.startswith(f"{budget}\n")
        ]
        for one in found[:limit]:
            self._bring_back(one)
        return len(found[:limit]) >= limit

    def uses(self, budget: str, since: int) -> Sequence[BudgetUse]:
        """See `Store.budget_uses`."""
        found = sorted(place for place in self._data.uses if place[0] == budget and place[2] >= since)
        return [BudgetUse(subject=place[1], start=place[2], use=self._data.uses[place]) for place in found]

    def waits(self) -> Sequence[BudgetWait]:
        """See `Store.budget_waits`."""
        found: dict[str, list[int]] = {}
        for one in self._waiting():
            waiter = self._data.budget_waiters[one.key]
            found.setdefault(waiter.budget, []).append(waiter.until)
        return [BudgetWait(budget=name, requests=len(ends), until=min(ends)) for name, ends in sorted(found.items())]

    def _waiting(self, budget: str | None = None) -> list[Request]:
        """The waiters, in order; those that have left are forgotten."""
        for key in list(self._data.budget_waiters):
            member = self._data.members.get(key)
            if not isinstance(member, Request) or not self._data.is_aside(member):
                del self._data.budget_waiters[key]
        keys = [key for key, waiter in self._data.budget_waiters.items() if budget in (None, waiter.budget)]
        return sorted((self._data.request((key,)) for key in keys), key=lambda one: (one.rank, one.key))

    def _bring_back(self, request: Request) -> None:
        del self._data.budget_waiters[request.key]
        self._data.move_ready(request.conversation, self._data.home(request.conversation, request.route))

    def _demand(self, request: Request) -> Demand:
        return self._data.demands.get(request.key, ())

    def _context(self, conversation: Conversation | None, fork_of: str | None = None) -> int:
        if conversation is None and fork_of is not None:
            conversation = self._data.find(fork_of)
        if conversation is None or conversation.head is None:
            return 0
        usage = self._data.turns[conversation.head].attempt.usage
        return 0 if usage is None else usage.input_size + usage.output_tokens
