"""The records of a snapshot, which every store can write and read, whatever its tables look like.

A snapshot is the state of one moment: figures first, then conversations, forks, chains, requests and locks in the order
of arrival, the attempts whose request is not kept any more, deliveries, and the state of providers and pauses. Times
are microseconds of wall time.

Running requests are saved as queued and interrupted, as after a crash; requests being cancelled are saved as cancelled.
Chains are saved with such runs charged, and reminders that such runs took as waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from ksi.clock import Moment
from ksi.errors import CheckpointInvalid, FailureClass
from ksi.request import Attempt, Outcome, Priority, State, decode_body
from ksi.store.admission import Routing, unanswered
from ksi.store.chains import Block, ChainLimits, ChildRequest, InjectionState, charge
from ksi.store.passages import Passage, put_back, put_back_bytes
from ksi.store.questions import Question

FENCE_LEAP = 10**12
"""Fencing tokens continue this far above the saved ones: above all that the original can have given since."""


class Base64(msgspec.Struct, frozen=True):
    """Bytes that are no text."""

    base64: bytes


Packed = str | Base64
"""Bytes in JSON: as text if they are text."""


def pack(data: bytes) -> Packed:
    """Bytes for a record."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Base64(data)


def unpack(data: Packed) -> bytes:
    """The packed bytes."""
    return data.base64 if isinstance(data, Base64) else data.encode()


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record"):
    """One line of a snapshot."""


class Figures(_Record, frozen=True, kw_only=True, tag="figures"):
    """Figures that cannot be counted from the other records."""

    ended: dict[str, int]
    """Requests that ever ended, by their final state."""
    fence: int
    """The last that was given."""
    logged: int
    """The id of the last turn that the response log has."""
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
    """A fork; `conversation` is the one with which its record goes."""

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
        """True if it is a turn of its conversation."""
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
        """The outbox state of a finished request, if it is not dispatched yet."""
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


class SavedPassage(_Record, frozen=True, kw_only=True, tag="passage"):
    """A long text that is cut out of deliveries and prompts; it stands before them."""

    id: int
    text: str


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
    """The request of a direct delivery that is not delivered."""
    passage: int | None = None
    """The parts cut out of the text and the child's body ..."""
    place: int | None = None
    """... in characters ..."""
    child_place: int | None = None
    """... and in bytes."""


class SavedRequest(_Record, frozen=True, kw_only=True, tag="request"):
    """A kept request with its trail."""

    key: int
    """Grows with arrival, over requests and locks."""
    request_id: str
    conversation: str
    state: State
    holds: bool = False
    """True if it holds its conversation's lock."""
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
    question: Question | None = None
    """The question to a person, answered or not."""
    body: Packed
    attempts: tuple[SavedAttempt, ...] = ()
    member: SavedMember | None = None
    reminders: tuple[str, ...] = ()
    """The reminders before its prompt, if it completed."""
    passage: int | None = None
    """The parts cut out of the body and of the reminders ..."""
    place: int | None = None
    """... in bytes ..."""
    reminded_place: int | None = None
    """... and in characters of the reminders as a JSON list."""

    @property
    def turn(self) -> int | None:
        """Its turn's id, if it completed."""
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


class SavedRecord(_Record, frozen=True, kw_only=True, tag="record"):
    """The state of a provider, or a pause; see `ksi.store.provider_records`."""

    name: str
    value: Packed


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
    """The reminders before a turn's prompt."""
    passage: int | None = None
    """This and the next two as in `SavedRequest`."""
    place: int | None = None
    reminded_place: int | None = None


Record = (
    Figures
    | SavedPassage
    | SavedConversation
    | SavedFork
    | SavedChain
    | SavedRequest
    | SavedLock
    | SavedSpare
    | SavedInjection
    | SavedRecord
)


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The result of loading a snapshot."""

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
    """The loaded form of a saved delivery: a dead letter if the request that carries it ended meanwhile.

    `carrier` is the loaded request of its name, if that carries it.

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
    """The loaded form of a saved request: an interrupted one fails if the store's rules say so."""
    if request.interrupted and (fail_interrupted or request.interruptions >= max_interruptions):
        return _end(request, State.FAILED, FailureClass.DAEMON_RESTART, now)
    return request


def _end(request: SavedRequest, state: State, error: FailureClass, now: Moment) -> SavedRequest:
    return msgspec.structs.replace(
        request, state=state, holds=False, error=error.value, message=None, finished_at=now.wall, due=None
    )


def begin(records: Iterable[Record]) -> tuple[Figures, Iterator[Record]]:
    """The figures at the beginning of a snapshot, and the records after them.

    Raises:
        CheckpointInvalid: it begins with something else.
    """
    rest = iter(records)
    figures = next(rest, None)
    if not isinstance(figures, Figures):
        raise contradiction("it does not begin with its figures")
    return figures, rest


def whole(records: Iterable[Record]) -> Iterator[Record]:
    """The records without passages: the parts that were cut out are in their places again.

    Raises:
        CheckpointInvalid: a record names a passage that is not there.
    """
    passages: dict[int, Passage] = {}
    for record in records:
        if isinstance(record, SavedPassage):
            passages[record.id] = Passage.of(record.text)
            continue
        if isinstance(record, SavedInjection | SavedRequest | SavedSpare) and record.passage is not None:
            if record.passage not in passages:
                raise contradiction(f"it names passage {record.passage} and does not have it")
            passage = passages[record.passage]
            if isinstance(record, SavedInjection):
                yield _whole_injection(record, passage)
            else:
                yield _whole_body(record, passage)
        else:
            yield record


def _whole_injection(record: SavedInjection, passage: Passage) -> SavedInjection:
    text, child = record.text, record.child
    if record.place is not None:
        text = put_back(text, record.place, passage.text)
    if child is not None and record.child_place is not None:
        child = msgspec.structs.replace(child, body=put_back_bytes(child.body, record.child_place, passage.data))
    return msgspec.structs.replace(record, text=text, child=child, passage=None, place=None, child_place=None)


def _whole_body(record: SavedRequest | SavedSpare, passage: Passage) -> SavedRequest | SavedSpare:
    body, reminders = record.body, record.reminders
    if body is not None and record.place is not None:
        body = pack(put_back_bytes(unpack(body), record.place, passage.data))
    if record.reminded_place is not None:
        told = put_back(msgspec.json.encode(reminders).decode(), record.reminded_place, passage.data.decode())
        reminders = msgspec.json.decode(told, type=tuple[str, ...])
    changes = {"body": body, "reminders": reminders, "passage": None, "place": None, "reminded_place": None}
    return msgspec.structs.replace(record, **changes)


def contradiction(what: str) -> CheckpointInvalid:
    """A snapshot whose records do not fit together."""
    return CheckpointInvalid(f"the checkpoint contradicts itself: {what}", reason="damaged")
