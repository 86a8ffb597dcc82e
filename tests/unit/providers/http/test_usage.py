"""Usage reports of both dialects as KSI counts: what the endpoint meant, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.providers.http.usage import chat_usage, later_message_report, later_report, message_usage
from ksi.request import UNPRICED, Usage


def chat(prompt: Any = 10, completion: Any = 5, total: Any = None, reasoning: Any = None, **more: Any) -> Usage | None:
    report = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, **more}
    if reasoning is not None:
        report["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return chat_usage(report)


@pytest.mark.promise("A7", "T1")
@pytest.mark.parametrize(
    ("report", "output", "reasoning"),
    [
        ({"completion": 40, "reasoning": 30, "total": 50}, 40, 30),
        ({"completion": 40, "reasoning": 30, "total": 80}, 70, 30),
        ({"completion": 0, "reasoning": 60, "prompt": 21, "total": 81}, 60, 60),
        ({"completion": 40, "total": 150}, 140, 100),
        ({"completion": 40, "reasoning": 30}, 40, 30),
        ({"completion": 5, "reasoning": 30}, 35, 30),
        ({"completion": 40, "reasoning": 30, "total": 60}, 40, 30),
        ({"completion": 5, "reasoning": 30, "total": 15}, 5, 5),
    ],
)
def test_reasoning_outside_and_inside_the_output_are_distinguished_by_the_total(
    report: dict[str, Any], output: int, reasoning: int
) -> None:
    usage = chat(**report)
    assert usage is not None
    assert (usage.output_tokens, usage.reasoning_tokens) == (output, reasoning)


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("report", "given", "cached", "written"),
    [
        ({"prompt": 1000, "prompt_tokens_details": {"cached_tokens": 900}}, 100, 900, 0),
        ({"prompt": 1000, "prompt_cache_hit_tokens": 900, "prompt_cache_miss_tokens": 100}, 100, 900, 0),
        ({"prompt": 1000, "cached_tokens": 900}, 100, 900, 0),
        ({"prompt": 1000, "prompt_tokens_details": {"cached_tokens": 700, "cache_write_tokens": 200}}, 100, 700, 200),
        ({"prompt": 100, "total": 1005, "prompt_tokens_details": {"cached_tokens": 900}}, 100, 900, 0),
        ({"prompt": 10, "prompt_tokens_details": [{"modality": "TEXT", "token_count": 10}]}, 10, 0, 0),
        ({"prompt": 10, "prompt_tokens_details": None}, 10, 0, 0),
    ],
)
def test_cached_input_is_counted_once(report: dict[str, Any], given: int, cached: int, written: int) -> None:
    usage = chat(**report)
    assert usage is not None
    assert (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens) == (given, cached, written)


@pytest.mark.promise("A7", "T1")
@pytest.mark.parametrize("report", ["", [], 7, None, {}, {"prompt_tokens": 1}])
def test_an_invalid_report_is_unknown_usage(report: Any) -> None:
    assert chat_usage(report) is None
    assert message_usage(report).usage is None


@pytest.mark.promise("A7", "T1")
@pytest.mark.parametrize("count", [-1, 10.5, 1e30, 10**30, "many", True, [], {}, float("nan"), float("inf")])
def test_a_count_that_cannot_be_makes_the_usage_unknown(count: Any) -> None:
    assert chat(prompt=count) is None
    assert chat(reasoning=count) is None
    assert message_usage({"input_tokens": 10, "output_tokens": count}).usage is None
    assert message_usage({"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": count}).usage is None


def test_counts_written_as_decimals_or_text_are_read() -> None:
    assert chat(prompt=5.0, completion="2") == Usage(input_tokens=5, output_tokens=2)


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("tier", "cost"),
    [
        *((None, None), ("default", None), ("standard", None), ("on_demand", None), ("Standard", None)),
        *(("flex", UNPRICED), ("priority", UNPRICED), ("batch", UNPRICED), ("auto", UNPRICED), (7, UNPRICED)),
    ],
)
def test_a_tier_that_the_lists_are_not_for_makes_the_cost_unknown(tier: Any, cost: float | None) -> None:
    usage = chat_usage({"prompt_tokens": 1, "completion_tokens": 1}, tier)
    assert usage == Usage(input_tokens=1, output_tokens=1, cost_usd=cost)
    message = message_usage({"input_tokens": 1, "output_tokens": 1, "service_tier": tier}).usage
    assert message == Usage(input_tokens=1, output_tokens=1, cost_usd=cost)


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("more", "cost"),
    [
        ({"speed": "standard", "inference_geo": "global"}, None),
        ({"inference_geo": "not_available"}, None),
        ({"speed": "fast"}, UNPRICED),
        ({"inference_geo": "us"}, UNPRICED),
    ],
)
def test_speed_and_region_have_prices_of_their_own(more: dict[str, str], cost: float | None) -> None:
    usage = message_usage({"input_tokens": 1, "output_tokens": 1, **more}).usage
    assert usage is not None
    assert usage.cost_usd == cost


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("more", "cost"),
    [
        ({"cost": 0.25}, 0.25),
        ({"cost": 0}, 0.0),
        ({"cost": {"total_cost": 0.006}}, 0.006),
        ({"cost": 0.01, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.2}}, 0.21),
        ({"cost": 0.0, "is_byok": True}, None),
        ({"cost": -1.0}, None),
        ({"cost": "free"}, None),
        ({"cost": float("inf")}, None),
    ],
)
def test_a_cost_that_the_endpoint_tells_stands(more: dict[str, Any], cost: float | None) -> None:
    usage = chat(**more)
    assert usage is not None
    assert usage.cost_usd == (pytest.approx(cost) if cost is not None else None)


@pytest.mark.promise("A7")
def test_a_reported_cost_stands_in_any_tier() -> None:
    usage = chat_usage({"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.5}, "flex")
    assert usage is not None
    assert usage.cost_usd == 0.5


@pytest.mark.promise("A7")
def test_an_hour_s_cache_is_separate_from_the_other() -> None:
    both = {"ephemeral_5m_input_tokens": 50, "ephemeral_1h_input_tokens": 30}
    report = {"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 80, "cache_creation": both}
    told = message_usage(report)
    assert told.hour_tokens == 30
    assert told.usage == Usage(input_tokens=1, output_tokens=2, cache_write_tokens=80, cost_usd=UNPRICED)
    minutes = message_usage({**report, "cache_creation": {**both, "ephemeral_1h_input_tokens": 0}})
    assert (minutes.hour_tokens, minutes.usage and minutes.usage.cost_usd) == (0, None)
    other_tier = message_usage({**report, "service_tier": "batch"})
    assert (other_tier.hour_tokens, other_tier.usage and other_tier.usage.cost_usd) == (0, UNPRICED)


@pytest.mark.promise("A7")
def test_reported_thinking_is_a_part_of_the_output() -> None:
    report = {"input_tokens": 1, "output_tokens": 20, "output_tokens_details": {"thinking_tokens": 15}}
    assert message_usage(report).usage == Usage(input_tokens=1, output_tokens=20, reasoning_tokens=15)


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("before", "after", "merged"),
    [
        (None, {"a": 1}, {"a": 1}),
        ({"a": 1}, None, {"a": 1}),
        ({"a": 1}, "", {"a": 1}),
        ("", {"a": 1}, {"a": 1}),
        ({"a": 5, "b": 2}, {"a": 0, "b": 3}, {"a": 5, "b": 3}),
        ({"a": {"x": 2, "y": 3}}, {"a": {"x": 5, "y": 0}}, {"a": {"x": 5, "y": 3}}),
        ({"a": None}, {"a": 1}, {"a": 1}),
        ({"tier": "a"}, {"tier": "b"}, {"tier": "b"}),
    ],
)
def test_running_totals_never_fall(before: Any, after: Any, merged: Any) -> None:
    assert later_report(before, after) == merged


def report(given: int | None, read: int | None, output: int | None = None) -> dict[str, int | None]:
    return {"input_tokens": given, "cache_read_input_tokens": read, "output_tokens": output}


@pytest.mark.promise("A7")
@pytest.mark.parametrize(
    ("before", "after", "merged"),
    [
        (report(15, 4000, 0), report(0, 0, 12), report(15, 4000, 12)),
        (report(15, 4000), report(0, 4000), report(15, 4000)),
        (report(4015, 0), report(15, 4000), report(15, 4000)),
        (report(5, None, 1), report(6, None, 30), report(6, None, 30)),
        (report(0, 0), report(15, 4000), report(15, 4000)),
    ],
)
def test_input_may_move_into_the_cache_but_its_sum_never_falls(before: Any, after: Any, merged: Any) -> None:
    assert later_message_report(before, after) == merged


NAMES = (
    *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens", "cost"),
    *("cache_creation", "prompt_tokens_details", "ephemeral_1h_input_tokens", "cached_tokens"),
)
reports = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


@given(reports)
def test_no_report_breaks_the_reading(value: Any) -> None:
    for usage in (chat_usage(value, value), message_usage(value).usage):
        assert usage is None or usage.output_tokens >= usage.reasoning_tokens >= 0
    later_report(value, {"prompt_tokens": 1})
    later_message_report({"input_tokens": 1}, value)


@pytest.mark.promise("A7")
def test_the_sum_with_a_call_without_a_price_has_none() -> None:
    priced, unpriced = Usage(input_tokens=1, cost_usd=0.5), Usage(input_tokens=2, cost_usd=UNPRICED)
    assert priced.plus(unpriced) == unpriced.plus(priced) == Usage(input_tokens=3, cost_usd=UNPRICED)
    assert priced.plus(priced).cost_usd == 1.0
    assert priced.plus(Usage()).cost_usd is None
    assert 0.5 + UNPRICED == 0.5
