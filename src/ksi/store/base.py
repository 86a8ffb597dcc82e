"""The store protocol: the verbs of a request's life, each one atomic step with all it needs in its arguments.

Rules that hold for every implementation; the conformance suite checks each:

- A verb decides before it writes: when it raises a `ServiceError` it has changed nothing.
- A verb returns after its change is as durable as the store promises, never before.
- Times are microseconds. `Moment.wall` orders and dates; `Moment.mono` alone ends external locks and waits for them.

A conversation has at most one *holder* and, behind it, a *line* ordered by (rank, key). Keys grow with arrival.

- The holder is a running request, one that keeps its place (retrying, parked, or queued again after it ran), or an
  external lock.
- The wait queue contains requests in state `queued`, and external waiters. Scheduled requests are in no line until due.
- The head of a line is *ready* when the conversation has no holder. A request that keeps its place is ready when it is
  queued again. An external waiter is never ready: it is granted the lock the moment it is head and the lock is free.
- A claim takes, among the ready requests of the offered routes whose provider has a free slot, the lowest (rank, key).

A conversation whose head has a provider session on a machine (`Attempt.node`) is bound to it: of its requests whose
route has the head's provider, only that machine's stores start any, at once or by a claim, while it is not lost. A
store that one daemon has for itself keeps no machines.

Fences come from one counter of the store that only grows: each new holder gets the next number and a random token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from ksi.budgets.rules import NO_CAPS, Caps, Spent
from ksi.clock import Moment
from ksi.host.watchdog import Lease
from ksi.request import Attempt, Priority, Turn
from ksi.store.chains import Aftermath, ChainView, ClosedChain, Delivered, FollowUp, InjectionView, MemberRow, Trail
from ksi.store.news import OnNews
from ksi.store.provider_records import KeptRecords, PutRecord
from ksi.store.questions import Question
from ksi.store.rules.fairness import Flow
from ksi.store.rules.terms import Phrase
from ksi.store.snapshot.records import Loaded, Record
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    NO_PAUSE,
    Acquired,
    Answered,
    BudgetUse,
    BudgetWait,
    Cancelled,
    Claimed,
    Claims,
    Deleted,
    Enqueued,
    Expiry,
    Finish,
    Fork,
    Listing,
    LockGrant,
    LockView,
    LoggedTurn,
    Named,
    NewLock,
    NewRequest,
    NodeView,
    Offer,
    Page,
    Passing,
    Paused,
    Pruned,
    Recovery,
    RequestRow,
    RequestView,
    SearchPage,
    SessionView,
    Settled,
    StoreCondition,
    Totals,
    Verdict,
)


class Store(Protocol):
    """The verbs. Implementations: `sqlite.store.SqliteStore`, and `redis.store.RedisStore`, a `SharedStore`."""

    @property
    def shared(self) -> SharedStore | None:
        """This store, if other daemons may use it at the same time; None if this daemon has it for itself."""
        ...

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """Take the store. Runs of a dead daemon are requeued, keeping their place, or ended: cancelled if a cancel had
        been requested, failed with `daemon_restart` after the last allowed interruption. Each gets an attempt with
        outcome `interrupted`. External locks get a full expiry: their holders could not renew.

        `on_work` is called, from the event loop, whenever something may have become ready or a slot free.

        Raises:
            StoreInUse: another daemon has it.
            StoreVersion: a newer version wrote it.
            StoreUnavailable: it cannot be read or written.
        """
        ...

    async def close(self) -> None:
        """Close it; acknowledged changes are on disk."""
        ...

    def condition(self) -> StoreCondition:
        """How the store is now, as far as this process knows. It asks no other process and never fails.

        A store with files looks whether they are still the ones that it opened.
        """
        ...

    async def enqueue(
        self,
        new: NewRequest,
        offers: Sequence[Offer],
        now: Moment,
        *,
        awaited: bool = False,
        paused: Paused = NO_PAUSE,
        caps: Caps = NO_CAPS,
    ) -> Enqueued:
        """Take a request into the queue, or straight into running.

        It runs at once when it is not delayed, its conversation has no holder and no line, and the offer of its route
        has a free slot while no ready request of a route offered to the same provider stands before it by (rank, key).
        With `on_busy: interrupt` the new one takes the head of the line; a holder that is a request of the same or a
        lower priority is stopped. An interrupted holder's view names the new one in `interrupted_by`. One that is
        paused waits, whatever is free. One with a question is scheduled, outside the queue and without a time, until
        `answer`.

        `awaited`: its sender is notified at its end, not before. Then one that runs at once outlives this process as
        any other, but a loss of power may lose it until another change is acknowledged: it was not promised to any
        client.

        A member of a chain is checked (`ksi.store.chains.check`; `admit` if it runs at once); if its chain does not
        admit it, it is kept in state `blocked`, which is no error. A request whose parent is in no chain yet begins one
        with the parent as root.

        Raises:
            UnknownParent: its parent is not known.
            RequestIdConflict: the id names other content, or a lock.
            BudgetExceeded: one of `caps` has no room for it at any provider, and does not let it wait, or never will
                have room. Of its facts, `since` and `resets_at` are in microseconds.
            QueueFull: it would wait, and the queue is full (never for a request that runs at once).
            ConversationBusy: on_busy is `reject` and the conversation has a holder or a line; or it is `interrupt` and
                the holder is external or of higher priority. Facts: conversation_id, holder, since (age in seconds is
                the caller's), position.
            NotFound: `fork_of` is no known conversation.
        """
        ...

    async def claim(
        self, offers: Sequence[Offer], limit: int, now: Moment, paused: Paused = NO_PAUSE, caps: Caps = NO_CAPS
    ) -> Claims:
        """Start up to `limit` ready requests, the lowest (rank, key) first over all offered routes.

        A slot is free while fewer requests run at the provider than its offer's limit, counted from the rows.
        Requests whose `expires` has passed are not claimed; `expire` ends them. It may start fewer once their bodies
        have more than CLAIM_BYTES together: then there may be more to claim.

        A member of a chain is admitted first (`ksi.store.chains.admit`): its reservation is made in its chain, or it
        ends as blocked. Reminders that wait for its conversation are taken with it.

        A ready request that is paused is not started. It is set aside, at most CLAIM_ASIDE of them in one claim: it
        stays queued and keeps its place, and no claim looks at it again until `bring_back`.

        A request's reservation is made in all of `caps` that bind it. One that does not fit is set aside in the same
        way, until a window ends (`expire`), a call returns enough of its reservation (`settle`), or `reconsider`; if
        its budget refuses, or can never have room, it ends as blocked.
        """
        ...

    async def bring_back(self, paused: Paused, now: Moment, after: str | None = None, limit: int = 500) -> str | None:
        """Let requests that were set aside and are not paused any more be claimed again, in their places.

        It scans at most `limit` of the requests set aside, from the beginning or after `after`. The answer is `after`
        for the next step; None at the end.
        """
        ...

    async def settle(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None = None,
        spent: Spent | None = None,
        caps: Caps = NO_CAPS,
    ) -> Settled:
        """End an attempt: state, answer, usage, head and the lock's release in one step.

        A completed one becomes the conversation's head turn. A marked cancel wins over Retry and GiveBack: the request
        ends cancelled. Retry with the request's `hold_on_retry` keeps the place, without it the lock passes on.
        A claim whose fence or token does not match changes nothing but its own attempt's trail, as `fenced`.

        A completed attempt's provider session becomes another name of the conversation: a request that names it
        means this conversation. One that already names another conversation is never merged: the turn is kept without
        session and last message, so that the next one begins a new provider session from the history. A fork that the
        attempt saw is recorded: `new_session` and `node_lost` from the session before to the one after, `foreign_turn`
        from the conversation to the session that holds the foreign messages.

        If it ends the request, `aftermath` is written in the same step (outbox): its follow-ups go into the queue, past
        its limit, or become dead letters if their chain does not admit them. The attempt's reservation is returned to
        its chain, and its usage is charged. Taken reminders are used up if it completed and wait again otherwise; the
        delivery that it carried is delivered or a dead letter.

        The reservations of budgets are returned, and `spent` counts in the windows in which the call began; None: it
        used nothing. `caps` define the notices about that, and the requests that may continue.
        """
        ...

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """Stop a request that is not final; external holders and waiters are taken away.

        Raises:
            NotFound: no such id.
        """
        ...

    async def answer(
        self,
        request_id: str,
        asked: Question,
        answered: Question,
        now: Moment,
        *,
        end: Finish | None = None,
        due: int | None = None,
        expires: int | None = None,
    ) -> Answered:
        """Answer the question of a waiting request. If `asked` is not its open question any more, nothing happens.

        With `end` it ends so. Else it is due now, or at `due`, and `expires` takes the place of its own; one that had
        run keeps its place and runs again.

        Raises:
            NotFound: no request has this id.
        """
        ...

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """Take a conversation's lock for an outside holder, or join its line. If this id already holds the lock, renew
        it; if it is already queued, return its position.

        Raises:
            RequestIdConflict: the id names a completion, or holds or awaits another conversation's lock.
            QueueFull: the line of external waiters is at `max_queued`.
        """
        ...

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """Reset an external lock's expiry.

        Raises:
            NotLockHolder: the id holds no external lock (any more), or `fence` is not the lock's.
            RequestIdConflict: the id names a completion.
        """
        ...

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """Give an external lock back. Raises as `renew_lock`."""
        ...

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """Take an external waiter out of its line: the connection that waited is gone. A holder stays, and for any
        other id nothing happens. Returns a Passing if this granted a lock to the next in the queue."""
        ...

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """Do the work that is due: queue due requests, end those not started in time, and expire locks and waits for
        them."""
        ...

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """Let parked requests of a route be due now: its provider is back before it said so. Those that wait for an
        answer are not among them.

        At most `limit`, the soonest first; how many there were. `expire` queues them.
        """
        ...

    # -- budgets --------------------------------------------------------------------------------------------------

    async def reconsider(self, budget: str | None, now: Moment, limit: int = 500) -> bool:
        """Let requests that wait for a budget, or for any, be claimed again in their places: its limit changed.

        At most `limit` in one step; returns True if there may be more.
        """
        ...

    async def next_flows(self, limit: int = 3) -> Sequence[Flow]:
        """Whose turn is next in each priority: at most `limit` flows of each, in order."""
        ...

    async def budget_uses(self, budget: str, since: int) -> Sequence[BudgetUse]:
        """A budget's figures in all windows that began at `since` or later, by subject and time."""
        ...

    async def budget_waits(self, limit: int = 1_000) -> Sequence[BudgetWait]:
        """The requests that wait for budgets."""
        ...

    # -- chains ---------------------------------------------------------------------------------------------------

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """Requests with an injection that ended outside a settle that brought its aftermath (cancelled while waiting,
        expired, blocked, failed at recovery, cancelled by a mark), oldest first: `deliver` is to be called."""
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
        """One delivery, with its text, and its child if it is a dead letter."""
        ...

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """Deliveries without text and child, the newest first; those in one state if given."""
        ...

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """A request's chain and the way from it back to the root, at most `limit` hops; None if it is unknown or in no
        chain."""
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
        """Close a chain to new members; `name` as in `chain`. The caller cancels unfinished members.

        Raises:
            NotFound: no such chain.
        """
        ...

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """Restart a chain's budget and time, forget the findings against it, open it again; marks before it no longer
        count : trails end at the reset. `name` as in `chain`.

         Raises:
             NotFound: no such chain.
        """
        ...

    # -- providers ------------------------------------------------------------------------------------------------

    async def provider_records(self, now: Moment) -> KeptRecords:
        """The daemons' shared knowledge of their providers; it outlives them."""
        ...

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """Keep this as a provider's record, unless another daemon was faster: the kept one has another version then.

        `tell`: the other daemons are to hear of it at once. A lost word costs them the time until they look again.
        """
        ...

    # -- conversations --------------------------------------------------------------------------------------------

    async def rename(self, conversation: str, name: str, now: Moment) -> str:
        """Give a conversation another name of its own; returns the one that it had.

        The old name stays an alias of it, as a provider session is. Its usage is reported under the new name.

        Raises:
            NotFound: no such conversation.
            NameTaken: the name means another conversation.
        """
        ...

    async def delete(self, conversation: str, now: Moment) -> Deleted:
        """Take a conversation away for good: its requests, prompts and answers, their attempts' texts, marks of chains,
        deliveries of its results and to it, its names. It may be slow, and delays no other call.

        Its tokens and cost stay in the account, without a conversation. Deliveries that are still on their way to
        another conversation continue.

        Raises:
            NotFound: no such conversation.
            ConversationBusy: something of it has not ended: a request, an external lock or waiter, or the routing of a
                result.
            HasForks: others were forked from it and are kept; they have its turns in common.
        """
        ...

    async def search(self, terms: Sequence[Phrase], limit: int, cursor: str | None = None) -> SearchPage:
        """Turns with all of these terms in prompt and answer, the newest first.

        A store may keep an index that is brought up to date by searches alone, a piece at each.

        Raises:
            Unsupported: this store has no full text.
            InvalidData: the cursor is not one of this list's.
        """
        ...

    # -- upkeep ---------------------------------------------------------------------------------------------------

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """Take away one step's worth of finished requests and conversations past their retention.

        A completed request's turn stays as long as its conversation; a conversation with living forks stays.
        """
        ...

    def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """Everything that the store holds at one moment, in pieces, the figures first. It delays no other call.

        Running requests are exported as queued and interrupted, those being cancelled as cancelled.
        """
        ...

    async def give_back(self, limit: int = 32) -> int:
        """Give room that nothing in the store uses any more back to the disk, in one small step of up to `limit` pages.

        Returns how many that were; 0 if there are none, or if the store has no file of its own. Some space stays for
        later writes.
        """
        ...

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """Load an `export`, in one atomic step. `records` may be read in a thread.

        Interrupted requests run again, or fail if the rules say so. External locks get a full expiry. Fencing tokens
        continue far above the saved ones, so that none is used twice.

        Raises:
            StoreNotEmpty: the store holds something.
            CheckpointInvalid: the records do not fit together. Errors of `records` propagate.
        """
        ...

    async def get(self, request_id: str) -> RequestView | None:
        """One request; None for an unknown id or a lock's."""
        ...

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """Names with this prefix, in order: of requests and external locks, or of conversations.

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
        """Conversations, the newest first; of one agent if given."""
        ...

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """One conversation's lock and line; None for an unknown conversation."""
        ...

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """All held locks, without their lines."""
        ...

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """Forks in the order they happened; those of one conversation's whole tree if given."""
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

    async def waiting_by_priority(self) -> Mapping[Priority, int] | None:
        """Requests that wait (scheduled, queued, retrying, parked), by priority. It may be slow, and delays no other
        call. None if the store would have to count them one by one."""
        ...

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """Tokens and cost of ended attempts; see `ksi.store.usage`. It may be slow, and delays no other call.

        Attempts that ended within `StoreRules.keep_sessions` are all in it, older ones may have been pruned.
        """
        ...

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """Attempts that completed their request, with an id above the watermark, in order.

        At most `limit`, and no further one once they hold `max_chars` of text and raw answers.
        """
        ...

    async def log_watermark(self) -> int:
        """The position up to which the response log is written; 0 at first."""
        ...

    async def set_log_watermark(self, watermark: int) -> None:
        """Store the position up to which the response log is written."""
        ...


class SharedStore(Store, Protocol):
    """A store that other daemons use at the same time. Each daemon holds its runs by a lease."""

    on_news: OnNews
    """Called from the event loop with events at other daemons."""

    @property
    def lease(self) -> Lease | None:
        """The lease, for the watchdog to keep while the event loop is blocked; None if a test moves the time."""
        ...

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """Renew this daemon's lease over all its runs; returns the keys of runs that are lost to it.

        It is a sign of life of this daemon's machine. Those that sent none for `StoreRules.node_timeout` are lost, and
        requests that wait for them may be started anywhere, whether or not they come back. If a store has one daemon,
        none is lost.
        """
        ...

    def begin_shutdown(self) -> None:
        """The daemon is about to close the store: it waits only briefly for a server that is away."""
        ...

    async def nodes(self) -> list[NodeView]:
        """Machines that sent a heartbeat lately, by name; lost ones for thirty days."""
        ...
