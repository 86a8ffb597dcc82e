"""Clean-up on a clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ksi.clock import Chance, Moment
from ksi.completion.upkeep.cleaner import STEP, SWEEP_EVERY, Cleaner
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.config.schema import Retention
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreUnavailable
from ksi.events.bus import EventBus
from ksi.store.values import Lapsed, Pruned, StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore

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


class Sweeps(ResponseLog):
    """A response log that only notes what it is asked for."""

    def __init__(self, store: MemoryStore, clock: SimulatedClock) -> None:
        super().__init__(store, Path("nowhere"), clock, enabled=False)
        self.asked: list[float] = []

    async def sweep(self, keep: float) -> int:
        self.asked.append(keep)
        return 3


@pytest.fixture
def responses(store: Prunings, clock: SimulatedClock) -> Sweeps:
    return Sweeps(store, clock)


@pytest.fixture
def locks(clock: SimulatedClock) -> LockEvents:
    return LockEvents(EventBus(clock))


@pytest.fixture
def cleaner(store: Prunings, locks: LockEvents, responses: Sweeps, clock: SimulatedClock) -> Cleaner:
    return Cleaner(store, locks, responses, Retention(clean_every=EVERY, sessions=4 * EVERY, finished=1.0), clock)


@pytest.mark.promise("R7")
async def test_a_round_goes_on_step_by_step_until_nothing_is_left(cleaner: Cleaner, store: Prunings) -> None:
    store.steps = [Pruned(requests=50, more=True), Pruned(requests=3, conversations=2, more=True), Pruned(requests=1)]
    assert await cleaner.clean() == (54, 2)
    assert [limit for _, limit in store.asked] == [STEP] * 3


@pytest.mark.promise("R7")
async def test_it_cleans_each_time_that_its_time_has_come(
    cleaner: Cleaner, store: Prunings, clock: SimulatedClock
) -> None:
    assert not cleaner.task.alive
    cleaner.task.start()
    assert cleaner.task.alive
    await settle_down()
    await clock.advance(EVERY - 0.1)
    assert store.asked == []
    await clock.advance(0.1)
    assert len(store.asked) == 1
    assert store.asked[0][0] == clock.now()
    await clock.advance(3 * EVERY)
    assert len(store.asked) == 4
    await cleaner.task.stop()
    assert not cleaner.task.alive
    await clock.advance(3 * EVERY)
    assert len(store.asked) == 4
    await cleaner.task.stop()


@pytest.mark.promise("R7")
@pytest.mark.parametrize("fault", [StoreUnavailable("no disk"), ZeroDivisionError("a defect")])
async def test_a_fault_is_reported_and_the_next_round_comes_all_the_same(
    cleaner: Cleaner, store: Prunings, clock: SimulatedClock, fault: Exception
) -> None:
    store.steps = [fault, Pruned(requests=7)]
    cleaner.task.start()
    await settle_down()
    with capture_logs() as logs:
        await clock.advance(EVERY)
        assert cleaner.task.alive
        await clock.advance(EVERY)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("error", "task failed, trying again"),
        ("info", "cleaned"),
    ]
    assert logs[1]["requests"] == 7
    await cleaner.task.stop()


@pytest.mark.promise("R7")
async def test_every_round_is_a_line_in_the_log_with_its_counts(
    cleaner: Cleaner, store: Prunings, locks: LockEvents, clock: SimulatedClock
) -> None:
    lapsed = Lapsed(request_id="r1", conversation="c1", held=True)
    locks.lapsed(lapsed)
    cleaner.task.start()
    await settle_down()
    with capture_logs() as logs:
        await clock.advance(EVERY)
        store.steps = [Pruned(requests=3, conversations=2)]
        locks.lapsed(lapsed)
        locks.lapsed(lapsed)
        await clock.advance(2 * EVERY)
    rounds = [line for line in logs if line["event"] == "cleaned"]
    assert [(line["event"], line["requests"], line["conversations"], line["locks"]) for line in rounds] == [
        ("cleaned", 0, 0, 1),
        ("cleaned", 3, 2, 2),
        ("cleaned", 0, 0, 0),
    ]
    await cleaner.task.stop()


@pytest.mark.promise("O1")
async def test_response_files_are_swept_by_the_sessions_retention_and_not_in_every_round(
    cleaner: Cleaner, responses: Sweeps, clock: SimulatedClock
) -> None:
    cleaner.task.start()
    await settle_down()
    with capture_logs() as logs:
        await clock.advance(EVERY)
    assert responses.asked == [4 * EVERY]
    assert logs[0]["response_files"] == 3
    await clock.advance(4 * EVERY)
    assert len(responses.asked) == 5, "each quarter of the retention"
    await cleaner.task.stop()


@pytest.mark.promise("O1")
async def test_a_long_retention_is_looked_at_each_hour(
    store: Prunings, locks: LockEvents, responses: Sweeps, clock: SimulatedClock
) -> None:
    cleaner = Cleaner(store, locks, responses, Retention(), clock)
    cleaner.task.start()
    await settle_down()
    await clock.advance(2 * SWEEP_EVERY + 60.0)
    assert len(responses.asked) == 3
    await cleaner.task.stop()
