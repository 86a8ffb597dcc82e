"""A full disk: clients get an error, nothing is lost or half done, and with free space everything continues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.integration.serving import daemon_and_wire
from tests.integration.wire import PATIENCE, Json, in_state, until


class Disk(apsw.VFS):
    """The machine's disk, that a test can fill. SQLite uses it for every database while it is registered."""

    def __init__(self) -> None:
        self.beneath = apsw.vfs_names()[0]
        self.full = False
        self.broken = False
        self.damaged = False
        self.sync_time = 0.0
        """Seconds that a sync takes; if it is long, commits are made off the loop."""
        self.refusals = 0
        super().__init__("fillable", self.beneath, makedefault=True)

    def xOpen(self, name: Any, flags: Any) -> DiskFile:  # noqa: N802 — SQLite's name
        return DiskFile(self, name, flags)


class DiskFile(apsw.VFSFile):
    """A file on it. Only the write-ahead log meets a full disk: the database keeps its pages, and commits go to the
    log."""

    def __init__(self, disk: Disk, name: Any, flags: Any) -> None:
        self._disk = disk
        self._grows = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__(disk.beneath, name, flags)

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
        if self._disk.full and self._grows:
            self._disk.refusals += 1
            raise apsw.FullError("no space left on device")
        if self._disk.damaged and self._grows:
            raise apsw.CorruptError("database disk image is malformed")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._disk.broken:
            self._disk.refusals += 1
            raise apsw.IOError("input/output error")
        time.sleep(self._disk.sync_time)
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.unregister()


FAULTS = {"full": "store_full", "broken": "store_unavailable"}


@pytest.mark.promise("Q3", "S1")
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_change_that_cannot_be_written_is_refused_and_not_accepted(
    tmp_path: Path, disk: Disk, fault: str
) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="before", session_id="c")
        setattr(disk, fault, True)
        for event, data in (
            ("completion:async", {"prompt": "x", "request_id": "during"}),
            ("completion:request", {"prompt": "x", "request_id": "during"}),
            ("completion:async", {"prompt": "x", "request_id": "during", "delay": 60}),
            ("conversation:acquire_lock", {"request_id": "lock", "conversation_id": "c"}),
        ):
            error = await wire.refused(event, **data)
            assert (error.code, error.retryable) == (FAULTS[fault], True)
            assert error.message
        assert (await wire.ask("completion:get", request_id="before"))["result"] == "echo: x", "reading goes on"
        assert (await wire.refused("completion:get", request_id="during")).code == "not_found"
        assert (await wire.ask("conversation:lock_status", conversation_id="c"))["locked"] is False
        figures = await wire.ask("completion:queue_status")
        assert [figures[name] for name in ("queued", "active", "scheduled", "completed")] == [0, 0, 0, 1]
        setattr(disk, fault, False)
        assert (await wire.ask("completion:request", prompt="x", request_id="during"))["result"] == "echo: x"
        assert (await wire.ask("system:health"))["status"] == "healthy"
        assert disk.refusals > 0


@pytest.mark.promise("F10", "L1", "Q3")
@pytest.mark.parametrize("sync_time", [0.0, 0.004], ids=["fast", "slow"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_an_answer_that_cannot_be_written_waits_for_room_and_keeps_its_lock(
    tmp_path: Path, disk: Disk, fault: str, sync_time: float
) -> None:
    disk.sync_time = sync_time
    stub = {"kind": "stub", "max_concurrency": 4, "record": "record.tsv"}
    async with daemon_and_wire(tmp_path, providers={"stub": stub, "other": {"kind": "stub"}}) as (_, wire):
        for _ in range(20):  # enough for the daemon to learn how slow the disk is
            await wire.ask("completion:request", prompt="x", model="other/x")
        script = {"delay": 0.1}
        await wire.ask("completion:async", prompt="kept", request_id="r", session_id="c", provider_options=script)
        await wire.ask("completion:async", prompt="next", request_id="n", session_id="c")
        setattr(disk, fault, True)
        before = disk.refusals

        async def tried_twice() -> bool:
            return disk.refusals >= before + 2

        await until(tried_twice)
        assert (await wire.ask("completion:get", request_id="r"))["status"] == "running"
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        assert (status["holder"], status["queue"][0]["request_id"]) == ("r", "n")
        setattr(disk, fault, False)
        first, second = [await wire.pushed("completion:result") for _ in range(2)]
        assert (first["request_id"], first["result"]) == ("r", "echo: kept")
        assert (second["request_id"], second["result"]) == ("n", "echo: next")
        assert len(first["attempts"]) == 1, "asked once, paid once"
    words = [line.split("\t")[:4:3] for line in (tmp_path / "record.tsv").read_text().splitlines()]
    assert words == [["begin", "r"], ["end", "r"], ["begin", "n"], ["end", "n"]]


@pytest.mark.promise("Q3", "R1")
async def test_a_database_that_is_known_to_be_damaged_takes_no_new_work_and_lets_nobody_wait(
    tmp_path: Path, disk: Disk
) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("conversation:acquire_lock", request_id="lock", conversation_id="c")
        waiting = wire.post("completion:request", {"prompt": "x", "request_id": "r", "session_id": "c"})
        await in_state(wire, "r", "queued")
        disk.damaged = True
        assert (await wire.refused("conversation:release_lock", request_id="lock")).code == "store_unavailable"
        for event, data in (
            ("completion:async", {"prompt": "x", "request_id": "new"}),
            ("conversation:acquire_lock", {"request_id": "other", "conversation_id": "d"}),
        ):
            error = await wire.refused(event, **data)
            assert error.code == "store_unavailable"
            assert "restore a backup" in error.message
        async with asyncio.timeout(PATIENCE):
            assert (await waiting)["error"]["code"] == "store_unavailable"
        disk.damaged = False
        assert (await wire.refused("completion:async", prompt="x", request_id="new")).code == "store_unavailable"
        assert (await wire.ask("completion:get", request_id="r"))["status"] == "queued"
        assert (await wire.ask("system:ready"))["ready"] is False


@pytest.mark.promise("Q3", "Q7")
async def test_a_request_that_falls_due_while_the_disk_is_full_runs_when_there_is_room(
    tmp_path: Path, disk: Disk
) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="r", delay=0.05)
        disk.full = True
        before = disk.refusals

        async def tried() -> bool:
            return disk.refusals > before

        await until(tried)
        assert (await wire.ask("completion:get", request_id="r"))["status"] == "scheduled"
        disk.full = False
        assert (await wire.pushed("completion:result"))["request_id"] == "r"


@pytest.mark.promise("Q3")
@pytest.mark.parametrize("sync_time", [0.0, 0.004], ids=["fast", "slow"])
async def test_under_load_only_refused_requests_are_missing(tmp_path: Path, disk: Disk, sync_time: float) -> None:
    disk.sync_time = sync_time
    async with daemon_and_wire(tmp_path) as (_, wire):

        async def submit(number: int) -> str | None:
            data = {"prompt": str(number), "request_id": f"r{number}", "session_id": f"c{number % 5}"}
            reply = await wire.post("completion:async", data)
            if "error" in reply:
                assert reply["error"]["code"] == "store_full"
                return None
            return f"r{number}"

        taken: set[str] = set()
        for burst in range(20):
            disk.full = burst % 3 == 1
            names = await asyncio.gather(*(submit(burst * 10 + n) for n in range(10)))
            taken |= {name for name in names if name is not None}
        disk.full = False
        assert 0 < len(taken) < 200
        for name in taken:
            reply = await in_state(wire, name, "completed")
            assert reply["result"] == f"echo: {name[1:]}"
        for name in {f"r{number}" for number in range(200)} - taken:
            assert (await wire.refused("completion:get", request_id=name)).code == "not_found"
        figures = await wire.ask("completion:queue_status")
        assert figures["completed"] == len(taken)
        assert figures["locked_conversations"] == 0


@pytest.mark.promise("Q3", "R6")
async def test_a_daemon_that_stops_on_a_full_disk_ends_and_the_next_one_reruns_unwritten_requests(
    tmp_path: Path, disk: Disk
) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="r", provider_options={"delay": 0.05})
        disk.full = True
        before = disk.refusals

        async def tried() -> bool:
            return disk.refusals > before

        await until(tried)
    disk.full = False
    async with daemon_and_wire(tmp_path) as (_, wire):
        reply: Json = await wire.ask("completion:wait", request_id="r")
        assert (reply["status"], reply["result"]) == ("completed", "echo: x")


@pytest.mark.promise("Q3")
async def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    """SQLite's own limit, as a quota sets it."""
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x")
    database = apsw.Connection(str(tmp_path / "var" / "db" / "ksi.db"))
    pages = int(str(database.pragma("page_count")))
    database.close()

    class Quota(apsw.VFS):
        """Says that a file beyond so many bytes has no room."""

        def __init__(self) -> None:
            self.beneath = apsw.vfs_names()[0]
            super().__init__("quota", self.beneath, makedefault=True)

        def xOpen(self, name: Any, flags: Any) -> QuotaFile:  # noqa: N802
            return QuotaFile(self.beneath, name, flags)

    class QuotaFile(apsw.VFSFile):
        def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
            if offset > (pages + 200) * 4096:
                raise apsw.FullError("quota")
            super().xWrite(data, offset)

    quota = Quota()
    try:
        async with daemon_and_wire(tmp_path) as (_, wire):
            big = await wire.refused("completion:async", prompt="x" * 3_000_000, request_id="big")
            assert big.code == "store_full"
            assert (await wire.ask("completion:request", prompt="small"))["result"] == "echo: small"
    finally:
        quota.unregister()
