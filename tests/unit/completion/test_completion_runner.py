"""One claimed request, from its claim to its settlement."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from ksi.completion.completion_runner import SETTLE_RETRY, Run, Stop
from ksi.config.schema import Limits, Retry
from ksi.errors import FailureClass, NotFound, ProviderError, StoreUnavailable
from ksi.request import Outcome, RetryBody, State, Usage
from ksi.store.values import Claimed, Settled
from ksi.testing import settle_down
from tests.unit.completion.parts import Ear, Parts, Player, whole


def failure(word: str, **facts: Any) -> ProviderError:
    return ProviderError(FailureClass(word), f"it was {word}", **facts)


@pytest.fixture
def parts() -> Parts:
    return Parts()


def begin(parts: Parts, claim: Claimed, *, stream: bool = False) -> tuple[Run, asyncio.Task[Settled | None]]:
    """A run in a task of its own, as the queue starts it."""
    run = Run(claim, stream=stream)
    task = asyncio.create_task(parts.runner.execute(run))
    run.task = task  # type: ignore[assignment]
    return run, task


async def execute(parts: Parts, claim: Claimed, *, stream: bool = False) -> Settled:
    """A whole run."""
    _, task = begin(parts, claim, stream=stream)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    return settled


async def again(parts: Parts) -> Claimed:
    """The next attempt of what waits for one."""
    await parts.store.expire(parts.clock.now())
    (claim,) = (await parts.store.claim(parts.providers.offers(parts.clock.now()), 5, parts.clock.now())).started
    return claim


# -- good answers -----------------------------------------------------------------------------------------------------


@pytest.mark.promise("R1", "T1")
async def test_an_answer_completes_the_request_and_leaves_its_trail(parts: Parts) -> None:
    answer = whole("hello", stop_reason="end", provider_session="ps", last_message="m1", raw=b"{}", mcp=True)
    parts.player.play([answer])
    claim = await parts.claim(conversation="talk")
    await parts.clock.advance(1.5)
    settled = await execute(parts, claim)
    assert (settled.state, settled.fenced) == (State.COMPLETED, False)
    view = await parts.view("r1")
    (attempt,) = view.attempts
    assert (attempt.number, attempt.provider, attempt.outcome) == (1, "p", Outcome.COMPLETED)
    assert (attempt.text, attempt.model, attempt.asked) == ("hello", "echo-1", "m/echo")
    assert (attempt.provider_session, attempt.last_message, attempt.raw) == ("ps", "m1", b"{}")
    assert (attempt.stop_reason, attempt.mcp) == ("end", True)
    assert attempt.usage == Usage(input_tokens=3, output_tokens=2)
    assert attempt.finished_at - attempt.started_at == 1_500_000


@pytest.mark.promise("D4")
@pytest.mark.parametrize(
    ("node", "session", "kept", "lives"),
    [("a", "ps", True, "a"), ("a", None, True, None), ("a", "ps", False, None), (None, "ps", True, None)],
)
async def test_an_answer_says_on_which_machine_its_provider_session_lives(
    node: str | None, session: str | None, kept: bool, lives: str | None
) -> None:
    parts = Parts(Player(sessions_on_node=kept), node=node)
    parts.player.play([whole(provider_session=session)])
    await execute(parts, await parts.claim())
    assert (await parts.view("r1")).attempts[0].node == lives


@pytest.mark.promise("D4")
@pytest.mark.parametrize(("session", "kind"), [("new", "node_lost"), (None, None)])
async def test_a_session_that_was_lost_with_its_machine_is_reported_as_a_fork(
    session: str | None, kind: str | None
) -> None:
    gone = Parts(Player(stateful=True, sessions_on_node=True), node="a")
    gone.player.play([whole(provider_session="old")])
    await execute(gone, await gone.claim(conversation="talk"))
    here = Parts(Player(stateful=True, sessions_on_node=True), node="b", store=gone.store)
    here.player.play([whole(provider_session=session)])
    here.count = gone.count
    settled = await execute(here, await here.claim(conversation="talk"))
    fork = None if settled.fork is None else (settled.fork.kind, settled.fork.parent, settled.fork.child)
    assert fork == (None if kind is None else (kind, "old", "new"))


async def test_a_provider_gets_its_own_name_of_the_model_with_the_request_s_fields(parts: Parts) -> None:
    claim = await parts.claim(system="be brief", max_tokens=7)
    await execute(parts, claim)
    (call,) = parts.player.calls
    assert (call.model, call.system, call.max_tokens, call.stream) == ("echo", "be brief", 7, False)
    assert parts.player.closed == 1


@pytest.mark.promise("L9")
async def test_the_next_turn_has_the_one_before_in_its_history(parts: Parts) -> None:
    await execute(parts, await parts.claim(conversation="talk"))
    await execute(parts, await parts.claim(conversation="talk"))
    assert [message.content for message in parts.player.calls[1].messages] == ["q1", "hi", "q2"]


@pytest.mark.promise("R2")
async def test_pieces_are_sent_as_they_come_numbered_from_zero(parts: Parts) -> None:
    go_on = asyncio.Event()
    parts.player.play(["a", "", "b", go_on, "c", whole("abc")])
    claim, ear = await parts.claim(), Ear()
    parts.bus.follow(ear, "r1", chunks=True)
    run, task = begin(parts, claim, stream=True)
    await settle_down()
    assert [(data["seq"], data["text"], data["attempt"]) for _, data in ear.heard()] == [
        (0, "a", 1),
        (1, "", 1),
        (2, "b", 1),
    ]
    assert [run.text_from(seq) for seq in range(3)] == ["ab", "b", "b"]
    await parts.clock.advance(2)
    go_on.set()
    await asyncio.wait_for(task, 10)
    assert [name for name, _ in ear.heard()] == ["completion:chunk", "completion:result"]
    assert parts.player.calls[0].stream
    (attempt,) = (await parts.view("r1")).attempts
    assert attempt.first_token_us == 0


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F1")
@pytest.mark.parametrize("word", ["invalid_request", "authentication", "context_too_long"])
async def test_a_fault_of_the_request_ends_it_with_its_class(parts: Parts, word: str) -> None:
    parts.player.play(["ha", failure(word)])
    settled = await execute(parts, await parts.claim())
    assert settled.state is State.FAILED
    view = await parts.view("r1")
    assert (view.error, view.message) == (word, f"it was {word}")
    (attempt,) = view.attempts
    assert (attempt.outcome, attempt.error, attempt.text, attempt.usage) == (Outcome.FAILED, word, "ha", None)


@pytest.mark.promise("F2")
async def test_a_fault_of_the_provider_is_tried_again_until_the_attempts_are_used_up(parts: Parts) -> None:
    parts.player.play([failure("provider_error")])
    claim = await parts.claim()
    for number in (1, 2):
        settled = await execute(parts, claim)
        assert settled.state is State.RETRYING
        assert settled.due is not None
        bound = parts.config.retry.initial_delay * 2 ** (number - 1)
        assert 0 <= settled.due - parts.clock.now().wall <= bound * 1_000_000
        await parts.clock.advance(bound)
        claim = await again(parts)
        assert claim.attempt == number + 1
    settled = await execute(parts, claim)
    assert settled.state is State.FAILED
    assert [attempt.number for attempt in (await parts.view("r1")).attempts] == [1, 2, 3]


@pytest.mark.promise("F2")
async def test_a_request_s_own_word_on_retries_wins(parts: Parts) -> None:
    parts.player.play([failure("provider_error")])
    settled = await execute(parts, await parts.claim(retry=RetryBody(max_attempts=1)))
    assert settled.state is State.FAILED


@pytest.mark.promise("F4")
async def test_the_next_provider_takes_over_at_once_and_after_a_wait_the_first_is_asked_again() -> None:
    one, two = Player("one"), Player("two")
    retry = Retry(max_attempts=3, initial_delay=1.0, max_delay=1.0)
    parts = Parts(one, two, retry=retry)
    one.play([failure("provider_error")])
    two.play([failure("timeout")], [whole()])
    settled = await execute(parts, await parts.claim())
    assert (settled.state, settled.due) == (State.RETRYING, parts.clock.now().wall)
    claim = await again(parts)
    assert claim.provider == "two"
    settled = await execute(parts, claim)
    assert settled.due is not None
    await parts.clock.advance(1)
    claim = await again(parts)
    assert claim.provider == "one"
    settled = await execute(parts, claim)
    assert settled.state in (State.RETRYING, State.FAILED)
    assert [attempt.provider for attempt in (await parts.view("r1")).attempts] == ["one", "two", "one"]


@pytest.mark.promise("F5")
async def test_a_spent_quota_parks_the_request_and_uses_no_attempt(parts: Parts) -> None:
    parts.player.play([failure("rate_limited", retry_after=60.0)], [whole()])
    settled = await execute(parts, await parts.claim(retry=RetryBody(max_attempts=1)))
    assert settled.state is State.PARKED
    assert settled.due == parts.clock.now().wall + 60_000_000
    view = await parts.view("r1")
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.PARKED]
    await parts.clock.advance(60)
    settled = await execute(parts, await again(parts))
    assert settled.state is State.COMPLETED


@pytest.mark.promise("L9")
async def test_a_context_that_is_too_long_is_tried_once_with_half_the_history(parts: Parts) -> None:
    for _ in range(4):
        await execute(parts, await parts.claim(conversation="talk"))
    parts.player.play([failure("context_too_long")], [whole()])
    parts.player.calls.clear()
    settled = await execute(parts, await parts.claim(conversation="talk"))
    assert settled.state is State.COMPLETED
    first, second = parts.player.calls
    assert len(first.messages) == 9
    assert [message.content for message in second.messages] == ["q3", "hi", "q4", "hi", "q5"]
    assert len((await parts.view("r5")).attempts) == 1


@pytest.mark.promise("L9")
@pytest.mark.parametrize("reason", ["no history", "pieces were sent", "twice"])
async def test_it_is_not_retried_if_that_cannot_help(parts: Parts, reason: str) -> None:
    if reason != "no history":
        await execute(parts, await parts.claim(conversation="talk"))
    too_long = failure("context_too_long")
    parts.player.play(["a", too_long] if reason == "pieces were sent" else [too_long])
    parts.player.calls.clear()
    settled = await execute(parts, await parts.claim(conversation="talk"))
    assert settled.state is State.FAILED
    assert len(parts.player.calls) == (2 if reason == "twice" else 1)


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("steps", "words"),
    [([ZeroDivisionError("odd")], "ZeroDivisionError"), ([], "without an answer"), (["a"], "without an answer")],
)
async def test_a_provider_s_defect_is_a_failed_attempt(parts: Parts, steps: list[Any], words: str) -> None:
    parts.player.play(steps)
    with capture_logs():
        settled = await execute(parts, await parts.claim(retry=RetryBody(max_attempts=1)))
    assert settled.state is State.FAILED
    view = await parts.view("r1")
    assert view.error == "provider_error"
    assert view.message is not None
    assert words in view.message


@pytest.mark.promise("F3", "F6")
async def test_the_provider_s_record_counts_each_call_and_none_is_left_running(parts: Parts) -> None:
    parts.player.play([whole()], [failure("timeout")])
    await execute(parts, await parts.claim())
    await execute(parts, await parts.claim())
    report = parts.providers.report()["p"]
    assert (report.running, report.calls, report.failures) == (0, 2, 1)


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F8")
async def test_a_cancel_ends_the_provider_s_work_and_the_request(parts: Parts) -> None:
    parts.player.play(["ha", asyncio.Event(), whole()])
    claim = await parts.claim()
    run, task = begin(parts, claim)
    await settle_down()
    await parts.store.cancel("r1", parts.clock.now())
    run.stop(Stop.CANCEL)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.CANCELLED
    assert parts.player.closed == 1
    assert not task.cancelling()
    (attempt,) = (await parts.view("r1")).attempts
    assert (attempt.outcome, attempt.error, attempt.text, attempt.usage) == (
        Outcome.CANCELLED,
        "cancelled",
        "ha",
        None,
    )


@pytest.mark.promise("F8")
async def test_a_stop_before_the_provider_is_asked_asks_it_not_at_all(parts: Parts) -> None:
    run, task = begin(parts, await parts.claim())
    run.stop(Stop.CANCEL)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.CANCELLED
    assert parts.player.calls == []


@pytest.mark.promise("R6")
async def test_a_shutdown_gives_the_request_back_to_the_queue_without_a_failure(parts: Parts) -> None:
    parts.player.play([asyncio.Event()])
    run, task = begin(parts, await parts.claim())
    await settle_down()
    run.stop(Stop.SHUTDOWN)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.QUEUED
    view = await parts.view("r1")
    assert [attempt.outcome for attempt in view.attempts] == [Outcome.SHUTDOWN]
    assert view.interruptions == 0


@pytest.mark.promise("F7")
async def test_a_timeout_is_a_failure_that_says_how_long_it_was(parts: Parts) -> None:
    parts.player.play([asyncio.Event()])
    run, task = begin(parts, await parts.claim(timeout=2.5, retry=RetryBody(max_attempts=1)))
    await settle_down()
    assert run.deadline == parts.clock.now().mono + 2_500_000
    run.stop(Stop.TIMEOUT)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.FAILED
    view = await parts.view("r1")
    assert (view.error, view.message) == ("timeout", "no complete answer within 2.5 s")


@pytest.mark.promise("F7")
async def test_without_a_word_of_the_request_the_configured_timeout_holds() -> None:
    parts = Parts(limits=Limits(timeout=77.0))
    parts.player.play([asyncio.Event()])
    run, task = begin(parts, await parts.claim())
    await settle_down()
    assert run.deadline == parts.clock.now().mono + 77_000_000
    run.stop(Stop.CANCEL)
    await asyncio.wait_for(task, 10)


@pytest.mark.promise("F2")
async def test_a_failure_that_a_client_saw_counts_as_the_provider_s(parts: Parts) -> None:
    parts.player.play([asyncio.Event()])
    run, task = begin(parts, await parts.claim())
    await settle_down()
    run.fail(failure("provider_error"))
    run.fail(failure("timeout"))
    run.stop(Stop.CANCEL)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.RETRYING
    assert (await parts.view("r1")).attempts[0].error == "provider_error"


@pytest.mark.promise("F8", "T1")
@pytest.mark.parametrize("why", [Stop.CANCEL, Stop.TIMEOUT, Stop.SHUTDOWN])
async def test_an_answer_that_was_whole_when_the_stop_came_is_kept(parts: Parts, why: Stop) -> None:
    parts.player.linger = asyncio.Event()
    run, task = begin(parts, await parts.claim())
    await settle_down()
    run.stop(why)
    await settle_down()
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.COMPLETED
    assert (await parts.view("r1")).attempts[0].usage is not None


async def test_a_stop_after_the_answer_changes_nothing(parts: Parts) -> None:
    parts.store.faults["settle"] = [StoreUnavailable("no disk")]
    run, task = begin(parts, await parts.claim())
    await settle_down()
    assert not run.asking
    run.stop(Stop.SHUTDOWN)
    await parts.clock.advance(SETTLE_RETRY)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.COMPLETED


async def test_an_unrequested_cancellation_propagates(parts: Parts) -> None:
    parts.player.play([asyncio.Event()])
    _, task = begin(parts, await parts.claim())
    await settle_down()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert parts.player.closed == 1
    assert (await parts.view("r1")).state is State.RUNNING


# -- settling ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F10", "Q3")
async def test_a_store_that_says_no_is_asked_again_until_the_answer_is_kept(parts: Parts) -> None:
    parts.store.faults["settle"] = [StoreUnavailable("no disk") for _ in range(5)]
    replies = parts.wait_for("r1")
    _, task = begin(parts, await parts.claim())
    with capture_logs() as logs:
        await settle_down()
        await parts.clock.advance(SETTLE_RETRY / 10)
        assert parts.store.counts["settle"] == 2
        assert not task.done()
        await parts.clock.advance(10 * SETTLE_RETRY)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.COMPLETED
    assert len(replies) == 1
    assert {entry["log_level"] for entry in logs} == {"error"}


@pytest.mark.promise("O10", "F7")
async def test_a_history_that_cannot_be_read_is_waited_for_and_costs_no_attempt_and_no_time(parts: Parts) -> None:
    await execute(parts, await parts.claim(conversation="talk"))
    parts.sessions._cache.clear()
    parts.store.faults["history"] = [StoreUnavailable("no disk") for _ in range(3)]
    run, task = begin(parts, await parts.claim(conversation="talk", timeout=5.0))
    with capture_logs():
        await settle_down()
        assert run.deadline is None
        await parts.clock.advance(3 * SETTLE_RETRY)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.COMPLETED
    assert len(parts.player.calls) == 2
    assert len((await parts.view("r2")).attempts) == 1


@pytest.mark.promise("O10")
async def test_a_run_in_a_damaged_database_ends_and_does_not_wait_for_ever(parts: Parts) -> None:
    await execute(parts, await parts.claim(conversation="talk"))
    parts.sessions._cache.clear()
    parts.store.faults["history"] = [StoreUnavailable("damaged", passes=False)]
    with capture_logs():
        await execute(parts, await parts.claim(conversation="talk", retry=RetryBody(max_attempts=1)))
    view = await parts.view("r2")
    assert (view.state, view.message) == (State.FAILED, "the conversation cannot be read: damaged")
    assert len(parts.player.calls) == 1


@pytest.mark.promise("O10", "F10")
async def test_a_failure_is_decided_on_when_the_store_can_be_read_again(parts: Parts) -> None:
    parts.player.play([failure("provider_error")])
    await execute(parts, await parts.claim())
    await parts.clock.advance(parts.config.retry.max_delay)
    parts.store.faults["get"] = [StoreUnavailable("no disk")]
    _, task = begin(parts, await again(parts))
    with capture_logs():
        await settle_down()
        await parts.clock.advance(SETTLE_RETRY)
    settled = await asyncio.wait_for(task, 10)
    assert settled is not None
    assert settled.state is State.RETRYING


@pytest.mark.promise("O10", "F1")
async def test_a_provider_that_cancels_itself_has_failed(parts: Parts) -> None:
    def cancel() -> None:
        raise asyncio.CancelledError

    parts.player.play([cancel])
    claim = await parts.claim(retry=RetryBody(max_attempts=1))
    with capture_logs():
        settled = await execute(parts, claim)
    assert settled.state is State.FAILED
    assert (await parts.view("r1")).error == "provider_error"


async def test_a_request_that_is_not_kept_any_more_ends_in_the_log(parts: Parts) -> None:
    parts.store.faults["settle"] = [NotFound("gone")]
    _, task = begin(parts, await parts.claim())
    with capture_logs() as logs:
        assert await asyncio.wait_for(task, 10) is None
    assert [entry["log_level"] for entry in logs] == ["warning"]


@pytest.mark.promise("F10", "L1")
async def test_an_answer_after_the_lock_passed_on_goes_only_to_the_trail(parts: Parts) -> None:
    claim = await parts.claim(conversation="talk")
    replies = parts.wait_for("r1")
    settled = await execute(parts, msgspec.structs.replace(claim, fence=claim.fence - 1))
    assert settled.fenced
    assert replies == []
    view = await parts.view("r1")
    assert view.state is State.RUNNING
    (attempt,) = view.attempts
    assert (attempt.outcome, attempt.text) == (Outcome.FENCED, "hi")
    assert attempt.usage is not None
    head = await parts.store.session("talk")
    assert head is not None
    assert (head.turns, head.head) == (0, None)
    assert "talk" not in parts.sessions._cache


@pytest.mark.promise("L1")
async def test_a_run_that_broke_on_a_defect_fails_its_request_and_frees_its_conversation(parts: Parts) -> None:
    claim = await parts.claim(conversation="talk")
    replies = parts.wait_for("r1")
    run = Run(claim, stream=False)
    await parts.runner.abandon(run)
    assert [reply.status for reply in replies] == ["failed"]
    view = await parts.view("r1")
    assert (view.state, view.error) == (State.FAILED, "provider_error")
    assert (await parts.enqueue(parts.offer, conversation="talk")).claim is not None


@pytest.mark.promise("R1", "T1")
async def test_abandoning_a_settled_run_changes_nothing(parts: Parts) -> None:
    claim = await parts.claim()
    replies = parts.wait_for("r1")
    run, task = begin(parts, claim)
    await asyncio.wait_for(task, 10)
    before = await parts.view("r1")
    await parts.runner.abandon(run)
    assert await parts.view("r1") == before
    assert len(replies) == 1


@pytest.mark.promise("S1")
async def test_a_body_that_cannot_be_read_breaks_its_run_before_the_provider_is_asked(parts: Parts) -> None:
    claim = msgspec.structs.replace(await parts.claim(), body=b"{")
    _, task = begin(parts, claim)
    with pytest.raises(msgspec.DecodeError):
        await asyncio.wait_for(task, 10)
    assert parts.player.calls == []
    assert parts.providers.report()["p"].running == 0
