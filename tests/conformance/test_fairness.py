"""Agents take turns within a priority, and every priority keeps a share of the places, in every store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ksi.clock import microseconds
from ksi.request import Priority
from ksi.store.rules.fairness import SHARE
from ksi.store.values import Offer
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import ROUTE, World

ONE = Offer(ROUTE, "stub", 1)


async def come(world: World, name: str, agent: str | None = None, **fields: Any) -> None:
    """A request in a conversation of its own."""
    fields.setdefault("conversation", f"talk-{name}")
    world.clock.wall += 1
    await world.enqueue(name, agent_id=agent, **fields)


async def order(world: World, count: int, *offers: Offer) -> list[str]:
    """The order of runs in one place."""
    found: list[str] = []
    for _ in range(count):
        (claim,) = await world.claim(*(offers or (ONE,)), limit=1)
        found.append(claim.request_id)
        await world.complete(claim)
    return found


def agents(names: Sequence[str]) -> str:
    return "".join(name[0] for name in names)


@pytest.mark.promise("B4")
async def test_agents_take_turns_however_much_each_has_sent(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(9):
        await come(world, f"a{number}", "ann")
    for number in range(3):
        await come(world, f"b{number}", "bob")
    assert agents(await order(world, 12)) == "ababab" + "aaaaaa"


@pytest.mark.promise("B4")
async def test_one_that_comes_behind_a_flood_is_next_in_a_moment_and_its_own_order_stays(
    store_factory: StoreFactory,
) -> None:
    world = await store_factory(fair=True)
    for number in range(50):
        await come(world, f"a{number:02}", "ann")
    first = await order(world, 20)
    assert first == [f"a{number:02}" for number in range(20)]
    await come(world, "b0", "bob")
    await come(world, "b1", "bob")
    assert await order(world, 4) == ["a20", "b0", "a21", "b1"]
    # One that was away for long has saved nothing up.
    assert agents(await order(world, 3)) == "aaa"


@pytest.mark.promise("B4")
async def test_weights_give_an_agent_more_turns(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True, weights={"agent:ann": 2.0, "agent:b*": 1.0})
    for number in range(8):
        await come(world, f"a{number}", "ann")
        await come(world, f"b{number}", "bob")
    assert agents(await order(world, 9)).count("a") == 6


@pytest.mark.promise("B4")
async def test_no_flood_of_a_priority_keeps_the_others_out(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    await come(world, "low", "bob", priority=Priority.LOW)
    await come(world, "normal", "bob")
    for number in range(3 * SHARE):
        await come(world, f"c{number}", "ann", priority=Priority.CRITICAL)
    found = await order(world, 2 * SHARE + 2)
    assert "normal" in found[: SHARE + 1]
    assert "low" in found[: SHARE + 2]
    assert found[:SHARE] == [f"c{number}" for number in range(SHARE)]


@pytest.mark.promise("B4")
async def test_within_an_agent_and_a_conversation_the_order_stays(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(3):
        await come(world, f"a{number}", "ann", conversation="one")
    await come(world, "a3", "ann")
    await come(world, "b0", "bob", conversation="one")
    assert await order(world, 5) == ["a0", "a1", "a2", "b0", "a3"]


@pytest.mark.promise("B4")
async def test_who_has_no_agent_counts_by_what_stands_for_one(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(4):
        await come(world, f"a{number}", flow="connection:1")
    await come(world, "b0", flow="connection:2")
    await come(world, "c0")
    assert agents(await order(world, 4)) == "abca"


@pytest.mark.promise("B4")
async def test_what_was_delayed_takes_its_turn_when_it_is_due(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    await come(world, "b0", "bob", due=world.clock.wall + microseconds(5))
    for number in range(6):
        await come(world, f"a{number}", "ann")
    assert agents(await order(world, 2)) == "aa"
    world.clock.forward(5)
    await world.expire()
    assert await order(world, 2) == ["a2", "b0"]


@pytest.mark.promise("B4")
async def test_turns_go_on_after_a_crash(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(6):
        await come(world, f"a{number}", "ann")
    for number in range(3):
        await come(world, f"b{number}", "bob")
    assert agents(await order(world, 2)) == "ab"
    await world.crash()
    for number in range(2):
        await come(world, f"c{number}", "cid")
    assert sorted(agents(await order(world, 3))) == ["a", "b", "c"]


@pytest.mark.promise("B4")
async def test_several_routes_share_the_turns(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(4):
        await come(world, f"a{number}", "ann", route=f"r{number % 2}")
    await come(world, "b0", "bob", route="r1")
    offers = (Offer("r0", "stub", 1), Offer("r1", "stub", 1))
    assert await order(world, 3, *offers) == ["a0", "b0", "a1"]


@pytest.mark.promise("B4")
async def test_without_fairness_the_lowest_rank_runs_first(store_factory: StoreFactory) -> None:
    world = await store_factory()
    for number in range(3):
        await come(world, f"a{number}", "ann")
    await come(world, "b0", "bob")
    await come(world, "h0", "ann", priority=Priority.HIGH)
    assert await order(world, 5) == ["h0", "a0", "a1", "a2", "b0"]


@pytest.mark.promise("B4")
async def test_the_store_says_whose_turn_it_is(store_factory: StoreFactory) -> None:
    world = await store_factory(fair=True)
    for number in range(4):
        await come(world, f"a{number}", "ann")
    await come(world, "b0", "bob")
    await come(world, "l0", "bob", priority=Priority.LOW)
    found = [(one.priority, one.flow, one.request_id) for one in await world.store.next_flows()]
    assert found == [
        (Priority.NORMAL, "agent:ann", "a0"),
        (Priority.NORMAL, "agent:bob", "b0"),
        (Priority.LOW, "agent:bob", "l0"),
    ]
