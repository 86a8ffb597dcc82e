"""Errors repeat little of what they were sent."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.errors import LONGEST_MESSAGE, LONGEST_QUOTE, InvalidData, KsiError, NotFound
from ksi.events.completions import CompletionData
from ksi.protocol import convert, error_body

NAMES = st.text(min_size=LONGEST_QUOTE + 1, max_size=2_000)


@pytest.mark.promise("S1")
@given(NAMES)
def test_a_quoted_name_is_repeated_up_to_a_limit_whatever_stands_in_it(name: str) -> None:
    error = NotFound(f"no session {name!r} of the daemon's; see `ksi sessions`", session_id=name)
    assert len(error.message) <= LONGEST_QUOTE + 60
    assert error.message.startswith("no session ")
    assert error.message.endswith("of the daemon's; see `ksi sessions`")
    assert str(error) == error.message
    assert len(error_body(error)["details"]["session_id"]) <= LONGEST_QUOTE + 1
    assert error.facts["session_id"] == name


def test_a_short_message_is_unchanged() -> None:
    words = f"no session {'x' * (LONGEST_QUOTE - 20)!r}; the daemon's `ksi sessions` has them all, and 'nothing' else"
    error = NotFound(words, names=["a", "b"], fence=3)
    assert error.message == words
    assert error.details == {"names": ["a", "b"], "fence": 3}
    assert NotFound("x", names=["y" * 900]).details == {"names": ["y" * LONGEST_QUOTE + "…"]}


def test_of_a_long_message_beginning_and_end_are_kept() -> None:
    message = KsiError("first" + " x" * 100_000 + " what to do").message
    assert len(message) <= LONGEST_MESSAGE + 3
    assert message.startswith("first x") and message.endswith("x what to do")


@pytest.mark.promise("S1")
@pytest.mark.parametrize("value", ["x" * 100_000, "x' `x" * 20_000, '"' * 100_000, "\\'" * 50_000], ids=len)
def test_a_value_of_the_wrong_kind_is_repeated_up_to_a_limit(value: str) -> None:
    for data in ({"prompt": "x", "on_busy": value}, {"prompt": "x", "on_busy": {value: 1}}):
        with pytest.raises(InvalidData) as caught:
            convert(data, CompletionData)
        assert len(caught.value.message) <= LONGEST_QUOTE + 60
        assert caught.value.message.startswith("on_busy: ")
        assert len(msgspec.json.encode(error_body(caught.value))) < 1_000
