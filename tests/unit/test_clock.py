"""Time and chance as arguments."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.clock import (
    FARTHEST,
    GENTLE,
    HOLD,
    LEAP,
    MICROSECONDS,
    SLOWNESS,
    YOUNG,
    YOUNG_HOLD,
    Chance,
    Follow,
    KeptTime,
    Moment,
    SystemClock,
    follow,
    microseconds,
    sleep_counting_clock,
    to_seconds,
)
from ksi.testing import SimulatedClock

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


# -- wall time and its leaps ------------------------------------------------------------------------------------------

HOUR = 3_600
DAY = 86_400
OLD = 10 * YOUNG


@pytest.mark.promise("O12")
def test_the_clock_that_counts_sleep_is_chosen_on_each_system() -> None:
    linux = SimpleNamespace(CLOCK_BOOTTIME=7, CLOCK_MONOTONIC_RAW=4, CLOCK_MONOTONIC=1)
    macos = SimpleNamespace(CLOCK_MONOTONIC_RAW=4, CLOCK_MONOTONIC=6, CLOCK_UPTIME_RAW=8)
    assert sleep_counting_clock(linux) == 7
    assert sleep_counting_clock(macos) == 4
    assert sleep_counting_clock(SimpleNamespace()) == time.CLOCK_MONOTONIC


@pytest.mark.promise("O4")
@pytest.mark.parametrize(
    ("apart", "stood", "uptime", "behind", "way"),
    [
        (1, 0, OLD, False, Follow.SLOWLY),
        (GENTLE, 0, OLD, False, Follow.SLOWLY),
        (-GENTLE, 0, OLD, False, Follow.SLOWLY),
        (GENTLE + 1, HOLD - 1, OLD, False, Follow.NOT),
        (GENTLE + 1, HOLD, OLD, False, Follow.AT_ONCE),
        (FARTHEST, HOLD, OLD, False, Follow.AT_ONCE),
        (FARTHEST + 1, 1_000 * HOLD, OLD, False, Follow.NOT),
        (-GENTLE - 1, 0, OLD, False, Follow.SLOWLY),
        (-FARTHEST, 1_000 * HOLD, OLD, False, Follow.SLOWLY),
        (-FARTHEST - 1, 1_000 * HOLD, OLD, False, Follow.NOT),
        (100 * FARTHEST, YOUNG_HOLD - 1, YOUNG - 1, False, Follow.NOT),
        (100 * FARTHEST, YOUNG_HOLD, YOUNG - 1, False, Follow.AT_ONCE),
        (100 * FARTHEST, YOUNG_HOLD, YOUNG, False, Follow.NOT),
        (-100 * FARTHEST, YOUNG_HOLD, YOUNG - 1, False, Follow.NOT),
        (100 * FARTHEST, 0, OLD, True, Follow.AT_ONCE),
        (-100 * FARTHEST, 0, OLD, True, Follow.NOT),
    ],
)
def test_a_leap_is_followed_by_its_size_and_by_how_long_it_stood(
    apart: int, stood: int, uptime: int, behind: bool, way: Follow
) -> None:
    assert follow(apart, stood, uptime, behind=behind) is way


async def pass_time(clock: SimulatedClock, seconds: int) -> None:
    """Let time pass as a daemon sees it, which looks at its clock every second."""
    clock.now()
    for _ in range(seconds):
        await clock.advance(1)
        clock.now()


@pytest.mark.promise("O4")
@pytest.mark.parametrize("days", [30, -30, 10_000, -10_000])
async def test_a_large_leap_moves_nothing_however_long_it_stands(days: int) -> None:
    clock = SimulatedClock()
    begin = clock.now()
    clock.step_wall(days * DAY)
    await pass_time(clock, 2 * HOUR)
    assert clock.now() == begin.after(2 * HOUR)
    leap = clock.leap()
    assert leap is not None
    assert (leap.at, leap.size, leap.standing) == (begin.wall, microseconds(days * DAY), True)
    assert clock.apart() == days * DAY
    clock.step_wall(-days * DAY)
    assert clock.now() == begin.after(2 * HOUR)
    leap = clock.leap()
    assert leap is not None
    assert not leap.standing
    assert clock.apart() == 0


@pytest.mark.promise("O4")
async def test_the_machines_sleep_counts_as_time_and_is_no_leap() -> None:
    clock = SimulatedClock()
    begin = clock.now()
    clock.sleep_machine(8 * HOUR)
    assert clock.now() == Moment(begin.wall + microseconds(8 * HOUR), begin.mono)
    assert clock.leap() is None


@pytest.mark.promise("O4")
async def test_after_a_leap_only_the_time_of_a_sleep_has_passed() -> None:
    clock = SimulatedClock()
    begin = clock.now()
    clock.step_wall(30 * DAY)
    clock.now()
    clock.sleep_machine(8 * HOUR)
    assert clock.now().wall == begin.wall + microseconds(8 * HOUR)


@pytest.mark.promise("O4")
@pytest.mark.parametrize("size", [300, -300, 1.5, -1.5])
async def test_a_small_leap_is_followed_slowly_and_to_the_end(size: float) -> None:
    clock = SimulatedClock()
    clock.step_wall(size)
    last = clock.now()
    whole = round(abs(size)) * SLOWNESS
    for _ in range(whole):
        await clock.advance(1)
        now = clock.now()
        gained = now.wall - last.wall - MICROSECONDS
        assert abs(gained) <= MICROSECONDS // SLOWNESS
        last = now
    await pass_time(clock, 60)
    assert abs(clock.apart()) < 0.001


@pytest.mark.promise("O4")
async def test_a_paused_virtual_machine_is_followed_after_an_hour_and_makes_nothing_older() -> None:
    clock = SimulatedClock()
    begin = clock.now()
    clock.step_wall(8 * HOUR)  # all of its clocks stood still for so long, then the wall clock was put right
    await pass_time(clock, HOUR - 1)
    assert clock.now() == begin.after(HOUR - 1)
    await pass_time(clock, 2)
    assert clock.now().wall == begin.wall + microseconds(9 * HOUR + 1)
    assert clock.aged() == begin.after(HOUR + 1)


@pytest.mark.promise("O4")
async def test_a_leap_that_changes_must_last_for_another_hour() -> None:
    clock = SimulatedClock()
    begin = clock.now()
    clock.step_wall(8 * HOUR)
    await pass_time(clock, 1_800)
    clock.step_wall(HOUR)
    await pass_time(clock, HOUR - 1)
    assert clock.now() == begin.after(1_800 + HOUR - 1)
    await pass_time(clock, 1)
    assert clock.apart() == 0


@pytest.mark.promise("O4")
async def test_a_virtual_machine_that_is_paused_every_half_minute_stays_near_the_wall_clock() -> None:
    clock = SimulatedClock()
    for _ in range(200):  # https://github.com/microsoft/WSL/issues/40745: 0.4 s in about 30 s
        await pass_time(clock, 30)
        clock.step_wall(0.4)
        assert abs(clock.apart()) < 0.5
    assert clock.leap() is None


@pytest.mark.promise("O4")
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["step", "sleep", "wake"]), st.floats(-40 * DAY, 40 * DAY)), min_size=1, max_size=40
    )
)
async def test_wall_time_never_goes_back_and_never_stands_still(moves: list[tuple[str, float]]) -> None:
    clock = SimulatedClock()
    last = clock.now()
    for kind, seconds in moves:
        if kind == "step":
            clock.step_wall(seconds)
        elif kind == "sleep":
            clock.sleep_machine(abs(seconds))
        else:
            await clock.advance(0.5)
        now = clock.now()
        assert now.wall >= last.wall
        if kind == "wake":
            assert now.wall - last.wall >= MICROSECONDS // 2 * (SLOWNESS - 1) // SLOWNESS
        last = now


class Machine(SystemClock):
    """A machine whose clocks read as they are told to."""

    readings = (0, 0, 0)

    def _read(self) -> tuple[int, int, int]:
        return self.readings


def started(real: int, boot: int, kept: KeptTime | None, machine_boot: str = "this") -> Machine:
    """A clock begun when the system's clocks read so many seconds."""
    Machine.readings = (microseconds(real), microseconds(boot), microseconds(boot))
    return Machine(kept, machine_boot)


def at(machine: Machine, real: int, boot: int) -> int:
    """The wall time in seconds that KSI goes by when the clocks read so many seconds."""
    machine.readings = (microseconds(real), microseconds(boot), microseconds(boot))
    return machine.now().wall // MICROSECONDS


NOW = 1_790_000_000


def kept(wall: int, boot: int, machine_boot: str = "this", followed: int = 0) -> KeptTime:
    return KeptTime(machine_boot, microseconds(boot), microseconds(wall), microseconds(followed))


@pytest.mark.promise("O4")
def test_a_leap_while_the_daemon_was_down_is_seen_at_its_next_start() -> None:
    clock = started(NOW + 30 * DAY + 60, 5_060, kept(NOW, 5_000, followed=7))
    assert clock.now().wall == microseconds(NOW + 60)
    assert clock.aged().wall == microseconds(NOW + 53)
    leap = clock.leap()
    assert leap is not None
    assert leap.size == microseconds(30 * DAY)
    assert clock.keep() == kept(NOW + 60, 5_060, followed=7)


@pytest.mark.promise("O4")
def test_after_a_boot_of_the_machine_its_clock_is_right() -> None:
    clock = started(NOW + 30 * DAY, 50, kept(NOW, 5_000, "earlier"))
    assert clock.now().wall == microseconds(NOW + 30 * DAY)
    assert clock.leap() is None


@pytest.mark.promise("O4")
def test_a_machine_that_boots_with_a_clock_years_behind_goes_on_from_the_time_before_and_is_put_right_at_once() -> None:
    clock = started(0, 50, kept(NOW, 5_000, "earlier"))
    assert clock.now().wall == microseconds(NOW)
    assert at(clock, 30, 80) == NOW + 30
    assert at(clock, NOW + 3 * DAY, 90) == NOW + 3 * DAY
    assert at(clock, NOW + 33 * DAY, 100) == NOW + 3 * DAY + 10, "the next leap is one like any other"


@pytest.mark.promise("O4")
def test_a_machine_that_was_just_booted_may_get_its_time_from_the_network() -> None:
    clock = started(NOW, 20, kept(NOW - 5, 5_000, "earlier"))
    assert at(clock, NOW + 21 * DAY + 10, 30) == NOW + 10
    assert at(clock, NOW + 21 * DAY + 131, 151) == NOW + 21 * DAY + 131
    assert clock.aged() == clock.now(), "its time before was wrong, so this makes nothing younger"


@pytest.mark.promise("O4")
def test_a_clock_that_knows_nothing_of_the_time_before_goes_by_the_system() -> None:
    assert started(NOW, 50, None).now().wall == microseconds(NOW)
    assert started(0, 50, None).now().wall == 0


@pytest.mark.promise("O4")
def test_a_boot_without_a_name_is_taken_for_another_one() -> None:
    clock = started(NOW + 30 * DAY, 5_060, kept(NOW, 5_000, machine_boot=""), machine_boot="")
    assert clock.now().wall == microseconds(NOW + 30 * DAY)


@pytest.mark.promise("O4")
def test_the_real_clock_stays_with_the_system_and_grows() -> None:
    clock = SystemClock()
    walls = [clock.now().wall for _ in range(1_000)]
    assert walls == sorted(walls)
    assert abs(microseconds(clock.apart())) < LEAP
