"""What a model endpoint's refusal means: its status, headers and error body read as a failure class (F1). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from ksi.errors import FailureClass, ProviderError

_CONTEXT = re.compile(
    r"context.{0,12}(length|window|size|limit)|prompt is too long|maximum prompt length|"
    r"input (is )?too long|input token count.{0,40}exceeds|must have less than \d+ tokens|"
    r"too large for model with \d+|tokens \+ `?max_new_tokens|reduce the length of the messages",
    re.IGNORECASE | re.DOTALL,
)
_ACCOUNT = re.compile(r"credit balance is too low|api key not valid|incorrect api key|invalid api key", re.IGNORECASE)

_WORDS: dict[str, FailureClass] = {
    "context_length_exceeded": FailureClass.CONTEXT_TOO_LONG,
    "exceed_context_size_error": FailureClass.CONTEXT_TOO_LONG,
    "string_above_max_length": FailureClass.CONTEXT_TOO_LONG,
    "request_too_large": FailureClass.CONTEXT_TOO_LONG,
    "authentication_error": FailureClass.AUTHENTICATION,
    "permission_error": FailureClass.AUTHENTICATION,
    "billing_error": FailureClass.AUTHENTICATION,
    "invalid_api_key": FailureClass.AUTHENTICATION,
    "rate_limit_error": FailureClass.RATE_LIMITED,
    "rate_limit_exceeded": FailureClass.RATE_LIMITED,
    "insufficient_quota": FailureClass.RATE_LIMITED,
    "overloaded_error": FailureClass.OVERLOADED,
    "unavailable_error": FailureClass.OVERLOADED,
    "timeout_error": FailureClass.TIMEOUT,
    "api_error": FailureClass.PROVIDER_ERROR,
    "server_error": FailureClass.PROVIDER_ERROR,
    "invalid_request_error": FailureClass.INVALID_REQUEST,
    "not_found_error": FailureClass.INVALID_REQUEST,
    "model_not_found": FailureClass.INVALID_REQUEST,
}

_STATUSES: dict[int, FailureClass] = {
    401: FailureClass.AUTHENTICATION,
    402: FailureClass.AUTHENTICATION,
    403: FailureClass.AUTHENTICATION,
    408: FailureClass.TIMEOUT,
    409: FailureClass.PROVIDER_ERROR,
    413: FailureClass.CONTEXT_TOO_LONG,
    425: FailureClass.PROVIDER_ERROR,
    429: FailureClass.RATE_LIMITED,
    503: FailureClass.OVERLOADED,
    504: FailureClass.TIMEOUT,
    529: FailureClass.OVERLOADED,
}

_SPECIFIC = frozenset(
    {
        FailureClass.CONTEXT_TOO_LONG,
        FailureClass.AUTHENTICATION,
        FailureClass.RATE_LIMITED,
        FailureClass.OVERLOADED,
        FailureClass.TIMEOUT,
    }
)
"""Classes that an error body may give to a status that says less (400, 500 and what has no entry of its own)."""


class Report(msgspec.Struct, frozen=True):
    """What an error body says: its type and code words, and its sentence. Empty where it says nothing we can read."""

    words: tuple[str, ...] = ()
    message: str = ""


def read_report(body: bytes) -> Report:
    """An error body of any shape that is in use: `{"error": {...} | "..."}`, a flat object, a list of one, `detail`,
    or plain text."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Report(message=body.decode("utf-8", "replace").strip())
    return _report_of(value)


def _report_of(value: Any) -> Report:
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and "error" in value:
        value = value["error"]
    if isinstance(value, str):
        return Report(message=value.strip())
    if not isinstance(value, dict):
        return Report()
    words = tuple(str(value[key]) for key in ("code", "type", "status") if isinstance(value.get(key), str | int))
    sentence = next((value[key] for key in ("message", "detail") if value.get(key)), "")
    if not isinstance(sentence, str):
        sentence = msgspec.json.encode(sentence).decode()
    return Report(words, sentence.strip())


def failure_class(status: int | None, report: Report) -> FailureClass:
    """The class of a refusal; `status` None for an error that came in the middle of an answer.

    A status with a meaning of its own decides. Behind 400, 500 and their like the body's words and sentence do.
    """
    if status is None:
        status = next((int(word) for word in report.words if word.isdecimal() and len(word) == 3), None)
    if status in _STATUSES:
        return _STATUSES[status]
    named = [_WORDS[word] for word in report.words if word in _WORDS]
    for found in named:
        if found in _SPECIFIC:
            return found
    if _CONTEXT.search(report.message):
        return FailureClass.CONTEXT_TOO_LONG
    if _ACCOUNT.search(report.message):
        return FailureClass.AUTHENTICATION
    if status is not None:
        return FailureClass.INVALID_REQUEST if 300 <= status < 500 else FailureClass.PROVIDER_ERROR
    return named[0] if named else FailureClass.PROVIDER_ERROR


def refusal(status: int, reason: str | None, headers: Mapping[str, str], body: bytes, *, now: float) -> ProviderError:
    """An answer that is not 200, as an error. `headers` take any case of names (CIMultiDict); `now` in Unix seconds."""
    report = read_report(body)
    failure = failure_class(status, report)
    wait = retry_after(headers, now=now) if failure.retryable else None
    said = report.message or reason or "it gave no reason"
    if 300 <= status < 400:
        said = f"it redirects to {headers.get('Location', 'another place')}; set base_url to where the endpoint is"
    return ProviderError(failure, f"HTTP {status}{_named(report)}: {said}", retry_after=wait, status=status)


def reported(body: bytes) -> ProviderError:
    """An error body that came in the place of an answer, or in its middle."""
    report = read_report(body)
    said = report.message or "it gave no reason"
    return ProviderError(failure_class(None, report), f"the endpoint broke off with an error{_named(report)}: {said}")


def _named(report: Report) -> str:
    words = [word for word in report.words if not word.isdecimal()]
    return f" ({words[0]})" if words else ""


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """When to come back, in seconds from now, as the endpoint says it; None where it does not.

    `retry-after-ms`, then `Retry-After` (seconds, or a date, read against the endpoint's own `Date` so that its clock
    need not agree with ours), then the latest reset among the limits that are spent: `anthropic-ratelimit-*` (dates)
    and `x-ratelimit-*` (durations such as 6m0s).
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    told = headers.get("Retry-After")
    if told is not None:
        seconds = _number(told)
        if seconds is not None:
            return seconds
        at = _http_date(told)
        if at is not None:
            here = _http_date(headers.get("Date"))
            return max(0.0, at - (now if here is None else here))
    return _reset(headers, now)


def _reset(headers: Mapping[str, str], now: float) -> float | None:
    waits: list[float] = []
    for name in ("requests", "tokens", "input-tokens", "output-tokens"):
        prefix = f"anthropic-ratelimit-{name}"
        if headers.get(f"{prefix}-remaining") == "0":
            waits.extend(_until(headers.get(f"{prefix}-reset"), now))
        if headers.get(f"x-ratelimit-remaining-{name}") == "0":
            waits.extend(_duration(headers.get(f"x-ratelimit-reset-{name}")))
    if headers.get("anthropic-ratelimit-unified-status") == "rejected":
        waits.extend(_until(headers.get("anthropic-ratelimit-unified-reset"), now))
    return max(waits, default=None)


def _number(text: str | None) -> float | None:
    """A finite number that is not negative, written in digits."""
    if text is None or not re.fullmatch(r"\d{1,12}(\.\d+)?", text.strip()):
        return None
    return float(text)


def _http_date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return _unix(moment)


def _until(text: str | None, now: float) -> list[float]:
    """Seconds until an RFC 3339 date, or until Unix seconds."""
    if text is None:
        return []
    at = _number(text)
    if at is None:
        try:
            at = _unix(datetime.fromisoformat(text))
        except ValueError:
            return []
    return [max(0.0, at - now)]


def _unix(moment: datetime) -> float:
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def _duration(text: str | None) -> list[float]:
    """Seconds of a duration such as 1s, 20ms or 6m0s."""
    if text is None or not re.fullmatch(r"(\d{1,9}(\.\d+)?(ms|s|m|h|d))+", text.strip()):
        return []
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", text)
    return [sum(float(amount) * _UNITS[unit] for amount, unit in parts)]
