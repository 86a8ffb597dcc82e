"""A daemon on a machine whose wall clock leaps, and on one that sleeps."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from ksi.clock import KeptTime, SystemClock, microseconds
from ksi.completion.upkeep.clock_keeper import machine_boot
from ksi.testing import SimulatedClock
from tests.daemon_process import DaemonProcess, make_home
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Wire, until

HOUR = 3_600.0
DAY = 86_400.0
NARROW = {"stub": {"kind": "stub", "max_concurrency": 1}}
CLEANING = {"clean_every": 1.0}


async def status(wire: Wire, request_id: str) -> str:
    return str((await wire.ask("completion:get", request_id=request_id))["status"])


@pytest.mark.promise("O4")
@pytest.mark.parametrize("days", [30, -30, 400])
async def test_a_leap_of_the_wall_clock_removes_expires_and_starts_nothing_and_keeps_the_order(days: int) -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, providers=NARROW, retention=CLEANING) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="done", session_id="talk")
        await wire.ask("completion:async", prompt="x", request_id="block", provider_options=LONG)
        await wire.ask("completion:async", prompt="x", request_id="brief", ttl=HOUR)
        await wire.ask("completion:async", prompt="x", request_id="later", delay=HOUR)
        await wire.ask("conversation:acquire_lock", request_id="lock", conversation_id="outside")
        clock.step_wall(days * DAY)
        await clock.advance(5)
        await wire.ask("completion:async", prompt="x", request_id="in the leap")
        clock.step_wall(-days * DAY)
        await clock.advance(5)
        await wire.ask("completion:async", prompt="x", request_id="behind it")
        again = await wire.ask("completion:request", prompt="x", request_id="done", session_id="talk")
        assert len(again["attempts"]) == 1
        assert (await wire.ask("completion:session_status", session_id="talk"))["turns"] == 1
        assert await status(wire, "brief") == "queued"
        assert await status(wire, "later") == "scheduled"
        assert (await wire.ask("conversation:lock_status", conversation_id="outside"))["state"] == "locked"
        await wire.ask("completion:cancel", request_id="block")
        ended = [(await wire.pushed("completion:result"))["request_id"] for _ in range(4)]
        assert ended == ["block", "brief", "in the leap", "behind it"]


@pytest.mark.promise("O4")
async def test_a_leap_during_a_run_does_not_change_its_duration() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
        await clock.advance(1)
        clock.step_wall(-800 * DAY)
        await clock.advance(1)
        await wire.ask("completion:cancel", request_id="r")
        ended = await wire.pushed("completion:result")
        assert ended["finished_at"] - ended["started_at"] == pytest.approx(2)
        assert ended["duration_ms"] == pytest.approx(2_000)


@pytest.mark.promise("O4")
async def test_health_shows_the_used_time_while_a_leap_lasts_and_the_leap_afterwards() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock) as (_, wire):
        assert (await wire.ask("system:health"))["clock"] == {"apart_seconds": 0.0, "leap": None}
        clock.step_wall(30 * DAY)
        health = await wire.ask("system:health")
        assert health["status"] == "degraded"
        assert any("KSI uses 2023-11-14T22:13:20Z" in problem for problem in health["problems"])
        assert health["clock"]["apart_seconds"] == 30 * DAY
        clock.step_wall(-30 * DAY)
        health = await wire.ask("system:health")
        assert health["status"] == "healthy"
        assert health["clock"]["leap"] == {"at": 1_700_000_000.0, "seconds": 30 * DAY, "standing": False}


@pytest.mark.promise("O4")
async def test_a_leap_that_is_followed_starts_the_requests_due_by_then_and_removes_nothing() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, retention={"clean_every": 1.0, "finished": 7_200.0}) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="done")
        await wire.ask("completion:async", prompt="x", request_id="later", delay=8 * HOUR)
        clock.step_wall(9 * HOUR)  # a virtual machine was paused for so long
        await clock.advance(HOUR - 60)
        assert await status(wire, "later") == "scheduled"
        await clock.advance(120)
        assert (await wire.pushed("completion:result"))["request_id"] == "later"
        assert await status(wire, "done") == "completed"


@pytest.mark.promise("O4", "Q7")
async def test_after_the_machines_sleep_due_requests_run_and_late_ones_expire() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="due", delay=HOUR)
        await wire.ask("completion:async", prompt="x", request_id="late", delay=2 * HOUR, ttl=HOUR)
        clock.sleep_machine(8 * HOUR)
        await clock.advance(1)
        ended = {(await wire.pushed("completion:result"))["request_id"] for _ in range(2)}
        assert ended == {"due", "late"}
        assert await status(wire, "due") == "completed"
        assert await status(wire, "late") == "expired"


@pytest.mark.promise("O4")
async def test_a_daemon_that_is_started_after_a_leap_forgets_nothing(tmp_path: Path) -> None:
    home = make_home(tmp_path, '[service]\ndefault_model = "stub/echo"\n[providers.stub]\nkind = "stub"\n')
    kept = home / "var" / "clock.json"
    boot, real = SystemClock().keep().boot, SystemClock().now().wall
    before = KeptTime(machine_boot(), boot, real - microseconds(100 * DAY))
    kept.parent.mkdir()
    kept.write_bytes(msgspec.json.encode(before))
    with DaemonProcess(home) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            done = await wire.ask("completion:request", prompt="x", request_id="done")
            assert done["finished_at"] * 1e6 == pytest.approx(before.wall, abs=microseconds(300))
            health = await wire.ask("system:health")
            assert health["clock"]["apart_seconds"] == pytest.approx(100 * DAY, abs=5)
    with DaemonProcess(home) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            assert await status(wire, "done") == "completed"

            async def seen_again() -> bool:
                lines = (home / "var" / "logs" / "daemon.log").read_text().splitlines()
                return [json.loads(line)["event"] for line in lines].count("wall clock leapt") == 2

            await until(seen_again)
    kept.unlink()
    with DaemonProcess(home) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            assert (await wire.ask("system:health"))["clock"]["apart_seconds"] == pytest.approx(0, abs=2)
