"""Parked requests whose provider is back before it said so (F5)."""

from __future__ import annotations

import pytest

from ksi.request import State
from ksi.store.values import Listing
from tests.conformance.world import OFFER, World


async def park(world: World, name: str, after: float, route: str = "stub", parked: bool = True) -> None:
    await world.retry(await world.run(name, f"talk of {name}"), after=after, parked=parked, route=route)


@pytest.mark.promise("F5")
async def test_parked_requests_of_a_route_are_due_at_once_and_no_others(world: World) -> None:
    await park(world, "a", 500)
    await park(world, "b", 300)
    await park(world, "elsewhere", 300, route="x,stub")
    await park(world, "retrying", 300, parked=False)
    await world.enqueue("later", "another", due=world.clock.wall + 10**9)
    world.clock.forward(10)
    assert await world.store.unpark("stub", world.clock.now()) == 2
    assert await world.store.unpark("stub", world.clock.now()) == 0
    for name in ("a", "b"):
        view = await world.view(name)
        assert (view.state, view.due) == (State.PARKED, world.clock.wall)
    assert (await world.expire()).woken == 2
    assert await world.claim_ids(OFFER) == ["a", "b"]
    assert await world.listed(Listing.DELAYED) == ["elsewhere", "retrying", "later"]


@pytest.mark.promise("F5")
async def test_a_request_that_is_due_already_is_not_counted_and_a_step_takes_the_soonest(world: World) -> None:
    for name, after in (("a", 5), ("b", 300), ("c", 200), ("d", 400)):
        await park(world, name, after)
    world.clock.forward(10)
    assert await world.store.unpark("stub", world.clock.now(), 2) == 2
    assert (await world.expire()).woken == 3
    assert sorted(await world.claim_ids()) == ["a", "b", "c"]
    assert await world.store.unpark("nobody", world.clock.now()) == 0


@pytest.mark.promise("F5", "L8")
async def test_an_unparked_request_has_kept_its_place(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b")
    await world.retry(claim, after=500, parked=True)
    await world.store.unpark("stub", world.clock.now())
    await world.expire()
    assert await world.claim_ids() == ["a"]
    await world.crash()
    assert await world.claim_ids() == ["a"]
