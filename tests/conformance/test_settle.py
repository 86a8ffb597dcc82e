"""How an attempt ends: answers, faults, retries, late results, cancels."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import NotFound
from ksi.request import Attempt, Outcome, Priority, State, Usage
from ksi.store.values import CancelOutcome, Claimed, Finish, GiveBack, Listing, Offer, Retry, Verdict
from tests.conformance.world import DAY, HOUR, OFFER, World

# -- the ends of a run ------------------------------------------------------------------------------------------------


@pytest.mark.promise("R1", "L9")
async def test_a_completed_run_becomes_the_conversations_head(world: World) -> None:
    claim = await world.run("a")
    world.clock.forward(2)
    settled = await world.complete(claim, provider_session="uuid")
    assert (settled.state, settled.fenced, settled.finished_at) == (State.COMPLETED, False, world.clock.wall)
    assert settled.turn is not None
    session = await world.store.session("talk")
    assert session is not None
    assert (session.head, session.turns, session.provider, session.provider_session) == (
        settled.turn,
        1,
        "stub",
        "uuid",
    )
    (turn,) = await world.store.history(settled.turn, 1_000)
    assert (turn.id, turn.body, turn.text, turn.previous) == (settled.turn, claim.body, "answer to a", None)
    assert (turn.provider, turn.provider_session, turn.finished_at) == ("stub", "uuid", world.clock.wall)


BLOCKS = (
    {"type": "thinking", "thinking": "hm é\x00", "signature": "sig=="},
    {"type": "text", "text": "Let me see."},
    {"type": "tool_use", "id": "a1", "name": "look", "input": {"at": [1, 2.5, None, {"x": True}]}},
    {"type": "new_kind", "of": {"next": "year"}},
)


@pytest.mark.promise("A3", "A5")
async def test_an_answer_s_blocks_are_in_the_request_the_history_and_the_log(world: World) -> None:
    claim = await world.run("a", "talk")
    settled = await world.complete(claim, text="Let me see.", content=BLOCKS)
    view = await world.view("a")
    assert view.answer is not None
    assert view.answer.content == BLOCKS
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 1_000)
    assert (turn.text, turn.content) == ("Let me see.", BLOCKS)
    (logged,) = await world.store.log_after(settled.turn - 1, 10)
    assert logged.attempt.content == BLOCKS
    plain = await world.complete(await world.run("b", "talk"))
    assert plain.turn is not None
    assert [turn.content for turn in await world.store.history(plain.turn, 10_000)] == [(), BLOCKS]


@pytest.mark.promise("L9")
async def test_blocks_count_if_history_is_read_up_to_a_limit(world: World) -> None:
    picture = ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x" * 5_000}},)
    turn = None
    for name in "abc":
        turn = (await world.complete(await world.run(name, "talk"), text="see", content=picture)).turn
    assert turn is not None
    assert len(await world.store.history(turn, 2_000)) == 1
    assert len(await world.store.history(turn, 12_000)) == 2


@pytest.mark.promise("T1", "F4")
async def test_an_attempt_is_kept_whole(world: World) -> None:
    claim = await world.run("a")
    attempt = Attempt(
        number=1,
        provider="stub",
        outcome=Outcome.COMPLETED,
        started_at=claim.started_at,
        finished_at=world.clock.wall,
        model="echo-1",
        text="ü\x00\n" + "x" * 10_000,
        content=BLOCKS,
        usage=Usage(
            input_tokens=1,
            output_tokens=2,
            cache_read_tokens=3,
            cache_write_tokens=4,
            reasoning_tokens=5,
            cost_usd=0.123456789,
        ),
        stop_reason="end_turn",
        provider_session="uuid",
        error=None,
        message="fine",
        first_token_us=1_234,
        raw=b'{"raw": true}',
    )
    await world.settle(claim, Finish(state=State.COMPLETED), attempt)
    view = await world.view("a")
    assert view.attempts == (attempt,)
    assert view.answer == attempt
    assert view.usage == attempt.usage
    assert (view.state, view.provider, view.finished_at) == (State.COMPLETED, "stub", world.clock.wall)


@pytest.mark.promise("T1")
async def test_an_attempt_without_a_report_has_unknown_usage_and_not_zero(world: World) -> None:
    claim = await world.run("a")
    await world.complete(claim, usage=None)
    view = await world.view("a")
    assert view.attempts[0].usage is None
    assert view.usage is None


@pytest.mark.promise("T1")
async def test_a_report_of_nothing_is_zero_and_not_unknown(world: World) -> None:
    await world.complete(await world.run("a"), usage=Usage())
    assert (await world.view("a")).usage == Usage()


@pytest.mark.promise("T1")
async def test_usage_is_summed_over_a_requests_attempts(world: World) -> None:
    claim = await world.run("a")
    failed = world.attempt(claim, Outcome.FAILED, usage=Usage(input_tokens=7, cost_usd=0.5))
    await world.settle(claim, Retry(at=world.clock.wall), failed)
    await world.expire()
    await world.complete(await world.claim_one(), usage=Usage(input_tokens=1, output_tokens=2, cost_usd=0.25))
    assert (await world.view("a")).usage == Usage(input_tokens=8, output_tokens=2, cost_usd=0.75)


@pytest.mark.promise("R1", "F9")
async def test_a_failed_run_leaves_no_trace_in_the_conversation(world: World) -> None:
    turn = (await world.complete(await world.run("a"))).turn
    settled = await world.fail(await world.run("b"), "invalid_request", "no such tool")
    assert (settled.state, settled.turn, settled.finished_at) == (State.FAILED, None, world.clock.wall)
    view = await world.view("b")
    assert (view.state, view.error, view.message, view.answer) == (
        State.FAILED,
        "invalid_request",
        "no such tool",
        None,
    )
    session = await world.store.session("talk")
    assert session is not None
    assert (session.head, session.turns) == (turn, 1)


@pytest.mark.promise("R1")
async def test_a_run_can_end_cancelled(world: World) -> None:
    claim = await world.run("a")
    settled = await world.settle(
        claim, Finish(state=State.CANCELLED, error="cancelled"), world.attempt(claim, Outcome.CANCELLED)
    )
    assert settled.state is State.CANCELLED
    assert (await world.view("a")).error == "cancelled"


@pytest.mark.promise("L1", "L2")
@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
async def test_an_end_releases_the_lock_and_names_the_next(world: World, state: State) -> None:
    claim = await world.run("a")
    await world.enqueue("b")
    await world.enqueue("c", priority=Priority.HIGH)
    settled = await world.settle(claim, Finish(state=state), world.attempt(claim))
    assert settled.passing is not None
    passing = settled.passing
    assert (passing.conversation, passing.released_by, passing.next_request) == ("talk", "a", "c")
    assert passing.granted is None
    assert await world.claim_ids() == ["c"]


@pytest.mark.promise("L1")
async def test_an_end_with_an_empty_line_leaves_the_conversation_free(world: World) -> None:
    settled = await world.complete(await world.run("a"))
    assert settled.passing is not None
    assert (settled.passing.released_by, settled.passing.next_request) == ("a", None)
    lock = await world.look()
    assert (lock.holder, lock.state, lock.since, lock.fence, lock.line, lock.waiting) == (
        None,
        None,
        None,
        None,
        (),
        0,
    )


@pytest.mark.promise("Q6")
async def test_the_daemon_is_notified_when_a_settle_frees_a_slot_and_a_request_waits(world: World) -> None:
    claim = await world.run("a", "talk a")
    await world.enqueue("b", "talk b")
    calls = world.calls
    await world.complete(claim)
    assert world.calls > calls


@pytest.mark.promise("R1", "F8")
async def test_a_final_state_never_changes(world: World) -> None:
    claim = await world.run("a")
    await world.complete(claim)
    before = await world.view("a")
    verdicts: list[Verdict] = [
        Finish(state=State.FAILED, error="timeout"),
        Finish(state=State.CANCELLED),
        Retry(at=0),
        GiveBack(),
    ]
    for verdict in verdicts:
        settled = await world.settle(claim, verdict, world.attempt(claim))
        assert (settled.state, settled.fenced) == (State.COMPLETED, True)
    assert (await world.cancel("a")).outcome is CancelOutcome.ALREADY_FINAL
    await world.expire()
    assert await world.view("a") == before
    assert (await world.look()).holder is None


@pytest.mark.promise("L9")
async def test_history_goes_back_turn_by_turn_within_its_limit_and_always_has_the_first(world: World) -> None:
    turns = []
    for name in "abc":
        turns.append((await world.complete(await world.run(name), text=name * 100)).turn)
    last = turns[-1]
    assert last is not None
    history = await world.store.history(last, 10_000)
    assert [turn.text[0] for turn in history] == ["c", "b", "a"]
    assert [turn.id for turn in history] == turns[::-1]
    assert [turn.previous for turn in history] == [turns[1], turns[0], None]
    size = len(history[0].body) + len(history[0].text)
    for limit, known in ((0, 1), (size - 1, 1), (2 * size - 1, 1), (2 * size, 2), (3 * size - 1, 2), (3 * size, 3)):
        assert len(await world.store.history(last, limit)) == known
    first = turns[0]
    assert first is not None
    assert [turn.id for turn in await world.store.history(first, 10_000)] == [first]


async def test_the_history_of_an_unknown_head_is_empty(world: World) -> None:
    assert await world.store.history(987_654, 1_000) == []


@pytest.mark.promise("L9")
async def test_an_answer_without_text_is_a_turn_with_empty_text(world: World) -> None:
    turn = (await world.complete(await world.run("a"), text=None)).turn
    assert turn is not None
    assert (await world.store.history(turn, 100))[0].text == ""


# -- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F2", "L8")
async def test_a_retry_waits_in_the_store_and_keeps_its_place(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b", priority=Priority.CRITICAL)
    settled = await world.retry(claim, after=10, error="overloaded", message="too much")
    due = world.clock.wall + microseconds(10)
    assert (settled.state, settled.due, settled.passing, settled.finished_at) == (State.RETRYING, due, None, None)
    view = await world.view("a")
    assert (view.state, view.due, view.error, view.message) == (State.RETRYING, due, "overloaded", "too much")
    assert (view.provider, view.position, view.holder, view.finished_at) == (None, None, None, None)
    lock = await world.look()
    assert (lock.holder, lock.state, lock.external, lock.fence) == ("a", State.RETRYING, False, claim.fence)
    assert await world.claim_ids() == []
    world.clock.forward(10)
    expiry = await world.expire()
    assert expiry.woken == 1
    assert (await world.view("a")).due is None
    assert (await world.look()).holder == "a"
    again = await world.claim_one()
    assert (again.request_id, again.attempt, again.enqueued_at) == ("a", 2, claim.enqueued_at)
    assert again.fence > claim.fence
    await world.complete(again)
    assert [attempt.outcome for attempt in (await world.view("a")).attempts] == [Outcome.FAILED, Outcome.COMPLETED]
    assert (await world.view("a")).error is None


@pytest.mark.promise("F5", "L8")
async def test_a_parked_request_keeps_its_place_too(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b")
    assert (await world.retry(claim, parked=True, after=HOUR)).state is State.PARKED
    assert await world.claim_ids() == []
    world.clock.forward(HOUR)
    await world.expire()
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("L8")
@pytest.mark.parametrize("parked", [False, True])
async def test_without_hold_on_retry_the_lock_passes_on_while_it_waits(world: World, parked: bool) -> None:
    claim = await world.run("a", hold_on_retry=False)
    await world.enqueue("b")
    settled = await world.retry(claim, parked=parked)
    assert settled.passing is not None
    assert (settled.passing.released_by, settled.passing.next_request) == ("a", "b")
    assert (await world.look()).holder is None
    assert await world.claim_ids() == ["b"]
    assert (await world.view("a")).holder == "b"


@pytest.mark.promise("L8", "Q2")
async def test_a_retry_without_hold_comes_back_into_the_line_at_its_old_rank(world: World) -> None:
    claim = await world.run("a", hold_on_retry=False)
    world.clock.forward(1)
    await world.enqueue("b")
    await world.enqueue("c")
    await world.retry(claim, after=5)
    running = await world.claim_one()
    world.clock.forward(5)
    await world.expire()
    assert await world.line() == ["a", "c"]
    view = await world.view("a")
    assert (view.state, view.position, view.holder) == (State.QUEUED, 0, "b")
    await world.complete(running)
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("L8")
async def test_a_retry_without_hold_finds_its_conversation_free_again(world: World) -> None:
    await world.retry(await world.run("a", hold_on_retry=False), after=5)
    world.clock.forward(5)
    await world.expire()
    again = await world.claim_one()
    assert (again.request_id, again.attempt) == ("a", 2)


@pytest.mark.promise("Q2")
async def test_a_retried_request_keeps_its_rank_in_the_queue(world: World) -> None:
    claim = await world.run("a", "talk a")
    world.clock.forward(1)
    await world.enqueue("b", "talk b")
    await world.retry(claim, after=5)
    world.clock.forward(5)
    await world.expire()
    assert await world.claim_ids(limit=1) == ["a"]


@pytest.mark.promise("F4")
async def test_a_retry_can_go_to_another_route(world: World) -> None:
    claim = await world.run("a")
    await world.retry(claim, after=0, route="spare")
    await world.expire()
    assert (await world.view("a")).route == "spare"
    assert await world.claim_ids(OFFER) == []
    (again,) = await world.claim(Offer("spare", "other", 1))
    assert (again.route, again.provider, again.attempt) == ("spare", "other", 2)
    await world.complete(again)
    assert [attempt.provider for attempt in (await world.view("a")).attempts] == ["stub", "other"]
    assert (await world.view("a")).provider == "other"


@pytest.mark.promise("F2")
async def test_a_retry_that_is_due_at_once_is_woken_by_the_next_expire(world: World) -> None:
    settled = await world.retry(await world.run("a"), after=-5)
    assert settled.state is State.RETRYING
    assert await world.claim_ids() == []
    assert (await world.expire()).woken == 1
    assert await world.claim_ids() == ["a"]


@pytest.mark.promise("Q7")
async def test_a_time_to_live_ends_with_the_first_start(world: World) -> None:
    claim = await world.run("a", expires=world.clock.wall + microseconds(5))
    assert (await world.view("a")).expires is None
    await world.retry(claim, after=10)
    world.clock.forward(10)
    assert (await world.expire()).ended == ()
    assert await world.claim_ids() == ["a"]


# -- given back at shutdown -------------------------------------------------------------------------------------------


@pytest.mark.promise("R6", "Q2")
async def test_a_request_that_is_given_back_keeps_its_place_and_is_not_counted_as_interrupted(world: World) -> None:
    claim = await world.run("a")
    await world.enqueue("b", priority=Priority.CRITICAL)
    settled = await world.give_back(claim)
    assert (settled.state, settled.passing, settled.due) == (State.QUEUED, None, None)
    view = await world.view("a")
    assert (view.state, view.interruptions, view.position, view.holder) == (State.QUEUED, 0, None, None)
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.SHUTDOWN]
    assert (await world.look()).holder == "a"
    await world.restart()
    again = await world.claim_one()
    assert (again.request_id, again.attempt) == ("a", 2)
    assert (await world.view("a")).interruptions == 0


# -- late results -----------------------------------------------------------------------------------------------------


async def fenced(world: World, claim: Claimed, state: State, **fields: Any) -> None:
    settled = await world.settle(claim, Finish(state=State.COMPLETED), world.attempt(claim, text="late", **fields))
    assert (settled.state, settled.fenced) == (state, True)
    assert (settled.turn, settled.passing, settled.finished_at, settled.due) == (None, None, None, None)


@pytest.mark.promise("F10", "L1", "D2")
async def test_a_result_with_an_old_fence_is_kept_on_its_attempt_and_goes_nowhere_else(world: World) -> None:
    old = await world.run("a")
    await world.crash()
    new = await world.claim_one()
    await fenced(world, old, State.RUNNING, usage=Usage(input_tokens=3))
    settled = await world.complete(new)
    view = await world.view("a")
    assert [(attempt.number, attempt.outcome) for attempt in view.attempts] == [
        (1, Outcome.INTERRUPTED),
        (1, Outcome.FENCED),
        (2, Outcome.COMPLETED),
    ]
    assert (view.attempts[1].text, view.attempts[1].usage) == ("late", Usage(input_tokens=3))
    assert view.answer is not None
    assert view.answer.text == "answer to a"
    assert settled.turn is not None
    assert [turn.text for turn in await world.store.history(settled.turn, 1_000)] == ["answer to a"]


@pytest.mark.promise("F10", "T1")
async def test_a_late_result_after_the_end_is_kept_and_counted_once(world: World) -> None:
    old = await world.run("a")
    await world.crash()
    await world.complete(await world.claim_one(), usage=Usage(input_tokens=1))
    for _ in range(3):
        await fenced(world, old, State.COMPLETED, usage=Usage(input_tokens=3))
    assert (await world.view("a")).usage == Usage(input_tokens=4)


@pytest.mark.promise("F10", "T1")
async def test_settling_twice_counts_once(world: World) -> None:
    claim = await world.run("a")
    await world.complete(claim, usage=Usage(input_tokens=1))
    await fenced(world, claim, State.COMPLETED, usage=Usage(input_tokens=1))
    view = await world.view("a")
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.COMPLETED]
    assert view.usage == Usage(input_tokens=1)


@pytest.mark.promise("F10")
async def test_settling_again_after_a_retry_was_recorded_changes_nothing(world: World) -> None:
    claim = await world.run("a")
    await world.retry(claim)
    before = await world.view("a")
    await fenced(world, claim, State.RETRYING)
    assert await world.view("a") == before
    await world.expire()
    world.clock.forward(HOUR)
    await world.expire()
    await fenced(world, claim, State.QUEUED)
    again = await world.claim_one()
    await fenced(world, claim, State.RUNNING)
    assert (await world.complete(again)).state is State.COMPLETED


@pytest.mark.promise("L1", "F10")
@pytest.mark.parametrize("what", ["fence", "token"])
async def test_fence_and_token_must_both_match(world: World, what: str) -> None:
    claim = await world.run("a")
    forged = msgspec.structs.replace(claim, **{what: getattr(claim, what) + 1})
    settled = await world.complete(forged)
    assert (settled.state, settled.fenced) == (State.RUNNING, True)
    assert (await world.look()).holder == "a"
    assert (await world.complete(claim)).state is State.COMPLETED


@pytest.mark.promise("F10", "L1")
async def test_a_late_result_does_not_disturb_the_next_holder(world: World) -> None:
    old = await world.run("a", hold_on_retry=False)
    await world.retry(old, after=HOUR)
    await world.enqueue("b")
    running = await world.claim_one()
    await fenced(world, old, State.RETRYING)
    assert (await world.look()).holder == "b"
    assert (await world.complete(running)).passing is not None


@pytest.mark.promise("F10", "R7")
async def test_a_late_result_of_a_pruned_request_is_not_found(world: World) -> None:
    claim = await world.run("a")
    await world.fail(claim)
    world.clock.forward(30 * DAY)
    await world.prune()
    with pytest.raises(NotFound):
        await world.complete(claim)


# -- cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F8")
async def test_cancelling_a_running_request_marks_it_for_its_runner(world: World) -> None:
    claim = await world.run("a")
    for _ in range(2):
        cancelled = await world.cancel("a")
        assert (cancelled.outcome, cancelled.state) == (CancelOutcome.STOPPING, State.RUNNING)
        assert (cancelled.request_id, cancelled.conversation, cancelled.passing) == ("a", "talk", None)
    assert (await world.view("a")).cancelling
    assert (await world.look()).holder == "a"
    settled = await world.settle(
        claim, Finish(state=State.CANCELLED, error="cancelled"), world.attempt(claim, Outcome.CANCELLED)
    )
    assert settled.state is State.CANCELLED
    assert not (await world.view("a")).cancelling


@pytest.mark.promise("F8")
@pytest.mark.parametrize("verdict", [Retry(at=0, error="timeout"), Retry(at=0, parked=True), GiveBack()])
async def test_a_marked_cancel_wins_over_a_retry_and_over_giving_back(world: World, verdict: Verdict) -> None:
    claim = await world.run("a")
    await world.enqueue("b")
    await world.cancel("a")
    settled = await world.settle(claim, verdict, world.attempt(claim, Outcome.FAILED))
    assert (settled.state, settled.due, settled.finished_at) == (State.CANCELLED, None, world.clock.wall)
    assert settled.passing is not None
    assert settled.passing.next_request == "b"
    view = await world.view("a")
    assert (view.state, view.error, view.due) == (State.CANCELLED, "cancelled", None)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("F8")
async def test_a_marked_cancel_does_not_throw_an_answer_away(world: World) -> None:
    claim = await world.run("a")
    await world.cancel("a")
    assert (await world.complete(claim)).state is State.COMPLETED


@pytest.mark.promise("F8")
@pytest.mark.parametrize("state", [State.SCHEDULED, State.QUEUED, State.RETRYING, State.PARKED])
async def test_cancelling_a_waiting_request_ends_it(world: World, state: State) -> None:
    if state is State.SCHEDULED:
        await world.enqueue("a", due=world.clock.wall + 1)
    elif state is State.QUEUED:
        await world.enqueue("a")
    else:
        await world.retry(await world.run("a"), parked=state is State.PARKED)
    assert await world.state("a") is state
    world.clock.forward(1)
    cancelled = await world.cancel("a")
    assert (cancelled.outcome, cancelled.state) == (CancelOutcome.CANCELLED, State.CANCELLED)
    view = await world.view("a")
    assert (view.state, view.finished_at, view.error) == (State.CANCELLED, world.clock.wall, "cancelled")
    assert (view.due, view.position, view.cancelling) == (None, None, False)
    assert (await world.cancel("a")).outcome is CancelOutcome.ALREADY_FINAL
    world.clock.forward(DAY)
    assert (await world.expire()).woken == 0
    assert await world.claim_ids() == []


@pytest.mark.promise("F8", "L8")
async def test_cancelling_a_waiting_holder_passes_its_lock_on(world: World) -> None:
    await world.retry(await world.run("a"))
    await world.enqueue("b")
    cancelled = await world.cancel("a")
    assert cancelled.passing is not None
    assert (cancelled.passing.released_by, cancelled.passing.next_request) == ("a", "b")
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("F8")
async def test_cancelling_one_in_the_middle_of_a_line_moves_the_others_up(world: World) -> None:
    await world.run("a")
    for name in "bcd":
        await world.enqueue(name)
    assert (await world.cancel("c")).passing is None
    assert await world.line() == ["b", "d"]
    assert (await world.view("d")).position == 1


@pytest.mark.promise("F8")
async def test_cancelling_the_ready_head_of_a_line_makes_the_next_one_ready(world: World) -> None:
    await world.enqueue("a")
    await world.enqueue("b")
    calls = world.calls
    assert (await world.cancel("a")).passing is None
    assert world.calls > calls
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("F8")
@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED])
async def test_cancelling_an_ended_request_reports_that(world: World, state: State) -> None:
    claim = await world.run("a")
    await (world.complete(claim) if state is State.COMPLETED else world.fail(claim))
    before = await world.view("a")
    cancelled = await world.cancel("a", by="b")
    assert (cancelled.outcome, cancelled.state) == (CancelOutcome.ALREADY_FINAL, state)
    assert await world.view("a") == before


@pytest.mark.promise("F8")
async def test_cancelling_an_unknown_id_is_not_found(world: World) -> None:
    with pytest.raises(NotFound):
        await world.cancel("nobody")


@pytest.mark.promise("L3")
async def test_who_cancelled_is_seen_and_the_first_one_stays(world: World) -> None:
    await world.run("a")
    await world.cancel("a", by="x")
    await world.cancel("a", by="y")
    await world.enqueue("b")
    await world.cancel("b", by="z")
    assert ((await world.view("a")).interrupted_by, (await world.view("b")).interrupted_by) == ("x", "z")


@pytest.mark.promise("F8", "L5")
async def test_cancelling_takes_external_holders_and_waiters_away(world: World) -> None:
    await world.acquire("lock")
    await world.acquire("waiter")
    await world.enqueue("a")
    gone = await world.cancel("waiter")
    assert (gone.outcome, gone.state, gone.passing) == (CancelOutcome.CANCELLED, State.CANCELLED, None)
    gone = await world.cancel("lock")
    assert gone.outcome is CancelOutcome.CANCELLED
    assert gone.passing is not None
    assert (gone.passing.released_by, gone.passing.next_request, gone.passing.granted) == ("lock", "a", None)
    assert await world.claim_ids() == ["a"]
    for name in ("lock", "waiter"):
        with pytest.raises(NotFound):
            await world.cancel(name)


@pytest.mark.promise("R4")
async def test_a_settled_request_leaves_the_active_list_for_the_finished_one(world: World) -> None:
    claim = await world.run("a")
    assert await world.listed(Listing.ACTIVE) == ["a"]
    await world.complete(claim)
    assert await world.listed(Listing.ACTIVE) == []
    assert await world.listed(Listing.FINISHED) == ["a"]
