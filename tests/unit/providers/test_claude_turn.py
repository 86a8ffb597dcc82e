"""One turn of Claude Code: what of its events is the answer, and what its faults mean."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion
from ksi.providers.claude_faults import of_result, of_retry, says_lost
from ksi.providers.claude_stream import (
    SYNTHETIC,
    Event,
    Finished,
    Limited,
    MessageBegins,
    Piece,
    Retrying,
    Said,
    Started,
    Stopped,
)
from ksi.providers.claude_turn import Turn
from ksi.request import Usage

NOW = 1_700_000_000.0
SPENT = Limited("rejected", NOW + 1800, "five_hour")


def finished(**fields: Any) -> Finished:
    given: dict[str, Any] = {
        "session": "s",
        "text": "Hi.",
        "is_error": False,
        "status": None,
        "subtype": "success",
        "turns": 1,
        "stop_reason": "end_turn",
        "terminal_reason": "completed",
        "errors": (),
        "usage": Usage(input_tokens=1, output_tokens=2),
        "turn_cost": None,
        "total_cost": None,
        "raw": b"{}",
    }
    return Finished(**{**given, **fields})


def message(text: str, name: str, stop: str = "end_turn") -> list[Event]:
    return [MessageBegins(), *(Piece(piece) for piece in text), Said(name, "m-1", text, None), Stopped(stop)]


def run(*events: Event, turn: Turn | None = None, cost: float | None = None) -> tuple[str, Completion]:
    """What was streamed, and the completion."""
    turn = turn or Turn("asked")
    text = "".join(turn.take(event, now=NOW) for event in events)
    assert turn.finished is not None
    return text, turn.completion(turn.finished, cost=cost, now=NOW)


def test_a_plain_turn_is_its_one_message() -> None:
    text, completion = run(Started("s", "m-0", "v"), *message("Hi.", "u1"), finished(), cost=0.5)
    assert text == completion.text == "Hi."
    assert completion.model == "m-1"
    assert completion.last_message == "u1"
    assert completion.provider_session == "s"
    assert completion.stop_reason == "end_turn"
    assert completion.usage == Usage(input_tokens=1, output_tokens=2, cost_usd=0.5)


def test_the_last_message_is_the_answer_where_tools_were_used() -> None:
    text, completion = run(
        *message("I look.", "u1", "tool_use"), *message("It is 4.", "u2"), finished(text="It is 4.", turns=2)
    )
    assert text == "I look.\n\nIt is 4."
    assert completion.text == "It is 4."
    assert completion.last_message == "u2"


def test_an_answer_that_claude_code_goes_on_with_behind_a_cut_is_one_text() -> None:
    text, completion = run(*message("On", "u1", "max_tokens"), *message("e.", "u2"), finished(text="e."))
    assert text == completion.text == "One."


def test_a_turn_that_was_stopped_at_its_limit_is_good_and_what_came_behind_is_dropped() -> None:
    turn = Turn("asked")
    for event in message("One", "u1", "max_tokens"):
        turn.take(event, now=NOW)
    assert turn.cut
    turn.stopped = True
    text, completion = run(*message("two", "u2"), finished(is_error=True, subtype="error_during_execution"), turn=turn)
    assert text == ""
    assert (completion.text, completion.stop_reason, completion.last_message) == ("One", "max_tokens", "u1")


def test_without_pieces_the_result_s_text_is_the_answer() -> None:
    text, completion = run(Said("u1", "m-1", "Hi.", None), finished())
    assert (text, completion.text) == ("", "Hi.")


@pytest.mark.promise("T1")
def test_a_cost_of_nothing_is_an_unknown_one() -> None:
    assert run(*message("x", "u"), finished(), cost=0.0)[1].usage == Usage(input_tokens=1, output_tokens=2)
    assert run(*message("x", "u"), finished(usage=None), cost=1.0)[1].usage is None


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([*message("x", "u"), finished(is_error=True, status=500)], FailureClass.PROVIDER_ERROR),
        ([finished(turns=0, text="Cost: $1")], FailureClass.INVALID_REQUEST),
        ([finished(text="")], FailureClass.PROVIDER_ERROR),
        ([Said("u", SYNTHETIC, "Not logged in", "authentication_failed"), finished(is_error=True)], "authentication"),
    ],
)
def test_success_is_where_all_signs_agree(events: list[Event], failure: FailureClass) -> None:
    with pytest.raises(ProviderError) as caught:
        run(*events)
    assert caught.value.failure == failure


@pytest.mark.promise("F2")
def test_the_program_s_own_retry_ends_the_turn() -> None:
    with pytest.raises(ProviderError) as caught:
        Turn("m").take(Retrying(529, "overloaded", 0.6), now=NOW)
    assert (caught.value.failure, caught.value.retry_after) == (FailureClass.OVERLOADED, None)


@pytest.mark.promise("F1", "F2")
@pytest.mark.parametrize(
    ("status", "word", "delay", "failure", "wait"),
    [
        (429, "rate_limit", 0.61, "rate_limited", None),
        (429, "rate_limit", 8.4, "rate_limited", 8.4),
        (529, "overloaded", 5.2, "overloaded", 5.2),
        (503, "server_error", 9.0, "overloaded", 9.0),
        (500, "server_error", 9.0, "provider_error", None),
        (401, "authentication_failed", 0.6, "authentication", None),
        (408, "server_error", 0.6, "timeout", None),
        (None, "unknown", 0.6, "network_error", None),
        (None, "overloaded", 0.6, "overloaded", None),
    ],
)
def test_a_retry_under_way_tells_the_class(
    status: int | None, word: str, delay: float, failure: str, wait: float | None
) -> None:
    error = of_retry(Retrying(status, word, delay), None, now=NOW)
    assert (error.failure.value, error.retry_after) == (failure, wait)
    assert error.details.get("status") == status


@pytest.mark.promise("F5")
def test_a_spent_quota_tells_when_it_returns() -> None:
    error = of_retry(Retrying(429, "rate_limit", 0.6), SPENT, now=NOW)
    assert error.retry_after == 1800
    refused = finished(is_error=True, status=429)
    assert of_result(refused, "rate_limit", SPENT, now=NOW).retry_after == 1800
    assert of_result(refused, "rate_limit", SPENT, now=NOW + 9999).retry_after == 0
    assert of_result(refused, "rate_limit", Limited("allowed_warning", NOW + 5, "x"), now=NOW).retry_after is None
    assert of_result(finished(is_error=True, status=529), None, SPENT, now=NOW).retry_after is None


@pytest.mark.promise("F1")
@pytest.mark.parametrize(
    ("fields", "word", "failure"),
    [
        ({"status": 400, "text": "API Error: 400 bad"}, "unknown", "invalid_request"),
        ({"status": 400, "text": "Credit balance is too low"}, "billing_error", "billing"),
        ({"status": 400, "terminal_reason": "prompt_too_long"}, None, "context_too_long"),
        ({"status": 403}, "authentication_failed", "authentication"),
        ({"status": 404}, "model_not_found", "invalid_request"),
        ({"status": 413, "terminal_reason": "image_error"}, "unknown", "context_too_long"),
        (
            {"status": None, "text": "API Error: The model has reached its context window limit."},
            None,
            "context_too_long",
        ),
        ({"status": None, "text": "API Error: Connection error."}, "unknown", "network_error"),
        ({"status": None, "text": "API Error: Unable to connect to API (ECONNREFUSED)"}, None, "network_error"),
        ({"status": None, "text": "API Error: JSON Parse error"}, "unknown", "provider_error"),
        ({"status": None, "stop_reason": "refusal", "text": "API Error: can't help"}, None, "invalid_request"),
        ({"status": None, "text": "", "errors": ("Something",)}, None, "provider_error"),
    ],
)
def test_a_result_that_is_an_error_tells_the_class(fields: dict[str, Any], word: str | None, failure: str) -> None:
    error = of_result(finished(is_error=True, **fields), word, None, now=NOW)
    assert error.failure.value == failure
    assert error.message


def test_an_authentication_fault_says_what_to_do() -> None:
    assert "log in" in of_retry(Retrying(401, "authentication_failed", 0.5), None, now=NOW).message


def test_a_session_that_is_gone_is_told_by_its_words() -> None:
    assert says_lost("exit code 1: No conversation found with session ID: x")
    assert says_lost("No message found with message.uuid of: x")
    assert not says_lost("exit code 1")
