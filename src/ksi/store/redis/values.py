"""The answers of the store's functions as the protocol's values; and the encoding of values as their arguments."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from ksi.request import Attempt, Outcome, Priority, State, Turn
from ksi.store.account import Spent
from ksi.store.binding import node_of
from ksi.store.chains import Block, ChainView, InjectionView, MemberGrant, Reminder
from ksi.store.questions import read_question
from ksi.store.redis.budgets import NoticeMap, OverMap
from ksi.store.rules import refusals
from ksi.store.values import (
    CancelOutcome,
    Claimed,
    Ended,
    Fork,
    LineEntry,
    LockGrant,
    LockView,
    LoggedTurn,
    Passing,
    RequestRow,
    RequestView,
)

T = TypeVar("T")

RANK_ZERO = 2**63
"""Ranks are written above it, so that their decimal texts sort as they do."""

NO_TURN = "0" * 16

encode = msgspec.msgpack.encode
_attempts = msgspec.msgpack.Decoder(Attempt)
_texts = msgspec.msgpack.Decoder(tuple[str, ...])


def key16(number: int) -> str:
    """A record's number as the store writes it."""
    return f"{number:016d}"


def pad20(time: int) -> str:
    """A time as the store writes it; times before 1970 are over anyhow."""
    return f"{max(int(time), 0):020d}"


def rank20(rank: int) -> str:
    """A rank as the store writes it."""
    return f"{rank + RANK_ZERO:020d}"


def decode(data: bytes, kind: type[T]) -> T:
    """A function's map. Numbers out of HASHes come as text."""
    return msgspec.msgpack.decode(data, type=kind, strict=False)


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """A request's HASH, with the facts that only the server adds."""

    key: str
    id: str
    conversation: str
    state: State
    rank: str
    priority: Priority
    enqueued: int
    route: str
    model: str = ""
    agent: str | None = None
    hold: int = 1
    requeued_from: str | None = None
    due: int | None = None
    expires: int | None = None
    attempt: int = 0
    provider: str | None = None
    started: int | None = None
    finished: int | None = None
    failed_at: int | None = None
    error: str | None = None
    message: str | None = None
    interruptions: int = 0
    interrupted_by: str | None = None
    cancelling: int = 0
    turn: str | None = None
    fence: int = 0
    chain: str | None = None
    parent: str | None = None
    depth: int | None = None
    block: Block | None = None
    injection: str | None = None
    held: bool = False
    position: int | None = None
    holder: str | None = None
    node: str | None = None
    budget: str | None = None
    question: str | None = None

    @property
    def shown_provider(self) -> str | None:
        """The provider that runs it, or gave the answer."""
        return self.provider if self.state in (State.RUNNING, State.COMPLETED) else None

    def view(self, bytes_of: Sequence[bytes]) -> RequestView:
        """All that is known of the request; `bytes_of` are its body, its turn and its ended attempts."""
        body, turn, *trail = bytes_of
        return RequestView(
            request_id=self.id,
            conversation=self.conversation,
            state=self.state,
            priority=self.priority,
            model=self.model,
            route=self.route,
            body=body,
            agent_id=self.agent,
            enqueued_at=self.enqueued,
            due=self.due,
            expires=self.expires,
            started_at=self.started,
            finished_at=self.finished,
            attempts=tuple(ended_attempt(entry, turn) for entry in trail),
            provider=self.shown_provider,
            error=self.error,
            message=self.message,
            interruptions=self.interruptions,
            interrupted_by=self.interrupted_by,
            cancelling=bool(self.cancelling) and self.state is State.RUNNING,
            requeued_from=self.requeued_from,
            position=self.position,
            holder=self.holder,
            node=self.node,
            chain=self.chain,
            parent=self.parent,
            depth=self.depth,
            block=self.block,
            injection=self.injection,
            budget=self.budget,
            question=read_question(self.question),
        )

    def row(self) -> RequestRow:
        """The request as a line of a listing."""
        return RequestRow(
            request_id=self.id,
            conversation=self.conversation,
            state=self.state,
            priority=self.priority,
            model=self.model,
            agent_id=self.agent,
            attempt=self.attempt,
            enqueued_at=self.enqueued,
            due=self.due,
            started_at=self.started,
            failed_at=self.failed_at,
            finished_at=self.finished,
            provider=self.shown_provider,
            error=self.error,
            message=self.message,
            question=read_question(self.question),
        )


class GrantedMap(msgspec.Struct, frozen=True, kw_only=True):
    """A MemberGrant; None values are absent from a function's map."""

    chain: str
    depth: int
    parent: str | None = None
    output_cap: int | None = None
    injects: bool

    @property
    def grant(self) -> MemberGrant:
        """As the protocol has it."""
        return MemberGrant(
            chain=self.chain, depth=self.depth, parent=self.parent, output_cap=self.output_cap, injects=self.injects
        )


class RunMap(msgspec.Struct, frozen=True, kw_only=True):
    """A claim without its body."""

    key: int
    request_id: str
    conversation: str
    route: str
    provider: str
    priority: Priority
    attempt: int
    fence: int
    token: int
    started_at: int
    enqueued_at: int
    head: int | None = None
    agent_id: str | None = None
    requeued_from: str | None = None
    chain: GrantedMap | None = None
    output_cap: int | None = None
    reminders: tuple[Reminder, ...] = ()

    def claimed(self, body: bytes) -> Claimed:
        """The claim."""
        return Claimed(
            key=self.key,
            request_id=self.request_id,
            conversation=self.conversation,
            body=body,
            route=self.route,
            provider=self.provider,
            priority=self.priority,
            attempt=self.attempt,
            fence=self.fence,
            token=self.token,
            started_at=self.started_at,
            enqueued_at=self.enqueued_at,
            head=self.head,
            agent_id=self.agent_id,
            requeued_from=self.requeued_from,
            chain=None if self.chain is None else self.chain.grant,
            output_cap=self.output_cap,
            reminders=self.reminders,
        )


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The common part of every function's answer: its refusal, and a flag for new work."""

    error: str | None = None
    work: bool = False
    found: int = 0


class EnqueueMap(Answer, frozen=True, kw_only=True):
    """The answer of `enqueue`."""

    request_id: str = ""
    conversation: str = ""
    conversation_id: str = ""
    since: int | None = None
    state: State = State.QUEUED
    ready: bool = False
    position: int = 0
    holder: str | None = None
    claim: RunMap | None = None
    stopping: str | None = None
    passing: Passing | None = None
    injections: tuple[InjectionView, ...] = ()
    existing: Fields | None = None
    over: OverMap | None = None
    block: Block | None = None
    chain: ChainView | None = None
    name: str = ""


class ClaimMap(Answer, frozen=True, kw_only=True):
    """The answer of `claim`."""

    started: tuple[RunMap, ...] = ()
    blocked: tuple[Ended, ...] = ()
    waits: dict[str, int] = {}
    more: bool = False
    notices: tuple[NoticeMap, ...] = ()
    waiting: bool = False
    stopped: tuple[OverMap, ...] = ()
    """Requests that wait for a budget which does not let them wait."""


class SettleMap(Answer, frozen=True, kw_only=True):
    """The answer of `settle`."""

    state: State = State.QUEUED
    fenced: bool = False
    turn: int | None = None
    finished_at: int | None = None
    passing: Passing | None = None
    due: int | None = None
    fork: Fork | None = None
    injections: tuple[InjectionView, ...] = ()
    notices: tuple[NoticeMap, ...] = ()


class CancelMap(Answer, frozen=True, kw_only=True):
    """The answer of `cancel`."""

    outcome: CancelOutcome = CancelOutcome.CANCELLED
    request_id: str = ""
    conversation: str = ""
    state: State = State.CANCELLED
    passing: Passing | None = None
    injections: tuple[InjectionView, ...] = ()


class AnsweredMap(Answer, frozen=True, kw_only=True):
    """The answer of `answer`."""

    taken: bool = False
    conversation: str = ""
    state: State = State.QUEUED
    passing: Passing | None = None
    injections: tuple[InjectionView, ...] = ()


class AcquireMap(Answer, frozen=True, kw_only=True):
    """The answer of `acquire`."""

    grant: LockGrant | None = None
    queued: bool = False
    position: int = 0
    holder: str | None = None
    renewed: bool = False


class GrantMap(Answer, frozen=True, kw_only=True):
    """The answer of `renew_lock`."""

    request_id: str = ""
    conversation: str = ""
    fence: int = 0
    expires_at: int = 0


class PassingMap(Answer, frozen=True, kw_only=True):
    """The answer of `release`."""

    conversation: str = ""
    released_by: str = ""
    next_request: str | None = None
    granted: LockGrant | None = None


class LockFields(msgspec.Struct, frozen=True, kw_only=True):
    """A LockView whose metadata is text, a letter for each byte."""

    conversation: str
    holder: str | None = None
    external: bool = False
    state: State | None = None
    since: int | None = None
    expires_at: int | None = None
    fence: int | None = None
    metadata: str | None = None
    line: tuple[LineEntry, ...] = ()
    waiting: int = 0
    node: str | None = None

    @property
    def shown(self) -> LockView:
        """As the protocol has it."""
        return LockView(
            conversation=self.conversation,
            holder=self.holder,
            external=self.external,
            state=self.state,
            since=self.since,
            expires_at=self.expires_at,
            fence=self.fence,
            metadata=None if self.metadata is None else self.metadata.encode("latin-1"),
            line=self.line,
            waiting=self.waiting,
            node=self.node,
        )


class LockMap(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `lock`."""

    view: LockFields | None = None


# -- attempts and turns -----------------------------------------------------------------------------------------------


class KeptTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A completed turn as the store keeps it."""

    previous: int | None
    key: int
    agent_id: str | None
    reminders: tuple[str, ...]
    attempt: Attempt


def kept_turn(data: bytes) -> KeptTurn:
    """Read a turn; see `lua/00_records.lua` for its layout."""
    agent = 87 + int(data[73:79])
    reminders = agent + int(data[79:87])
    attempt = _attempts.decode(data[reminders:])
    if data[72:73] == b"U":
        attempt = msgspec.structs.replace(attempt, provider_session=None, last_message=None, node=None)
    return KeptTurn(
        previous=int(data[:16]) or None,
        key=int(data[16:32]),
        agent_id=data[87:agent].decode() or None,
        reminders=_texts.decode(data[agent:reminders]) if reminders > agent else (),
        attempt=attempt,
    )


def ended_attempt(entry: bytes, turn: bytes) -> Attempt:
    """One entry of a trail."""
    kind = entry[:1]
    if kind == b"T":
        return kept_turn(turn).attempt
    attempt = _attempts.decode(entry[9:])
    return msgspec.structs.replace(attempt, outcome=Outcome.FENCED) if kind == b"F" else attempt


def kept_account(entry: bytes) -> Spent:
    """An entry of the account: time, number, flag, and usage."""
    spent = msgspec.msgpack.decode(entry[37:], type=Spent)
    flag, attempt = entry[36:37], spent.attempt
    if flag == b"U":
        attempt = msgspec.structs.replace(attempt, provider_session=None, last_message=None, node=None)
    if flag == b"F":
        return msgspec.structs.replace(
            spent, first=False, attempt=msgspec.structs.replace(attempt, outcome=Outcome.FENCED)
        )
    return spent if attempt is spent.attempt else msgspec.structs.replace(spent, attempt=attempt)


def turn_of(number: bytes, kept: bytes, body: bytes, conversation: bytes) -> Turn:
    """A turn as history has it."""
    found = kept_turn(kept)
    attempt = found.attempt
    return Turn(
        id=int(number),
        body=body,
        text=attempt.text or "",
        provider=attempt.provider,
        provider_session=attempt.provider_session,
        finished_at=attempt.finished_at,
        previous=found.previous,
        last_message=attempt.last_message,
        conversation=conversation.decode(),
        reminders=found.reminders,
        node=node_of(attempt),
        content=attempt.content,
    )


def logged_turn(number: bytes, kept: bytes, request_id: bytes, conversation: bytes) -> LoggedTurn:
    """A turn as the response log has it."""
    found = kept_turn(kept)
    return LoggedTurn(
        id=int(number),
        request_id=request_id.decode(),
        conversation=conversation.decode(),
        agent_id=found.agent_id,
        attempt=found.attempt,
    )


# -- cursors ----------------------------------------------------------------------------------------------------------


def write_cursor(*parts: str) -> str:
    """A place in a list, beginning with the list's name."""
    return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode()


def read_cursor(cursor: str, name: str) -> tuple[str, str]:
    """The place that a cursor names in the list of this name.

    Raises:
        InvalidData: it is not one of this list's.
    """
    try:
        parts: Any = msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[str, str, str])
    except (ValueError, msgspec.MsgspecError):
        parts = ("", "", "")
    if parts[0] != name:
        raise refusals.foreign_cursor()
    return parts[1], parts[2]
