"""The examples of the two documents, sent unchanged, each with its expected answer.

Every check begins and ends with a daemon that others may use too: names are the documents' own, or new in each run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from tests.acceptance.talk import Json, Talk, once

Check = Callable[[Talk], None]

MODEL = "claude-cli/haiku"
"""The guide's model."""
FINAL = {"completed", "failed", "cancelled", "blocked", "expired"}


def fresh(name: str) -> str:
    """A name that no run had before."""
    return f"{name}-{uuid4().hex[:12]}"


def document(talk: Talk, **payload: Any) -> Json:
    """A payload of the guide; if no provider serves its model here, the daemon's own is asked."""
    patterns = [m for p in talk.ask("completion:provider_status")["providers"].values() for m in p["models"]]
    if "model" in payload and not {payload["model"], "claude-cli/*", "*"} & set(patterns):
        del payload["model"]
    return payload


def short(prompt: str) -> Json:
    """A prompt whose answer need not be long."""
    return {"prompt": prompt, "max_tokens": 8}


def final(talk: Talk, request_id: str) -> Json:
    """A request at its end."""
    return talk.ask("completion:wait", request_id=request_id, timeout=300)


@contextmanager
def held(talk: Talk, conversation: str) -> Iterator[str]:
    """An outside lock on a conversation; its holder's id."""
    holder = fresh("holder")
    assert talk.ask("conversation:acquire_lock", request_id=holder, conversation_id=conversation)["acquired"] is True
    try:
        yield holder
    finally:
        talk.ask("conversation:release_lock", request_id=holder)


# -- the guide: existing APIs -----------------------------------------------------------------------------------------


def completion_request(talk: Talk) -> None:
    """`completion:request`, "no changes - works exactly as before"."""
    payload = document(talk, prompt="Hello", model=MODEL, session_id="test_001")
    reply = talk.ask("completion:request", **payload)
    assert reply["status"] == "completed", reply
    assert reply["session_id"] == "test_001"
    assert isinstance(reply["result"], str) and reply["result"]
    assert reply["request_id"] and reply["provider"] and reply["usage"]


def completion_async(talk: Talk) -> None:
    """`completion:async`, with priority, injection and circuit breaker."""
    talk.ask("monitor:subscribe", patterns=["injection:*"])
    reply = talk.ask(
        "completion:async",
        prompt="Research task",
        session_id="research_001",
        priority="high",
        injection_config={"enabled": True, "trigger_type": "research", "target_sessions": ["coordinator"]},
        circuit_breaker_config={"max_depth": 5, "token_budget": 50000},
    )
    assert reply["status"] in ("ready", "queued"), reply
    assert reply["session_id"] == "research_001"
    result = talk.pushed("completion:result", request_id=reply["request_id"])
    assert result["status"] == "completed", result
    assert result["priority"] == "high"
    queued = talk.pushed("injection:queued", parent_request_id=reply["request_id"])
    assert (queued["target"], queued["trigger_type"]) == ("coordinator", "research")
    delivered = talk.pushed("injection:delivered", injection_id=queued["injection_id"])
    assert final(talk, delivered["request_id"])["session_id"] == "coordinator"


# -- the guide: new APIs ----------------------------------------------------------------------------------------------


def completion_queue_status(talk: Talk) -> None:
    """`completion:queue_status` has the four figures."""
    status = talk.ask("completion:queue_status")
    for name in ("queued", "active", "completed", "locked_conversations"):
        assert isinstance(status[name], int) and status[name] >= 0, (name, status)


def conversation_locks(talk: Talk) -> None:
    """`conversation:acquire_lock` and `conversation:release_lock`."""
    lock = talk.ask("conversation:acquire_lock", request_id="req_123", conversation_id="conv_456")
    assert (lock["acquired"], lock["state"], lock["conversation_id"]) == (True, "locked", "conv_456"), lock
    assert lock["expires_at"] > time.time()
    assert isinstance(lock["fence"], int)
    status = talk.ask("conversation:lock_status", conversation_id="conv_456")
    assert (status["locked"], status["holder"]) == (True, "req_123"), status
    released = talk.ask("conversation:release_lock", request_id="req_123")
    assert (released["released"], released["conversation_id"]) == (True, "conv_456"), released
    assert talk.refused("conversation:release_lock", request_id="req_123") == "not_lock_holder"


# -- the guide: new features ------------------------------------------------------------------------------------------


def priorities(talk: Talk) -> None:
    """All five priorities, in the guide's capitals; another word is an error."""
    conversation = fresh("priorities")
    words = ("BACKGROUND", "LOW", "NORMAL", "HIGH", "CRITICAL")
    with held(talk, conversation):
        ids = [
            talk.ask("completion:async", **short("Say one word."), session_id=conversation, priority=word)["request_id"]
            for word in words
        ]
        line = talk.ask("conversation:lock_status", conversation_id=conversation)["queue"]
        assert [entry["request_id"] for entry in line] == ids[::-1], line
    ends = [final(talk, request_id) for request_id in ids]
    assert [end["priority"] for end in ends] == [word.lower() for word in words]
    assert talk.refused("completion:async", prompt="x", priority="URGENT") == "invalid_data"


def parallel_requests_wait(talk: Talk) -> None:
    """Requests to a taken conversation are queued, with a reply that says so; then they run one after the other."""
    conversation = fresh("parallel")
    with held(talk, conversation) as holder:
        first = talk.ask("completion:async", **short("One"), session_id=conversation)
        second = talk.ask("completion:async", **short("Two"), session_id=conversation)
        assert (first["status"], first["conversation_locked"], first["holder"]) == ("queued", True, holder), first
        assert (first["position"], second["position"]) == (0, 1)
        waiting = talk.ask(
            "conversation:acquire_lock", request_id=fresh("waiter"), conversation_id=conversation, wait=False
        )
        assert waiting["acquired"] is False, waiting
    assert [final(talk, reply["request_id"])["status"] for reply in (first, second)] == ["completed", "completed"]


def forks(talk: Talk) -> None:
    """A fork is recorded, reported, and drawn in `conversation:lock_status`."""
    parent = fresh("parent")
    talk.ask("completion:request", **short("Hello"), session_id=parent)
    talk.ask("monitor:subscribe", patterns=["conversation:forked"])
    child = talk.ask("completion:request", **short("Another way"), session_id=parent, fork=True)["session_id"]
    assert child != parent
    told = talk.pushed("conversation:forked", child=child)
    assert (told["parent"], told["kind"]) == (parent, "requested"), told
    assert child in str(talk.ask("conversation:lock_status", conversation_id=parent)["forks"])


def lock_expiration(talk: Talk) -> None:
    """A lock has an end, and renewing it puts that off."""
    conversation = fresh("expiring")
    with held(talk, conversation) as holder:
        until_then = talk.ask("conversation:lock_status", conversation_id=conversation)["expires_at"]
        renewed = talk.ask("conversation:renew_lock", request_id=holder)
        assert renewed["expires_at"] >= until_then > time.time()


def injections(talk: Talk) -> None:
    """The guide's injection, with each of its triggers: a system reminder in the target's conversation."""
    talk.ask("monitor:subscribe", patterns=["injection:delivered"])
    for trigger in ("research", "coordination", "memory", "antThinking", "general"):
        reply = talk.ask(
            "completion:async",
            prompt="Analyze this data",
            injection_config={
                "enabled": True,
                "trigger_type": trigger,
                "target_sessions": ["session_123"],
                "follow_up_guidance": "Store findings in memory",
            },
        )
        told = talk.pushed("injection:delivered", parent_request_id=reply["request_id"])
        assert (told["target"], told["trigger_type"]) == ("session_123", trigger), told
        found = talk.ask("injection:status", injection_id=told["injection_id"])["injection"]
        assert found["state"] == "delivered"
        assert found["text"].startswith("<system-reminder>")
        assert "Store findings in memory" in found["text"]


def depth_limit(talk: Talk) -> None:
    """Depth limiting: a request that is too deep is blocked, with its reason and the chain's figures."""
    root = talk.ask("completion:request", **short("Begin"), circuit_breaker_config={"max_depth": 1})
    limits = {"max_depth": 1, "parent_request_id": root["request_id"]}
    child = talk.ask("completion:request", **short("Go on with what you said."), circuit_breaker_config=limits)
    assert child["status"] == "completed", child
    limits = {"max_depth": 1, "parent_request_id": child["request_id"]}
    blocked = talk.ask("completion:async", **short("And further."), circuit_breaker_config=limits)
    assert blocked["status"] == "blocked", blocked
    assert blocked["reason"]["code"]
    assert blocked["chain"]["ideation_depth"] >= 1
    assert blocked["chain"]["max_depth"] == 1
    status = talk.ask("circuit_breaker:status", request_id=root["request_id"])
    assert status["chain"]["chain_id"] == root["request_id"]


def token_budget(talk: Talk) -> None:
    """Token budgets: a chain whose budget cannot hold the request is blocked; an operator can look at it."""
    limits = {"token_budget": 1}
    reply = talk.ask("completion:async", **short("A long story, please."), circuit_breaker_config=limits)
    blocked = reply if reply["status"] == "blocked" else final(talk, reply["request_id"])
    assert blocked["status"] == "blocked", blocked
    assert blocked["reason"]["message"]
    assert blocked["chain"]["token_budget"] == 1


def breaker_reset(talk: Talk) -> None:
    """`circuit_breaker:reset` lets a chain continue."""
    root = talk.ask(
        "completion:request", **short("Begin"), circuit_breaker_config={"max_depth": 5, "token_budget": 50000}
    )
    reset = talk.ask("circuit_breaker:reset", request_id=root["request_id"])
    assert (reset["state"], reset["resets"]) == ("open", 1), reset
    assert talk.refused("circuit_breaker:status", request_id=fresh("nobody")) == "not_found"


# -- the guide: monitoring --------------------------------------------------------------------------------------------


def monitoring(talk: Talk) -> None:
    """The guide's three lines through `nc`: one answer each, and the end."""
    for event, keys in (
        ("completion:status", {"status", "queued", "active", "completed", "running"}),
        ("completion:queue_status", {"queued", "active", "completed", "locked_conversations"}),
        ("conversation:lock_status", {"locked_conversations", "locks", "forks"}),
    ):
        (answer,) = once(talk.path, f'{{"event": "{event}", "data": {{}}}}')
        assert answer["event"] == event
        assert keys <= answer["data"].keys(), (event, answer)


def events_are_told(talk: Talk) -> None:
    """`monitor:subscribe`: a request's progress is pushed."""
    with talk.again() as other:
        other.ask("monitor:subscribe", patterns=["completion:*", "conversation:*"])
        reply = talk.ask("completion:request", **short("Hello"), session_id=fresh("told"))
        assert other.pushed("conversation:locked", request_id=reply["request_id"])
        assert other.pushed("completion:progress", request_id=reply["request_id"])["status"] == "running"
        assert other.pushed("completion:result", request_id=reply["request_id"])["status"] == "completed"
        other.ask("monitor:unsubscribe")


# -- the plan: event handlers -----------------------------------------------------------------------------------------


def system_events(talk: Talk) -> None:
    """`system:startup`, `context` and `ready`."""
    startup = talk.ask("system:startup")
    assert (startup["service_version"], startup["pid"] > 0) == (2, True), startup
    assert talk.ask("system:context")["providers"]
    assert talk.ask("system:ready")["ready"] is True


def completion_cancel(talk: Talk) -> None:
    """`completion:cancel` stops waiting requests; repeating it is harmless."""
    conversation = fresh("cancelled")
    with held(talk, conversation):
        waits = talk.ask("completion:async", **short("Never mind."), session_id=conversation)["request_id"]
        assert talk.ask("completion:cancel", request_id=waits)["status"] == "cancelled"
    assert talk.ask("completion:cancel", request_id=waits)["status"] == "already_final"
    assert talk.pushed("completion:result", request_id=waits)["status"] == "cancelled"


def completion_status(talk: Talk) -> None:
    """`completion:status`: the service's figures and running requests."""
    status = talk.ask("completion:status")
    assert status["status"] == "ok"
    assert isinstance(status["running"], list)
    assert status["uptime_seconds"] >= 0


def session_status(talk: Talk) -> None:
    """`completion:session_status`: a session's life, and which agents came to it."""
    session = fresh("session")
    talk.ask("completion:request", **short("Hello"), session_id=session, agent_id="agent-1")
    status = talk.ask("completion:session_status", session_id=session)
    assert (status["state"], status["turns"], status["agents"], status["locked"]) == ("active", 1, ["agent-1"], False)
    assert talk.refused("completion:session_status", session_id=fresh("nobody")) == "not_found"


def retry_status(talk: Talk) -> None:
    """`completion:retry_status`: the retry manager's settings and waiting requests."""
    status = talk.ask("completion:retry_status")
    assert {"retrying", "parked", "max_attempts", "initial_delay", "max_delay", "waiting"} <= status.keys()


def completion_failed(talk: Talk) -> None:
    """`completion:failed`: it changes nothing for ended requests, nor for unknown ones."""
    ended = talk.ask("completion:request", **short("Hello"))["request_id"]
    assert talk.ask("completion:failed", request_id=ended, reason="timeout")["status"] == "not_retryable"
    assert talk.ask("completion:failed", request_id=fresh("nobody"), reason="timeout")["status"] == "not_found"
    assert talk.refused("completion:failed", request_id=ended, reason="bad mood") == "invalid_data"


def provider_status(talk: Talk) -> None:
    """`completion:provider_status`: each provider's breaker and record."""
    for provider in talk.ask("completion:provider_status")["providers"].values():
        assert {"breaker", "calls", "success_rate", "latency_ms", "running", "max_concurrency"} <= provider.keys()


def token_usage(talk: Talk) -> None:
    """`completion:token_usage`: per agent, model and session, with trends and MCP's share."""
    agent, session = fresh("agent"), fresh("session")
    talk.ask("completion:request", **short("Hello"), agent_id=agent, session_id=session)
    usage = talk.ask("completion:token_usage", agent_id=agent)
    assert usage["totals"]["requests"] == 1
    assert [row["agent_id"] for row in usage["by_agent"]] == [agent]
    assert [row["session_id"] for row in usage["by_session"]] == [session]
    assert usage["by_model"] and usage["by_provider"] and usage["trend"]
    assert "mcp" in usage


# -- the plan: core features ------------------------------------------------------------------------------------------


def active_completions(talk: Talk) -> None:
    """Active completions are counted and can be listed; ended ones are not among them."""
    reply = talk.ask("completion:request", **short("Hello"))
    listed = talk.ask("completion:queue_status", list="active")["items"]
    assert reply["request_id"] not in {row["request_id"] for row in listed}
    assert reply["request_id"] in {
        row["request_id"] for row in talk.ask("completion:queue_status", list="finished", limit=100)["items"]
    }


def response_files(talk: Talk) -> None:
    """Each answer is a line in its session's file."""
    from pathlib import Path

    session = fresh("filed")
    reply = talk.ask("completion:request", **short("Hello"), session_id=session)
    log = Path(talk.ask("system:context")["home"], "var", "logs", "responses", f"{session}.jsonl")
    assert reply["request_id"] in log.read_text("utf-8")


def repeated_request(talk: Talk) -> None:
    """An id names one request: sent again, it answers with that one, and runs no second time."""
    name, session = fresh("once"), fresh("session")
    first = talk.ask("completion:request", **short("Hello"), request_id=name, session_id=session)
    again = talk.ask("completion:request", **short("Hello"), request_id=name, session_id=session)
    assert again["finished_at"] == first["finished_at"]
    assert talk.ask("completion:session_status", session_id=session)["turns"] == 1
    assert (
        talk.refused("completion:request", **short("Other"), request_id=name, session_id=session)
        == "request_id_conflict"
    )


def bad_input(talk: Talk) -> None:
    """Wrong input is refused with its code, and the connection stays open."""
    assert talk.refused("completion:nonsense") == "unknown_event"
    assert talk.refused("completion:result") == "invalid_direction"
    assert talk.refused("completion:request") == "invalid_data"
    assert talk.ask("system:ready")["ready"] is True


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        completion_request,
        completion_async,
        completion_queue_status,
        conversation_locks,
        priorities,
        parallel_requests_wait,
        forks,
        lock_expiration,
        injections,
        depth_limit,
        token_budget,
        breaker_reset,
        monitoring,
        events_are_told,
        system_events,
        completion_cancel,
        completion_status,
        session_status,
        retry_status,
        completion_failed,
        provider_status,
        token_usage,
        active_completions,
        response_files,
        repeated_request,
        bad_input,
    )
}
