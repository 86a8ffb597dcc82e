"""The thread beside the loop. Each loop is really held: by a thread's lock, or by work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from ksi.clock import SystemStopwatch
from ksi.host import watchdog
from ksi.host.watchdog import Lease, Stalls, Watchdog
from ksi.testing import SimulatedClock

PATIENCE = 60.0


class Standing(SystemStopwatch):
    """A stopwatch of a process that can be made to have stood still."""

    def __init__(self) -> None:
        self.stood = 0.0

    def seconds(self) -> float:
        return super().seconds() + self.stood


class Kept:
    """A lease that is always late."""

    def __init__(self) -> None:
        self.times = 0
        self.by: set[str] = set()
        self.twice = threading.Event()

    def late(self, now: float) -> bool:
        return True

    def keep(self) -> None:
        self.times += 1
        self.by.add(threading.current_thread().name)
        if self.times >= 2:
            self.twice.set()


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    monkeypatch.setattr(watchdog, "TOLD_AFTER", 0.3)
    with capture_logs() as entries:
        yield entries


@asynccontextmanager
async def watching(lease: Lease | None = None, **more: Any) -> AsyncIterator[Watchdog]:
    """A watchdog of this loop."""
    dog = Watchdog(SimulatedClock(wall=7.5), lease, **more)
    dog.start()
    try:
        yield dog
    finally:
        await dog.stop()
    assert not dog.alive


def hold_until(happened: Callable[[], bool]) -> None:
    """Hold this loop with work until something has happened."""
    watch = SystemStopwatch()
    end = watch.seconds() + PATIENCE
    while not happened():
        assert watch.seconds() < end, "nothing happened"


async def counted(dog: Watchdog, stalls: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while dog.stalls.count < stalls:  # noqa: ASYNC110 — the thread tells nobody else
            await asyncio.sleep(0.005)


def told(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == event]


@pytest.mark.promise("O9")
async def test_a_blocked_loop_is_reported_with_the_place_while_it_lasts_and_counted_afterwards(
    logs: list[Any],
) -> None:
    async with watching() as dog:
        hold_until(lambda: bool(told(logs, "the event loop is held")))
        await counted(dog, 1)
        hold_until(lambda: len(told(logs, "the event loop is held")) > 1)
        await counted(dog, 2)
    entry = told(logs, "the event loop is held")[0]
    assert entry["log_level"] == "error"
    assert any(call.endswith(" hold_until") and "test_watchdog.py:" in call for call in entry["calls"])
    assert len(entry["calls"]) <= watchdog.FRAMES
    ends = told(logs, "the event loop was held")
    assert [end["log_level"] for end in ends] == ["warning"] * dog.stalls.count
    assert dog.stalls.longest >= dog.stalls.last >= watchdog.STALL
    assert dog.stalls.last_at == 7.5


def test_stalls_are_added_up() -> None:
    stalls = Stalls().with_one(3.0, 10.0).with_one(1.0, 20.0)
    assert stalls == Stalls(count=2, longest=3.0, last=1.0, last_at=20.0)


@pytest.mark.promise("O9")
async def test_a_process_that_stood_still_is_not_taken_for_a_held_loop(logs: list[Any]) -> None:
    watch = Standing()
    async with watching(stopwatch=watch) as dog:
        before = dog.stalls.count

        def stand() -> bool:
            watch.stood = 600.0
            return bool(told(logs, "the event loop is held"))

        hold_until(stand)
        await counted(dog, before + 1)
    assert dog.stalls.longest < 600.0


@pytest.mark.promise("O9", "L4")
async def test_a_lease_that_is_late_is_kept_by_the_thread_while_the_loop_is_held() -> None:
    lease = Kept()
    async with watching(lease):
        hold_until(lease.twice.is_set)
    assert lease.by == {"ksi-watchdog"}


@pytest.mark.promise("O9", "L4")
async def test_a_loop_that_does_not_come_back_loses_its_lease(logs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GIVEN_UP", 0.0)
    lease = Kept()
    async with watching(lease) as dog:
        hold_until(lambda: bool(told(logs, "the event loop is held")))
        await counted(dog, 1)
    assert lease.times == 0


async def test_a_defect_does_not_end_the_thread(logs: list[Any]) -> None:
    class Broken(Kept):
        def late(self, now: float) -> bool:
            self.twice.set()
            raise ValueError("broken")

    lease = Broken()
    async with watching(lease) as dog:
        hold_until(lease.twice.is_set)
        assert dog.alive
        lease.twice.clear()
        hold_until(lease.twice.is_set)
    assert told(logs, "the watchdog failed, going on")
