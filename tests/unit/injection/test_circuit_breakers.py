"""The chain breaker: limits within the daemon's, what is set aside, and when patterns trip a chain."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.config.schema import Chain, Patterns
from ksi.content.blocks import Message
from ksi.injection.circuit_breakers import combined, estimate
from ksi.injection.patterns import Finding
from ksi.request import ChainConfig, InjectionConfig, PatternsConfig, RequestBody
from ksi.store.chains import ChainLimits
from tests.unit.injection.chain_facts import SECOND, attempt, body, breaker, trail

LOOP = "The plan is ready on my side, and I am waiting for your confirmation of the deadline."

# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("C5")
def test_without_a_wish_only_the_daemons_maxima_bind() -> None:
    chain = Chain(max_depth=7, token_budget=900, time_window=60.0)
    assert breaker(chain).limits(None) == ChainLimits(max_depth=7, token_budget=900, time_window=60 * SECOND)


@pytest.mark.promise("C5")
def test_a_wish_has_defaults_and_can_only_ask_for_less() -> None:
    limits = breaker().limits(ChainConfig())
    assert limits == ChainLimits(max_depth=5, token_budget=50_000, time_window=3600 * SECOND)
    asked = breaker().limits(ChainConfig(max_depth=99, token_budget=10, time_window=1e9))
    assert asked == ChainLimits(max_depth=20, token_budget=10, time_window=86_400 * SECOND)


@pytest.mark.parametrize(
    "wrong", [{"max_depth": -1}, {"token_budget": 0}, {"time_window": 0}, {"max_depth": 1.5}, {"parent_request_id": ""}]
)
def test_a_limit_out_of_range_is_reported(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(wrong))):
        msgspec.convert(wrong, ChainConfig)


@pytest.mark.parametrize("wrong", [{"threshold": 0}, {"threshold": 1.1}, {"ignore": ["loops"]}])
def test_a_wrong_setting_of_patterns_is_reported(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(wrong))):
        msgspec.convert(wrong, PatternsConfig)


# -- membership -------------------------------------------------------------------------------------------------------


def test_a_request_without_parent_limits_and_injection_is_in_no_chain() -> None:
    assert breaker().membership(body(), "alpha") is None
    assert breaker().membership(body(InjectionConfig(enabled=False)), "alpha") is None
    assert breaker().membership(body(patterns=PatternsConfig()), "alpha") is None


@pytest.mark.promise("C5", "C6")
def test_a_member_has_its_settings() -> None:
    config = ChainConfig(parent_request_id="req_0", max_depth=2)
    member = breaker().membership(body(circuit_breaker_config=config, max_tokens=300, prompt="x" * 400), "alpha")
    assert member is not None
    assert (member.parent, member.limits.max_depth, member.injects) == ("req_0", 2, False)
    assert (member.estimate, member.output_cap) == (100, 300)
    assert (member.block, member.trips, member.guard) == (None, False, False)
    assert member.mark
    injecting = breaker().membership(body(InjectionConfig()), "alpha")
    assert injecting is not None
    assert (injecting.parent, injecting.injects) == (None, True)


@pytest.mark.promise("C6")
def test_the_output_is_capped_if_the_request_names_none_or_more() -> None:
    asked = breaker(Chain(max_output=500))
    assert [asked.output_cap(body(max_tokens=n)) for n in (None, 1, 500, 10_000)] == [500, 1, 500, 10_000]


@pytest.mark.promise("C6")
def test_a_member_without_a_wish_gets_a_share_of_its_budget() -> None:
    wishes = [ChainConfig(token_budget=budget) for budget in (100, 20_000, 1_000_000)]
    assert [breaker().output_cap(body(circuit_breaker_config=wish)) for wish in wishes] == [1_024, 2_500, 4_096]
    assert breaker().output_cap(body()) == 4_096


@given(
    texts=st.lists(st.text(min_size=1, max_size=50), min_size=1, max_size=4), system=st.none() | st.text(max_size=50)
)
def test_the_estimate_is_of_all_that_is_said_and_never_nothing(texts: list[str], system: str | None) -> None:
    asked = RequestBody(messages=tuple(Message("user", text) for text in texts), system=system)
    chars = sum(map(len, texts)) + len(system or "")
    assert estimate(asked) >= 1
    assert 4 * estimate(asked) - 4 < chars <= 4 * estimate(asked)


# -- judgements -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("C7")
def test_a_loop_is_tolerated_at_first_and_blocked_when_it_is_sure() -> None:
    first = breaker().judge_result(body(), attempt(LOOP), None, trail([("a", LOOP), ("a", None)]))
    assert 0 < first.risk_score < 0.7
    assert first.block is None
    assert first.mark
    third = breaker().judge_result(body(), attempt(LOOP), None, trail([("a", LOOP), ("a", LOOP), ("a", None)]))
    assert third.block is not None
    assert third.block.code == "repetition"
    assert third.block.risk_score == third.risk_score >= 0.7
    assert third.evidence == third.block.evidence
    assert third.block.message in third.evidence


@pytest.mark.promise("C7")
def test_a_chains_first_request_is_never_judged() -> None:
    looping = " ".join(["again and again."] * 100)
    judged = breaker().judge_result(body(), attempt(looping), None, trail([("a", None)]))
    assert (judged.risk_score, judged.block) == (0.0, None)
    assert judged.mark


@pytest.mark.promise("C7")
def test_repeated_failures_are_an_error_loop() -> None:
    way = trail([("a", None), ("a", None), ("a", None)])
    judged = breaker().judge_result(body(), attempt(None, "no answer within 600 s"), "timeout", way)
    assert judged.block is not None
    assert judged.block.code == "error_loop"


@pytest.mark.promise("C7")
def test_a_cancelled_request_says_nothing_of_its_chain() -> None:
    judged = breaker().judge_result(body(), attempt(None), "cancelled", trail([("a", LOOP), ("a", LOOP), ("a", None)]))
    assert (judged.mark, judged.block, judged.risk_score) == (None, None, 0.0)


@pytest.mark.promise("C7")
def test_a_failure_that_left_no_mark_counts_too() -> None:
    way = trail([("a", None), ("a", None), ("a", None)])
    bare = msgspec.structs.replace(way, hops=tuple(msgspec.structs.replace(h, result=None) for h in way.hops))
    judged = breaker().judge_result(body(), None, "timeout", bare)
    assert judged.block is not None


@pytest.mark.promise("C7")
def test_a_request_can_say_how_patterns_are_judged() -> None:
    way = trail([("a", LOOP), ("a", LOOP), ("a", None)])

    def judged(wish: PatternsConfig | None, patterns: Patterns | None = None) -> str | None:
        asked = body(patterns=wish)
        block = breaker(patterns=patterns).judge_result(asked, attempt(LOOP), None, way).block
        return block.code if block is not None else None

    off = Patterns(enabled=False)
    assert judged(None) == "repetition"
    assert judged(PatternsConfig(ignore=("repetition",))) is None
    assert judged(PatternsConfig(ignore=("growth",))) == "repetition"
    assert judged(PatternsConfig(threshold=1.0)) is None
    assert judged(PatternsConfig(enabled=False)) is None
    assert judged(None, off) is None
    assert judged(PatternsConfig(enabled=True), off) == "repetition"
    assert judged(None, Patterns(threshold=0.99)) is None


def test_with_patterns_off_nothing_is_read_and_no_mark_is_left() -> None:
    off = breaker(patterns=Patterns(enabled=False))
    judged = off.judge_result(body(), attempt(LOOP), None, trail([("a", LOOP), ("a", None)]))
    assert (judged.mark, judged.risk_score) == (None, 0.0)
    member = off.membership(body(circuit_breaker_config=ChainConfig()), "alpha")
    assert member is not None
    assert member.mark is None


@pytest.mark.promise("C7")
def test_a_child_of_a_looping_chain_is_blocked_before_it_runs() -> None:
    way = trail([("a", LOOP), ("a", LOOP), ("a", LOOP), ("a", None)])
    seen = msgspec.structs.replace(
        way, hops=(msgspec.structs.replace(way.hops[0], result=way.hops[1].result), *way.hops[1:])
    )
    config = ChainConfig(parent_request_id="req_3")
    member = breaker().membership(body(circuit_breaker_config=config), "a", seen)
    assert member is not None
    assert member.block is not None
    assert member.trips


@given(st.lists(st.floats(0, 1), max_size=6))
def test_findings_together_weigh_at_least_as_much_as_the_heaviest_and_at_most_1(weights: list[float]) -> None:
    score = combined([Finding("cycle", weight, "") for weight in weights])
    assert 0 <= score <= 1
    assert score >= max(weights, default=0.0) - 0.001
