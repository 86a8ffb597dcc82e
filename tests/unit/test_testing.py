"""What KSI gives to those who test: the clock by hand, and the daemon in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.clock import Chance, Moment, microseconds
from ksi.store.values import StoreRules
from ksi.testing import SimulatedClock, running_daemon, settle_down
from tests.effort import effort
from tests.reference_store.store import MemoryStore

# -- the clock --------------------------------------------------------------------------------------------------------


async def test_time_stands_still_until_it_is_moved() -> None:
    clock = SimulatedClock(wall=1_000.0, mono=5.0)
    assert clock.now() == clock.now() == Moment(1_000_000_000, 5_000_000)
    await clock.advance(2.5)
    assert clock.now() == Moment(1_002_500_000, 7_500_000)


async def test_a_sleeper_wakes_at_its_own_instant_and_not_before() -> None:
    clock = SimulatedClock(mono=0.0)
    woken: list[tuple[str, int]] = []

    async def sleep(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now().mono))

    tasks = [asyncio.create_task(sleep(name, seconds)) for name, seconds in (("c", 3), ("a", 1), ("b", 1), ("d", 9))]
    await settle_down()
    await clock.advance(0.9)
    assert woken == []
    await clock.advance(4.0)
    assert woken == [("a", 1_000_000), ("b", 1_000_000), ("c", 3_000_000)]
    assert clock.now().mono == 4_900_000
    await clock.advance(10.0)
    assert woken[-1] == ("d", 9_000_000)
    await asyncio.gather(*tasks)


async def test_one_step_wakes_a_task_that_sleeps_again_as_often_as_it_would_have() -> None:
    clock, times = SimulatedClock(mono=0.0), []

    async def beat() -> None:
        while True:
            await clock.sleep(1.0)
            times.append(clock.now().mono)

    task = asyncio.create_task(beat())
    await settle_down()
    await clock.advance(3.5)
    assert times == [1_000_000, 2_000_000, 3_000_000]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await clock.advance(10.0)
    assert len(times) == 3


@pytest.mark.parametrize("seconds", [0.0, -1.0])
async def test_a_sleep_of_nothing_ends_without_the_clock_moving(seconds: float) -> None:
    clock = SimulatedClock()
    before = clock.now()
    await asyncio.wait_for(clock.sleep(seconds), 5)
    assert clock.now() == before


async def test_a_step_of_the_wall_clock_wakes_none_and_is_not_believed() -> None:
    clock = SimulatedClock(wall=1_000.0, mono=0.0)
    sleeper = asyncio.create_task(clock.sleep(1.0))
    await settle_down()
    clock.step_wall(30 * 86_400.0)
    await settle_down()
    assert not sleeper.done()
    assert clock.now() == Moment(microseconds(1_000), 0)
    await clock.advance(1.0)
    assert sleeper.done()
    assert clock.now() == Moment(microseconds(1_001), 1_000_000)


async def test_the_machines_sleep_wakes_none_and_counts_for_the_wall_clock() -> None:
    clock = SimulatedClock(wall=1_000.0, mono=0.0)
    sleeper = asyncio.create_task(clock.sleep(1.0))
    await settle_down()
    clock.sleep_machine(86_400.0)
    await settle_down()
    assert not sleeper.done()
    assert clock.now() == Moment(microseconds(87_400), 0)
    await clock.advance(1.0)
    assert sleeper.done()
    assert clock.now() == Moment(microseconds(87_401), 1_000_000)


@settings(max_examples=effort(30, 300))
@given(steps=st.lists(st.floats(0, 1_000), max_size=10))
async def test_many_steps_are_as_one(steps: list[float]) -> None:
    clock = SimulatedClock(wall=0.0, mono=0.0)
    for step in steps:
        await clock.advance(step)
    expected = sum(microseconds(step) for step in steps)
    assert clock.now() == Moment(expected, expected)


# -- the daemon -------------------------------------------------------------------------------------------------------


async def test_a_daemon_in_this_process_has_a_stub_and_a_home_of_its_own_and_leaves_nothing() -> None:
    async with running_daemon(clock=SimulatedClock(wall=1_800_000_000.0)) as daemon:
        home = daemon.config.home
        assert daemon.ready().ready
        assert daemon.context().providers == ["stub"]
        assert daemon.startup().started_at == 1_800_000_000.0
        assert daemon.config.socket_path.is_socket()
    assert not daemon.ready().ready
    assert not home.exists()


async def test_a_daemon_takes_settings_a_store_and_a_home_from_outside(tmp_path: Path) -> None:
    store = MemoryStore(StoreRules(), Chance())
    changes: dict[str, dict[str, Any]] = {"queue": {"max_queued": 3}, "providers": {"other": {"kind": "stub"}}}
    async with running_daemon(tmp_path, settings=changes, clock=SimulatedClock(), store=store) as daemon:
        assert daemon.store is store
        assert daemon.config.home == tmp_path
        assert daemon.config.queue.max_queued == 3
        assert daemon.context().providers == ["other", "stub"]


async def test_a_daemon_is_stopped_when_the_test_fails() -> None:
    daemons = []

    async def fail() -> None:
        async with running_daemon(clock=SimulatedClock()) as daemon:
            daemons.append(daemon)
            raise LookupError("the test's own")

    with pytest.raises(LookupError, match="the test's own"):
        await fail()
    assert not daemons[0].config.socket_path.exists()
    assert not daemons[0].ready().ready
