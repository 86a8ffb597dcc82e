"""Arguments and results of the store's verbs: frozen values, times in microseconds."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, Literal, TypeVar

import msgspec

from ksi.budgets.rules import Demand, Notice, Use
from ksi.request import Attempt, OnBusy, Priority, State, Usage
from ksi.store.chains import Block, ChainLimits, ChainView, InjectionView, MemberGrant, Membership, Reminder
from ksi.store.questions import Question


class StoreRules(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of a store; times in microseconds."""

    max_queued: int = 1_000_000
    """Waiting requests (scheduled, queued, retrying, parked; no locks) at which one that would wait is refused."""
    lock_expiry: int = 300_000_000
    """How long an external lock lives unrenewed."""
    max_interruptions: int = 3
    """A request interrupted this often by a daemon's death fails with `daemon_restart`."""
    fail_interrupted: bool = False
    """True if an interrupted request fails at once instead of running again."""
    keep_finished: int = 7 * 86_400_000_000
    """How long a finished request can be asked for."""
    keep_sessions: int = 90 * 86_400_000_000
    """How long a conversation is kept after its last activity."""
    position_limit: int = 1_000
    """Positions are exact up to here."""
    node_timeout: int = 60_000_000
    """How long a machine may send no heartbeat before requests bound to it continue elsewhere."""
    fair: bool = False
    """Agents take turns within a priority, and each priority keeps a share of the places."""
    weights: Mapping[str, float] = {}
    """What agents weigh whose turns count more or less than one, by `agent:NAME` or `agent:BEGINNING*`."""
    guard_messages: int = 3
    """How many notices of a block a chain may send past its limits."""
    chain_limits: ChainLimits = ChainLimits(max_depth=20, token_budget=2_000_000, time_window=86_400_000_000)
    """The daemon's own maxima: the limits of a root that was in no chain when it came in."""


class Terms(msgspec.Struct, frozen=True):
    """The common rate of all users of the same slots; None is no limit. Stores that one daemon has for itself are given
    none: it keeps them."""

    probes: int | None = None
    """Concurrent calls while the provider is probed, in addition to those that still hang from before."""
    requests: int | None = None
    """Calls that begin in a minute."""
    tokens: int | None = None
    """Tokens in a minute: guessed from the body when a call begins, put right when it settles."""
    known: int | None = None
    """The version of the provider's record under which probes are sent; if another one is stored, none may begin."""


class Paused(msgspec.Struct, frozen=True):
    """Requests that are not started now: those of an agent, a conversation or a priority that is named here."""

    agents: frozenset[str] = frozenset()
    conversations: frozenset[str] = frozenset()
    priorities: frozenset[Priority] = frozenset()

    def __bool__(self) -> bool:
        """True if anything is named."""
        return bool(self.agents or self.conversations or self.priorities)

    def covers(self, other: Paused) -> bool:
        """True if everything that the other one names is named here."""
        mine, its = (self.agents, self.conversations), (other.agents, other.conversations)
        return self.priorities >= other.priorities and all(one >= two for one, two in zip(mine, its, strict=True))

    def stops(self, agent_id: str | None, conversation: str, priority: int) -> bool:
        """True if such a request is not started."""
        return conversation in self.conversations or priority in self.priorities or agent_id in self.agents


NO_PAUSE = Paused()

Named = Literal["request", "conversation"]
"""The kinds of names to look up: requests with external locks, or conversations."""


class Offer(msgspec.Struct, frozen=True):
    """Requests of `route` may run at `provider` now, which takes at most `limit` at once."""

    route: str
    provider: str
    limit: int
    by_node: bool = False
    """Only runs on this machine count; otherwise those of all daemons."""
    terms: Terms | None = None


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The argument of `enqueue`; all decisions that need no state are already made."""

    request_id: str
    conversation: str
    """The conversation's name: the client's, or a made one."""
    body: bytes
    """Canonical JSON of the request; equal bytes under an equal id mean the same request."""
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
    """Begin `conversation` as a child of this one, from its present head."""
    requeued_from: str | None = None
    chain: Membership | None = None
    """None: it has no parent, no limits of its own and no injection."""
    flow: str = ""
    """Who stands for its agent where it has none: a connection; empty: its conversation."""
    demand: Demand = ()
    """Its caps at each provider of its route; empty without budgets."""
    question: Question | None = None
    """The question that a person has to answer before it joins the queue; `due` does not count until then."""


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
    output_cap: int | None = None
    """The maximum output that its budgets leave; None if that is all that it wants."""
    reminders: tuple[Reminder, ...] = ()
    """Results that waited for this conversation's next prompt, in order: taken, and used up when it completes."""


class Claims(msgspec.Struct, frozen=True):
    """A request that `claim` took out of the queue."""

    started: tuple[Claimed, ...] = ()
    blocked: tuple[Ended, ...] = ()
    """Members whose chain had no place for them any more: they ended as blocked."""
    waits: Mapping[str, int] = {}
    """Microseconds until the terms of a provider let a call begin, of those that let none now."""
    notices: tuple[Notice, ...] = ()
    """The notices of budgets."""
    waiting: bool = False
    """Some wait for a budget since this claim: `expire` says when a window ends."""
    more: bool = False
    """As many paused requests were set aside as one claim does: there may be others behind them."""


class Passing(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a lock's release: the former holder, and the next one."""

    conversation: str
    released_by: str
    next_request: str | None = None
    """The head of the line now, if there is one."""
    granted: LockGrant | None = None
    """Set if that head is an external waiter: it holds the lock already."""


class LockGrant(msgspec.Struct, frozen=True, kw_only=True):
    """An external lock, held."""

    request_id: str
    conversation: str
    fence: int
    expires_at: int
    """Wall time, for the eye; the store measures by the monotonic clock."""


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a new request."""

    request_id: str
    conversation: str
    state: State
    ready: bool = False
    """The conversation was free and its line empty."""
    position: int = 0
    """How many stand before it in its conversation's line."""
    holder: str | None = None
    """The holder of the conversation, if it is another."""
    claim: Claimed | None = None
    """Set if it runs at once: the conversation and a slot were free, with no earlier ready request at the same
    provider."""
    stopping: str | None = None
    """The running holder that must now be stopped (`on_busy: interrupt`)."""
    passing: Passing | None = None
    """Set if a holder that was not running was cancelled by the interruption."""
    injections: tuple[InjectionView, ...] = ()
    """The state of the deliveries that this holder carried."""
    existing: RequestView | None = None
    """Set if the id and content were known: nothing was enqueued."""
    block: Block | None = None
    """Set if its chain does not admit it: it is kept as blocked."""
    chain: ChainView | None = None
    """The chain's figures, if it was blocked."""


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The request ends. `state` is completed, failed or cancelled."""

    state: State
    error: str | None = None
    message: str | None = None


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """It waits until `at` (wall time) and runs again, at `route` if given; `parked`: for a quota."""

    at: int
    route: str | None = None
    parked: bool = False
    error: str | None = None
    message: str | None = None
    question: Question | None = None
    """The question to a person meanwhile; an answered one is kept for the next run."""


class GiveBack(msgspec.Struct, frozen=True):
    """It goes back to the queue and keeps its place: the daemon is stopping. Not counted as an interruption."""


Verdict = Finish | Retry | GiveBack


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """The result of settling."""

    state: State
    """The request's state now."""
    fenced: bool = False
    """Fence or token did not match: the attempt was kept as `fenced`, nothing else changed."""
    turn: int | None = None
    """The conversation's new head, if the request completed."""
    finished_at: int | None = None
    passing: Passing | None = None
    due: int | None = None
    fork: Fork | None = None
    """A fork that the provider saw, as it was recorded."""
    injections: tuple[InjectionView, ...] = ()
    """Deliveries that this step made or brought to an end."""
    notices: tuple[Notice, ...] = ()
    """The notices of budgets."""


class CancelOutcome(StrEnum):
    """The result of a cancel."""

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


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """The effect of an answer."""

    taken: bool
    """True if the question was open until now, and still the same."""
    conversation: str
    state: State
    passing: Passing | None = None
    injections: tuple[InjectionView, ...] = ()
    """Deliveries that it carried, if it ended."""


class NewLock(msgspec.Struct, frozen=True, kw_only=True):
    """An external holder's wish."""

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
    """The caller already held it: the expiry is reset, the fencing token kept."""


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
    """The result of `expire`, and the time of its next call."""

    woken: int = 0
    """Scheduled, retrying or parked requests that are due and queued now."""
    ended: tuple[Ended, ...] = ()
    lapsed: tuple[Lapsed, ...] = ()
    next_wall: int | None = None
    """Wall time of the next due or ttl; None if no request waits for one."""
    next_mono: int | None = None
    """Monotonic time of the next external lock's or waiter's end."""
    more: bool = False
    """There was more to do than one step takes: call again soon."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a dead daemon, found when the store was opened."""

    requeued: tuple[str, ...] = ()
    ended: tuple[Ended, ...] = ()


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """The records removed by one step of cleaning."""

    requests: int = 0
    conversations: int = 0
    more: bool = False


class StoreCondition(msgspec.Struct, frozen=True, kw_only=True):
    """How a store is, for an operator."""

    serving: bool = True
    """True if it accepts changes."""
    problems: tuple[str, ...] = ()
    """Its problems, in sentences."""
    database_bytes: int | None = None
    """Its size on this machine's disk; None if it has no file here."""
    log_bytes: int | None = None
    """The size of its write-ahead log, likewise."""
    commits: int | None = None
    """Transactions, or calls of a server, since it was opened; None if they are not counted."""
    commit_seconds: float = 0.0
    """The time that they took."""


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
    """The provider of the running or the last attempt."""
    finished_at: int | None = None
    attempts: tuple[Attempt, ...] = ()
    """Ended attempts, in order."""
    provider: str | None = None
    """The provider that runs it, or gave the answer."""
    error: str | None = None
    message: str | None = None
    interruptions: int = 0
    interrupted_by: str | None = None
    cancelling: bool = False
    requeued_from: str | None = None
    position: int | None = None
    """In its conversation's line, while it stands there."""
    holder: str | None = None
    """The holder of its conversation, if it is another."""
    node: str | None = None
    """The machine whose daemons alone may start it, while it could start now."""
    chain: str | None = None
    """Its chain's id, if it belongs to one."""
    parent: str | None = None
    depth: int | None = None
    block: Block | None = None
    """Why it was blocked."""
    injection: str | None = None
    """The delivery that it carries."""
    budget: str | None = None
    """The budget that it waits for, and whom that counts for, on two lines."""
    question: Question | None = None
    """The last question to a person, and the answer."""

    @property
    def answer(self) -> Attempt | None:
        """The attempt that completed it."""
        if self.attempts and self.attempts[-1].outcome == "completed":
            return self.attempts[-1]
        return next((a for a in reversed(self.attempts) if a.outcome == "completed"), None)

    @property
    def usage(self) -> Usage | None:
        """The sum over its attempts; None while no attempt has a report."""
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
    """The next to run, by route, in order."""
    WAITING = "waiting"
    """All lines, by conversation, in order; external waiters are not in it."""
    DELAYED = "delayed"
    """Scheduled, retrying, parked: the soonest first. Requests that are held back without a time are not in it."""
    ASKING = "asking"
    """Requests that wait for a person's answer, by arrival."""
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
    question: Question | None = None


T = TypeVar("T")

CLAIM_ASIDE = 500
"""Paused requests that one claim sets aside."""

CLAIM_BYTES = 1024 * 1024
"""Bytes of bodies in one claim after which a store may start no more: the rest is claimed in another turn."""


class Page(msgspec.Struct, Generic[T], frozen=True):
    """A part of a list; `cursor` asks for the next one, None at the end."""

    items: tuple[T, ...]
    cursor: str | None = None


class LineEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The waiters of a conversation."""

    request_id: str
    priority: Priority
    external: bool
    enqueued_at: int


class LockView(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation's lock."""

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
    """The length of the wait queue, exact up to `StoreRules.position_limit`."""
    node: str | None = None
    """The machine with the provider session, if it is bound to one of several."""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that went on in another place."""

    parent: str
    child: str
    request_id: str
    at: int
    kind: str


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation and its life."""

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
    """The machine with the provider session, if it is bound to one of several."""


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """A deleted conversation, and the counts of its deleted records."""

    conversation: str
    created_at: int
    requests: int
    """Requests that could still be asked for."""
    turns: int
    deliveries: int
    """Deliveries of its results, and deliveries to it."""
    aliases: tuple[str, ...] = ()
    """Other names that meant it: sessions of its providers, and earlier names."""
    reached: tuple[str, ...] = ()
    """Conversations that hold results of it, as far as deliveries are kept."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that a search found."""

    turn: int
    conversation: str
    body: bytes
    text: str
    provider: str
    finished_at: int


class SearchPage(msgspec.Struct, frozen=True, kw_only=True):
    """The found turns, the newest first."""

    items: tuple[Found, ...] = ()
    cursor: str | None = None
    behind: int = 0
    """About how many turns the index does not have yet. Repeating the search continues the indexing."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine whose daemons share a store."""

    node: str
    heard_at: int
    """When one of its daemons was last heard of, by the store's clock."""
    lost: bool = False
    """Without a heartbeat for `StoreRules.node_timeout`: requests bound to it continue elsewhere."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that are kept with the rows they count, in the same transaction."""

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


class BudgetUse(msgspec.Struct, frozen=True, kw_only=True):
    """A subject's figures in one window of a budget."""

    subject: str
    start: int
    use: Use


class BudgetWait(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that wait for a budget."""

    budget: str
    """Its name, and whom it counts for, on two lines."""
    requests: int
    until: int
    """The end of the window for which the first of them waits."""


class LoggedTurn(msgspec.Struct, frozen=True, kw_only=True):
    """One ended attempt with an answer, for the response log. `id` grows: it is the watermark."""

    id: int
    request_id: str
    conversation: str
    agent_id: str | None
    attempt: Attempt
