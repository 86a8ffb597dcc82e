"""Windows follow the calendar of a time zone, summer time included."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.budgets.windows import Period, window, zone_named
from ksi.clock import MICROSECONDS

HOUR = 3_600 * MICROSECONDS
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/Havana"]


def at(text: str, zone: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * MICROSECONDS


@pytest.mark.promise("B1")
@given(st.integers(1_600_000_000, 2_000_000_000), st.sampled_from(list(Period)), st.sampled_from(ZONES))
def test_every_moment_is_in_its_window_and_the_next_window_begins_at_its_end(
    seconds: int, period: Period, name: str
) -> None:
    zone, moment = zone_named(name), seconds * MICROSECONDS
    span = window(period, zone, moment)
    assert span.start <= moment < span.end
    if period is not Period.HOUR:
        assert window(period, zone, span.end - 1) == span
        assert window(period, zone, span.end).start == span.end
    else:
        assert span.end - span.start == HOUR


@pytest.mark.promise("B1")
@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)])
def test_a_day_is_as_long_as_the_calendar_has_it(day: str, hours: int) -> None:
    span = window(Period.DAY, zone_named("Europe/Berlin"), at(f"{day}T12:00", "Europe/Berlin"))
    assert span.start == at(f"{day}T00:00", "Europe/Berlin")
    assert span.end - span.start == hours * HOUR


@pytest.mark.promise("B1")
def test_an_hour_that_the_clocks_repeat_is_two_windows() -> None:
    zone = zone_named("Europe/Berlin")
    first = window(Period.HOUR, zone, at("2026-10-25T02:30", "Europe/Berlin"))
    second = window(Period.HOUR, zone, first.end + 1)
    assert second.start == first.end


@pytest.mark.promise("B1")
def test_weeks_begin_on_monday_and_months_on_the_first() -> None:
    name = "America/New_York"
    week = window(Period.WEEK, zone_named(name), at("2026-11-29T23:00", name))
    assert (week.start, week.end) == (at("2026-11-23T00:00", name), at("2026-11-30T00:00", name))
    month = window(Period.MONTH, zone_named(name), at("2026-12-31T23:00", name))
    assert (month.start, month.end) == (at("2026-12-01T00:00", name), at("2027-01-01T00:00", name))


def test_an_unknown_zone_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="Europe/Atlantis"):
        zone_named("Europe/Atlantis")
