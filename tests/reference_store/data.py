"""What the memory store holds: records, and sorted indexes that are pure functions of them.

Nobody edits an index by hand. A record is changed inside `MemoryData.changing`, which checks the step against the state
table and moves the record's index entries to where its new values say they belong; the totals move along with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ksi.budgets.account import Place
from ksi.budgets.rules import Demand, Hold, Use
from ksi.errors import InternalError
from ksi.request import FIRST_STATES, WAITING_STATES, Attempt, Outcome, State, may_become
from ksi.store.account import Spent
from ksi.store.admission import Routing
from ksi.store.image.data import Conversation, ExternalLock, Image, Member, Request
from ksi.store.image.ordered import Key, Ordered
from ksi.store.questions import is_asking
from ksi.store.rules.fairness import Turns
from ksi.store.values import Fork, Paused
from tests.reference_store.chain_data import IndexedChains, IndexedInjections

ASIDE = "\x01"
"""Stands for a machine in `MemoryData.ready`: none, for paused requests that were set aside."""


class BudgetWaiter(NamedTuple):
    """The waiters of a budget."""

    budget: str
    """Its name, and whom it counts for, on two lines."""
    until: int


class MemoryData(Image):
    """All a memory store knows. It outlives the store: a new store over the same data finds the state after a crash."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: IndexedChains = IndexedChains()
        self.injections: IndexedInjections = IndexedInjections()
        self.active = Ordered()
        self.running = Ordered()
        """(slot, key): slots are counted here, from the requests themselves."""
        self.ready = Ordered()
        """(route, node, rank, key); the node whose daemons alone may start it, empty for any (D4), or ASIDE"""
        self.delayed = Ordered()
        self.asking = Ordered()
        """(key,) of requests that wait for a person's answer"""
        self.perishable = Ordered()
        """(expires, key) of unstarted requests"""
        self.finished = Ordered()
        self.failed = Ordered()
        self.locks = Ordered()
        """(ends, key) of external holders"""
        self.waiters = Ordered()
        self.deadlines = Ordered()
        self.held = Ordered()
        self.sessions = Ordered()
        self.agent_sessions = Ordered()
        self.idle = Ordered()
        """(active_at, conversation) of those that nothing keeps"""
        self.fork_order = Ordered()
        self.trees = Ordered()
        """(root conversation, fork)"""
        self.unrouted = Ordered()
        self.clocks = Turns({})
        self.uses: dict[Place, Use] = {}
        self.demands: dict[int, Demand] = {}
        self.holds: dict[int, Hold] = {}
        self.budget_waiters: dict[int, BudgetWaiter] = {}
        """By the request's key. Some may have left the line since."""

    def become(self, other: MemoryData) -> None:
        """Become `other`, for all holders of this."""
        vars(self).update(vars(other))

    @property
    def waiting(self) -> int:
        """How many requests wait, for whatever reason (Q5)."""
        return sum(self.states[state] for state in WAITING_STATES)

    def lock(self, key: Key) -> ExternalLock:
        """The external lock or waiter that an index entry stands for."""
        member = self.members[key[-1]]
        if not isinstance(member, ExternalLock):
            raise InternalError(f"{member.request_id!r} is a request, a lock was expected")
        return member

    def record_fork(self, conversation: Conversation, fork: Fork) -> int:
        """Keep a fork as long as this conversation; its number."""
        number = super().record_fork(conversation, fork)
        self.fork_order.add((number,))
        self.trees.add((conversation.root, number))
        return number

    def ended(self, request: Request, attempt: Attempt, previous: int | None = None) -> None:
        """Put an ended attempt into its request's trail and into the account."""
        request.attempts.append(attempt)
        self.spent.append(
            Spent(
                key=request.key,
                conversation=request.conversation.name,
                agent_id=request.agent_id,
                attempt=attempt,
                first=attempt.outcome is Outcome.COMPLETED and previous is None,
            )
        )

    def before(self, conversation: Conversation, rank: int, key: int | None, limit: int) -> int:
        """How many of a line stand before (rank, key), or before a newcomer of that rank; at most `limit`."""
        place = (conversation.number, rank + 1) if key is None else (conversation.number, rank, key)
        return min(self.lines.before(place, (conversation.number,)), limit)

    def add(self, member: Member) -> None:
        """Take a new request or external lock in."""
        if isinstance(member, Request):
            if member.state not in FIRST_STATES:
                raise InternalError(f"a request cannot begin {member.state}")
            self.states[member.state] += 1
        self.put(member)

    def drop(self, member: Member) -> None:
        """Forget a finished request or an external lock; if it holds its conversation, it releases it."""
        for index, key in self.entries(member):
            index.remove(key)
        if member.holds:
            member.conversation.holder = None
        del self.members[member.key]
        del self.ids[member.request_id]
        member.conversation.members -= 1
        if isinstance(member, Request) and member.link is not None:
            self.chains.leave(member.link, member.key)

    @contextmanager
    def changing(self, member: Member) -> Iterator[None]:
        """Change a record inside: its entries and the totals follow, and the state table is kept (section 4)."""
        before = member.state if isinstance(member, Request) else None
        with self.moving(member):
            yield
            if isinstance(member, Request) and before is not None and member.state is not before:
                if not may_become(before, member.state):
                    raise InternalError(f"a request cannot go from {before} to {member.state}")
                self.states[before] -= 1
                self.states[member.state] += 1

    def reindex(self, conversation: Conversation) -> Request | None:
        """Bring a conversation's own entries up to date; the request that became ready by that, if one did."""
        old = conversation.entries
        new = conversation.entries = self._conversation_entries(conversation)
        for index, key in old:
            if (index, key) not in new:
                index.remove(key)
        appeared = None
        for index, key in new:
            if (index, key) not in old:
                index.add(key)
                if index is self.ready:
                    appeared = self.members[key[-1]]
        return appeared if isinstance(appeared, Request) else None

    # -- machines ---------------------------------------------------------------------------------------------------

    def lose(self, node: str) -> bool:
        """A machine was silent for too long: what waits for it may be started anywhere. Whether there is such."""
        del self.heard[node]
        let_go = False
        for conversation in self.numbered.values():
            if any(index is self.ready and key[1] == node for index, key in conversation.entries):
                self.move_ready(conversation, "")
                let_go = True
        return let_go

    def move_ready(self, conversation: Conversation, lane: str) -> None:
        """Let ready requests of a conversation be started by one machine's daemons, by all or, in ASIDE, by none."""
        for place, (index, key) in enumerate(conversation.entries):
            if index is self.ready:
                moved = (key[0], lane, *key[2:])
                index.remove(key)
                index.add(moved)
                conversation.entries[place] = index, moved

    def is_aside(self, request: Request) -> bool:
        """True if it could run, and was set aside."""
        entries = request.conversation.entries
        return any(index is self.ready and key[1] == ASIDE and key[-1] == request.key for index, key in entries)

    def waits_for(self, request: Request) -> str | None:
        """The machine whose daemons alone may start a ready request."""
        entries = request.conversation.entries
        lanes = (key[1] for index, key in entries if index is self.ready and key[-1] == request.key)
        return next((lane or None for lane in lanes if lane != ASIDE), None)

    def _ready_place(self, conversation: Conversation, ready: Request) -> Key:
        """Requests that became ready for one machine stay so until that is lost, and released ones stay free."""
        for index, key in conversation.entries:
            if index is self.ready and (key[0], *key[2:]) == (ready.route, ready.rank, ready.key):
                return key
        return (ready.route, self.home(conversation, ready.route), ready.rank, ready.key)

    # -- places
    # ----------------------------------------------------------------------------------------------------------

    def entries(self, member: Member) -> list[tuple[Ordered, Key]]:
        if isinstance(member, ExternalLock):
            return list(self._lock_entries(member))
        return list(self._request_entries(member)) if isinstance(member, Request) else []

    def _request_entries(self, request: Request) -> Iterator[tuple[Ordered, Key]]:
        match request.state:
            case State.RUNNING:
                yield self.active, (request.key,)
                yield self.running, (request.slot, request.key)
            case State.QUEUED if not request.holds:
                yield self.lines, request.place
            case State.SCHEDULED | State.RETRYING | State.PARKED if request.due is not None:
                yield self.delayed, (request.due, request.key)
        if is_asking(request.state, request.question):
            yield self.asking, (request.key,)
        if request.expires is not None and request.state in (State.SCHEDULED, State.QUEUED):
            yield self.perishable, (request.expires, request.key)
        if request.state.final:
            yield self.finished, (request.finished_at, request.key)
        if request.state is State.FAILED:
            yield self.failed, (request.finished_at, request.key)
        if request.link is not None and request.link.routing is Routing.UNROUTED:
            yield self.unrouted, (request.key,)

    def _lock_entries(self, lock: ExternalLock) -> Iterator[tuple[Ordered, Key]]:
        if lock.holds:
            yield self.locks, (lock.ends, lock.key)
            return
        yield self.waiters, (lock.key,)
        yield self.lines, lock.place
        if lock.deadline is not None:
            yield self.deadlines, (lock.deadline, lock.key)

    def _conversation_entries(self, conversation: Conversation) -> list[tuple[Ordered, Key]]:
        entries: list[tuple[Ordered, Key]] = [(self.sessions, (conversation.number,))]
        entries += [(self.agent_sessions, (agent, conversation.number)) for agent in conversation.agents]
        if conversation.holder is not None:
            entries.append((self.held, (conversation.number,)))
        if (ready := self.ready_request(conversation)) is not None:
            entries.append((self.ready, self._ready_place(conversation, ready)))
        if not conversation.members and not conversation.children and not conversation.reminders:
            entries.append((self.idle, (conversation.active_at, conversation.number)))
        return entries


def name_of(member: Member | None) -> str | None:
    """The request id of who holds or heads, if anybody does."""
    return None if member is None else member.request_id


def is_stopped(request: Request, paused: Paused) -> bool:
    """True if it must not be started now."""
    return paused.stops(request.agent_id, request.conversation.name, request.priority)
