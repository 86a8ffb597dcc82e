"""One frozen configuration from the file and the environment, read once and checked."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from ksi.config.found_providers import found
from ksi.config.schema import (
    CONFIG_FILE,
    LONGEST,
    Alerts,
    BreakerConfig,
    BudgetConfig,
    Chain,
    Config,
    Fairness,
    Hooks,
    Http,
    Limits,
    Lock,
    Log,
    Loops,
    ModelConfig,
    Patterns,
    PriceConfig,
    ProviderConfig,
    Queue,
    Retention,
    Retry,
    Service,
    Session,
    Socket,
    StoreConfig,
    Traces,
    _Section,
)
from ksi.errors import ConfigError
from ksi.protocol import field_names, nearest, split_path

T = TypeVar("T")


S = TypeVar("S", bound="_Section")


_SECTIONS: dict[str, type[_Section]] = {
    "service": Service,
    "socket": Socket,
    "http": Http,
    "store": StoreConfig,
    "queue": Queue,
    "fairness": Fairness,
    "lock": Lock,
    "retry": Retry,
    "breaker": BreakerConfig,
    "chain": Chain,
    "patterns": Patterns,
    "loops": Loops,
    "traces": Traces,
    "alerts": Alerts,
    "hooks": Hooks,
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
        "loops.repeats",
        "loops.turns",
        "alerts.equal_requests",
        "alerts.spending_factor",
        "traces.sample",
        "session.idle_after",
        "session.expire_after",
        "session.history_tokens",
        "session.cache_bytes",
        "retention.finished",
        "retention.sessions",
        "log.keep",
    }
)
_COMMON_PROVIDER_KEYS = field_names(ProviderConfig) - {"options"}


class _Origin:
    """Says where a wrong setting comes from: the file, a variable, or a flag."""

    def __init__(self, file: str, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> None:
        self._file = file
        self._others = {
            name.removeprefix("KSI_").lower().replace("__", ".").replace("-", "_"): f"variable {name}"
            for name in environ
            if name.startswith("KSI_") and "__" in name
        }
        self._others |= {place.replace("-", "_"): "flags" for place in _places(flags or {})}

    def error(self, reason: str, place: str, *, named: bool = False) -> ConfigError:
        """The error for a place; `named` if the reason already names it."""
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


def find_home(explicit: str | None, environ: Mapping[str, str], cwd: Path, package: Path = Path(__file__)) -> Path:
    """The home folder: the explicit one, KSI_HOME, or the nearest folder upward from `cwd` with a ksi.toml.

    Without any of them it is the checkout that `package`, this module's file, belongs to; an installed package has
    none, and the home is in the user's data folder.

    Raises:
        ConfigError: its name is not UTF-8.
    """
    home = _find_home(explicit, environ, cwd, package)
    if not _is_utf8(str(home)):
        raise ConfigError(
            f"the name of the home {str(home)!a} is not UTF-8, and SQLite cannot open a file there; rename it, or "
            "choose another home by --home or KSI_HOME",
            place="home",
        )
    return home


def _find_home(explicit: str | None, environ: Mapping[str, str], cwd: Path, package: Path) -> Path:
    given = explicit or environ.get("KSI_HOME")
    if given:
        return Path(given).expanduser().absolute()
    for folder in (cwd, *cwd.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder
    checkout = package.resolve().parents[3]
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
    known = {*_SECTIONS, "providers", "models", "prices", "budgets"}
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
    budgets = {
        name: _section(BudgetConfig, value, f"budgets.{name}", origin)
        for name, value in (_table(tree, "budgets", origin) if "budgets" in tree else {}).items()
    }
    config = Config(
        home=home, providers=providers, sources=sources, models=models, prices=prices, budgets=budgets, **parts
    )
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
            if not _is_utf8(variable + text):
                raise ConfigError(f"variable {variable!a}: its text is not UTF-8; set it again", place=variable)
            setting = _toml_value(text)
            for name in reversed(variable.removeprefix("KSI_").lower().split("__")):
                setting = {name: setting}
            yield variable, setting


def _is_utf8(text: str) -> bool:
    """False for bytes of another encoding that the system passed on."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _toml_value(text: str) -> Any:
    """A variable's text as TOML would read it, else as plain text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(base: dict[str, Any], extra: Mapping[str, Any], source: str, within: str = "") -> None:
    for key, value in extra.items():
        # A variable cannot spell "claude-cli": CLAUDE_CLI means it if it exists.
        name = next((k for k in base if k.replace("-", "_") == key.replace("-", "_")), key)
        if isinstance(value, Mapping):
            node = base.setdefault(name, {})
            if not isinstance(node, dict):
                place = f"{within}{name}"
                raise ConfigError(f"{source}: {place} is a table here and a value in another source", place=place)
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
    """Checks that types cannot express."""
    for place, value in _numbers(config):
        if place in _MAY_BE_ZERO and not value >= 0:
            raise origin.error(f"must be zero or more, not {value}", place)
        if place not in _MAY_BE_ZERO and not value > 0:
            raise origin.error(f"must be above zero, not {value}", place)
        if type(value) is float and value > LONGEST:
            raise origin.error(f"must be no more than {LONGEST:.0f}, not {value}", place)
    _check_breaker(config.breaker, origin)
    _check_traces(config.traces, origin)
    _check_store(config, origin)
    _check_budgets(config, origin)
    _check_hooks(config, origin)
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


def _check_budgets(config: Config, origin: _Origin) -> None:
    for name, section in config.budgets.items():
        try:
            section.budget(name)
        except ValueError as error:
            key, reason = error.args
            raise origin.error(reason, f"budgets.{name}.{key}") from None


def _check_hooks(config: Config, origin: _Origin) -> None:
    for event in ("end", "block", "budget", "approval"):
        hook = config.hooks.of(event)
        if isinstance(hook, str) and hook and not hook.startswith(("http://", "https://")):
            reason = "is the address of a webhook, http:// or https://, or a list with the words of a command"
            raise origin.error(reason, f"hooks.on_{event}")


def _check_store(config: Config, origin: _Origin) -> None:
    store = config.store
    if not store.node.isprintable():
        raise origin.error("is a name on one line, of characters that can be seen", "store.node_id")
    if store.shared and store.node_timeout < config.queue.lease:
        reason = f"must not be shorter than queue.lease, which is {config.queue.lease:g}"
        raise origin.error(reason, "store.node_timeout")


def _check_traces(traces: Traces, origin: _Origin) -> None:
    if traces.sample > 1:
        raise origin.error(f"is a share of 1, not {traces.sample}", "traces.sample")


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
