"""Records that are deleted when their time is over, and those that never are."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.clock import microseconds
from ksi.request import Outcome, State, Usage
from ksi.store.values import Listing, Retry
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HOUR, OFFER, World


async def log_all(world: World) -> None:
    """The response log has written everything."""
    turns = await world.store.log_after(0, 10_000)
    await world.store.set_log_watermark(max((turn.id for turn in turns), default=0))


async def finish(world: World, request_id: str, conversation: str, state: State, **fields: Any) -> None:
    """Bring a request to a final state."""
    if state is State.COMPLETED:
        await world.complete(await world.run(request_id, conversation, **fields))
    elif state is State.FAILED:
        await world.fail(await world.run(request_id, conversation, **fields))
    elif state is State.CANCELLED:
        await world.enqueue(request_id, conversation, **fields)
        await world.cancel(request_id)
    else:
        await world.enqueue(request_id, conversation, expires=world.clock.wall, **fields)
        await world.expire()


FINAL = [State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED]


@pytest.mark.promise("Q4", "R7")
@pytest.mark.parametrize("state", FINAL)
async def test_a_finished_request_is_kept_for_its_time_and_no_longer(world: World, state: State) -> None:
    await finish(world, "a", "talk", state)
    await log_all(world)
    world.clock.forward(7 * DAY - 0.000_001)
    assert await world.prune() == (0, 0)
    assert (await world.enqueue("a")).existing is not None
    world.clock.forward(0.000_001)
    assert await world.prune() == (1, 0)
    assert await world.store.get("a") is None
    assert await world.listed(Listing.FINISHED) == []
    assert (await world.enqueue("a", body=b"{}", offers=[OFFER])).claim is not None


@pytest.mark.promise("Q8", "R4")
async def test_the_totals_of_all_that_ever_ended_stay(world: World) -> None:
    for state in FINAL:
        await finish(world, state.value, f"talk {state}", state)
    await log_all(world)
    world.clock.forward(100 * DAY)
    assert await world.prune() == (4, 4)
    totals = await world.store.totals()
    assert (totals.completed, totals.failed, totals.cancelled, totals.expired) == (1, 1, 1, 1)
    assert totals.conversations == 0
    await world.crash()
    assert await world.store.totals() == totals


@pytest.mark.promise("Q3", "Q5")
async def test_an_unfinished_request_is_never_pruned(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=1, keep_sessions=1)
    await world.retry(await world.run("retrying", "talk 1"), after=0)
    await world.retry(await world.run("parked", "talk 2"), parked=True, after=0)
    await world.run("running", "talk 3")
    await world.enqueue("queued", "talk 4")
    await world.enqueue("scheduled", "talk 5", due=world.clock.wall + 1)
    await world.acquire("lock", "talk 6")
    await world.acquire("waiter", "talk 3")
    world.clock.step_wall(1_000 * DAY)
    assert await world.prune() == (0, 0)
    assert (await world.store.totals()).conversations == 6


@pytest.mark.promise("R7")
async def test_the_oldest_finished_go_first_and_a_step_says_that_there_is_more(world: World) -> None:
    for number in range(5):
        await finish(world, str(number), f"talk {number}", State.FAILED)
        world.clock.forward(1)
    world.clock.forward(7 * DAY)
    world.pruned = True
    pruned = await world.store.prune(world.clock.now(), 2)
    assert (pruned.requests, pruned.conversations, pruned.more) == (2, 0, True)
    assert await world.listed(Listing.FINISHED) == ["4", "3", "2"]


@pytest.mark.promise("L9", "R7")
async def test_a_pruned_requests_turn_stays_as_long_as_its_conversation(world: World) -> None:
    await finish(world, "a", "talk", State.COMPLETED)
    world.clock.forward(10 * DAY)
    await finish(world, "b", "talk", State.COMPLETED)
    await log_all(world)
    world.clock.forward(1 * DAY)
    assert await world.prune() == (1, 0)
    session = await world.store.session("talk")
    assert session is not None
    assert session.head is not None
    assert session.turns == 2
    assert [turn.text for turn in await world.store.history(session.head, 1_000)] == ["answer to b", "answer to a"]
    assert world.new("a").body in [turn.body for turn in await world.store.history(session.head, 1_000)]


@pytest.mark.promise("L10", "R7")
async def test_a_conversation_is_kept_for_its_time_after_its_last_activity(world: World) -> None:
    await finish(world, "a", "talk", State.COMPLETED, agent_id="ann")
    await log_all(world)
    session = await world.store.session("talk")
    assert session is not None
    assert session.head is not None
    world.clock.forward(90 * DAY - 0.000_001)
    assert await world.prune() == (1, 0)
    assert await world.store.session("talk") is not None
    world.clock.forward(0.000_001)
    assert await world.prune() == (0, 1)
    assert await world.store.session("talk") is None
    assert await world.store.lock("talk", 1) is None
    assert (await world.store.sessions(10, agent_id="ann")).items == ()
    assert await world.store.history(session.head, 1_000) == []
    claim = await world.run("b")
    assert claim.head is None


@pytest.mark.promise("L10", "R7")
async def test_the_kept_times_are_as_configured(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(HOUR), keep_sessions=microseconds(2 * HOUR))
    await finish(world, "a", "talk", State.FAILED)
    world.clock.forward(HOUR)
    assert await world.prune() == (1, 0)
    world.clock.forward(HOUR)
    assert await world.prune() == (0, 1)


@pytest.mark.promise("L10", "R7")
async def test_a_conversation_with_a_kept_request_stays(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(DAY), keep_sessions=microseconds(DAY))
    await finish(world, "a", "talk", State.FAILED)
    world.clock.forward(DAY / 2)
    await finish(world, "b", "talk", State.FAILED)
    world.clock.forward(DAY / 2)
    assert await world.prune() == (1, 0)


@pytest.mark.promise("L7", "R7")
async def test_a_conversation_with_living_forks_stays_until_they_are_gone(world: World) -> None:
    await finish(world, "a", "parent", State.COMPLETED)
    world.clock.forward(50 * DAY)
    await finish(world, "b", "child", State.COMPLETED, fork_of="parent")
    await log_all(world)
    world.clock.forward(50 * DAY)
    assert await world.prune() == (2, 0)
    child = await world.store.session("child")
    assert child is not None
    assert child.head is not None
    assert [turn.text for turn in await world.store.history(child.head, 1_000)] == ["answer to b", "answer to a"]
    assert len((await world.store.forks(10, conversation="parent")).items) == 1
    world.clock.forward(50 * DAY)
    assert await world.prune() == (0, 2)
    assert (await world.store.forks(10)).items == ()


@pytest.mark.promise("L7", "R7")
async def test_a_forks_record_goes_with_its_child(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(DAY), keep_sessions=microseconds(DAY))
    await world.enqueue("a", "parent")
    for name in ("one", "two"):
        await world.enqueue(name, name, fork_of="parent")
    await world.cancel("one")
    world.clock.forward(DAY)
    assert await world.prune() == (1, 1)
    assert [fork.child for fork in (await world.store.forks(10)).items] == ["two"]
    assert [fork.child for fork in (await world.store.forks(10, conversation="parent")).items] == ["two"]


@pytest.mark.promise("L7", "R7")
async def test_a_conversations_other_names_and_the_forks_that_its_provider_made_go_with_it(world: World) -> None:
    claim = await world.run("a")
    await world.complete(claim, provider_session="one")
    await world.complete(await world.run("b", "one"), provider_session="two", fork="new_session")
    await world.complete(await world.run("c", "child", fork_of="two"))
    await log_all(world)
    assert [(fork.parent, fork.child) for fork in (await world.store.forks(10, None, "one")).items] == [
        ("one", "two"),
        ("talk", "child"),
    ]
    world.clock.forward(365 * DAY)
    assert await world.prune() == (3, 2)
    assert (await world.store.forks(10)).items == ()
    for name in ("one", "two"):
        assert await world.store.session(name) is None
        again = await world.run(f"again {name}", name)
        assert (again.conversation, again.head) == (name, None)


@pytest.mark.promise("R3", "R7")
async def test_an_answer_that_is_not_in_the_log_yet_keeps_its_request_and_conversation(world: World) -> None:
    await finish(world, "a", "talk", State.COMPLETED)
    await finish(world, "b", "talk", State.FAILED)
    world.clock.forward(365 * DAY)
    assert await world.prune() == (1, 0)
    assert [turn.request_id for turn in await world.store.log_after(0, 10)] == ["a"]
    await log_all(world)
    assert await world.prune() == (1, 1)


@pytest.mark.promise("T1", "R7")
async def test_the_trail_of_a_request_that_is_kept_stays_whole(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=microseconds(HOUR), keep_sessions=microseconds(HOUR))
    for name in ("waiting", "done"):
        claim = await world.run(name, f"talk {name}")
        attempt = world.attempt(claim, Outcome.FAILED, usage=Usage(input_tokens=7))
        await world.settle(claim, Retry(at=world.clock.wall + microseconds(2 * HOUR)), attempt)
    world.clock.forward(2 * HOUR)
    await world.prune()
    await world.expire()
    for claim in await world.claim():
        if claim.request_id == "done":
            await world.complete(claim, usage=Usage(input_tokens=1))
    await log_all(world)
    await world.prune()
    assert (await world.view("waiting")).usage == Usage(input_tokens=7)
    assert (await world.view("done")).usage == Usage(input_tokens=8)


@pytest.mark.promise("R7")
async def test_a_wall_clock_that_steps_back_prunes_nothing(world: World) -> None:
    await finish(world, "a", "talk", State.FAILED)
    world.clock.step_wall(-100 * DAY)
    assert await world.prune() == (0, 0)


@pytest.mark.promise("R7")
async def test_a_pruned_store_goes_on_as_before(world: World) -> None:
    await finish(world, "a", "talk", State.COMPLETED)
    await log_all(world)
    world.clock.forward(100 * DAY)
    await world.prune()
    await world.crash()
    claim = await world.run("a")
    settled = await world.complete(claim)
    assert settled.state is State.COMPLETED
    assert [turn.request_id for turn in await world.store.log_after(await world.store.log_watermark(), 5)] == ["a"]


async def test_keys_never_come_twice(store_factory: StoreFactory) -> None:
    world = await store_factory(keep_finished=1, keep_sessions=1)
    claim = await world.run("a")
    await world.fail(claim)
    world.clock.forward(1)
    assert await world.prune() == (1, 1)
    await world.restart()
    later = await world.run("a")
    assert later.key > claim.key
