"""Limits per minute: a bucket that fills evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.completion.pool.rate_limit import MINUTE, Bucket

NOW = 7_000_000


@pytest.mark.promise("F5")
def test_a_bucket_begins_full_and_holds_a_minute_s_worth_at_most() -> None:
    bucket = Bucket(60, NOW)
    assert bucket.level(NOW) == 60
    assert bucket.level(NOW + 10 * MINUTE) == 60
    bucket.take(-5, NOW)
    assert bucket.level(NOW) == 60


@pytest.mark.promise("F5")
def test_taken_tokens_come_back_evenly() -> None:
    bucket = Bucket(60, NOW)
    bucket.take(60, NOW)
    assert bucket.level(NOW) == 0
    assert bucket.level(NOW + 1_000_000) == pytest.approx(1)
    assert bucket.level(NOW + MINUTE // 2) == pytest.approx(30)


@pytest.mark.promise("F5")
def test_an_overdrawn_bucket_fills_up_first() -> None:
    bucket = Bucket(100, NOW)
    bucket.take(250, NOW)
    assert bucket.level(NOW + MINUTE) == pytest.approx(-50)
    assert bucket.full_enough(1, NOW) == pytest.approx(NOW + 1.51 * MINUTE, abs=2)


@pytest.mark.promise("F5")
def test_an_overestimate_is_put_back() -> None:
    bucket = Bucket(100, NOW)
    bucket.take(80, NOW)
    bucket.take(30 - 80, NOW)
    assert bucket.level(NOW) == 70


@pytest.mark.promise("F5")
def test_a_clock_that_stands_still_gives_nothing() -> None:
    bucket = Bucket(100, NOW)
    bucket.take(100, NOW)
    assert bucket.level(NOW) == 0
    assert bucket.level(NOW - 5_000_000) == 0


@pytest.mark.promise("F5")
@given(st.integers(1, 10_000_000), st.lists(st.tuples(st.integers(0, MINUTE), st.integers(0, 500)), max_size=30))
def test_it_never_gives_more_than_its_rate(per_minute: int, takes: list[tuple[int, int]]) -> None:
    bucket, now, taken = Bucket(per_minute, NOW), NOW, 0
    for pause, wish in takes:
        now += pause
        amount = min(wish, int(bucket.level(now)))
        bucket.take(amount, now)
        taken += amount
        assert taken <= per_minute * (1 + (now - NOW) / MINUTE) + 1e-3


@pytest.mark.promise("F5")
@given(st.integers(1, 10_000_000), st.floats(0, 1e6), st.integers(1, 1000))
def test_at_the_time_that_it_names_there_is_enough(per_minute: int, taken: float, wanted: int) -> None:
    bucket = Bucket(per_minute, NOW)
    bucket.take(taken, NOW)
    wanted = min(wanted, per_minute)
    at = bucket.full_enough(wanted, NOW)
    assert at >= NOW
    assert bucket.level(at) >= wanted - 1e-3
    assert at == NOW or bucket.level(at - 2 * max(1, MINUTE // per_minute)) < wanted
