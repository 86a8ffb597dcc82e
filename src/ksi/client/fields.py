"""The fields of a completion request as keywords, and which events may be sent twice."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class RetryFields(TypedDict, total=False):
    """How a request is tried again (promise F2); what is not given is as configured. Times in seconds."""

    max_attempts: int
    initial_delay: float
    max_delay: float


class CompletionFields(TypedDict, total=False):
    """What can be said beside the prompt; see the event reference. Times in seconds, `not_before` in Unix time."""

    messages: list[dict[str, Any]]
    model: str
    session_id: str
    conversation_id: str
    request_id: str
    agent_id: str
    system: str
    max_tokens: int
    temperature: float
    stop: str | list[str]
    priority: Literal["critical", "high", "normal", "low", "background"]
    on_busy: Literal["enqueue", "reject", "interrupt"]
    fork: bool
    hold_on_retry: bool
    not_before: float
    delay: float
    ttl: float
    timeout: float
    retry: RetryFields
    stream: bool
    mcp_config: str | dict[str, Any]
    injection_config: dict[str, Any]
    circuit_breaker_config: dict[str, Any]
    patterns: dict[str, Any]
    metadata: dict[str, Any]
    provider_options: dict[str, Any]


IDENTIFIED = frozenset({"completion:request", "completion:async"})
"""Events that get a `request_id` where the caller gave none: with it they can be sent twice (promise Q4)."""

REPEATABLE = IDENTIFIED | {
    "system:startup",
    "system:context",
    "system:ready",
    "system:health",
    "system:config",
    "system:discover",
    "completion:get",
    "completion:find",
    "completion:history",
    "completion:wait",
    "completion:cancel",
    "completion:status",
    "completion:queue_status",
    "completion:session_status",
    "completion:retry_status",
    "completion:token_usage",
    "completion:provider_status",
    "provider:disable",
    "provider:enable",
    "provider:reset",
    "conversation:acquire_lock",
    "conversation:renew_lock",
    "conversation:lock_status",
    "injection:status",
    "circuit_breaker:status",
    "monitor:subscribe",
    "monitor:unsubscribe",
}
"""Events that mean the same when they come twice: sent again where the connection is lost before their answer."""

ONCE = frozenset(
    {
        "checkpoint:collect",
        "checkpoint:restore",
        "system:shutdown",
        "completion:failed",
        "completion:requeue",
        "conversation:release_lock",
        "injection:retry",
        "circuit_breaker:reset",
    }
)
"""Events whose second coming does or says something else. Unanswered at a loss, they fail with `connection_failed`."""
