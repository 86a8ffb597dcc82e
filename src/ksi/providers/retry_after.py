"""The time after which an endpoint that refused can be asked again, by its own word in headers, body or sentence. Pure.

Nonsense is not believed: a time that is long past, beyond any quota's period, or in a unit that cannot be meant. There
is no time then, and the caller has to guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

_DAY = 86_400.0
_LONGEST = 32 * _DAY
"""Seconds: a month's quota returns within them."""
_LONGEST_RETRY_AFTER = 8 * _DAY
"""Seconds: a week's quota returns within them. A larger `Retry-After` is a date or milliseconds."""
_OLDEST = _DAY
"""Seconds: a time of return that passed not longer ago is a matter of clocks, and means now."""
_EPOCH_SECONDS = 1e9
_EPOCH_MILLISECONDS = 1e12
_ROUND_MILLISECONDS = 10_000
"""From here on, whole thousands that are no whole hours are taken for milliseconds."""
_DEPTH = 16
"""Levels of an error body that are searched."""


def retry_after(headers: Mapping[str, str], body: Any = None, sentence: str = "", *, now: float) -> float | None:
    """Seconds from `now` (Unix time) until the endpoint can be asked again; None if it does not say so.

    The first of these that can be believed: the body's fields (the latest of them), `retry-after-ms`, `Retry-After`
    (seconds, or a date, read against the endpoint's own `Date` so that its clock need not agree with ours), the latest
    reset among the limits that are spent (`*-ratelimit-*` headers), and the sentence ("Please try again in 6m0s").

    `headers` take any case of names.
    """
    sources: tuple[Callable[[], float | None], ...] = (
        lambda: max(_body_waits(body, now, _DEPTH), default=None),
        lambda: _header_wait(headers, now),
        lambda: max(_resets(headers, now), default=None),
        lambda: _sentence_wait(sentence, now),
    )
    waits = [wait for source in sources if (wait := source()) is not None]
    return next((wait for wait in waits if wait > 0), 0.0 if waits else None)


# -- headers ----------------------------------------------------------------------------------------------------------


def _header_wait(headers: Mapping[str, str], now: float) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _believed(milliseconds / 1000, _LONGEST_RETRY_AFTER)
    told = headers.get("Retry-After")
    seconds = _number(told)
    if seconds is not None:
        meant_milliseconds = seconds >= _ROUND_MILLISECONDS and seconds % 1000 == 0 and seconds % 3600 != 0
        return None if meant_milliseconds else _believed(seconds, _LONGEST_RETRY_AFTER)
    at = _http_date(told)
    if at is None:
        return None
    here = _http_date(headers.get("Date"))
    return _believed(at - (now if here is None else here))


def _resets(headers: Mapping[str, str], now: float) -> Iterator[float]:
    """The waits until the resets of limits that are used up, or whose rest is unknown."""
    for spelling, value in headers.items():
        name = spelling.lower()
        if "reset" not in name or not ("ratelimit" in name or "rate-limit" in name):
            continue
        left = _number(headers.get(name.replace("reset", "remaining")))
        status = headers.get(name.replace("reset", "status"))
        if left is None and status is None and name.startswith("anthropic-"):
            continue
        if (left or 0) > 0 or status not in (None, "rejected"):
            continue
        wait = _wait(value, now)
        if wait is not None:
            yield wait


# -- bodies -----------------------------------------------------------------------------------------------------------


def _body_waits(value: Any, now: float, depth: int) -> Iterator[float]:
    """All times of return in an error body, however deep they stand."""
    if depth == 0:
        return
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = _nested(value)
    if isinstance(value, list):
        for item in value:
            yield from _body_waits(item, now, depth - 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "headers" and isinstance(item, dict):
                yield from _nested_headers(item, now)
            elif name in _FIELDS:
                wait = _FIELDS[name](item, now)
                if wait is not None:
                    yield wait
            else:
                yield from _body_waits(item, now, depth - 1)


def _nested(text: str) -> Any:
    """An upstream's error body, which gateways hand on as a string."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None


def _nested_headers(value: Mapping[Any, Any], now: float) -> Iterator[float]:
    headers = {str(name).lower(): item if isinstance(item, str) else str(item) for name, item in value.items()}
    lowered = _AnyCase(headers)
    wait = _header_wait(lowered, now)
    yield from _resets(lowered, now) if wait is None else (wait,)


class _AnyCase(dict[str, str]):
    """Headers with lower-case names, asked for in any case."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def _wait(value: Any, now: float) -> float | None:
    """A duration (`6m0s`), a date, Unix time in seconds or milliseconds, or seconds: whatever it looks like."""
    number = _number(value)
    if number is None:
        return _date(value, now) if (wait := _duration(value)) is None else _believed(wait)
    if number >= _EPOCH_MILLISECONDS:
        return _believed(number / 1000 - now)
    if number >= _EPOCH_SECONDS:
        return _believed(number - now)
    return _believed(number)


def _seconds(value: Any, now: float) -> float | None:
    """A duration, or a number of seconds."""
    number = _number(value)
    return _believed(_duration(value) if number is None else number)


def _milliseconds(value: Any, now: float) -> float | None:
    number = _number(value)
    return None if number is None else _believed(number / 1000)


def _moment(value: Any, now: float) -> float | None:
    """A date, or Unix time."""
    number = _number(value)
    return _wait(value, now) if number is None or number >= _EPOCH_SECONDS else None


_FIELDS: dict[str, Callable[[Any, float], float | None]] = {
    "retryDelay": _seconds,
    "quotaResetDelay": _seconds,
    "quotaResetTimeStamp": _moment,
    "resets_in_seconds": _seconds,
    "reset_after_seconds": _seconds,
    "resets_in": _seconds,
    "resets_at": _moment,
    "reset_at": _moment,
    "resetsAt": _moment,
    "resetAt": _moment,
    "reset_time": _moment,
    "resetTime": _moment,
    "retry_after": _seconds,
    "retryAfter": _seconds,
    "retry_after_seconds": _seconds,
    "retryAfterSeconds": _seconds,
    "retry_after_ms": _milliseconds,
    "retryAfterMs": _milliseconds,
    "estimated_time": _seconds,
}
"""Fields by the names that endpoints give them."""


# -- sentences --------------------------------------------------------------------------------------------------------

_UNIT_WORDS = r"milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d"
_SPAN = rf"\d{{1,9}}(?:\.\d+)?\s*(?:{_UNIT_WORDS})\b"
_SPANS = rf"((?:{_SPAN}|(?:\d{{1,9}}(?:\.\d+)?(?:ms|s|m|h|d))+)(?:(?:,|\s)+(?:and\s+)?{_SPAN})*)"
_SENTENCE = re.compile(
    rf"\b(?:(?:try|retry|retrying|wait|available)\b.{{0,40}}?|resets?\s+)(?:in|after|for)\s+(?:about\s+|~\s*)?{_SPANS}",
    re.IGNORECASE,
)


def _sentence_wait(sentence: str, now: float) -> float | None:
    """As in "Please try again in 6m0s", "Please retry after 26 seconds", "Your quota will reset after 2h0m0s"."""
    found = _SENTENCE.search(sentence)
    return None if found is None else _believed(_duration(found[1]))


# -- values -----------------------------------------------------------------------------------------------------------

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": _DAY}
_PART = re.compile(rf"(\d{{1,9}}(?:\.\d+)?)\s*({_UNIT_WORDS})(?![a-z])", re.IGNORECASE)


def _duration(value: Any) -> float | None:
    """Seconds of a duration such as `1s`, `20ms`, `6m0s` or `1 hour and 2 minutes`; nothing else may stand with it."""
    if not isinstance(value, str):
        return None
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", value.strip().lower())
    parts = _PART.findall(text)
    if not parts or re.sub(r"\band\b|[\s,]", "", _PART.sub("", text)):
        return None
    return sum(float(amount) * _unit(word) for amount, word in parts)


def _unit(word: str) -> float:
    if word.startswith(("ms", "millisecond")):
        return _UNITS["ms"]
    return _UNITS[word[0]]


def _number(value: Any) -> float | None:
    """A finite number that is not negative, also as a string of digits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if 0 <= value < 1e15 else None
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,15}(\.\d+)?", value.strip()):
        return None
    return float(value)


def _believed(wait: float | None, longest: float = _LONGEST) -> float | None:
    if wait is None or not -_OLDEST <= wait <= longest:
        return None
    return max(0.0, wait)


def _date(value: Any, now: float) -> float | None:
    """Seconds until an RFC 3339 or an HTTP date."""
    if not isinstance(value, str):
        return None
    try:
        return _believed(_unix(datetime.fromisoformat(value.strip())) - now)
    except (ValueError, OverflowError):
        at = _http_date(value)
    return None if at is None else _believed(at - now)


def _http_date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return _unix(parsedate_to_datetime(text))
    except (ValueError, OverflowError):
        return None


def _unix(moment: datetime) -> float:
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
