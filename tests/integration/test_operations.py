"""An operator's day: files that are held, taken away or moved aside under a daemon that serves."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksi.cli.settings import Exit
from ksi.clock import Chance, SystemClock
from ksi.errors import StoreUnavailable
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules
from tests.daemon_process import CONFIG, DaemonProcess, clean_environ, make_home, start_command, start_in_vain
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Wire, answer, in_state, until

DATABASE = Path("var/db/ksi.db")
LOG = Path("var/logs/daemon.log")

HOLDER = """
import sqlite3, sys
held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
held.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
held.execute("ROLLBACK")
"""


class OtherProgram:
    """A backup tool that holds the database."""

    def __init__(self, database: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def let_go(self) -> None:
        self.process.communicate()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture
def process(home: Path) -> Iterator[DaemonProcess]:
    """A daemon to start; ended whatever becomes of the test."""
    process = DaemonProcess(home)
    yield process
    process.end(signal.SIGKILL)


def reachable(process: DaemonProcess) -> bool:
    return process.socket_path.is_socket()


async def comes_back(process: DaemonProcess) -> Json:
    """Wait until clients can connect; its health then."""

    async def look() -> Json | None:
        try:
            async with await Wire.open(process.socket_path) as wire:
                return await wire.ask("system:health")
        except OSError:
            return None

    health = await until(look)
    assert health is not None
    return health


# -- a database that another program holds ----------------------------------------------------------------------------


@pytest.mark.promise("O3")
async def test_a_database_that_another_program_holds_refuses_work_names_the_program_and_loses_nothing(
    tmp_path: Path,
) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="before", session_id="c")
        script = {"delay": 0.3}
        await wire.ask("completion:async", prompt="runs", request_id="r", session_id="c", provider_options=script)
        await wire.ask("completion:async", prompt="next", request_id="n", session_id="c")
        backup = OtherProgram(tmp_path / DATABASE)
        turns = 0
        refused = wire.post("completion:async", {"prompt": "x", "request_id": "during"})
        while not refused.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 1_000, "the loop stood still"
        error = (await refused)["error"]
        assert (error["code"], error["retryable"]) == ("store_unavailable", True)
        assert error["message"] == "another program holds the database for writing"
        (problem, *_) = (await wire.ask("system:health"))["problems"]
        assert f"another program holds the database for writing (pid {backup.process.pid})" in problem
        assert (await wire.ask("system:ready"))["ready"] is False
        assert (await wire.ask("completion:get", request_id="before"))["result"] == "echo: x", "reading goes on"
        assert (await wire.refused("completion:get", request_id="during")).code == "not_found"
        backup.let_go()
        first, second = [await wire.pushed("completion:result") for _ in range(2)]
        assert (first["request_id"], first["result"]) == ("r", "echo: runs")
        assert (second["request_id"], second["result"]) == ("n", "echo: next")
        assert len(first["attempts"]) == 1

        async def well() -> bool:
            return bool((await wire.ask("system:health"))["status"] == "healthy")

        await until(well)
        assert (await wire.ask("system:ready"))["ready"] is True


@pytest.mark.promise("O3")
async def test_a_database_that_is_held_for_a_moment_delays_and_refuses_nothing(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        backup = OtherProgram(tmp_path / DATABASE)
        asked = [wire.post("completion:request", {"prompt": str(number)}) for number in range(20)]
        await wire.ask("system:ready")
        backup.let_go()
        replies = [await answer(one) for one in asked]
        assert [reply["result"] for reply in replies] == [f"echo: {number}" for number in range(20)]


@pytest.mark.promise("O3", "R6")
async def test_a_daemon_stops_in_order_while_its_database_is_held(home: Path, process: DaemonProcess) -> None:
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:async", prompt="x", request_id="r", model="slow/x")
        backup = OtherProgram(home / DATABASE)
        try:
            assert process.end(signal.SIGTERM) == 0
        finally:
            backup.let_go()
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await in_state(wire, "r", "running")


@pytest.mark.promise("O3", "L5")
async def test_a_client_that_goes_while_the_database_is_held_leaves_the_line_when_it_is_free(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (daemon, wire):
        await wire.ask("conversation:acquire_lock", request_id="holder", conversation_id="c")
        async with await Wire.open(daemon.config.socket_path) as gone:
            await gone.ask("conversation:acquire_lock", request_id="waiter", conversation_id="c", while_connected=True)
            backup = OtherProgram(tmp_path / DATABASE)

        async def told() -> bool:
            return (await wire.ask("system:ready"))["ready"] is False

        await until(told)
        backup.let_go()

        async def left() -> bool:
            return bool((await wire.ask("conversation:lock_status", conversation_id="c"))["queue"] == [])

        await until(left)


# -- a database that was taken away -----------------------------------------------------------------------------------


@pytest.mark.promise("O2")
@pytest.mark.parametrize("name", ["ksi.db", "ksi.db-wal", "ksi.db-shm"])
async def test_nothing_is_acknowledged_once_a_file_of_the_database_was_removed(tmp_path: Path, name: str) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="before")
        (tmp_path / DATABASE).with_name(name).unlink()
        error = await wire.refused("completion:async", prompt="x", request_id="after")
        assert error.code == "store_unavailable"
        assert f"{name} is gone" in error.message
        assert any(name in problem for problem in (await wire.ask("system:health"))["problems"])
        assert (await wire.ask("system:ready"))["ready"] is False
    if name != "ksi.db":
        async with daemon_and_wire(tmp_path) as (_, wire):
            assert (await wire.ask("completion:get", request_id="before"))["result"] == "echo: x", "saved at the stop"
            assert (await wire.refused("completion:get", request_id="after")).code == "not_found"


@pytest.mark.promise("O2")
async def test_a_folder_that_is_moved_away_and_back_costs_only_the_time_between(tmp_path: Path) -> None:
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="before")
        folder = (tmp_path / DATABASE).parent
        folder.rename(tmp_path / "elsewhere")
        await wire.refused("completion:async", prompt="x")
        (tmp_path / "elsewhere").rename(folder)
        assert (await wire.ask("completion:request", prompt="y", request_id="after"))["result"] == "echo: y"

        async def well() -> bool:
            return bool((await wire.ask("system:health"))["status"] == "healthy")

        await until(well)


@pytest.mark.promise("O2", "Q3")
async def test_a_store_whose_files_are_gone_removes_none_of_those_that_took_their_place(tmp_path: Path) -> None:
    path = tmp_path / "db" / "ksi.db"
    clock = SystemClock()
    first = SqliteStore(path, StoreRules(), Chance())
    await first.open(clock.now(), lambda: None)
    shutil.rmtree(path.parent)
    second = SqliteStore(path, StoreRules(), Chance())
    await second.open(clock.now(), lambda: None)
    theirs = {file.name: file.stat().st_ino for file in path.parent.iterdir()}
    with pytest.raises(StoreUnavailable, match="was replaced by another file"):
        await first.expire(clock.now())
    assert not first.condition().serving
    await first.close()
    assert {file.name: file.stat().st_ino for file in path.parent.iterdir()} == theirs
    await second.close()


# -- two daemons ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("O2")
async def test_a_second_daemon_never_gets_the_database_whatever_else_was_removed(
    home: Path, process: DaemonProcess
) -> None:
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        shutil.rmtree(home / "var/run")
        (home / "var/db/ksi.db.lock").unlink()
        refused = start_in_vain(home)
        assert refused.returncode == Exit.FAILED
        assert f"(pid {process.pid})" in refused.stderr
        assert (await wire.ask("completion:request", prompt="x"))["result"] == "echo: x"
    health = await comes_back(process)
    assert health["pid"] == process.pid
    assert health["status"] == "healthy"
    assert process.end(signal.SIGTERM) == 0


@pytest.mark.promise("O2")
async def test_a_daemon_whose_whole_house_was_taken_over_ends_in_order(home: Path, process: DaemonProcess) -> None:
    process.start()
    assert process.process is not None
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not come back before the other one is there
    shutil.rmtree(home / "var")
    second = DaemonProcess(home)
    try:
        second.start()
        os.kill(process.pid, signal.SIGCONT)
        assert await asyncio.to_thread(process.process.wait, 30) == 0
        assert (await comes_back(second))["pid"] == second.pid
        async with await Wire.open(second.socket_path) as wire:
            assert (await wire.ask("completion:request", prompt="x"))["result"] == "echo: x"
    finally:
        second.end(signal.SIGTERM)


@pytest.mark.promise("O2")
@pytest.mark.parametrize("what", ["var/run", "var/run/daemon.sock", "var/run/daemon.pid"])
async def test_a_running_daemon_comes_back_if_its_folder_was_removed(
    home: Path, process: DaemonProcess, what: str
) -> None:
    process.start()
    path = home / what
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()

    async def back() -> bool:
        return (home / "var/run/daemon.pid").exists() and reachable(process)

    await until(back)
    assert (await comes_back(process))["pid"] == process.pid
    pid = process.pid
    assert ksi(home, "stop").startswith(f"ksi has stopped (pid {pid}, home ")
    assert list((home / "var/run").glob("daemon.*")) == []


# -- logs -------------------------------------------------------------------------------------------------------------


def ksi(home: Path, *words: str, umask: int = 0o022) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ksi.cli", "--home", str(home), *words],
        env=clean_environ(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        umask=umask,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.promise("O1")
@pytest.mark.parametrize("background", [False, True], ids=["in the foreground", "in the background"])
async def test_a_hangup_ends_nothing_and_the_log_goes_on_in_a_new_file(
    home: Path, process: DaemonProcess, background: bool
) -> None:
    if background:
        ksi(home, "start")
    else:
        process.start()
    pid = int((home / "var/run/daemon.pid").read_text())
    try:
        aside = home / "var/logs/daemon.log.1"
        (home / LOG).rename(aside)
        before = aside.read_bytes()
        os.kill(pid, signal.SIGHUP)

        async def reopened() -> bool:
            return (home / LOG).exists()

        await until(reopened)
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("system:health"))["status"] == "healthy"
    finally:
        ksi(home, "stop") if background else process.end(signal.SIGTERM)
    events = [json.loads(line)["event"] for line in (home / LOG).read_text().splitlines()]
    assert events == ["stopping", "stopped"]
    assert aside.read_bytes() == before


@pytest.mark.promise("O1")
async def test_the_log_of_a_daemon_is_bounded_and_shown_as_one(home: Path) -> None:
    failing = '[log]\nlevel = "debug"\nmax_bytes = 4000\nkeep = 2\n[retention]\nclean_every = 0.01\n'
    make_home(home, CONFIG + failing)
    ksi(home, "start")
    try:

        async def turned_over() -> bool:
            return (home / "var/logs/daemon.log.2").exists()

        await until(turned_over)
        lines = ksi(home, "logs", "-n", "15").splitlines()
        assert len(lines) == 15
        assert all(json.loads(line)["event"] for line in lines)
    finally:
        ksi(home, "stop")
    logs = sorted((home / "var/logs").glob("daemon.log*"))
    assert [path.name for path in logs] == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(path.stat().st_size <= 4000 for path in logs)


@pytest.mark.promise("O1", "S3")
@pytest.mark.parametrize("umask", [0o000, 0o022], ids=oct)
async def test_whatever_the_umask_nothing_is_for_others(home: Path, umask: int) -> None:
    ksi(home, "start", umask=umask)
    try:
        ksi(home, "ask", "x", "--session", "c", umask=umask)
        ksi(home, "checkpoint", "save", umask=umask)

        async def logged() -> bool:
            return (home / "var/logs/responses/c.jsonl").exists()

        await until(logged)
        open_to_others = [
            str(path.relative_to(home))
            for path in (home / "var").rglob("*")
            if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077
        ]
        assert open_to_others == []
        assert stat.S_IMODE((home / "var").stat().st_mode) == 0o700
    finally:
        ksi(home, "stop")


@pytest.mark.promise("O1")
async def test_an_older_house_that_was_open_to_others_is_closed_at_the_start(
    home: Path, process: DaemonProcess
) -> None:
    for folder in ("var", "var/logs", "var/logs/responses", "var/db", "var/run"):
        (home / folder).mkdir(exist_ok=True)
        (home / folder).chmod(0o777)
    (home / LOG).write_text("")
    (home / LOG).chmod(0o644)
    process.start()
    for folder in ("var", "var/logs", "var/logs/responses", "var/db", "var/run"):
        assert stat.S_IMODE((home / folder).stat().st_mode) == 0o700, folder
    assert stat.S_IMODE((home / LOG).stat().st_mode) == 0o600


@pytest.mark.promise("O1")
async def test_response_files_end_with_their_sessions_and_health_shows_their_size_on_the_disk(tmp_path: Path) -> None:
    retention = {"finished": 0.2, "sessions": 0.4, "clean_every": 0.1}
    async with daemon_and_wire(tmp_path, retention=retention) as (_, wire):
        folder = tmp_path / "var/logs/responses"
        for number in range(3):
            await wire.ask("completion:request", prompt="x", session_id=f"s{number}")

        async def written() -> bool:
            return len(list(folder.iterdir())) == 3

        async def gone() -> bool:
            return not list(folder.iterdir())

        await until(written)
        await until(gone)
        health = await wire.ask("system:health")
        assert health["responses"] == {"files": 0, "bytes": 0}
        assert health["store"]["database_bytes"] == (tmp_path / DATABASE).stat().st_size
        assert health["store"]["log_bytes"] > 0
        assert health["disk"]["free_bytes"] > 0


def start_into_nothing(home: Path) -> subprocess.Popen[bytes]:
    """A daemon whose stdout and stderr are a full disk."""
    with Path("/dev/full").open("wb") as full:
        return subprocess.Popen(
            start_command(home), stdin=subprocess.DEVNULL, stdout=full, stderr=full, env=clean_environ()
        )


@pytest.mark.promise("O1")
async def test_a_daemon_without_a_reader_of_its_output_serves_all_the_same(home: Path) -> None:
    process = start_into_nothing(home)
    try:

        async def served() -> Json | None:
            try:
                async with await Wire.open(home / "var/run/daemon.sock") as wire:
                    return await wire.ask("completion:request", prompt="x")
            except OSError:
                return None

        reply = await until(served)
        assert reply is not None
        assert reply["result"] == "echo: x"
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)
