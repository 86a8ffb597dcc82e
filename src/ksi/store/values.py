"""What the store's verbs take and give: frozen values, times in microseconds."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, Literal, TypeVar

import msgspec

from ksi.request import Attempt, OnBusy, Priority, State, Usage
from ksi.store.chains import Block, ChainLimits, ChainView, InjectionView, MemberGrant, Membership, Reminder


class StoreRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration tells a store; times in microseconds."""

    max_queued: int = 1_000_000
    """Waiting requests (scheduled, queued, retrying, parked; no locks) at which one that would wait is refused (Q5)."""
    lock_expiry: int = 300_000_000
    """How long an external lock lives unrenewed (L4)."""
    max_interruptions: int = 3
    """A request interrupted this often by a daemon's death fails with `daemon_restart` (Q3)."""
    fail_interrupted: bool = False
    """Whether a request interrupted in mid-run fails at once instead of running again."""
    keep_finished: int = 7 * 86_400_000_000
    """How long a finished request can be asked for (Q4, R7)."""
    keep_sessions: int = 90 * 86_400_000_000
    """How long a conversation is kept after its last activity."""
    position_limit: int = 1_000
    """Positions are exact up to here (L2)."""
    node_timeout: int = 60_000_000
    """How long a machine may be silent before what is bound to it goes on elsewhere (D4)."""
    guard_messages: int = 3
    """How many notices of a block a chain may send past its limits."""
    chain_limits: ChainLimits = ChainLimits(max_depth=20, token_budget=2_000_000, time_window=86_400_000_000)
    """The daemon's own maxima: the limits of a root that was in no chain when it came in."""


class Terms(msgspec.Struct, frozen=True):
    """What all who take the same slots may begin together; None is no limit. Stores that one daemon has for itself are
    given none: it keeps them."""

    probes: int | None = None
    """Calls that run at once while the provider is tried again, beside those that hang from before (F3)."""
    requests: int | None = None
    """Calls that begin in a minute."""
    tokens: int | None = None
    """Tokens in a minute: guessed from the body when a call begins, put right when it settles."""
    known: int | None = None
    """The version of the provider's record by which probes are sent; where another one is kept, none may begin."""


Named = Literal["request", "conversation"]
"""What a name can be looked for among: requests with external locks, or conversations."""


class Offer(msgspec.Struct, frozen=True):
    """Requests of `route` may run at `provider` now, which takes at most `limit` at once."""

    route: str
    provider: str
    limit: int
    by_node: bool = False
    """Only what runs there on this machine counts; else what runs there at all daemons (D4)."""
    terms: Terms | None = None


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What `enqueue` is given; all decisions that need no state are already made."""

    request_id: str
    conversation: str
    """The conversation's name: the client's, or a made one."""
    body: bytes
    """Canonical JSON of the request; equal bytes under an equal id mean the same request (Q4)."""
    route: str
    """Names of the providers that can serve it, in order, joined by commas."""
    rank: int
    """See `ksi.request.rank`."""
    priority: Priority = Priority.NORMAL
    model: str = ""
    agent_id: str | None = None
    due: int | None = None
    """Wall time before which it does not run."""
    expires: int | None = None
    """Wall time after which it is not started any more (`ttl`)."""
    on_busy: OnBusy = OnBusy.ENQUEUE
    hold_on_retry: bool = True
    fork_of: str | None = None
    """Begin `conversation` as a child of this one, where it stands now."""
    requeued_from: str | None = None
    chain: Membership | None = None
    """None: it has no parent, no limits of its own and no injection."""


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """One request, now running, with the right to write its conversation: `fence` and `token` together."""

    key: int
    """The store's own number for the request."""
    request_id: str
    conversation: str
    body: bytes
    route: str
    provider: str
    priority: Priority
    attempt: int
    """1 for the first."""
    fence: int
    token: int
    started_at: int
    enqueued_at: int
    head: int | None
    """The conversation's last good turn, for `history`."""
    agent_id: str | None = None
    requeued_from: str | None = None
    chain: MemberGrant | None = None
    reminders: tuple[Reminder, ...] = ()
    """Results that waited for this conversation's next prompt, in order: taken, and used up when it completes (C2)."""


class Claims(msgspec.Struct, frozen=True):
    """What `claim` took out of the queue."""

    started: tuple[Claimed, ...] = ()
    blocked: tuple[Ended, ...] = ()
    """Members whose chain had no place for them any more: they ended as blocked (C5)."""
    waits: Mapping[str, int] = {}
    """Microseconds until the terms of a provider let a call begin, of those that let none now."""


class Passing(msgspec.Struct, frozen=True, kw_only=True):
    """What a lock's release did: who had it, and who comes next."""

    conversation: str
    released_by: str
    next_request: str | None = None
    """The head of the line now, if there is one."""
    granted: LockGrant | None = None
    """Set where that head is an external waiter: it holds the lock already."""


class LockGrant(msgspec.Struct, frozen=True, kw_only=True):
    """An external lock, held."""

    request_id: str
    conversation: str
    fence: int
    expires_at: int
    """Wall time, for the eye; the store measures by the monotonic clock."""


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a new request."""

    request_id: str
    conversation: str
    state: State
    ready: bool = False
    """The conversation was free and its line empty."""
    position: int = 0
    """How many stand before it in its conversation's line."""
    holder: str | None = None
    """Who holds the conversation, if it is another."""
    claim: Claimed | None = None
    """Set where it runs at once: free conversation, free slot, nobody ready before it at the same provider."""
    stopping: str | None = None
    """The running holder that must now be stopped (`on_busy: interrupt`)."""
    passing: Passing | None = None
    """Set where a holder that was not running was cancelled by the interruption."""
    injections: tuple[InjectionView, ...] = ()
    """What became of the deliveries that this holder carried."""
    existing: RequestView | None = None
    """Set where the id and content were known: nothing was enqueued (Q4)."""
    block: Block | None = None
    """Set where its chain has no place for it: it is kept as blocked (C5)."""
    chain: ChainView | None = None
    """The chain's figures, where it was blocked."""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The request ends. `state` is completed, failed or cancelled."""

    state: State
    error: str | None = None
    message: str | None = None


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """It waits until `at` (wall time) and runs again, at `route` where given; `parked`: for a quota (F5)."""

    at: int
    route: str | None = None
    parked: bool = False
    error: str | None = None
    message: str | None = None


class GiveBack(msgspec.Struct, frozen=True):
    """It goes back to the queue and keeps its place: the daemon is stopping (R6). Not counted as an interruption."""


Verdict = Finish | Retry | GiveBack


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What settling did."""

    state: State
    """The request's state now."""
    fenced: bool = False
    """Fence or token did not match: the attempt was kept as `fenced`, nothing else changed (F10)."""
    turn: int | None = None
    """The conversation's new head, where the request completed."""
    finished_at: int | None = None
    passing: Passing | None = None
    due: int | None = None
    fork: Fork | None = None
    """A fork that the provider saw, as it was recorded (L7)."""
    injections: tuple[InjectionView, ...] = ()
    """Deliveries that this step made or brought to an end."""


class CancelOutcome(StrEnum):
    """What a cancel found."""

    CANCELLED = "cancelled"
    """It was waiting and is final now (a lock or a waiter for one: it is gone)."""
    STOPPING = "stopping"
    """It is running: it is marked, and its runner must stop it and settle."""
    ALREADY_FINAL = "already_final"


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `cancel`."""

    outcome: CancelOutcome
    request_id: str
    conversation: str
    state: State
    passing: Passing | None = None
    injections: tuple[InjectionView, ...] = ()
    """Deliveries that it carried."""


class NewLock(msgspec.Struct, frozen=True, kw_only=True):
    """An external holder's wish (L5)."""

    request_id: str
    conversation: str
    rank: int
    priority: Priority = Priority.NORMAL
    wait: bool = True
    """Join the line if it is taken; otherwise just say so."""
    deadline: int | None = None
    """Monotonic time after which a waiter is dropped."""
    metadata: bytes | None = None


class Acquired(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `acquire`: a grant, or the place in the line."""

    grant: LockGrant | None = None
    queued: bool = False
    position: int = 0
    """How many stand before it in the line."""
    holder: str | None = None
    renewed: bool = False
    """It already held the lock: its time begins anew, the fence stays."""


class Lapsed(msgspec.Struct, frozen=True, kw_only=True):
    """An external holder whose time ran out (`held`), or a waiter that gave up."""

    request_id: str
    conversation: str
    held: bool
    passing: Passing | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ended without a run of its own: its time to live passed, or it failed at recovery."""

    request_id: str
    conversation: str
    state: State
    error: str | None = None
    passing: Passing | None = None
    block: Block | None = None
    injections: tuple[InjectionView, ...] = ()
    """Deliveries that it carried."""


class Expiry(msgspec.Struct, frozen=True, kw_only=True):
    """What `expire` did, and when it has to be called again."""

    woken: int = 0
    """Scheduled, retrying or parked requests that are due and queued now."""
    ended: tuple[Ended, ...] = ()
    lapsed: tuple[Lapsed, ...] = ()
    next_wall: int | None = None
    """Wall time of the next due or ttl; None where nothing waits for one."""
    next_mono: int | None = None
    """Monotonic time of the next external lock's or waiter's end."""
    more: bool = False
    """There was more to do than one step takes: call again soon."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What opening the store found: runs that a dead daemon left (Q3)."""

    requeued: tuple[str, ...] = ()
    ended: tuple[Ended, ...] = ()


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of cleaning took away (R7)."""

    requests: int = 0
    conversations: int = 0
    more: bool = False


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one request."""

    request_id: str
    conversation: str
    state: State
    priority: Priority
    model: str
    route: str
    body: bytes
    agent_id: str | None = None
    enqueued_at: int = 0
    due: int | None = None
    expires: int | None = None
    started_at: int | None = None
    """Of the running or the last attempt."""
    finished_at: int | None = None
    attempts: tuple[Attempt, ...] = ()
    """Ended attempts, in order."""
    provider: str | None = None
    """Where it runs, or who gave the answer."""
    error: str | None = None
    message: str | None = None
    interruptions: int = 0
    interrupted_by: str | None = None
    cancelling: bool = False
    requeued_from: str | None = None
    position: int | None = None
    """In its conversation's line, while it stands there."""
    holder: str | None = None
    """Who holds its conversation, if another does."""
    node: str | None = None
    """The machine whose daemons alone may start it, while it could start now (D4)."""
    chain: str | None = None
    """Its chain's id, where it belongs to one."""
    parent: str | None = None
    depth: int | None = None
    block: Block | None = None
    """Why it was blocked."""
    injection: str | None = None
    """The delivery that it carries."""

    @property
    def answer(self) -> Attempt | None:
        """The attempt that completed it."""
        return next((a for a in reversed(self.attempts) if a.outcome == "completed"), None)

    @property
    def usage(self) -> Usage | None:
        """The sum over its attempts; None while no attempt has a report (T1)."""
        total: Usage | None = None
        for attempt in self.attempts:
            if attempt.usage is not None:
                total = attempt.usage if total is None else total.plus(attempt.usage)
        return total


class Listing(StrEnum):
    """The lists a store can page through without counting or sorting the whole queue."""

    ACTIVE = "active"
    """Running, by arrival."""
    READY = "ready"
    """What runs next, by route, in order."""
    WAITING = "waiting"
    """All lines, by conversation, in order; external waiters are not in it."""
    DELAYED = "delayed"
    """Scheduled, retrying, parked: the soonest first."""
    FAILED = "failed"
    """The newest first."""
    FINISHED = "finished"
    """All final states, the newest first."""


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a listing."""

    request_id: str
    conversation: str
    state: State
    priority: Priority
    model: str
    agent_id: str | None
    attempt: int
    enqueued_at: int
    due: int | None = None
    started_at: int | None = None
    failed_at: int | None = None
    """Since when it waits: its last attempt's end, while it is retrying or parked."""
    finished_at: int | None = None
    provider: str | None = None
    error: str | None = None
    message: str | None = None


T = TypeVar("T")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A part of a list; `cursor` asks for the next one, None at the end."""

    items: tuple[T, ...]
    cursor: str | None = None


class LineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who waits for a conversation."""

    request_id: str
    priority: Priority
    external: bool
    enqueued_at: int


class LockView(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation's lock (L6)."""

    conversation: str
    holder: str | None = None
    external: bool = False
    state: State | None = None
    """The holder's state; an external holder's is `running`."""
    since: int | None = None
    expires_at: int | None = None
    """Wall time; only external holders have one."""
    fence: int | None = None
    metadata: bytes | None = None
    line: tuple[LineEntry, ...] = ()
    """The first of the line, as many as were asked for."""
    waiting: int = 0
    """How many stand in the line, exact up to `StoreRules.position_limit`."""
    node: str | None = None
    """The machine that its provider session lives on, where it lives on one of several (D4)."""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that went on in another place (L7)."""

    parent: str
    child: str
    request_id: str
    at: int
    kind: str


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation and its life (L10)."""

    conversation: str
    created_at: int
    active_at: int
    turns: int = 0
    head: int | None = None
    provider: str | None = None
    provider_session: str | None = None
    agents: tuple[str, ...] = ()
    locked: bool = False
    forked_from: str | None = None
    node: str | None = None
    """The machine that its provider session lives on, where it lives on one of several (D4)."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine whose daemons share a store (D4)."""

    node: str
    heard_at: int
    """When one of its daemons was last heard of, by the store's clock."""
    lost: bool = False
    """Silent for `StoreRules.node_timeout`: what is bound to it goes on elsewhere."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that are kept with the rows they count, in the same transaction (Q8)."""

    scheduled: int = 0
    queued: int = 0
    running: int = 0
    retrying: int = 0
    parked: int = 0
    completed: int = 0
    """This and the next four: since the store was made."""
    failed: int = 0
    cancelled: int = 0
    blocked: int = 0
    expired: int = 0
    locks: int = 0
    """Conversations with a holder of either kind."""
    external_locks: int = 0
    external_waiters: int = 0
    conversations: int = 0


class LoggedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One ended attempt with an answer, for the response log (R3). `id` grows: it is the watermark."""

    id: int
    request_id: str
    conversation: str
    agent_id: str | None
    attempt: Attempt
