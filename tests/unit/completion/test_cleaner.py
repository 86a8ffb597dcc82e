"""Clean-up on a clock."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from ksi.clock import Chance, Moment
from ksi.completion.cleaner import STEP, Cleaner
from ksi.config import Retention
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreUnavailable
from ksi.event_bus import EventBus
from ksi.store.memory import MemoryStore
from ksi.store.values import Lapsed, Pruned, StoreRules
from ksi.testing import SimulatedClock, settle_down

EVERY = 10.0


class Prunings(MemoryStore):
    """A store whose prunings are told beforehand."""

    def __init__(self) -> None:
        super().__init__(StoreRules(), Chance())
        self.steps: list[Pruned | Exception] = []
        self.asked: list[tuple[Moment, int]] = []

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        self.asked.append((now, limit))
        step = self.steps.pop(0) if self.steps else Pruned()
        if isinstance(step, Exception):
            raise step
        return step


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def store() -> Prunings:
    return Prunings()


@pytest.fixture
def locks(clock: SimulatedClock) -> LockEvents:
    return LockEvents(EventBus(clock))


@pytest.fixture
def cleaner(store: Prunings, locks: LockEvents, clock: SimulatedClock) -> Cleaner:
    return Cleaner(store, locks, Retention(clean_every=EVERY), clock)


@pytest.mark.promise("R7")
async def test_a_round_goes_on_step_by_step_until_nothing_is_left(cleaner: Cleaner, store: Prunings) -> None:
    store.steps = [Pruned(requests=50, more=True), Pruned(requests=3, conversations=2, more=True), Pruned(requests=1)]
    assert await cleaner.clean() == (54, 2)
    assert [limit for _, limit in store.asked] == [STEP] * 3


@pytest.mark.promise("R7")
async def test_it_cleans_each_time_that_its_time_has_come(
    cleaner: Cleaner, store: Prunings, clock: SimulatedClock
) -> None:
    assert not cleaner.alive
    cleaner.start()
    assert cleaner.alive
    await settle_down()
    await clock.advance(EVERY - 0.1)
    assert store.asked == []
    await clock.advance(0.1)
    assert len(store.asked) == 1
    assert store.asked[0][0] == clock.now()
    await clock.advance(3 * EVERY)
    assert len(store.asked) == 4
    await cleaner.stop()
    assert not cleaner.alive
    await clock.advance(3 * EVERY)
    assert len(store.asked) == 4
    await cleaner.stop()


@pytest.mark.promise("R7")
@pytest.mark.parametrize("fault", [StoreUnavailable("no disk"), ZeroDivisionError("a defect")])
async def test_a_fault_is_told_and_the_next_round_comes_all_the_same(
    cleaner: Cleaner, store: Prunings, clock: SimulatedClock, fault: Exception
) -> None:
    store.steps = [fault, Pruned(requests=7)]
    cleaner.start()
    await settle_down()
    with capture_logs() as logs:
        await clock.advance(EVERY)
        assert cleaner.alive
        await clock.advance(EVERY)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [("error", "not cleaned"), ("info", "cleaned")]
    assert logs[1]["requests"] == 7
    await cleaner.stop()


@pytest.mark.promise("R7")
async def test_every_round_is_a_line_in_the_log_with_its_counts(
    cleaner: Cleaner, store: Prunings, locks: LockEvents, clock: SimulatedClock
) -> None:
    lapsed = Lapsed(request_id="r1", conversation="c1", held=True)
    locks.lapsed(lapsed)
    cleaner.start()
    await settle_down()
    with capture_logs() as logs:
        await clock.advance(EVERY)
        store.steps = [Pruned(requests=3, conversations=2)]
        locks.lapsed(lapsed)
        locks.lapsed(lapsed)
        await clock.advance(2 * EVERY)
    rounds = [line for line in logs if line["event"] == "cleaned"]
    assert [(line["event"], line["requests"], line["conversations"], line["locks"]) for line in rounds] == [
        ("cleaned", 0, 0, 0),
        ("cleaned", 3, 2, 2),
        ("cleaned", 0, 0, 0),
    ]
    await cleaner.stop()
