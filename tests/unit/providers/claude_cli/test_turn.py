"""One turn of Claude Code: what of its events is the answer, and what its faults mean."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion
from ksi.providers.claude_cli.faults import of_result, of_retry, says_lost
from ksi.providers.claude_cli.stream import (
    SYNTHETIC,
    AssistantBlock,
    Called,
    Denial,
    Denied,
    Event,
    Finished,
    HarmlessTools,
    Limited,
    MessageBegins,
    Piece,
    Retrying,
    Started,
    Stopped,
    Tool,
)
from ksi.providers.claude_cli.turn import ClaudeTurn
from ksi.request import Usage

NOW = 1_700_000_000.0
SPENT = Limited("rejected", NOW + 1800, "five_hour")
USAGE_POLICY = (
    "API Error: Claude Code is unable to respond to this request, which appears to violate our Usage Policy "
    "(https://www.anthropic.com/legal/aup). Please double press esc to edit your last message or start a new session "
    "for Claude Code to assist with a different task."
)
"""As 1.0.43 to 2.1.191 said it."""
CANNOT_HELP = (
    "API Error: Haiku 5.5 can't help with this. Start a new session to continue.\n\n"
    "Learn more: https://www.anthropic.com/legal/aup\n\nMessage ID: msg_1"
)
"""As 2.1.330 says it."""


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
    return [MessageBegins(), *(Piece(piece) for piece in text), AssistantBlock(name, "m-1", text, None), Stopped(stop)]


def run(*events: Event, turn: ClaudeTurn | None = None, cost: float | None = None) -> tuple[str, Completion]:
    """What was streamed, and the completion."""
    turn = turn or ClaudeTurn("asked")
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


def test_the_last_message_is_the_answer_if_tools_were_used() -> None:
    text, completion = run(
        *message("I look.", "u1", "tool_use"), *message("It is 4.", "u2"), finished(text="It is 4.", turns=2)
    )
    assert text == "I look.\n\nIt is 4."
    assert completion.text == "It is 4."
    assert completion.last_message == "u2"


def test_an_answer_that_claude_code_goes_on_with_behind_a_cut_is_one_text() -> None:
    text, completion = run(*message("On", "u1", "max_tokens"), *message("e.", "u2"), finished(text="e."))
    assert text == completion.text == "One."


def test_a_turn_that_was_stopped_at_its_limit_is_good_and_its_later_text_is_dropped() -> None:
    turn = ClaudeTurn("asked")
    for event in message("One", "u1", "max_tokens"):
        turn.take(event, now=NOW)
    assert turn.cut
    turn.stopped = True
    torn = finished(is_error=True, subtype="error_during_execution", terminal_reason="aborted_streaming")
    text, completion = run(*message("two", "u2"), torn, turn=turn)
    assert text == ""
    assert (completion.text, completion.stop_reason, completion.last_message) == ("One", "max_tokens", "u1")


def test_without_pieces_the_result_s_text_is_the_answer() -> None:
    text, completion = run(AssistantBlock("u1", "m-1", "Hi.", None), finished())
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
        ([finished(text="")], FailureClass.EMPTY_ANSWER),
        (
            [AssistantBlock("u", SYNTHETIC, "Not logged in", "authentication_failed"), finished(is_error=True)],
            "authentication",
        ),
    ],
)
def test_success_is_when_all_signs_agree(events: list[Event], failure: FailureClass) -> None:
    with pytest.raises(ProviderError) as caught:
        run(*events)
    assert caught.value.failure == failure


@pytest.mark.promise("F2")
def test_the_program_s_own_retry_ends_the_turn() -> None:
    with pytest.raises(ProviderError) as caught:
        ClaudeTurn("m").take(Retrying(529, "overloaded", 0.6), now=NOW)
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
    assert of_result(refused, "rate_limit", SPENT, now=NOW + 9999).retry_after is None, "it is not believed"
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
        ({"status": 404}, "model_not_found", "model_not_found"),
        ({"status": 413, "terminal_reason": "image_error"}, "unknown", "context_too_long"),
        (
            {"status": None, "text": "API Error: The model has reached its context window limit."},
            None,
            "context_too_long",
        ),
        ({"status": None, "text": "API Error: Connection error."}, "unknown", "network_error"),
        ({"status": None, "text": "API Error: Unable to connect to API (ECONNREFUSED)"}, None, "network_error"),
        ({"status": None, "text": "API Error: JSON Parse error"}, "unknown", "provider_error"),
        ({"status": None, "stop_reason": "refusal", "text": "API Error: can't help"}, None, "refused"),
        ({"status": None, "text": "", "errors": ("Something",)}, None, "provider_error"),
        (
            {"status": None, "text": "API Error: The model has reached its context window limit."},
            "max_output_tokens",
            "context_too_long",
        ),
        (
            {"status": None, "text": "API Error: Claude's response exceeded the 32000 output token maximum"},
            "max_output_tokens",
            "limit_reached",
        ),
        ({"status": None, "terminal_reason": "blocking_limit"}, None, "context_too_long"),
        ({"status": None, "terminal_reason": "rapid_refill_breaker"}, None, "context_too_long"),
        ({"status": None, "terminal_reason": "hook_stopped", "text": "no"}, None, "limit_reached"),
        ({"status": None, "text": "Not logged in \u00b7 Please run /login"}, "authentication_failed", "authentication"),
        ({"status": None, "text": "Not logged in \u00b7 Please run /login"}, None, "authentication"),
        ({"status": None, "text": "Login expired \u00b7 Please run /login"}, "unknown", "authentication"),
        ({"status": None, "text": "Invalid API key \u00b7 Fix external API key"}, None, "authentication"),
        (
            {"status": 401, "text": "Failed to authenticate. API Error: 401 OAuth token has expired."},
            "authentication_failed",
            "authentication",
        ),
        (
            {"status": None, "text": "Failed to authenticate: OAuth session expired and could not be refreshed"},
            None,
            "authentication",
        ),
        ({"status": None, "text": "Claude AI usage limit reached|1700005000"}, None, "rate_limited"),
        ({"status": 403, "text": "your account has no credit"}, "billing_error", "billing"),
        ({"status": 429, "text": "You've hit your monthly spend limit"}, "rate_limit", "billing"),
        ({"status": 429, "text": "Your org is out of usage \u00b7 add funds to continue"}, "rate_limit", "billing"),
        (
            {
                "status": 429,
                "text": "You've hit your monthly spend limit \u00b7 your weekly limit resets 11:30pm (UTC)",
            },
            "rate_limit",
            "rate_limited",
        ),
    ],
)
def test_a_result_that_is_an_error_tells_the_class(fields: dict[str, Any], word: str | None, failure: str) -> None:
    error = of_result(finished(is_error=True, **fields), word, None, now=NOW)
    assert error.failure.value == failure
    assert error.message


def test_an_authentication_fault_gives_advice() -> None:
    assert "log in" in of_retry(Retrying(401, "authentication_failed", 0.5), None, now=NOW).message


@pytest.mark.promise("A4")
@pytest.mark.parametrize("is_error", [True, False])
@pytest.mark.parametrize(
    ("text", "stop_reason"),
    [(USAGE_POLICY, "refusal"), (USAGE_POLICY, "stop_sequence"), (CANNOT_HELP, "refusal"), (CANNOT_HELP, None)],
)
def test_a_refusal_is_refused_with_its_words_whatever_is_error_says(
    text: str, stop_reason: str | None, is_error: bool
) -> None:
    end = finished(text=text, stop_reason=stop_reason, is_error=is_error)
    spoken = [AssistantBlock("u1", SYNTHETIC, text, "invalid_request"), end]
    for events in ([*message("I", "u1"), end], spoken, [*message("I cannot", "u0", "refusal"), *spoken]):
        with pytest.raises(ProviderError) as caught:
            run(*events)
        assert caught.value.failure is FailureClass.REFUSED
        assert text in caught.value.message


def test_an_answer_that_speaks_of_refusals_is_an_answer() -> None:
    text = "It says: API Error: Claude Code is unable to respond to this request, which appears to violate our policy."
    assert run(*message(text, "u"), finished(text=text))[1].text == text


@pytest.mark.promise("A4")
@pytest.mark.parametrize("is_error", [True, False])
@pytest.mark.parametrize(
    ("subtype", "terminal_reason", "error", "named"),
    [
        ("error_max_turns", "max_turns", "Reached maximum number of turns (1)", "max_turns"),
        ("error_max_budget_usd", "budget_exhausted", "Reached maximum budget ($5)", "max_budget_usd"),
        ("error_max_structured_output_retries", "structured_output_retry_exhausted", "", "max_structured_output"),
        ("error_max_of_next_year", None, "", "max_of_next_year"),
    ],
)
def test_a_limit_of_the_user_is_named_whatever_is_error_says(
    subtype: str, terminal_reason: str | None, error: str, named: str, is_error: bool
) -> None:
    end = finished(
        subtype=subtype,
        terminal_reason=terminal_reason,
        errors=(error,) if is_error and error else (),
        is_error=is_error,
        stop_reason="tool_use",
        text="",
    )
    with pytest.raises(ProviderError) as caught:
        run(*message("I look.", "u1", "tool_use"), end)
    assert caught.value.failure is FailureClass.LIMIT_REACHED
    assert named in caught.value.message
    assert not is_error or error in caught.value.message


@pytest.mark.promise("A4")
@pytest.mark.parametrize("terminal_reason", ["completed", "tool_deferred", "aborted_tools", None])
def test_a_turn_that_ended_in_the_middle_of_its_tools_is_no_answer(terminal_reason: str | None) -> None:
    end = finished(stop_reason="tool_use", text="I look.", terminal_reason=terminal_reason)
    with pytest.raises(ProviderError, match="in the middle of its tools") as caught:
        run(*message("I look.", "u1", "tool_use"), end)
    assert caught.value.failure is FailureClass.PROVIDER_ERROR


def test_an_object_by_a_schema_is_an_answer_though_it_came_by_a_tool() -> None:
    end = finished(stop_reason="tool_use", text='{"a":1}', structured=True)
    completion = run(*message("I will see.", "u1", "tool_use"), end)[1]
    assert (completion.text, completion.stop_reason) == ('{"a":1}', "end_turn")


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("stop", "text", "failure"),
    [
        ("end_turn", "", "empty_answer"),
        ("end_turn", " \n ", "empty_answer"),
        ("max_tokens", "", "empty_answer"),
        ("model_context_window_exceeded", "", "context_too_long"),
    ],
)
@pytest.mark.parametrize("stopped", [True, False])
def test_an_answer_without_text_is_none(stop: str, text: str, failure: str, stopped: bool) -> None:
    turn = ClaudeTurn("asked")
    turn.stopped = stopped
    with pytest.raises(ProviderError) as caught:
        run(MessageBegins(), Stopped(stop), finished(stop_reason=stop, text=text), turn=turn)
    assert caught.value.failure.value == failure


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("model_context_window_exceeded", "context_window"),
        ("max_tokens", "max_tokens"),
        ("stop_sequence", "stop_sequence"),
        ("pause_turn", "pause_turn"),
        ("word_of_next_year", "word_of_next_year"),
        (None, "end_turn"),
    ],
)
def test_stop_reasons_have_one_vocabulary(told: str | None, reason: str) -> None:
    last = told or "end_turn"
    assert run(*message("Hi.", "u", last), finished(stop_reason=told))[1].stop_reason == reason


@pytest.mark.promise("A4")
def test_denied_tools_are_noted_and_the_answer_stands() -> None:
    denied = Denial(Tool("Bash", "t1"), {"command": "make-release-4711", "description": "Release"})
    assert run(*message("x", "u"), finished())[1].note is None
    completion = run(*message("I was not able to.", "u"), finished(denials=(denied,)))[1]
    assert completion.note == "Claude Code was denied the use of Bash (make-release-4711)."
    with pytest.raises(ProviderError, match=r"empty\. Claude Code was denied the use of Bash"):
        run(finished(text="", denials=(denied,)))


@pytest.mark.promise("A8")
def test_an_answer_whose_message_had_no_name_is_not_lost() -> None:
    completion = run(MessageBegins(), Piece("Hi."), finished())[1]
    assert (completion.text, completion.last_message) == ("Hi.", None)
    assert run(*message("Hi.", "u"), finished(turns=None))[1].text == "Hi."


@pytest.mark.promise("A8")
def test_a_character_that_was_torn_over_two_pieces_is_joined() -> None:
    halves: list[Event] = [
        MessageBegins(),
        Piece("smile \ud83d"),
        Piece("\ude00 end \ud83d"),
        AssistantBlock("u", "m", "", None),
    ]
    text, completion = run(*halves, finished(text="smile \U0001f600 end \ufffd"))
    assert text == completion.text == "smile \U0001f600 end \ufffd"


# -- tools with effects ---------------------------------------------------------------------------------------------


def uses(*names: str) -> AssistantBlock:
    return AssistantBlock(
        "u", "m", "", None, tuple(Tool(name, f"toolu_{name}_{place}") for place, name in enumerate(names))
    )


@pytest.mark.promise("F13")
def test_tools_with_effects_are_reported_as_they_are_called() -> None:
    turn = ClaudeTurn("m")
    turn.take(uses("Read", "Bash", "WebFetch", "TodoWrite", "Bash", "NewTool"), now=NOW)
    assert turn.new_tools() == ["Bash", "Bash", "NewTool"]
    assert turn.new_tools() == []
    turn.take(Called((Tool("Edit", "toolu_inner"), Tool("Grep", "toolu_2"))), now=NOW)
    assert turn.new_tools() == ["Edit"], "a sub-agent's tools count"
    assert turn.tools_used == ("Bash", "NewTool", "Edit")


@pytest.mark.promise("F13")
def test_a_denied_call_had_no_effect() -> None:
    turn = ClaudeTurn("m")
    turn.take(uses("Bash", "Write", "Edit"), now=NOW)
    turn.take(Denied("toolu_Bash_0"), now=NOW)
    assert turn.tools_used == ("Write", "Edit")
    turn.take(finished(denials=(Denial(Tool("Write", "toolu_Write_1"), {}),)), now=NOW)
    assert list(turn.tools_used) == ["Edit"]


@pytest.mark.promise("F13")
def test_mcp_tools_count_unless_they_are_annotated_as_read_only() -> None:
    turn = ClaudeTurn("m")
    turn.take(HarmlessTools(frozenset({"mcp__wiki__read"})), now=NOW)
    turn.take(uses("mcp__wiki__read", "mcp__wiki__write"), now=NOW)
    assert turn.tools_used == ("mcp__wiki__write",)


@pytest.mark.promise("F13", "F2")
def test_the_program_may_ask_again_only_if_the_turn_cannot_be_run_again() -> None:
    turn = ClaudeTurn("m")
    turn.take(uses("Read"), now=NOW)
    with pytest.raises(ProviderError):
        turn.take(Retrying(529, "overloaded", 0.6), now=NOW)
    turn.take(uses("Bash"), now=NOW)
    assert turn.take(Retrying(529, "overloaded", 0.6), now=NOW) == ""


@pytest.mark.promise("F11")
def test_the_program_is_left_to_refresh_a_login_that_was_refused() -> None:
    turn = ClaudeTurn("m")
    assert turn.take(Retrying(401, "authentication_failed", 0.6), now=NOW) == ""
    assert not turn.accepted
    turn.take(MessageBegins(), now=NOW)
    assert turn.accepted


def test_a_session_that_is_gone_is_recognised_by_its_words() -> None:
    assert says_lost("exit code 1: No conversation found with session ID: x")
    assert says_lost("No message found with message.uuid of: x")
    assert not says_lost("exit code 1")
