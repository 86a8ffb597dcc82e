"""Recovery: the state of a store that is opened after its daemon died or stopped."""

from __future__ import annotations

import pytest

from ksi.clock import MICROSECONDS, microseconds
from ksi.errors import NotFound
from ksi.request import OnBusy, Outcome, Priority, State
from ksi.store.values import Recovery
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HOUR, OFFER, World


@pytest.mark.promise("Q3")
async def test_a_new_store_recovers_nothing(world: World) -> None:
    assert await world.restart() == Recovery()


@pytest.mark.promise("Q3")
async def test_every_acknowledged_request_survives_a_crash(world: World) -> None:
    turn = (await world.complete(await world.run("completed", "talk 1"))).turn
    await world.fail(await world.run("failed", "talk 2"))
    await world.enqueue("cancelled", "talk 3")
    await world.cancel("cancelled")
    await world.retry(await world.run("retrying", "talk 4"), after=HOUR)
    await world.retry(await world.run("parked", "talk 5"), after=HOUR, parked=True)
    await world.enqueue("scheduled", "talk 6", due=world.clock.wall + microseconds(HOUR), agent_id="ann")
    await world.enqueue("queued", "talk 7", expires=world.clock.wall + microseconds(DAY), requeued_from="failed")
    await world.enqueue("behind", "talk 7", priority=Priority.LOW)
    names = ["completed", "failed", "cancelled", "retrying", "parked", "scheduled", "queued", "behind"]
    before = [await world.view(name) for name in names]
    totals = await world.store.totals()
    world.clock.forward(1)
    assert await world.crash() == Recovery()
    assert [await world.view(name) for name in names] == before
    assert await world.store.totals() == totals
    assert turn is not None
    assert [kept.text for kept in await world.store.history(turn, 1_000)] == ["answer to completed"]
    assert await world.claim_ids() == ["queued"]


@pytest.mark.promise("Q3", "Q2", "L8")
async def test_a_request_interrupted_in_mid_run_keeps_its_place_and_runs_again_and_says_so(world: World) -> None:
    old = await world.run("a")
    await world.enqueue("b", priority=Priority.CRITICAL)
    world.clock.forward(5)
    recovery = await world.crash()
    assert (recovery.requeued, recovery.ended) == (("a",), ())
    view = await world.view("a")
    assert (view.state, view.interruptions, view.position, view.provider) == (State.QUEUED, 1, None, None)
    (attempt,) = view.attempts
    assert (attempt.number, attempt.provider, attempt.outcome) == (1, "stub", Outcome.INTERRUPTED)
    assert (attempt.started_at, attempt.finished_at) == (old.started_at, world.clock.wall)
    assert (attempt.error, attempt.usage, attempt.text) == ("daemon_restart", None, None)
    assert (await world.look()).holder == "a"
    (again,) = await world.claim()
    assert (again.request_id, again.attempt) == ("a", 2)
    assert again.fence > old.fence
    await world.complete(again)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("Q3")
async def test_interrupted_requests_are_recovered_in_their_order(world: World) -> None:
    for name in ("c", "a", "b"):
        await world.run(name, f"talk {name}")
    assert (await world.crash()).requeued == ("c", "a", "b")
    assert await world.claim_ids() == ["c", "a", "b"]


@pytest.mark.promise("Q3")
async def test_the_daemon_is_notified_of_work_after_a_crash(world: World) -> None:
    await world.run("a")
    calls = world.calls
    await world.crash()
    assert world.calls > calls


@pytest.mark.promise("Q3")
async def test_after_the_third_interruption_a_request_fails_with_daemon_restart(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    for number in (1, 2):
        assert (await world.crash()).requeued == ("a",)
        assert (await world.view("a")).interruptions == number
        assert await world.claim_ids() == ["a"]
    recovery = await world.crash()
    assert recovery.requeued == ()
    (ended,) = recovery.ended
    assert (ended.request_id, ended.conversation, ended.state, ended.error) == (
        "a",
        "talk",
        State.FAILED,
        "daemon_restart",
    )
    assert ended.passing is not None
    assert (ended.passing.released_by, ended.passing.next_request) == ("a", "b")
    view = await world.view("a")
    assert (view.state, view.error, view.interruptions) == (State.FAILED, "daemon_restart", 3)
    assert view.finished_at == world.clock.wall
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.INTERRUPTED] * 3
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("Q3")
async def test_how_many_interruptions_are_borne_is_as_configured(store_factory: StoreFactory) -> None:
    world = await store_factory(max_interruptions=1)
    await world.run("a")
    assert [ended.request_id for ended in (await world.crash()).ended] == ["a"]


@pytest.mark.promise("Q3")
async def test_interrupted_requests_fail_at_once_if_so_configured(store_factory: StoreFactory) -> None:
    world = await store_factory(fail_interrupted=True)
    await world.run("a")
    (ended,) = (await world.crash()).ended
    assert (ended.state, ended.error) == (State.FAILED, "daemon_restart")


@pytest.mark.promise("R6", "Q3")
async def test_retries_and_shutdowns_do_not_count_as_interruptions(world: World) -> None:
    claim = await world.run("a")
    for _ in range(3):
        await world.give_back(claim)
        await world.restart()
        claim = await world.claim_one()
        await world.retry(claim, after=0)
        await world.expire()
        claim = await world.claim_one()
    await world.crash()
    assert (await world.view("a")).interruptions == 1
    assert await world.state("a") is State.QUEUED


@pytest.mark.promise("F8", "Q3")
async def test_a_cancel_survives_a_crash(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    await world.cancel("a")
    recovery = await world.crash()
    assert recovery.requeued == ()
    (ended,) = recovery.ended
    assert (ended.request_id, ended.state, ended.error) == ("a", State.CANCELLED, "cancelled")
    assert ended.passing is not None
    assert ended.passing.next_request == "b"
    view = await world.view("a")
    assert (view.state, view.cancelling, view.interruptions) == (State.CANCELLED, False, 1)
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.INTERRUPTED]
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("L3", "Q3")
async def test_an_interruption_survives_a_crash(world: World) -> None:
    await world.run("a")
    await world.enqueue("b")
    await world.enqueue("c", on_busy=OnBusy.INTERRUPT)
    await world.crash()
    view = await world.view("a")
    assert (view.state, view.interrupted_by) == (State.CANCELLED, "c")
    assert await world.claim_ids() == ["c"]


@pytest.mark.promise("L8", "Q3")
async def test_a_retry_that_keeps_its_place_keeps_it_over_a_crash(world: World) -> None:
    await world.retry(await world.run("a"), after=10)
    await world.enqueue("b", priority=Priority.HIGH)
    await world.crash()
    assert await world.claim_ids() == []
    world.clock.forward(10)
    await world.expire()
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("Q7", "Q3")
async def test_requests_due_while_no_daemon_ran_are_woken_after_the_start(world: World) -> None:
    await world.enqueue("a", "talk a", due=world.clock.wall + 10)
    await world.enqueue("b", "talk b", expires=world.clock.wall + 10)
    world.clock.forward(DAY)
    await world.crash()
    expiry = await world.expire()
    assert (expiry.woken, [end.request_id for end in expiry.ended]) == (1, ["b"])


@pytest.mark.promise("L4", "Q3")
@pytest.mark.parametrize("mono", [None, 3 * MICROSECONDS])
async def test_external_locks_get_a_full_expiry_even_after_a_reboot(world: World, mono: int | None) -> None:
    grant = (await world.acquire("lock", metadata=b"{}")).grant
    since = world.clock.wall
    assert grant is not None
    world.clock.forward(HOUR)
    await world.crash(mono)
    lock = await world.look()
    assert (lock.holder, lock.fence, lock.since, lock.metadata) == ("lock", grant.fence, since, b"{}")
    assert lock.expires_at == world.clock.wall + microseconds(300)
    world.clock.forward(299)
    assert (await world.expire()).lapsed == ()
    world.clock.forward(1)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["lock"]


@pytest.mark.promise("L5", "Q3")
@pytest.mark.parametrize("mono", [None, 3 * MICROSECONDS])
async def test_waiters_with_a_deadline_wait_again_and_the_others_went_with_their_connections(
    world: World, mono: int | None
) -> None:
    await world.acquire("lock")
    await world.acquire("gone")
    await world.acquire("bounded", timeout=20)
    await world.enqueue("a")
    world.clock.forward(10)
    await world.crash(mono)
    assert await world.line() == ["bounded", "a"]
    with pytest.raises(NotFound):
        await world.cancel("gone")
    assert (await world.acquire("gone", "other")).grant is not None
    world.clock.forward(19)
    assert (await world.expire()).lapsed == ()
    world.clock.forward(1)
    assert [lapse.request_id for lapse in (await world.expire()).lapsed] == ["bounded"]


@pytest.mark.promise("L5", "Q3")
async def test_a_run_that_ends_at_recovery_lets_a_waiter_in(store_factory: StoreFactory) -> None:
    world = await store_factory(fail_interrupted=True)
    await world.run("a")
    await world.acquire("gone")
    await world.acquire("bounded", timeout=20)
    (ended,) = (await world.crash()).ended
    assert ended.passing is not None
    assert ended.passing.granted is not None
    assert ended.passing.granted.request_id == "bounded"
    assert ended.passing.granted.expires_at == world.clock.wall + microseconds(300)


@pytest.mark.promise("L1", "D3")
async def test_fences_never_go_back_over_restarts(world: World) -> None:
    fences = []
    for number in range(3):
        claim = await world.run(f"a{number}", f"talk {number}")
        fences.append(claim.fence)
        await world.complete(claim)
        grant = (await world.acquire(f"lock {number}", f"talk {number}")).grant
        assert grant is not None
        fences.append(grant.fence)
        await world.release(f"lock {number}")
        await (world.crash() if number else world.restart())
    assert fences == sorted(set(fences))


@pytest.mark.promise("Q2", "Q3")
async def test_arrival_numbers_continue_over_restarts(world: World) -> None:
    for number in range(4):
        await world.enqueue(str(number), f"talk {number}", rank=1)
        await world.crash()
    assert await world.claim_ids() == ["0", "1", "2", "3"]


@pytest.mark.promise("F10", "Q3")
async def test_a_claim_from_before_the_crash_is_fenced_even_before_the_request_runs_again(world: World) -> None:
    claim = await world.run("a")
    await world.crash()
    settled = await world.complete(claim)
    assert (settled.state, settled.fenced) == (State.QUEUED, True)
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("Q3")
async def test_slots_are_free_again_after_a_crash(world: World) -> None:
    for name in "abc":
        await world.run(name, f"talk {name}")
    await world.crash()
    assert await world.claim_ids(type(OFFER)("stub", "stub", 2)) == ["a", "b"]


@pytest.mark.promise("R3", "Q3")
async def test_the_logs_watermark_survives_a_crash(world: World) -> None:
    assert await world.store.log_watermark() == 0
    await world.complete(await world.run("a"))
    (turn,) = await world.store.log_after(0, 10)
    await world.store.set_log_watermark(turn.id)
    await world.complete(await world.run("b"))
    await world.crash()
    assert await world.store.log_watermark() == turn.id
    assert [kept.request_id for kept in await world.store.log_after(turn.id, 10)] == ["b"]


@pytest.mark.promise("L7", "L10", "Q3")
async def test_sessions_forks_and_routes_survive_a_crash(world: World) -> None:
    await world.complete(await world.run("a", agent_id="ann"), provider_session="uuid")
    await world.enqueue("b", "child", fork_of="talk", agent_id="bob", route="elsewhere")
    sessions = await world.store.sessions(10)
    forks = await world.store.forks(10)
    routes = await world.store.waiting_by_route()
    await world.crash()
    assert await world.store.sessions(10) == sessions
    assert await world.store.forks(10) == forks
    assert await world.store.waiting_by_route() == routes
