"""The words by which endpoints tell why they refuse: codes, statuses, and sentences where there is no code."""

from __future__ import annotations

import re

from ksi.errors import FailureClass

CODES: dict[str, FailureClass] = {
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

STATUSES: dict[int | None, FailureClass] = {
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
SENTENCES: dict[FailureClass, re.Pattern[str]] = {
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
"""Sentences that tell what no code does."""
