"""The only place that builds the parts, and their life."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from ksi.clock import Chance, Clock, Moment, SystemClock, microseconds
from ksi.completion.approval.gate import ApprovalGate
from ksi.completion.approval.news import ApprovalNews
from ksi.completion.approval.service import ApprovalService
from ksi.completion.budget.book import BudgetBook
from ksi.completion.budget.service import BudgetService
from ksi.completion.chain_service import ChainService
from ksi.completion.children.lending import Lending
from ksi.completion.completion_runner import CompletionRunner
from ksi.completion.completion_service import CompletionService
from ksi.completion.conversations import Conversations
from ksi.completion.entry import Entry
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.intake import Intake
from ksi.completion.judge import Judge
from ksi.completion.lookups import Lookups
from ksi.completion.new_requests import NewRequests
from ksi.completion.notify.agent_loops import LoopTeller
from ksi.completion.notify.alerts import Alerts
from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.pause.service import PauseService
from ksi.completion.pool.kinds import build_providers
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.completion.replies import Teller
from ksi.completion.reports import Reports
from ksi.completion.session_manager import SessionManager
from ksi.completion.token_tracker import TokenTracker
from ksi.completion.upkeep.checkpoint import Checkpoints
from ksi.completion.upkeep.cleaner import Cleaner
from ksi.completion.upkeep.clock_keeper import ClockKeeper
from ksi.completion.upkeep.queue_trend import QueueTrend
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.completion.upkeep.sharing import Sharing
from ksi.completion.upkeep.waiting_count import WaitingCount
from ksi.completion.usage.prices import Prices
from ksi.completion.usage.tallies import Tallies
from ksi.config.schema import Config
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.conversation.lock_events import LockEvents
from ksi.daemon.presence import Presence
from ksi.direct.left_behind import left_behind
from ksi.errors import ConfigError, StoreError
from ksi.events.bus import EventBus
from ksi.events.reports import (
    HealthReply,
    NodeReport,
    ReadyReply,
    ResponsesHealth,
    ShutdownReply,
)
from ksi.events.specs import SPECS
from ksi.host.logs import Log
from ksi.host.pid_file import PidFile, claim_run_dir
from ksi.host.supervise import Supervised
from ksi.host.watchdog import Watchdog
from ksi.http.token_service import TokenService
from ksi.injection.circuit_breakers import ChainBreaker
from ksi.injection.injection_router import InjectionRouter
from ksi.injection.reminders import Templates
from ksi.injection.vectors.encoder import Encoder
from ksi.providers.base import Capabilities, Provider, StartingProvider
from ksi.providers.process import ProcessRegistry
from ksi.store.base import Store
from ksi.store.provider_records import KeptRecords
from ksi.store.snapshot.move import sweep_moves
from ksi.transports.dispatch import Handler
from ksi.transports.handlers import handlers
from ksi.transports.unix_socket import UnixSocket

if TYPE_CHECKING:
    from ksi.completion.hooks.hooks import Hooks
    from ksi.completion.trace.traces import Traces
    from ksi.daemon.programs import Programs
    from ksi.http.metrics import Gathered
    from ksi.http.server import HttpServer
from ksi.daemon.direct import DirectDaemon
from ksi.daemon.parts import (
    _head_starts,
    build_store,
    bus_of,
    disk_space_of,
    dispatcher_of,
    provider_facts_of,
    router_of,
    team_of,
)
from ksi.daemon.served import Served

FORGET_AGAIN = 1.0
"""Seconds between two tries to remove a disconnected client's waiters from their queues after a store error."""


class Daemon(Served):
    """All parts, wired. `start` and `stop` take them up and down in order."""

    _left_behind: str | None = None
    _looking: asyncio.Task[None] | None = None
    _started: Moment | None = None
    _ready = False

    def __init__(
        self,
        config: Config,
        clock: SystemClock,
        chance: Chance,
        environ: Mapping[str, str],
        store: Store | None = None,
        *,
        pid_file: PidFile | None = None,
        log_file: Log | None = None,
    ) -> None:
        """`pid_file` and `log_file` are those of its process, if it has one to itself."""
        self.config = config
        self._log_file = log_file
        self._clock = clock
        self._log = structlog.get_logger("ksi.daemon")
        # Read once: reading it takes the disk, and a descriptor that may not be there when it is asked for.
        self._version = version("ksi")
        self.stopping = asyncio.Event()
        self._space = disk_space_of(config, clock)
        head_starts = _head_starts(config)
        self.store = store if store is not None else build_store(config, chance)
        self._built: Mapping[str, Provider] = build_providers(config, environ, clock)
        self._facts = provider_facts_of(config, environ)
        self.bus = bus_of(config, clock)
        lock_events = self._lock_events = LockEvents(self.bus)
        can = {name: provider.capabilities for name, provider in self._built.items()}
        prices = Prices(config.prices, can)
        teller = Teller(prices)
        book = _budget_book(config, prices, can, self.bus, clock)
        injection_events = self._injection_events = InjectionEvents(self.bus)
        self._responses = ResponseLog(
            self.store,
            config.log_dir / "responses",
            clock,
            enabled=config.log.responses,
            iso=config.replies == "v1",
        )
        announcer = self._announcer = Announcer(
            self.store, teller, self.bus, lock_events, injection_events, self._responses.saved, clock
        )
        team = team_of(config, self.store, self._built, clock)
        self.providers = ProviderManager(
            config,
            self._built,
            router_of({name: config.providers[name] for name in self._built}, config, can, environ),
            self.bus,
            clock,
            team,
            shared=config.store.shared,
        )
        sessions = SessionManager(self.store, config.session, config.store.home_node)
        templates = Templates(config.path("var/templates"))
        breaker, self._judge = ChainBreaker(config.chain, config.patterns), _judge(config, self.store, clock)
        approval_news = ApprovalNews(self.store, self.bus, self._time_came)
        self._injections = InjectionManager(
            self.store,
            self.providers,
            InjectionRouter(templates, breaker, head_starts),
            breaker,
            templates,
            ApprovalGate(self.store, prices, list(can), config.chain, clock),
            approval_news,
            injection_events,
            book,
            config,
            clock,
            _encoder(config, clock),
            self._judge,
        )
        (self._alerts, self._loops), self._hooks, self._tallies, self._traces = (
            _alerts(config, self.store, prices, self.bus, clock),
            _hooks(config, self.store, book, teller, environ, chance, clock),
            Tallies(prices),
            self._begin_traces(injection_events, announcer),
        )
        runner = CompletionRunner(
            self.store,
            self.providers,
            sessions,
            self._injections,
            announcer,
            prices,
            self._loops,
            book,
            self._tallies,
            self._traces,
            approval_news,
            config,
            clock,
            chance,
            config.store.home_node,
        )
        self.queue = QueueManager(
            self.store, self.providers, runner, announcer, lock_events, self.bus, book, config, clock
        )
        self._sharing = (
            None
            if (shared := self.store.shared) is None
            else Sharing(shared, self.queue, announcer, self.providers, team, lock_events, clock, config.queue.lease)
        )
        self._pauses = PauseService(self.store, self.providers, self.queue, self.bus, clock, shared=config.store.shared)
        self._budgets = BudgetService(self.store, book, prices, self.queue.budgets_changed, clock)
        self._tokens = TokenService(self.store, self._budgets, config.run_dir / "token", clock)
        team.on_records = self._hear_records
        completions = self._completions = CompletionService(
            self.store,
            NewRequests(
                Intake(head_starts, chance),
                self.providers,
                sessions,
                self._injections,
                book,
                config,
                clock,
                self._traces,
            ),
            Entry(
                self.store,
                self.queue,
                self.providers,
                announcer,
                lock_events,
                injection_events,
                approval_news,
                self._space,
                book,
                clock,
            ),
            self.queue,
            self.providers,
            teller,
            announcer,
            lock_events,
            injection_events,
            book,
            self.bus,
            clock,
        )
        self._locks = ConversationLocks(
            self.store, lock_events, self.bus, head_starts, clock, self.queue.on_due, config.lock.wait_timeout
        )
        self._cleaner = Cleaner(self.store, lock_events, self._responses, config.retention, clock)
        self._trend = QueueTrend(self.store, WaitingCount(self.store, clock), clock)
        self._clock_keeper = ClockKeeper(clock, config.clock_path)
        tracker = TokenTracker(self.store, prices, list(can), config.retention, clock)
        checkpoints = self._checkpoints = Checkpoints(
            self.store,
            self._responses,
            config.path("var/checkpoints"),
            clock,
            self._version,
            self.queue.still,
            self._work_came,
        )
        approvals = ApprovalService(
            self.store, announcer, lock_events, injection_events, approval_news, self.queue.on_due, clock
        )
        conversations = Conversations(
            self.store,
            sessions,
            self._responses,
            checkpoints,
            self._built,
            self.bus,
            clock,
            shared=config.store.shared,
        )
        events = handlers(
            completions,
            Reports(self.store, self.queue, sessions, config, clock),
            self.providers,
            Lookups(self.store),
            conversations,
            ChainService(self.store, self._injections, clock),
            approvals,
            tracker,
            self._locks,
            checkpoints,
            self._pauses,
            self._trend,
            self._budgets,
            self._tokens,
            self.bus,
            self,
        )
        self._programs = self._guard_programs(
            completions, announcer, lending := Lending(self.providers, self.queue.runs, clock), chance
        )
        self.socket = UnixSocket(
            config.socket_path,
            config.socket,
            dispatcher_of(
                config, events if self._programs is None else self._programs.guarded(events), SPECS, self.bus, clock
            ),
            clock,
            awaits=self.bus.awaits,
            catch_up=self.bus.catch_up,
            on_come=None if self._programs is None else self._programs.came,
            on_gone=self._client_gone,
        )
        self.http = self._http_door(
            completions, conversations, announcer, tracker, approvals, runner, events, lending, chance
        )
        self._presence, self._watchdog = (
            Presence(self.socket, pid_file, clock, self.stopping.set, self.store.condition),
            Watchdog(clock, None if shared is None else shared.lease),
        )

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, start the tasks behind it, and finally the socket.

        Raises:
            KsiError: a part could not be started; the others are stopped again.
        """
        async with AsyncExitStack() as undo:
            claim_run_dir(self.config.run_dir, self.config.home)
            # Taken first: a socket that cannot be bound must not cost a single call to a provider.
            self.socket.bind()
            undo.push_async_callback(self.socket.stop)
            self._sweep()
            self._watchdog.start()
            undo.push_async_callback(self._watchdog.stop)
            self._clock_keeper.start()
            undo.push_async_callback(self._clock_keeper.stop)
            recovery = await self.store.open(self._clock.now(), self.queue.on_work)
            undo.push_async_callback(self.store.close)
            await self._responses.start()
            undo.push_async_callback(self._responses.stop)
            if self._traces is not None:
                self._traces.task.start()
                undo.push_async_callback(self._traces.stop)
            await self.providers.start()
            undo.push_async_callback(self.providers.stop)
            await self._budgets.start()
            await self._injections.start()
            undo.push_async_callback(self._injections.stop)
            if self._judge is not None:
                self._judge.start(self._completions.ask_for_guard)
                undo.push_async_callback(self._judge.task.stop)
            await self.queue.start(recovery)
            undo.push_async_callback(self.queue.stop, 0.0)
            if self._sharing is not None:
                self._sharing.start()
                undo.push_async_callback(self._sharing.stop)
            if self._hooks is not None:
                self._hooks.task.start()
                undo.push_async_callback(self._hooks.stop)
            self._cleaner.task.start()
            undo.push_async_callback(self._cleaner.task.stop)
            self._trend.task.start()
            undo.push_async_callback(self._trend.task.stop)
            await self.socket.start()
            if self.http is not None:
                await self.http.start()
                undo.push_async_callback(self.http.stop)
            else:
                (self.config.run_dir / "http.json").unlink(missing_ok=True)
            self._presence.task.start()
            undo.pop_all()
        self._started = self._clock.now()
        self._ready = True
        self._looking = asyncio.create_task(self._look_for_version_1(), name="ksi-version-1")
        for name, told in self._facts.items():
            self._log.info("provider", provider=name, source=told.source, account=told.account)
        self._log.info(
            "ready",
            socket=str(self.config.socket_path),
            http=self.http.url if self.http is not None else None,
            store=self.config.store.shown_url,
            pid=os.getpid(),
        )

    async def stop(self) -> None:
        """Accept no more, let running requests end or requeue them, then close in reverse order."""
        self._ready = False
        self._log.info("stopping", running=len(self.queue.runs))
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._sharing is not None:
            self._sharing.leave_soon()
        await self._presence.task.stop()
        if self._hooks is not None:
            await self._hooks.stop()
        await self._cleaner.task.stop()
        await self._trend.task.stop()
        if self._judge is not None:
            await self._judge.task.stop()
        await self.queue.stop(self.config.service.shutdown_grace)
        if self._sharing is not None:
            await self._sharing.stop()
        await self._injections.stop()
        await self._announcer.stopping()
        if self.http is not None:
            await self.http.stop()
        await self.socket.stop()
        await self.providers.stop()
        await self._responses.stop()
        if self._traces is not None:
            await self._traces.stop()
        await self._watchdog.stop()
        await self.store.close()
        await self._clock_keeper.stop()
        self._log.info("stopped")

    def _sweep(self) -> None:
        """Remove the files of killed checkpoints and moves: each has all prompts."""
        try:
            swept = self._checkpoints.sweep() + sweep_moves(self.config.run_dir)
        except OSError as error:
            self._log.warning("unfinished checkpoints were not taken away", error=str(error))
            return
        if swept:
            self._log.warning("unfinished checkpoints were taken away", paths=[str(path) for path in swept])

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

    def _time_came(self) -> None:
        """Something has a time at which it ends."""
        self.queue.on_due()

    async def _work_came(self) -> None:
        """A checkpoint was loaded: apply its providers and pauses, offer its routes, check due times."""
        await self.providers.refresh()
        self.providers.know(await self.store.waiting_by_route())
        self.queue.on_work()
        self.queue.on_due()

    def _guard_programs(
        self, completions: CompletionService, announcer: Announcer, lending: Lending, chance: Chance
    ) -> Programs | None:
        """What limits the programs of agents; None where no provider has such agents."""
        starting = [provider for provider in self._built.values() if isinstance(provider, StartingProvider)]
        if not starting:
            return None
        from ksi.daemon.programs import Programs
        from ksi.http.own import Ownership

        return Programs(
            starting,
            Ownership(self.store, completions),
            completions,
            announcer,
            self.store,
            self.queue.runs,
            lending,
            self.config.chain,
            self._clock,
            chance,
        )

    def _http_door(
        self,
        completions: CompletionService,
        conversations: Conversations,
        announcer: Announcer,
        tracker: TokenTracker,
        approvals: ApprovalService,
        runner: CompletionRunner,
        events: Mapping[str, Handler],
        lending: Lending,
        chance: Chance,
    ) -> HttpServer | None:
        """The HTTP interface; None if it is turned off. The tools that runs get need none."""
        config, clock = self.config, self._clock
        with_tools = any(provider.capabilities.own_tools for provider in self._built.values())
        if not config.http.listen and not with_tools:
            return None
        from ksi.http.chat import ChatDoor
        from ksi.http.doors import Doors
        from ksi.http.event_stream import EventStreams
        from ksi.http.events_door import EventsDoor
        from ksi.http.mcp.door import McpDoor
        from ksi.http.mcp.run_tools import RunTools
        from ksi.http.messages import MessagesDoor
        from ksi.http.metrics import Metrics, MetricsDoor
        from ksi.http.models import ModelsDoor
        from ksi.http.own import Ownership
        from ksi.http.page.door import PageDoor
        from ksi.http.page.sessions import PageSessions
        from ksi.http.responses import ResponsesDoor
        from ksi.http.server import HttpServer

        tokens = self._tokens.tokens
        own = Ownership(self.store, completions)
        doors = Doors(
            completions=completions,
            announcer=announcer,
            conversations=conversations,
            locks=self._locks,
            tracker=tracker,
            approvals=approvals,
            budgets=self._budgets,
            store=self.store,
            health=self.health,
            version=self._version,
            config=config,
            clock=clock,
            chance=chance,
        )
        if with_tools:
            self.queue.on_end = lending.look
            runner.tools = RunTools(doors, own, lending).server
        if not config.http.listen:
            return None
        streams = EventStreams(clock, config.socket.max_backlog, self._client_gone)
        natives = EventsDoor(events, completions.wait, self.bus, own, tokens, streams, clock, chance)
        page = PageDoor(PageSessions(tokens, clock))
        serving = (
            MessagesDoor(doors),
            ChatDoor(doors),
            ResponsesDoor(doors),
            ModelsDoor(config),
            McpDoor(doors, own),
            MetricsDoor(self._gather(), Metrics(self._tallies, self._injection_events)),
            natives,
            page,
        )
        routes = [route for door in serving for route in door.routes()]
        return HttpServer(
            config.http, config.run_dir, routes, tokens, own.check_http, page.find(tokens), streams, clock
        )

    def _begin_traces(self, injections: InjectionEvents, announcer: Announcer) -> Traces | None:
        """The part that makes spans and sends them; None if no endpoint is configured."""
        config = self.config.traces
        if not config.endpoint:
            return None
        from ksi.completion.trace.otlp import OtlpSink
        from ksi.completion.trace.traces import Traces

        kinds = {name: self.config.providers[name].kind for name in self._built}
        traces = Traces(self.store, config, kinds, OtlpSink(config, self._version), self._clock)
        announcer.on_end, injections.on_end = traces.ended, traces.delivered
        return traces

    def _gather(self) -> Callable[[], Awaitable[Gathered]]:
        """The source of a moment's figures for metrics."""
        from ksi.http.metrics import Gathered

        async def gather() -> Gathered:
            health = await self.health()
            return Gathered(
                version=self._version,
                store=self.config.store.url.partition(":")[0],
                max_queued=self.config.queue.max_queued,
                started_at=0.0 if self._started is None else self._started.unix,
                health=health,
                ready=self.ready(),
                waiting=await self._trend.waiting.now(),
                routes=await self.store.waiting_by_route(),
                totals=await self.store.totals(),
                providers=self.providers.report(),
                running=Counter(run.claim.provider for run in self.queue.runs.values()),
                paused=Counter(pause.scope for pause in self._pauses.shown()),
                draining=self.queue.draining,
                lapses=self._lock_events.lapses,
                condition=self.store.condition(),
                lag=(self._watchdog.asked, self._watchdog.late),
            )

        return gather

    def _hear_records(self, found: KeptRecords) -> None:
        self._pauses.hear(found)
        self._budgets.hear(found)
        self._tokens.hear(found)

    async def _client_gone(self, connection: Any) -> None:
        self.bus.forget(connection)
        if self._programs is not None:
            self._programs.gone(connection)
        self._announcer.forget(connection)
        while True:
            try:
                await self._locks.forget(connection)
                return
            except StoreError as error:
                self._log.error("waiters of a disconnected client stay in their queues", error=error.message)
            if not self._ready:
                return
            await self._clock.sleep(FORGET_AGAIN)

    # -- reports about itself -------------------------------------------------------------------------------------

    def ready(self) -> ReadyReply:
        """`system:ready`."""
        able = self._ready and self.queue.claiming and self._tasks_work()
        able = able and self.store.condition().serving and self._space.enough
        return ReadyReply(ready=able, tasks={task.name: task.well for task in self.tasks()})

    def tasks(self) -> list[Supervised]:
        """The supervised tasks."""
        return [
            *self.queue.tasks(),
            *super().tasks(),
            self._injections.task,
            self._cleaner.task,
            self._trend.task,
            self._responses.task,
            self._clock_keeper.task,
            *([] if self._judge is None else [self._judge.task]),
            *([] if self._hooks is None else [self._hooks.task]),
            *([] if self._sharing is None else [self._sharing.task]),
            *([] if self.http is None else [self.http.task]),
            *([] if self._traces is None else [self._traces.task]),
        ]

    async def health(self) -> HealthReply:
        """`system:health`."""
        condition = self.store.condition()
        problems = [*condition.problems, *self._pauses.problems(), *self.providers.problems(), *self._task_problems()]
        problems += self.queue.problems()
        problems += await self._orphans()
        problems += self._loops.problems(self._clock.now()) + self._alerts.problems()
        problems += [] if self._hooks is None else self._hooks.problems()
        problems += self._injections.problems()
        if not self.queue.claiming:
            problems.append("stopping")
        if self._left_behind is not None:
            problems.append(self._left_behind)
        if self.http is not None and self.http.problem is not None:
            problems.append(self.http.problem)
        if self._traces is not None and self._traces.problem is not None:
            problems.append(self._traces.problem)
        reply = self._health(problems)
        reply.store.database_bytes, reply.store.log_bytes = condition.database_bytes, condition.log_bytes
        if self._responses.size is not None:
            files, size = self._responses.size
            reply.responses = ResponsesHealth(files=files, bytes=size)
        if self._sharing is not None:
            reply.node, reply.nodes = self.config.store.node, await self._nodes(self._sharing)
        return reply

    async def _orphans(self) -> list[str]:
        """Requests that wait for models that are not configured any more. A store that cannot be read is reported as
        such."""
        try:
            waiting = await self.store.waiting_by_route()
        except StoreError as error:
            return [f"the queue cannot be read: {error.message}"]
        return [
            f"{waiting[route]} requests wait for {route}, which is not configured any more"
            for route in self.providers.orphans(waiting)
        ]

    async def _nodes(self, sharing: Sharing) -> list[NodeReport] | None:
        """The machines that share the store; None while it cannot be asked."""
        try:
            return await sharing.nodes()
        except StoreError:
            return None

    def ask_to_stop(self) -> ShutdownReply:
        """`system:shutdown`."""
        self.stopping.set()
        grace = self.config.service.shutdown_grace
        return ShutdownReply(stopping=True, running=len(self.queue.runs), grace_seconds=grace)


def _budget_book(
    config: Config, prices: Prices, can: Mapping[str, Capabilities], bus: EventBus, clock: Clock
) -> BudgetBook:
    configured = [section.budget(name) for name, section in config.budgets.items()]
    return BudgetBook(configured, prices, can, bus, clock)


def _alerts(config: Config, store: Store, prices: Prices, bus: EventBus, clock: Clock) -> tuple[Alerts, LoopTeller]:
    """The part that reports agents that do something unusual."""
    alerts = Alerts(config.alerts, store, prices, bus, clock)
    return alerts, LoopTeller(config.loops, prices, bus, alerts.completed)


def _hooks(
    config: Config,
    store: Store,
    book: BudgetBook,
    teller: Teller,
    environ: Mapping[str, str],
    chance: Chance,
    clock: Clock,
) -> Hooks | None:
    """The part that calls commands and webhooks; None if there is no hook.

    Raises:
        ConfigError: the secret that signs webhooks cannot be used.
    """
    if not config.hooks.any:
        return None
    from ksi.completion.hooks.delivery import key_of
    from ksi.completion.hooks.hooks import Hooks

    secret = environ.get(config.hooks.secret_env)
    try:
        key = key_of(secret) if secret else None
    except ValueError as error:
        raise ConfigError(f"variable {config.hooks.secret_env}: {error}", place="hooks.secret_env") from None
    # A daemon that has its store for itself resumes its earlier deliveries at once; otherwise the lease decides.
    owner = chance.identifier(config.store.node, clock.now()) if config.store.shared else "alone"
    return Hooks(config.hooks, store, book, teller, config.path("var/hooks/dead.jsonl"), owner, key, clock)


def build_daemon(
    config: Config,
    clock: SystemClock,
    chance: Chance,
    environ: Mapping[str, str],
    *,
    pid_file: PidFile | None = None,
    log_file: Log | None = None,
) -> Daemon | DirectDaemon:
    """The daemon of the configured service version."""
    kind = DirectDaemon if config.service.version == 1 else Daemon
    return kind(config, clock, chance, environ, pid_file=pid_file, log_file=log_file)


def _encoder(config: Config, clock: Clock) -> Encoder | None:
    """The part that makes sentence vectors; None if they are not wanted."""
    if not config.patterns.enabled or not config.patterns.vectors:
        return None
    return Encoder(ProcessRegistry(config.path("var/run/vectors")), clock)


def _judge(config: Config, store: Store, clock: Clock) -> Judge | None:
    """The part that asks a model about chains; None if no model is named."""
    patterns = config.patterns
    if not patterns.enabled or not patterns.judge or not patterns.judge_questions:
        return None
    return Judge(store, patterns.judge, patterns.judge_questions, clock)
