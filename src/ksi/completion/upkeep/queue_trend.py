"""The queue's figures over the last day, one sample a minute, for viewers who come later."""

from __future__ import annotations

from collections import deque

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.upkeep.waiting_count import WaitingCount
from ksi.events.reports import TrendReply, TrendSample
from ksi.host.supervise import Periodic
from ksi.store.base import Store

EVERY = 60.0
"""Seconds between two samples."""

KEPT = 1_440
"""Samples that are kept: those of a day."""


class QueueTrend:
    """Takes samples as long as the daemon runs. Each reads figures that the store keeps anyway."""

    def __init__(self, store: Store, waiting: WaitingCount, clock: Clock) -> None:
        self._store = store
        self.waiting = waiting
        self._clock = clock
        self._samples: deque[TrendSample] = deque(maxlen=KEPT)
        self.task = Periodic("ksi-trend", self.sample, EVERY, clock)

    async def sample(self) -> None:
        """Take one."""
        self._samples.append(await self._now())

    async def trend(self) -> TrendReply:
        """`queue:trend`: the samples, the oldest first, and the present as the last one."""
        return TrendReply(every=EVERY, samples=[*self._samples, await self._now()])

    async def _now(self) -> TrendSample:
        totals = await self._store.totals()
        delayed = totals.scheduled + totals.retrying + totals.parked
        routes = await self._store.waiting_by_route() if totals.queued else {}
        # An empty queue is not looked through.
        priorities = await self.waiting.now() if totals.queued + delayed else {}
        return TrendSample(
            at=self._clock.now().wall / MICROSECONDS,
            active=totals.running,
            queued=totals.queued,
            delayed=delayed,
            completed=totals.completed,
            failed=totals.failed,
            by_route={route: number for route, number in routes.items() if number},
            by_priority=None if priorities is None else {one.word: number for one, number in priorities.items()},
        )
