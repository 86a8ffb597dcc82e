"""What the memory store holds: records, and sorted indexes that are pure functions of them.

Nobody edits an index by hand. A record is changed inside `MemoryData.changing`, which checks the step against the state
table and moves the record's index entries to where its new values say they belong; the totals move along with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ksi.errors import InternalError
from ksi.request import FIRST_STATES, WAITING_STATES, Attempt, Outcome, Priority, State, Turn, may_become
from ksi.store.admission import Routing
from ksi.store.binding import Binding, binding_of
from ksi.store.memory_chain_data import ChainTable, Injection, InjectionTable, Link
from ksi.store.memory_index import Key, Ordered
from ksi.store.values import Fork


@dataclass(slots=True, eq=False, kw_only=True)
class Conversation:
    """A dialogue: its life, its head, and who may write it."""

    number: int
    name: str
    created_at: int
    active_at: int
    parent: Conversation | None = None
    head: int | None = None
    turns: list[int] = field(default_factory=list)
    provider: str | None = None
    provider_session: str | None = None
    agents: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    """Provider sessions that mean this conversation."""
    forks: list[int] = field(default_factory=list)
    """Forks that go with it: the one it came from, and those that its provider made."""
    holder: Member | None = None
    since: int | None = None
    """When the holder took the lock, by wall time."""
    members: int = 0
    """Kept requests, its external holder and waiters: while there is one, the conversation stays."""
    children: int = 0
    reminders: list[int] = field(default_factory=list)
    """Deliveries that wait for its next prompt, in order (C2)."""
    entries: list[tuple[Ordered, Key]] = field(default_factory=list)
    """Its own index entries, as they stand now."""

    @property
    def root(self) -> int:
        """The number of the conversation from which all of its tree comes."""
        return self.number if self.parent is None else self.parent.root


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """What can hold a conversation or stand in its line."""

    key: int
    request_id: str
    conversation: Conversation
    rank: int
    priority: Priority
    enqueued_at: int
    fence: int = 0

    @property
    def holds(self) -> bool:
        """Whether it has its conversation's lock."""
        return self.conversation.holder is self

    @property
    def place(self) -> Key:
        """Where it stands among all lines."""
        return (self.conversation.number, self.rank, self.key)


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Member):
    """One request, from its arrival until it is pruned."""

    state: State
    body: bytes
    route: str
    model: str
    agent_id: str | None
    hold_on_retry: bool
    requeued_from: str | None
    due: int | None
    expires: int | None
    attempt: int = 0
    token: int = 0
    provider: str | None = None
    slot: str | None = None
    """What its run takes a place of: its provider, everywhere or on one machine (D4)."""
    probe: bool = False
    """Whether its run tries a provider again."""
    started_at: int | None = None
    finished_at: int | None = None
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
    message: str | None = None
    interruptions: int = 0
    interrupted_by: str | None = None
    cancelling: bool = False
    turn: int | None = None
    link: Link | None = None
    """How it belongs to a chain."""
    taken: list[Injection] = field(default_factory=list)
    """Reminders in its prompt, while it runs."""


@dataclass(slots=True, eq=False, kw_only=True)
class ExternalLock(Member):
    """A lock held or awaited from outside."""

    metadata: bytes | None
    deadline: int | None
    """While it waits: the monotonic time at which it gives up."""
    patience: int | None
    """How long it was ready to wait, in microseconds."""
    ends: int = 0
    """While it holds: the monotonic time at which it lapses."""
    expires_at: int = 0
    """The same by wall time, for the eye."""


@dataclass(slots=True, eq=False, kw_only=True)
class TurnRecord:
    """A completed turn: what history reads, and what the response log needs of it."""

    turn: Turn
    request_id: str
    conversation: str
    agent_id: str | None
    attempt: Attempt


@dataclass(slots=True, frozen=True, kw_only=True)
class Spent:
    """An ended attempt as the account of usage has it: it stays when its request is pruned."""

    request: int
    conversation: str
    agent_id: str | None
    attempt: Attempt
    first: bool
    """The first turn of its conversation, completed."""


class MemoryData:
    """All a memory store knows. It outlives the store: a new store over the same data finds what a crash left."""

    def __init__(self) -> None:
        self.ids: dict[str, Member] = {}
        """Requests, external holders and waiters share one name space (Q4, L5)."""
        self.members: dict[int, Member] = {}
        self.conversations: dict[str, Conversation] = {}
        self.numbered: dict[int, Conversation] = {}
        self.turns: dict[int, TurnRecord] = {}
        self.aliases: dict[str, Conversation] = {}
        self.forks: dict[int, Fork] = {}
        self.states: Counter[State] = Counter()
        """Present figures of the states that pass, and all there ever were of the final ones."""
        self.routes: set[str] = set()
        """All that a request ever had."""
        self.watermark = 0
        self.spent: list[Spent] = []
        """In the order in which they ended."""
        self.chains = ChainTable()
        self.injections = InjectionTable()
        self.heard: dict[str, int] = {}
        """Machines that are not lost, and when each was last heard of, by monotonic time."""

        self.active = Ordered()
        self.running = Ordered()
        """(slot, key): slots are counted here, from the requests themselves."""
        self.ready = Ordered()
        """(route, node, rank, key); the node whose daemons alone may start it, empty for any (D4)"""
        self.lines = Ordered()
        """(conversation, rank, key), external waiters included"""
        self.delayed = Ordered()
        self.perishable = Ordered()
        """(expires, key) of what was never started"""
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
        self.log = Ordered()
        self.unrouted = Ordered()

        self._last: Counter[str] = Counter()

    def number(self, of: str) -> int:
        """The next number of a series, from 1; no number comes twice."""
        self._last[of] += 1
        return self._last[of]

    def last_number(self, of: str) -> int:
        """The last number of a series, 0 before the first."""
        return self._last[of]

    def count_on(self, numbers: Mapping[str, int]) -> None:
        """Let series go on behind these numbers."""
        self._last.update({of: number - self._last[of] for of, number in numbers.items()})

    def become(self, other: MemoryData) -> None:
        """Be what `other` is, for all who hold this."""
        vars(self).update(vars(other))

    @property
    def waiting(self) -> int:
        """How many requests wait, for whatever reason (Q5)."""
        return sum(self.states[state] for state in WAITING_STATES)

    def request(self, key: Key) -> Request:
        """The request that an index entry stands for."""
        member = self.members[key[-1]]
        if not isinstance(member, Request):
            raise InternalError(f"{member.request_id!r} is a lock, a request was expected")
        return member

    def lock(self, key: Key) -> ExternalLock:
        """The external lock or waiter that an index entry stands for."""
        member = self.members[key[-1]]
        if not isinstance(member, ExternalLock):
            raise InternalError(f"{member.request_id!r} is a request, a lock was expected")
        return member

    def find(self, name: str) -> Conversation | None:
        """A conversation by its own name, or by a provider session that means it."""
        return self.conversations.get(name) or self.aliases.get(name)

    def record_fork(self, conversation: Conversation, fork: Fork) -> None:
        """Keep a fork as long as this conversation."""
        number = self.number("fork")
        self.forks[number] = fork
        self.fork_order.add((number,))
        self.trees.add((conversation.root, number))
        conversation.forks.append(number)

    def ended(self, request: Request, attempt: Attempt, previous: int | None = None) -> None:
        """Put an ended attempt into its request's trail and into the account."""
        request.attempts.append(attempt)
        self.spent.append(
            Spent(
                request=request.key,
                conversation=request.conversation.name,
                agent_id=request.agent_id,
                attempt=attempt,
                first=attempt.outcome is Outcome.COMPLETED and previous is None,
            )
        )

    def head_of_line(self, conversation: Conversation) -> Member | None:
        """Who comes next in a conversation."""
        key = next(self.lines.walk((conversation.number,)), None)
        return None if key is None else self.members[key[-1]]

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

    def put(self, member: Member) -> None:
        """Put a record in its place in all indexes; who keeps the totals is the caller."""
        self.members[member.key] = member
        self.ids[member.request_id] = member
        member.conversation.members += 1
        for index, key in self._entries(member):
            index.add(key)

    def drop(self, member: Member) -> None:
        """Forget a finished request or an external lock; if it holds its conversation, it lets go."""
        for index, key in self._entries(member):
            index.remove(key)
        if member.holds:
            member.conversation.holder = None
        del self.members[member.key]
        del self.ids[member.request_id]
        member.conversation.members -= 1
        if isinstance(member, Request) and member.link is not None:
            self.chains.leave(member.link.chain, member.key)

    @contextmanager
    def changing(self, member: Member) -> Iterator[None]:
        """Change a record inside: its entries and the totals follow, and the state table is kept (section 4)."""
        entries = self._entries(member)
        before = member.state if isinstance(member, Request) else None
        yield
        if isinstance(member, Request) and before is not None and member.state is not before:
            if not may_become(before, member.state):
                raise InternalError(f"a request cannot go from {before} to {member.state}")
            self.states[before] -= 1
            self.states[member.state] += 1
        for index, key in entries:
            index.remove(key)
        for index, key in self._entries(member):
            index.add(key)

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

    def ready_request(self, conversation: Conversation) -> Request | None:
        """The one request of a conversation that could run now: its waiting holder, or the head of a free line."""
        first = conversation.holder or self.head_of_line(conversation)
        return first if isinstance(first, Request) and first.state is State.QUEUED else None

    # -- machines ---------------------------------------------------------------------------------------------------

    def binding(self, conversation: Conversation) -> Binding | None:
        """Where the provider session lives in which a conversation goes on (D4)."""
        record = None if conversation.head is None else self.turns.get(conversation.head)
        return None if record is None else binding_of(record.turn)

    def home(self, conversation: Conversation, route: str) -> str:
        """The machine whose daemons alone may start a conversation's request of this route now; empty: any may."""
        binding = self.binding(conversation)
        return binding.node if binding is not None and binding.node in self.heard and binding.binds(route) else ""

    def lose(self, node: str) -> bool:
        """A machine was silent for too long: what waits for it may be started anywhere. Whether there is such."""
        del self.heard[node]
        let_go = False
        for conversation in self.numbered.values():
            for place, (index, key) in enumerate(conversation.entries):
                if index is self.ready and key[1] == node:
                    free = (key[0], "", *key[2:])
                    index.remove(key)
                    index.add(free)
                    conversation.entries[place] = index, free
                    let_go = True
        return let_go

    def waits_for(self, request: Request) -> str | None:
        """The machine whose daemons alone may start a ready request."""
        entries = request.conversation.entries
        return next((key[1] or None for index, key in entries if index is self.ready and key[-1] == request.key), None)

    def _ready_place(self, conversation: Conversation, ready: Request) -> Key:
        """What became ready for one machine stays so until that is lost, and what was let go stays free."""
        for index, key in conversation.entries:
            if index is self.ready and (key[0], *key[2:]) == (ready.route, ready.rank, ready.key):
                return key
        return (ready.route, self.home(conversation, ready.route), ready.rank, ready.key)

    # -- what stands where --------------------------------------------------------------------------------------------

    def _entries(self, member: Member) -> list[tuple[Ordered, Key]]:
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
            case State.SCHEDULED | State.RETRYING | State.PARKED:
                yield self.delayed, (request.due, request.key)
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
