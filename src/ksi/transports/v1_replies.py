"""Replies and pushes as version 1's clients read them: today's data, with the former keys and words added.

Every function is pure. A key that means something else today is replaced; today's value stays under another name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ksi.clock import iso_time
from ksi.errors import KsiError, NotFound

Json = dict[str, Any]

CLAUDE = "claude-cli"
OTHERS = "litellm"
"""Version 1's word for every provider but Claude Code; its clients look for an answer's text by this word."""

_LISTED = 5
"""Waiters that version 1 named of one lock."""


def iso(at: float | None) -> str | None:
    """Unix seconds as version 1 wrote times; None stays None."""
    return None if at is None else iso_time(at)


# -- answers ----------------------------------------------------------------------------------------------------------


def answered(data: Json, at: float) -> Json:
    """The reply to `completion:request`: a request with the provider's response, as in its session's file."""
    if "status" not in data or "session_id" not in data:
        return data
    made: Json = {**data, "ksi": _ksi(data, at), "response": response(data)}
    error = data.get("error")
    if error is not None:
        made |= {"status": "error", "state": data["status"], "error": error["message"], "error_details": error}
    if isinstance(data.get("reason"), dict):
        made |= {"reason": "circuit_breaker", "reason_details": data["reason"]}
    return made


def result(data: Json, at: float) -> Json:
    """`completion:result`: `result` holds the data that are the whole reply of `completion:request`."""
    made = answered(data, at)
    return {**made, "result": {"ksi": made["ksi"], "response": made["response"]}}


def _ksi(data: Json, at: float) -> Json:
    provider = data.get("provider") or ""
    client = (data.get("metadata") or {}).get("client_id") or data.get("agent_id")
    return {
        "provider": CLAUDE if provider.startswith(CLAUDE) else OTHERS,
        "request_id": data["request_id"],
        "timestamp": iso(data.get("finished_at") or at),
        "duration_ms": round(data.get("duration_ms") or 0),
        **({} if client is None else {"client_id": client}),
    }


def response(data: Json) -> Json:
    """The provider's reply, in the form of Claude Code's result."""
    session = data.get("provider_session_id") or data["session_id"]
    if "result" not in data:
        error = data.get("error") or {"message": data["status"], "code": data["status"]}
        return {
            "type": "result",
            "subtype": "error",
            "is_error": True,
            "error": error["message"],
            "error_type": error["code"],
            "session_id": session,
        }
    return {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "result": data["result"],
        "session_id": session,
        "model": data.get("model"),
        "stop_reason": data.get("stop_reason"),
        "duration_ms": round(data.get("duration_ms") or 0),
        "total_cost_usd": data.get("cost_usd"),
        "usage": _usage(data.get("usage")),
    }


def _usage(usage: Json | None) -> Json | None:
    """Tokens by the names of both vendors."""
    if usage is None:
        return None
    counts = {name: count for name, count in usage.items() if isinstance(count, int)}
    return {
        "input_tokens": counts.get("input_tokens", 0),
        "output_tokens": counts.get("output_tokens", 0),
        "cache_read_input_tokens": counts.get("cache_read_tokens", 0),
        "cache_creation_input_tokens": counts.get("cache_write_tokens", 0),
        "prompt_tokens": counts.get("input_tokens", 0),
        "completion_tokens": counts.get("output_tokens", 0),
        "total_tokens": counts.get("total_tokens", 0),
    }


def submitted(data: Json, at: float) -> Json:
    """The reply to `completion:async`."""
    if data["status"] not in ("ready", "queued", "blocked"):
        return answered(data, at)  # its id was known: the answer is the request as it stands
    blocked = data["status"] == "blocked"
    position = data.get("position", 0)
    made = {
        **data,
        "position": position,
        "fork_warning": None,
        "queued": not blocked,
        "queue_depth": position if blocked else position + 1,
        "session_active": data.get("conversation_locked", False),
        "message": "Blocked by a circuit breaker" if blocked else "Completion request queued for processing",
    }
    return made | {"reason": "circuit_breaker", "reason_details": data.get("reason")} if blocked else made


def cancelled(data: Json, _: float) -> Json:
    """The reply to `completion:cancel`."""
    if data["status"] != "already_final":
        return data
    return {**data, "error": f"Request {data.get('request_id')} already {data.get('state')}"}


# -- locks ------------------------------------------------------------------------------------------------------------


def acquired(data: Json, _: float) -> Json:
    """The reply to `conversation:acquire_lock`."""
    return {**data, "fork_warning": None}


def released(data: Json, _: float) -> Json:
    """The reply to `conversation:release_lock`."""
    return {"next_request": None, **data}


def lock(data: Json, at: float) -> Json:
    """The reply to `conversation:lock_status`: one conversation's lock, or all."""
    if "conversation_id" not in data:
        return locks(data, at)
    name, forks = data["conversation_id"], data["forks"]
    parents = [fork["parent"] for fork in forks if fork["child"] == name]
    return {
        **data,
        "state": "locked" if data["locked"] else "unlocked",
        "holder_state": data["state"],
        "holder": data.get("holder"),
        "acquired_at": data.get("since"),
        "queue_length": data.get("waiting", 0),
        "queue": [entry["request_id"] for entry in data["queue"]][:_LISTED],
        "queue_entries": data["queue"],
        "fork_warning": bool(parents),
        "parent_conversation": parents[0] if parents else None,
        "child_conversations": [fork["child"] for fork in forks if fork["parent"] == name],
        "metadata": data.get("metadata", {}),
    }


def locks(data: Json, at: float) -> Json:
    """All locks by their conversations."""
    children = {fork["child"] for fork in data["forks"]}
    return {
        **data,
        "total_locks": data["locked_conversations"],
        "total_forks": len({fork["parent"] for fork in data["forks"]}),
        "locks": {
            held["conversation_id"]: {
                "state": "locked",
                "holder": held.get("holder"),
                "age_seconds": int(at - held["since"]) if "since" in held else 0,
                "queue_length": held.get("waiting", 0),
                "is_fork": held["conversation_id"] in children,
            }
            for held in data["locks"]
        },
        "lock_list": data["locks"],
    }


def active_conversations(all_locks: Json) -> Json:
    """The reply to `conversation:active`."""
    held = all_locks["locks"]
    return {"active_count": len(held), "active_conversations": held}


# -- figures ----------------------------------------------------------------------------------------------------------


def forked(all_locks: Json) -> int:
    """How many conversations were forked, as far as they are listed."""
    return len({fork["parent"] for fork in all_locks.get("forks", ())})


def status(data: Json, queue: Json, all_locks: Json, others: Json) -> Json:
    """The reply to `completion:status`; `others` has the parts that have replies of their own."""
    requests = [row["request_id"] for row in data["running"]]
    waiting = sum(data.get(state, 0) for state in ("queued", "scheduled", "retrying", "parked"))
    return {
        **data,
        "active_count": data["active"],
        "active_requests": requests,
        "active_completions": data["active"] + waiting,
        "status_counts": {
            "queued": waiting,
            "processing": data["active"],
            **{state: data.get(state, 0) for state in ("completed", "failed", "cancelled")},
        },
        "service_ready": data["status"] == "ok",
        "queue_status": queue,
        "queues": _queues(data, queue, all_locks, waiting),
        "sessions": {
            "total_sessions": queue.get("conversations", 0),
            "locked_sessions": queue.get("locked_conversations", 0),
            "active_sessions": data["active"],
            "recovery_data_size": data["active"] + waiting,
            "agents_with_sessions": others.get("token_usage", {}).get("active_agents", 0),
        },
        **others,
    }


def _queues(data: Json, queue: Json, all_locks: Json, waiting: int) -> Json:
    held = all_locks.get("locks", ())
    return {
        "total_sessions": len(held),
        "active_sessions": data["active"],
        "total_queued": waiting,
        "sessions": {one["conversation_id"]: {"queue_size": one.get("waiting", 0), "is_active": True} for one in held},
    }


def queue_status(data: Json, all_locks: Json) -> Json:
    """The reply to `completion:queue_status`."""
    return {**data, "forked_conversations": forked(all_locks)}


def session(name: str, data: Json | None, held: Json) -> Json:
    """The reply to `completion:session_status` of one session; `data` is None if it is unused."""
    holder, queue = held.get("holder"), held.get("queue", [])
    running = holder is not None and held.get("holder_kind") == "request"
    completions = [
        {"request_id": entry["request_id"], "status": "queued", "queued_at": iso(entry.get("enqueued_at"))}
        for entry in queue
        if entry["kind"] == "request"
    ]
    if running:
        started = iso(held.get("since"))
        completions.insert(0, {"request_id": holder, "status": "processing", "started_at": started})
    made: Json = {**(data or {}), "session_id": name, "completions": completions}
    if data is None:
        missing = {"exists": False, "session_id": name}
        return {**made, "queue": missing, "session": missing}
    return {
        **made,
        "queue": {
            "exists": True,
            "session_id": name,
            "queue_size": held.get("waiting", 0),
            "is_active": running,
            "is_empty": not queue,
        },
        "session": {
            "exists": True,
            "session_id": name,
            "created_at": iso(data["created_at"]),
            "last_activity": iso(data["active_at"]),
            "request_count": data["turns"],
            "active_request": holder if running else None,
            "conversation_locked": held.get("locked", False),
            "lock_holder": holder,
            "lock_expiry": iso(held.get("expires_at")),
            "metadata": held.get("metadata", {}),
        },
    }


def providers(data: Json) -> Json:
    """The reply to `completion:provider_status` about all."""
    each = {name: _provider(name, report) for name, report in data["providers"].items()}
    return {
        "total_providers": len(each),
        "available_providers": sum(not one["circuit_breaker"]["is_open"] for one in each.values()),
        "providers": each,
    }


def _provider(name: str, report: Json) -> Json:
    calls, failures = report.get("calls", 0), report.get("failures", 0)
    latency = (report.get("latency_ms") or {}).get("p50", 0)
    return {
        **report,
        "provider": name,
        "config": {
            "type": report["kind"],
            "models": report["models"],
            "priority": report["priority"],
            "supports_streaming": True,
            "supports_mcp": report["kind"] == CLAUDE,
        },
        "circuit_breaker": {
            "is_open": report["breaker"] == "open" or not report["enabled"],
            "recent_failures": failures,
            "open_until": iso(report.get("open_until")),
            "last_success": None,
        },
        "stats": {
            "total_calls": calls,
            "successful_calls": calls - failures,
            "failed_calls": failures,
            "total_latency_ms": round(latency * (calls - failures)),
            "last_call": None,
            "last_error": report.get("last_error"),
            "success_rate": report.get("success_rate") or 0,
            "avg_latency_ms": latency,
        },
    }


def retries(data: Json, at: float) -> Json:
    """The reply to `completion:retry_status`."""
    return {
        **data,
        "retry_manager": "active",
        "stats": retry_stats(data),
        "retrying_requests": [
            {
                "request_id": row["request_id"],
                "retry_attempt": row.get("attempt", 0),
                "max_retries": data["max_attempts"],
                "last_error": row.get("error"),
                "next_retry_in": max(0.0, row["due_at"] - at) if "due_at" in row else None,
                "created_at": iso(row.get("enqueued_at")),
            }
            for row in data["waiting"]
        ],
    }


def retry_stats(data: Json) -> Json:
    """The retry manager's figures."""
    return {
        "total_retrying": data["retrying"] + data["parked"],
        "pending_timers": data["retrying"] + data["parked"],
        "policy": {
            "max_attempts": data["max_attempts"],
            "initial_delay": data["initial_delay"],
            "max_delay": data["max_delay"],
            "backoff_multiplier": 2.0,
        },
    }


def usage(data: Json, agent: str | None, model: str | None, hours: float | None) -> Json:
    """The reply to `completion:token_usage` for one agent, one model, or all."""
    if agent is None and model is None:
        return {**data, **usage_summary(data)}
    asked = {"model": model} if agent is None else {"agent_id": agent, "time_window_hours": hours}
    return {**data, **asked, "usage": _figures(data["totals"])}


def _figures(totals: Json) -> Json:
    requests = totals["requests"]
    return {
        "input_tokens": totals["input_tokens"],
        "output_tokens": totals["output_tokens"],
        "cache_tokens": totals["cache_read_tokens"],
        "total_tokens": totals["total_tokens"],
        "request_count": requests,
        "estimated_cost": totals["cost_usd"],
        "avg_tokens_per_request": totals["total_tokens"] / requests if requests else 0,
    }


def usage_summary(data: Json) -> Json:
    """The sums over all agents, and the part with MCP."""
    totals, mcp = data["totals"], data["mcp"]["totals"]
    added = [each["tokens"] for each in data["mcp"]["definitions"] if isinstance(each["tokens"], int)]
    return {
        "total_input_tokens": totals["input_tokens"],
        "total_output_tokens": totals["output_tokens"],
        "total_cache_tokens": totals["cache_read_tokens"],
        "total_tokens": totals["total_tokens"],
        "total_requests": totals["requests"],
        "active_agents": _named(data, "by_agent", "agent_id"),
        "active_models": _named(data, "by_model", "model"),
        "active_sessions": _named(data, "by_session", "session_id"),
        "mcp_statistics": {
            "total_requests": totals["requests"],
            "mcp_enabled_requests": mcp["requests"],
            "mcp_percentage": mcp["requests"] / totals["requests"] * 100 if totals["requests"] else 0,
            "total_overhead_tokens": sum(added),
            "avg_overhead_per_request": sum(added) / mcp["requests"] if mcp["requests"] else 0,
            "cache_tokens_saved": mcp["cache_read_tokens"],
        },
    }


def _named(data: Json, group: str, key: str) -> int:
    return sum(row.get(key) is not None for row in data.get(group, ()))


# -- the daemon -------------------------------------------------------------------------------------------------------


def health(data: Json, _: float) -> Json:
    """The reply to `system:health`. Version 1 was healthy as long as it answered."""
    stopping = "stopping" in data.get("problems", ())
    return {
        **data,
        "status": "stopping" if stopping else "healthy",
        "health": data["status"],
        "uptime": data["uptime_seconds"],
    }


def stopping(data: Json, _: float) -> Json:
    """The reply to `system:shutdown`."""
    return {"status": "shutting_down", **data}


def discovered(data: Json, namespace: str | None, parameters: Callable[[str], Json]) -> Json:
    """The reply to `system:discover`: events by the word before their colon."""
    events: dict[str, list[Json]] = {}
    for event in data["events"]:
        family = event["name"].partition(":")[0]
        if namespace in (None, family):
            events.setdefault(family, []).append(described(event, parameters(event["name"])))
    return {"namespaces": list(events), "events": events, "total_events": sum(map(len, events.values()))}


def described(event: Json, parameters: Json) -> Json:
    """One event, as version 1 described it."""
    return {
        "event": event["name"],
        "namespace": event["name"].partition(":")[0],
        "summary": event["doc"],
        "description": event["doc"],
        "parameters": parameters,
        "examples": [],
    }


# -- pushes -----------------------------------------------------------------------------------------------------------


def _progress(data: Json, _: float) -> Json:
    if data["status"] != "running":
        return data
    return {**data, "status": "processing", "message": "Processing completion"}


def _queued(data: Json, _: float) -> Json:
    return {**data, "position": data.get("position", 0) + 1, "holder": data.get("holder")}


def _unlocked(data: Json, _: float) -> Json:
    return {**data, "released_by": data["request_id"]}


def _transferred(data: Json, _: float) -> Json:
    return {**data, "previous_holder": data["request_id"], "new_holder": data["next_request"], "queue_length": None}


def _expired(data: Json, _: float) -> Json:
    return {**data, "expired_holder": data["request_id"], "queue_length": None}


def _forked(data: Json, _: float) -> Json:
    return {
        **data,
        "parent_conversation": data["parent"],
        "child_conversation": data["child"],
        "fork_detected": True,
        "total_forks": None,
    }


REPLIES: Mapping[str, Callable[[Json, float], Json]] = {
    "completion:request": answered,
    "completion:get": answered,
    "completion:wait": answered,
    "completion:async": submitted,
    "completion:requeue": submitted,
    "completion:cancel": cancelled,
    "conversation:acquire_lock": acquired,
    "conversation:release_lock": released,
    "conversation:lock_status": lock,
    "system:health": health,
    "system:shutdown": stopping,
}
"""The additions to a reply, by event, from its data and the time. Replies that take several reports are made by
`V1Form`."""

PUSHES: Mapping[str, Callable[[Json, float], Json]] = {
    "completion:result": result,
    "completion:progress": _progress,
    "conversation:queued": _queued,
    "conversation:unlocked": _unlocked,
    "conversation:lock_transferred": _transferred,
    "conversation:lock_expired": _expired,
    "conversation:forked": _forked,
}
"""Likewise for pushes."""


def refusal(event: str | None, error: KsiError) -> Json:
    """Version 1's answer in place of today's error."""
    data: Json = {
        "error": error.message,
        "status": "error",
        "code": error.code,
        "retryable": error.retryable,
        "details": dict(error.details),
    }
    if isinstance(error, NotFound) and event in ("completion:cancel", "completion:failed"):
        data["status"] = "not_found"
    elif event == "conversation:release_lock":
        data["released"] = False
    elif event == "conversation:acquire_lock":
        data["acquired"] = False
    return data
