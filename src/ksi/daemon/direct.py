"""The daemon of service version 1: completions without a queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from ksi.clock import Chance, SystemClock
from ksi.completion.pool.kinds import build_providers
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.replies import Teller
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Config
from ksi.daemon.presence import Presence
from ksi.direct.dialogues import Dialogues
from ksi.direct.service import DirectService
from ksi.events.reports import (
    HealthReply,
    ReadyReply,
    ShutdownReply,
)
from ksi.host.logs import Log
from ksi.host.pid_file import PidFile, claim_run_dir
from ksi.host.watchdog import Watchdog
from ksi.store.provider_records import HeldRecords
from ksi.transports.direct_handlers import DIRECT_SPECS, direct_handlers
from ksi.transports.unix_socket import UnixSocket

if TYPE_CHECKING:
    pass
from ksi.daemon.parts import bus_of, disk_space_of, dispatcher_of, provider_facts_of, router_of, team_of
from ksi.daemon.served import Served


class DirectDaemon(Served):
    """Service version 1: providers and the door, and nothing between them that keeps or holds anything."""

    def __init__(
        self,
        config: Config,
        clock: SystemClock,
        chance: Chance,
        environ: Mapping[str, str],
        *,
        pid_file: PidFile | None = None,
        log_file: Log | None = None,
    ) -> None:
        """`pid_file` and `log_file` are those of its process, if it has one to itself."""
        self.config = config
        self._log_file = log_file
        self._clock = clock
        self._log = structlog.get_logger("ksi.daemon")
        self._version = version("ksi")
        self._started = None
        self.stopping = asyncio.Event()
        self._space = disk_space_of(config, clock)
        self._built = build_providers(config, environ, clock)
        self._facts = provider_facts_of(config, environ)
        self.bus = bus_of(config, clock)
        can = {name: provider.capabilities for name, provider in self._built.items()}
        enabled = {name: config.providers[name] for name in self._built}
        router = router_of(enabled, config, can, environ)
        team = team_of(config, HeldRecords(), self._built, clock)
        self.providers = ProviderManager(config, self._built, router, self.bus, clock, team)
        dialogues = Dialogues(config.log_dir / "responses", logged=config.log.responses)
        teller = Teller(Prices(config.prices, can))
        self.service = DirectService(self.providers, dialogues, teller, self.bus, config, clock, chance)
        self.socket = UnixSocket(
            config.socket_path,
            config.socket,
            dispatcher_of(config, direct_handlers(self.service, self.bus, self), DIRECT_SPECS, self.bus, clock),
            clock,
            awaits=self.bus.awaits,
            catch_up=self.bus.catch_up,
            on_gone=self._client_gone,
        )
        self._presence = Presence(self.socket, pid_file, clock, self.stopping.set)
        self._watchdog = Watchdog(clock)

    async def start(self) -> None:
        """Start the providers, and at last the door.

        Raises:
            KsiError: a part could not be started; the others are stopped again.
        """
        async with AsyncExitStack() as undo:
            claim_run_dir(self.config.run_dir, self.config.home)
            self.socket.bind()
            undo.push_async_callback(self.socket.stop)
            self._watchdog.start()
            undo.push_async_callback(self._watchdog.stop)
            await self.providers.start()
            undo.push_async_callback(self.providers.stop)
            await self.socket.start()
            self._presence.task.start()
            undo.pop_all()
        self._started = self._clock.now()
        for name, told in self._facts.items():
            self._log.info("provider", provider=name, source=told.source, account=told.account)
        self._log.info("ready", socket=str(self.config.socket_path), service_version=1, pid=os.getpid())

    async def stop(self) -> None:
        """Accept no more, let running requests finish within their grace period, cancel the rest, and close."""
        self._log.info("stopping", running=self.service.running)
        await self._presence.task.stop()
        await self.service.stop(self.config.service.shutdown_grace)
        await self.socket.stop()
        await self.providers.stop()
        await self._watchdog.stop()
        self._log.info("stopped")

    async def _client_gone(self, connection: Any) -> None:
        self.bus.forget(connection)

    def ready(self) -> ReadyReply:
        """`system:ready`."""
        return ReadyReply(ready=self._started is not None and self.service.taking, tasks={})

    async def health(self) -> HealthReply:
        """`system:health`."""
        return self._health(
            [*self.providers.problems(), *self._task_problems(), *([] if self.service.taking else ["stopping"])]
        )

    def ask_to_stop(self) -> ShutdownReply:
        """`system:shutdown`."""
        self.stopping.set()
        grace = self.config.service.shutdown_grace
        return ShutdownReply(stopping=True, running=self.service.running, grace_seconds=grace)
