"""The whole contents of a store, as plain records in memory: the source of a snapshot, and its first form after
loading.

A store that cannot read and write the records of a snapshot in one go, because it is on a server, reads itself into an
image and writes itself from one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ksi.errors import InternalError
from ksi.request import Attempt, Priority, State, Turn
from ksi.store.account import Spent
from ksi.store.binding import Binding, binding_of
from ksi.store.image.chains import ChainTable, Injection, InjectionTable, Link
from ksi.store.image.ordered import Key, Ordered
from ksi.store.provider_records import HeldRecords
from ksi.store.questions import Question
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
    """Deliveries that wait for its next prompt, in order."""
    entries: list[tuple[Ordered, Key]] = field(default_factory=list)
    """Private entries in the indexes of the code that works on the image."""

    @property
    def root(self) -> int:
        """The number of the conversation from which all of its tree comes."""
        return self.number if self.parent is None else self.parent.root


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """A holder of a conversation or a waiter in its queue."""

    key: int
    request_id: str
    conversation: Conversation
    rank: int
    priority: Priority
    enqueued_at: int
    fence: int = 0

    @property
    def holds(self) -> bool:
        """True if it holds its conversation's lock."""
        return self.conversation.holder is self

    @property
    def place(self) -> Key:
        """Its sort key among all queues."""
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
    """The slot that its run takes: its provider's, everywhere or on one machine."""
    probe: bool = False
    """True if its run probes a provider."""
    started_at: int | None = None
    finished_at: int | None = None
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
    message: str | None = None
    question: Question | None = None
    interruptions: int = 0
    interrupted_by: str | None = None
    cancelling: bool = False
    turn: int | None = None
    link: Link | None = None
    """How it belongs to a chain."""
    tag: int = 0
    """Its place in its priority, where agents take turns."""
    flow: str | None = None
    """Whom that counts for; None of one that never waited."""
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
    """A completed turn: the facts that the history and the response log need."""

    turn: Turn
    request_id: str
    conversation: str
    agent_id: str | None
    attempt: Attempt


class Image:
    """Everything, and the few indexes that loading and writing need."""

    def __init__(self) -> None:
        self.ids: dict[str, Member] = {}
        """Requests, external holders and waiters share one name space."""
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
        self.records = HeldRecords()
        """The state of providers, and the pauses."""
        self.heard: dict[str, int] = {}
        """Machines that are not lost, and when each was last heard of, by monotonic time."""
        self.lines = Ordered()
        """(conversation, rank, key), external waiters included"""
        self.log = Ordered()
        """(turn,) of those that the response log has to have."""
        self._last: Counter[str] = Counter()

    def number(self, of: str) -> int:
        """The next number of a series, from 1; no number comes twice."""
        self._last[of] += 1
        return self._last[of]

    def last_number(self, of: str) -> int:
        """The last number of a series, 0 before the first."""
        return self._last[of]

    def count_on(self, numbers: Mapping[str, int]) -> None:
        """Let series continue after these numbers."""
        self._last.update({of: number - self._last[of] for of, number in numbers.items()})

    def request(self, key: Key) -> Request:
        """The request that an index entry stands for."""
        member = self.members[key[-1]]
        if not isinstance(member, Request):
            raise InternalError(f"{member.request_id!r} is a lock, a request was expected")
        return member

    def find(self, name: str) -> Conversation | None:
        """A conversation by its own name, or by a provider session that means it."""
        return self.conversations.get(name) or self.aliases.get(name)

    def record_fork(self, conversation: Conversation, fork: Fork) -> int:
        """Keep a fork as long as this conversation; its number."""
        number = self.number("fork")
        self.forks[number] = fork
        conversation.forks.append(number)
        return number

    def head_of_line(self, conversation: Conversation) -> Member | None:
        """The next waiter of a conversation."""
        key = next(self.lines.walk((conversation.number,)), None)
        return None if key is None else self.members[key[-1]]

    def put(self, member: Member) -> None:
        """Put a record in its place in all indexes; the caller updates the totals."""
        self.members[member.key] = member
        self.ids[member.request_id] = member
        member.conversation.members += 1
        for index, key in self.entries(member):
            index.add(key)

    @contextmanager
    def moving(self, member: Member) -> Iterator[None]:
        """Change a record inside: its index entries follow."""
        entries = self.entries(member)
        yield
        for index, key in entries:
            index.remove(key)
        for index, key in self.entries(member):
            index.add(key)

    def ready_request(self, conversation: Conversation) -> Request | None:
        """The one request of a conversation that could run now: its waiting holder, or the head of a free line."""
        first = conversation.holder or self.head_of_line(conversation)
        return first if isinstance(first, Request) and first.state is State.QUEUED else None

    def binding(self, conversation: Conversation) -> Binding | None:
        """The machine with the provider session in which a conversation continues."""
        record = None if conversation.head is None else self.turns.get(conversation.head)
        return None if record is None else binding_of(record.turn)

    def home(self, conversation: Conversation, route: str) -> str:
        """The machine whose daemons alone may start a conversation's request of this route now; empty: any may."""
        binding = self.binding(conversation)
        return binding.node if binding is not None and binding.node in self.heard and binding.binds(route) else ""

    def waits_for(self, request: Request) -> str | None:
        """The machine whose daemons alone may start a ready request."""
        return self.home(request.conversation, request.route) or None

    def entries(self, member: Member) -> list[tuple[Ordered, Key]]:
        """The places of a record in the indexes."""
        waits = isinstance(member, ExternalLock) or (isinstance(member, Request) and member.state is State.QUEUED)
        return [(self.lines, member.place)] if waits and not member.holds else []
