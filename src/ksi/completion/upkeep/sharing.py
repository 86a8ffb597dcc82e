"""Several daemons share a store: this task renews our lease and brings the other daemons' news here."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import islice
from typing import Any

import structlog

from ksi.clock import Clock, to_seconds
from ksi.completion.completion_runner import Stop
from ksi.completion.notify.announcer import Announcer
from ksi.completion.pool.team import Team
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.events.reports import NodeReport
from ksi.host.supervise import Periodic
from ksi.store.base import SharedStore
from ksi.store.news import Kind, News

LOOK = 500
"""Requests that one look for missed news asks for."""

RENEWALS = 3
"""A lease is renewed so many times within its duration."""


class Sharing:
    """One task, `ksi-lease`, and one for each piece of news that has to be looked up."""

    def __init__(
        self,
        store: SharedStore,
        queue: QueueManager,
        announcer: Announcer,
        providers: ProviderManager,
        team: Team,
        locks: LockEvents,
        clock: Clock,
        lease: float,
    ) -> None:
        self._store = store
        self._queue = queue
        self._announcer = announcer
        self._providers = providers
        self._team = team
        self._locks = locks
        self._clock = clock
        pause = lease / RENEWALS
        self.task = Periodic("ksi-lease", self.renew, pause, clock, longest_pause=pause, vital=True)
        self._looking: set[asyncio.Task[None]] = set()
        self._looked = 0
        self._log = structlog.get_logger("ksi.sharing")
        store.on_news = self.on_news
        team.on_change = self._look_for_work

    def start(self) -> None:
        """Begin to renew."""
        self.task.start()

    def leave_soon(self) -> None:
        """Stop. A server that is away must not delay the stop: other daemons take over the work that is left."""
        self._store.begin_shutdown()

    async def stop(self) -> None:
        """Renew no more."""
        await self.task.stop()
        await asyncio.gather(*self._looking, return_exceptions=True)

    async def renew(self) -> None:
        """Renew the lease, and check for changes whose messages were lost."""
        self._stop_lost(await self._store.renew(self._clock.now()))
        self._providers.know(await self._store.waiting_by_route())
        self._queue.set_aside.look_again()
        self._look_for_work()
        self._announcer.look_for_unrouted()
        self._team.look()
        await self._look_again()

    def _look_for_work(self) -> None:
        self._queue.on_work()
        self._queue.on_due()

    async def nodes(self) -> list[NodeReport]:
        """Return the machines whose daemons share the store, each with the time of its last heartbeat."""
        return [
            NodeReport(node=view.node, heard_at=to_seconds(view.heard_at), lost=view.lost)
            for view in await self._store.nodes()
        ]

    # -- news -----------------------------------------------------------------------------------------------------

    def on_news(self, news: News) -> None:
        """Something happened elsewhere."""
        match news.kind:
            case Kind.WORK:
                self._queue.on_work()
            case Kind.ROUTE:
                self._providers.know([news.name])
                self._queue.on_work()
            case Kind.ENDED:
                self._do(self._ended(news))
            case Kind.STOP:
                self._queue.stop_run(news.name, Stop.CANCEL)
            case Kind.GRANTED if news.grant is not None:
                self._locks.granted(news.grant)
            case Kind.GONE if news.lapsed is not None:
                self._locks.lapsed(news.lapsed)
            case Kind.LOST:
                self._stop_lost(news.keys)
            case Kind.PROVIDER:
                self._team.look()
            case Kind.MISSED:
                self._look_for_work()
                self._team.look()
                self._do(self._look_again())

    def _stop_lost(self, keys: tuple[int, ...]) -> None:
        """Other daemons took over runs of ours: stop those. The fence refuses their late results."""
        lost = frozenset(keys)
        runs = [run for run in self._queue.runs.values() if run.claim.key in lost]
        if runs:
            self._log.warning("taken for dead: others have these runs now", requests=[r.claim.request_id for r in runs])
        for run in runs:
            run.stop(Stop.SHUTDOWN)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _ended(self, news: News) -> None:
        try:
            if news.ended is not None:
                await self._announcer.ended_unrun(news.ended)
            else:
                await self._announcer.ended_elsewhere(news.name)
        except StoreError as error:
            self._log.warning("the end of a request is published later", request_id=news.name, error=error.message)

    async def _look_again(self) -> None:
        """Poll a batch of awaited requests, in case their completion message was missed."""
        awaited = [name for name in self._announcer.awaited() if name not in self._queue.runs]
        self._looked = self._looked if self._looked < len(awaited) else 0
        some = list(islice(awaited, self._looked, self._looked + LOOK))
        self._looked += LOOK
        try:
            for view in await asyncio.gather(*(self._store.get(name) for name in some)):
                if view is not None and view.state.final:
                    await self._announcer.ended_elsewhere(view.request_id)
        except StoreError as error:
            self._log.warning("missed news are looked for later", error=error.message)
