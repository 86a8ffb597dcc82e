"""A store that several daemons share: renews this one's lease, and brings here what happened at the others (D1, D2)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import islice
from typing import Any

import structlog

from ksi.clock import Clock, to_seconds
from ksi.completion.announcer import Announcer
from ksi.completion.completion_runner import Stop
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.provider_team import Team
from ksi.completion.queue_manager import QueueManager
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.store.redis import RedisStore
from ksi.store.redis_news import Kind, News

LOOK = 500
"""Requests that one look for missed news asks for."""

RENEWALS = 3
"""How often a lease is renewed in its time."""


class Sharing:
    """One task, `ksi-lease`, and one for each piece of news that has to be looked up."""

    def __init__(
        self,
        store: RedisStore,
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
        self._pause = lease / RENEWALS
        self._task: asyncio.Task[None] | None = None
        self._looking: set[asyncio.Task[None]] = set()
        self._looked = 0
        self._log = structlog.get_logger("ksi.sharing")
        store.on_news = self.on_news
        team.on_change = self._look_for_work

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin to renew."""
        self._task = asyncio.create_task(self._forever(), name="ksi-lease")

    def leave_soon(self) -> None:
        """The daemon stops: a server that is away must not keep it from that. What it leaves is taken over (D2)."""
        self._store.hurry()

    async def stop(self) -> None:
        """Renew no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, *self._looking, return_exceptions=True)

    async def _forever(self) -> None:
        while True:
            await self._clock.sleep(self._pause)
            try:
                await self.renew()
            except StoreError as error:
                self._log.error("lease not renewed, trying again", error=error.message)
            except Exception:  # noqa: BLE001 - the top of a long-lived loop: without it the lease would run out
                self._log.exception("lease not renewed, trying again")

    async def renew(self) -> None:
        """Renew the lease, and look at what a lost message would have told."""
        self._stop_lost(await self._store.renew(self._clock.now()))
        self._providers.know(await self._store.waiting_by_route())
        self._look_for_work()
        self._announcer.look_for_unrouted()
        self._team.look()
        await self._look_again()

    def _look_for_work(self) -> None:
        self._queue.on_work()
        self._queue.on_due()

    async def nodes(self) -> list[dict[str, Any]]:
        """The machines whose daemons share the store, and when each was last heard of (D4)."""
        return [
            {"node": view.node, "heard_at": to_seconds(view.heard_at), "lost": view.lost}
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
        """Others took what ran here: stop it. What it still brings is refused by its fence (L1)."""
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
            self._log.warning("an end is told later", request_id=news.name, error=error.message)

    async def _look_again(self) -> None:
        """Ask for some of what somebody here waits for, in turns: its end may have been told while nobody heard."""
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
