"""What a store saves of itself: records that every store can give and take, whatever its tables look like (R5).

A snapshot is one moment: figures first, then conversations, forks, chains, requests and locks in the order in which
they came, the attempts whose request is not kept any more, and deliveries. Times are microseconds of wall time.

What ran at that moment is saved as queued and interrupted, as a crash would have left it (Q3); what was being cancelled
is saved as cancelled. Chains are saved with such runs charged, and reminders that such runs took as waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from ksi.clock import Moment
from ksi.errors import CheckpointInvalid, FailureClass
from ksi.request import Attempt, Outcome, Priority, State, decode_body
from ksi.store.admission import Routing, unanswered
from ksi.store.chains import Block, ChainLimits, ChildRequest, InjectionState, charge

FENCE_LEAP = 10**12
"""Fences go on so far behind the saved ones: above all that the original can have given since."""


class Base64(msgspec.Struct, frozen=True):
    """Bytes that are no text."""

    base64: bytes


Packed = str | Base64
"""Bytes as JSON holds them: text where they are text."""


def pack(data: bytes) -> Packed:
    """Bytes for a record."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Base64(data)


def unpack(data: Packed) -> bytes:
    """What was packed."""
    return data.base64 if isinstance(data, Base64) else data.encode()


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record"):
    """One line of a snapshot."""


class Figures(_Record, frozen=True, kw_only=True, tag="figures"):
    """What cannot be counted from the other records."""

    ended: dict[str, int]
    """Requests that ever ended, by their final state."""
    fence: int
    """The last that was given."""
    logged: int
    """The id of the last turn that the response log has (R3)."""
    routes: tuple[str, ...]


class SavedConversation(_Record, frozen=True, kw_only=True, tag="conversation"):
    """A conversation; one that it came from stands before it."""

    name: str
    created_at: int
    active_at: int
    turns: int = 0
    head: int | None = None
    """The id of its last turn."""
    forked_from: str | None = None
    agents: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Provider sessions that mean it."""


class SavedFork(_Record, frozen=True, kw_only=True, tag="fork"):
    """A fork (L7); `conversation` is the one with which its record goes."""

    conversation: str
    parent: str
    child: str
    request_id: str
    at: int
    kind: str


class SavedAttempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An ended attempt. Ids grow with the ends; a completed one's names its turn."""

    id: int
    attempt: Attempt
    """Without `raw`."""
    raw: Packed | None = None
    previous: int | None = None
    """The turn before this one."""

    @classmethod
    def of(cls, identity: int, attempt: Attempt, previous: int | None) -> SavedAttempt:
        """Save an attempt."""
        raw = None if attempt.raw is None else pack(attempt.raw)
        return cls(id=identity, attempt=msgspec.structs.replace(attempt, raw=None), raw=raw, previous=previous)

    @property
    def whole(self) -> Attempt:
        """The attempt with all that it had."""
        return self.attempt if self.raw is None else msgspec.structs.replace(self.attempt, raw=unpack(self.raw))

    @property
    def is_turn(self) -> bool:
        """Whether it is a turn of its conversation."""
        return self.attempt.outcome is Outcome.COMPLETED


class SavedMember(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request belongs to a chain."""

    chain: str
    parent: str | None = None
    parent_key: int | None = None
    depth: int
    limits: ChainLimits
    estimate: int = 0
    output_cap: int | None = None
    guard: bool = False
    injects: bool = False
    routed: bool = False
    """Its aftermath is written."""
    carries: bool = False
    """It carries the delivery of its own name."""
    mark: bytes | None = None
    result: bytes | None = None
    block: Block | None = None
    tokens: int = 0
    estimated: bool = False

    def routing(self, state: State) -> Routing:
        """What is left to be routed of it."""
        if not self.injects:
            return Routing.NONE
        return Routing.AT_END.ended(self.routed) if state.final else Routing.AT_END


class SavedChain(_Record, frozen=True, kw_only=True, tag="chain"):
    """A chain; its members follow. Nothing of it runs, so nothing is set aside."""

    name: str
    created_at: int
    started_at: int
    limits: ChainLimits
    used: int = 0
    estimated: int = 0
    closed: bool = False
    tripped: Block | None = None
    guard_messages: int = 0
    resets: int = 0
    reset_key: int = 0
    """Members up to this key came before the last reset."""
    deepest: int = 0


class SavedInjection(_Record, frozen=True, kw_only=True, tag="injection"):
    """A delivery. One that a running request took is saved as queued."""

    injection_id: str
    chain: str
    parent: str
    parent_key: int
    target: str
    direct: bool = False
    trigger: str
    state: str
    created_at: int
    finished_at: int | None = None
    request_id: str | None = None
    reason: Block | None = None
    text: str
    child: ChildRequest | None = None
    """Of a direct one that is not delivered."""


class SavedRequest(_Record, frozen=True, kw_only=True, tag="request"):
    """A kept request with its trail."""

    key: int
    """Grows with arrival, over requests and locks."""
    request_id: str
    conversation: str
    state: State
    holds: bool = False
    """Whether it has its conversation's lock."""
    priority: Priority
    rank: int
    route: str
    model: str
    agent_id: str | None = None
    hold_on_retry: bool = True
    requeued_from: str | None = None
    enqueued_at: int
    due: int | None = None
    expires: int | None = None
    begun: int = 0
    """Attempts that began."""
    interruptions: int = 0
    interrupted: bool = False
    """It ran when it was saved."""
    interrupted_by: str | None = None
    fence: int = 0
    since: int | None = None
    """When it took the conversation."""
    provider: str | None = None
    started_at: int | None = None
    finished_at: int | None = None
    error: str | None = None
    message: str | None = None
    body: Packed
    attempts: tuple[SavedAttempt, ...] = ()
    member: SavedMember | None = None
    reminders: tuple[str, ...] = ()
    """What went before its prompt, where it completed (C2)."""

    @property
    def turn(self) -> int | None:
        """Its turn's id, where it completed."""
        return next((saved.id for saved in self.attempts if saved.is_turn), None)


class SavedLock(_Record, frozen=True, kw_only=True, tag="lock"):
    """An outside holder, or one that waits."""

    key: int
    request_id: str
    conversation: str
    holds: bool = False
    priority: Priority
    rank: int
    enqueued_at: int
    fence: int = 0
    since: int | None = None
    patience: int | None = None
    """How long it was ready to wait, in microseconds."""
    metadata: Packed | None = None


class SavedSpare(_Record, frozen=True, kw_only=True, tag="attempt"):
    """An attempt whose request is not kept any more: a turn that history needs, or usage that the account needs."""

    key: int
    """Its request's."""
    conversation: str
    agent_id: str | None = None
    body: Packed | None = None
    """A turn's request."""
    saved: SavedAttempt
    reminders: tuple[str, ...] = ()
    """What went before a turn's prompt (C2)."""


Record = Figures | SavedConversation | SavedFork | SavedChain | SavedRequest | SavedLock | SavedSpare | SavedInjection


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What loading a snapshot did."""

    interrupted: tuple[str, ...] = ()
    """Requests that ran when they were saved, and run again."""
    failed: tuple[str, ...] = ()
    """Those that failed instead, by this store's rules."""


def stopped(request: SavedRequest, identity: int, now: Moment, *, cancelling: bool) -> SavedRequest:
    """A running request as it is saved; `identity` is the id of the attempt that is cut off."""
    attempt = Attempt(
        number=request.begun,
        provider=request.provider or "",
        outcome=Outcome.INTERRUPTED,
        started_at=request.started_at or 0,
        finished_at=now.wall,
        asked=request.model,
        mcp=decode_body(unpack(request.body)).mcp,
        error=FailureClass.DAEMON_RESTART.value,
    )
    queued = msgspec.structs.replace(
        request,
        state=State.QUEUED,
        provider=None,
        interruptions=request.interruptions + 1,
        interrupted=not cancelling,
        attempts=(*request.attempts, SavedAttempt.of(identity, attempt, None)),
        member=None if request.member is None else _charged(request.member, attempt),
    )
    return _end(queued, State.CANCELLED, FailureClass.CANCELLED, now) if cancelling else queued


def _charged(member: SavedMember, attempt: Attempt) -> SavedMember:
    tokens, _ = charge(attempt, member.estimate)
    return msgspec.structs.replace(member, tokens=member.tokens + tokens, estimated=True)


def loaded(injection: SavedInjection, carrier: SavedRequest | None) -> SavedInjection:
    """A saved delivery as it is taken in: a dead letter where the request that carries it ended on the way.

    `carrier` is the loaded request of its name, where that carries it.

    Raises:
        CheckpointInvalid: it is on its way without a request, or in no state that is saved.
    """
    if injection.state == InjectionState.TAKEN:
        raise contradiction(f"delivery {injection.injection_id!r} is taken, and nothing runs")
    if injection.state != InjectionState.QUEUED or not injection.direct:
        return injection
    if carrier is None or carrier.member is None:
        raise contradiction(f"nothing carries delivery {injection.injection_id!r}")
    if not carrier.state.final:
        return injection
    dead = unanswered(carrier.request_id, carrier.state, carrier.error, carrier.message, carrier.member.block)
    return msgspec.structs.replace(injection, state=dead.state, reason=dead.reason, finished_at=carrier.finished_at)


def admitted(request: SavedRequest, now: Moment, *, fail_interrupted: bool, max_interruptions: int) -> SavedRequest:
    """A saved request as it is taken in: an interrupted one fails where the store's rules say so (Q3)."""
    if request.interrupted and (fail_interrupted or request.interruptions >= max_interruptions):
        return _end(request, State.FAILED, FailureClass.DAEMON_RESTART, now)
    return request


def _end(request: SavedRequest, state: State, error: FailureClass, now: Moment) -> SavedRequest:
    return msgspec.structs.replace(
        request, state=state, holds=False, error=error.value, message=None, finished_at=now.wall, due=None
    )


def begin(records: Iterable[Record]) -> tuple[Figures, Iterator[Record]]:
    """The figures with which a snapshot begins, and what follows them.

    Raises:
        CheckpointInvalid: it begins with something else.
    """
    rest = iter(records)
    figures = next(rest, None)
    if not isinstance(figures, Figures):
        raise contradiction("it does not begin with its figures")
    return figures, rest


def contradiction(what: str) -> CheckpointInvalid:
    """A snapshot whose records do not fit together."""
    return CheckpointInvalid(f"the checkpoint contradicts itself: {what}", reason="damaged")
