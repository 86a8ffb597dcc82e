"""When what was set aside is looked through, and in which steps."""

from __future__ import annotations

import random

from ksi.clock import Chance, Moment
from ksi.completion.pause.set_aside import LOOKS, SetAside
from ksi.store.values import NO_PAUSE, Paused, StoreRules
from tests.reference_store.store import MemoryStore

NOW = Moment(0, 0)
ANN = Paused(agents=frozenset({"ann"}))
BOTH = Paused(agents=frozenset({"ann", "bob"}))


class Counting(MemoryStore):
    """A store that has so many steps of things set aside, and counts how often it is asked from the beginning."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__(StoreRules(), Chance(random.Random(1)))
        self.steps = steps
        self.begun = 0

    async def bring_back(self, paused: Paused, now: Moment, after: str | None = None, limit: int = 500) -> str | None:
        self.begun += after is None
        step = int(after or 0) + 1
        return str(step) if step < self.steps else None


async def test_all_is_looked_through_at_the_start_and_when_less_is_paused() -> None:
    store = Counting()
    aside = SetAside(store)
    for paused, begun in ((NO_PAUSE, 1), (NO_PAUSE, 1), (ANN, 1), (BOTH, 1), (ANN, 2), (ANN, 2), (NO_PAUSE, 3)):
        assert not await aside.step(paused, NOW)
        assert store.begun == begun


async def test_a_look_continues_step_by_step_and_restarts_when_even_less_is_paused() -> None:
    store = Counting(steps=3)
    aside = SetAside(store)
    assert [await aside.step(ANN, NOW) for _ in range(4)] == [True, True, False, False]
    assert store.begun == 1
    assert await aside.step(NO_PAUSE, NOW)
    assert [await aside.step(NO_PAUSE, NOW) for _ in range(2)] == [True, False]
    assert store.begun == 2


async def test_after_a_change_it_looks_again_with_each_renewal_of_the_lease_and_then_no_more() -> None:
    store = Counting()
    aside = SetAside(store)
    for _ in range(10):
        await aside.step(NO_PAUSE, NOW)
        aside.look_again()
    assert store.begun == LOOKS
