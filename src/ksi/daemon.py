"""The only place that builds the parts: one daemon, from its configuration to its orderly end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from ksi.clock import Chance, Clock, Moment, SystemClock, microseconds
from ksi.completion.announcer import Announcer
from ksi.completion.chain_service import ChainService
from ksi.completion.checkpoint import Checkpoints
from ksi.completion.cleaner import Cleaner
from ksi.completion.clock_keeper import ClockKeeper, clock_problem, clock_report, start_clock
from ksi.completion.completion_runner import CompletionRunner
from ksi.completion.completion_service import CompletionService
from ksi.completion.injection_events import InjectionEvents
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.intake import Intake
from ksi.completion.lookups import Lookups
from ksi.completion.prices import Prices
from ksi.completion.provider_kinds import build_providers
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.provider_team import Place, RecordStore, Team
from ksi.completion.queue_manager import QueueManager
from ksi.completion.render import Teller
from ksi.completion.response_log import ResponseLog
from ksi.completion.routes import Router
from ksi.completion.session_manager import SessionManager
from ksi.completion.token_tracker import TokenTracker
from ksi.config import Config, ProviderConfig, Service
from ksi.config_view import shown_values
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.conversation.lock_events import LockEvents
from ksi.direct.dialogues import Dialogues
from ksi.direct.left_behind import left_behind
from ksi.direct.service import DirectService
from ksi.errors import ConfigError, KsiError, StoreError, StoreInUse, UnknownModel
from ksi.event_bus import EventBus, Voice
from ksi.events import SPECS, EventSpec
from ksi.found_providers import CONFIGURED, missing
from ksi.injection.circuit_breakers import ChainBreaker
from ksi.injection.injection_router import InjectionRouter
from ksi.injection.reminders import Templates
from ksi.logs import open_log
from ksi.lookup_types import ConfigReply
from ksi.pid_file import PidFile
from ksi.platforms import raise_file_limit
from ksi.providers.accounts import account
from ksi.providers.base import Capabilities, Provider
from ksi.providers.process import memory_of
from ksi.request import HeadStarts, full_model
from ksi.store.base import Store
from ksi.store.chains import ChainLimits
from ksi.store.memory import MemoryStore
from ksi.store.provider_records import HeldRecords
from ksi.store.sqlite import SqliteStore
from ksi.store.values import StoreRules
from ksi.transports.direct_handlers import DIRECT_SPECS, direct_handlers
from ksi.transports.dispatch import Dispatcher, Handler
from ksi.transports.handlers import handlers
from ksi.transports.unix_socket import UnixSocket
from ksi.transports.v1_form import V1_VOICE, V1Form

if TYPE_CHECKING:
    from ksi.completion.sharing import Sharing

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread gives way; the interpreter's own default is ten times that."""

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_CONFIG = 2
EXIT_IN_USE = 3


class _Served:
    """What a daemon says of itself, whatever its version serves."""

    config: Config
    socket: UnixSocket
    _clock: SystemClock
    _version: str
    _started: Moment | None
    _built: Mapping[str, Provider]
    _facts: dict[str, dict[str, Any]]
    providers: ProviderManager

    def identity(self) -> dict[str, Any]:
        """What every status begins with."""
        now = self._clock.now()
        return {
            "version": self._version,
            "uptime_seconds": (now.mono - self._started.mono) / 1e6 if self._started is not None else 0.0,
        }

    def startup(self) -> dict[str, Any]:
        """`system:startup`."""
        return {
            "started_at": self._started.unix if self._started is not None else None,
            "pid": os.getpid(),
            "version": self._version,
            "service_version": self.config.service.version,
            "socket": str(self.config.socket_path),
        }

    def context(self) -> dict[str, Any]:
        """`system:context`."""
        return {
            "home": str(self.config.home),
            "node": self.config.store.node,
            "store": self.config.store.shown_url,
            "durability": self.config.store.durability,
            "default_model": self.config.service.default_model,
            "providers": sorted(self._built),
        }

    def held_config(self) -> ConfigReply:
        """`system:config`: the configuration that this daemon read at its start, without secrets."""
        return ConfigReply(home=str(self.config.home), values=shown_values(self.config))

    def provider_facts(self) -> dict[str, dict[str, Any]]:
        """Where each provider comes from, and whose account it uses, by name."""
        return self._facts

    def _default_model_problems(self) -> list[str]:
        """What keeps requests from being served that name no model, where somebody chose that model."""
        chosen = self.config.service.default_model
        if chosen == Service().default_model:
            return []
        try:
            self.providers.route(full_model(None, chosen))
        except UnknownModel as error:
            return [f"service.default_model: {error.message}"]
        return []

    def _health(self, problems: list[str]) -> dict[str, Any]:
        problems = problems + self._default_model_problems()
        leapt = clock_problem(self._clock, self.config.clock_path)
        problems = problems if leapt is None else [*problems, leapt]
        return {
            "status": "degraded" if problems else "healthy",
            "problems": problems,
            "providers": self._facts,
            **self.identity(),
            "pid": os.getpid(),
            "home": str(self.config.home),
            "store": {"url": self.config.store.shown_url, "durability": self.config.store.durability},
            "connections": self.socket.connections,
            "memory_bytes": memory_of(os.getpid()),
            "clock": clock_report(self._clock),
            "log": {"folder": str(self.config.log_dir), "level": self.config.log.level},
        }


class Daemon(_Served):
    """All parts, wired. `start` and `stop` take them up and down in order."""

    def __init__(
        self, config: Config, clock: SystemClock, chance: Chance, environ: Mapping[str, str], store: Store | None = None
    ) -> None:
        self.config = config
        self._clock = clock
        self._log = structlog.get_logger("ksi.daemon")
        # Read once: reading it takes the disk, and a descriptor that may not be there when it is asked for.
        self._version = version("ksi")
        self._started: Moment | None = None
        self._ready = False
        self._left_behind: str | None = None
        self._looking: asyncio.Task[None] | None = None
        self.stopping = asyncio.Event()
        head_starts = _head_starts(config)
        self.store = store if store is not None else build_store(config, chance)
        self._built: Mapping[str, Provider] = build_providers(config, environ, clock)
        self._facts = _provider_facts(config, environ)
        self.bus = _bus(config, clock)
        lock_events = LockEvents(self.bus)
        can = {name: provider.capabilities for name, provider in self._built.items()}
        prices = Prices(config.prices, can)
        teller = Teller(prices)
        injection_events = InjectionEvents(self.bus)
        self._responses = ResponseLog(
            self.store,
            config.log_dir / "responses",
            clock,
            enabled=config.log.responses,
            iso=config.replies == "v1",
        )
        announcer = self._announcer = Announcer(
            self.store, teller, self.bus, lock_events, injection_events, self._responses.saved
        )
        enabled = {name: config.providers[name] for name in self._built}
        router = _router(enabled, config, can, environ)
        team = _team(config, self.store, self._built, clock)
        self.providers = ProviderManager(config, self._built, router, self.bus, clock, team, shared=config.store.shared)
        node = config.store.node if config.store.shared else None
        sessions = SessionManager(self.store, config.session, node)
        templates = Templates(config.path("var/templates"))
        breaker = ChainBreaker(config.chain, config.patterns)
        self._injections = InjectionManager(
            self.store,
            self.providers,
            InjectionRouter(templates, breaker, head_starts),
            breaker,
            templates,
            injection_events,
            config,
            clock,
        )
        runner = CompletionRunner(
            self.store, self.providers, sessions, self._injections, announcer, prices, config, clock, chance, node
        )
        self.queue = QueueManager(self.store, self.providers, runner, announcer, lock_events, self.bus, config, clock)
        self._sharing = _sharing(config, self.store, self.queue, announcer, self.providers, team, lock_events, clock)
        completions = CompletionService(
            self.store,
            Intake(head_starts, chance),
            self.queue,
            self.providers,
            sessions,
            teller,
            announcer,
            lock_events,
            self._injections,
            injection_events,
            self.bus,
            config,
            clock,
        )
        lookups = Lookups(self.store)
        chains = ChainService(self.store, self._injections, clock)
        self._locks = ConversationLocks(
            self.store, lock_events, self.bus, head_starts, clock, self.queue.on_due, config.lock.wait_timeout
        )
        self._cleaner = Cleaner(self.store, lock_events, config.retention, clock)
        self._clock_keeper = ClockKeeper(clock, config.clock_path)
        tracker = TokenTracker(self.store, prices, list(can), config.retention, clock)
        checkpoints = Checkpoints(
            self.store, self._responses, config.path("var/checkpoints"), clock, self._version, self._work_came
        )
        events = handlers(completions, lookups, chains, tracker, self._locks, checkpoints, self.bus, self)
        dispatcher = _dispatcher(config, events, SPECS, self.bus, clock)
        self.socket = UnixSocket(
            config.socket_path,
            config.socket,
            dispatcher,
            clock,
            awaits=self.bus.awaits,
            on_gone=self._client_gone,
        )

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, start what works behind it, and at last the door.

        Raises:
            KsiError: what could not be started, undone as far as it went.
        """
        async with AsyncExitStack() as undo:
            _claim_run_dir(self.config.run_dir, self.config.home)
            # Taken first: what cannot be served must not cost a single call to a provider.
            self.socket.bind()
            undo.push_async_callback(self.socket.stop)
            self._clock_keeper.start()
            undo.push_async_callback(self._clock_keeper.stop)
            recovery = await self.store.open(self._clock.now(), self.queue.on_work)
            undo.push_async_callback(self.store.close)
            await self._responses.start()
            undo.push_async_callback(self._responses.stop)
            await self.providers.start()
            undo.push_async_callback(self.providers.stop)
            await self._injections.start()
            undo.push_async_callback(self._injections.stop)
            await self.queue.start(recovery)
            undo.push_async_callback(self.queue.stop, 0.0)
            if self._sharing is not None:
                self._sharing.start()
                undo.push_async_callback(self._sharing.stop)
            self._cleaner.start()
            undo.push_async_callback(self._cleaner.stop)
            await self.socket.start()
            undo.pop_all()
        self._started = self._clock.now()
        self._ready = True
        self._looking = asyncio.create_task(self._look_for_version_1(), name="ksi-version-1")
        for name, told in self._facts.items():
            self._log.info("provider", provider=name, **told)
        self._log.info("ready", socket=str(self.config.socket_path), store=self.config.store.shown_url, pid=os.getpid())

    async def stop(self) -> None:
        """Take no more, let what runs end or give it back, then close in reverse order (R6)."""
        self._ready = False
        self._log.info("stopping", running=len(self.queue.runs))
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._sharing is not None:
            self._sharing.leave_soon()
        await self._cleaner.stop()
        await self.queue.stop(self.config.service.shutdown_grace)
        if self._sharing is not None:
            await self._sharing.stop()
        await self._injections.stop()
        await self._announcer.stopping()
        await self.socket.stop()
        await self.providers.stop()
        await self._responses.stop()
        await self.store.close()
        await self._clock_keeper.stop()
        self._log.info("stopped")

    async def _look_for_version_1(self) -> None:
        """Tell of version 1's conversations that were not brought in."""
        kept = self._clock.now().wall - microseconds(self.config.retention.sessions)
        try:
            found = await left_behind(self.config.log_dir / "responses", self.store, kept)
        except StoreError as error:
            self._log.warning("version 1's session logs were not looked at", error=error.message)
            return
        if found:
            self._left_behind = (
                f"{len(found)} conversations of version 1 in var/logs/responses were not brought in (one is "
                f"{found[0]!r}); stop the daemon, run `ksi migrate`, and start it again"
            )
            self._log.warning(self._left_behind)

    async def _work_came(self) -> None:
        """A checkpoint was loaded: offer its routes, claim what may run, look at what has a time."""
        self.providers.know(await self.store.waiting_by_route())
        self.queue.on_work()
        self.queue.on_due()

    async def _client_gone(self, connection: Any) -> None:
        self.bus.forget(connection)
        try:
            await self._locks.forget(connection)
        except StoreError as error:
            self._log.error("waiters of a gone client stay in their lines", error=error.message)

    # -- what it says of itself -----------------------------------------------------------------------------------

    def ready(self) -> dict[str, Any]:
        """`system:ready`."""
        return {"ready": self._ready and self.queue.claiming, "tasks": self._tasks_alive()}

    def _tasks_alive(self) -> dict[str, bool]:
        return {
            **self.queue.tasks_alive(),
            "ksi-cleaner": self._cleaner.alive,
            "ksi-clock": self._clock_keeper.alive,
            "ksi-responses": self._responses.alive,
            "ksi-injections": self._injections.alive,
            **self.providers.tasks_alive(),
            **({} if self._sharing is None else {"ksi-lease": self._sharing.alive}),
        }

    async def health(self) -> dict[str, Any]:
        """`system:health`."""
        problems = self.providers.problems()
        problems += [f"task {name} has ended" for name, alive in self._tasks_alive().items() if not alive]
        waiting = await self.store.waiting_by_route()
        problems += [
            f"{waiting[route]} requests wait for {route}, which is not configured any more"
            for route in self.providers.orphans(waiting)
        ]
        if self._left_behind is not None:
            problems.append(self._left_behind)
        if not self.queue.claiming:
            problems.append("stopping")
        nodes = None if self._sharing is None else await self._sharing.nodes()
        return {**self._health(problems), **({} if nodes is None else {"node": self.config.store.node, "nodes": nodes})}

    def ask_to_stop(self) -> dict[str, Any]:
        """`system:shutdown`."""
        self.stopping.set()
        return {"stopping": True, "running": len(self.queue.runs), "grace_seconds": self.config.service.shutdown_grace}


class DirectDaemon(_Served):
    """Service version 1: providers and the door, and nothing between them that keeps or holds anything."""

    def __init__(self, config: Config, clock: SystemClock, chance: Chance, environ: Mapping[str, str]) -> None:
        self.config = config
        self._clock = clock
        self._log = structlog.get_logger("ksi.daemon")
        self._version = version("ksi")
        self._started = None
        self.stopping = asyncio.Event()
        self._built = build_providers(config, environ, clock)
        self._facts = _provider_facts(config, environ)
        self.bus = _bus(config, clock)
        can = {name: provider.capabilities for name, provider in self._built.items()}
        enabled = {name: config.providers[name] for name in self._built}
        router = _router(enabled, config, can, environ)
        team = _team(config, HeldRecords(), self._built, clock)
        self.providers = ProviderManager(config, self._built, router, self.bus, clock, team)
        dialogues = Dialogues(config.log_dir / "responses", logged=config.log.responses)
        teller = Teller(Prices(config.prices, can))
        self.service = DirectService(self.providers, dialogues, teller, self.bus, config, clock, chance)
        self.socket = UnixSocket(
            config.socket_path,
            config.socket,
            _dispatcher(config, direct_handlers(self.service, self.bus, self), DIRECT_SPECS, self.bus, clock),
            clock,
            awaits=self.bus.awaits,
            on_gone=self._client_gone,
        )

    async def start(self) -> None:
        """Start the providers, and at last the door.

        Raises:
            KsiError: what could not be started, undone as far as it went.
        """
        async with AsyncExitStack() as undo:
            _claim_run_dir(self.config.run_dir, self.config.home)
            self.socket.bind()
            undo.push_async_callback(self.socket.stop)
            await self.providers.start()
            undo.push_async_callback(self.providers.stop)
            await self.socket.start()
            undo.pop_all()
        self._started = self._clock.now()
        for name, told in self._facts.items():
            self._log.info("provider", provider=name, **told)
        self._log.info("ready", socket=str(self.config.socket_path), service_version=1, pid=os.getpid())

    async def stop(self) -> None:
        """Take no more, let what runs end within its grace, cancel the rest, and close (R6)."""
        self._log.info("stopping", running=self.service.running)
        await self.service.stop(self.config.service.shutdown_grace)
        await self.socket.stop()
        await self.providers.stop()
        self._log.info("stopped")

    async def _client_gone(self, connection: Any) -> None:
        self.bus.forget(connection)

    def ready(self) -> dict[str, Any]:
        """`system:ready`."""
        return {"ready": self._started is not None and self.service.taking, "tasks": {}}

    async def health(self) -> dict[str, Any]:
        """`system:health`."""
        return self._health(self.providers.problems() + ([] if self.service.taking else ["stopping"]))

    def ask_to_stop(self) -> dict[str, Any]:
        """`system:shutdown`."""
        self.stopping.set()
        return {
            "stopping": True,
            "running": self.service.running,
            "grace_seconds": self.config.service.shutdown_grace,
        }


def _router(
    enabled: Mapping[str, ProviderConfig], config: Config, can: Mapping[str, Capabilities], environ: Mapping[str, str]
) -> Router:
    return Router(
        enabled,
        config.models,
        with_mcp={name for name in can if can[name].mcp},
        missing=partial(missing, environ=environ),
    )


def _provider_facts(config: Config, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Where each provider comes from, and whose account it uses."""
    return {
        name: {"source": config.sources.get(name, CONFIGURED), "account": account(name, entry, environ)}
        for name, entry in config.providers.items()
        if entry.enabled
    }


def _bus(config: Config, clock: Clock) -> EventBus:
    """The event bus, which writes in the configured form."""
    return EventBus(clock, V1_VOICE if config.replies == "v1" else Voice())


def _dispatcher(
    config: Config, events: Mapping[str, Handler], specs: Mapping[str, EventSpec], bus: EventBus, clock: Clock
) -> Dispatcher:
    """The dispatcher, which answers in the configured form and in the one that a line asks for."""
    v1 = V1Form(events, specs)
    return Dispatcher(events, clock, specs, v1=v1, default=config.replies, speak=bus.speak)


def build_daemon(
    config: Config, clock: SystemClock, chance: Chance, environ: Mapping[str, str]
) -> Daemon | DirectDaemon:
    """The daemon of the configured service version."""
    kind = DirectDaemon if config.service.version == 1 else Daemon
    return kind(config, clock, chance, environ)


def sqlite_path(config: Config) -> Path | None:
    """The file of a SQLite store. As in SQLAlchemy: three slashes begin a relative path, four an absolute one."""
    kind, _, rest = config.store.url.partition("://")
    return config.path(rest[1:]) if kind == "sqlite" and rest.startswith("/") and not rest.endswith("/") else None


def build_store(config: Config, chance: Chance) -> Store:
    """The store that a configuration names.

    Raises:
        ConfigError: an address of no known kind.
    """
    rules = store_rules(config)
    if config.store.url.partition("://")[0] == "memory":
        return MemoryStore(rules, chance)
    path = sqlite_path(config)
    if path is not None:
        return SqliteStore(path, rules, chance, durability=config.store.durability)
    if config.store.shared:
        return _redis_store(config, chance)
    raise ConfigError(
        f"store.url: {config.store.shown_url!r} is none of memory://, sqlite:///path, redis://host, rediss://host, "
        "unix:///socket",
        place="store.url",
    )


def _sharing(
    config: Config,
    store: Store,
    queue: QueueManager,
    announcer: Announcer,
    providers: ProviderManager,
    team: Team,
    locks: LockEvents,
    clock: Clock,
) -> Sharing | None:
    """What a store that others use too asks of its daemon; nothing where it has the store for itself."""
    if not config.store.shared:
        return None
    from ksi.completion.sharing import Sharing
    from ksi.store.redis import RedisStore

    if not isinstance(store, RedisStore):
        return None
    return Sharing(store, queue, announcer, providers, team, locks, clock, config.queue.lease)


def _team(config: Config, store: RecordStore, providers: Mapping[str, Provider], clock: Clock) -> Team:
    """Who knows what of the providers.

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
    """The store on a server. Its client is only loaded where it is used."""
    from ksi.store.redis import RedisStore
    from ksi.store.redis_address import Address

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
    """What of a configuration the store goes by."""
    return StoreRules(
        max_queued=config.queue.max_queued,
        lock_expiry=microseconds(config.lock.expiry),
        max_interruptions=config.queue.max_interruptions,
        fail_interrupted=config.queue.on_interrupted == "fail",
        keep_finished=microseconds(config.retention.finished),
        keep_sessions=microseconds(config.retention.sessions),
        node_timeout=microseconds(config.store.node_timeout),
        guard_messages=config.chain.guard_messages,
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


def _claim_run_dir(folder: Path, home: Path) -> None:
    """Make the folder of socket and pid file, for this user only (S2)."""
    try:
        made = not folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made or folder.is_relative_to(home):
            # A folder that others share stays as it is: the socket's own mode and the peer's user are checked anyhow.
            folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror}; make it writable or choose another home", place=str(folder)
        ) from None


def run(config: Config, *, say: Callable[[str], None] = print) -> int:
    """Serve until SIGTERM, SIGINT or `system:shutdown`; returns the exit code. Says one line when ready."""
    try:
        _claim_run_dir(config.run_dir, config.home)
        open_log(config.log_dir / "daemon.log", config.log.level)
        pid_file = PidFile(config.pid_path)
        pid_file.take()
    except KsiError as error:
        print(f"ksi: {error.message}", file=sys.stderr)
        return _exit_code(error)
    raise_file_limit()
    try:
        return uvloop.run(_serve(config, say))
    except KsiError as error:
        structlog.get_logger("ksi.daemon").error("not started", error=error.message, code=error.code)
        print(f"ksi: {error.message}", file=sys.stderr)
        return _exit_code(error)
    finally:
        pid_file.release()


def _exit_code(error: KsiError) -> int:
    if isinstance(error, ConfigError):
        return EXIT_CONFIG
    return EXIT_IN_USE if isinstance(error, StoreInUse) else EXIT_FAULT


async def _serve(config: Config, say: Callable[[str], None]) -> int:
    daemon = build_daemon(config, start_clock(config.clock_path), Chance(), dict(os.environ))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, daemon.stopping.set)
    await daemon.start()
    _spare_the_collector()
    # The threads behind the loop (response log, checkpoints, reports) must not keep it waiting for the interpreter.
    sys.setswitchinterval(SWITCH_INTERVAL)
    say(f"ksi is ready on {config.socket_path} (pid {os.getpid()}, home {config.home})")
    tell_systemd("READY=1")
    await daemon.stopping.wait()
    tell_systemd("STOPPING=1")
    await daemon.stop()
    return EXIT_OK


def tell_systemd(state: str) -> None:
    """Send a word to the service manager, where it asked for it (sd_notify). One that does not listen stops nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            structlog.get_logger("ksi.daemon").warning("service manager not told", state=state, error=str(error))


def _spare_the_collector() -> None:
    """What was built at the start lives to the end: do not look at it again, and look at the rest less often.

    A request leaves no cycles behind, so the collector finds next to nothing; by default it took a seventh of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
