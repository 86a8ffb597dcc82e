"""SpentLimit quotas as Claude Code tells of them: which limit it is, for which models, and when it returns. Pure.

The program tells by a `rate_limit_event`, and by a sentence whose spelling differs from version to version. A time of
return that the limit cannot have is not believed.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from ksi.providers.claude_cli.stream import Limited
from ksi.providers.retry_after import retry_after

_HOUR = 3600.0
_DAY = 24 * _HOUR
_LONGEST = {"five_hour": 5.25 * _HOUR, "seven_day": 8 * _DAY}
"""Seconds within which a window returns, by the beginning of its name; reported times are rounded up by some
minutes."""
_LONGEST_OF_ALL = 32 * _DAY
_EPOCH_MILLISECONDS = 1e12

_TITLES = (
    ("session limit", "five_hour"),
    ("5-hour limit", "five_hour"),
    ("opus limit", "seven_day_opus"),
    ("opus weekly limit", "seven_day_opus"),
    ("sonnet limit", "seven_day_sonnet"),
    ("sonnet weekly limit", "seven_day_sonnet"),
    ("fable limit", "seven_day_overage_included"),
    ("weekly limit", "seven_day"),
    ("usage credit limit", "overage"),
    ("out of usage credits", "overage"),
    ("out of extra usage", "overage"),
)
"""The program's titles for the windows, in lower case. The more exact ones stand before those that they contain."""
_FAMILY = re.compile(r"\b(fable|haiku|mythos|opus|sonnet)(?: [\d.]+)?(?: weekly)? limit\b", re.IGNORECASE)
_WINDOW_OF_MODEL = re.compile(r"seven_day_(fable|haiku|mythos|opus|sonnet)")
_SPENT = re.compile(
    r"usage limit reached|\blimit reached\b|\b(?:hit|reached) your (?:[\w'-]+ ){0,4}(?:usage )?limit\b|"
    r"out of (?:extra usage|usage credits)|api usage limits",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(
    r"spend limit|out of (?:extra usage|usage)\b|requires usage credits|doesn't include (?:extra )?usage|"
    r"disabled by your admin|set to \$0",
    re.IGNORECASE,
)

_EPOCH = re.compile(r"limit reached\|(\d{9,14})\b")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_RESETS = re.compile(
    r"resets?(?: at| on)? "
    rf"(?:(?P<month>{'|'.join(_MONTHS)})[a-z]*\.? (?P<day>\d{{1,2}})(?:, (?P<year>\d{{4}}))?(?:,? at |, | |(?![\w:])))?"
    r"(?:(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))? ?(?P<half>[ap])\.?m\b|(?P<hour24>\d{1,2}):(?P<minute24>\d{2})\b)?"
    r"(?:\s*\((?P<zone>[\w+/-]+)\))?",
    re.IGNORECASE,
)
_REGAIN = re.compile(r"regain access on (\d{4}-\d\d-\d\d) at (\d\d:\d\d) UTC", re.IGNORECASE)


class SpentLimit(msgspec.Struct, frozen=True):
    """A limit that a turn ran into."""

    window: str | None
    """The program's word for it, such as `five_hour`; None if there is none."""
    models: str
    """A pattern of the models that it holds for; empty for all."""
    wait: float | None
    """Seconds until it returns; None if it does not say so, or nothing that can be believed."""


def says_spent(said: str) -> bool:
    """Return True if a sentence of the program tells of a spent quota."""
    return _SPENT.search(said) is not None


def says_no_money(said: str) -> bool:
    """Return True if a sentence tells of a limit of money. Waiting does not end it unless the sentence names a time."""
    return _NO_MONEY.search(said) is not None


def spent(said: str, limited: Limited | None, *, now: float, zone: tzinfo | None = None) -> SpentLimit:
    """The limit behind a refusal, from the program's sentence and its last `rate_limit_event`.

    `now` is in Unix seconds. `zone` is the program's time zone if its sentence names none; None means the system's.
    """
    rejected = limited if limited is not None and limited.status == "rejected" else None
    titled = next((window for title, window in _TITLES if title in said.lower()), None)
    window = (rejected.kind if rejected is not None else None) or titled
    told = _until(rejected.resets_at, now, window) if rejected is not None else None
    wait = told if told is not None else _sentence_wait(said, now, window, zone)
    return SpentLimit(window, _models(said, window, titled), wait)


def _models(said: str, window: str | None, titled: str | None) -> str:
    """The sentence decides: on some plans it calls the window of one model the weekly limit, which holds for all."""
    named = _FAMILY.search(said)
    if named is None and titled is None:
        named = _WINDOW_OF_MODEL.fullmatch(window or "")
    return f"*{named[1].lower()}*" if named is not None else ""


def _sentence_wait(said: str, now: float, window: str | None, zone: tzinfo | None) -> float | None:
    if found := _EPOCH.search(said):
        return _until(float(found[1]), now, window)
    if found := _REGAIN.search(said):
        return _until(_timestamp(datetime.fromisoformat(f"{found[1]}T{found[2]}:00+00:00")), now, window)
    for found in _RESETS.finditer(said):
        if (at := _moment(found, now, zone)) is not None:
            return _until(at, now, window)
    wait = retry_after({}, None, said, now=now)
    return _until(now + wait, now, window) if wait is not None else None


def _until(at: float | None, now: float, window: str | None) -> float | None:
    """Seconds until a moment in Unix time; None if the window cannot return then."""
    if at is None:
        return None
    wait = (at / 1000 if at >= _EPOCH_MILLISECONDS else at) - now
    longest = next((limit for name, limit in _LONGEST.items() if (window or "").startswith(name)), _LONGEST_OF_ALL)
    return wait if 0 < wait <= longest else None


def _moment(found: re.Match[str], now: float, zone: tzinfo | None) -> float | None:
    """The Unix time that a sentence names: the next day and hour that are such, from `now` on."""
    where = named_zone(found["zone"]) or zone
    here = datetime.fromtimestamp(now, where) if where is not None else datetime.fromtimestamp(now).astimezone()
    clock = _clock(found)
    if clock is None and (found["month"] is None or _has_clock(found)):
        return None
    hour, minute = clock or (0, 0)
    try:
        if found["month"] is None:
            return _next_day(here, hour, minute, where)
        month, day = _MONTHS.index(found["month"].lower()[:3]) + 1, int(found["day"])
        years = (int(found["year"]),) if found["year"] else (here.year, here.year + 1)
        moments = (_timestamp(_local(where, year, month, day, hour, minute)) for year in years)
        return next((moment for moment in moments if moment > now), None)
    except (ValueError, OverflowError):
        return None


def _next_day(here: datetime, hour: int, minute: int, where: tzinfo | None) -> float:
    today = _timestamp(_local(where, here.year, here.month, here.day, hour, minute))
    if today > here.timestamp():
        return today
    day = here + timedelta(days=1)
    return _timestamp(_local(where, day.year, day.month, day.day, hour, minute))


def _local(where: tzinfo | None, year: int, month: int, day: int, hour: int, minute: int) -> datetime:
    """A moment on the clocks of a zone; None is the system's zone, with its own rules for that day."""
    naive = datetime(year, month, day, hour, minute)  # noqa: DTZ001 - it gets its zone in the next line
    return naive.astimezone() if where is None else naive.replace(tzinfo=where)


def _timestamp(moment: datetime) -> float:
    return moment.astimezone(UTC).timestamp()


def _has_clock(found: re.Match[str]) -> bool:
    return found["hour"] is not None or found["hour24"] is not None


def _clock(found: re.Match[str]) -> tuple[int, int] | None:
    """Hour and minute of a day; None if the text has no valid time."""
    if found["hour"] is not None:
        hour, minute = int(found["hour"]), int(found["minute"] or 0)
        if not 1 <= hour <= 12 or minute > 59:
            return None
        return hour % 12 + (12 if found["half"].lower() == "p" else 0), minute
    if found["hour24"] is not None:
        hour, minute = int(found["hour24"]), int(found["minute24"])
        return (hour, minute) if hour <= 23 and minute <= 59 else None
    return None


def named_zone(name: str | None) -> tzinfo | None:
    """A time zone by its name; None without one, or if this system does not know it."""
    if name is None:
        return None
    if name.upper() in ("UTC", "GMT"):
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None
