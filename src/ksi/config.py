"""One frozen Config, read once: defaults < ksi.toml < KSI_* variables < command-line flags."""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from ksi.errors import ConfigError
from ksi.found_providers import found
from ksi.protocol import field_names, nearest, split_path

HOUR = 3600.0
DAY = 24 * HOUR
CONFIG_FILE = "ksi.toml"

LONGEST = 1e9
"""No time is longer, in seconds: a store keeps microseconds in 64 bits."""

T = TypeVar("T")


S = TypeVar("S", bound="_Section")


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration. All times in seconds."""


class Service(_Section, frozen=True, kw_only=True):
    """What the daemon is."""

    version: Literal[1, 2] = 2
    """2: the queue and all that belongs to it. 1: each request runs at once, as before there was a queue."""
    default_model: str = "local/smollm2"
    shutdown_grace: float = 10.0
    """How long running requests may go on after SIGTERM (R6)."""


class Socket(_Section, frozen=True, kw_only=True):
    """The door (S1, S2, S4)."""

    path: str = "var/run/daemon.sock"
    max_line: int = 16 * 1024 * 1024
    """Bytes in one event."""
    max_backlog: int = 64 * 1024 * 1024
    """Unread bytes at which a slow client is let go."""
    max_connections: int = 10_000
    replies: Literal["v1", "v2"] | None = None
    """The form of replies and pushes for clients that do not say which they read. Without it, that of the service's
    version; see `Config.replies`."""


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Where the truth is kept."""

    url: str = "sqlite:///var/db/ksi.db"
    durability: Literal["full", "normal"] = "full"
    node_id: str = ""
    """This machine's name among those that share a store; empty: its host name."""
    node_timeout: float = 60.0
    """How long a machine may be silent before dialogues that live on it go on elsewhere (D4)."""

    @property
    def node(self) -> str:
        """This machine's name."""
        return self.node_id or socket.gethostname()

    @property
    def shared(self) -> bool:
        """Whether other daemons can have this store too."""
        return self.url.partition("://")[0] in ("redis", "rediss", "unix") or self.url.startswith(("redis+", "rediss+"))

    @property
    def shown_url(self) -> str:
        """The address without what may be secret in it."""
        return shown_url(self.url)


class HeadStart(_Section, frozen=True, kw_only=True):
    """What each priority passes others by (Q2)."""

    high: float = 6 * HOUR
    normal: float = 3 * HOUR
    low: float = 1 * HOUR
    background: float = 0.0


class Queue(_Section, frozen=True, kw_only=True):
    """The queue (Q1 to Q8)."""

    max_queued: int = 1_000_000
    lease: float = 30.0
    max_interruptions: int = 3
    on_interrupted: Literal["retry", "fail"] = "retry"
    head_start: HeadStart = HeadStart()


class Lock(_Section, frozen=True, kw_only=True):
    """Conversation locks (L4)."""

    expiry: float = 300.0
    """How long an external holder keeps a lock without renewing it."""
    wait_timeout: float = 300.0
    """How long an external holder waits for a lock when it does not say."""


class Retry(_Section, frozen=True, kw_only=True):
    """How a failed attempt is tried again (F2)."""

    max_attempts: int = 3
    """Attempts in all; 1 means none is tried again."""
    initial_delay: float = 1.0
    max_delay: float = 60.0


class BreakerConfig(_Section, frozen=True, kw_only=True):
    """When a provider that fails is left alone (F3)."""

    failures: int = 5
    """So many failures in the window, at least ..."""
    rate: float = 0.5
    """... and such a share of its calls there."""
    window: float = 60.0
    max_samples: int = 20
    """Its latest calls, which are judged; few, so that one that was well for long is left soon after it died."""
    open_for: float = 10.0
    """How long it is left alone at first; twice as long each time that a probe fails."""
    max_open_for: float = 300.0
    probes: int = 1
    """Calls at once while it is tried again."""
    probes_to_close: int = 2
    """Probes that must succeed in a row."""


class Chain(_Section, frozen=True, kw_only=True):
    """The daemon's own maxima for every chain; a request can only ask for less (C5, C6)."""

    max_depth: int = 20
    token_budget: int = 2_000_000
    time_window: float = DAY
    max_output: int = 4096
    """Output tokens that are set aside for a member that names no `max_tokens`, at most."""
    guard_messages: int = 3
    """Notices of blocks that one chain may send past its limits."""


class Patterns(_Section, frozen=True, kw_only=True):
    """When a chain counts as gone astray (C7)."""

    enabled: bool = True
    threshold: Annotated[float, Meta(le=1)] = 0.7
    """The risk score, above 0 and up to 1, from which a chain is blocked."""
    hops: int = 64
    """How far back a chain is looked at."""


class Session(_Section, frozen=True, kw_only=True):
    """Conversations' lives (L10) and how much history a call gets (L9)."""

    idle_after: float = 0.5 * HOUR
    expire_after: float = 30 * DAY
    history_tokens: int | None = None
    """At most so many tokens of history; without it, what the provider's context leaves."""
    cache_bytes: int = 64 * 1024 * 1024
    """Memory for the history of conversations in play."""


class Retention(_Section, frozen=True, kw_only=True):
    """How long things are kept (Q4, R7)."""

    finished: float = 7 * DAY
    sessions: float = 90 * DAY
    clean_every: float = 60.0


class Limits(_Section, frozen=True, kw_only=True):
    """What a call gets when the request does not say (F7)."""

    timeout: float = 600.0
    idle_timeout: float = 120.0


class Log(_Section, frozen=True, kw_only=True):
    """The daemon's log and the response log (R3)."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    responses: bool = True


class ProviderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every provider has, and in `options` what only its kind knows."""

    kind: str
    models: tuple[str, ...]
    """Patterns of full model names; `*` stands for anything."""
    priority: int = 10
    """The lower is asked first where several serve a model."""
    max_concurrency: int = 4
    enabled: bool = True
    requests_per_minute: int | None = None
    """The provider's own limit, kept on our side."""
    tokens_per_minute: int | None = None
    """Likewise, of input and output tokens."""
    timeout: float | None = None
    """Seconds that one of its turns may take; without it as `[limits] timeout`."""
    idle_timeout: float | None = None
    """Seconds of silence after which a turn is given up; without it as `[limits] idle_timeout`."""
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)


class ModelConfig(_Section, frozen=True, kw_only=True):
    """What is known of one model, `[models."provider/model"]`."""

    fallbacks: tuple[str, ...] = ()
    """Models that answer instead when no provider of this one can (F4), in order."""


Price = Annotated[float, Meta(ge=0, le=1e6)]


class PriceConfig(_Section, frozen=True, kw_only=True):
    """What a model costs, `[prices."provider/model"]`, in US dollars per million tokens. The name may be a pattern."""

    input: Price
    output: Price
    cache_read: Price | None = None
    """Input that came from a cache; without it as `input`."""
    cache_write: Price | None = None
    """Input that was written to one; without it as `input`."""
    cache_write_hour: Price | None = None
    """Input that was written to a cache that keeps it for an hour; without it twice `input`."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. `home` is where relative paths begin."""

    home: Path
    service: Service = Service()
    socket: Socket = Socket()
    store: StoreConfig = StoreConfig()
    queue: Queue = Queue()
    lock: Lock = Lock()
    retry: Retry = Retry()
    breaker: BreakerConfig = BreakerConfig()
    chain: Chain = Chain()
    patterns: Patterns = Patterns()
    session: Session = Session()
    retention: Retention = Retention()
    limits: Limits = Limits()
    log: Log = Log()
    providers: Mapping[str, ProviderConfig] = msgspec.field(default_factory=dict)
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    """How the providers were found that nobody configured."""
    models: Mapping[str, ModelConfig] = msgspec.field(default_factory=dict)
    prices: Mapping[str, PriceConfig] = msgspec.field(default_factory=dict)

    def path(self, relative: str) -> Path:
        """A path of the configuration, seen from the home."""
        return self.home / relative

    def timeout_of(self, provider: str) -> float:
        """Seconds that one turn of a provider may take, where the request does not say."""
        entry = self.providers.get(provider)
        return (entry.timeout if entry is not None else None) or self.limits.timeout

    @property
    def replies(self) -> Literal["v1", "v2"]:
        """The form of replies and pushes for clients that do not say which they read."""
        return self.socket.replies or ("v1" if self.service.version == 1 else "v2")

    @property
    def socket_path(self) -> Path:
        """Where the daemon listens."""
        return self.path(self.socket.path)

    @property
    def run_dir(self) -> Path:
        """Socket, pid file and what else lives as long as the daemon."""
        return self.socket_path.parent

    @property
    def pid_path(self) -> Path:
        """The daemon's pid file."""
        return self.run_dir / "daemon.pid"

    @property
    def clock_path(self) -> Path:
        """The time that the daemon went by, for its next start."""
        return self.path("var/clock.json")

    @property
    def log_dir(self) -> Path:
        """The daemon's log, and `responses/` below it."""
        return self.path("var/logs")


_SECTIONS: dict[str, type[_Section]] = {
    "service": Service,
    "socket": Socket,
    "store": StoreConfig,
    "queue": Queue,
    "lock": Lock,
    "retry": Retry,
    "breaker": BreakerConfig,
    "chain": Chain,
    "patterns": Patterns,
    "session": Session,
    "retention": Retention,
    "limits": Limits,
    "log": Log,
}
_MAY_BE_ZERO = frozenset(
    {
        "service.shutdown_grace",
        "queue.head_start.high",
        "queue.head_start.normal",
        "queue.head_start.low",
        "queue.head_start.background",
        "breaker.rate",
        "chain.max_depth",
        "chain.guard_messages",
        "session.idle_after",
        "session.expire_after",
        "session.history_tokens",
        "session.cache_bytes",
        "retention.finished",
        "retention.sessions",
    }
)
_COMMON_PROVIDER_KEYS = field_names(ProviderConfig) - {"options"}


class _Origin:
    """Says where a wrong setting stands: in the file, in which variable, or among the flags."""

    def __init__(self, file: str, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> None:
        self._file = file
        self._others = {
            name.removeprefix("KSI_").lower().replace("__", ".").replace("-", "_"): f"variable {name}"
            for name in environ
            if name.startswith("KSI_") and "__" in name
        }
        self._others |= {place.replace("-", "_"): "flags" for place in _places(flags or {})}

    def error(self, reason: str, place: str, *, named: bool = False) -> ConfigError:
        """The error for a place; `named` where the reason names it already."""
        setting = place.replace("-", "_").partition("[")[0]
        while setting and setting not in self._others:
            setting = setting.rpartition(".")[0]
        where = self._others.get(setting, self._file)
        return ConfigError(f"{where}: {reason}" if named else f"{where}: {place}: {reason}", place=place)


def _places(tree: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _places(value, f"{within}{key}.")
        else:
            yield f"{within}{key}"


HARMLESS_PARAMETERS = frozenset(
    {"namespace", "db", "protocol", "sentinel_tls", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"}
)
"""Parameters of an address that hold no secret."""


def shown_url(url: str) -> str:
    """An address as it may be printed: without user and password, and with no parameter's value that may be secret."""
    head, mark, parameters = url.partition("?")
    scheme, slashes, rest = head.partition("://")
    # A password may itself hold slashes and @ signs: all up to the last @ goes.
    user, at, place = rest.rpartition("@")
    if not at and "@" in parameters:
        return f"{scheme}{slashes}***"  # a question mark in a password
    shown = f"{scheme}{slashes}{'***@' if at and user else ''}{place.partition('#')[0]}"
    if not mark:
        return shown
    return f"{shown}?{'&'.join(map(_shown_parameter, parameters.partition('#')[0].split('&')))}"


def _shown_parameter(parameter: str) -> str:
    name, sign, _ = parameter.partition("=")
    if not sign:
        return "***"
    return parameter if name in HARMLESS_PARAMETERS else f"{name}=***"


def find_home(explicit: str | None, environ: Mapping[str, str], cwd: Path, package: Path = Path(__file__)) -> Path:
    """The home folder: the explicit one, KSI_HOME, or the nearest folder upward from `cwd` with a ksi.toml.

    Without any of them it is the checkout that `package`, this module's file, belongs to; an installed package has
    none, and the home is in the user's data folder.
    """
    given = explicit or environ.get("KSI_HOME")
    if given:
        return Path(given).expanduser().absolute()
    for folder in (cwd, *cwd.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder
    checkout = package.resolve().parents[2]
    if (checkout / CONFIG_FILE).is_file() and (checkout / "src" / "ksi").is_dir():
        return checkout
    data = environ.get("XDG_DATA_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".local" / "share")
    return Path(data) / "ksi"


def load(
    home: Path,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read the configuration of a home.

    `flags` has sections of keys, as a TOML file would; they win over all else.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), or wrong value; `place` says where,
            and the message whether the file, a variable or a flag has it.
    """
    environ = os.environ if environ is None else environ
    tree = _read_file(home / CONFIG_FILE)
    origin = _Origin(str(home / CONFIG_FILE), environ, flags)
    sources: dict[str, str] = {}
    if "providers" not in tree:
        there = found(environ)
        tree["providers"] = {name: table for name, (table, _) in there.items()}
        sources = {name: source for name, (_, source) in there.items()}
    for variable, setting in _from_environ(environ):
        _merge(tree, setting, f"variable {variable}")
    _merge(tree, flags or {}, "flags")
    known = {*_SECTIONS, "providers", "models", "prices"}
    for name in tree:
        if name not in known:
            raise _unknown(name, known, origin)
    parts: dict[str, Any] = {name: _section(kind, tree.get(name, {}), name, origin) for name, kind in _SECTIONS.items()}
    providers = {name: _provider(name, value, origin) for name, value in _table(tree, "providers", origin).items()}
    models = {
        name: _section(ModelConfig, value, f"models.{name}", origin)
        for name, value in (_table(tree, "models", origin) if "models" in tree else {}).items()
    }
    prices = {
        name: _section(PriceConfig, value, f"prices.{name}", origin)
        for name, value in (_table(tree, "prices", origin) if "prices" in tree else {}).items()
    }
    config = Config(home=home, providers=providers, sources=sources, models=models, prices=prices, **parts)
    _check(config, origin)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", place=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", place=str(path)) from None


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """KSI_QUEUE__LEASE=20 → {"queue": {"lease": 20}}; deeper tables with more double underscores."""
    for variable, text in sorted(environ.items()):
        if variable.startswith("KSI_") and "__" in variable:
            setting = _toml_value(text)
            for name in reversed(variable.removeprefix("KSI_").lower().split("__")):
                setting = {name: setting}
            yield variable, setting


def _toml_value(text: str) -> Any:
    """A variable's text as TOML would read it, else as plain text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(base: dict[str, Any], extra: Mapping[str, Any], source: str, within: str = "") -> None:
    for key, value in extra.items():
        # A variable cannot spell "claude-cli": CLAUDE_CLI means it where it exists.
        name = next((k for k in base if k.replace("-", "_") == key.replace("-", "_")), key)
        if isinstance(value, Mapping):
            node = base.setdefault(name, {})
            if not isinstance(node, dict):
                place = f"{within}{name}"
                raise ConfigError(f"{source}: {place} is a table here and a value in another place", place=place)
            _merge(node, value, source, f"{within}{name}.")
        else:
            base[name] = value


def _table(tree: Mapping[str, Any], name: str, origin: _Origin) -> dict[str, Any]:
    value = tree[name]
    if not isinstance(value, dict):
        raise origin.error("must be a table", name)
    return value


def _section(kind: type[S], value: Any, place: str, origin: _Origin) -> S:
    if not isinstance(value, dict):
        raise origin.error("must be a table", place)
    known = field_names(kind)
    hints = get_type_hints(kind)
    for key, inner in value.items():
        if key not in known:
            raise _unknown(f"{place}.{key}", {f"{place}.{k}" for k in known}, origin)
        if isinstance(inner, dict) and isinstance(hints[key], type) and issubclass(hints[key], _Section):
            _section(hints[key], inner, f"{place}.{key}", origin)
    return _convert(value, kind, place, origin)


def _provider(name: str, value: Any, origin: _Origin) -> ProviderConfig:
    place = f"providers.{name}"
    if not isinstance(value, dict):
        raise origin.error("must be a table", place)
    if not name.replace("-", "").replace("_", "").isalnum():
        raise origin.error("a provider's name is letters, digits, - and _", place)
    common = {k: v for k, v in value.items() if k in _COMMON_PROVIDER_KEYS}
    options = {k: v for k, v in value.items() if k not in _COMMON_PROVIDER_KEYS}
    common.setdefault("models", [f"{name}/*"])
    return _convert({**common, "options": options}, ProviderConfig, place, origin)


def options_of(
    config: ProviderConfig, kind: type[msgspec.Struct], name: str, environ: Mapping[str, str] | None = None
) -> Any:
    """A provider's own options as its type.

    Raises:
        ConfigError: as for every other part.
    """
    origin = _Origin(CONFIG_FILE, environ or {})
    known = field_names(kind) | _COMMON_PROVIDER_KEYS
    for key in config.options:
        if key not in known:
            raise _unknown(f"providers.{name}.{key}", {f"providers.{name}.{k}" for k in known}, origin)
    return _convert(dict(config.options), kind, f"providers.{name}", origin)


def _convert(value: dict[str, Any], kind: type[T], place: str, origin: _Origin) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, path = split_path(str(error))
        where = f"{place}.{path}" if path else place
        raise origin.error(reason, where) from None


def _unknown(name: str, known: set[str], origin: _Origin) -> ConfigError:
    key = name.rpartition(".")[2]
    homes = [f"{section}.{key}" for section, kind in _SECTIONS.items() if key in field_names(kind)]
    misplaced = len(homes) == 1 and not name.startswith("providers.")
    guess = homes[0] if misplaced else nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return origin.error(f"unknown key {name!r}{hint}", name, named=True)


def _check(config: Config, origin: _Origin) -> None:
    """What types cannot say."""
    for place, value in _numbers(config):
        if place in _MAY_BE_ZERO and not value >= 0:
            raise origin.error(f"must be zero or more, not {value}", place)
        if place not in _MAY_BE_ZERO and not value > 0:
            raise origin.error(f"must be above zero, not {value}", place)
        if type(value) is float and value > LONGEST:
            raise origin.error(f"must be no more than {LONGEST:.0f}, not {value}", place)
    _check_breaker(config.breaker, origin)
    _check_store(config, origin)
    for name, model in config.models.items():
        for fallback in (name, *model.fallbacks):
            if "/" not in fallback or "," in fallback or "=" in fallback or not fallback.isprintable():
                raise origin.error(f"{fallback!r} is no model's full name, provider/model", f"models.{name}.fallbacks")
    for name in config.prices:
        if "/" not in name:
            raise origin.error(f"{name!r} is no model's full name, provider/model", f"prices.{name}")
    start = config.queue.head_start
    if not start.high >= start.normal >= start.low >= start.background:
        raise origin.error("must fall from high to background", "queue.head_start")
    if config.retention.sessions < config.retention.finished:
        raise origin.error("must not be shorter than retention.finished", "retention.sessions")


def _check_store(config: Config, origin: _Origin) -> None:
    store = config.store
    if not store.node.isprintable():
        raise origin.error("is a name on one line, of characters that can be seen", "store.node_id")
    if store.shared and store.node_timeout < config.queue.lease:
        reason = f"must not be shorter than queue.lease, which is {config.queue.lease:g}"
        raise origin.error(reason, "store.node_timeout")


def _check_breaker(breaker: BreakerConfig, origin: _Origin) -> None:
    if breaker.rate > 1:
        raise origin.error(f"is a share of 1, not {breaker.rate}", "breaker.rate")
    if breaker.failures > breaker.max_samples:
        reason = f"must not be more than breaker.max_samples, which is {breaker.max_samples}; raise that too"
        raise origin.error(reason, "breaker.failures")


def _numbers(config: Config) -> Iterator[tuple[str, float]]:
    """Every number that is set, with its place; a provider's priority may be any."""
    sections: dict[str, Any] = {name: getattr(config, name) for name in _SECTIONS}
    sections["queue.head_start"] = config.queue.head_start
    sections |= {f"providers.{name}": provider for name, provider in config.providers.items()}
    for section, values in sections.items():
        for key, value in msgspec.structs.asdict(values).items():
            if type(value) in (int, float) and key != "priority":
                yield f"{section}.{key}", value
