"""Refusals of model endpoints, read as failure classes: status, headers and error body of any shape in use. Pure."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.json_text import decode_json, repaired
from ksi.providers.retry_after import retry_after

_CODE_KEYS = ("code", "type", "status", "error_code", "errorCode", "status_code")
_SENTENCE_KEYS = ("message", "msg", "detail", "error_msg", "error_message", "status_msg", "error_description", "text")
_ANY = msgspec.json.Decoder()
_TAG = re.compile(r"<(?:(script|style)\b|(!--))?", re.IGNORECASE)
LONGEST_ERROR = 64 * 1024
"""Bytes of an error that are read: its meaning stands at its beginning."""
_LONGEST_SENTENCE = 4_000
"""Characters of an endpoint's sentence in which its meaning is looked for."""
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


class ErrorReport(msgspec.Struct, frozen=True):
    """An error body: its code words, its sentence, and the whole of it as it was decoded. Its fields are empty if
    it says nothing that can be read."""

    words: tuple[str, ...] = ()
    message: str = ""
    value: Any = None


class ReportedError(Exception):
    """An error body came in the place of an answer, or in its middle; `body` is it."""

    def __init__(self, body: bytes) -> None:
        super().__init__("the endpoint reported an error")
        self.body = body


# -- reading ----------------------------------------------------------------------------------------------------------


def read_report(body: bytes) -> ErrorReport:
    """An error body of any shape that is in use: `{"error": {...} | "..."}`, `{"errors": [...]}`, a flat object, a list
    of one, `detail`, `base_resp`, an HTML page, or plain text."""
    body = body[:LONGEST_ERROR]
    try:
        value, _ = decode_json(body, _ANY)
    except msgspec.DecodeError:
        text = body.decode("utf-8", "replace").strip()
        if text.startswith("<"):
            text = "an HTML page: " + " ".join(_without_tags(text).split())
        return ErrorReport(message=text[:_LONGEST_SENTENCE])
    words, message = _read(value)
    return ErrorReport(words, repaired(message.strip()[:_LONGEST_SENTENCE]), value)


def _without_tags(page: str) -> str:
    """The text of an HTML page. A tag, script or comment that never ends takes the rest with it, so that no end is
    looked for twice."""
    parts: list[str] = []
    lower = page.lower() if len(page.lower()) == len(page) else page
    done = 0
    while (tag := _TAG.search(page, done)) is not None:
        parts.append(page[done : tag.start()])
        closing = f"</{tag[1].lower()}>" if tag[1] else "-->" if tag[2] else ">"
        found = lower.find(closing, tag.end())
        if found < 0:
            return " ".join(parts)
        done = found + len(closing)
    return " ".join((*parts, page[done:]))


def is_error(value: Any) -> bool:
    """Return True if a JSON object is an error by its shape alone."""
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
    """MiniMax' second status, unless it is that of a success."""
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


def failure_class(status: int | None, report: ErrorReport) -> FailureClass:
    """The class of a refusal; `status` None for an error that came in an answer's place or in its middle.

    Money, a model that is not there and a declined request are known by codes and sentences behind many statuses.
    Then a status with a meaning of its own decides. Behind 400, 500 and their like the body does.
    """
    if status is None:
        status = next((found for word in report.words if (found := _as_status(word)) is not None), None)
    named = [_CODES[word] for word in report.words if word in _CODES]
    if status in _OPEN_TO_WORDS:
        for failure in _EXACT:
            if failure in named or _SENTENCES[failure].search(report.message):
                return failure
        if status == 429 and _SENTENCES[FailureClass.CONTEXT_TOO_LONG].match(report.message):
            return FailureClass.CONTEXT_TOO_LONG
    if status in _STATUSES:
        return _STATUSES[status]
    for failure in named:
        if failure in _SPECIFIC:
            return failure
    for failure in (FailureClass.CONTEXT_TOO_LONG, FailureClass.AUTHENTICATION):
        if _SENTENCES[failure].search(report.message):
            return failure
    if status is not None:
        return FailureClass.INVALID_REQUEST if 300 <= status < 500 else FailureClass.PROVIDER_ERROR
    return named[0] if named else FailureClass.PROVIDER_ERROR


def _as_status(word: str) -> int | None:
    """An HTTP status: three digits, or the first three of FastChat's five."""
    if word in _CODES or not word.isascii() or not word.isdecimal() or len(word) not in (3, 5):
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
        said = f"it redirects to {headers.get('Location', 'another place')}; set base_url to the endpoint's address"
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
    report: ErrorReport,
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


def _named(report: ErrorReport) -> str:
    words = [word for word in report.words if not word.isdecimal()]
    return f" ({words[0]})" if words else ""


# -- the scope of a limit ---------------------------------------------------------------------------------------------


def _limited_models(report: ErrorReport, window: str | None, model: str) -> str:
    """A pattern for the models that a limit holds for, if it names one model; empty if it holds for all."""
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
    """The names of all models in an error body."""
    if depth and isinstance(value, Mapping):
        for name, item in value.items():
            if name in ("model", "model_name", "modelName") and isinstance(item, str):
                yield item.removeprefix("models/")
            else:
                yield from _named_models(item, depth - 1)
    elif depth and isinstance(value, list):
        for item in value:
            yield from _named_models(item, depth - 1)


# -- the words by which endpoints say why they refuse -----------------------------------------------------------------

_CODES: dict[str, FailureClass] = {
    "context_length_exceeded": FailureClass.CONTEXT_TOO_LONG,
    "exceed_context_size_error": FailureClass.CONTEXT_TOO_LONG,
    "string_above_max_length": FailureClass.CONTEXT_TOO_LONG,
    "request_too_large": FailureClass.CONTEXT_TOO_LONG,
    "authentication_error": FailureClass.AUTHENTICATION,
    "permission_error": FailureClass.AUTHENTICATION,
    "invalid_api_key": FailureClass.AUTHENTICATION,
    "UNAUTHENTICATED": FailureClass.AUTHENTICATION,
    "PERMISSION_DENIED": FailureClass.AUTHENTICATION,
    "billing_error": FailureClass.BILLING,
    "billing_not_active": FailureClass.BILLING,
    "billing_hard_limit_reached": FailureClass.BILLING,
    "insufficient_quota": FailureClass.BILLING,
    "insufficient_balance": FailureClass.BILLING,
    "insufficient_credits": FailureClass.BILLING,
    "rate_limit_error": FailureClass.RATE_LIMITED,
    "rate_limit_exceeded": FailureClass.RATE_LIMITED,
    "usage_limit_reached": FailureClass.RATE_LIMITED,
    "RESOURCE_EXHAUSTED": FailureClass.RATE_LIMITED,
    "overloaded_error": FailureClass.OVERLOADED,
    "engine_overloaded_error": FailureClass.OVERLOADED,
    "unavailable_error": FailureClass.OVERLOADED,
    "UNAVAILABLE": FailureClass.OVERLOADED,
    "timeout_error": FailureClass.TIMEOUT,
    "DEADLINE_EXCEEDED": FailureClass.TIMEOUT,
    "api_error": FailureClass.PROVIDER_ERROR,
    "server_error": FailureClass.PROVIDER_ERROR,
    "invalid_request_error": FailureClass.INVALID_REQUEST,
    "INVALID_ARGUMENT": FailureClass.INVALID_REQUEST,
    "BadRequestError": FailureClass.INVALID_REQUEST,
    "not_found_error": FailureClass.INVALID_REQUEST,
    "model_not_found": FailureClass.MODEL_NOT_FOUND,
    "model_not_available": FailureClass.MODEL_NOT_FOUND,
    "model_decommissioned": FailureClass.MODEL_NOT_FOUND,
    "invalid_model": FailureClass.MODEL_NOT_FOUND,
    "DeploymentNotFound": FailureClass.MODEL_NOT_FOUND,
    "content_filter": FailureClass.REFUSED,
    "content_policy_violation": FailureClass.REFUSED,
    "moderation_blocked": FailureClass.REFUSED,
    "data_inspection_failed": FailureClass.REFUSED,
    # FastChat's codes whose first three digits say something else.
    "40301": FailureClass.MODEL_NOT_FOUND,
    "40302": FailureClass.INVALID_REQUEST,
    "40303": FailureClass.CONTEXT_TOO_LONG,
    # MiniMax.
    "base_resp 1001": FailureClass.TIMEOUT,
    "base_resp 1002": FailureClass.RATE_LIMITED,
    "base_resp 1004": FailureClass.AUTHENTICATION,
    "base_resp 1008": FailureClass.BILLING,
    "base_resp 1026": FailureClass.REFUSED,
    "base_resp 1027": FailureClass.REFUSED,
    "base_resp 1039": FailureClass.CONTEXT_TOO_LONG,
    "base_resp 1041": FailureClass.RATE_LIMITED,
    "base_resp 2013": FailureClass.INVALID_REQUEST,
    "base_resp 2049": FailureClass.AUTHENTICATION,
    "base_resp 2056": FailureClass.RATE_LIMITED,
}

_STATUSES: dict[int | None, FailureClass] = {
    401: FailureClass.AUTHENTICATION,
    402: FailureClass.BILLING,
    403: FailureClass.AUTHENTICATION,
    408: FailureClass.TIMEOUT,
    409: FailureClass.PROVIDER_ERROR,
    413: FailureClass.CONTEXT_TOO_LONG,
    420: FailureClass.RATE_LIMITED,
    421: FailureClass.PROVIDER_ERROR,
    423: FailureClass.PROVIDER_ERROR,
    424: FailureClass.PROVIDER_ERROR,
    425: FailureClass.PROVIDER_ERROR,
    429: FailureClass.RATE_LIMITED,
    449: FailureClass.PROVIDER_ERROR,
    499: FailureClass.PROVIDER_ERROR,
    503: FailureClass.OVERLOADED,
    504: FailureClass.TIMEOUT,
    529: FailureClass.OVERLOADED,
}
"""Statuses that have a meaning of their own. 499 is a gateway whose own client left, and as passing as 409 and 425."""

_MODEL = r"\bmodels?(?:\b|[:/])"
_GONE = (
    r"(?:not found|does not exist|doesn't exist|not exist|was not found|no such|not (?:a )?valid|invalid|unknown|"
    r"decommissioned|no longer (?:available|supported)|has been (?:removed|retired|deprecated)|not available|"
    r"not deployed|do(?:es)? not have access|retired)"
)
_SENTENCES: dict[FailureClass, re.Pattern[str]] = {
    FailureClass.CONTEXT_TOO_LONG: re.compile(
        r"request too large for|"
        r"context.{0,12}(length|window|size|limit)|prompt is too long|maximum prompt length|"
        r"input (is )?too long|input token count.{0,40}exceeds|must have less than \d+ tokens|"
        r"too large for model with \d+|tokens \+ `?max_new_tokens|reduce the length of the messages",
        re.IGNORECASE | re.DOTALL,
    ),
    FailureClass.AUTHENTICATION: re.compile(r"api key not valid|incorrect api key|invalid api key", re.IGNORECASE),
    FailureClass.BILLING: re.compile(
        r"credit balance is too low|insufficient (credits?|balance|funds)|(requires|add|purchase) more credits|"
        r"never purchased credits|out of credits|used all (available|of your) credits|"
        r"account .{0,80}suspended.{0,40}billing|"
        r"billing (hard )?limit|monthly spending limit|payment required",
        re.IGNORECASE | re.DOTALL,
    ),
    FailureClass.MODEL_NOT_FOUND: re.compile(
        rf"\A(?:{_MODEL}:?\s*\S+|(?:the |requested |publisher )*{_MODEL}[^.;]{{0,120}}?\b{_GONE}\b.*|"
        rf"(?:no such|unknown|invalid|unsupported) {_MODEL}.*|model not exist.*|"
        r"\S+ is not a valid model( id)?.*|"
        r"(?:project|your team|you)\b.{0,80}do(?:es)? not have access to (?:the )?model.*)\Z",
        re.IGNORECASE | re.DOTALL,
    ),
    FailureClass.REFUSED: re.compile(
        r"content management policy|content filtering policy|responsibleaipolicy|usage polic(y|ies)|usage guidelines|"
        r"flagged (as|by|for)|content exists risk|content policy",
        re.IGNORECASE,
    ),
}
"""Sentences for failures that have no code."""
