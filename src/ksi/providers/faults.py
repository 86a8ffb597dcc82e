"""Refusals of model endpoints, read as failure classes: status, headers and error body of any shape in use. Pure."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.fault_words import CODES, SENTENCES, STATUSES
from ksi.providers.json_text import decode_json, repaired
from ksi.providers.time_of_return import retry_after

_CODE_KEYS = ("code", "type", "status", "error_code", "errorCode", "status_code")
_SENTENCE_KEYS = ("message", "msg", "detail", "error_msg", "error_message", "status_msg", "error_description", "text")
_ANY = msgspec.json.Decoder()
_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.IGNORECASE | re.DOTALL)
_LOADING = re.compile(
    r"\b(loading|being loaded|still load|starting up|warming up|not (yet )?(ready|loaded))\b", re.IGNORECASE
)
_THIS_MODEL = re.compile(
    r"\b(?:on|for) this model\b|\bfor (?:model )?[`'\"]?[\w.:/-]+[`'\"]? (?:in|on) (?:organization|project)\b", re.I
)
_MODEL_CLAIM = re.compile(r"seven_day_(\w+)")
_OPEN_TO_WORDS = frozenset({400, 401, 402, 403, 404, 410, 413, 422, 424, 429, None})
"""Statuses (None: no status) behind which a code or a sentence can mean something more exact."""
_EXACT = (
    FailureClass.BILLING,
    FailureClass.MODEL_NOT_FOUND,
    FailureClass.REFUSED,
)
_SPECIFIC = frozenset(
    {
        FailureClass.CONTEXT_TOO_LONG,
        FailureClass.AUTHENTICATION,
        FailureClass.RATE_LIMITED,
        FailureClass.OVERLOADED,
        FailureClass.TIMEOUT,
    }
)
"""Classes that an error body may give to a status that says less (400, 500 and those without an entry of their own)."""


class Report(msgspec.Struct, frozen=True):
    """An error body: its code words, its sentence, and the whole of it as it was decoded. Empty where it says nothing
    that can be read."""

    words: tuple[str, ...] = ()
    message: str = ""
    value: Any = None


class ReportedError(Exception):
    """An error body came in the place of an answer, or in its middle; `body` is it."""

    def __init__(self, body: bytes) -> None:
        super().__init__("the endpoint reported an error")
        self.body = body


# -- reading ----------------------------------------------------------------------------------------------------------


def read_report(body: bytes) -> Report:
    """An error body of any shape that is in use: `{"error": {...} | "..."}`, `{"errors": [...]}`, a flat object, a list
    of one, `detail`, `base_resp`, an HTML page, or plain text."""
    try:
        value, _ = decode_json(body, _ANY)
    except msgspec.DecodeError:
        text = body.decode("utf-8", "replace").strip()
        if text.startswith("<"):
            text = "an HTML page: " + " ".join(_TAGS.sub(" ", text).split())
        return Report(message=text)
    words, message = _read(value)
    return Report(words, repaired(message.strip()), value)


def is_error(value: Any) -> bool:
    """Whether a JSON object is an error, though nothing but its shape says so."""
    if not isinstance(value, Mapping):
        return False
    code = value.get("code")
    return bool(
        value.get("error")
        or value.get("error_code")
        or value.get("errors")
        or value.get("detail")
        or "error" in (value.get("object"), value.get("type"))
        or value.get("success") is False
        or (isinstance(code, int) and code >= 400)
        or _base_resp(value)
    )


def _base_resp(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """MiniMax' second status, where it is not that of a success."""
    status = value.get("base_resp")
    return status if isinstance(status, Mapping) and status.get("status_code") else None


def _read(value: Any) -> tuple[tuple[str, ...], str]:
    """Code words and sentence."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        return (), value
    if not isinstance(value, Mapping):
        return (), ""
    status = _base_resp(value)
    if status is not None:
        return (f"base_resp {status['status_code']}",), str(status.get("status_msg") or "")
    inner = value.get("error") or value.get("errors")
    if isinstance(inner, Mapping | list):
        words, message = _read(inner)
        return words or _words(value), message or _sentence(value)
    if isinstance(inner, str):
        beside = _sentence(value)
        return ((*_words(value), inner), f"{inner}: {beside}") if beside else (_words(value), inner)
    return _words(value), _sentence(value)


def _words(value: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(value[key])
        for key in _CODE_KEYS
        if isinstance(value.get(key), str | int) and not isinstance(value[key], bool)
    )


def _sentence(value: Mapping[str, Any]) -> str:
    """The endpoint's words, and behind them those of the endpoint that it asked itself."""
    said = next((value[key] for key in _SENTENCE_KEYS if value.get(key)), "")
    if not isinstance(said, str):
        said = msgspec.json.encode(said).decode()
    metadata = value.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f"{said}: {raw}" if isinstance(raw, str) and raw else said


# -- judging ----------------------------------------------------------------------------------------------------------


def failure_class(status: int | None, report: Report) -> FailureClass:
    """The class of a refusal; `status` None for an error that came in an answer's place or in its middle.

    Money, a model that is not there and a declined request are known by codes and sentences behind many statuses.
    Then a status with a meaning of its own decides. Behind 400, 500 and their like the body does.
    """
    if status is None:
        status = next((found for word in report.words if (found := _as_status(word)) is not None), None)
    named = [CODES[word] for word in report.words if word in CODES]
    if status in _OPEN_TO_WORDS:
        for failure in _EXACT:
            if failure in named or SENTENCES[failure].search(report.message):
                return failure
        if status == 429 and SENTENCES[FailureClass.CONTEXT_TOO_LONG].match(report.message):
            return FailureClass.CONTEXT_TOO_LONG
    if status in STATUSES:
        return STATUSES[status]
    for failure in named:
        if failure in _SPECIFIC:
            return failure
    for failure in (FailureClass.CONTEXT_TOO_LONG, FailureClass.AUTHENTICATION):
        if SENTENCES[failure].search(report.message):
            return failure
    if status is not None:
        return FailureClass.INVALID_REQUEST if 300 <= status < 500 else FailureClass.PROVIDER_ERROR
    return named[0] if named else FailureClass.PROVIDER_ERROR


def _as_status(word: str) -> int | None:
    """An HTTP status: three digits, or the first three of FastChat's five."""
    if word in CODES or not word.isascii() or not word.isdecimal() or len(word) not in (3, 5):
        return None
    return int(word[:3]) if 400 <= int(word[:3]) < 600 else None


def refusal(
    status: int, reason: str | None, headers: Mapping[str, str], body: bytes, *, now: float, model: str = ""
) -> ProviderError:
    """An answer whose status is no success, as an error.

    `headers` take any case of names (CIMultiDict); `now` in Unix seconds; `model` is the one that was asked for.
    """
    report = read_report(body)
    failure = failure_class(status, report)
    said = report.message or reason or "it gave no reason"
    if 300 <= status < 400:
        said = f"it redirects to {headers.get('Location', 'another place')}; set base_url to where the endpoint is"
    elif status == 404 and failure is FailureClass.INVALID_REQUEST:
        said = f"{said}; base_url may be wrong: check that the endpoint is there"
    return _error(failure, f"HTTP {status}{_named(report)}: {said}", report, headers, now, model, status)


def reported(body: bytes, headers: Mapping[str, str], *, now: float, model: str = "") -> ProviderError:
    """An error body that came in the place of an answer, or in its middle. The arguments are those of `refusal`."""
    report = read_report(body)
    said = report.message or "it gave no reason"
    message = f"the endpoint broke off with an error{_named(report)}: {said}"
    return _error(failure_class(None, report), message, report, headers, now, model, None)


def _error(
    failure: FailureClass,
    message: str,
    report: Report,
    headers: Mapping[str, str],
    now: float,
    model: str,
    status: int | None,
) -> ProviderError:
    if failure is FailureClass.MODEL_NOT_FOUND and model:
        message = f"the endpoint does not have the model {model!r}: {message}"
    limited = failure is FailureClass.RATE_LIMITED
    window = headers.get("anthropic-ratelimit-unified-representative-claim") if limited else None
    return ProviderError(
        failure,
        message,
        retry_after=retry_after(headers, report.value, report.message, now=now) if failure.retryable else None,
        status=status,
        limited_models=_limited_models(report, window, model) if limited else "",
        limit_window=window,
        unserved=failure is FailureClass.OVERLOADED and _LOADING.search(report.message) is not None,
    )


def _named(report: Report) -> str:
    words = [word for word in report.words if not word.isdecimal()]
    return f" ({words[0]})" if words else ""


# -- the scope of a limit ---------------------------------------------------------------------------------------------


def _limited_models(report: Report, window: str | None, model: str) -> str:
    """A pattern for the models that a limit holds for, where it names one model; empty where it holds for all."""
    family = _MODEL_CLAIM.fullmatch(window or "")
    if family is not None:
        return f"*{family[1]}*"
    if not model:
        return ""
    named = re.search(rf"(?<![\w./-]){re.escape(model)}(?![\w/-]|\.\w)", report.message) if len(model) > 2 else None
    if named or _THIS_MODEL.search(report.message) or model in _named_models(report.value):
        return glob.escape(model)
    return ""


def _named_models(value: Any, depth: int = 16) -> Iterator[str]:
    """All that an error body calls a model."""
    if depth and isinstance(value, Mapping):
        for name, item in value.items():
            if name in ("model", "model_name", "modelName") and isinstance(item, str):
                yield item.removeprefix("models/")
            else:
                yield from _named_models(item, depth - 1)
    elif depth and isinstance(value, list):
        for item in value:
            yield from _named_models(item, depth - 1)
