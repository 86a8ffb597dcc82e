"""Locks held from outside, and how they share a conversation's line with requests."""

from __future__ import annotations

import pytest

from ksi.clock import microseconds
from ksi.errors import ConversationBusy, NotLockHolder, QueueFull, RequestIdConflict
from ksi.request import OnBusy, Priority, State
from ksi.store.values import LineEntry
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HOUR, OFFER, World

EXPIRY = 300.0


@pytest.mark.promise("L5", "L6")
async def test_a_free_conversation_is_locked_at_once(world: World) -> None:
    acquired = await world.acquire("lock", metadata=b'{"why":"edit"}')
    grant = acquired.grant
    assert grant is not None
    assert (acquired.queued, acquired.renewed, acquired.position) == (False, False, 0)
    assert (grant.request_id, grant.conversation) == ("lock", "talk")
    assert grant.expires_at == world.clock.wall + microseconds(EXPIRY)
    lock = await world.look()
    assert (lock.conversation, lock.holder, lock.external, lock.state) == ("talk", "lock", True, State.RUNNING)
    assert (lock.since, lock.expires_at, lock.fence) == (world.clock.wall, grant.expires_at, grant.fence)
    assert lock.metadata == b'{"why":"edit"}'


@pytest.mark.promise("L1", "L5")
async def test_a_locked_conversation_runs_nothing_until_it_is_released(world: World) -> None:
    await world.acquire("lock")
    enqueued = await world.enqueue("a", offers=[OFFER])
    assert (enqueued.claim, enqueued.holder, enqueued.position) == (None, "lock", 0)
    assert await world.claim_ids() == []
    calls = world.calls
    passing = await world.release("lock")
    assert (passing.conversation, passing.released_by, passing.next_request, passing.granted) == (
        "talk",
        "lock",
        "a",
        None,
    )
    assert world.calls > calls
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("L5")
async def test_a_release_with_an_empty_queue_leaves_the_conversation_free(world: World) -> None:
    await world.acquire("lock")
    passing = await world.release("lock")
    assert (passing.next_request, passing.granted) == (None, None)
    assert (await world.look()).holder is None
    assert (await world.enqueue("a", offers=[OFFER])).claim is not None


@pytest.mark.promise("L5", "L2")
async def test_a_taken_lock_is_waited_for_in_the_line(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    acquired = await world.acquire("waiter")
    assert (acquired.grant, acquired.queued, acquired.position, acquired.holder) == (None, True, 1, "a")
    assert await world.line() == ["b", "waiter"]
    assert await world.store.get("waiter") is None


@pytest.mark.promise("L5")
async def test_a_holder_that_does_not_want_to_wait_gets_the_place_and_leaves_no_trace(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    acquired = await world.acquire("impatient", wait=False)
    assert (acquired.grant, acquired.queued, acquired.position, acquired.holder) == (None, False, 1, "a")
    assert await world.line() == ["b"]
    with pytest.raises(NotLockHolder):
        await world.release("impatient")
    assert (await world.acquire("impatient", "free", wait=False)).grant is not None


@pytest.mark.promise("L2", "L5")
async def test_completions_and_waiters_come_up_in_one_order_by_rank(world: World) -> None:
    claim = await world.run("a")
    await world.acquire("slow", priority=Priority.LOW)
    await world.enqueue("b")
    await world.acquire("usual")
    await world.enqueue("c")
    await world.acquire("urgent", priority=Priority.CRITICAL)
    assert await world.line() == ["urgent", "b", "usual", "c", "slow"]
    passing = (await world.complete(claim)).passing
    assert passing is not None
    assert passing.next_request == "urgent"
    assert passing.granted is not None
    assert passing.granted.request_id == "urgent"
    assert await world.claim_ids() == []
    passing = await world.release("urgent", passing.granted.fence)
    assert (passing.next_request, passing.granted) == ("b", None)
    passing = (await world.complete(await world.claim_one())).passing
    assert passing is not None
    assert passing.granted is not None
    assert passing.granted.request_id == "usual"
    passing = await world.release("usual")
    assert passing.next_request == "c"
    passing = (await world.complete(await world.claim_one())).passing
    assert passing is not None
    assert passing.granted is not None
    assert passing.granted.request_id == "slow"
    assert (await world.look()).waiting == 0


@pytest.mark.promise("L6")
async def test_a_wait_queue_shows_its_waiters_and_their_kinds(world: World) -> None:
    await world.run("a")
    first = world.clock.wall
    await world.acquire("lock", priority=Priority.HIGH)
    second = world.clock.forward(1).wall
    await world.enqueue("b", priority=Priority.LOW)
    lock = await world.look()
    assert lock.line == (
        LineEntry(request_id="lock", priority=Priority.HIGH, external=True, enqueued_at=first),
        LineEntry(request_id="b", priority=Priority.LOW, external=False, enqueued_at=second),
    )
    assert lock.waiting == 2
    short = await world.store.lock("talk", 1)
    assert short is not None
    assert [entry.request_id for entry in short.line] == ["lock"]
    assert short.waiting == 2


@pytest.mark.promise("L5")
async def test_an_external_wish_that_outranks_a_free_line_is_granted_at_once(world: World) -> None:
    await world.enqueue("a")
    assert (await world.acquire("later")).queued
    acquired = await world.acquire("urgent", priority=Priority.HIGH, wait=False)
    assert acquired.grant is not None
    assert await world.claim_ids() == []
    assert await world.line() == ["a", "later"]


@pytest.mark.promise("L5")
async def test_an_equal_rank_waits_behind_who_came_first(world: World) -> None:
    await world.enqueue("a", rank=5)
    acquired = await world.acquire("lock", rank=5)
    assert (acquired.queued, acquired.position, acquired.holder) == (True, 1, None)
    acquired = await world.acquire("impatient", rank=5, wait=False)
    assert (acquired.queued, acquired.position, acquired.grant) == (False, 2, None)
    assert await world.line() == ["a", "lock"]


@pytest.mark.promise("L5")
async def test_a_waiter_behind_a_ready_request_gets_the_lock_when_that_is_cancelled(world: World) -> None:
    await world.enqueue("a")
    await world.acquire("waiter")
    cancelled = await world.cancel("a")
    assert cancelled.passing is not None
    assert cancelled.passing.granted is not None
    assert (cancelled.passing.released_by, cancelled.passing.next_request) == ("a", "waiter")
    assert (await world.look()).holder == "waiter"


# -- again, renewed, by the wrong one ---------------------------------------------------------------------------------


@pytest.mark.promise("L4", "L5")
async def test_acquiring_again_renews_and_keeps_fence_and_since(world: World) -> None:
    since = world.clock.wall
    first = (await world.acquire("lock", metadata=b"1")).grant
    world.clock.forward(100)
    again = await world.acquire("lock", metadata=b"2")
    assert first is not None
    assert again.grant is not None
    assert again.renewed
    assert again.grant.fence == first.fence
    assert again.grant.expires_at == world.clock.wall + microseconds(EXPIRY)
    lock = await world.look()
    assert (lock.since, lock.metadata, lock.expires_at) == (since, b"1", again.grant.expires_at)


@pytest.mark.promise("L4", "L5")
async def test_a_renewal_resets_the_expiry(world: World) -> None:
    grant = (await world.acquire("lock")).grant
    assert grant is not None
    world.clock.forward(EXPIRY - 1)
    renewed = await world.renew_lock("lock", grant.fence)
    assert (renewed.fence, renewed.expires_at) == (grant.fence, world.clock.wall + microseconds(EXPIRY))
    world.clock.forward(EXPIRY - 1)
    assert (await world.expire()).lapsed == ()
    world.clock.forward(1)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["lock"]


@pytest.mark.promise("L5")
async def test_a_waiter_that_asks_again_gets_the_present_position(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    await world.acquire("waiter")
    await world.cancel("b")
    for wait in (True, False):
        again = await world.acquire("waiter", wait=wait)
        assert (again.queued, again.position, again.holder, again.renewed) == (True, 0, "a", False)
    assert await world.line() == ["waiter"]


@pytest.mark.promise("L5")
async def test_an_id_holds_or_awaits_one_lock(world: World) -> None:
    await world.acquire("lock")
    await world.acquire("waiter")
    for name in ("lock", "waiter"):
        with pytest.raises(RequestIdConflict):
            await world.acquire(name, "other")
    assert await world.store.session("other") is None


@pytest.mark.promise("L5", "Q4")
async def test_a_completions_id_is_no_locks_id(world: World) -> None:
    await world.complete(await world.run("done"))
    await world.run("a")
    for name in ("done", "a"):
        with pytest.raises(RequestIdConflict):
            await world.acquire(name, "other")
        with pytest.raises(RequestIdConflict):
            await world.renew_lock(name)
        with pytest.raises(RequestIdConflict):
            await world.release(name)
    assert (await world.look()).holder == "a"


@pytest.mark.promise("L5")
async def test_without_holding_a_lock_one_can_neither_renew_nor_release(world: World) -> None:
    grant = (await world.acquire("lock")).grant
    await world.acquire("waiter")
    assert grant is not None
    before = await world.look()
    wrong = [("nobody", None), ("waiter", None), ("waiter", grant.fence), ("lock", grant.fence + 1), ("lock", 0)]
    for name, fence in wrong:
        with pytest.raises(NotLockHolder):
            await world.renew_lock(name, fence)
        with pytest.raises(NotLockHolder):
            await world.release(name, fence)
    assert await world.look() == before


@pytest.mark.promise("L5")
async def test_a_released_lock_cannot_be_released_again_and_its_id_is_free(world: World) -> None:
    await world.acquire("lock")
    await world.release("lock")
    with pytest.raises(NotLockHolder):
        await world.release("lock")
    assert (await world.acquire("lock", "other")).grant is not None


@pytest.mark.promise("L1")
async def test_fences_grow_over_holders_of_both_kinds(world: World) -> None:
    fences = []
    for number in range(3):
        claim = await world.run(f"r{number}")
        fences.append(claim.fence)
        await world.complete(claim)
        grant = (await world.acquire(f"l{number}")).grant
        assert grant is not None
        fences.append(grant.fence)
        await world.release(f"l{number}")
    assert fences == sorted(set(fences))


@pytest.mark.promise("Q5", "L5")
async def test_the_line_of_waiters_is_bounded_and_holders_are_not_counted(store_factory: StoreFactory) -> None:
    world = await store_factory(max_queued=2)
    for number in range(4):
        assert (await world.acquire(f"holder {number}", f"talk {number}")).grant is not None
    await world.acquire("w1", "talk 1")
    await world.acquire("w2", "talk 2")
    with pytest.raises(QueueFull):
        await world.acquire("w3", "talk 3")
    assert (await world.acquire("w1", "talk 1")).queued
    assert not (await world.acquire("w3", "talk 3", wait=False)).queued
    assert (await world.acquire("free", "talk 5")).grant is not None
    assert (await world.enqueue("a", "talk 1")).state is State.QUEUED


@pytest.mark.promise("L5", "L7")
async def test_a_lock_is_one_lock_under_both_names_of_its_conversation(world: World) -> None:
    await world.complete(await world.run("a"), provider_session="uuid")
    grant = (await world.acquire("lock")).grant
    again = await world.acquire("lock", "uuid")
    assert grant is not None
    assert again.grant is not None
    assert (again.renewed, again.grant.fence, again.grant.conversation) == (True, grant.fence, "talk")
    assert (await world.acquire("waiter", "uuid")).holder == "lock"
    assert (await world.acquire("waiter")).position == 0
    with pytest.raises(ConversationBusy) as refused:
        await world.enqueue("b", "uuid", on_busy=OnBusy.REJECT)
    assert refused.value.details["conversation_id"] == "talk"
    passing = await world.release("lock")
    assert passing.granted is not None
    assert (passing.conversation, passing.granted.conversation) == ("talk", "talk")


# -- a connection that is gone ----------------------------------------------------------------------------------------


@pytest.mark.promise("L5")
async def test_a_waiter_is_withdrawn_and_the_line_closes_up(world: World) -> None:
    await world.run("a")
    await world.acquire("waiter")
    await world.enqueue("b")
    assert await world.withdraw("waiter") is None
    assert await world.line() == ["b"]
    assert (await world.view("b")).position == 0
    assert await world.withdraw("waiter") is None
    assert (await world.acquire("waiter", "other")).grant is not None


@pytest.mark.promise("L5")
async def test_a_holder_survives_its_connection_and_nothing_else_can_be_withdrawn(world: World) -> None:
    await world.acquire("lock")
    await world.enqueue("a")
    claim = await world.run("b", "talk 2")
    before = await world.look()
    for name in ("lock", "a", "b", "nobody"):
        assert await world.withdraw(name) is None
    assert await world.look() == before
    assert await world.state("a") is State.QUEUED
    assert (await world.complete(claim)).state is State.COMPLETED


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L4")
async def test_a_lock_lapses_when_its_time_is_up_and_passes_on(world: World) -> None:
    await world.acquire("lock")
    await world.enqueue("a")
    world.clock.forward(EXPIRY - 0.000_001)
    assert (await world.expire()).lapsed == ()
    world.clock.forward(0.000_001)
    calls = world.calls
    (lapse,) = (await world.expire()).lapsed
    assert world.calls > calls
    assert (lapse.request_id, lapse.conversation, lapse.held) == ("lock", "talk", True)
    assert lapse.passing is not None
    assert (lapse.passing.released_by, lapse.passing.next_request, lapse.passing.granted) == ("lock", "a", None)
    with pytest.raises(NotLockHolder):
        await world.renew_lock("lock")
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("L4")
async def test_a_lapsed_lock_goes_to_the_waiter_behind_it_with_time_of_its_own(world: World) -> None:
    await world.acquire("lock")
    await world.acquire("waiter")
    world.clock.forward(EXPIRY)
    (lapse,) = (await world.expire()).lapsed
    assert lapse.passing is not None
    grant = lapse.passing.granted
    assert grant is not None
    assert (grant.request_id, grant.expires_at) == ("waiter", world.clock.wall + microseconds(EXPIRY))
    assert (await world.look()).since == world.clock.wall
    world.clock.forward(EXPIRY - 1)
    assert (await world.expire()).lapsed == ()


@pytest.mark.promise("L4")
@pytest.mark.parametrize("step", [30 * DAY, -30 * DAY])
async def test_a_step_of_the_wall_clock_expires_no_lock_and_saves_none(world: World, step: float) -> None:
    await world.acquire("lock")
    await world.acquire("waiter", timeout=60)
    world.clock.step_wall(step)
    assert (await world.expire()).lapsed == ()
    assert (await world.look()).holder == "lock"
    world.clock.forward(60)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["waiter"]
    world.clock.forward(EXPIRY - 60)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["lock"]


@pytest.mark.promise("L4")
async def test_the_expiry_is_as_configured(store_factory: StoreFactory) -> None:
    world = await store_factory(lock_expiry=7)
    grant = (await world.acquire("lock")).grant
    assert grant is not None
    assert grant.expires_at == world.clock.wall + 7
    world.clock.mono += 7
    assert len((await world.expire()).lapsed) == 1


@pytest.mark.promise("L5")
async def test_a_waiter_gives_up_at_its_deadline_and_the_holder_stays(world: World) -> None:
    await world.run("a")
    await world.acquire("waiter", timeout=10)
    await world.acquire("patient")
    world.clock.forward(10)
    (lapse,) = (await world.expire()).lapsed
    assert (lapse.request_id, lapse.conversation, lapse.held, lapse.passing) == ("waiter", "talk", False, None)
    assert await world.line() == ["patient"]
    assert (await world.acquire("waiter", "other")).grant is not None


@pytest.mark.promise("L5")
async def test_a_waiter_that_gave_up_is_not_granted_a_lock_that_lapses_in_the_same_moment(world: World) -> None:
    await world.acquire("lock")
    await world.acquire("waiter", timeout=EXPIRY)
    await world.acquire("patient", timeout=EXPIRY + 1)
    world.clock.forward(EXPIRY)
    gave_up, lapsed = (await world.expire()).lapsed
    assert (gave_up.request_id, gave_up.held) == ("waiter", False)
    assert (lapsed.request_id, lapsed.held) == ("lock", True)
    assert lapsed.passing is not None
    assert lapsed.passing.next_request == "patient"


@pytest.mark.promise("L5")
async def test_a_granted_waiters_deadline_no_longer_counts(world: World) -> None:
    claim = await world.run("a")
    await world.acquire("waiter", timeout=10)
    await world.complete(claim)
    world.clock.forward(EXPIRY - 1)
    assert (await world.expire()).lapsed == ()
    assert (await world.look()).holder == "waiter"


@pytest.mark.promise("L4")
async def test_locks_lapse_in_the_order_of_their_ends(world: World) -> None:
    await world.acquire("first", "talk 1")
    world.clock.forward(1)
    await world.acquire("second", "talk 2")
    world.clock.forward(1)
    await world.acquire("third", "talk 3")
    world.clock.forward(1)
    await world.acquire("first", "talk 1")
    world.clock.forward(EXPIRY)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["second", "third", "first"]


@pytest.mark.promise("L4")
async def test_a_lock_is_held_until_the_store_says_that_it_lapsed(world: World) -> None:
    await world.acquire("lock")
    world.clock.forward(EXPIRY + 1)
    assert (await world.enqueue("a", offers=[OFFER])).claim is None
    assert (await world.acquire("lock")).renewed
    assert (await world.expire()).lapsed == ()


@pytest.mark.promise("L3", "L5")
async def test_an_interruption_goes_before_external_waiters_too(world: World) -> None:
    await world.run("a")
    await world.acquire("waiter", priority=Priority.CRITICAL)
    assert (await world.enqueue("b", on_busy=OnBusy.INTERRUPT)).position == 0
    assert await world.line() == ["b", "waiter"]


@pytest.mark.promise("L5", "L8")
async def test_a_retry_without_hold_lets_a_waiter_in(world: World) -> None:
    claim = await world.run("a", hold_on_retry=False)
    await world.acquire("waiter")
    passing = (await world.retry(claim, after=HOUR)).passing
    assert passing is not None
    assert passing.granted is not None
    assert (passing.released_by, passing.granted.request_id) == ("a", "waiter")


@pytest.mark.promise("L5")
async def test_a_lock_makes_an_unknown_conversation_known(world: World) -> None:
    assert await world.store.lock("talk", 10) is None
    await world.acquire("lock")
    session = await world.store.session("talk")
    assert session is not None
    assert session.locked
