"""Time and chance as arguments."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.clock import MICROSECONDS, Chance, Moment, SystemClock, microseconds, to_seconds

YEAR = 365 * 86_400


@given(seconds=st.floats(-YEAR, YEAR), wall=st.integers(0, 2**60), mono=st.integers(0, 2**60))
def test_a_later_moment_is_as_much_later_on_both_clocks(seconds: float, wall: int, mono: int) -> None:
    later = Moment(wall, mono).after(seconds)
    assert later.wall - wall == later.mono - mono == microseconds(seconds)


@given(st.integers(-(10**9), 10**9))
def test_seconds_and_microseconds_go_there_and_back(time: int) -> None:
    seconds = to_seconds(time)
    assert seconds is not None
    assert microseconds(seconds) == time


def test_no_time_stays_no_time() -> None:
    assert to_seconds(None) is None


@pytest.mark.parametrize(("seconds", "whole"), [(0.1, 100_000), (1e-6, 1), (1.9e-6, 2), (-0.5, -500_000), (0, 0)])
def test_seconds_become_whole_microseconds(seconds: float, whole: int) -> None:
    assert microseconds(seconds) == whole


def test_wall_time_goes_over_the_wire_in_seconds() -> None:
    assert Moment(1_800_000_000 * MICROSECONDS + 250_000, 0).unix == 1_800_000_000.25


def test_a_moment_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Moment(1, 2).wall = 3  # type: ignore[misc]


@pytest.mark.promise("L4")
def test_the_machines_monotonic_clock_never_goes_back() -> None:
    clock = SystemClock()
    times = [clock.now().mono for _ in range(1_000)]
    assert times == sorted(times)


async def test_a_sleep_takes_its_time_by_the_monotonic_clock_and_a_negative_one_none() -> None:
    clock = SystemClock()
    begin = clock.now().mono
    await clock.sleep(0.02)
    middle = clock.now().mono
    assert middle - begin >= 15_000
    await clock.sleep(-1_000)
    assert clock.now().mono >= middle


@given(st.integers())
def test_a_holder_token_is_never_zero_and_fits_a_signed_word(seed: int) -> None:
    chance = Chance(random.Random(seed))
    tokens = [chance.token() for _ in range(20)]
    assert all(0 < token < 2**62 for token in tokens)
    assert len(set(tokens)) == len(tokens)


@given(seed=st.integers(), times=st.lists(st.integers(0, 2**53), min_size=2, max_size=2, unique_by=lambda t: t // 1000))
def test_later_identifiers_sort_after_earlier_ones(seed: int, times: list[int]) -> None:
    chance = Chance(random.Random(seed))
    early, late = sorted(times)
    first, second = chance.identifier("req", Moment(early, 9)), chance.identifier("req", Moment(late, 1))
    assert first < second


def test_identifiers_are_a_prefix_and_26_hex_digits_and_differ() -> None:
    chance = Chance()
    names = {chance.identifier("req", Moment(1_800_000_000 * MICROSECONDS, 0)) for _ in range(1_000)}
    assert len(names) == 1_000
    for name in names:
        prefix, _, digits = name.partition("_")
        assert prefix == "req"
        assert len(digits) == 26
        assert set(digits) <= set("0123456789abcdef")


def test_one_seed_gives_one_run_of_chance() -> None:
    def draw(seed: int) -> tuple[object, ...]:
        chance = Chance(random.Random(seed))
        return chance.token(), chance.identifier("a", Moment(1, 1)), chance.uniform(0, 1)

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@given(seed=st.integers(), low=st.floats(0, 10), width=st.floats(0, 10))
def test_a_number_between_two_is_between_them(seed: int, low: float, width: float) -> None:
    assert low <= Chance(random.Random(seed)).uniform(low, low + width) <= low + width
