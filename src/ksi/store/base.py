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

A conversation whose head has a provider session on a machine (`Attempt.node`) is bound to it: of its requests whose
route has the head's provider, only that machine's stores start any, at once or by a claim, while it is not lost (D4). A
store that one daemon has for itself keeps no machines.

Fences come from one counter of the store that only grows: each new holder gets the next number and a random token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from ksi.clock import Moment
from ksi.request import Attempt, Turn
from ksi.store.chains import Aftermath, ChainView, ClosedChain, Delivered, FollowUp, InjectionView, MemberRow, Trail
from ksi.store.provider_records import KeptRecords, PutRecord
from ksi.store.snapshot import Loaded, Record
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    Acquired,
    Cancelled,
    Claimed,
    Claims,
    Enqueued,
    Expiry,
    Fork,
    Listing,
    LockGrant,
    LockView,
    LoggedTurn,
    Named,
    NewLock,
    NewRequest,
    Offer,
    Page,
    Passing,
    Pruned,
    Recovery,
    RequestRow,
    RequestView,
    SessionView,
    Settled,
    Totals,
    Verdict,
)


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

    async def enqueue(
        self, new: NewRequest, offers: Sequence[Offer], now: Moment, *, awaited: bool = False
    ) -> Enqueued:
        """Take a request into the queue, or straight into running.

        It runs at once when it is not delayed, its conversation has no holder and no line, and the offer of its route
        has a free slot while no ready request of a route offered to the same provider stands before it by (rank, key).
        With `on_busy: interrupt` the new one takes the head of the line; a holder that is a request of the same or a
        lower priority is stopped. An interrupted holder's view names the new one in `interrupted_by`.

        `awaited`: who sent it hears of it at its end, not before. Then one that runs at once outlives this process as
        any other, but a loss of power may take it until something else is acknowledged: nobody was promised it (Q3).

        A member of a chain is checked (`ksi.store.chains.check`; `admit` where it runs at once); where its chain has no
        place for it, it is kept in state `blocked`, which is no error. A request whose parent is in no chain yet begins
        one with the parent as root.

        Raises:
            UnknownParent: its parent is not known.
            RequestIdConflict: the id names other content, or a lock.
            QueueFull: it would wait, and the queue is full (never for a request that runs at once).
            ConversationBusy: on_busy is `reject` and the conversation has a holder or a line; or it is `interrupt` and
                the holder is external or of higher priority. Facts: conversation_id, holder, since (age in seconds is
                the caller's), position.
            NotFound: `fork_of` is no known conversation.
        """
        ...

    async def claim(self, offers: Sequence[Offer], limit: int, now: Moment) -> Claims:
        """Start up to `limit` ready requests, the lowest (rank, key) first over all offered routes (Q2, Q6).

        A slot is free while fewer requests run at the provider than its offer's limit, counted from the rows.
        Requests whose `expires` has passed are not claimed; `expire` ends them.

        A member of a chain is admitted first (`ksi.store.chains.admit`): what it may use is set aside in its chain, or
        it ends as blocked. Reminders that wait for its conversation are taken with it (C2).
        """
        ...

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """Renew this daemon's lease over all its runs; returns the keys of runs that are lost to it.

        It is a sign of life of this daemon's machine. Those that gave none for `StoreRules.node_timeout` are lost, and
        what waits for them may be started anywhere, whether or not they come back (D4). Where a store has one daemon
        nothing is lost.
        """
        ...

    async def settle(
        self, claim: Claimed, attempt: Attempt, verdict: Verdict, now: Moment, aftermath: Aftermath | None = None
    ) -> Settled:
        """End an attempt: state, answer, usage, head and the lock's release in one step (section 2, step 6).

        A completed one becomes the conversation's head turn. A marked cancel wins over Retry and GiveBack: the request
        ends cancelled. Retry with the request's `hold_on_retry` keeps the place (L8), without it the lock passes on.
        A claim whose fence or token does not match changes nothing but its own attempt's trail, as `fenced`.

        A completed attempt's provider session becomes another name of the conversation (L7): a request that names it
        means this conversation. One that already names another conversation is never merged: the turn is kept without
        session and last message, so that the next one begins a new provider session from the history. A fork that the
        attempt saw is recorded: `new_session` and `node_lost` from the session before to the one after, `foreign_turn`
        from the conversation to the session that holds the foreign messages.

        Where it ends the request, `aftermath` is written in the same step: its follow-ups go into the queue, past its
        limit (C3, Q5), or become dead letters where their chain has no place for them. What was set aside for the
        attempt is given back to its chain, and what it used is charged (C6). Taken reminders are used up where it
        completed and wait again otherwise; the delivery that it carried is delivered or a dead letter.
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

    # -- chains ---------------------------------------------------------------------------------------------------

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """Requests with an injection that ended outside a settle that brought its aftermath (cancelled while waiting,
        expired, blocked, failed at recovery, cancelled by a mark), oldest first: `deliver` is to be called (C3)."""
        ...

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """Write the aftermath of an unrouted request, once: again, or for any other, nothing happens."""
        ...

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """Send a dead letter again, under `again.injection_id`; the old one is `retried`.

        Raises:
            NotFound: no such delivery.
            InvalidData: it is no dead letter.
        """
        ...

    async def injection(self, injection_id: str) -> InjectionView | None:
        """One delivery, with its text, and its child where it is a dead letter."""
        ...

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """Deliveries without text and child, the newest first; those in one state where given."""
        ...

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """A request's chain and the way from it back to the root, at most `limit` hops; None where it is unknown or in
        no chain."""
        ...

    async def chain(self, name: str) -> ChainView | None:
        """A chain's figures, by its id or by any member's `request_id`."""
        ...

    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """Chains, the newest first."""
        ...

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """A chain's requests in the order of arrival."""
        ...

    async def close_chain(self, name: str, now: Moment, limit: int = 200) -> ClosedChain:
        """Close a chain to new members (F8); `name` as in `chain`. The caller cancels what is unfinished.

        Raises:
            NotFound: no such chain.
        """
        ...

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """Begin a chain's budget and time anew, forget what tripped it, open it again; marks before it no longer count
        (C8): trails end at the reset. `name` as in `chain`.

        Raises:
            NotFound: no such chain.
        """
        ...

    # -- providers ------------------------------------------------------------------------------------------------

    async def provider_records(self, now: Moment) -> KeptRecords:
        """What the daemons of this store know of their providers together; it outlives them."""
        ...

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """Keep this as a provider's record, unless another daemon was faster: the kept one has another version then.

        `tell`: the other daemons are to hear of it at once. A lost word costs them the time until they look again.
        """
        ...

    # -- upkeep ---------------------------------------------------------------------------------------------------

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

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """Names that begin so, in order: of requests and external locks, or of conversations.

        If there are more than `limit`, any `limit` of them. A store without an order of names looks through all.
        """
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
