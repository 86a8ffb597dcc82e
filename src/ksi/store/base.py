"""The store protocol: the verbs of a request's life, each one atomic step with all it needs in its arguments.

Rules that hold for every implementation; the conformance suite checks each:

- A verb decides before it writes: when it raises a `ServiceError` it has changed nothing.
- A verb returns after its change is as durable as the store promises, never before.
- Times are microseconds. `Moment.wall` orders and dates; `Moment.mono` alone ends external locks and waits for them.

A conversation has at most one *holder* and, behind it, a *line* ordered by (rank, key). Keys grow with arrival.

- The holder is a running request, one that keeps its place (retrying, parked, or queued again after it ran; L8), or an
  external lock.
- The line is what waits in state `queued`, external waiters included. Scheduled requests are in no line until due.
- The head of a line is *ready* when the conversation has no holder. A request that keeps its place is ready when it is
  queued again. An external waiter is never ready: it is granted the lock the moment it is head and nobody holds it.
- A claim takes, among the ready requests of the offered routes whose provider has a free slot, the lowest (rank, key).

Fences come from one counter of the store that only grows: each new holder gets the next number and a random token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import msgspec

from ksi.clock import Moment
from ksi.request import Attempt, OnBusy, Priority, State, Turn, Usage
from ksi.store.snapshot import Loaded, Record
from ksi.store.usage import Pricing, UsageQuery, UsageReport


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


class Offer(msgspec.Struct, frozen=True):
    """Requests of `route` may run at `provider` now, which takes at most `limit` at once."""

    route: str
    provider: str
    limit: int


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
    existing: RequestView | None = None
    """Set where the id and content were known: nothing was enqueued (Q4)."""


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


class Store(Protocol):
    """The verbs. Implementations: `memory`, `sqlite`."""

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """Take the store. Runs that a dead daemon left are queued again, keeping their place, or ended (Q3): cancelled
        where a cancel had been asked for, failed with `daemon_restart` after the last allowed interruption. Each gets
        an attempt with outcome `interrupted`. External locks begin their time anew: their holders could not renew.

        `on_work` is called, from the event loop, whenever something may have become ready or a slot free.

        Raises:
            StoreInUse: another daemon has it.
            StoreVersion: a newer version wrote it.
            StoreUnavailable: it cannot be read or written.
        """
        ...

    async def close(self) -> None:
        """Let it go; what was acknowledged is on disk."""
        ...

    async def enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Enqueued:
        """Take a request into the queue, or straight into running.

        It runs at once when it is not delayed, its conversation has no holder and no line, and the offer of its route
        has a free slot while no ready request of a route offered to the same provider stands before it by (rank, key).
        With `on_busy: interrupt` the new one takes the head of the line; a holder that is a request of the same or a
        lower priority is stopped. An interrupted holder's view names the new one in `interrupted_by`.

        Raises:
            RequestIdConflict: the id names other content, or a lock.
            QueueFull: it would wait, and the queue is full (never for a request that runs at once).
            ConversationBusy: on_busy is `reject` and the conversation has a holder or a line; or it is `interrupt` and
                the holder is external or of higher priority. Facts: conversation_id, holder, since (age in seconds is
                the caller's), position.
            NotFound: `fork_of` is no known conversation.
        """
        ...

    async def claim(self, offers: Sequence[Offer], limit: int, now: Moment) -> list[Claimed]:
        """Start up to `limit` ready requests, the lowest (rank, key) first over all offered routes (Q2, Q6).

        A slot is free while fewer requests run at the provider than its offer's limit, counted from the rows.
        Requests whose `expires` has passed are not claimed; `expire` ends them.
        """
        ...

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """Renew this daemon's lease over all its runs; returns the keys of runs that are lost to it.

        Where a store has one daemon it loses none.
        """
        ...

    async def settle(self, claim: Claimed, attempt: Attempt, verdict: Verdict, now: Moment) -> Settled:
        """End an attempt: state, answer, usage, head and the lock's release in one step (section 2, step 6).

        A completed one becomes the conversation's head turn. A marked cancel wins over Retry and GiveBack: the request
        ends cancelled. Retry with the request's `hold_on_retry` keeps the place (L8), without it the lock passes on.
        A claim whose fence or token does not match changes nothing but its own attempt's trail, as `fenced`.

        A completed attempt's provider session becomes another name of the conversation (L7): a request that names it
        means this conversation. One that already names another conversation is never merged: the turn is kept without
        session and last message, so that the next one begins a new provider session from the history. A fork that the
        attempt saw is recorded: `new_session` from the session before to the one after, `foreign_turn` from the
        conversation to the session that holds the foreign messages.
        """
        ...

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """Stop a request that is not final (F8); external holders and waiters are taken away.

        Raises:
            NotFound: no such id.
        """
        ...

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """Take a conversation's lock for an outside holder, or join its line (L5). Who holds it already renews it; who
        waits already is told the present position.

        Raises:
            RequestIdConflict: the id names a completion, or holds or awaits another conversation's lock.
            QueueFull: the line of external waiters is at `max_queued`.
        """
        ...

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """Begin an external lock's time anew.

        Raises:
            NotLockHolder: the id holds no external lock (any more), or `fence` is not the lock's.
            RequestIdConflict: the id names a completion.
        """
        ...

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """Give an external lock back. Raises as `renew_lock`."""
        ...

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """Take an external waiter out of its line: the connection that waited is gone (L5). A holder stays, and for any
        other id nothing happens. Returns a Passing where the line's closing up granted a lock."""
        ...

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """Do what time asks for: queue what is due, end what was not started in time, and locks and waits for them."""
        ...

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """Let parked requests of a route be due now: its provider is back before it said so (F5).

        At most `limit`, the soonest first; how many there were. `expire` queues them.
        """
        ...

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """Take away one step's worth of finished requests and conversations past their retention (R7).

        A completed request's turn stays as long as its conversation; a conversation with living forks stays.
        """
        ...

    def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """Everything that the store holds at one moment, in pieces, the figures first (R5). Nobody waits for it.

        What runs is given as queued and interrupted, what is being cancelled as cancelled.
        """
        ...

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """Take in what an `export` gave, in one step: all of it or nothing (R5). `records` may be read in a thread.

        Interrupted requests run again, or fail where the rules say so. External locks begin their time anew. Fences go
        on far behind the saved ones, so that none comes twice.

        Raises:
            StoreNotEmpty: the store holds something.
            CheckpointInvalid: the records do not fit together. What `records` raises comes through.
        """
        ...

    async def get(self, request_id: str) -> RequestView | None:
        """One request; None for an unknown id or a lock's."""
        ...

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        """Turns from `head` backwards, newest first: whole turns while the sum of body and text stays within
        `max_chars`, and always the first."""
        ...

    async def session(self, conversation: str) -> SessionView | None:
        """One conversation's life."""
        ...

    async def sessions(self, limit: int, cursor: str | None = None, agent_id: str | None = None) -> Page[SessionView]:
        """Conversations, the newest first; of one agent where given."""
        ...

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """One conversation's lock and line; None for an unknown conversation."""
        ...

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """All held locks, without their lines."""
        ...

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """Forks in the order they happened; those of one conversation's whole tree where given."""
        ...

    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """One page of a listing.

        Raises:
            InvalidData: the cursor is not one of this listing's.
        """
        ...

    async def totals(self) -> Totals:
        """The kept figures; costs nothing."""
        ...

    async def waiting_by_route(self) -> Mapping[str, int]:
        """Ready requests of every route that was ever enqueued, exact up to `StoreRules.position_limit`."""
        ...

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """What ended attempts used and cost; see `ksi.store.usage`. It may take its time, and holds nobody up.

        Attempts that ended within `StoreRules.keep_sessions` are all in it, older ones may have been pruned.
        """
        ...

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """Attempts that completed their request, with an id above the watermark, in order.

        At most `limit`, and no further one once they hold `max_chars` of text and raw answers.
        """
        ...

    async def log_watermark(self) -> int:
        """Up to where the response log is written; 0 at first."""
        ...

    async def set_log_watermark(self, watermark: int) -> None:
        """Remember up to where the response log is written."""
        ...
