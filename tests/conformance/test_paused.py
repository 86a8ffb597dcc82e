"""A paused request is not started, keeps its place, and is set aside so that no claim looks at it again."""

from __future__ import annotations

import pytest

from ksi.clock import microseconds
from ksi.request import Priority, State
from ksi.store.values import CLAIM_ASIDE, NO_PAUSE, Claims, Listing, Offer, Paused
from tests.conformance.world import OFFER, ROUTE, World

ANN = Paused(agents=frozenset({"ann"}))
TALK = Paused(conversations=frozenset({"talk"}))
LOW = Paused(priorities=frozenset({Priority.LOW}))


async def claimed(world: World, paused: Paused = NO_PAUSE, *offers: Offer, limit: int = 1_000) -> list[str]:
    """The requests started by claims that continue as long as there may be more."""
    started: list[str] = []
    while True:
        claims = await one_claim(world, paused, *offers, limit=limit)
        started += [claim.request_id for claim in claims.started]
        if not claims.more:
            return started


async def one_claim(world: World, paused: Paused, *offers: Offer, limit: int = 1_000) -> Claims:
    return await world.store.claim(offers or (Offer(ROUTE, "stub", 1_000),), limit, world.clock.now(), paused)


async def bring_back(world: World, paused: Paused = NO_PAUSE, limit: int = 500) -> int:
    """Look through all that was set aside; in how many steps."""
    steps, after = 0, None
    while True:
        after = await world.store.bring_back(paused, world.clock.now(), after, limit)
        steps += 1
        if after is None:
            return steps


@pytest.mark.promise("B2")
@pytest.mark.parametrize("paused", [ANN, TALK, LOW])
async def test_a_paused_request_is_neither_claimed_nor_run_at_once_until_it_is_brought_back(
    world: World, paused: Paused
) -> None:
    new = world.new("held", "talk", agent_id="ann", priority=Priority.LOW)
    enqueued = await world.store.enqueue(new, [OFFER], world.clock.now(), paused=paused)
    assert (enqueued.state, enqueued.claim) == (State.QUEUED, None)
    await world.enqueue("other", "elsewhere", agent_id="bob")
    assert await claimed(world, paused) == ["other"]
    view = await world.view("held")
    assert (view.state, view.attempts) == (State.QUEUED, ())
    assert await claimed(world) == [], "it was set aside, and is brought back by a word alone"
    await bring_back(world, paused)
    assert await claimed(world) == [], "still paused"
    await bring_back(world)
    assert await claimed(world, paused) == [], "paused again before anybody took it"
    await bring_back(world)
    (claim,) = await world.claim()
    assert (claim.request_id, claim.attempt) == ("held", 1)


@pytest.mark.promise("B2", "Q2")
async def test_order_over_and_within_conversations_is_as_if_nothing_had_been_paused(world: World) -> None:
    for number in range(6):
        world.clock.wall += 1
        await world.enqueue(f"r{number}", f"talk{number % 2}", agent_id="ann" if number < 4 else "bob")
    assert await claimed(world, ANN) == []
    assert await world.line("talk0") == ["r0", "r2", "r4"]
    await bring_back(world)
    order = []
    while claims := await world.claim(limit=1):
        order.append(claims[0].request_id)
        await world.complete(claims[0])
    assert order == [f"r{number}" for number in range(6)]


@pytest.mark.promise("B2")
async def test_others_of_its_conversation_wait_behind_it_and_pass_it_only_by_rank(world: World) -> None:
    await world.enqueue("held", "talk", agent_id="ann")
    assert await claimed(world, ANN) == []
    await world.enqueue("behind", "talk", agent_id="bob")
    assert await claimed(world, ANN) == []
    await world.enqueue("urgent", "talk", agent_id="bob", priority=Priority.CRITICAL)
    (urgent,) = (await one_claim(world, ANN)).started
    assert urgent.request_id == "urgent"
    await world.complete(urgent)
    assert await claimed(world, ANN) == []
    await bring_back(world)
    assert await claimed(world) == ["held"]


@pytest.mark.promise("B2")
async def test_a_request_set_aside_expires_and_is_cancelled_and_lets_the_next_come(world: World) -> None:
    await world.enqueue("late", "a", agent_id="ann", expires=world.clock.wall + microseconds(5))
    await world.enqueue("stopped", "b", agent_id="ann")
    await world.enqueue("next", "a", agent_id="bob")
    await world.enqueue("after", "b", agent_id="bob")
    assert await claimed(world, ANN) == []
    world.clock.wall += microseconds(6)
    (ended,) = (await world.expire()).ended
    assert (ended.request_id, ended.state) == ("late", State.EXPIRED)
    await world.cancel("stopped")
    assert sorted(await claimed(world, ANN)) == ["after", "next"]
    assert await bring_back(world) == 1


@pytest.mark.promise("B2")
async def test_a_request_that_kept_its_place_for_a_retry_keeps_it_through_a_pause(world: World) -> None:
    claim = await world.run("held", "talk", agent_id="ann")
    await world.retry(claim, after=1.0)
    await world.enqueue("behind", "talk", agent_id="bob")
    world.clock.wall += microseconds(2)
    await world.expire()
    assert await claimed(world, ANN) == []
    assert (await world.look("talk")).holder == "held"
    await bring_back(world)
    assert await claimed(world) == ["held"]


@pytest.mark.promise("B2")
async def test_a_claim_skips_paused_requests_in_bounded_steps_and_never_again(world: World) -> None:
    count = CLAIM_ASIDE + 5
    for number in range(count):
        await world.enqueue(f"r{number}", f"talk{number}", agent_id="ann")
    await world.enqueue("other", "elsewhere", agent_id="bob")
    first = await one_claim(world, ANN)
    assert first.more
    assert [claim.request_id for claim in first.started] + await claimed(world, ANN) == ["other"]
    assert sum((await world.store.waiting_by_route()).values()) == count, "it still waits, and its route is known"
    assert len(await world.listed(Listing.READY)) == count
    assert not (await one_claim(world, ANN)).more
    assert await bring_back(world, limit=50) == count // 50 + 1
    assert len(await claimed(world)) == count


@pytest.mark.promise("B2")
async def test_one_that_is_still_paused_stays_aside_when_another_is_resumed(world: World) -> None:
    await world.enqueue("a", "a", agent_id="ann")
    await world.enqueue("b", "b", agent_id="bob")
    both = Paused(agents=frozenset({"ann", "bob"}))
    assert await claimed(world, both) == []
    assert await bring_back(world, ANN, limit=1) >= 2
    assert await claimed(world, ANN) == ["b"]
    await bring_back(world)
    assert await claimed(world) == ["a"]


@pytest.mark.promise("B2")
async def test_a_request_set_aside_is_so_after_a_crash_and_comes_back(world: World) -> None:
    await world.enqueue("held", "talk", agent_id="ann")
    assert await claimed(world, ANN) == []
    await world.crash()
    assert await claimed(world) == []
    calls = world.calls
    await bring_back(world)
    assert world.calls >= calls
    assert await claimed(world) == ["held"]


@pytest.mark.promise("B2", "L7")
async def test_a_session_is_paused_by_whatever_name_its_requests_use(world: World) -> None:
    claim = await world.run("first", "talk")
    await world.complete(claim, provider_session="ps-1")
    new = world.new("held", "ps-1")
    enqueued = await world.store.enqueue(new, [OFFER], world.clock.now(), paused=TALK)
    assert enqueued.claim is None
    assert await claimed(world, TALK) == []
