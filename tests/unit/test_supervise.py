"""A long-lived task that survives its faults."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from ksi.errors import StoreUnavailable
from ksi.host.supervise import BACKOFF, MAX_BACKOFF, Periodic, Supervised
from ksi.testing import SimulatedClock, settle_down

EVERY = 2.0


class Work:
    def __init__(self) -> None:
        self.times: list[float] = []
        self.fault: BaseException | None = None
        self.clock = SimulatedClock(mono=0.0)

    async def step(self) -> None:
        self.times.append(self.clock.now().mono / 1e6)
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def work() -> Work:
    return Work()


async def test_a_step_is_done_again_and_again_until_the_stop(work: Work) -> None:
    task = Periodic("ksi-test", work.step, EVERY, work.clock)
    assert not task.alive
    task.start()
    await settle_down()
    await work.clock.advance(3 * EVERY)
    assert work.times == [2.0, 4.0, 6.0]
    assert task.alive
    assert task.problem is None
    await task.stop()
    assert not task.alive
    await work.clock.advance(3 * EVERY)
    assert len(work.times) == 3
    await task.stop()


@pytest.mark.promise("O3")
@pytest.mark.parametrize(
    "fault", [StoreUnavailable("no disk"), OSError(28, "No space left"), ZeroDivisionError("defect")]
)
async def test_a_fault_is_reported_and_retried_with_a_growing_pause(work: Work, fault: Exception) -> None:
    task = Periodic("ksi-test", work.step, EVERY, work.clock, longest_pause=8.0)
    work.fault = fault
    task.start()
    await settle_down()
    with capture_logs() as logs:
        await work.clock.advance(30.0)
    assert work.times == [2.0, 4.0, 8.0, 16.0, 24.0]
    assert {(entry["log_level"], entry["task"]) for entry in logs} == {("error", "ksi-test")}
    assert task.alive
    assert task.problem == f"task ksi-test has failed for 28 s: {fault}"
    work.fault = None
    await work.clock.advance(2.0)
    assert task.problem is None
    await work.clock.advance(EVERY)
    assert work.times[-2:] == [32.0, 34.0], "back to its own pace"
    await task.stop()


async def test_a_step_that_is_done_often_is_not_tried_again_as_often(work: Work) -> None:
    task = Periodic("ksi-test", work.step, 0.1, work.clock)
    work.fault = StoreUnavailable("no disk")
    task.start()
    await settle_down()
    await work.clock.advance(10.0)
    assert work.times == [0.1, 0.1 + BACKOFF, 0.1 + 3 * BACKOFF, 0.1 + 7 * BACKOFF]
    await work.clock.advance(1_000.0)
    assert work.times[-1] - work.times[-2] == MAX_BACKOFF
    await task.stop()


async def test_a_step_that_is_done_seldom_is_not_tried_again_more_seldom(work: Work) -> None:
    task = Periodic("ksi-test", work.step, 3_600.0, work.clock)
    work.fault = StoreUnavailable("no disk")
    task.start()
    await settle_down()
    await work.clock.advance(3 * 3_600.0)
    assert work.times == [3_600.0, 7_200.0, 10_800.0]
    await task.stop()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.promise("O10")
@pytest.mark.parametrize("fault", [asyncio.CancelledError(), Unspeakable(), MemoryError()])
async def test_no_fault_of_a_step_ends_the_task(work: Work, fault: BaseException) -> None:
    task = Periodic("ksi-test", work.step, EVERY, work.clock)
    work.fault = fault
    task.start()
    await settle_down()
    with capture_logs():
        await work.clock.advance(EVERY)
    assert task.alive
    assert not task.well
    assert task.problem is not None
    assert type(fault).__name__ in task.problem
    work.fault = None
    await work.clock.advance(EVERY)
    assert task.well
    await task.stop()
    assert task.problem == "task ksi-test has ended"


class Errand:
    """Steps that wait for a word."""

    def __init__(self) -> None:
        self.clock = SimulatedClock(mono=0.0)
        self.word = asyncio.Event()
        self.refusals = 0
        self.done: list[float] = []

    async def step(self) -> None:
        await self.word.wait()
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("no disk")
        self.word.clear()
        self.done.append(self.clock.now().mono / 1e6)


@pytest.mark.promise("O10")
async def test_a_step_that_waits_for_its_reason_takes_it_up_again_after_a_fault() -> None:
    errand = Errand()
    task = Supervised("ksi-test", errand.step, errand.clock, backoff=0.5, longest_pause=2.0, vital=True)
    task.start()
    errand.refusals = 5
    errand.word.set()
    with capture_logs():
        await settle_down()
        await errand.clock.advance(7.0)
        assert task.problem == "task ksi-test has failed for 7 s: no disk"
        await errand.clock.advance(0.5)
    assert errand.done == [7.5], "after 0.5, 1, 2, 2 and 2 s"
    assert task.well
    await task.stop()


async def test_a_task_that_finishes_brings_its_step_to_the_end_and_takes_no_other() -> None:
    errand = Errand()
    task = Supervised("ksi-test", errand.step, errand.clock)
    task.start()
    await settle_down()
    finishing = asyncio.create_task(task.finish())
    await settle_down()
    assert not finishing.done(), "its step waits for its word"
    errand.word.set()
    await finishing
    assert errand.done == [0.0]
    assert not task.alive


async def test_a_task_that_finishes_does_not_wait_for_its_pause() -> None:
    errand = Errand()
    task = Supervised("ksi-test", errand.step, errand.clock)
    task.start()
    errand.refusals = 1
    errand.word.set()
    with capture_logs():
        await settle_down()
    await task.finish()
    assert errand.done == []
