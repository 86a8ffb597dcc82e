"""The types of reports on the wire: the daemon, its queue, sessions, providers and locks.

A field that may be `null` is always there. One whose type has a default is left out when it has no value.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ksi.events.pauses import PauseBody

Json = dict[str, Any]


class Report(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The fields of every report."""

    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class StartupReply(Report):
    """How this daemon started."""

    started_at: float | None
    """Unix time."""
    pid: int
    """The daemon's process."""
    version: str
    """KSI's version."""
    service_version: int
    """2: the queue-based service. 1: the one without a queue."""
    socket: str
    """The path of its socket."""


class ContextReply(Report):
    """The place of this daemon, and the providers that it serves with."""

    home: str
    """The home folder."""
    node: str
    """The machine's name."""
    store: str
    """The store's address."""
    durability: str
    """`full` or `normal`."""
    default_model: str
    """The model of requests that name none."""
    providers: list[str]
    """Names of the enabled providers."""


class ReadyReply(Report):
    """The daemon's readiness."""

    ready: bool
    """It accepts requests. It accepts none while it stops, while a task that all service depends on fails, while the
    store cannot write, or while new work is refused with `disk_full`."""
    tasks: dict[str, bool]
    """Its long-lived tasks. A task is `true` if it runs and its last step did not fail."""


class ShutdownReply(Report):
    """The daemon begins to stop."""

    stopping: bool
    """Always `true`."""
    running: int
    """The number of running requests that get the grace period."""
    grace_seconds: float
    """The length of the grace period."""


class ProviderFacts(msgspec.Struct, kw_only=True):
    """The origin of a provider."""

    source: str
    """`ksi.toml`, `built in`, `found at` a path, or a key in the environment."""
    account: str | None
    """The login or key that it uses; null if it needs none."""


class StoreHealth(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The store."""

    url: str
    """Its address."""
    durability: str
    """`full` or `normal`."""
    database_bytes: int | None = None
    """The size of an SQLite database."""
    log_bytes: int | None = None
    """The size of its write-ahead log."""


class LeapReport(msgspec.Struct, kw_only=True):
    """A leap of the system's wall clock."""

    at: float
    """Unix time."""
    seconds: float
    """The size of the leap."""
    standing: bool
    """The clock still has the time that it leapt to."""


class ClockHealth(msgspec.Struct, kw_only=True):
    """The wall clock."""

    apart_seconds: float
    """By how much the system's wall clock is ahead of the time that KSI uses."""
    leap: LeapReport | None
    """The last leap of that clock since the start."""


class LoopHealth(msgspec.Struct, kw_only=True):
    """How often the event loop was blocked since the start. Every stall of 0.2 seconds counts, and some from 0.15
    seconds; the log names the code that blocked."""

    stalls: int
    """Number of stalls."""
    longest_stall: float
    """Length of the longest stall in seconds."""
    last_stall: float
    """Length of the last stall in seconds."""
    last_stall_at: float | None
    """Unix time at the end of the last stall; null if there was none."""


class LogHealth(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The daemon's log."""

    folder: str
    """Its folder."""
    level: str
    """The lowest level that it records."""
    bytes: int | None = None
    """The size of all its files."""
    dropped: int | None = None
    """Lines that could not be written."""


class ResponsesHealth(msgspec.Struct, kw_only=True):
    """The response files."""

    files: int
    """Number of files."""
    bytes: int
    """Their total size."""


class DiskHealth(msgspec.Struct, kw_only=True):
    """The disk that is written to."""

    free_bytes: int
    """Free space on the disk of the home, or on that of the database if it has less."""


class NodeReport(msgspec.Struct, kw_only=True):
    """A machine whose daemons share the store. A lost one is shown for thirty days."""

    node: str
    """Its name."""
    heard_at: float
    """Unix time of its last heartbeat."""
    lost: bool
    """It has been silent for `store.node_timeout`."""


class HealthReply(Report):
    """The daemon's health."""

    status: Literal["healthy", "degraded"]
    """`degraded` while there is a problem."""
    problems: list[str]
    """The problems, in sentences."""
    version: str
    """KSI's version."""
    pid: int
    """The daemon's process."""
    uptime_seconds: float
    """Seconds since it was ready."""
    providers: dict[str, ProviderFacts]
    """The origin and the account of each provider, by name."""
    home: str
    """The home folder."""
    store: StoreHealth
    """The store."""
    connections: int
    """Number of connected clients."""
    memory_bytes: int | None
    """Resident memory."""
    clock: ClockHealth
    """The wall clock."""
    loop: LoopHealth
    """How often and for how long the event loop was blocked since the start."""
    log: LogHealth
    """The daemon's log."""
    disk: DiskHealth | None = None
    """The disk of the home, or that of the database if it has less space; absent if the system does not report it."""
    responses: ResponsesHealth | None = None
    """The response files, once they have been counted."""
    node: str | None = None
    """This machine's name, if several daemons share the store."""
    nodes: list[NodeReport] | None = None
    """The machines whose daemons share the store."""


class EventEntry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event of the wire."""

    name: str
    """Its name."""
    direction: Literal["in", "out"]
    """`in`: a client sends it. `out`: the daemon sends it."""
    doc: str
    """Its purpose, in a sentence."""
    schema: Json | UnsetType = UNSET
    """JSON Schemas of `request` and `reply`, or of `data` for an event that the daemon sends."""


class DiscoverReply(Report):
    """The events."""

    events: list[EventEntry]
    """One entry for each event."""


class RowReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request in a list."""

    request_id: str
    """Its id."""
    session_id: str
    """Its conversation."""
    status: str
    """Its state."""
    priority: str | None = None
    """Its priority."""
    model: str | None = None
    """The model named in the request."""
    agent_id: str | None = None
    """The agent that asked."""
    attempt: int | None = None
    """The number of attempts that have started."""
    enqueued_at: float | None = None
    """Unix time of its arrival."""
    due_at: float | None = None
    """Unix time before which it does not run."""
    started_at: float | None = None
    """Unix time of its last start."""
    failed_at: float | None = None
    """Unix time since when it has waited for another attempt."""
    finished_at: float | None = None
    """Unix time of its end."""
    provider: str | None = None
    """The provider that runs it, or ran it last."""
    error: str | None = None
    """The class of its last failure."""
    message: str | None = None
    """The message of its last failure."""


class QueueFigures(Report):
    """The number of requests, by state. Final states are counted since the store was created."""

    queued: int
    """Waiting for a conversation or a slot."""
    active: int
    """Running."""
    completed: int
    """Ended with an answer."""
    failed: int
    """Ended without an answer."""
    cancelled: int
    """Ended by a cancel."""
    expired: int
    """Ended because their `ttl` passed before they started."""
    blocked: int
    """Ended because their chain did not admit them."""
    scheduled: int
    """Delayed and not due yet."""
    retrying: int
    """Waiting for another attempt."""
    parked: int
    """Waiting for a provider that is limited or away."""


class StatusReply(QueueFigures):
    """The service's figures and running requests."""

    status: Literal["ok", "stopping"]
    """`stopping` while it ends."""
    version: str
    """KSI's version."""
    uptime_seconds: float
    """Seconds since the daemon was ready."""
    running: list[RowReply]
    """The first hundred running requests."""
    more: bool
    """There are more running requests; `completion:queue_status` pages through them."""
    paused: list[PauseBody]
    """All pauses."""
    draining: bool
    """This daemon starts nothing and accepts nothing new."""


class DirectStatusReply(Report):
    """The figures of service version 1, which has no queue."""

    status: Literal["ok", "stopping"]
    """`stopping` while it ends."""
    version: str
    """KSI's version."""
    uptime_seconds: float
    """Seconds since the daemon was ready."""
    active: int
    """Running."""
    completed: int
    """Ended with an answer since the start."""
    failed: int
    """Ended without an answer since the start."""
    cancelled: int
    """Ended by a cancel since the start."""
    running: list[RowReply]
    """The running requests."""


class TurnBody(msgspec.Struct, kw_only=True):
    """Whose turn is next."""

    priority: str
    """The priority."""
    flow: str
    """`agent:NAME`; without an agent the `connection:NUMBER` or `session:NAME` that stands for one, or `http`."""
    request_id: str
    """Its next request."""


class BudgetWaitBody(msgspec.Struct, kw_only=True):
    """Requests that wait for a budget."""

    budget: str
    """Its name."""
    scope: str
    """The subject that it counts for, as `agent:nightly`."""
    waiting: int
    """How many."""
    until: float
    """Unix time when the budget is reset."""


class QueueStatusReply(QueueFigures):
    """The queue."""

    locked_conversations: int
    """Conversations with a holder."""
    external_locks: int
    """Of these, conversations held from outside."""
    external_waiters: int
    """External waiters."""
    conversations: int
    """Conversations that are kept."""
    max_queued: int
    """The configured limit."""
    ready_by_route: dict[str, int]
    """The number of requests that wait only for a slot, by route, exact to 1,000."""
    turns: list[TurnBody] = []
    """Whose turn it is next in each priority, in order, where agents take turns."""
    over_budget: list[BudgetWaitBody] = []
    """The requests that wait for budgets, and until when."""
    items: list[RowReply] | UnsetType = UNSET
    """With `list`: a page of its rows."""
    cursor: str | UnsetType = UNSET
    """With `list`: where the next page begins; absent at the end."""


class TrendSample(msgspec.Struct, kw_only=True):
    """The queue at one moment."""

    at: float
    """Unix time."""
    active: int
    """Running."""
    queued: int
    """Waiting for their conversation or a slot."""
    delayed: int
    """Scheduled, retrying or parked."""
    completed: int
    """Ended with an answer since the store was made."""
    failed: int
    """Ended without one since then."""
    by_route: dict[str, int]
    """The number of requests that wait only for a slot, by route, exact to 1,000."""
    by_priority: dict[str, int] | None
    """The number of queued or delayed requests, by priority; null if the store cannot count that."""


class TrendReply(Report):
    """The queue over time."""

    every: float
    """Seconds between two samples."""
    samples: list[TrendSample]
    """One a minute for the last day, the oldest first, since the daemon started; the last one is the present."""


class SessionReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A session's life."""

    session_id: str | UnsetType = UNSET
    """The conversation's name."""
    state: str | UnsetType = UNSET
    """`created` (no turn yet), `active`, `idle` or `expired`, by its last activity."""
    created_at: float | UnsetType = UNSET
    """Unix time."""
    active_at: float | UnsetType = UNSET
    """Unix time of its last activity."""
    turns: int | UnsetType = UNSET
    """Completed turns."""
    provider: str | UnsetType | None = UNSET
    """The provider of the last answer."""
    provider_session_id: str | UnsetType | None = UNSET
    """The id of the session at a provider that keeps dialogues itself."""
    agents: list[str] | UnsetType = UNSET
    """The agents that have used it, at most a hundred."""
    locked: bool | UnsetType = UNSET
    """It has a holder."""
    forked_from: str | UnsetType | None = UNSET
    """The conversation that it was forked from."""
    node: str | UnsetType = UNSET
    """The machine with the provider's session, if it is bound to one and several daemons share the store."""


class SessionStatusReply(SessionReply, kw_only=True):
    """A session's life; without `session_id`, a page of sessions."""

    sessions: list[SessionReply] | UnsetType = UNSET
    """Without `session_id`: a page of sessions."""
    cursor: str | UnsetType = UNSET
    """The beginning of the next page; absent at the end."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class RetryStatusReply(Report):
    """Requests that wait for a retry."""

    retrying: int
    """The number of requests that wait for another attempt."""
    parked: int
    """The number of requests that wait for a provider that is limited or away."""
    max_attempts: int
    """As configured."""
    initial_delay: float
    """As configured, in seconds."""
    max_delay: float
    """As configured, in seconds."""
    waiting: list[RowReply]
    """A page of these requests, the soonest first."""
    cursor: str | UnsetType = UNSET
    """The beginning of the next page; absent at the end."""


class LimitReport(msgspec.Struct, kw_only=True):
    """One limit because of which a provider is not asked."""

    cause: str
    """`quota`, `throttle`, `outage`, `login` or `model_gone`."""
    models: str | None
    """A pattern of the provider's own model names; null if it holds for all models."""
    window: str | None
    """The provider's name for a limit of the account, such as `five_hour`."""
    since: float
    """Unix time when it was first reached."""
    until: float | None
    """Unix time when the provider is asked again; null if only a login can end it."""
    told: bool
    """The provider itself named that time."""
    strikes: int
    """How often it was reached in a row."""
    probes: int | None
    """The number of concurrent calls that may probe it; null before that time."""
    reason: str | None
    """The provider's message."""
    sentence: str
    """All of it in one sentence."""


class FailureReport(msgspec.Struct, kw_only=True):
    """A provider's last failure."""

    code: str | None
    """Its class."""
    message: str | None
    """The failure's message."""
    at: float
    """Unix time."""


class PercentilesReport(msgspec.Struct, kw_only=True):
    """Times in milliseconds."""

    p50: float
    """Median: half of the calls took no longer."""
    p95: float
    """Nineteen of twenty calls took no longer."""


class ProviderReport(Report):
    """A provider. The figures are since the daemon started; the percentiles are over the last 1,000 calls."""

    kind: str
    """As configured."""
    models: list[str]
    """As configured."""
    priority: int
    """As configured."""
    enabled: bool
    """It is enabled."""
    disabled: str | None
    """If it is disabled: since when, by whom, and why."""
    paused: str | None
    """If it or everything is paused: by whom, since when, and why."""
    max_concurrency: int
    """As configured."""
    breaker: str
    """`closed`, `open` (not asked) or `half_open` (probed)."""
    open_until: float | None
    """Unix time until which its circuit is open."""
    parked_until: float | None
    """Unix time until which a limit holds for all of its models; null if only a login can end it."""
    limits: list[LimitReport]
    """The limits because of which it is not asked."""
    problem: str | None
    """The reason why it does not work, and how to mend it."""
    own: Any
    """Fields of this kind of provider only."""
    running: int
    """Number of running calls."""
    calls: int
    """Number of ended calls, without cancelled ones."""
    failures: int
    """Number of ended calls without an answer."""
    outcomes: dict[str, int]
    """The numbers of calls that completed, and that failed with each class."""
    success_rate: float | None
    """The share of successful calls, from 0 to 1."""
    latency_ms: PercentilesReport | None
    """The duration of completed calls."""
    time_to_first_token_ms: PercentilesReport | None
    """The time to the first piece of streamed calls."""
    last_error: FailureReport | None
    """Its last failure."""
    source: str | UnsetType = UNSET
    """Its origin: `ksi.toml`, `built in`, `found at` a path, or a key in the environment."""
    account: str | UnsetType | None = UNSET
    """The login or key that it uses; null if it needs none."""


class ProviderStatusReply(Report):
    """The providers."""

    providers: dict[str, ProviderReport]
    """Each provider, by name."""


class ForkRow(msgspec.Struct, kw_only=True):
    """One fork of a conversation."""

    parent: str
    """The conversation that was forked."""
    child: str
    """The new conversation."""
    request_id: str | None
    """The request that made it."""
    at: float
    """Unix time."""
    kind: str
    """The reason: `requested`, `new_session`, `foreign_turn` or `node_lost`."""


class WaiterRow(msgspec.Struct, kw_only=True):
    """One waiter in a conversation's queue."""

    request_id: str
    """The waiter's id."""
    position: int
    """The number of waiters before it."""
    priority: str
    """Its priority."""
    kind: Literal["external", "request"]
    """`external`: an external waiter."""
    enqueued_at: float
    """Unix time of its arrival."""


class LockRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation's lock."""

    conversation_id: str | None = None
    """The conversation."""
    locked: bool | None = None
    """It has a holder."""
    state: str | None = None
    """`free`, `locked` (from outside), or the state of the request that holds it."""
    holder: str | None = None
    """The holder's id."""
    holder_kind: Literal["external", "request"] | None = None
    """`external`: an external holder."""
    since: float | None = None
    """Unix time when the holder acquired it."""
    expires_at: float | None = None
    """Unix time when an external lock expires."""
    fence: int | None = None
    """The holder's fencing token."""
    metadata: Any = None
    """The external holder's metadata."""
    waiting: int | None = None
    """The length of its wait queue, exact to 1,000."""
    node: str | None = None
    """The machine with the provider's session, if it is bound to one and several daemons share the store."""


class LockStatusReply(LockRow, kw_only=True):
    """One conversation's lock, wait queue and forks; or totals, a page of locks, and forks."""

    queue: list[WaiterRow] | None = None
    """Of one conversation: its wait queue."""
    forks: list[ForkRow]
    """The tree of forks that it belongs to; without a conversation, all forks."""
    locked_conversations: int | None = None
    """Without a conversation: how many have a holder."""
    external_locks: int | None = None
    """Without a conversation: how many are held from outside."""
    external_waiters: int | None = None
    """Without a conversation: how many external waiters there are."""
    locks: list[LockRow] | None = None
    """Without a conversation: a page of held locks, without their wait queues."""
    cursor: str | None = None
    """The beginning of the next page; absent at the end."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class PatternsReply(Report):
    """The subscription of a connection."""

    patterns: list[str]
    """All patterns that the connection has now."""
