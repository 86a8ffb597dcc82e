"""Version 1's own clients, against a home that answers in its form."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ksi.client import Client
from tests.acceptance.old_clients import ChatClient, balanced, one_shot, summary
from tests.acceptance.talk import Talk
from tests.daemon_process import DaemonProcess, make_home

Json = dict[str, Any]

CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 0.2

[socket]
replies = "v1"

[retry]
max_attempts = 1

[providers.stub]
kind = "stub"

[providers.openai]
kind = "stub"

[providers.broken]
kind = "stub"
fail = "invalid_request"

[providers.slow]
kind = "stub"
delay = 600

[providers.claude-cli]
kind = "stub"
text = "Hello from Claude."
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a daemon that answers in version 1's form."""
    with DaemonProcess(make_home(tmp_path_factory.mktemp("old"), CONFIG)) as process:
        yield process.socket_path


@pytest.mark.promise("R1", "R4")
def test_the_old_test_script_runs_to_its_end(path: Path) -> None:
    answer = one_shot(
        path,
        "completion:async",
        {
            "request_id": "test_basic_1",
            "prompt": "What is 2+2?",
            "model": "claude-cli/haiku",
            "session_id": "test_session_001",
            "client_id": "test_client",
            "priority": "normal",
            "max_tokens": 100,
        },
    )
    assert (answer["request_id"], answer["status"], answer["position"]) == ("test_basic_1", "ready", 0)
    answer = one_shot(
        path,
        "completion:async",
        {
            "request_id": "async_test_1",
            "prompt": "Research the history of Unix sockets.",
            "model": "claude-cli/haiku",
            "session_id": "research_session_001",
            "priority": "high",
            "injection_config": {
                "enabled": True,
                "trigger_type": "research",
                "target_sessions": ["coordinator_session"],
                "follow_up_guidance": "Consider if this research reveals any patterns.",
            },
            "circuit_breaker_config": {"max_depth": 3, "token_budget": 10000, "time_window": 600},
        },
    )
    assert answer["status"] == "ready"
    first = one_shot(path, "completion:async", {"prompt": "1", "session_id": "lock_test", "model": "slow/x"})
    second = one_shot(path, "completion:async", {"prompt": "2", "session_id": "lock_test", "priority": "normal"})
    assert (first["status"], second["status"], second["conversation_locked"]) == ("ready", "queued", True)
    lock = one_shot(path, "conversation:lock_status", {"conversation_id": "lock_test"})
    assert (lock["locked"], lock["state"], lock["holder"]) == (True, "locked", first["request_id"])
    assert (lock["queue_length"], lock["queue"]) == (1, [second["request_id"]])
    blocked, parent = [], None
    for depth in range(5):
        answer = one_shot(
            path,
            "completion:async",
            {
                "request_id": f"chain_test_{depth}",
                "prompt": f"Chain request {depth}",
                "session_id": f"chain_session_{depth}",
                "priority": "low",
                "injection_config": {"enabled": True, "trigger_type": "coordination"},
                "circuit_breaker_config": {"max_depth": 3, "parent_request_id": parent},
            },
        )
        if answer.get("status") == "blocked":
            assert answer["reason"] == "circuit_breaker"
            blocked.append(depth)
            break
        parent = f"chain_test_{depth}"
    assert blocked == [4]
    for priority in ("low", "critical", "normal", "high", "background"):
        answer = one_shot(
            path, "completion:async", {"prompt": "x", "priority": priority, "session_id": f"priority_test_{priority}"}
        )
        assert answer["status"] == "ready"
    assert one_shot(path, "completion:queue_status", {})["active"] >= 1
    assert one_shot(path, "completion:status", {})["active_count"] >= 1
    for request in (second, first):
        assert one_shot(path, "completion:cancel", {"request_id": request["request_id"]})["status"] == "cancelled"


@pytest.mark.promise("R1")
async def test_the_old_chat_client_talks_and_goes_on_in_the_session_that_it_was_given(path: Path) -> None:
    async with ChatClient(path) as client:
        assert (await client.health())["status"] == "healthy"
        text, session = await client.send_prompt("Hello", None)
        assert text == "Hello from Claude."
        again, same = await client.send_prompt("And again", session, model="sonnet")
        assert (again, same) == ("Hello from Claude.", session)


@pytest.mark.promise("R1")
@pytest.mark.parametrize("model", ["stub/echo", "openai/gpt-5"])
async def test_the_old_chat_client_reads_answers_of_every_provider(path: Path, model: str) -> None:
    async with ChatClient(path, f"chat-{model.replace('/', '-')}") as client:
        text, session = await client.send_prompt("Hello", "named", model=model)
        assert (text, session) == ("echo: Hello", "named")


@pytest.mark.promise("R1")
async def test_the_old_chat_client_gets_the_reason_of_a_failed_request(path: Path) -> None:
    async with ChatClient(path, "unlucky") as client:
        with pytest.raises(ValueError, match="scripted invalid_request"):
            await client.send_prompt("Hello", None, model="broken/x")


@pytest.mark.promise("R1")
def test_a_request_is_answered_as_its_session_file_has_it(path: Path) -> None:
    data = {"prompt": "Hello", "session_id": "s1", "agent_id": "a1", "client_id": "c1"}
    for ask in (one_shot, balanced):
        answer = ask(path, "completion:request", data)
        assert set(answer["ksi"]) == {"provider", "request_id", "timestamp", "duration_ms", "client_id"}
        assert answer["ksi"]["client_id"] == "c1"
        assert answer["ksi"]["timestamp"].endswith("Z")
        assert answer["response"]["result"] == "echo: Hello"
        assert answer["session_id"] == "s1"


@pytest.mark.promise("R1")
def test_a_failed_request_is_answered_with_an_error_that_is_text(path: Path) -> None:
    answer = one_shot(path, "completion:request", {"prompt": "Hello", "model": "broken/x"})
    assert (answer["status"], "scripted invalid_request" in answer["error"]) == ("error", True)
    assert answer["response"]["error"] == answer["error"]
    with pytest.raises(RuntimeError, match="prompt: must not be empty"):
        balanced(path, "completion:request", {"prompt": ""})


@pytest.mark.promise("R1")
def test_a_subscriber_reads_results_as_the_modular_service_pushed_them(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(60)
        listener.connect(str(path))
        lines = listener.makefile("rwb")
        subscribe = {"client_id": "monitor", "event_patterns": ["completion:result"]}
        lines.write(json.dumps({"event": "monitor:subscribe", "data": subscribe}).encode() + b"\n")
        lines.flush()
        reply = json.loads(lines.readline())
        assert (reply["status"], reply["client_id"]) == ("subscribed", "monitor")
        assert reply["data"]["patterns"] == ["completion:result"]
        balanced(path, "completion:request", {"prompt": "Hello", "request_id": "heard", "session_id": "s2"})
        told = (json.loads(line)["data"] for line in lines)
        # What earlier tests had injected may end meanwhile.
        assert next(summary(data) for data in told if data["request_id"] == "heard") == {
            "status": "completed",
            "response": "echo: Hello",
            "session_id": "s2",
            "request_id": "heard",
        }


LOCK = {"request_id": "holder", "conversation_id": "kept"}

OLD_KEYS: list[tuple[str, Json, str]] = [
    ("system:health", {}, "status uptime version"),
    ("system:discover", {}, "namespaces events total_events"),
    ("system:help", {"event": "completion:async"}, "event namespace summary parameters examples"),
    ("completion:request", {"prompt": "x"}, "ksi response session_id"),
    ("completion:async", {"prompt": "x"}, "request_id status position fork_warning message queued queue_depth"),
    ("completion:cancel", {"request_id": "nobody"}, "status error"),
    (
        "completion:status",
        {},
        "active_count active_requests queue_status service_ready active_completions status_counts queues sessions "
        "providers token_usage retry_manager",
    ),
    ("completion:queue_status", {}, "queued active completed locked_conversations forked_conversations"),
    ("completion:session_status", {"session_id": "s1"}, "session_id completions queue session"),
    ("completion:session_status", {"session_id": "nobody's"}, "session_id completions queue session"),
    ("completion:provider_status", {}, "total_providers available_providers providers"),
    ("completion:provider_status", {"provider": "stub"}, "provider config circuit_breaker stats"),
    (
        "completion:token_usage",
        {},
        "total_input_tokens total_output_tokens total_cache_tokens total_tokens total_requests active_agents "
        "active_models active_sessions mcp_statistics",
    ),
    ("completion:token_usage", {"agent_id": "a1", "hours": 2}, "agent_id usage time_window_hours"),
    ("completion:token_usage", {"model": "stub/echo"}, "model usage"),
    ("completion:retry_status", {}, "retry_manager stats retrying_requests"),
    ("completion:failed", {"request_id": "nobody", "reason": "api_rate_limit"}, "status"),
    ("completion:failed", {"request_id": "nobody", "reason": "boom", "message": "connection reset"}, "status"),
    ("conversation:acquire_lock", LOCK, "acquired state conversation_id"),
    (
        "conversation:acquire_lock",
        {**LOCK, "request_id": "second"},
        "acquired state position holder",
    ),
    (
        "conversation:lock_status",
        {"conversation_id": "kept"},
        "locked state holder acquired_at queue_length queue fork_warning parent_conversation child_conversations "
        "metadata",
    ),
    ("conversation:lock_status", {}, "total_locks total_forks locks"),
    ("conversation:active", {}, "active_count active_conversations"),
    ("conversation:release_lock", LOCK, "released conversation_id next_request"),
    ("conversation:release_lock", LOCK, "released error"),
    ("conversation:lock_status", {"conversation_id": "free"}, "locked state"),
    ("monitor:subscribe", {"client_id": "m", "event_patterns": ["*"]}, "status client_id patterns"),
    ("transport:connection", {"client_id": "m", "action": "connect"}, "status"),
]


@pytest.mark.promise("R1", "R4", "L5", "L6")
def test_every_answer_keeps_the_keys_of_the_old_one(path: Path) -> None:
    missing = {}
    for event, data, keys in OLD_KEYS:
        answer = one_shot(path, event, data)
        for place in (answer, answer["data"]):
            if not place.keys() >= set(keys.split()):
                missing[event] = set(keys.split()) - place.keys()
        assert (answer["event"], answer["count"]) == (event, 1)
    assert missing == {}


INNER_KEYS: list[tuple[str, Json, list[str], str]] = [
    ("completion:provider_status", {"provider": "stub"}, ["circuit_breaker"], "is_open recent_failures open_until"),
    ("completion:provider_status", {"provider": "stub"}, ["stats"], "total_calls successful_calls avg_latency_ms"),
    ("completion:provider_status", {"provider": "stub"}, ["config"], "type models priority supports_mcp"),
    ("completion:retry_status", {}, ["stats"], "total_retrying pending_timers policy"),
    ("completion:retry_status", {}, ["stats", "policy"], "max_attempts initial_delay max_delay backoff_multiplier"),
    ("completion:status", {}, ["queues"], "total_sessions active_sessions total_queued sessions"),
    ("completion:status", {}, ["sessions"], "total_sessions locked_sessions active_sessions agents_with_sessions"),
    ("completion:status", {}, ["providers"], "total_providers available_providers providers"),
    ("completion:status", {}, ["token_usage"], "total_input_tokens mcp_statistics"),
    ("completion:session_status", {"session_id": "s1"}, ["queue"], "exists session_id queue_size is_active is_empty"),
    (
        "completion:session_status",
        {"session_id": "s1"},
        ["session"],
        "exists created_at last_activity request_count active_request conversation_locked lock_holder lock_expiry",
    ),
    (
        "completion:token_usage",
        {"agent_id": "a1"},
        ["usage"],
        "input_tokens output_tokens cache_tokens total_tokens request_count avg_tokens_per_request",
    ),
    ("completion:token_usage", {}, ["mcp_statistics"], "total_requests mcp_enabled_requests mcp_percentage"),
    ("system:discover", {"namespace": "completion"}, ["events"], "completion"),
]


@pytest.mark.promise("R4", "F6", "L10", "T2")
def test_the_inner_parts_of_reports_keep_their_keys(path: Path) -> None:
    one_shot(path, "completion:request", {"prompt": "x", "session_id": "s1", "agent_id": "a1"})
    for event, data, way, keys in INNER_KEYS:
        part: Any = balanced(path, event, data)
        for step in way:
            part = part[step]
        assert part.keys() >= set(keys.split()), event


@pytest.mark.promise("F1", "F2")
def test_version_1s_reasons_end_a_running_attempt_with_todays_class(path: Path) -> None:
    one_shot(path, "completion:async", {"prompt": "x", "model": "slow/x", "request_id": "limited"})
    answer = balanced(path, "completion:failed", {"request_id": "limited", "reason": "api_rate_limit"})
    assert answer["status"] in ("retry_scheduled", "not_retryable")
    with Talk(path) as talk:
        assert talk.ask("completion:get", request_id="limited")["attempts"][0]["error"] == "rate_limited"
        talk.ask("completion:cancel", request_id="limited")


def test_fields_of_version_1_are_understood_and_others_named(path: Path) -> None:
    answer = balanced(
        path,
        "completion:async",
        {
            "prompt": "x",
            "model": "claude_cli/sonnet",
            "priority": "urgent",
            "conversation_lock": {"enabled": True, "timeout": 9},
            "extra_body": {"ksi": {"session_id": "inner", "sandbox_dir": "/x"}, "top": 1},
        },
    )
    assert answer["session_id"] == "inner"
    assert [warning.partition(" has no effect")[0] for warning in answer["warnings"]] == [
        "priority 'urgent' is unknown: the request is normal",
        "extra_body.top",
        "extra_body.ksi.sandbox_dir",
        "conversation_lock.timeout",
    ]


def test_servers_named_in_the_extra_body_are_mcp_servers(path: Path) -> None:
    data = {"prompt": "x", "extra_body": {"ksi": {"mcp_config_path": "mcp.json"}}}
    assert one_shot(path, "completion:async", data)["error"].startswith("mcp_config: 'stub/echo' is served by stub")


@pytest.mark.promise("R1")
async def test_our_own_client_gets_todays_form_from_the_same_daemon(path: Path) -> None:
    async with Client(path) as client:
        reply = await client.complete("Hello", session_id="ours")
        assert reply.result == "echo: Hello"
        async with client.subscribe("completion:*") as pushes:
            await asyncio.to_thread(one_shot, path, "completion:request", {"prompt": "x", "request_id": "told"})
            async for push in pushes:
                if push.event == "completion:result":
                    assert push.data["result"] == "echo: x"
                    break


@pytest.mark.promise("R1")
def test_a_home_without_version_1_answers_in_its_form_if_a_line_asks_for_it(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        assert "ksi" not in one_shot(process.socket_path, "completion:request", {"prompt": "x"})["data"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(60)
            connection.connect(str(process.socket_path))
            line = {"event": "completion:async", "data": {"prompt": "x"}, "replies": "v1"}
            connection.sendall(json.dumps(line).encode() + b"\n")
            with connection.makefile("rb") as lines:
                assert json.loads(lines.readline())["data"]["queue_depth"] == 1
                assert json.loads(lines.readline())["data"]["result"]["response"]["result"] == "echo: x"
