"""What becomes of a failed attempt: pure decisions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.clock import Chance, Moment, microseconds
from ksi.completion.pool.limits import LONGEST_TOLD
from ksi.completion.retry_manager import (
    LONGEST_PARK,
    Decision,
    FailOver,
    GiveUp,
    ParkUntil,
    RetryAt,
    decide,
    policy_of,
)
from ksi.config.schema import Retry
from ksi.errors import FailureClass, ProviderError
from ksi.request import RetryBody

NOW = Moment(1_700_000_000_000_000, 5_000_000)
POLICY = Retry(max_attempts=3, initial_delay=1.0, max_delay=60.0)
RETRYABLE = [failure for failure in FailureClass if failure.retryable]
FINAL = [failure for failure in FailureClass if not failure.retryable]
ELSEWHERE = [FailureClass.AUTHENTICATION, FailureClass.BILLING, FailureClass.MODEL_NOT_FOUND]
"""Another provider may do better, though trying again does not help."""


class Loaded(Chance):
    """Dice that always fall on the same share of what is possible."""

    def __init__(self, share: float) -> None:
        super().__init__(random.Random(0))
        self._share = share

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._share


def judge(
    failure: FailureClass, failures: int = 1, policy: Retry = POLICY, share: float = 1.0, **more: object
) -> Decision:
    retry_after = more.pop("retry_after", None)
    error = ProviderError(failure, "it failed", retry_after=retry_after)  # type: ignore[arg-type]
    return decide(error, failures, policy, NOW, Loaded(share), **more)  # type: ignore[arg-type]


def wait(decision: Decision) -> float:
    """Seconds from now."""
    assert isinstance(decision, RetryAt | ParkUntil)
    return (decision.at - NOW.wall) / 1e6


@pytest.mark.promise("F1", "F2")
@pytest.mark.parametrize("failure", RETRYABLE)
def test_a_retryable_failure_is_retried_up_to_the_last_attempt(failure: FailureClass) -> None:
    assert isinstance(judge(failure, 1), RetryAt)
    assert isinstance(judge(failure, 2), RetryAt)
    assert judge(failure, 3) == GiveUp("attempts_used_up")


@pytest.mark.promise("F1")
@pytest.mark.parametrize("failure", FINAL)
def test_a_permanent_failure_is_given_up_at_once(failure: FailureClass) -> None:
    assert judge(failure, 1) == GiveUp("not_retryable")


@pytest.mark.promise("F2")
def test_the_bound_of_the_wait_doubles_up_to_the_longest() -> None:
    policy = Retry(max_attempts=100, initial_delay=0.5, max_delay=3.0)
    assert [wait(judge(FailureClass.TIMEOUT, n, policy)) for n in (1, 2, 3, 4, 99)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert wait(judge(FailureClass.TIMEOUT, 3, policy, share=0.25)) == 0.5
    assert wait(judge(FailureClass.TIMEOUT, 3, policy, share=0.0)) == 0.0


@pytest.mark.promise("F2")
def test_any_number_of_attempts_has_a_wait() -> None:
    policy = Retry(max_attempts=1_000_000, initial_delay=1.0, max_delay=60.0)
    assert wait(judge(FailureClass.TIMEOUT, 500_000, policy)) == 60.0


@pytest.mark.promise("F2")
@pytest.mark.parametrize("failure", RETRYABLE)
def test_the_provider_s_own_word_is_the_floor(failure: FailureClass) -> None:
    assert wait(judge(failure, 1, retry_after=17.0)) == 17.0
    assert wait(judge(failure, 1, retry_after=0.2, share=1.0)) == 1.0
    assert judge(failure, 3, retry_after=17.0) == GiveUp("attempts_used_up")


@pytest.mark.promise("F2")
@pytest.mark.parametrize("retry_after", [1e12, 1e300, float("inf")])
def test_a_time_of_return_beyond_all_bounds_is_not_believed(retry_after: float) -> None:
    assert wait(judge(FailureClass.TIMEOUT, retry_after=retry_after)) == 1.0


@pytest.mark.promise("F5")
@pytest.mark.parametrize("failures", [0, 3, 50])
def test_a_request_whose_provider_is_away_is_parked_whatever_was_tried_before(failures: int) -> None:
    decision = judge(FailureClass.RATE_LIMITED, failures, away=True, retry_after=90.0)
    assert decision == ParkUntil(NOW.wall + microseconds(90.0))
    assert judge(FailureClass.RATE_LIMITED, failures, away=True, retry_after=90.0, others=True) == FailOver()


@pytest.mark.promise("F5")
def test_one_attempt_is_enough_to_wait_for_a_provider_that_is_away() -> None:
    once = Retry(max_attempts=1)
    assert isinstance(judge(FailureClass.OVERLOADED, 0, once, away=True), ParkUntil)


@pytest.mark.promise("F5")
def test_a_parked_request_waits_for_the_first_provider_that_is_back() -> None:
    later = NOW.wall + microseconds(10)
    assert wait(judge(FailureClass.RATE_LIMITED, away=True, retry_after=3600.0, back=later)) == 10.0
    assert wait(judge(FailureClass.RATE_LIMITED, away=True, back=later)) == 10.0
    assert wait(judge(FailureClass.RATE_LIMITED, away=True, back=NOW.wall - microseconds(10))) == 0.0


@pytest.mark.promise("F11")
def test_a_request_that_waits_for_a_login_is_parked_for_a_while_and_then_waits_in_the_queue() -> None:
    never = NOW.wall + 2**62
    assert wait(judge(FailureClass.AUTHENTICATION, away=True, back=never)) == LONGEST_PARK
    assert wait(judge(FailureClass.AUTHENTICATION, away=True)) == LONGEST_PARK


@pytest.mark.promise("F3")
def test_a_probe_is_never_the_last_attempt() -> None:
    once = Retry(max_attempts=1)
    back = NOW.wall + microseconds(30)
    assert wait(judge(FailureClass.PROVIDER_ERROR, 1, once, probe=True, back=back)) == 31.0, "others go first"
    assert judge(FailureClass.PROVIDER_ERROR, 0, once, probe=True, others=True) == FailOver()
    assert judge(FailureClass.INVALID_REQUEST, 1, once, probe=True) == GiveUp("not_retryable")


@pytest.mark.promise("F13")
@pytest.mark.parametrize("failure", FailureClass)
def test_a_turn_that_has_used_tools_is_not_run_again(failure: FailureClass) -> None:
    for more in ({}, {"others": True}, {"away": True, "retry_after": 5.0}, {"probe": True}):
        assert judge(failure, 1, tools_used=True, **more) == GiveUp("tools_used")


@pytest.mark.promise("A4")
def test_after_a_refusal_only_another_model_is_asked() -> None:
    assert judge(FailureClass.REFUSED, 1) == GiveUp("not_retryable")
    assert judge(FailureClass.REFUSED, 1, Retry(max_attempts=1), others=True) == FailOver()


@pytest.mark.promise("F4")
@pytest.mark.parametrize("failure", [*RETRYABLE, *ELSEWHERE])
def test_a_fault_of_the_provider_goes_to_the_next_one_at_once(failure: FailureClass) -> None:
    assert judge(failure, 1, others=True) == FailOver()


@pytest.mark.promise("F4")
@pytest.mark.parametrize("failure", [f for f in FINAL if f not in {*ELSEWHERE, FailureClass.REFUSED}])
def test_a_fault_of_the_request_goes_nowhere(failure: FailureClass) -> None:
    assert judge(failure, 1, others=True) == GiveUp("not_retryable")


@pytest.mark.promise("F4")
def test_each_provider_of_a_route_is_tried_once_whatever_the_attempts() -> None:
    once = Retry(max_attempts=1)
    assert judge(FailureClass.TIMEOUT, 1, once, others=True, route_length=3) == FailOver()
    assert judge(FailureClass.TIMEOUT, 2, once, others=True, route_length=3) == FailOver()
    assert judge(FailureClass.TIMEOUT, 3, once, others=False, route_length=3) == GiveUp("attempts_used_up")


@pytest.mark.promise("F4")
def test_failing_over_ends_with_the_attempts() -> None:
    assert judge(FailureClass.TIMEOUT, 3, others=True, route_length=2) == GiveUp("attempts_used_up")
    assert judge(FailureClass.AUTHENTICATION, 3, others=True, route_length=2) == GiveUp("not_retryable")


@pytest.mark.promise("F2")
def test_a_request_sets_its_own_values_and_the_configuration_the_rest() -> None:
    assert policy_of(POLICY, None) is POLICY
    assert policy_of(POLICY, RetryBody()) == POLICY
    wish = RetryBody(max_attempts=7, max_delay=2.0)
    assert policy_of(POLICY, wish) == Retry(max_attempts=7, initial_delay=1.0, max_delay=2.0)


@pytest.mark.promise("F1", "F2", "F4", "F5")
@given(
    failure=st.sampled_from(FailureClass),
    failures=st.integers(0, 2_000),
    policy=st.builds(
        Retry, max_attempts=st.integers(1, 2_000), initial_delay=st.floats(1e-6, 1e6), max_delay=st.floats(1e-6, 1e6)
    ),
    retry_after=st.none() | st.floats(min_value=-1e9, allow_nan=False),
    others=st.booleans(),
    route_length=st.integers(1, 5),
    back=st.none() | st.integers(NOW.wall - 10**12, NOW.wall + 10**15),
    away=st.booleans(),
    probe=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_decision_keeps_the_rules(
    failure: FailureClass,
    failures: int,
    policy: Retry,
    retry_after: float | None,
    others: bool,
    route_length: int,
    back: int | None,
    away: bool,
    probe: bool,
    seed: int,
) -> None:
    error = ProviderError(failure, "it failed", retry_after=retry_after)
    chance = Chance(random.Random(seed))
    decision = decide(
        error,
        failures,
        policy,
        NOW,
        chance,
        others=others,
        route_length=route_length,
        back=back,
        away=away,
        probe=probe,
    )
    believed = retry_after is not None and 0 < retry_after <= LONGEST_TOLD
    match decision:
        case FailOver():
            assert others
        case ParkUntil():
            assert away or probe
            assert not (away and others)
            assert 0 <= wait(decision) <= LONGEST_TOLD + policy.max_delay
        case RetryAt():
            assert failure.retryable and not away and not probe
            assert failures < policy.max_attempts
            floor = (retry_after or 0.0) if believed else 0.0
            assert floor - 1e-6 <= wait(decision) <= max(policy.max_delay, floor) + 1e-6
        case GiveUp(reason):
            assert not away or failure is FailureClass.REFUSED
            assert reason == ("attempts_used_up" if failure.retryable else "not_retryable")
            assert not failure.retryable or failures >= policy.max_attempts
