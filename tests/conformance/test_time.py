"""The work that a store does as time passes."""

from __future__ import annotations

import pytest

from ksi.clock import microseconds
from ksi.request import State
from ksi.store.values import Listing
from tests.conformance.world import DAY, HOUR, World


@pytest.mark.promise("Q7")
async def test_a_scheduled_request_is_queued_when_it_is_due_and_not_before(world: World) -> None:
    due = world.clock.wall + microseconds(10)
    await world.enqueue("a", due=due)
    world.clock.forward(9.999_999)
    early = await world.expire()
    assert (early.woken, early.next_wall) == (0, due)
    assert await world.claim_ids() == []
    world.clock.forward(0.000_001)
    calls = world.calls
    assert (await world.expire()).woken == 1
    assert world.calls > calls
    view = await world.view("a")
    assert (view.state, view.due, view.position) == (State.QUEUED, None, 0)
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("Q7")
async def test_delayed_requests_are_listed_the_soonest_first_and_woken_when_due(world: World) -> None:
    for name, seconds in (("c", 30), ("a", 10), ("b", 20)):
        await world.enqueue(name, f"talk {name}", due=world.clock.wall + microseconds(seconds))
    await world.retry(await world.run("r", "talk r"), after=15)
    assert await world.listed(Listing.DELAYED) == ["a", "r", "b", "c"]
    world.clock.forward(20)
    assert (await world.expire()).woken == 3
    assert await world.listed(Listing.DELAYED) == ["c"]


@pytest.mark.promise("Q7")
async def test_a_woken_request_joins_the_line_of_its_busy_conversation(world: World) -> None:
    await world.enqueue("late", due=world.clock.wall + microseconds(5))
    await world.run("a")
    world.clock.forward(1)
    await world.enqueue("early")
    world.clock.forward(9)
    await world.enqueue("after")
    await world.expire()
    assert await world.line() == ["early", "late", "after"]


@pytest.mark.promise("Q7")
async def test_a_wall_clock_that_steps_back_wakes_nothing_twice(world: World) -> None:
    await world.enqueue("a", due=world.clock.wall + microseconds(5))
    world.clock.forward(5)
    await world.expire()
    world.clock.step_wall(-DAY)
    assert (await world.expire()).woken == 0
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("Q7", "R1")
async def test_a_request_that_was_not_started_in_time_expires(world: World) -> None:
    await world.run("holder")
    expires = world.clock.wall + microseconds(10)
    await world.enqueue("a", expires=expires)
    await world.enqueue("b")
    assert (await world.expire()).next_wall == expires
    world.clock.forward(10)
    (ended,) = (await world.expire()).ended
    assert (ended.request_id, ended.conversation, ended.state) == ("a", "talk", State.EXPIRED)
    assert (ended.error, ended.passing) == (None, None)
    view = await world.view("a")
    assert (view.state, view.finished_at, view.expires) == (State.EXPIRED, world.clock.wall, expires)
    assert (view.error, view.started_at, view.attempts) == (None, None, ())
    assert await world.line() == ["b"]


@pytest.mark.promise("Q7")
async def test_an_expired_head_of_a_free_line_makes_the_next_one_ready(world: World) -> None:
    await world.enqueue("a", expires=world.clock.wall + 1)
    await world.enqueue("b")
    world.clock.forward(1)
    assert await world.claim_ids() == []
    calls = world.calls
    await world.expire()
    assert world.calls > calls
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("Q7", "L5")
async def test_an_expired_head_of_a_free_line_lets_a_waiter_in(world: World) -> None:
    await world.enqueue("a", expires=world.clock.wall + 1)
    await world.acquire("waiter")
    world.clock.forward(1)
    (ended,) = (await world.expire()).ended
    assert ended.passing is not None
    assert ended.passing.granted is not None
    assert (ended.passing.released_by, ended.passing.granted.request_id) == ("a", "waiter")
    assert (await world.look()).holder == "waiter"


@pytest.mark.promise("Q7")
async def test_a_delayed_request_whose_time_to_live_ends_before_it_is_due_expires(world: World) -> None:
    await world.enqueue("a", due=world.clock.wall + 20, expires=world.clock.wall + 10)
    world.clock.forward(1)
    expiry = await world.expire()
    assert (expiry.woken, [end.request_id for end in expiry.ended]) == (0, ["a"])
    assert (await world.view("a")).due is None


@pytest.mark.promise("Q7")
async def test_a_running_request_does_not_expire_by_its_time_to_live(world: World) -> None:
    await world.run("a", expires=world.clock.wall + microseconds(1))
    world.clock.forward(DAY)
    expiry = await world.expire()
    assert (expiry.ended, expiry.next_wall) == ((), None)
    assert await world.state("a") is State.RUNNING


@pytest.mark.promise("Q7")
async def test_requests_expire_in_the_order_of_their_ends(world: World) -> None:
    for name, seconds in (("c", 3), ("a", 1), ("b", 2)):
        await world.enqueue(name, f"talk {name}", expires=world.clock.wall + microseconds(seconds))
    world.clock.forward(10)
    assert [ended.request_id for ended in (await world.expire()).ended] == ["a", "b", "c"]


@pytest.mark.promise("R7")
async def test_an_idle_store_has_nothing_to_wait_for(world: World) -> None:
    await world.enqueue("a")
    expiry = await world.expire()
    assert (expiry.woken, expiry.ended, expiry.lapsed, expiry.more) == (0, (), (), False)
    assert (expiry.next_wall, expiry.next_mono) == (None, None)


@pytest.mark.promise("R7")
async def test_the_next_times_are_the_soonest_of_each_clock(world: World) -> None:
    wall, mono = world.clock.wall, world.clock.mono
    await world.retry(await world.run("c", "talk c"), after=30)
    await world.enqueue("a", "talk a", due=wall + microseconds(50))
    await world.enqueue("b", "talk b", expires=wall + microseconds(40))
    await world.acquire("lock", "talk d")
    await world.acquire("waiter", "talk d", timeout=20)
    expiry = await world.expire()
    assert (expiry.next_wall, expiry.next_mono) == (wall + microseconds(30), mono + microseconds(20))
    world.clock.forward(30)
    expiry = await world.expire()
    assert (expiry.next_wall, expiry.next_mono) == (wall + microseconds(40), mono + microseconds(300))
    world.clock.forward(10)
    assert (await world.expire()).next_wall == wall + microseconds(50)


@pytest.mark.promise("Q8", "R7")
async def test_a_step_does_no_more_than_its_limit_and_says_that_there_is_more(world: World) -> None:
    for number in range(3):
        await world.enqueue(f"due {number}", f"talk d{number}", due=world.clock.wall + 1 + number)
        await world.enqueue(f"late {number}", f"talk l{number}", expires=world.clock.wall + 1 + number)
        await world.acquire(f"lock {number}", f"talk {number}")
        await world.acquire(f"waiter {number}", f"talk {number}", timeout=5)
    world.clock.forward(HOUR)
    steps, done = 0, 0
    while True:
        expiry = await world.expire(limit=5)
        did = expiry.woken + len(expiry.ended) + len(expiry.lapsed)
        assert did <= 5
        done += did
        steps += 1
        if not expiry.more:
            break
        assert did == 5
    assert (done, steps) == (12, 3)
    assert (await world.expire()).next_mono is None


@pytest.mark.promise("Q7", "L2")
async def test_a_request_that_is_due_and_a_lock_that_lapses_in_one_step_meet_in_order(world: World) -> None:
    await world.acquire("lock")
    await world.enqueue("a", due=world.clock.wall + microseconds(100))
    world.clock.forward(300)
    expiry = await world.expire()
    assert expiry.woken == 1
    (lapse,) = expiry.lapsed
    assert lapse.passing is not None
    assert lapse.passing.next_request == "a"
    assert await world.claim_ids() == ["a"]
