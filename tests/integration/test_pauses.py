"""Pause, resume and drain with real daemons: over kills, restarts, and at several daemons of one store."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ksi.cli.settings import Exit
from ksi.store.values import CLAIM_ASIDE
from tests.daemon_process import DaemonProcess, clean_environ, make_home
from tests.integration.redis_team import team
from tests.integration.wire import Json, Wire, in_state, until
from tests.redis_server import RedisServer


def ksi(home: Path, *words: str, exit_code: Exit = Exit.DONE) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ksi.cli", "--home", str(home), *words],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environ(),
        timeout=60,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stdout


@pytest.mark.promise("B2")
async def test_a_pause_survives_a_kill_and_is_shown_with_its_operator_and_reason(tmp_path: Path) -> None:
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("queue:pause", by="ann", why="the bill")
        await wire.ask("queue:pause", agent_id="nightly", by="bob")
        await wire.ask("completion:async", prompt="x", request_id="held")
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            reply = await wire.ask("completion:status")
            assert [(one["scope"], one.get("by"), one.get("why")) for one in reply["paused"]] == [
                ("all", "ann", "the bill"),
                ("agent", "bob", None),
            ]
            health = await wire.ask("system:health")
            assert health["status"] == "degraded"
            assert any("by ann" in problem and "`ksi resume`" in problem for problem in health["problems"])
            assert (await wire.ask("completion:get", request_id="held"))["status"] == "queued"
            await wire.ask("completion:async", prompt="x", request_id="nightly", agent_id="nightly")
            await wire.ask("queue:resume")
            await in_state(wire, "held", "completed")
            held = await wire.ask("completion:get", request_id="nightly")
            assert (held["status"], held["paused"].partition(" since ")[0]) == ("queued", "agent nightly is paused")
            await wire.ask("queue:resume", agent_id="nightly")
            await in_state(wire, "nightly", "completed")


@pytest.mark.promise("B2")
async def test_a_drained_daemon_refuses_work_by_name_and_the_command_returns_when_nothing_runs(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:async", prompt="x", request_id="long", model="slow/x")
            await in_state(wire, "long", "running")
            assert json.loads(ksi(home, "drain", "--timeout", "0.2", "--json", exit_code=Exit.LATER))["running"] == 1
            error = await wire.refused("completion:async", prompt="x")
            assert (error.code, error.retryable) == ("draining", True)
            assert "ksi drain --cancel" in error.message
            draining = wire.post("queue:drain", {})
            await wire.ask("completion:cancel", request_id="long")
            assert (await draining)["data"]["draining"]
            assert "nothing is paused" in ksi(home, "drain", "--cancel")
            assert (await wire.ask("completion:request", prompt="x"))["status"] == "completed"


@pytest.mark.promise("B2", "D1")
async def test_a_pause_holds_at_every_daemon_of_a_store(redis_server: RedisServer, tmp_path: Path) -> None:
    with team(tmp_path, f"{redis_server.url}?namespace=pauses", 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await here.ask("queue:pause", session_id="talk", by="ann")

            async def heard() -> Json | None:
                reply = await there.ask("queue:pauses")
                return reply if reply["paused"] else None

            reply = await until(heard)
            assert reply is not None
            assert reply["paused"][0]["by"] == "ann"
            await there.ask("completion:async", prompt="x", request_id="held", session_id="talk", model="stub/echo")
            assert (await here.ask("completion:get", request_id="held"))["status"] == "queued"
            assert (await there.ask("completion:request", prompt="x", model="stub/echo"))["status"] == "completed"
            await there.ask("queue:resume", session_id="talk")
            await in_state(here, "held", "completed")
            (asked,) = (await here.ask("completion:get", request_id="held"))["attempts"]
            assert asked["attempt"] == 1


@pytest.mark.promise("B2", "R5")
async def test_a_restored_checkpoint_holds_back_the_requests_held_back_when_it_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "saved.ksi"
    with DaemonProcess(make_home(tmp_path / "old")) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("queue:pause", agent_id="nightly", by="ann", why="it burns")
            await wire.ask("provider:disable", provider="slow", by="bob", why="the bill")
            await wire.ask("completion:async", prompt="x", request_id="held", agent_id="nightly")
            await wire.ask("completion:async", prompt="x", request_id="off", model="slow/x")
            await wire.ask("checkpoint:collect", path=str(file))
    with DaemonProcess(make_home(tmp_path / "new")) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("checkpoint:restore", path=str(file))
            assert (await wire.ask("completion:request", prompt="y"))["status"] == "completed"
            held = await wire.ask("completion:get", request_id="held")
            assert (held["status"], held.get("attempts", [])) == ("queued", [])
            assert held["paused"].endswith("by ann: it burns")
            assert (await wire.ask("completion:get", request_id="off"))["status"] == "queued"
            reports = (await wire.ask("completion:provider_status"))["providers"]
            assert reports["slow"]["disabled"].endswith("by bob: the bill")
            await wire.ask("queue:resume", agent_id="nightly")
            await in_state(wire, "held", "completed")


@pytest.mark.promise("B2")
async def test_a_disabled_provider_is_shown_with_operator_and_reason_after_a_kill(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    process = DaemonProcess(home)
    process.start()
    ksi(home, "providers", "disable", "slow", "--why", "the bill")
    process.end(signal.SIGKILL)
    with process:
        assert "slow is disabled since" in (told := ksi(home, "health", exit_code=Exit.FAILED))
        assert ": the bill; `ksi providers enable slow`" in told
        ksi(home, "providers", "enable", "slow")
        assert "disabled" not in ksi(home, "health")


@pytest.mark.promise("B2")
async def test_a_flood_that_is_paused_lets_others_pass_and_comes_back_after_a_kill(tmp_path: Path) -> None:
    """More than one claim sets aside, and the daemon is killed in between."""
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("queue:pause")
        for number in range(3 * CLAIM_ASIDE):
            wire.post("completion:async", {"prompt": "x", "request_id": f"f{number}", "agent_id": "nightly"})
        await wire.ask("completion:async", prompt="x", request_id="other")
        await wire.ask("queue:pause", agent_id="nightly", why="it burns")
        await wire.ask("queue:resume")
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            await in_state(wire, "other", "completed")
            status = await wire.ask("completion:status")
            assert (status["queued"], status["completed"]) == (3 * CLAIM_ASIDE, 1)
            await wire.ask("queue:resume", agent_id="nightly")

            async def done() -> bool | None:
                return (await wire.ask("completion:status"))["completed"] == 3 * CLAIM_ASIDE + 1 or None

            assert await until(done)


@pytest.mark.promise("B2")
async def test_drain_with_stop_ends_the_daemon_when_running_requests_are_done(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    process = DaemonProcess(home)
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="quick")
    ksi(home, "drain", "--stop")
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("completion:get", request_id="quick"))["status"] == "completed"
            assert not (await wire.ask("queue:pauses")).get("draining", False)


@pytest.mark.promise("B2", "Q3")
async def test_a_request_that_ran_when_the_daemon_was_killed_is_not_rerun_while_it_is_paused(tmp_path: Path) -> None:
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="ran", model="slow/x", agent_id="nightly")
        await in_state(wire, "ran", "running")
        await wire.ask("queue:pause", agent_id="nightly")
        assert (await wire.ask("completion:get", request_id="ran"))["status"] == "running"
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("completion:request", prompt="x"))["status"] == "completed"
            held = await wire.ask("completion:get", request_id="ran")
            assert (held["status"], len(held["attempts"])) == ("queued", 1)
            await wire.ask("completion:cancel", request_id="ran")
            await in_state(wire, "ran", "cancelled")
            again = await wire.ask("completion:requeue", request_id="ran")
            assert (await wire.ask("completion:get", request_id=again["request_id"]))["status"] == "queued"


@pytest.mark.promise("B2", "D1")
async def test_a_drain_is_about_one_daemon_and_the_others_take_its_work(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    with team(tmp_path, f"{redis_server.url}?namespace=drains", 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await here.ask("queue:drain")
            assert (await here.refused("completion:async", prompt="x")).code == "draining"
            assert not (await there.ask("queue:pauses")).get("draining", False)
            done = await there.ask("completion:request", prompt="x", model="stub/echo", request_id="here")
            assert done["status"] == "completed"
            await here.ask("queue:undrain")
            assert (await here.ask("completion:request", prompt="x", model="stub/echo"))["status"] == "completed"
