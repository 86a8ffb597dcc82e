"""The queue's figures over time, on a clock."""

from __future__ import annotations

import pytest

from ksi.clock import Chance
from ksi.completion.upkeep.queue_trend import EVERY, KEPT, QueueTrend
from ksi.completion.upkeep.waiting_count import WaitingCount
from ksi.request import Priority
from ksi.store.values import StoreRules, Totals
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore


class Figures(MemoryStore):
    """A store that has the figures that it is told."""

    def __init__(self) -> None:
        super().__init__(StoreRules(), Chance())
        self.has = Totals()
        self.asked = 0

    async def totals(self) -> Totals:
        return self.has

    async def waiting_by_route(self) -> dict[str, int]:
        self.asked += 1
        return {"slow": self.has.queued, "idle": 0}

    async def waiting_by_priority(self) -> dict[Priority, int]:
        return {Priority.HIGH: 30, Priority.LOW: 16}


@pytest.mark.promise("V1")
async def test_a_sample_is_taken_each_minute_and_the_present_is_the_last_one() -> None:
    clock, store = SimulatedClock(), Figures()
    trend = QueueTrend(store, WaitingCount(store, clock), clock)
    trend.task.start()
    await settle_down()
    store.has = Totals(running=2, queued=40, scheduled=1, retrying=2, parked=3, completed=7, failed=1)
    await clock.advance(EVERY)
    store.has = Totals()
    await clock.advance(EVERY / 2)
    first, last = (await trend.trend()).samples
    assert (first.active, first.queued, first.delayed, first.completed, first.failed) == (2, 40, 6, 7, 1)
    assert first.by_route == {"slow": 40}
    assert first.by_priority == {"high": 30, "low": 16}
    assert last.at - first.at == EVERY / 2
    assert (last.queued, last.by_route, last.by_priority) == (0, {}, {})
    assert store.asked == 1, "an empty queue is not looked through"
    await trend.task.stop()


@pytest.mark.promise("V1")
async def test_a_day_is_kept_and_no_more() -> None:
    clock, store = SimulatedClock(), Figures()
    trend = QueueTrend(store, WaitingCount(store, clock), clock)
    for _ in range(KEPT + 5):
        await trend.sample()
    assert len((await trend.trend()).samples) == KEPT + 1
