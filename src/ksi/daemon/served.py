"""The answers of daemons of both versions about themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ksi.clock import Moment, SystemClock
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.upkeep.clock_keeper import clock_problem, clock_report
from ksi.completion.upkeep.disk_space import DiskSpace
from ksi.config.schema import Config, Service
from ksi.config.view import shown_values
from ksi.daemon.presence import Presence
from ksi.errors import UnknownModel
from ksi.events.lookups import ConfigReply
from ksi.events.reports import (
    ContextReply,
    DiskHealth,
    HealthReply,
    LogHealth,
    LoopHealth,
    ProviderFacts,
    StartupReply,
    StoreHealth,
)
from ksi.host.logs import Log
from ksi.host.supervise import Supervised
from ksi.host.watchdog import Watchdog
from ksi.providers.base import Provider
from ksi.providers.process import memory_of
from ksi.request import full_model
from ksi.transports.unix_socket import UnixSocket

if TYPE_CHECKING:
    pass


class Served:
    """Reports of a daemon about itself, in any version of its service."""

    config: Config
    socket: UnixSocket
    _clock: SystemClock
    _version: str
    _started: Moment | None
    _built: Mapping[str, Provider]
    _facts: dict[str, ProviderFacts]
    providers: ProviderManager
    _presence: Presence
    _watchdog: Watchdog
    _log_file: Log | None
    _space: DiskSpace

    def tasks(self) -> list[Supervised]:
        """The supervised tasks."""
        return [self._presence.task, *self.socket.tasks(), *self.providers.tasks()]

    def _task_problems(self) -> list[str]:
        """One sentence on each task that has ended, or whose last step failed."""
        ended = [] if self._watchdog.alive else ["thread ksi-watchdog has ended"]
        return ended + [task.problem for task in self.tasks() if task.problem is not None]

    def _tasks_work(self) -> bool:
        """True unless a task has ended, or one fails without which nothing is served."""
        return all(task.well if task.vital else task.alive for task in self.tasks())

    def identity(self) -> dict[str, Any]:
        """The common beginning of every status."""
        now = self._clock.now()
        return {
            "version": self._version,
            "uptime_seconds": (now.mono - self._started.mono) / 1e6 if self._started is not None else 0.0,
        }

    def startup(self) -> StartupReply:
        """`system:startup`."""
        return StartupReply(
            started_at=self._started.unix if self._started is not None else None,
            pid=os.getpid(),
            version=self._version,
            service_version=self.config.service.version,
            socket=str(self.config.socket_path),
        )

    def context(self) -> ContextReply:
        """`system:context`."""
        return ContextReply(
            home=str(self.config.home),
            node=self.config.store.node,
            store=self.config.store.shown_url,
            durability=self.config.store.durability,
            default_model=self.config.service.default_model,
            providers=sorted(self._built),
        )

    def held_config(self) -> ConfigReply:
        """`system:config`: the configuration that this daemon read at its start, without secrets."""
        return ConfigReply(home=str(self.config.home), values=shown_values(self.config))

    def provider_facts(self) -> dict[str, ProviderFacts]:
        """The origin of each provider, and the account it uses, by name."""
        return self._facts

    def _default_model_problems(self) -> list[str]:
        """The reason why requests without a model cannot be served, if the default model was configured."""
        chosen = self.config.service.default_model
        if chosen == Service().default_model:
            return []
        try:
            self.providers.route(full_model(None, chosen))
        except UnknownModel as error:
            return [f"service.default_model: {error.message}"]
        return []

    def _health(self, problems: list[str]) -> HealthReply:
        problems = problems + self._default_model_problems()
        leapt = clock_problem(self._clock, self.config.clock_path)
        problems = problems if leapt is None else [*problems, leapt]
        log = None if self._log_file is None else self._log_file.condition()
        if log is not None and log.problem is not None:
            problems.append(f"{log.problem}; {log.dropped} lines were dropped since the start")
        problems += self._space.problems()
        free, stalls = self._space.free, self._watchdog.stalls
        return HealthReply(
            status="degraded" if problems else "healthy",
            problems=problems,
            providers=self._facts,
            **self.identity(),
            pid=os.getpid(),
            home=str(self.config.home),
            store=StoreHealth(url=self.config.store.shown_url, durability=self.config.store.durability),
            connections=self.socket.connections,
            memory_bytes=memory_of(os.getpid()),
            clock=clock_report(self._clock),
            loop=LoopHealth(
                stalls=stalls.count,
                longest_stall=stalls.longest,
                last_stall=stalls.last,
                last_stall_at=stalls.last_at,
            ),
            log=LogHealth(
                folder=str(self.config.log_dir),
                level=self.config.log.level,
                bytes=None if log is None else log.size,
                dropped=None if log is None else log.dropped,
            ),
            disk=None if free is None else DiskHealth(free_bytes=free),
        )
