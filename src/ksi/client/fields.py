"""The fields of a completion request as keywords, and which events may be sent twice."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class RetryFields(TypedDict, total=False):
    """A request's own retry policy. Fields that are not given take the configured values. Times are in seconds."""

    max_attempts: int
    initial_delay: float
    max_delay: float


class CompletionFields(TypedDict, total=False):
    """The fields besides the prompt; see the event reference. Times in seconds, `not_before` in Unix time."""

    messages: list[dict[str, Any]]
    model: str
    session_id: str
    conversation_id: str
    request_id: str
    agent_id: str
    system: str | list[dict[str, Any]]
    max_tokens: int
    temperature: float
    stop: str | list[str]
    tools: list[dict[str, Any]]
    tool_choice: Literal["auto", "any", "none"] | dict[str, Any]
    parallel_tool_calls: bool
    response_format: dict[str, Any]
    reasoning: dict[str, Any]
    top_p: float
    top_k: int
    seed: int
    service_tier: str
    drop_unsupported: bool
    native: dict[str, Any]
    priority: Literal["critical", "high", "normal", "low", "background"]
    on_busy: Literal["enqueue", "reject", "interrupt"]
    fork: bool
    hold_on_retry: bool
    hold: bool
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
    traceparent: str


IDENTIFIED = frozenset({"completion:request", "completion:async"})
"""Events that get a `request_id` if the caller gave none: as an idempotency key, it lets them be sent twice."""

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
    "queue:trend",
    "completion:session_status",
    "completion:retry_status",
    "completion:token_usage",
    "completion:provider_status",
    "completion:approvals",
    "completion:release",
    "completion:approve",
    "completion:reject",
    "provider:disable",
    "provider:enable",
    "provider:reset",
    "queue:pause",
    "queue:resume",
    "queue:pauses",
    "budget:status",
    "budget:set",
    "queue:drain",
    "queue:undrain",
    "conversation:acquire_lock",
    "conversation:renew_lock",
    "conversation:lock_status",
    "conversation:search",
    "injection:status",
    "circuit_breaker:status",
    "token:list",
    "monitor:subscribe",
    "monitor:unsubscribe",
}
"""Idempotent events: sent again if the connection is lost before their answer."""

ONCE = frozenset(
    {
        "budget:drop",
        "budget:raise",
        "checkpoint:collect",
        "checkpoint:restore",
        "system:shutdown",
        "completion:failed",
        "completion:requeue",
        "conversation:release_lock",
        "conversation:rename",
        "conversation:delete",
        "injection:retry",
        "circuit_breaker:reset",
        "token:create",
        "token:revoke",
        "token:renew",
    }
)
"""Events whose second coming does or says something else. Unanswered at a loss, they fail with `connection_failed`."""
