"""Runs that wait for other requests give back their slots, and get them again before anything new starts."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from ksi.completion.children.deadlock import refuse_deadlock
from ksi.completion.children.lending import Lending
from ksi.completion.completion_runner import Run
from ksi.errors import ConversationBusy
from ksi.request import Priority
from ksi.store.values import Claimed, StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.conformance.world import MemoryHome, World


class Slots:
    """A provider manager as far as lending knows it."""

    def __init__(self, own: int) -> None:
        self.own = own
        self.lent = 0

    def slots(self, _: str) -> int:
        return self.own

    def lend(self, _: str, lent: int) -> None:
        self.lent = lent


def run_of(name: str) -> Run:
    return Run(
        Claimed(
            key=1, request_id=name, conversation=name, body=b"{}", route="p", provider="p", priority=Priority.NORMAL,
            attempt=1, fence=1, token=1, started_at=0, enqueued_at=0, head=None,
        ),
        stream=False,
    )  # fmt: skip


class Place:
    """Runs at one provider, started only where the store would start them."""

    def __init__(self, slots: int) -> None:
        self.clock = SimulatedClock(wall=1_800_000_000.0)
        self.provider = Slots(slots)
        self.runs: dict[str, Run] = {}
        provider: Any = self.provider
        self.lending = Lending(provider, self.runs, self.clock)
        self.active: set[str] = set()

    @property
    def free(self) -> bool:
        return len(self.runs) < self.provider.own + self.provider.lent

    def start(self, name: str) -> Run:
        assert self.free
        run = self.runs[name] = run_of(name)
        self.active.add(name)
        return run

    def end(self, name: str) -> None:
        del self.runs[name]
        self.active.discard(name)
        self.lending.look()

    async def wait(self, run: Run, awaited: str, over: asyncio.Event) -> None:
        name = run.claim.request_id
        async with self.lending.wait(run, awaited):
            self.active.discard(name)
            await over.wait()
        self.active.add(name)


@pytest.mark.promise("M2")
async def test_a_waiting_run_lets_another_start_and_goes_on_when_that_has_ended() -> None:
    place, over = Place(1), asyncio.Event()
    parent = place.start("parent")
    parent.deadline = place.clock.now().after(10).mono
    assert not place.free
    waiting = asyncio.create_task(place.wait(parent, "child", over))
    await settle_down()
    assert parent.deadline is None
    assert place.lending.awaited_by("parent") == ("child",)
    place.start("child")
    assert not place.free
    over.set()
    await settle_down()
    assert not waiting.done()  # the child has its slot still
    place.end("child")
    assert not place.free  # what is wanted again is not offered
    await waiting
    assert parent.deadline == place.clock.now().after(10).mono
    assert (place.lending.awaited_by("parent"), place.provider.lent) == ((), 0)


@pytest.mark.promise("M2")
async def test_a_run_that_waits_for_several_at_once_lends_one_slot() -> None:
    place, first, second = Place(1), asyncio.Event(), asyncio.Event()
    parent = place.start("parent")
    waits = [asyncio.create_task(place.wait(parent, name, over)) for name, over in (("a", first), ("b", second))]
    await settle_down()
    assert place.provider.lent == 1
    first.set()
    await waits[0]
    assert place.provider.lent == 1
    second.set()
    await waits[1]
    assert place.provider.lent == 0


@pytest.mark.promise("M2")
async def test_a_run_that_is_stopped_does_not_wait_for_its_slot() -> None:
    place, over = Place(1), asyncio.Event()
    parent = place.start("parent")
    waiting = asyncio.create_task(place.wait(parent, "child", over))
    await settle_down()
    place.start("child")
    over.set()
    await settle_down()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (place.provider.lent, place.lending.awaited_by("parent")) == (0, ())
    place.end("child")
    place.end("parent")
    assert place.free


@pytest.mark.promise("M2")
async def test_there_are_never_more_at_work_than_slots_and_all_come_to_their_end(dice: random.Random) -> None:
    place = Place(dice.randint(1, 3))
    waiting: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}
    made = 0
    for _ in range(300):
        step = dice.random()
        able = [name for name in place.active if name not in waiting]
        if step < 0.4 and place.free:
            made += 1
            place.start(f"r{made}")
        elif step < 0.6 and able:
            name, over = dice.choice(able), asyncio.Event()
            waiting[name] = over, asyncio.create_task(place.wait(place.runs[name], f"of {name}", over))
        elif step < 0.8 and waiting:
            waiting[dice.choice(list(waiting))][0].set()
        elif able:
            place.end(dice.choice(able))
        await settle_down()
        waiting = {name: one for name, one in waiting.items() if not one[1].done()}
        assert len(place.active) <= place.provider.own
    while place.runs:
        for over, _ in waiting.values():
            over.set()
        await settle_down()
        waiting = {name: one for name, one in waiting.items() if not one[1].done()}
        place.end(next(name for name in place.active if name not in waiting))
    assert (place.free, place.provider.lent) == (True, 0)


@pytest.mark.promise("M2", "L1")
async def test_two_chains_that_wait_for_each_others_conversations_are_refused_the_second_wait() -> None:
    world = World(MemoryHome(), StoreRules())
    await world.open()
    place = Place(4)
    for name, talk in (("a", "A"), ("b", "B")):
        await world.run(name, talk)
        place.start(name)
    await world.enqueue("a asks", "B")
    await world.enqueue("b asks", "A")
    await refuse_deadlock(world.store, place.lending, "a", "B")
    over = asyncio.Event()
    waiting = asyncio.create_task(place.wait(place.runs["a"], "a asks", over))
    await settle_down()
    with pytest.raises(ConversationBusy, match="waits for the request that asks, 'b'"):
        await refuse_deadlock(world.store, place.lending, "b", "A")
    await refuse_deadlock(world.store, place.lending, "b", "nobody's")
    over.set()
    await waiting


@pytest.mark.promise("M2")
async def test_a_run_that_ended_while_its_program_waits_on_lends_nothing_any_more() -> None:
    place, over = Place(1), asyncio.Event()
    waiting = asyncio.create_task(place.wait(place.start("parent"), "child", over))
    await settle_down()
    assert place.provider.lent == 1
    place.end("parent")
    assert (place.provider.lent, place.lending.awaited_by("parent")) == (0, ())
    again = place.start("parent")  # a later attempt of the same request
    assert not place.free
    over.set()
    await waiting
    assert (place.provider.lent, place.lending.awaited_by("parent")) == (0, ())
    async with place.lending.wait(again, "another child"):
        assert place.provider.lent == 1
    assert place.provider.lent == 0
