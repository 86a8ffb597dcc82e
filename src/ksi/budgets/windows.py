"""Calendar windows of a time zone, summer time included. Times are microseconds of wall time."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from ksi.clock import MICROSECONDS

LOCAL_TIME = Path("/etc/localtime")


class Period(StrEnum):
    """The length of a budget's window."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    """From Monday on."""
    MONTH = "month"


class Window(msgspec.Struct, frozen=True):
    """From `start` up to, and without, `end`."""

    start: int
    end: int


@lru_cache(maxsize=64)
def zone_named(name: str) -> tzinfo:
    """The time zone of this name, as in `Europe/Berlin`; an empty name means this machine's.

    Raises:
        LookupError: no zone has this name, or the system has no table of zones.
    """
    if not name:
        return _zone_here()
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise LookupError(name) from error


def _zone_here() -> tzinfo:
    try:
        named = os.environ.get("TZ", "").removeprefix(":")
        if named:
            return ZoneInfo(named)
        with LOCAL_TIME.open("rb") as table:
            return ZoneInfo.from_file(table, key="local")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return UTC


def window(period: Period, zone: tzinfo, at: int) -> Window:
    """The window that holds the moment `at`."""
    local = datetime.fromtimestamp(at // MICROSECONDS, zone)
    if period is Period.HOUR:
        # By the offset of this moment: an hour that the clocks repeat is two windows.
        start = at // MICROSECONDS - (local.minute * 60 + local.second)
        return Window(start * MICROSECONDS, (start + 3600) * MICROSECONDS)
    day = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if period is Period.DAY:
        first, last = day, day + timedelta(days=1)
    elif period is Period.WEEK:
        first = day - timedelta(days=day.weekday())
        last = first + timedelta(days=7)
    else:
        first = day.replace(day=1)
        last = (first + timedelta(days=32)).replace(day=1)
    return Window(_instant(first), _instant(last))


def _instant(midnight: datetime) -> int:
    """The first moment of a day, which need not be a midnight that the clocks show."""
    return int(midnight.timestamp()) * MICROSECONDS
