"""The parts that the configuration alone decides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ksi.clock import Chance, Clock, microseconds
from ksi.completion.pool.routes import Router
from ksi.completion.pool.team import Place, RecordStore, Team
from ksi.completion.upkeep.disk_space import DiskSpace
from ksi.config.found_providers import CONFIGURED, missing
from ksi.config.schema import Config, ProviderConfig
from ksi.errors import ConfigError
from ksi.events.bus import EventBus, Voice
from ksi.events.reports import (
    ProviderFacts,
)
from ksi.events.specs import SPECS, EventSpec
from ksi.providers.accounts import account
from ksi.providers.base import Capabilities, Provider
from ksi.request import HeadStarts
from ksi.store.base import Store
from ksi.store.chains import ChainLimits
from ksi.store.sqlite.checkpoint import LOG_BYTES
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules
from ksi.transports.dispatch import Dispatcher, Handler
from ksi.transports.v1_form import V1_VOICE, V1Form


def router_of(
    enabled: Mapping[str, ProviderConfig], config: Config, can: Mapping[str, Capabilities], environ: Mapping[str, str]
) -> Router:
    """Which providers serve which models."""
    return Router(
        enabled,
        config.models,
        with_mcp={name for name in can if can[name].mcp},
        missing=partial(_missing, config=config, environ=environ),
    )


def _missing(kind: str, config: Config, environ: Mapping[str, str]) -> str | None:
    """Advice for getting models that no provider serves, by the part of the name before the slash."""
    for name, entry in config.providers.items():
        if not entry.enabled and any(pattern.startswith(f"{kind}/") for pattern in entry.models):
            return f"provider {name} serves it, but ksi.toml says `enabled = false` under [providers.{name}]"
    return missing(kind, environ)


def provider_facts_of(config: Config, environ: Mapping[str, str]) -> dict[str, ProviderFacts]:
    """The origin of each provider, and the account it uses."""
    return {
        name: ProviderFacts(source=config.sources.get(name, CONFIGURED), account=account(name, entry, environ))
        for name, entry in config.providers.items()
        if entry.enabled
    }


def bus_of(config: Config, clock: Clock) -> EventBus:
    """The event bus, which writes in the configured form."""
    pushed = [spec.name for spec in SPECS.values() if not spec.incoming]
    return EventBus(clock, V1_VOICE if config.replies == "v1" else Voice(), pushed)


def dispatcher_of(
    config: Config, events: Mapping[str, Handler], specs: Mapping[str, EventSpec], bus: EventBus, clock: Clock
) -> Dispatcher:
    """The dispatcher, which answers in the configured form and in the one that a line asks for."""
    v1 = V1Form(events, specs)
    return Dispatcher(events, clock, specs, v1=v1, default=config.replies, speak=bus.speak)


def disk_space_of(config: Config, clock: Clock) -> DiskSpace:
    """The room on the disks that are written to."""
    database = sqlite_path(config)
    folders = [config.home] if database is None else [config.home, database.parent]
    return DiskSpace(folders, config.store.min_free_bytes, clock)


def sqlite_path(config: Config) -> Path | None:
    """The file of a SQLite store. As in SQLAlchemy: three slashes begin a relative path, four an absolute one."""
    kind, _, rest = config.store.url.partition("://")
    return config.path(rest[1:]) if kind == "sqlite" and rest.startswith("/") and not rest.endswith("/") else None


def build_store(config: Config, chance: Chance, *, log_bytes: int = LOG_BYTES) -> Store:
    """The store that a configuration names; `log_bytes` is how long the log of an SQLite database is from the start.

    Raises:
        ConfigError: an address of no known kind.
    """
    rules = store_rules(config)
    path = sqlite_path(config)
    if path is not None:
        return SqliteStore(path, rules, chance, durability=config.store.durability, log_bytes=log_bytes)
    if config.store.shared:
        return _redis_store(config, chance)
    if config.store.url.partition("://")[0] == "memory":
        raise ConfigError(
            f"store.url: {config.store.shown_url!r}: there is no store in memory. Use sqlite:///path with "
            'store.durability = "normal"; on a RAM disk, such as sqlite:////dev/shm/ksi.db, it vanishes at the reboot',
            place="store.url",
        )
    raise ConfigError(
        f"store.url: {config.store.shown_url!r} is none of sqlite:///path, redis://host, rediss://host, unix:///socket",
        place="store.url",
    )


def team_of(config: Config, store: RecordStore, providers: Mapping[str, Provider], clock: Clock) -> Team:
    """The part that keeps the state of the providers.

    A provider that is asked over the network is the same for all daemons of a store. One that runs processes is judged
    by each machine.
    """
    node = config.store.node if config.store.shared else ""
    places = {
        name: Place(node if one.capabilities.process else "", config.providers[name].max_concurrency)
        for name, one in providers.items()
    }
    return Team(store, places, config.breaker, clock, alone=not config.store.shared)


def _redis_store(config: Config, chance: Chance) -> Store:
    """The store on a server. Its client is loaded only if it is used."""
    from ksi.store.redis.address import Address
    from ksi.store.redis.store import RedisStore

    node = config.store.node
    return RedisStore(
        Address(config.store.url),
        store_rules(config),
        chance,
        daemon=f"{node}:{config.home}",
        node=node,
        lease=microseconds(config.queue.lease),
    )


def store_rules(config: Config) -> StoreRules:
    """The settings that the store depends on."""
    return StoreRules(
        max_queued=config.queue.max_queued,
        lock_expiry=microseconds(config.lock.expiry),
        max_interruptions=config.queue.max_interruptions,
        fail_interrupted=config.queue.on_interrupted == "fail",
        keep_finished=microseconds(config.retention.finished),
        keep_sessions=microseconds(config.retention.sessions),
        node_timeout=microseconds(config.store.node_timeout),
        guard_messages=config.chain.guard_messages,
        fair=config.queue.fair,
        weights={f"agent:{name}": weight for name, weight in config.fairness.weights.items()},
        chain_limits=ChainLimits(
            max_depth=config.chain.max_depth,
            token_budget=config.chain.token_budget,
            time_window=microseconds(config.chain.time_window),
        ),
    )


def _head_starts(config: Config) -> HeadStarts:
    start = config.queue.head_start
    return HeadStarts(
        high=microseconds(start.high),
        normal=microseconds(start.normal),
        low=microseconds(start.low),
        background=microseconds(start.background),
    )
