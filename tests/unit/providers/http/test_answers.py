"""Ends of answers: one vocabulary, and the ends that are none."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion
from ksi.providers.http.answers import Answer, completed, stop_reason
from ksi.request import Usage


def failure(**fields: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        completed(Answer(**{"text": "", "model": "m", **fields}))
    return caught.value


@pytest.mark.promise("A3")
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        *(("stop", "end_turn"), ("STOP", "end_turn"), ("end_turn", "end_turn"), ("length", "max_tokens")),
        *(("max_tokens", "max_tokens"), ("tool_calls", "tool_use"), ("function_call", "tool_use")),
        *(("tool_use", "tool_use"), ("stop_sequence", "stop_sequence"), ("refusal", "refusal")),
        *(("content_filter", "content_filter"), ("SAFETY", "content_filter"), ("pause_turn", "pause_turn")),
        *(("model_context_window_exceeded", "context_window"), ("model_length", "context_window")),
        *(("a_new_word", "a_new_word"), ("", None), (None, None), (0, None), ([], None)),
    ],
)
def test_reasons_of_both_dialects_have_one_vocabulary(word: Any, reason: str | None) -> None:
    assert stop_reason(word) == reason


def test_an_answer_with_text_is_a_completion() -> None:
    answer = Answer(text=" yes", model="m", usage=Usage(output_tokens=1), stop_reason="end_turn", raw=b"{}")
    expected = Completion(text=" yes", model="m", usage=Usage(output_tokens=1), stop_reason="end_turn", raw=b"{}")
    assert completed(answer) == expected


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refusal": "I cannot help."}, "I cannot help."),
        ({"refusal": "I cannot help.", "text": "Sure", "stop_reason": "end_turn"}, "I cannot help."),
        ({"stop_reason": "refusal"}, "it gave no reason"),
        ({"stop_reason": "refusal", "text": "I would rather not."}, "I would rather not."),
        ({"stop_reason": "content_filter", "text": "Half of"}, "Half of"),
    ],
)
def test_a_declined_request_is_refused_in_the_model_s_words(fields: dict[str, Any], words: str) -> None:
    told = failure(**fields)
    assert (told.failure, told.retryable) == (FailureClass.REFUSED, False)
    assert told.message.endswith(words)


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "holds no text"),
        ({"text": " \n"}, "holds no text"),
        ({"stop_reason": "end_turn"}, "ended with end_turn"),
        ({"stop_reason": "malformed_function_call"}, "malformed_function_call"),
        ({"reasoned": True}, "reasoning and no text"),
        ({"reasoned": True, "stop_reason": "max_tokens"}, "reasoning used up its limit"),
        ({"usage": Usage(output_tokens=9, reasoning_tokens=9), "stop_reason": "max_tokens"}, "reasoning used up"),
        ({"stop_reason": "max_tokens"}, "raise max_tokens"),
    ],
)
def test_an_answer_without_text_is_a_failed_attempt(fields: dict[str, Any], words: str) -> None:
    told = failure(**fields)
    assert (told.failure, told.retryable) == (FailureClass.EMPTY_ANSWER, True)
    assert words in told.message


@pytest.mark.promise("A3", "A4")
def test_a_call_of_a_tool_is_an_answer_without_text() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    answer = completed(Answer(text="", model="m", content=(call,), stop_reason="tool_use"))
    assert (answer.text, answer.content) == ("", (call,))


@pytest.mark.promise("A4")
def test_thinking_alone_is_no_answer() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    assert failure(content=(thought,), stop_reason="end_turn").failure is FailureClass.EMPTY_ANSWER


@pytest.mark.promise("A6")
def test_an_answer_for_a_client_of_the_same_dialect_is_passed_on_whatever_it_holds() -> None:
    assert completed(Answer(text="", model="m", stop_reason="refusal", native=True)).stop_reason == "refusal"


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("word", "expected"),
    [("error", "provider_error"), ("abort", "provider_error"), ("insufficient_system_resource", "overloaded")],
)
def test_an_endpoint_that_gave_up_in_the_middle_has_not_answered(word: str, expected: str) -> None:
    told = failure(text="Half of", stop_reason=stop_reason(word))
    assert told.failure == expected
    assert word in told.message
