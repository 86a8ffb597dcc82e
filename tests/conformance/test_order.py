"""The next request to run: ranks, head starts, slots, routes."""

from __future__ import annotations

import pytest

from ksi.clock import MICROSECONDS, microseconds
from ksi.errors import ConversationBusy, QueueFull
from ksi.request import OnBusy, Priority, State
from ksi.store.values import Claims, Offer
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HEAD_STARTS, HOUR, OFFER, ROUTE, World


@pytest.mark.promise("Q1", "Q2")
async def test_higher_priorities_run_first_whatever_came_first(world: World) -> None:
    for priority in (Priority.BACKGROUND, Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL):
        await world.enqueue(priority.word, f"talk {priority.word}", priority=priority)
        world.clock.forward(1)
    assert await world.claim_ids() == ["critical", "high", "normal", "low", "background"]


@pytest.mark.promise("Q2")
async def test_within_one_priority_first_come_is_first_served(world: World) -> None:
    for name in "abcde":
        await world.enqueue(name, f"talk {name}")
        world.clock.forward(0.001)
    assert await world.claim_ids() == ["a", "b", "c", "d", "e"]


@pytest.mark.promise("Q2")
async def test_equal_ranks_go_by_arrival(world: World) -> None:
    names = [str(n) for n in range(12)]
    for name in names:
        await world.enqueue(name, f"talk {name}", rank=77)
    assert await world.claim_ids() == names


@pytest.mark.promise("Q2")
@pytest.mark.parametrize(
    ("higher", "lower", "hours"),
    [
        (Priority.HIGH, Priority.NORMAL, 3),
        (Priority.HIGH, Priority.LOW, 5),
        (Priority.HIGH, Priority.BACKGROUND, 6),
        (Priority.NORMAL, Priority.LOW, 2),
        (Priority.NORMAL, Priority.BACKGROUND, 3),
        (Priority.LOW, Priority.BACKGROUND, 1),
    ],
)
async def test_a_head_start_passes_others_up_to_its_difference_and_not_a_microsecond_longer(
    world: World, higher: Priority, lower: Priority, hours: int
) -> None:
    await world.enqueue("first", "talk a", priority=lower)
    world.clock.wall += microseconds(hours * HOUR) - 1
    await world.enqueue("just before", "talk b", priority=higher)
    world.clock.wall += 1
    await world.enqueue("tied", "talk c", priority=higher)
    world.clock.wall += 1
    await world.enqueue("too late", "talk d", priority=higher)
    assert await world.claim_ids() == ["just before", "first", "tied", "too late"]


@pytest.mark.promise("Q2")
async def test_no_request_starves_behind_an_endless_stream_of_higher_priority(world: World) -> None:
    await world.enqueue("patient", "talk", priority=Priority.BACKGROUND)
    started = world.clock.wall
    for hour in range(8):
        await world.enqueue(f"{hour}a", f"talk {hour}a", priority=Priority.HIGH)
        await world.enqueue(f"{hour}b", f"talk {hour}b", priority=Priority.HIGH)
        if (claim := await world.claim_one()).request_id == "patient":
            break
        await world.complete(claim)
        world.clock.forward(HOUR)
    waited = world.clock.wall - started
    assert await world.state("patient") in (State.RUNNING, State.QUEUED)
    assert waited >= microseconds(6 * HOUR)
    assert "patient" in [claim.request_id for claim in await world.claim(limit=8)] or waited <= microseconds(7 * HOUR)


@pytest.mark.promise("Q2")
async def test_critical_comes_before_all_however_long_they_waited(world: World) -> None:
    await world.enqueue("old", "talk a", priority=Priority.HIGH)
    world.clock.forward(10_000 * DAY)
    await world.enqueue("urgent", "talk b", priority=Priority.CRITICAL)
    assert await world.claim_ids() == ["urgent", "old"]


@pytest.mark.promise("Q2", "Q7")
async def test_a_delayed_request_ranks_from_its_due_time(world: World) -> None:
    due = world.clock.wall + 10 * MICROSECONDS
    await world.enqueue("delayed", "talk a", due=due)
    world.clock.forward(9)
    await world.enqueue("before", "talk b")
    world.clock.forward(2)
    await world.enqueue("after", "talk c")
    await world.expire()
    assert await world.claim_ids() == ["before", "delayed", "after"]


@pytest.mark.promise("Q2", "L2")
async def test_a_line_is_in_the_same_order_as_the_queue(world: World) -> None:
    claim = await world.run("holder")
    for priority in (Priority.LOW, Priority.CRITICAL, Priority.BACKGROUND, Priority.HIGH, Priority.NORMAL):
        await world.enqueue(priority.word, priority=priority)
    ranked = ["critical", "high", "normal", "low", "background"]
    assert await world.line() == ranked
    ran = []
    for _ in ranked:
        await world.complete(claim)
        claim = await world.claim_one()
        ran.append(claim.request_id)
    assert ran == ranked


@pytest.mark.promise("L1")
async def test_one_request_of_a_conversation_runs_at_a_time(world: World) -> None:
    for name in "abc":
        await world.enqueue(name)
    assert await world.claim_ids() == ["a"]
    assert await world.claim_ids() == []


@pytest.mark.promise("L2")
async def test_a_newcomer_that_outranks_the_head_of_a_free_line_becomes_the_ready_one(world: World) -> None:
    await world.enqueue("a")
    enqueued = await world.enqueue("b", priority=Priority.HIGH)
    assert (enqueued.position, enqueued.ready) == (0, False)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("Q6")
async def test_a_conversation_that_waits_for_its_turn_never_idles_a_worker(world: World) -> None:
    await world.run("a", "busy")
    for number in range(50):
        await world.enqueue(f"busy {number}", "busy", priority=Priority.HIGH)
    await world.enqueue("free", "talk", priority=Priority.BACKGROUND)
    assert await world.claim_ids(limit=1) == ["free"]


# -- slots and routes -------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q6")
async def test_a_claim_takes_no_more_than_its_limit(world: World) -> None:
    for name in "abc":
        await world.enqueue(name, f"talk {name}")
    assert await world.claim_ids(limit=2) == ["a", "b"]
    assert await world.claim_ids(limit=0) == []


@pytest.mark.promise("Q6")
async def test_no_more_run_at_a_provider_than_its_offer_says_over_all_claims(world: World) -> None:
    for name in "abcd":
        await world.enqueue(name, f"talk {name}")
    two = Offer(ROUTE, "one", 2)
    first = await world.claim(two)
    assert [claim.request_id for claim in first] == ["a", "b"]
    assert await world.claim_ids(two) == []
    await world.complete(first[0])
    assert await world.claim_ids(two) == ["c"]


@pytest.mark.promise("Q6")
async def test_two_routes_to_one_provider_share_its_slots(world: World) -> None:
    for name, route in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")):
        await world.enqueue(name, f"talk {name}", route=route)
    assert await world.claim_ids(Offer("x", "one", 3), Offer("y", "one", 3)) == ["a", "b", "c"]


@pytest.mark.promise("Q6")
async def test_a_claim_merges_the_routes_by_rank(world: World) -> None:
    await world.enqueue("a", "talk a", route="x")
    await world.enqueue("b", "talk b", route="y", priority=Priority.HIGH)
    await world.enqueue("c", "talk c", route="x", priority=Priority.CRITICAL)
    await world.enqueue("d", "talk d", route="y")
    await world.enqueue("e", "talk e", route="z", priority=Priority.CRITICAL)
    assert await world.claim_ids(Offer("x", "one", 5), Offer("y", "two", 5)) == ["c", "b", "a", "d"]


@pytest.mark.promise("Q6")
async def test_a_saturated_route_delays_no_other(world: World) -> None:
    for number in range(30):
        await world.enqueue(f"x{number}", f"talk {number}", route="x", priority=Priority.CRITICAL)
    await world.enqueue("y", "talk", route="y", priority=Priority.BACKGROUND)
    assert await world.claim_ids(Offer("x", "one", 0), Offer("y", "two", 1)) == ["y"]


@pytest.mark.promise("Q6")
async def test_two_offers_of_one_route_fill_both_providers_in_order(world: World) -> None:
    for name in "abcd":
        await world.enqueue(name, f"talk {name}")
    claims = await world.claim(Offer(ROUTE, "one", 1), Offer(ROUTE, "two", 2))
    assert [(claim.request_id, claim.provider) for claim in claims] == [("a", "one"), ("b", "two"), ("c", "two")]


@pytest.mark.promise("Q6")
async def test_offers_to_one_provider_are_each_held_to_their_own_limit(world: World) -> None:
    for number in range(3):
        await world.enqueue(f"x{number}", f"talk x{number}", route="x")
        await world.enqueue(f"y{number}", f"talk y{number}", route="y")
    assert await world.claim_ids(Offer("x", "one", 1), Offer("y", "one", 3)) == ["x0", "y0", "y1"]


async def test_nothing_offered_is_nothing_claimed(world: World) -> None:
    await world.enqueue("a")
    assert await world.store.claim([], 10, world.clock.now()) == Claims()


@pytest.mark.promise("Q7")
async def test_a_request_past_its_time_to_live_is_not_claimed(world: World) -> None:
    await world.enqueue("a", "talk a", expires=world.clock.wall + microseconds(10))
    await world.enqueue("b", "talk b", expires=world.clock.wall + microseconds(10) + 1)
    world.clock.wall += microseconds(10)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("L1", "F10")
async def test_each_claim_has_a_higher_fence_and_a_token_of_its_own(world: World) -> None:
    fences, tokens = [], []
    for name in "abcd":
        claim = await world.run(name, "talk" if name < "c" else f"talk {name}")
        fences.append(claim.fence)
        tokens.append(claim.token)
        await world.complete(claim)
    assert fences == sorted(set(fences))
    assert len(set(tokens)) == len(tokens)


@pytest.mark.promise("L2")
async def test_a_claim_names_the_conversations_head(world: World) -> None:
    turn = (await world.complete(await world.run("a"))).turn
    await world.enqueue("b")
    assert (await world.claim_one()).head == turn


async def test_renewing_loses_nothing_if_a_store_has_one_daemon(world: World) -> None:
    await world.run("a")
    world.clock.forward(DAY)
    assert tuple(await world.renew()) == ()
    assert await world.state("a") is State.RUNNING


# -- on_busy: interrupt -----------------------------------------------------------------------------------------------


@pytest.mark.promise("L3")
async def test_an_interruption_marks_the_running_holder_and_takes_the_head_of_the_line(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b", priority=Priority.HIGH)
    enqueued = await world.enqueue("c", on_busy=OnBusy.INTERRUPT)
    assert (enqueued.state, enqueued.position, enqueued.ready) == (State.QUEUED, 0, False)
    assert (enqueued.stopping, enqueued.holder, enqueued.passing) == ("a", "a", None)
    held = await world.view("a")
    assert (held.state, held.cancelling, held.interrupted_by) == (State.RUNNING, True, "c")
    assert await world.line() == ["c", "b"]
    settled = await world.retry(claim)
    assert settled.state is State.CANCELLED
    assert settled.passing is not None
    assert settled.passing.next_request == "c"
    assert await world.claim_ids() == ["c"]


@pytest.mark.promise("L3")
@pytest.mark.parametrize("state", [State.RETRYING, State.PARKED, State.QUEUED])
async def test_an_interruption_cancels_a_waiting_holder_at_once(world: World, state: State) -> None:
    claim = await world.run("a")
    if state is State.QUEUED:
        await world.give_back(claim)
    else:
        await world.retry(claim, parked=state is State.PARKED)
    await world.enqueue("b")
    assert await world.state("a") is state
    calls = world.calls
    enqueued = await world.enqueue("c", offers=[OFFER], on_busy=OnBusy.INTERRUPT)
    assert world.calls > calls
    assert (enqueued.state, enqueued.position, enqueued.ready, enqueued.holder) == (State.QUEUED, 0, False, None)
    assert (enqueued.stopping, enqueued.claim) == (None, None)
    assert enqueued.passing is not None
    passing = enqueued.passing
    assert (passing.conversation, passing.released_by, passing.next_request) == ("talk", "a", "c")
    view = await world.view("a")
    assert (view.state, view.interrupted_by, view.error) == (State.CANCELLED, "c", "cancelled")
    assert await world.claim_ids() == ["c"]


@pytest.mark.promise("L3")
async def test_an_interruption_of_a_waiting_holder_with_no_line_is_ready_next(world: World) -> None:
    await world.retry(await world.run("a"))
    enqueued = await world.enqueue("b", on_busy=OnBusy.INTERRUPT)
    assert enqueued.passing is not None
    assert enqueued.passing.next_request == "b"
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("L3")
async def test_a_holder_of_higher_priority_is_not_interrupted(world: World) -> None:
    await world.run("a", priority=Priority.HIGH)
    await world.enqueue("b")
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("c", on_busy=OnBusy.INTERRUPT)
    assert (refused.value.details["holder"], refused.value.details["position"]) == ("a", 1)
    assert not (await world.view("a")).cancelling
    assert await world.line() == ["b"]


@pytest.mark.promise("L3")
@pytest.mark.parametrize("priority", [Priority.NORMAL, Priority.HIGH])
async def test_a_holder_of_the_same_or_a_lower_priority_is_interrupted(world: World, priority: Priority) -> None:
    await world.run("a")
    assert (await world.enqueue("b", on_busy=OnBusy.INTERRUPT, priority=priority)).stopping == "a"


@pytest.mark.promise("L3")
async def test_an_external_holder_is_never_interrupted(world: World) -> None:
    await world.acquire("lock", priority=Priority.BACKGROUND)
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("a", on_busy=OnBusy.INTERRUPT, priority=Priority.CRITICAL)
    assert refused.value.details["holder"] == "lock"
    assert (await world.look()).holder == "lock"


@pytest.mark.promise("L3")
async def test_a_later_interruption_comes_before_an_earlier_one_and_the_first_is_named(world: World) -> None:
    await world.run("a")
    await world.enqueue("b", on_busy=OnBusy.INTERRUPT)
    again = await world.enqueue("c", on_busy=OnBusy.INTERRUPT)
    assert (again.stopping, again.position) == ("a", 0)
    assert await world.line() == ["c", "b"]
    assert (await world.view("a")).interrupted_by == "b"


@pytest.mark.promise("L3")
async def test_an_interruption_without_a_holder_takes_the_head_of_a_free_queue(world: World) -> None:
    await world.enqueue("a", priority=Priority.HIGH)
    enqueued = await world.enqueue("b", on_busy=OnBusy.INTERRUPT)
    assert (enqueued.position, enqueued.stopping, enqueued.passing) == (0, None, None)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("L3")
async def test_an_interruption_of_a_free_conversation_runs_at_once(world: World) -> None:
    assert (await world.enqueue("a", offers=[OFFER], on_busy=OnBusy.INTERRUPT)).claim is not None


@pytest.mark.promise("L3", "Q5")
async def test_a_full_queue_refuses_an_interruption_and_its_holder_goes_on(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await world.run("a", "talk a")
    await world.enqueue("b", "talk b")
    with pytest.raises(QueueFull):
        await world.enqueue("c", "talk a", on_busy=OnBusy.INTERRUPT)
    view = await world.view("a")
    assert (view.cancelling, view.interrupted_by) == (False, None)


@pytest.mark.promise("L3")
async def test_an_interrupted_holder_that_had_its_answer_already_is_completed(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b", on_busy=OnBusy.INTERRUPT)
    settled = await world.complete(claim)
    assert settled.state is State.COMPLETED
    assert (await world.view("a")).interrupted_by == "b"
    assert (await world.claim_one()).head == settled.turn


@pytest.mark.promise("Q2")
async def test_the_head_of_a_queue_after_an_interruption_stays_behind_later_higher_ranks(world: World) -> None:
    await world.run("a")
    await world.enqueue("b", on_busy=OnBusy.INTERRUPT)
    await world.enqueue("c", priority=Priority.CRITICAL)
    assert await world.line() == ["c", "b"]
    assert HEAD_STARTS.rank(Priority.CRITICAL, world.clock.wall) < 0
