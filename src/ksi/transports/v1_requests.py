"""Requests of version 1's clients in today's form: other names for fields, models and reasons."""

from __future__ import annotations

from typing import Any

import msgspec

from ksi.errors import FailureClass
from ksi.protocol import Envelope
from ksi.request import PRIORITY_WORDS

Json = dict[str, Any]

_REASONS = {
    "api_rate_limit": FailureClass.RATE_LIMITED,
    "rate_limit": FailureClass.RATE_LIMITED,
    "temporary_failure": FailureClass.PROVIDER_ERROR,
}
"""Version 1's names of failures, if they differ from today's."""

_MESSAGES = (
    (("rate limit",), FailureClass.RATE_LIMITED),
    (("network", "connection"), FailureClass.NETWORK_ERROR),
)
"""Version 1 expressed these failures by words in their message."""

_COMPLETIONS = frozenset({"completion:request", "completion:async"})


def translate(envelope: Envelope) -> tuple[Envelope, list[str]]:
    """A request of version 1 in today's form, and warnings about fields without effect."""
    data = dict(envelope.data)
    warnings: list[str] = []
    if envelope.event in _COMPLETIONS:
        data, warnings = _completion(data)
    elif envelope.event == "completion:failed":
        data["reason"] = failure_class(str(data.get("reason", "")), str(data.get("message", "")))
    elif envelope.event in ("monitor:subscribe", "monitor:unsubscribe") and "event_patterns" in data:
        data["patterns"] = data.pop("event_patterns")
    elif envelope.event == "completion:token_usage" and data.get("hours") is None:
        data.pop("hours", None)
    return msgspec.structs.replace(envelope, data=data), warnings


def failure_class(reason: str, message: str) -> str:
    """The failure class that a reason of version 1 means; every reason that it does not know was temporary."""
    if reason in list(FailureClass):
        return reason
    if reason in _REASONS:
        return _REASONS[reason].value
    words = message.lower()
    found = next((meant for some, meant in _MESSAGES if any(word in words for word in some)), None)
    return (found or FailureClass.PROVIDER_ERROR).value


def _completion(data: Json) -> tuple[Json, list[str]]:
    warnings: list[str] = []
    model = data.get("model")
    if isinstance(model, str) and model.startswith("claude_cli/"):
        data["model"] = model.replace("claude_cli/", "claude-cli/", 1)
    if isinstance(data.get("priority"), str) and data["priority"].lower() not in PRIORITY_WORDS:
        warnings.append(f"priority {data['priority'][:60]!r} is unknown: the request is normal")
        data["priority"] = "normal"
    # Version 1 sent the messages if there were any, otherwise the prompt.
    if "messages" in data and "prompt" in data:
        data.pop("prompt" if data["messages"] else "messages")
    _client(data)
    warnings += _extra_body(data)
    lock = data.pop("conversation_lock", None)
    if isinstance(lock, dict) and "timeout" in lock:
        warnings.append("conversation_lock.timeout has no effect: the request keeps its conversation until it ends")
    return data, warnings


def _client(data: Json) -> None:
    """The client's name becomes the agent's; if the request names an agent too, it becomes metadata."""
    client = data.pop("client_id", None)
    if not isinstance(client, str) or not client:
        return
    if data.get("agent_id") is None:
        data["agent_id"] = client
    elif isinstance(data.get("metadata"), dict | None):
        data["metadata"] = {"client_id": client, **(data.get("metadata") or {})}


def _extra_body(data: Json) -> list[str]:
    """Take the fields that exist today from `extra_body.ksi`; version 1's provider read the rest."""
    extra = data.pop("extra_body", None)
    if not isinstance(extra, dict):
        return []
    own = extra.get("ksi")
    own = dict(own) if isinstance(own, dict) else {}
    for old, new in (("mcp_config_path", "mcp_config"), ("session_id", "session_id")):
        value = own.pop(old, None)
        if value is not None and data.get(new) is None:
            data[new] = value
    left = [f"extra_body.{name}" for name in extra if name != "ksi"] + [f"extra_body.ksi.{name}" for name in own]
    return [f"{name} has no effect" for name in left]
