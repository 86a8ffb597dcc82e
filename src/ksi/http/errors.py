"""Errors in the form of each API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import msgspec
from aiohttp import web

from ksi.errors import KsiError
from ksi.events.completions import RequestReply

SHORT_WAIT = 60.0
"""Seconds up to which the common clients wait by themselves before they ask again."""

_STATUS: dict[str, int] = {
    "invalid_data": 400,
    "invalid_json": 400,
    "invalid_envelope": 400,
    "invalid_request": 400,
    "unsupported": 400,
    "context_too_long": 400,
    "refused": 400,
    "empty_answer": 502,
    "payload_too_large": 413,
    "unknown_model": 404,
    "model_not_found": 404,
    "not_found": 404,
    "unknown_event": 404,
    "unknown_parent": 404,
    "billing": 402,
    "blocked": 403,
    "forbidden": 403,
    "invalid_direction": 400,
    "ambiguous_id": 400,
    "checkpoint_invalid": 400,
    "not_lock_holder": 409,
    "has_forks": 409,
    "name_taken": 409,
    "store_not_empty": 409,
    "expired": 408,
    "wait_timeout": 408,
    "request_id_conflict": 422,
    "conversation_busy": 423,
    "rate_limited": 429,
    "queue_full": 429,
    "budget_exceeded": 429,
    "limit_reached": 400,
    "cancelled": 400,
    "timeout": 504,
    "network_error": 502,
    "provider_error": 502,
    "authentication": 503,
    "overloaded": 529,
    "shutting_down": 503,
    "draining": 503,
    "store_unavailable": 503,
    "store_full": 503,
    "disk_full": 503,
    "daemon_restart": 503,
}
_SOON = frozenset({"shutting_down", "draining", "store_unavailable", "queue_full"})
"""Refusals before anything was done that end by themselves: clients may ask again."""


def status_of(code: str) -> int:
    """The HTTP status of one of KSI's codes."""
    return _STATUS.get(code, 500)


class Refusal(Exception):
    """An error answer: its HTTP status, KSI's code, and the message for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry: bool = False,
        retry_after: float | None = None,
        request_id: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after
        self.request_id = request_id
        self.details = details or {}

    @classmethod
    def of(cls, error: KsiError, request_id: str | None = None) -> Refusal:
        """An error as a refusal."""
        retry = error.code in _SOON
        return cls(
            _STATUS.get(error.code, 500),
            error.code,
            error.message,
            retry=retry,
            retry_after=2.0 if retry else error.facts.get("retry_after"),
            request_id=request_id,
            details=error.details,
        )

    @classmethod
    def of_reply(cls, reply: RequestReply) -> Refusal:
        """A request that ended without an answer. KSI has made all useful retries, so the client need not retry."""
        code = reply.error.code if reply.error is not None else reply.status
        message = reply.error.message if reply.error is not None else f"the request was {reply.status}"
        if reply.reason is not None:
            code, message = "blocked", reply.reason.message
        return cls(_STATUS.get(code, 500), code, message, request_id=reply.request_id)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that tell a client how to continue."""
        found = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, round(self.retry_after)))
        if self.request_id is not None:
            found["request-id"] = found["x-request-id"] = self.request_id
        return found


class Shape(Protocol):
    """How a door writes refusals."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """The refusal's JSON."""
        ...

    def refusal(self, refusal: Refusal) -> web.Response:
        """The whole answer."""
        ...


class _Json(ABC):
    @abstractmethod
    def body(self, refusal: Refusal) -> dict[str, Any]:
        """See `Shape`."""

    def refusal(self, refusal: Refusal) -> web.Response:
        """See `Shape`."""
        return web.Response(
            status=refusal.status,
            body=msgspec.json.encode(self.body(refusal)),
            content_type="application/json",
            headers=refusal.headers,
        )


class AnthropicShape(_Json):
    """Errors as Anthropic's API has them."""

    _TYPES: ClassVar[dict[int, str]] = {
        400: "invalid_request_error",
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        422: "invalid_request_error",
        423: "invalid_request_error",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """See `Shape`."""
        error: dict[str, Any] = {
            "type": self._TYPES.get(refusal.status, "api_error"),
            "message": refusal.message,
            "code": refusal.code,
        }
        if "thread" in (refusal.details.get("fields") or ()):
            # With this message the SDKs continue without a conversation that the server holds.
            error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        return {"type": "error", "error": error, "request_id": refusal.request_id}


class OpenAIShape(_Json):
    """Errors as OpenAI's API has them."""

    _TYPES: ClassVar[dict[int, str]] = {
        401: "authentication_error",
        402: "insufficient_quota",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """See `Shape`."""
        usual = "invalid_request_error" if refusal.status < 500 else "server_error"
        kind = self._TYPES.get(refusal.status, usual)
        return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}}

    def refusal(self, refusal: Refusal) -> web.Response:
        """See `Shape`. These clients know no 529."""
        answer = super().refusal(refusal)
        if refusal.status == 529:
            answer.set_status(503)
        return answer


class NativeShape(_Json):
    """Errors as KSI's own events have them."""

    def body(self, refusal: Refusal) -> dict[str, Any]:
        """See `Shape`."""
        error: dict[str, Any] = {"code": refusal.code, "message": refusal.message, "retryable": refusal.retry}
        error["details"] = dict(refusal.details)
        return {"event": None, "error": error}


ANTHROPIC, OPENAI, NATIVE = AnthropicShape(), OpenAIShape(), NativeShape()

_OPENAI_PATHS = ("/v1/chat/", "/v1/responses", "/v1/conversations", "/v1/embeddings", "/v1/completions")


def shape_of(request: web.Request) -> Shape:
    """The shape that a client of this path reads."""
    path = request.path
    if path.startswith(_OPENAI_PATHS):
        return OPENAI
    if path.startswith(("/v1/messages", "/api/")) or "anthropic-version" in request.headers:
        return ANTHROPIC
    return OPENAI if path.startswith("/v1/models") else NATIVE
