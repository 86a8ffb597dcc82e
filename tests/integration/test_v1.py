"""Service version 1: completions at once, on the same wire, providers and log; the rest says that it is not there."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.clock import Chance, SystemClock
from ksi.completion.upkeep.response_log import log_name
from ksi.config.reader import load
from ksi.daemon.daemon import Daemon, build_daemon
from ksi.daemon.direct import DirectDaemon
from ksi.errors import FailureClass
from ksi.events.specs import SPECS
from ksi.transports.direct_handlers import AVAILABLE, PUSHED
from tests.daemon_process import DaemonProcess, make_home, start_in_vain
from tests.endpoint import ScriptedEndpoint
from tests.integration.house import provider
from tests.integration.wire import Json, Wire, until

LONG = {"delay": 600}
NOT_AVAILABLE = sorted(name for name, spec in SPECS.items() if spec.incoming and name not in AVAILABLE)

V1_CONFIG = """\
[service]
version = 1
default_model = "stub/echo"
shutdown_grace = 0.1

[providers.stub]
kind = "stub"
"""


@asynccontextmanager
async def direct(home: Path, **sections: Mapping[str, Any]) -> AsyncIterator[tuple[DirectDaemon, Wire]]:
    """A daemon of version 1 in this process, and a connection to it."""
    flags: dict[str, dict[str, Any]] = {
        "service": {"version": 1, "default_model": "stub/echo", "shutdown_grace": 0.0},
        "providers": {"local": {"enabled": False}, "stub": {"kind": "stub"}},
    }
    for section, values in sections.items():
        flags.setdefault(section, {}).update(values)
    daemon = build_daemon(load(home, {}, flags), SystemClock(), Chance(random.Random(0)), {})
    assert isinstance(daemon, DirectDaemon)
    await daemon.start()
    try:
        async with await Wire.open(daemon.config.socket_path) as wire:
            yield daemon, wire
    finally:
        await daemon.stop()


def log_lines(home: Path, session: str) -> list[Json]:
    path = home / "var" / "logs" / "responses" / log_name(session)
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_request_is_answered_when_it_is_done_with_the_payload_of_version_2(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        reply = await wire.ask("completion:request", prompt="Hello", session_id="test_001", agent_id="a")
    assert reply["status"] == "completed"
    assert reply["result"] == "echo: Hello"
    assert reply["session_id"] == "test_001"
    assert reply["usage"]["total_tokens"] == 3
    assert reply["provider"] == "stub"
    assert reply["attempts"][0]["outcome"] == "completed"


async def test_an_async_request_is_answered_at_once_and_its_result_pushed(tmp_path: Path) -> None:
    async with direct(tmp_path) as (daemon, wire), await Wire.open(daemon.config.socket_path) as other:
        await other.ask("monitor:subscribe", patterns=["completion:*"])
        options = {"delay": 0.05}
        reply = await wire.ask("completion:async", prompt="Hello", request_id="r1", provider_options=options)
        assert (reply["request_id"], reply["status"], reply["state"]) == ("r1", "ready", "running")
        result = await wire.pushed("completion:result", request_id="r1")
        assert result["result"] == "echo: Hello"
        assert (await other.pushed("completion:result", request_id="r1"))["session_id"] == reply["session_id"]


async def test_every_answer_is_a_line_in_its_sessions_file(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="One", session_id="s/1", request_id="r1", agent_id="a")
        await wire.ask("completion:request", prompt="Two", session_id="s/1", request_id="r2")
    first, second = log_lines(tmp_path, "s/1")
    assert first["ksi"]["request"]["prompt"] == "One"
    assert (first["ksi"]["request_id"], first["ksi"]["client_id"]) == ("r1", "a")
    assert first["response"]["result"] == "echo: One"
    assert second["ksi"]["provider"] == "stub"
    assert {"timestamp", "duration_ms"} <= second["ksi"].keys()


async def test_no_log_is_written_where_it_is_switched_off(tmp_path: Path) -> None:
    async with direct(tmp_path, log={"responses": False}) as (_, wire):
        await wire.ask("completion:request", prompt="One", session_id="s")
    assert not (tmp_path / "var" / "logs" / "responses").exists()


async def test_a_conversation_goes_on_after_a_restart_from_its_log_alone(tmp_path: Path) -> None:
    async with ScriptedEndpoint() as endpoint:
        team = {"team": provider("openai", endpoint)}
        fields = {"model": "team/small", "session_id": "talk"}
        async with direct(tmp_path, providers=team) as (_, wire):
            await wire.ask("completion:request", prompt="One", **fields)
            await wire.ask("completion:request", prompt="Two", **fields)
        with (tmp_path / "var/logs/responses/talk.jsonl").open("ab") as log:
            log.write(b'{"ksi": {"provider": "team", "broken off')
        async with direct(tmp_path, providers=team) as (_, wire):
            await wire.ask("completion:request", prompt="Three", **fields)
            await wire.ask("completion:request", prompt="Four", **fields)
        said = [message["content"] for message in endpoint.requests[-1].json["messages"] if message["role"] == "user"]
    assert said == ["One", "Two", "Three", "Four"]
    whole = (tmp_path / "var/logs/responses/talk.jsonl").read_bytes().splitlines()
    assert len(whole) == 5
    assert json.loads(whole[3])["ksi"]["request"]["prompt"] == "Three"


async def test_requests_of_one_conversation_run_concurrently(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        for number in range(3):
            fields = {"session_id": "one", "request_id": f"r{number}", "provider_options": LONG}
            reply = await wire.ask("completion:async", prompt="x", **fields)
            assert reply["status"] == "ready"
        status = await wire.ask("completion:status")
        assert (status["active"], len(status["running"])) == (3, 3)
        assert {row["session_id"] for row in status["running"]} == {"one"}


async def test_a_running_request_can_be_cancelled_and_only_that(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        waiting = wire.post("completion:request", {"prompt": "x", "request_id": "r1", "provider_options": LONG})
        await until(lambda: _runs(wire, 1))
        cancelled = await wire.ask("completion:cancel", request_id="r1")
        assert (cancelled["status"], cancelled["state"]) == ("cancelled", "cancelled")
        assert (await waiting)["data"]["status"] == "cancelled"
        assert (await wire.refused("completion:cancel", request_id="r1")).code == "not_found"
        assert (await wire.ask("completion:status"))["cancelled"] == 1


async def _runs(wire: Wire, count: int) -> bool:
    return bool((await wire.ask("completion:status"))["active"] == count)


@pytest.mark.parametrize("failure", [FailureClass.OVERLOADED, FailureClass.INVALID_REQUEST])
async def test_a_failure_is_reported_and_not_retried(tmp_path: Path, failure: FailureClass) -> None:
    async with direct(tmp_path) as (_, wire):
        options = {"fail": failure.value}
        reply = await wire.ask("completion:request", prompt="x", session_id="s", provider_options=options)
        assert (reply["status"], reply["error"]["code"]) == ("failed", failure.value)
        assert len(reply["attempts"]) == 1
    assert not (tmp_path / "var" / "logs" / "responses").exists()


async def test_a_request_past_its_time_fails_with_timeout(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        reply = await wire.ask("completion:request", prompt="x", timeout=0.05, provider_options=LONG)
        assert reply["error"]["code"] == "timeout"


async def test_a_client_that_leaves_cancels_nothing(tmp_path: Path) -> None:
    async with direct(tmp_path) as (daemon, wire):
        async with await Wire.open(daemon.config.socket_path) as other:
            other.post("completion:request", {"prompt": "x", "session_id": "s", "provider_options": {"delay": 0.1}})
            await until(lambda: _runs(wire, 1))
        await until(lambda: _runs(wire, 0))
    assert len(log_lines(tmp_path, "s")) == 1


async def test_an_id_that_runs_is_not_taken_twice(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
        refused = await wire.refused("completion:async", prompt="y", request_id="r")
        assert refused.code == "request_id_conflict"


async def test_fields_that_version_1_ignores_are_named_in_the_warnings(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        reply = await wire.ask("completion:request", prompt="x", priority="high", delay=5, promt="y")
    assert reply["result"] == "echo: x"
    warnings = "\n".join(reply["warnings"])
    assert "priority: no effect in service version 1" in warnings
    assert "delay: no effect" in warnings
    assert "promt" in warnings


@pytest.mark.parametrize("event", NOT_AVAILABLE)
async def test_events_that_version_1_lacks_are_refused_whatever_their_data(tmp_path: Path, event: str) -> None:
    async with direct(tmp_path) as (_, wire):
        for data in ({}, {"request_id": 5, "nonsense": True}):
            refused = await wire.refused(event, **data)
            assert (refused.code, refused.retryable) == ("not_available_in_v1", False)
            assert refused.details == {"event": event}
            assert "ksi migrate" in refused.message


async def test_a_chain_cannot_be_cancelled_if_there_is_none(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        assert (await wire.refused("completion:cancel", chain_id="c")).code == "not_available_in_v1"
        assert (await wire.refused("completion:cancel")).code == "invalid_data"


async def test_bad_input_is_reported_as_ever(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        assert (await wire.refused("completion:request")).code == "invalid_data"
        assert (await wire.refused("completion:nonsense")).code == "unknown_event"
        assert (await wire.refused("completion:result")).code == "invalid_direction"
        assert (await wire.refused("completion:request", prompt="x", model="nobody/x")).code == "unknown_model"


async def test_the_service_tells_of_itself(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        assert (await wire.ask("system:startup"))["service_version"] == 1
        assert (await wire.ask("system:context"))["providers"] == ["stub"]
        assert (await wire.ask("system:ready"))["ready"] is True
        assert (await wire.ask("system:health"))["status"] == "healthy"
        found = await wire.ask("system:discover", schemas=False)
        assert {event["name"] for event in found["events"]} == AVAILABLE | PUSHED
        await wire.ask("monitor:subscribe", patterns=["completion:result"])
        assert (await wire.ask("monitor:unsubscribe"))["patterns"] == []


async def test_requests_that_begin_together_in_a_new_conversation_are_all_remembered(tmp_path: Path) -> None:
    async with direct(tmp_path) as (_, wire):
        await asyncio.gather(*(wire.ask("completion:request", prompt=f"p{n}", session_id="new") for n in range(20)))
    prompts = {line["ksi"]["request"]["prompt"] for line in log_lines(tmp_path, "new")}
    assert prompts == {f"p{n}" for n in range(20)}


def test_a_version_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    ended = start_in_vain(make_home(tmp_path / "home", "[service]\nversion = 3\n"))
    assert ended.returncode == 2
    assert "service.version" in ended.stderr


async def test_a_daemon_in_a_process_of_its_own_serves_stops_in_order_and_makes_no_database(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", V1_CONFIG)
    with DaemonProcess(home) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            assert (await wire.ask("completion:request", prompt="Hello"))["result"] == "echo: Hello"
            running = wire.post("completion:request", {"prompt": "x", "provider_options": LONG})
            await until(lambda: _runs(wire, 1))
            stopping = await wire.ask("system:shutdown")
            assert (stopping["stopping"], stopping["running"]) == (True, 1)
            assert (await running)["data"]["status"] == "cancelled"
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
    assert not (home / "var" / "db").exists()


def test_version_2_is_built_by_default(tmp_path: Path) -> None:
    config = load(tmp_path, {}, {"providers": {"stub": {"kind": "stub"}, "local": {"enabled": False}}})
    assert config.service.version == 2
    assert isinstance(build_daemon(config, SystemClock(), Chance(random.Random(0)), {}), Daemon)
