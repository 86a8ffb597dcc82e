"""Turns for many clients that are due at one moment."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from ksi.clock import SystemStopwatch
from ksi.testing import settle_down
from ksi.transports.rota import AT_ONCE, PASSED_OVER, Budget, Rota


@pytest.mark.promise("O9")
async def test_many_that_are_due_are_served_in_order_and_others_have_their_turn_between_them() -> None:
    rota = Rota()
    served: list[int] = []
    seen: list[int] = []

    def look() -> None:
        seen.append(len(served))
        if len(served) < 3 * AT_ONCE + 1:
            asyncio.get_running_loop().call_soon(look)

    for number in range(3 * AT_ONCE + 1):
        rota.add(lambda number=number: served.append(number))  # type: ignore[misc]
    look()
    await settle_down()
    assert served == list(range(3 * AT_ONCE + 1))
    assert all(after - before <= AT_ONCE for before, after in pairwise(seen))


async def test_who_is_added_while_others_are_served_comes_after_them() -> None:
    rota = Rota()
    served: list[str] = []

    def first() -> None:
        served.append("first")
        rota.add(lambda: served.append("third"))

    rota.add(first)
    rota.add(lambda: served.append("second"))
    await settle_down()
    rota.add(lambda: served.append("fourth"))
    await settle_down()
    assert served == ["first", "second", "third", "fourth"]


class HandStopwatch(SystemStopwatch):
    """Shows what a test sets."""

    shown = 100.0

    def seconds(self) -> float:
        return self.shown


@pytest.mark.promise("O9")
async def test_a_turn_has_a_budget_of_time_and_the_next_one_its_own() -> None:
    watch = HandStopwatch()
    budget = Budget(watch, 0.01)
    assert not budget.spent("client")
    watch.shown += 0.005
    assert not budget.spent("client")
    watch.shown += 0.006
    assert budget.spent("client")
    await settle_down()
    assert not budget.spent("client"), "whoever is first may begin"


@pytest.mark.promise("O9")
async def test_who_began_nothing_in_a_turn_goes_before_others_in_the_next() -> None:
    watch = HandStopwatch()
    budget = Budget(watch, 0.01)
    assert not budget.spent("greedy")
    watch.shown += 0.02
    assert budget.spent("greedy")
    assert budget.spent("modest")
    await settle_down()
    assert not budget.spent("greedy"), "whoever is first may begin"
    assert budget.spent("greedy"), "but no more than once before the other"
    assert not budget.spent("modest")
    assert not budget.spent("modest"), "the turn is for those that were passed over"
    await settle_down()
    assert [budget.spent("greedy"), budget.spent("greedy")] == [False, False]


@pytest.mark.promise("O9")
async def test_who_was_passed_over_and_asks_no_more_holds_nobody_up_for_long() -> None:
    watch = HandStopwatch()
    budget = Budget(watch, 0.01)
    assert not budget.spent("greedy")
    watch.shown += 0.02
    assert budget.spent("gone")
    for _ in range(PASSED_OVER):
        await settle_down()
        assert not budget.spent("greedy"), "whoever is first may begin"
    await settle_down()
    assert [budget.spent("greedy"), budget.spent("greedy")] == [False, False]


@pytest.mark.promise("O9")
async def test_however_many_ask_each_has_its_turn() -> None:
    watch = HandStopwatch()
    budget = Budget(watch, 0.01)
    begun = dict.fromkeys(range(40), 0)
    for _ in range(40):
        for client in begun:
            for _ in range(3):
                if not budget.spent(client):
                    begun[client] += 1
                    watch.shown += 0.002
        await settle_down()
    assert min(begun.values()) >= 2, begun
