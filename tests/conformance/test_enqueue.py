"""How a request comes into a store."""

from __future__ import annotations

import pytest

from ksi.clock import microseconds
from ksi.errors import ConversationBusy, NotFound, QueueFull, RequestIdConflict
from ksi.request import OnBusy, Priority, State
from ksi.store.values import Listing, Offer
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import HOUR, OFFER, ROUTE, World

# -- running at once --------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q6")
async def test_a_request_for_a_free_conversation_with_a_free_slot_runs_at_once(world: World) -> None:
    enqueued = await world.enqueue("a", offers=[OFFER], agent_id="ann", priority=Priority.HIGH)
    claim = enqueued.claim
    assert claim is not None
    assert (enqueued.state, enqueued.ready, enqueued.position, enqueued.holder) == (State.RUNNING, True, 0, None)
    assert (claim.request_id, claim.conversation, claim.provider, claim.route) == ("a", "talk", "stub", ROUTE)
    assert (claim.attempt, claim.head, claim.agent_id, claim.priority) == (1, None, "ann", Priority.HIGH)
    assert claim.body == world.new("a").body
    assert claim.started_at == claim.enqueued_at == world.clock.wall
    assert claim.token != 0
    view = await world.view("a")
    assert (view.state, view.provider, view.started_at) == (State.RUNNING, "stub", world.clock.wall)


@pytest.mark.promise("L2")
async def test_without_an_offer_a_request_for_a_free_conversation_is_ready_and_queued(world: World) -> None:
    enqueued = await world.enqueue("a")
    assert (enqueued.state, enqueued.ready, enqueued.position, enqueued.claim) == (State.QUEUED, True, 0, None)
    assert await world.listed(Listing.READY) == ["a"]


async def test_an_offer_of_another_route_lets_nothing_run(world: World) -> None:
    enqueued = await world.enqueue("a", offers=[Offer("other", "stub", 10)])
    assert enqueued.claim is None


@pytest.mark.promise("Q6")
async def test_a_full_provider_lets_nothing_run_at_once_and_another_one_does(world: World) -> None:
    one = Offer("first", "one", 1)
    await world.enqueue("a", "talk a", [one], route="first")
    waiting = await world.enqueue("b", "talk b", [one], route="first")
    assert waiting.claim is None
    enqueued = await world.enqueue("c", "talk c", [one, Offer("second", "two", 1)], route="second")
    assert enqueued.claim is not None
    assert enqueued.claim.provider == "two"


@pytest.mark.promise("Q6")
async def test_of_two_offers_of_one_route_the_first_with_a_free_slot_is_taken(world: World) -> None:
    offers = [Offer(ROUTE, "one", 1), Offer(ROUTE, "two", 1)]
    providers = []
    for name in "abc":
        enqueued = await world.enqueue(name, f"talk {name}", offers)
        providers.append(enqueued.claim and enqueued.claim.provider)
    assert providers == ["one", "two", None]


@pytest.mark.promise("Q2")
async def test_nothing_runs_at_once_past_a_ready_request_of_a_route_to_the_same_provider(world: World) -> None:
    await world.enqueue("a", "talk a", route="mine")
    offers = [Offer("mine", "one", 5), Offer("yours", "one", 5)]
    assert (await world.enqueue("b", "talk b", offers, route="yours")).claim is None
    assert await world.claim_ids(*offers) == ["a", "b"]


@pytest.mark.promise("Q2", "Q1")
async def test_a_request_runs_at_once_past_ready_ones_that_it_outranks(world: World) -> None:
    await world.enqueue("a", "talk a")
    enqueued = await world.enqueue("b", "talk b", [OFFER], priority=Priority.HIGH)
    assert enqueued.claim is not None


@pytest.mark.promise("Q6")
async def test_a_ready_request_of_a_route_to_another_provider_blocks_none(world: World) -> None:
    await world.enqueue("a", "talk a", route="mine")
    offers = [Offer("mine", "one", 0), Offer("yours", "two", 5)]
    assert (await world.enqueue("b", "talk b", offers, route="yours")).claim is not None


async def test_a_ready_request_past_its_time_to_live_blocks_none(world: World) -> None:
    await world.enqueue("a", "talk a", expires=world.clock.wall + 10)
    world.clock.forward(1)
    assert (await world.enqueue("b", "talk b", [OFFER])).claim is not None


async def test_a_request_whose_time_to_live_is_over_does_not_run_at_once(world: World) -> None:
    enqueued = await world.enqueue("a", offers=[OFFER], expires=world.clock.wall)
    assert (enqueued.state, enqueued.claim) == (State.QUEUED, None)


@pytest.mark.promise("L1")
async def test_a_request_for_a_held_conversation_waits_and_gets_its_position_and_holder(world: World) -> None:
    await world.run("a")
    positions = []
    for name in "bcd":
        enqueued = await world.enqueue(name, offers=[OFFER])
        assert (enqueued.state, enqueued.ready, enqueued.holder, enqueued.claim) == (State.QUEUED, False, "a", None)
        positions.append(enqueued.position)
    assert positions == [0, 1, 2]
    assert await world.line() == ["b", "c", "d"]


@pytest.mark.promise("L2")
async def test_a_request_behind_a_line_without_a_holder_waits_its_turn(world: World) -> None:
    await world.enqueue("a")
    enqueued = await world.enqueue("b", offers=[OFFER])
    assert (enqueued.state, enqueued.ready, enqueued.position, enqueued.holder) == (State.QUEUED, False, 1, None)


@pytest.mark.promise("L2")
async def test_a_position_counts_only_requests_before_it_in_rank(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    await world.enqueue("c", priority=Priority.HIGH)
    assert (await world.enqueue("d", priority=Priority.HIGH)).position == 1
    assert (await world.enqueue("e", priority=Priority.LOW)).position == 3
    assert (await world.view("b")).position == 2


@pytest.mark.promise("L2")
async def test_positions_are_exact_up_to_the_limit_and_stay_there(store_factory: StoreFactory) -> None:
    world = await store_factory(position_limit=3)
    await world.run("holder")
    positions = [(await world.enqueue(str(n))).position for n in range(6)]
    assert positions == [0, 1, 2, 3, 3, 3]
    assert (await world.look()).waiting == 3
    assert (await world.view("5")).position == 3


@pytest.mark.promise("L2")
async def test_positions_are_counted_in_the_own_conversation_alone(world: World) -> None:
    for name in "abc":
        await world.run(name, f"talk {name}")
    for name in "defg":
        await world.enqueue(name, "talk a")
    assert (await world.enqueue("h", "talk b")).position == 0


async def test_the_daemon_is_notified_when_a_request_waits_for_a_slot(world: World) -> None:
    calls = world.calls
    await world.enqueue("a")
    assert world.calls > calls


# -- delayed requests -------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q7", "L8")
async def test_a_delayed_request_is_scheduled_and_holds_nothing(world: World) -> None:
    due = world.clock.wall + microseconds(HOUR)
    enqueued = await world.enqueue("a", offers=[OFFER], due=due)
    assert (enqueued.state, enqueued.ready, enqueued.position, enqueued.claim) == (State.SCHEDULED, False, 0, None)
    view = await world.view("a")
    assert (view.due, view.position) == (due, None)
    assert await world.line() == []
    assert (await world.enqueue("b", offers=[OFFER])).claim is not None


@pytest.mark.promise("Q7")
async def test_a_delayed_request_gets_the_present_holder_of_its_conversation(world: World) -> None:
    await world.run("a")
    enqueued = await world.enqueue("b", due=world.clock.wall + 1)
    assert (enqueued.holder, enqueued.position) == ("a", 0)
    assert (await world.view("b")).holder == "a"


@pytest.mark.promise("Q7")
async def test_a_request_that_is_due_already_is_not_delayed(world: World) -> None:
    enqueued = await world.enqueue("a", offers=[OFFER], due=world.clock.wall)
    assert enqueued.claim is not None
    assert (await world.view("a")).due is None


@pytest.mark.promise("Q7", "L3")
@pytest.mark.parametrize("on_busy", [OnBusy.REJECT, OnBusy.INTERRUPT])
async def test_a_delayed_request_meets_no_holder_yet_whatever_its_on_busy(world: World, on_busy: OnBusy) -> None:
    await world.run("a")
    enqueued = await world.enqueue("b", on_busy=on_busy, due=world.clock.wall + 1)
    assert (enqueued.state, enqueued.stopping, enqueued.passing) == (State.SCHEDULED, None, None)
    assert not (await world.view("a")).cancelling


# -- one id, one request ----------------------------------------------------------------------------------------------


@pytest.mark.promise("Q4")
async def test_the_same_id_and_content_again_attaches_to_the_waiting_request(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    await world.enqueue("c")
    again = await world.enqueue("c", offers=[OFFER])
    assert (again.state, again.position, again.holder, again.claim) == (State.QUEUED, 1, "a", None)
    assert again.existing == await world.view("c")
    assert await world.line() == ["b", "c"]


@pytest.mark.promise("Q4")
async def test_the_same_id_and_content_again_attaches_in_every_state(world: World) -> None:
    async def attached(request_id: str) -> State:
        again = await world.enqueue(request_id, "elsewhere")
        assert again.existing is not None
        assert again.existing == await world.view(request_id)
        assert again.conversation == again.existing.conversation != "elsewhere"
        assert again.state is again.existing.state
        return again.state

    await world.enqueue("a", "talk a", due=world.clock.wall + 1)
    assert await attached("a") is State.SCHEDULED
    claim = await world.run("b", "talk b")
    assert await attached("b") is State.RUNNING
    await world.retry(claim, after=0)
    assert await attached("b") is State.RETRYING
    await world.expire()
    assert await attached("b") is State.QUEUED
    claim = await world.claim_one()
    await world.retry(claim, parked=True, after=HOUR)
    assert await attached("b") is State.PARKED
    await world.complete(await world.run("c", "talk c"))
    assert await attached("c") is State.COMPLETED
    await world.fail(await world.run("d", "talk d"))
    assert await attached("d") is State.FAILED
    await world.cancel("b")
    assert await attached("b") is State.CANCELLED
    assert await world.store.session("elsewhere") is None


@pytest.mark.promise("Q4")
async def test_an_attached_final_request_brings_its_answer(world: World) -> None:
    await world.complete(await world.run("a"))
    again = await world.enqueue("a")
    assert again.existing is not None
    assert again.existing.answer is not None
    assert again.existing.answer.text == "answer to a"


@pytest.mark.promise("Q4")
async def test_the_same_id_with_other_content_is_a_conflict_and_changes_nothing(world: World) -> None:
    await world.enqueue("a")
    before = await world.view("a")
    with pytest.raises(RequestIdConflict):
        await world.enqueue("a", "other", body=b"{}")
    assert await world.view("a") == before
    assert await world.store.session("other") is None


@pytest.mark.promise("Q4", "L5")
async def test_the_id_of_a_lock_or_of_a_waiter_for_one_is_a_conflict_until_it_is_gone(world: World) -> None:
    await world.acquire("lock")
    await world.acquire("waiter")
    for name in ("lock", "waiter"):
        with pytest.raises(RequestIdConflict):
            await world.enqueue(name, "other")
    await world.release("lock")
    assert (await world.enqueue("lock", "other", [OFFER])).claim is not None


@pytest.mark.promise("Q4")
async def test_attaching_passes_the_limit_of_a_full_queue_and_a_busy_conversation(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await world.run("a")
    await world.enqueue("b", on_busy=OnBusy.ENQUEUE)
    assert (await world.enqueue("b", on_busy=OnBusy.REJECT)).existing is not None


# -- a full queue -----------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q5")
async def test_a_full_queue_answers_queue_full_and_keeps_its_requests(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=2)
    await world.enqueue("a")
    await world.enqueue("b", "later", due=world.clock.wall + 1)
    with pytest.raises(QueueFull) as refused:
        await world.enqueue("c", "new")
    assert refused.value.details["limit"] == 2
    assert await world.store.get("c") is None
    assert await world.store.session("new") is None
    with pytest.raises(QueueFull):
        await world.enqueue("c", "new", due=world.clock.wall + 1)
    assert [await world.state(name) for name in "ab"] == [State.QUEUED, State.SCHEDULED]


@pytest.mark.promise("Q5")
async def test_a_request_that_runs_at_once_passes_a_full_queue(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await world.enqueue("a", "talk a", due=world.clock.wall + 1)
    assert (await world.enqueue("b", "talk b", [OFFER])).claim is not None


@pytest.mark.promise("Q5")
async def test_running_requests_and_locks_do_not_fill_the_queue_and_retrying_ones_do(
    store_factory: StoreFactory,
) -> None:
    world = await store_factory(max_queued=1)
    claim = await world.run("a", "talk a")
    await world.acquire("lock", "locked")
    await world.acquire("waiter", "locked")
    await world.retry(claim)
    with pytest.raises(QueueFull):
        await world.enqueue("b", "talk b")


@pytest.mark.promise("Q5")
async def test_a_full_queue_takes_again_when_one_has_gone(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    await world.enqueue("a")
    await world.cancel("a")
    assert (await world.enqueue("b")).state is State.QUEUED


@pytest.mark.promise("Q5")
async def test_a_retry_is_taken_even_by_a_full_queue(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=1)
    claim = await world.run("a", "talk a")
    await world.enqueue("b", "talk b")
    assert (await world.retry(claim)).state is State.RETRYING


# -- on_busy: reject --------------------------------------------------------------------------------------------------


@pytest.mark.promise("L3")
async def test_reject_is_refused_by_a_held_conversation_with_its_facts(world: World) -> None:
    since = world.clock.wall
    await world.run("a")
    await world.enqueue("b")
    world.clock.forward(5)
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("c", on_busy=OnBusy.REJECT)
    facts = refused.value.details
    assert (facts["conversation_id"], facts["holder"], facts["since"]) == ("talk", "a", since)
    assert facts["position"] == 1
    assert await world.store.get("c") is None


@pytest.mark.promise("L3")
async def test_reject_is_refused_by_a_line_without_a_holder(world: World) -> None:
    await world.enqueue("a")
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("b", on_busy=OnBusy.REJECT)
    facts = refused.value.details
    assert (facts["conversation_id"], facts["position"]) == ("talk", 1)
    assert "holder" not in facts
    assert "since" not in facts


@pytest.mark.promise("L3")
@pytest.mark.parametrize("known", [False, True])
async def test_reject_is_taken_by_a_free_conversation(world: World, known: bool) -> None:
    if known:
        await world.complete(await world.run("a"))
    assert (await world.enqueue("b", offers=[OFFER], on_busy=OnBusy.REJECT)).claim is not None
    assert (await world.enqueue("c", "elsewhere", on_busy=OnBusy.REJECT)).ready


@pytest.mark.promise("L3")
async def test_reject_is_refused_by_an_external_holder_too(world: World) -> None:
    await world.acquire("lock")
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("a", on_busy=OnBusy.REJECT)
    assert refused.value.details["holder"] == "lock"


# -- forks on purpose -------------------------------------------------------------------------------------------------


@pytest.mark.promise("L7")
async def test_a_fork_begins_at_its_parent_s_head_and_both_continue_separately(world: World) -> None:
    turn = (await world.complete(await world.run("a"))).turn
    claim = await world.run("b", "child", fork_of="talk")
    assert claim.head == turn
    own = (await world.complete(claim)).turn
    parent = await world.store.session("talk")
    child = await world.store.session("child")
    assert parent is not None
    assert child is not None
    assert (parent.head, child.head) == (turn, own)
    assert (child.forked_from, child.turns, parent.turns) == ("talk", 1, 1)
    assert own is not None
    assert [turn.text for turn in await world.store.history(own, 10_000)] == ["answer to b", "answer to a"]


@pytest.mark.promise("L7")
async def test_a_fork_that_has_said_nothing_has_its_parents_head_and_no_provider_session(world: World) -> None:
    settled = await world.complete(await world.run("a"), provider_session="uuid")
    await world.enqueue("b", "child", fork_of="talk")
    child = await world.store.session("child")
    assert child is not None
    assert (child.head, child.turns, child.provider, child.provider_session) == (settled.turn, 0, None, None)


@pytest.mark.promise("L7")
async def test_a_fork_is_recorded(world: World) -> None:
    await world.run("a")
    at = world.clock.forward(3).wall
    await world.enqueue("b", "child", fork_of="talk")
    (fork,) = (await world.store.forks(10)).items
    assert (fork.parent, fork.child, fork.request_id, fork.at, fork.kind) == ("talk", "child", "b", at, "requested")


@pytest.mark.promise("L7")
async def test_a_fork_of_an_unknown_conversation_is_not_found_and_changes_nothing(world: World) -> None:
    with pytest.raises(NotFound):
        await world.enqueue("a", "child", fork_of="nobody")
    assert await world.store.session("child") is None


@pytest.mark.promise("L7")
async def test_a_fork_into_a_known_conversation_leaves_it_as_it_is(world: World) -> None:
    await world.complete(await world.run("a"))
    await world.enqueue("b", "child")
    await world.enqueue("c", "child", fork_of="talk")
    child = await world.store.session("child")
    assert child is not None
    assert (child.head, child.forked_from) == (None, None)
    assert (await world.store.forks(10)).items == ()


async def test_the_fields_of_a_request_can_be_read_back(world: World) -> None:
    await world.enqueue(
        "a",
        agent_id="ann",
        model="stub/loud",
        priority=Priority.BACKGROUND,
        requeued_from="z",
        expires=world.clock.wall + 5,
    )
    view = await world.view("a")
    assert (view.agent_id, view.model, view.priority, view.requeued_from) == (
        "ann",
        "stub/loud",
        Priority.BACKGROUND,
        "z",
    )
    assert (view.route, view.body, view.conversation) == (ROUTE, world.new("a").body, "talk")
    assert (view.enqueued_at, view.expires, view.attempts) == (world.clock.wall, world.clock.wall + 5, ())


NAMES = ["../../x", "-rf", "a\nb", "nul\x00", "'; DROP TABLE request; --", "ü" * 5_000, " ", "%_*[", "\U0001f600"]


@pytest.mark.promise("S3")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_any_text_is_a_name_like_any_other(world: World, name: str) -> None:
    claim = await world.run(name, name, agent_id=name)
    assert (claim.request_id, claim.conversation, claim.agent_id) == (name, name, name)
    await world.complete(claim)
    assert await world.state(name) is State.COMPLETED
    sessions = await world.store.sessions(10, agent_id=name)
    assert [session.conversation for session in sessions.items] == [name]
    assert (await world.acquire(name + "2", name)).grant is not None
