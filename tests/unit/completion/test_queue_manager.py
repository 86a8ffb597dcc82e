"""The queue's motor: what starts when, what is stopped, and what time does."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from ksi.completion import queue_manager
from ksi.completion.completion_runner import Stop
from ksi.completion.queue_manager import CLAIMS, FAULT_PAUSE
from ksi.completion.wakeup import TICK
from ksi.errors import FailureClass, NotFound, ProviderError, StoreFull, StoreUnavailable
from ksi.events.bus import RESULT
from ksi.request import Outcome, RetryBody, State
from ksi.store.values import NewLock, Offer, StoreRules
from ksi.testing import settle_down
from tests.unit.completion.parts import Ear, Parts, Player, whole


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def state(parts: Parts, request_id: str) -> State:
    return (await parts.view(request_id)).state


async def held_back(parts: Parts) -> asyncio.Event:
    """All calls wait until this is set."""
    go_on = asyncio.Event()
    parts.player.play([go_on, whole()])
    return go_on


# -- work -------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q3", "Q6")
async def test_waiting_requests_run_in_order_as_slots_come_free(parts: Parts) -> None:
    go_on = await held_back(parts)
    await parts.open()
    for _ in range(5):
        await parts.enqueue()
    await settle_down()
    assert sorted(parts.queue.runs) == ["r1", "r2"]
    go_on.set()
    await settle_down()
    assert parts.queue.runs == {}
    assert [call.request_id for call in parts.player.calls] == ["r1", "r2", "r3", "r4", "r5"]
    assert [await state(parts, f"r{number}") for number in range(1, 6)] == [State.COMPLETED] * 5
    await parts.queue.stop(0)


async def test_more_than_one_claim_s_worth_is_claimed_to_the_end() -> None:
    player = Player()
    parts = Parts(player)
    number = 2 * CLAIMS + 3
    parts.providers._members["p"].config = msgspec.structs.replace(
        parts.providers._members["p"].config, max_concurrency=number
    )
    for _ in range(number):
        await parts.enqueue()
    go_on = await held_back(parts)
    await parts.open()
    assert len(parts.queue.runs) == number
    go_on.set()
    await settle_down()
    await parts.queue.stop(0)
    assert len(player.calls) == number


@pytest.mark.promise("L8")
async def test_one_request_of_a_conversation_runs_at_a_time(parts: Parts) -> None:
    go_on = await held_back(parts)
    await parts.open()
    for _ in range(3):
        await parts.enqueue(conversation="talk")
    await settle_down()
    assert list(parts.queue.runs) == ["r1"]
    go_on.set()
    await settle_down()
    assert [call.request_id for call in parts.player.calls] == ["r1", "r2", "r3"]
    await parts.queue.stop(0)


@pytest.mark.promise("F6")
async def test_a_provider_that_is_enabled_again_wakes_the_queue_by_itself(parts: Parts) -> None:
    await parts.open()
    await parts.providers.set_enabled("p", enabled=False)
    await parts.enqueue()
    await settle_down()
    assert await state(parts, "r1") is State.QUEUED
    await parts.providers.set_enabled("p", enabled=True)
    await settle_down()
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


async def test_a_request_claimed_with_its_enqueue_is_launched_by_the_caller(parts: Parts) -> None:
    await parts.open()
    ear = Ear()
    parts.bus.subscribe(ear, ["completion:progress"])
    replies = parts.wait_for("r1")
    parts.queue.launch([await parts.claim()])
    assert ear.heard()[0][1]["status"] == "running"
    assert list(parts.queue.runs) == ["r1"]
    await settle_down()
    assert [reply.result for reply in replies] == ["hi"]
    await parts.queue.stop(0)


@pytest.mark.promise("R2")
async def test_an_answer_is_streamed_if_a_client_reads_it_or_may_come_back_to_it(parts: Parts) -> None:
    parts.player.play([ProviderError(FailureClass.PROVIDER_ERROR, "busy")], [whole()])
    await parts.open()
    parts.bus.follow(Ear(), "r2", chunks=True)
    for _ in range(2):
        await parts.enqueue()
    await settle_down()
    await parts.clock.advance(parts.config.retry.max_delay)
    streamed = [(call.request_id, call.attempt, call.stream) for call in parts.player.calls]
    assert sorted(streamed) == [("r1", 1, False), ("r1", 2, True), ("r2", 1, True)]
    await parts.queue.stop(0)


@pytest.mark.promise("S1")
async def test_a_run_that_breaks_fails_its_own_request_and_the_next_ones_run(parts: Parts) -> None:
    await parts.open()
    claim = await parts.claim(conversation="talk")
    replies = parts.wait_for("r1")
    with capture_logs() as logs:
        parts.queue.launch([msgspec.structs.replace(claim, body=b"{")])
        await settle_down()
    assert [reply.status for reply in replies] == ["failed"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["a run failed"]
    await parts.enqueue(conversation="talk")
    await settle_down()
    assert await state(parts, "r2") is State.COMPLETED
    assert parts.queue.runs == {}
    await parts.queue.stop(0)


@pytest.mark.promise("O10", "F10")
async def test_a_run_whose_end_breaks_again_and_again_ends_at_last_and_keeps_its_answer(parts: Parts) -> None:
    await parts.open()
    replies = parts.wait_for("r1")
    parts.store.faults["settle"] = [ZeroDivisionError("defect") for _ in range(4)]
    with capture_logs():
        parts.queue.launch([await parts.claim(conversation="talk")])
        await settle_down()
        (problem,) = parts.queue.problems()
        assert "one is 'r1'" in problem
        assert "r1" in parts.queue.runs
        await parts.clock.advance(10 * FAULT_PAUSE)
    assert parts.queue.problems() == []
    assert [reply.status for reply in replies] == ["failed"]
    (attempt,) = (await parts.view("r1")).attempts
    assert (attempt.outcome, attempt.text) == (Outcome.FAILED, "hi")
    await parts.enqueue(conversation="talk")
    await settle_down()
    assert await state(parts, "r2") is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("O10", "R1")
async def test_a_client_that_waits_for_an_end_that_a_damaged_store_cannot_store_is_notified(parts: Parts) -> None:
    await parts.open()
    refused: list[Exception] = []
    parts.announcer.wait_for("r1", lambda reply: None, refused.append)
    parts.store.faults["settle"] = [StoreUnavailable("damaged", passes=False) for _ in range(3)]
    with capture_logs():
        parts.queue.launch([await parts.claim()])
        await settle_down()
        assert [str(error) for error in refused] == ["damaged"]
        assert parts.queue.problems()
        await parts.clock.advance(10 * FAULT_PAUSE)
    assert await state(parts, "r1") is State.FAILED
    assert len(refused) == 1
    await parts.queue.stop(0)


@pytest.mark.promise("O10", "R1")
async def test_an_end_that_cannot_be_read_is_published_when_it_can(parts: Parts) -> None:
    parts.player.play([ProviderError(FailureClass.INVALID_REQUEST, "no")])
    await parts.open()
    replies = parts.wait_for("r1")
    with capture_logs():
        parts.store.faults["get"] = [StoreUnavailable("no disk") for _ in range(3)]
        parts.queue.launch([await parts.claim()])
        await settle_down()
        assert replies == []
        assert parts.queue.runs == {}
        await parts.clock.advance(2.0)
    assert [reply.status for reply in replies] == ["failed"]
    await parts.queue.stop(0)


async def test_a_request_that_is_gone_at_its_end_leaves_nothing_running(parts: Parts) -> None:
    await parts.open()
    parts.store.faults["settle"] = [NotFound("gone")]
    parts.queue.launch([await parts.claim()])
    with capture_logs():
        await settle_down()
    assert parts.queue.runs == {}
    await parts.queue.stop(0)


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F8")
async def test_a_local_run_can_be_stopped_and_another_cannot(parts: Parts) -> None:
    await held_back(parts)
    await parts.open()
    await parts.enqueue()
    await settle_down()
    await parts.store.cancel("r1", parts.clock.now())
    assert parts.queue.stop_run("r1", Stop.CANCEL)
    assert not parts.queue.stop_run("r2", Stop.CANCEL)
    await settle_down()
    assert await state(parts, "r1") is State.CANCELLED
    assert not parts.queue.stop_run("r1", Stop.CANCEL)
    await parts.queue.stop(0)


@pytest.mark.promise("F7")
@pytest.mark.parametrize("own", [None, 1.0])
async def test_a_run_past_its_total_timeout_is_stopped_at_the_next_look(parts: Parts, own: float | None) -> None:
    await held_back(parts)
    await parts.open()
    await parts.enqueue(timeout=own, retry=RetryBody(max_attempts=1))
    await settle_down()
    timeout = own or parts.config.limits.timeout
    await parts.clock.advance(timeout - TICK)
    assert await state(parts, "r1") is State.RUNNING
    parts.clock.step_wall(86_400)
    await settle_down()
    assert await state(parts, "r1") is State.RUNNING
    await parts.clock.advance(2 * TICK)
    view = await parts.view("r1")
    assert (view.state, view.error) == (State.FAILED, "timeout")
    assert parts.player.closed == 1
    await parts.queue.stop(0)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q7")
async def test_a_delayed_request_runs_at_its_moment(parts: Parts) -> None:
    await parts.open()
    await parts.enqueue(due=parts.clock.now().wall + 5_000_000)
    parts.queue.on_due()
    await settle_down()
    await parts.clock.advance(4.9)
    assert await state(parts, "r1") is State.SCHEDULED
    await parts.clock.advance(0.1)
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("Q7", "O4")
async def test_a_delayed_request_runs_when_the_machine_slept_past_its_moment(parts: Parts) -> None:
    await parts.open()
    await parts.enqueue(due=parts.clock.now().wall + 3_600_000_000)
    parts.queue.on_due()
    await settle_down()
    parts.clock.sleep_machine(3_600)
    await parts.clock.advance(TICK)
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("Q7")
async def test_a_request_not_started_in_time_expires_and_is_reported(parts: Parts) -> None:
    await held_back(parts)
    await parts.open()
    await parts.enqueue(conversation="talk")
    await parts.enqueue(conversation="talk", expires=parts.clock.now().wall + 1_000_000)
    replies = parts.wait_for("r2")
    parts.queue.on_due()
    await settle_down()
    await parts.clock.advance(1)
    assert [reply.status for reply in replies] == ["expired"]
    assert await state(parts, "r1") is State.RUNNING
    await parts.queue.stop(0)


@pytest.mark.promise("L4")
async def test_an_outside_lock_lapses_by_the_monotonic_clock_and_the_next_request_runs() -> None:
    parts = Parts(rules=StoreRules(lock_expiry=10_000_000))
    await parts.open()
    ear = Ear()
    parts.bus.subscribe(ear, ["conversation:lock*"])
    lock = NewLock(request_id="outside", conversation="talk", rank=0)
    await parts.store.acquire(lock, parts.clock.now())
    await parts.enqueue(conversation="talk")
    parts.queue.on_due()
    await settle_down()
    parts.clock.step_wall(86_400)
    await parts.clock.advance(9)
    assert await state(parts, "r1") is State.QUEUED
    await parts.clock.advance(1)
    assert await state(parts, "r1") is State.COMPLETED
    assert ear.names()[:2] == ["conversation:lock_expired", "conversation:lock_transferred"]
    await parts.queue.stop(0)


@pytest.mark.promise("F2")
async def test_a_retry_runs_when_its_wait_is_over(parts: Parts) -> None:
    parts.player.play([ProviderError(FailureClass.PROVIDER_ERROR, "busy", retry_after=None)], [whole()])
    await parts.open()
    await parts.enqueue()
    await settle_down()
    assert await state(parts, "r1") is State.RETRYING
    await parts.clock.advance(parts.config.retry.initial_delay + TICK)
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


async def test_more_than_one_step_s_worth_of_due_requests_is_woken_without_a_pause(parts: Parts) -> None:
    await parts.open()
    for _ in range(1_200):
        await parts.enqueue(due=parts.clock.now().wall + 1_000_000)
    parts.queue.on_due()
    await settle_down()
    before = parts.store.counts["expire"]
    await parts.clock.advance(1)
    assert parts.store.counts["expire"] >= before + 3
    assert (await parts.store.totals()).scheduled == 0
    await parts.queue.stop(0)


async def test_with_nothing_to_come_time_is_not_looked_at(parts: Parts) -> None:
    await parts.open()
    before = parts.store.counts["expire"]
    await parts.clock.advance(300)
    assert parts.store.counts["expire"] == before
    await parts.queue.stop(0)


@pytest.mark.promise("F3", "F5")
async def test_a_request_that_waits_for_a_provider_runs_when_its_time_comes(parts: Parts) -> None:
    parts.player.play([ProviderError(FailureClass.RATE_LIMITED, "spent", retry_after=30.0)], [whole()])
    await parts.open()
    await parts.enqueue()
    await settle_down()
    await parts.enqueue()
    await parts.clock.advance(29)
    assert (await state(parts, "r1"), await state(parts, "r2")) == (State.PARKED, State.QUEUED)
    await parts.clock.advance(2)
    assert (await state(parts, "r1"), await state(parts, "r2")) == (State.COMPLETED, State.COMPLETED)
    await parts.queue.stop(0)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q3")
@pytest.mark.parametrize("fault", [StoreUnavailable("no disk"), ZeroDivisionError("a defect")])
async def test_a_claim_that_failed_is_tried_again_after_a_pause(parts: Parts, fault: Exception) -> None:
    await parts.open()
    parts.store.faults["claim"] = [fault]
    with capture_logs() as logs:
        await parts.enqueue()
        await settle_down()
        assert await state(parts, "r1") is State.QUEUED
        await parts.clock.advance(FAULT_PAUSE)
    assert await state(parts, "r1") is State.COMPLETED
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert {task.name: task.well for task in parts.queue.tasks()} == {"ksi-claim": True, "ksi-watch": True}
    await parts.queue.stop(0)


@pytest.mark.promise("Q7")
@pytest.mark.parametrize("fault", [StoreUnavailable("no disk"), ZeroDivisionError("a defect")])
async def test_time_goes_on_after_a_fault(parts: Parts, fault: Exception) -> None:
    await parts.open()
    await parts.enqueue(due=parts.clock.now().wall + 1_000_000)
    parts.store.faults["expire"] = [fault]
    with capture_logs():
        parts.queue.on_due()
        await settle_down()
        await parts.clock.advance(FAULT_PAUSE + 1)
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


# -- the begin --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q3")
async def test_the_requests_of_a_dead_daemon_are_run_or_reported(parts: Parts) -> None:
    parts = Parts(rules=StoreRules(max_interruptions=1))
    await parts.claim()
    replies = parts.wait_for("r1")
    await parts.enqueue()
    with capture_logs() as logs:
        await parts.open()
    assert [reply.status for reply in replies] == ["failed"]
    assert replies[0].error is not None
    assert replies[0].error.code == "daemon_restart"
    assert await state(parts, "r2") is State.COMPLETED
    assert [(entry["event"], entry["requeued"], entry["ended"]) for entry in logs] == [("recovered", 0, 1)]
    await parts.queue.stop(0)


@pytest.mark.promise("Q6")
async def test_routes_that_the_store_knows_are_offered_from_the_start(parts: Parts) -> None:
    await parts.enqueue()
    parts.providers._routes.clear()
    parts.providers._offers = None
    await parts.open()
    assert await state(parts, "r1") is State.COMPLETED
    await parts.queue.stop(0)


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R6")
async def test_a_stop_claims_no_more_and_requeues_running_requests(parts: Parts) -> None:
    await held_back(parts)
    await parts.open()
    for _ in range(4):
        await parts.enqueue()
    await settle_down()
    with capture_logs():
        await parts.queue.stop(0)
    assert not parts.queue.claiming
    assert parts.queue.runs == {}
    assert parts.player.closed == len(parts.player.calls) == 2
    for name in ("r1", "r2"):
        view = await parts.view(name)
        assert (view.state, view.interruptions) == (State.QUEUED, 0)
        assert [attempt.outcome for attempt in view.attempts] == [Outcome.SHUTDOWN]
    assert not any(task.alive for task in parts.queue.tasks())
    parts.queue.on_work()
    await settle_down()
    assert len(parts.player.calls) == 2


@pytest.mark.promise("R6")
async def test_the_log_tells_of_an_answer_that_a_stop_could_not_write(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_manager, "GIVE_BACK", 0.05)
    await parts.open()
    parts.store.faults["settle"] = [StoreFull("no room")]
    with capture_logs() as lines:
        parts.queue.launch([await parts.claim()])
        await settle_down()
        await parts.queue.stop(0)
    (line,) = [line for line in lines if line["event"].startswith("left running")]
    assert (line["requests"], line["answers_lost"]) == (["r1"], 1)
    assert await state(parts, "r1") is State.RUNNING


@pytest.mark.promise("R6")
async def test_a_run_that_ends_within_the_grace_period_is_settled_as_always(parts: Parts) -> None:
    go_on = await held_back(parts)
    await parts.open()
    await parts.enqueue()
    await settle_down()
    stopping = asyncio.create_task(parts.queue.stop(60))
    await settle_down()
    assert not stopping.done()
    go_on.set()
    await asyncio.wait_for(stopping, 10)
    assert await state(parts, "r1") is State.COMPLETED


@pytest.mark.promise("R6")
async def test_a_request_from_a_claim_under_way_is_requeued_too(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    await held_back(parts)
    await parts.open()
    claim, claiming, go_on = parts.store.claim, asyncio.Event(), asyncio.Event()

    async def slow_claim(*args: Any) -> Any:
        claims = await claim(*args)
        claiming.set()
        await go_on.wait()
        return claims

    monkeypatch.setattr(parts.store, "claim", slow_claim)
    await parts.enqueue()
    await asyncio.wait_for(claiming.wait(), 10)
    stopping = asyncio.create_task(parts.queue.stop(0))
    await settle_down()
    go_on.set()
    with capture_logs():
        await asyncio.wait_for(stopping, 10)
    assert await state(parts, "r1") is State.QUEUED
    assert parts.queue.runs == {}


@pytest.mark.promise("R6", "Q3")
async def test_a_request_that_cannot_be_requeued_is_left_for_the_next_start(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_manager, "GIVE_BACK", 0.0)
    await held_back(parts)
    await parts.open()
    await parts.enqueue()
    await settle_down()
    parts.store.faults["settle"] = [StoreUnavailable("no disk") for _ in range(1_000)]
    with capture_logs() as logs:
        await asyncio.wait_for(parts.queue.stop(0), 10)
    assert await state(parts, "r1") is State.RUNNING
    assert parts.player.closed == 1
    assert ["r1"] in [entry.get("requests") for entry in logs]


async def test_an_idle_queue_stops_at_once(parts: Parts) -> None:
    await parts.open()
    await asyncio.wait_for(parts.queue.stop(3_600), 10)


@pytest.mark.promise("R1")
async def test_a_later_attempt_that_began_while_the_earlier_one_was_published_stays_known(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's end is still being told when the second one runs already."""
    telling = asyncio.Event()
    settled = parts.announcer.settled

    async def slow(*args: Any) -> None:
        await settled(*args)
        if args[0].attempt == 1:
            await telling.wait()

    monkeypatch.setattr(parts.announcer, "settled", slow)
    go_on = asyncio.Event()
    parts.player.play([ProviderError(FailureClass.PROVIDER_ERROR, "busy")], [go_on, whole()])
    await parts.open()
    await parts.enqueue()
    await settle_down()
    parts.queue.on_due()
    await parts.clock.advance(parts.config.retry.max_delay)
    assert parts.queue.runs["r1"].claim.attempt == 2
    telling.set()
    await settle_down()
    assert parts.queue.runs["r1"].claim.attempt == 2
    assert parts.queue.stop_run("r1", Stop.CANCEL)
    go_on.set()
    await settle_down()
    assert parts.queue.runs == {}
    await parts.queue.stop(0)


async def test_results_reach_subscribers_without_anybody_waiting(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, [RESULT])
    await parts.open()
    await parts.enqueue(Offer("none", "none", 0))
    await settle_down()
    assert ear.names() == [RESULT]
    await parts.queue.stop(0)
