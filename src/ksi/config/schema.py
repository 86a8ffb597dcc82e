"""The configuration as types: every section and key, with its default."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ksi.budgets.rules import Budget
from ksi.budgets.settings import budget_of
from ksi.config.addresses import shown_url

HOUR = 3600.0
DAY = 24 * HOUR
CONFIG_FILE = "ksi.toml"

LONGEST = 1e9
"""No time is longer, in seconds: a store keeps microseconds in 64 bits."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration. All times in seconds."""


class Service(_Section, frozen=True, kw_only=True):
    """The daemon itself."""

    version: Literal[1, 2] = 2
    """`1` runs each request at once, without queue and locks, as before; see [upgrade](../how-to/upgrade-from-v1.md).
    """
    default_model: str = "local/smollm2"
    """The model of requests that name none, as `provider/model`."""
    shutdown_grace: float = 10.0
    """The time that running requests may continue after SIGTERM; the others return to the queue."""


class Socket(_Section, frozen=True, kw_only=True):
    """The Unix socket."""

    path: str = "var/run/daemon.sock"
    """The socket's path. Its folder also has the pid file, and only this user can open it. At most 107 bytes."""
    max_line: int = 16 * 1024 * 1024
    """Bytes in one event; a longer line is `payload_too_large`."""
    max_input: int = 64 * 1024 * 1024
    """Backpressure: bytes that all clients together may hold in unfinished lines, or in lines whose answers they do not
    read; at least twice `max_line` counts. Above it, clients that hold much of it are disconnected with
    `too_much_input`, beginning with the one that has finished no line for the longest time."""
    max_backlog: int = 64 * 1024 * 1024
    """Bytes that a client may leave unread before it is disconnected with `slow_consumer`. Lines of a client that does
    not read have to wait; while it reads, answers to its own requests may take eight times as much."""
    max_connections: int = 10_000
    """Further clients are refused."""
    replies: Literal["v1", "v2"] | None = None
    """The form of replies and pushes for clients that do not choose one: `v2` is the form of this reference, `v1` the
    one that [version 1's clients read](../how-to/upgrade-from-v1.md#what-old-clients-read). The default follows
    `service.version`."""


class Http(_Section, frozen=True, kw_only=True):
    """The HTTP interface."""

    listen: str = "127.0.0.1:7411"
    """The address and port. If the port is taken, any free one is used; `var/run/http.json` and `ksi env` name it. Port
    0 is any free port, an empty text turns HTTP off."""
    allow_remote: bool = False
    """Allow an address that other machines can reach. Tokens then cross the network unencrypted: put TLS before it."""
    hosts: tuple[str, ...] = ()
    """Host names under which the daemon is reached, besides those of this machine."""
    max_body: int = 32 * 1024 * 1024
    """Maximum size of a request in bytes."""
    max_connections: int = 2_000
    """Further requests are refused with status 503."""
    models: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Aliases for other vendors' model names: a pattern and a full name, as `"gpt-*" = "local/smollm2"`."""


class StoreConfig(_Section, frozen=True, kw_only=True):
    """The durable store."""

    url: str = "sqlite:///var/db/ksi.db"
    """`sqlite:///path` (three slashes: from the home, four: absolute), for one daemon; or, shared by any number of
    daemons, `redis://[user:password@]host[:port][/db][?namespace=name]`, `rediss://` with
    TLS (`?ssl_ca_certs=`, `ssl_certfile=`, `ssl_keyfile=` name files), `unix:///path/to/socket`,
    `redis+sentinel://host,host/service`, `redis+cluster://host,host`."""
    durability: Literal["full", "normal"] = "full"
    """`full`: acknowledged changes survive a loss of power. `normal`: they survive the daemon's death. For a Redis
    server, its own settings decide."""
    node_id: str = ""
    """This machine's name among those that share a store. The default is its host name. Give containers a name that
    outlives them: by it, a machine finds its dialogues again."""
    node_timeout: float = 60.0
    """The time that a machine may send no heartbeat before its dialogues continue on another machine, from their
    history. Not shorter than `queue.lease`. It has no effect if one daemon has the store for itself."""
    min_free_bytes: int = 8 * 1024 * 1024
    """Free bytes on the disk of the home or of the database below which new work is refused with `disk_full`, so that
    running requests can finish. 0 turns the check off."""

    @property
    def node(self) -> str:
        """This machine's name."""
        return self.node_id or socket.gethostname()

    @property
    def shared(self) -> bool:
        """True if other daemons can use this store too."""
        return self.url.partition("://")[0] in ("redis", "rediss", "unix") or self.url.startswith(("redis+", "rediss+"))

    @property
    def home_node(self) -> str | None:
        """The machine to which provider sessions are bound; None if there is only one."""
        return self.node if self.shared else None

    @property
    def shown_url(self) -> str:
        """The address without possible secrets."""
        return shown_url(self.url)


class HeadStart(_Section, frozen=True, kw_only=True):
    """The head start of each priority over later arrivals of others (priority aging)."""

    high: float = 6 * HOUR
    normal: float = 3 * HOUR
    low: float = 1 * HOUR
    background: float = 0.0


class Queue(_Section, frozen=True, kw_only=True):
    """The queue."""

    max_queued: int = 1_000_000
    """Number of waiting requests (scheduled, queued, retrying, parked) above which another one that would wait is
    refused with `queue_full`."""
    lease: float = 30.0
    """How long the lease of a daemon without a heartbeat lasts; after that, other daemons of a shared store take over
    its requests. It has no effect with SQLite."""
    max_interruptions: int = 3
    """A request that the daemon's death has interrupted this many times fails with `daemon_restart`."""
    on_interrupted: Literal["retry", "fail"] = "retry"
    """How to treat a request that was running when the daemon died: `retry` or `fail`."""
    fair: bool = True
    """Agents take turns within a priority, and each priority keeps one of sixteen places at least. `false`: the lowest
    rank runs first, whoever sent it."""
    head_start: HeadStart = HeadStart()


class Fairness(_Section, frozen=True, kw_only=True):
    """The weights of agents that take turns (`queue.fair`)."""

    weights: Mapping[str, Annotated[float, Meta(gt=0, le=1000)]] = msgspec.field(default_factory=dict)
    """The weight of an agent that gets more or fewer turns than one, as `nightly = 0.5`; a star at the end of a name
    stands for anything."""


class Lock(_Section, frozen=True, kw_only=True):
    """Conversation locks."""

    expiry: float = 300.0
    """The time that a holder keeps a lock without renewing it."""
    wait_timeout: float = 300.0
    """The default timeout of a waiter."""


class Retry(_Section, frozen=True, kw_only=True):
    """Retries of failed attempts, with exponential backoff and jitter."""

    max_attempts: int = 3
    """Total number of attempts that may fail. Each provider of a route is tried once in any case. 1 turns retries
    off."""
    initial_delay: float = 1.0
    """Upper bound of the first backoff; it doubles each time. The wait is random below its bound."""
    max_delay: float = 60.0
    """Largest upper bound. A provider's own Retry-After is the shortest wait."""


class BreakerConfig(_Section, frozen=True, kw_only=True):
    """The circuit breaker of each provider."""

    failures: int = 5
    """Number of failures in the window that opens the circuit ..."""
    rate: float = 0.5
    """... if they are at least this share of the calls in the window."""
    window: float = 60.0
    """How far back calls count."""
    max_samples: int = 20
    """The number of recent calls that are considered; not fewer than `failures`. Keep it small, so that a long good
    record does not delay noticing a failure."""
    open_for: float = 10.0
    """The time that the circuit stays open at first; it doubles each time a probe fails."""
    max_open_for: float = 300.0
    """The longest time that it stays open."""
    probes: int = 1
    """Concurrent probes while the circuit is half-open."""
    probes_to_close: int = 2
    """Probes in a row that must succeed to close the circuit."""


class Chain(_Section, frozen=True, kw_only=True):
    """Upper limits for every chain; a request can only lower them."""

    max_depth: int = 20
    """A deeper request is blocked; the first request of a chain has depth 0."""
    token_budget: int = 2_000_000
    """Input and output tokens of all requests of a chain together."""
    time_window: float = DAY
    """Age of a chain after which no request of it starts."""
    max_output: int = 4096
    """Output tokens that are reserved for a request of a chain without `max_tokens`: an eighth of its budget, at most
    this number. Its answer is cut only if the remaining budget is smaller."""
    guard_messages: int = 3
    """Number of notices about blocks that a chain may send beyond its limits."""
    approve_at_depth: int | None = None
    """A person has to approve each request at this depth or deeper; the first request of a chain has depth 0."""
    approve_at_cost: float | None = None
    """A person has to approve each request of a chain that has cost so many US dollars."""
    approve_at_risk: Annotated[float, Meta(le=1)] | None = None
    """A person has to approve each request that the pattern checks give at least this risk score."""
    approval_timeout: float = DAY
    """Seconds after which an unanswered question counts as a no."""


class Patterns(_Section, frozen=True, kw_only=True):
    """Detection of chains that make no progress."""

    enabled: bool = True
    """Recognise and block chains that go in circles or fall apart."""
    threshold: Annotated[float, Meta(le=1)] = 0.7
    """The risk score, above 0 and up to 1, at which a chain is blocked."""
    hops: int = 64
    """Number of the chain's latest requests that are checked."""
    vectors: bool = True
    """Compare results by meaning too, with a small model in a process of its own (about 220 MB while chains run). Needs
    the extra `meaning`."""
    judge: str = ""
    """The model that is asked whether a chain gets on, such as `haiku`; none if empty. Its
    requests belong to the agent `ksi-guard`."""
    judge_questions: int = 8
    """Number of questions about a chain, at most."""


class Loops(_Section, frozen=True, kw_only=True):
    """When an agent whose requests all succeed is reported as being in a loop; it is not stopped."""

    repeats: int = 300
    """Number of equal requests, each sent after an earlier one was answered; 0 turns the check off."""
    turns: int = 1000
    """Number of turns of one conversation, each sent after the previous one was answered; 0 turns the check off."""
    pause: float = 30.0
    """Seconds of silence that end a loop."""


class Traces(_Section, frozen=True, kw_only=True):
    """Spans of requests, attempts and deliveries for OpenTelemetry; none without an endpoint. An extra: `ksi[otel]`."""

    endpoint: str = ""
    """The address at which a collector takes OTLP over HTTP, such as http://127.0.0.1:4318. Headers, a time limit and
    certificates are taken from OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_HEADERS."""
    content: bool = False
    """Prompts and answers are in the spans too."""
    sample: float = 1.0
    """The share of traces that is sent, of those whose client did not decide by its `traceparent`."""
    service_name: str = "ksi"
    """The name that the spans' service has."""


class Alerts(_Section, frozen=True, kw_only=True):
    """When an agent is told to be unusual, once in an hour; it is not stopped. Budgets stop it."""

    equal_requests: int = 500
    """Requests of an agent that ask the same within an hour of the clock; 0: not looked at."""
    spending_factor: float = 10.0
    """Report an agent that spends this many times its usual hour, the mean of its hours in the last week; 0: never."""
    spending_least: float = 1.0
    """US dollars in an hour below which nothing is unusual."""


class Hooks(_Section, frozen=True, kw_only=True):
    """The hooks: for each event a command as a list of its words, or the address of a webhook."""

    on_end: str | tuple[str, ...] | None = None
    """A request ended."""
    on_block: str | tuple[str, ...] | None = None
    """A chain's limit or a budget stopped a request."""
    on_budget: str | tuple[str, ...] | None = None
    """A budget has reached a share of its limit, or is used up."""
    on_approval: str | tuple[str, ...] | None = None
    """A request waits for a person's answer."""
    secret_env: str = "KSI_WEBHOOK_KEY"
    """The variable with the secret that signs webhooks, as `whsec_` with Base64; without it they are not signed."""
    timeout: float = 30.0
    """Seconds for one delivery."""
    attempts: int = 10
    """After so many a delivery is given up. The waits double from five seconds to an hour."""

    @property
    def any(self) -> bool:
        """True if there is a hook."""
        return any((self.on_end, self.on_block, self.on_budget, self.on_approval))

    def of(self, event: str) -> str | tuple[str, ...] | None:
        """The hook of an event."""
        found: str | tuple[str, ...] | None = getattr(self, f"on_{event}")
        return found


class Session(_Section, frozen=True, kw_only=True):
    """The states of conversations, and the history that a call gets."""

    idle_after: float = 0.5 * HOUR
    """A conversation without activity for this long is shown as idle."""
    expire_after: float = 30 * DAY
    """A conversation without activity for this long is shown as expired. Neither state removes anything."""
    history_tokens: int | None = None
    """Maximum history of a call, in estimated tokens; the default is the space that the provider's context leaves."""
    cache_bytes: int = 64 * 1024 * 1024
    """Memory for the histories of conversations in play."""


class Retention(_Section, frozen=True, kw_only=True):
    """The times that records are kept."""

    finished: float = 7 * DAY
    """A finished request is kept for this long; until then its id stays taken."""
    sessions: float = 90 * DAY
    """A conversation is kept for this long after its last activity; not shorter than `finished`."""
    clean_every: float = 60.0
    """How often expired records are deleted; the log has the counts of each run."""


class Limits(_Section, frozen=True, kw_only=True):
    """Limits of a call whose request sets none."""

    timeout: float = 600.0
    """Longest duration of one attempt."""
    idle_timeout: float = 120.0
    """Silence of an HTTP provider's stream after which the call counts as hung."""


class Log(_Section, frozen=True, kw_only=True):
    """The daemon's log and the response log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug`, `info`, `warning` or `error`. The log is `daemon.log`, one JSON object a line."""
    responses: bool = True
    """Also write each answer as a line of `responses/<session>.jsonl`. A file is deleted with its session."""
    max_bytes: int = 10 * 1024 * 1024
    """The length at which `daemon.log` is renamed to `daemon.log.1` and a new file begins."""
    keep: int = 5
    """Number of renamed logs to keep."""


class ProviderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of every provider, and in `options` those of its kind."""

    kind: str
    """`local`, `openai`, `anthropic`, `claude-cli` or `stub`."""
    models: tuple[str, ...]
    """Patterns of full model names; `*` matches anything. The default is `<name>/*`. The part before the first slash is
    removed for the provider."""
    priority: int = 10
    """If several providers serve a model, the one with the lowest number is asked first, the others when it fails."""
    max_concurrency: int = 4
    """Maximum number of concurrent calls."""
    enabled: bool = True
    """`false` ignores the provider."""
    requests_per_minute: int | None = None
    """The provider's own limit, enforced by a token bucket on this side, over all daemons of a shared store."""
    tokens_per_minute: int | None = None
    """Likewise for input and output tokens, which are estimated before a call and corrected after it."""
    timeout: float | None = None
    """Seconds for one turn at this provider, if the request sets none. The default is `limits.timeout`."""
    idle_timeout: float | None = None
    """Seconds of silence after which a turn counts as hung. The default is `limits.idle_timeout`. A long tool run, or
    the reading of a long prompt, is silent."""
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)


class ModelConfig(_Section, frozen=True, kw_only=True):
    """Settings of one model, `[models."provider/model"]`."""

    fallbacks: tuple[str, ...] = ()
    """Full names of models that answer instead, in order, if no provider of this one can."""


Price = Annotated[float, Meta(ge=0, le=1e6)]


class PriceConfig(_Section, frozen=True, kw_only=True):
    """The price of a model, `[prices."provider/model"]`, in US dollars per million tokens. The name may be a
    pattern."""

    input: Price
    """Input that did not come from a cache."""
    output: Price
    """Output, including thinking."""
    cache_read: Price | None = None
    """Input read from a cache; the default is `input`."""
    cache_write: Price | None = None
    """Input written to a cache; the default is `input`."""
    cache_write_hour: Price | None = None
    """Input written to a cache that keeps it for an hour; the default is twice `input`."""


class BudgetConfig(_Section, frozen=True, kw_only=True):
    """A limit of usage in a time window, `[budgets.NAME]`: one of `usd`, `tokens` and `requests`."""

    scope: str = "all"
    """The requests that it limits: `all`, `agent:NAME`, `token:NAME` (an HTTP token with all agents under it),
    `model:NAME`, `provider:NAME` or `session:NAME`. `*` in place of the name binds each one by itself, a name with `*`
    at its end all that begin so together."""
    usd: Annotated[float, Meta(gt=0)] | None = None
    """US dollars."""
    tokens: Annotated[int, Meta(gt=0)] | None = None
    """Input and output tokens."""
    requests: Annotated[int, Meta(gt=0)] | None = None
    """Calls of providers."""
    per: Literal["hour", "day", "week", "month"] = "day"
    """`hour`, `day`, `week` (from Monday) or `month`, by the calendar."""
    time_zone: str = ""
    """The calendar's, as `Europe/Berlin`; empty: this machine's."""
    on_exceed: Literal["wait", "refuse"] = "wait"
    """`wait`: a request that would exceed it waits in its place until the window ends; `refuse`: it is refused with
    `budget_exceeded`."""
    warn_at: tuple[float, ...] = (0.8,)
    """Shares of the limit at which `budget:warning` is sent, once in a window."""
    unpriced: Literal["refuse"] | float = "refuse"
    """For a budget in dollars, the treatment of a model without a price: `"refuse"` it, or a number of US dollars to
    count for a million tokens."""

    def budget(self, name: str) -> Budget:
        """The budget of this name.

        Raises:
            ValueError: a key and its error.
        """
        return budget_of(name, **msgspec.structs.asdict(self))


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration. Relative paths begin at `home`."""

    home: Path
    service: Service = Service()
    socket: Socket = Socket()
    http: Http = Http()
    store: StoreConfig = StoreConfig()
    queue: Queue = Queue()
    fairness: Fairness = Fairness()
    lock: Lock = Lock()
    retry: Retry = Retry()
    breaker: BreakerConfig = BreakerConfig()
    chain: Chain = Chain()
    patterns: Patterns = Patterns()
    loops: Loops = Loops()
    traces: Traces = Traces()
    alerts: Alerts = Alerts()
    hooks: Hooks = Hooks()
    session: Session = Session()
    retention: Retention = Retention()
    limits: Limits = Limits()
    log: Log = Log()
    providers: Mapping[str, ProviderConfig] = msgspec.field(default_factory=dict)
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The origin of each provider that was not configured but found."""
    models: Mapping[str, ModelConfig] = msgspec.field(default_factory=dict)
    prices: Mapping[str, PriceConfig] = msgspec.field(default_factory=dict)
    budgets: Mapping[str, BudgetConfig] = msgspec.field(default_factory=dict)

    def path(self, relative: str) -> Path:
        """A path of the configuration, relative to the home."""
        return self.home / relative

    def timeout_of(self, provider: str) -> float:
        """Seconds for one turn at a provider, if the request sets none."""
        entry = self.providers.get(provider)
        return (entry.timeout if entry is not None else None) or self.limits.timeout

    @property
    def replies(self) -> Literal["v1", "v2"]:
        """The form of replies and pushes for clients that do not choose one."""
        return self.socket.replies or ("v1" if self.service.version == 1 else "v2")

    @property
    def socket_path(self) -> Path:
        """The path of the daemon's socket."""
        return self.path(self.socket.path)

    @property
    def run_dir(self) -> Path:
        """The folder of the socket, the pid file and other files that live as long as the daemon."""
        return self.socket_path.parent

    @property
    def pid_path(self) -> Path:
        """The daemon's pid file."""
        return self.run_dir / "daemon.pid"

    @property
    def clock_path(self) -> Path:
        """The time that the daemon used last, for its next start."""
        return self.path("var/clock.json")

    @property
    def log_dir(self) -> Path:
        """The daemon's log, and `responses/` below it."""
        return self.path("var/logs")
