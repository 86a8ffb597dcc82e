"""A daemon's use of the disk, and its behaviour while there is little space."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ksi.completion.upkeep.disk_space import MIB
from ksi.store.sqlite.store import SqliteStore
from ksi.testing import SimulatedClock
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import answer, in_state, until

DATABASE = Path("var/db/ksi.db")


@pytest.mark.promise("O11", "S1")
async def test_below_the_reserve_new_work_is_refused_and_running_requests_end(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (daemon, wire):
        free = {"bytes": 100 * MIB}
        daemon._space._look = lambda folder: free["bytes"]
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options={"delay": 1.0}, session_id="s")
        await wire.ask("completion:async", prompt="y", request_id="behind", session_id="s")
        free["bytes"] = MIB

        async def degraded() -> bool:
            return any("disk_full" in problem for problem in (await wire.ask("system:health"))["problems"])

        await until(degraded)
        assert not (await wire.ask("system:ready"))["ready"]
        error = await wire.refused("completion:async", prompt="x", request_id="new")
        assert (error.code, error.retryable) == ("disk_full", True)
        assert error.details == {"free_bytes": MIB, "needed_bytes": 8 * MIB}
        await in_state(wire, "r", "completed")
        await in_state(wire, "behind", "completed")
        assert (await wire.refused("completion:get", request_id="new")).code == "not_found"
        free["bytes"] = 100 * MIB

        async def taken() -> bool:
            reply = await wire.post("completion:request", {"prompt": "x", "request_id": "new"})
            return "data" in reply

        await until(taken)
        assert (await wire.ask("completion:get", request_id="new"))["status"] == "completed"


@pytest.mark.promise("O11", "R7")
async def test_pruned_records_leave_the_disk_while_requests_continue(tmp_path: Path) -> None:
    retention = {"finished": 1.0, "sessions": 1.0, "clean_every": 0.2}
    async with daemon_and_wire(tmp_path, retention=retention) as (_, wire):
        path = tmp_path / DATABASE
        largest = 0
        while largest < 16 * MIB:
            asked = [wire.post("completion:request", {"prompt": "x" * 60_000}) for _ in range(100)]
            await asyncio.gather(*map(answer, asked))
            largest = max(largest, path.stat().st_size)

        async def small() -> bool:
            await wire.ask("completion:request", prompt="x")
            health = await wire.ask("system:health")
            return bool(health["store"]["database_bytes"] < 8 * MIB)

        await until(small, patience=60.0)


@pytest.mark.promise("O9", "O11")
@pytest.mark.parametrize("size", [1, 300_000])
async def test_a_step_of_pruning_is_small_however_long_conversations_and_texts_are(size: int) -> None:
    clock = SimulatedClock()
    retention = {"finished": 60.0, "sessions": 120.0, "clean_every": 10_000.0}
    async with daemon_and_wire(clock=clock, retention=retention) as (daemon, wire):
        store = daemon.store
        assert isinstance(store, SqliteStore)
        for name in ("a", "b", "c"):
            for _ in range(20):
                await wire.ask("completion:request", prompt="x" * size, session_id=name)
        await clock.advance(121)
        steps, gone, more = [], 0, True
        while more:
            before = store._writer.total_changes()
            pruned = await store.prune(clock.aged(), 12)
            steps.append(store._writer.total_changes() - before)
            gone += pruned.conversations
            more = pruned.more
        assert gone == 3
        assert (await store.totals()).conversations == 0
        # A request is two or three rows, a turn is two; 300,000 characters count for seven and more.
        assert max(steps) < (48 if size == 1 else 20)


@pytest.mark.promise("O11", "S3")
async def test_remains_of_killed_checkpoints_and_moves_are_removed_at_the_start(tmp_path: Path) -> None:
    checkpoints, run = tmp_path / "var" / "checkpoints", tmp_path / "var" / "run"
    checkpoints.mkdir(parents=True)
    left = [
        checkpoints / ".checkpoint-20261129T061900.000001Z.ksi.0a1b2c3d",
        run / "moving-999999999-x" / "records.ksi",
    ]
    others = [
        checkpoints / "checkpoint-20261129T061900.000001Z.ksi",
        checkpoints / ".keep",
        run / f"moving-{os.getppid()}-x" / "records.ksi",
    ]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"prompts")
    with capture_logs() as logs:
        async with daemon_and_wire(tmp_path):
            pass
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    (said,) = [entry for entry in logs if entry["event"] == "unfinished checkpoints were taken away"]
    assert said["paths"] == [str(left[0]), str(left[1].parent)]


@pytest.mark.promise("O2")
async def test_a_database_that_is_removed_without_traffic_is_noticed(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (daemon, wire):
        store = daemon.store
        assert isinstance(store, SqliteStore)
        path = tmp_path / DATABASE
        path.rename(path.with_name("aside"))

        async def noticed() -> bool:
            return store._committer.trouble is not None

        await until(noticed)
        assert not (await wire.ask("system:ready"))["ready"]
        path.with_name("aside").rename(path)

        async def ready() -> bool:
            return bool((await wire.ask("system:ready"))["ready"])

        await until(ready)
