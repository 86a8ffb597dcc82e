"""The report on usage: windows, buckets, pages, and what MCP adds."""

from __future__ import annotations

import pytest

from ksi.completion.token_tracker import (
    DAY,
    HOUR,
    MAX_BUCKETS,
    MINUTE,
    WEEK,
    Cursor,
    bucket_length,
    definitions,
    figures,
    read_cursor,
    trend,
    write_cursor,
)
from ksi.errors import InvalidData
from ksi.request import UNPRICED
from ksi.store.usage import FirstTurns, McpUse, UsageBy, UsageSums


def used(tokens: int) -> UsageSums:
    return UsageSums(attempts=1, requests=1, input_tokens=tokens, output_tokens=1)


def test_buckets_without_attempts_are_there_too() -> None:
    since, until = 10 * HOUR + 5, 14 * HOUR + 1
    found = list(trend({11 * HOUR: used(7), 14 * HOUR: used(2)}, since, until, HOUR))
    assert [bucket.start for bucket in found] == [hour * 3_600.0 for hour in (10, 11, 12, 13, 14)]
    assert [bucket.input_tokens for bucket in found] == [0, 7, 0, 0, 2]
    assert [bucket.cost_usd for bucket in found] == [0.0] * 5


def test_a_window_that_ends_at_a_bucket_s_beginning_has_that_bucket() -> None:
    assert len(list(trend({}, HOUR, 2 * HOUR, HOUR))) == 2


@pytest.mark.parametrize(
    ("span", "length"),
    [
        (MINUTE, MINUTE),
        (HOUR, 5 * MINUTE),
        (6 * HOUR, 15 * MINUTE),
        (DAY, HOUR),
        (WEEK, 12 * HOUR),
        (30 * DAY, WEEK),
        (10 * 365 * DAY, 22 * WEEK),
    ],
)
def test_without_a_given_length_the_buckets_fit_the_window(span: int, length: int) -> None:
    assert bucket_length(None, span) == length


def test_more_buckets_than_a_reply_may_have_are_refused_with_the_least_length() -> None:
    assert bucket_length(2, MAX_BUCKETS * 2 * MINUTE) == 2 * MINUTE
    with pytest.raises(InvalidData, match="take 3 or more") as refused:
        bucket_length(2, MAX_BUCKETS * 2 * MINUTE + 1)
    assert refused.value.facts["path"] == "bucket_minutes"


def test_a_cursor_is_read_as_it_was_written() -> None:
    cursor = Cursor(UsageBy.SESSION, 1, 2**53, 77, "name\n/ü")
    assert read_cursor(write_cursor(cursor)) == cursor


@pytest.mark.parametrize("word", ["", "x", "bm9uc2Vuc2U", "WyJhZ2VudCIsMV0", "ü"])
def test_another_list_s_cursor_is_refused(word: str) -> None:
    with pytest.raises(InvalidData):
        read_cursor(word)


def test_figures_are_null_for_an_unknown_cost_and_lose_rounding_errors() -> None:
    sums = UsageSums(attempts=3, requests=2, input_tokens=5, output_tokens=6, cost_usd=0.1 + 0.2, cache_saved_usd=None)
    told = figures(sums)
    assert (told.total_tokens, told.cost_usd, told.cache_saved_usd) == (11, 0.3, None)


# MCP.


def turns(mcp: bool, number: int, median: float, model: str = "p/m") -> FirstTurns:
    return FirstTurns(provider="p", model=model, mcp=mcp, turns=number, input_tokens=median)


def use(reports: int, model: str = "p/m") -> McpUse:
    return McpUse(provider="p", model=model, attempts=reports + 1, reports=reports)


@pytest.mark.promise("T2")
def test_the_cost_of_definitions_is_the_excess_of_first_turns_with_them() -> None:
    (told,) = definitions([use(4)], [turns(True, 3, 1_520.5), turns(False, 9, 20.0), turns(True, 1, 9.0, "p/x")])
    assert (told.tokens_per_request, told.tokens, told.attempts) == (1_500.5, 6_002, 5)
    assert (told.with_mcp.turns, told.with_mcp.input_tokens) == (3, 1_520.5)
    assert (told.without_mcp.turns, told.without_mcp.input_tokens) == (9, 20.0)


@pytest.mark.promise("T2")
@pytest.mark.parametrize("known", [[], [turns(True, 3, 5.0)], [turns(False, 3, 5.0)]])
def test_definitions_without_turns_to_compare_are_unknown(known: list[FirstTurns]) -> None:
    (told,) = definitions([use(4)], known)
    assert (told.tokens_per_request, told.tokens) == ("unknown", "unknown")
    samples = [told.with_mcp, told.without_mcp]
    assert [(sample.turns, sample.input_tokens) for sample in samples].count((0, None)) == 2 - len(known)


@pytest.mark.promise("A7", "T2")
def test_calls_that_no_price_fits_have_no_cost_in_a_report() -> None:
    alone, beside = figures(UsageSums(cost_usd=3 * UNPRICED)), figures(UsageSums(cost_usd=0.5 + 3 * UNPRICED))
    assert (alone.cost_usd, beside.cost_usd) == (None, 0.5)
