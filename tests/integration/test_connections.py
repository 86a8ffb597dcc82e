"""Clients that are many, slow, half closed, foreign or gone: the cost of each is bounded, and no other client
notices."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from ksi.daemon.daemon import Daemon
from ksi.testing import running_daemon
from tests.daemon_process import DaemonProcess, make_home
from tests.integration.conftest import Connect
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import PATIENCE, Json, Wire, answer, until

MIB = 1024 * 1024

SMALL_BACKLOG = """\
[service]
default_model = "stub/echo"

[socket]
max_backlog = 2_000_000

[log]
responses = false

[providers.stub]
kind = "stub"
max_concurrency = 64
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[tuple[DaemonProcess, socket.socket]]:
    """A daemon process that holds at most 2 MB for a slow client, and a connection without a reader."""
    with (
        DaemonProcess(make_home(tmp_path, SMALL_BACKLOG)) as process,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        connection.connect(str(process.socket_path))
        connection.setblocking(False)
        yield process, connection


async def rest_of(connection: socket.socket) -> list[Json]:
    """All lines to the end of a connection."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    async with asyncio.timeout(PATIENCE):
        while piece := await loop.sock_recv(connection, 1 << 20):
            data += piece
    return [json.loads(line) for line in data.splitlines()]


async def first_of(connection: socket.socket, count: int) -> list[Json]:
    """This many lines of a connection."""
    loop = asyncio.get_running_loop()
    lines: list[Json] = []
    rest = b""
    async with asyncio.timeout(PATIENCE):
        while len(lines) < count:
            *whole, rest = (rest + await loop.sock_recv(connection, 1 << 20)).split(b"\n")
            lines += map(json.loads, whole)
    return lines


async def lives(wire: Wire) -> None:
    assert (await wire.ask("completion:request", prompt="x"))["result"] == "echo: x"


# Many


async def alone(wire: Wire) -> None:
    """Wait until no other client is connected."""

    async def look() -> bool:
        return bool((await wire.ask("system:health"))["connections"] == 1)

    await until(look)


@pytest.mark.promise("S4")
async def test_a_thousand_idle_connections_disturb_no_other(tmp_path: Path, many_files: None) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            before = (await wire.ask("system:health"))["memory_bytes"]
            idle = [await asyncio.open_unix_connection(str(process.socket_path)) for _ in range(1_000)]

            async def all_there() -> bool:
                health: Json = await wire.ask("system:health")
                return bool(health["connections"] == 1_001)

            await until(all_there)
            await lives(wire)
            after = await wire.ask("system:health")
            assert after["status"] == "healthy"
            assert after["memory_bytes"] - before < 50 * MIB
            reader, writer = idle[500]
            writer.write(b'{"event": "system:ready"}\n')
            assert json.loads(await reader.readline())["data"]["ready"] is True
            for _, writer in idle:
                writer.close()

            async def all_gone() -> bool:
                health: Json = await wire.ask("system:health")
                return bool(health["connections"] == 1)

            await until(all_gone)


@pytest.mark.promise("S4")
async def test_above_the_limit_of_connections_new_ones_are_closed_and_old_ones_live() -> None:
    async with daemon_and_wire(socket={"max_connections": 3}) as (daemon, wire):
        path = daemon.config.socket_path
        others = [await Wire.open(path) for _ in range(2)]
        for other in others:
            await lives(other)
        surplus = await Wire.open(path)
        await surplus.end()
        assert [line["error"]["code"] for line in surplus.lines] == ["too_many_connections"]
        await lives(wire)
        await others[0].leave()

        async def room() -> bool:
            return daemon.socket.connections < 3

        await until(room)
        late = await Wire.open(path)
        await lives(late)
        for one in (*others, surplus, late):
            await one.leave()


@pytest.mark.promise("R3", "S4")
async def test_a_daemon_out_of_file_descriptors_serves_whom_it_has_and_recovers(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path), files=64) as process:
        async with await Wire.open(process.socket_path) as wire:
            async with AsyncExitStack() as crowd:
                for _ in range(100):
                    await crowd.enter_async_context(await Wire.open(process.socket_path))
                reply = await wire.ask("completion:request", prompt="x", session_id="c")
                assert reply["result"] == "echo: x"
                assert (await wire.ask("completion:status"))["completed"] == 1
            await alone(wire)

            async def healthy() -> bool:
                return bool((await wire.ask("system:health"))["status"] == "healthy")

            await until(healthy)
            async with await Wire.open(process.socket_path) as late:
                await lives(late)
    (line,) = (tmp_path / "var" / "logs" / "responses" / "c.jsonl").read_text().splitlines()
    assert json.loads(line)["response"]["result"] == "echo: x"


@pytest.mark.promise("S1")
async def test_thousands_of_lines_at_once_are_all_answered(wire: Wire) -> None:
    futures = [wire.post("completion:request", {"prompt": str(number)}) for number in range(2_000)]
    for number, future in enumerate(futures):
        assert (await answer(future))["result"] == f"echo: {number}"


@pytest.mark.promise("S1")
async def test_a_slow_request_blocks_no_other_on_its_connection(wire: Wire) -> None:
    slow = wire.post("completion:request", {"prompt": "x", "request_id": "slow", "provider_options": LONG})
    await lives(wire)
    assert not slow.done()
    await wire.ask("completion:cancel", request_id="slow")
    assert (await answer(slow))["status"] == "cancelled"


# Slow


@pytest.mark.promise("S4", "R1")
async def test_a_subscriber_that_never_reads_is_disconnected(deaf: tuple[DaemonProcess, socket.socket]) -> None:
    process, connection = deaf
    connection.send(b'{"event": "monitor:subscribe", "data": {"pattern": "*"}}\n')
    async with await Wire.open(process.socket_path) as wire:
        for _ in range(20):  # 10 MB of results for those who listen
            assert (await wire.ask("completion:request", prompt="x" * 500_000))["status"] == "completed"

        async def healthy() -> bool:
            return bool((await wire.ask("system:health"))["status"] == "healthy")

        await until(healthy)
        await alone(wire)


@pytest.mark.promise("S4", "R1")
async def test_a_client_that_asks_and_does_not_read_costs_bounded_memory_and_gets_all_when_it_reads(
    deaf: tuple[DaemonProcess, socket.socket],
) -> None:
    process, connection = deaf
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:request", prompt="x" * 400_000, request_id="big")
        before = (await wire.ask("system:health"))["memory_bytes"]
        events: list[Json] = [
            {"event": "completion:async", "data": {"prompt": "y", "request_id": f"r{number}"}} for number in range(5)
        ]
        events += [{"event": "completion:get", "data": {"request_id": "big"}}] * 500  # 200 MB
        connection.send(b"".join(json.dumps(event).encode() + b"\n" for event in events))
        for number in range(5):
            await in_state_when_known(wire, f"r{number}")
        assert (await wire.ask("system:health"))["memory_bytes"] - before < 50 * MIB
        assert (await wire.ask("system:health"))["connections"] == 2, "it is not served further, and stays"
        replies = await first_of(connection, 510)
        assert sum(line["event"] == "completion:get" for line in replies) == 500, "when it reads, it gets all"
        assert all("data" in line for line in replies)
        assert (await wire.ask("system:health"))["memory_bytes"] - before < 50 * MIB


@pytest.mark.promise("S4")
async def test_a_client_that_reads_slowly_but_within_the_bound_loses_nothing(
    deaf: tuple[DaemonProcess, socket.socket],
) -> None:
    process, connection = deaf
    loop = asyncio.get_running_loop()
    async with await Wire.open(process.socket_path) as wire:
        for number in range(40):
            data = {"prompt": "x" * 10_000, "request_id": f"r{number}", "session_id": "c"}
            line = json.dumps({"event": "completion:async", "data": data}).encode() + b"\n"
            await loop.sock_sendall(connection, line)
        await in_state_when_known(wire, "r39")
        connection.shutdown(socket.SHUT_WR)
        lines = await rest_of(connection)
    results = [line["data"]["request_id"] for line in lines if line["event"] == "completion:result"]
    assert sorted(results) == sorted(f"r{number}" for number in range(40))
    assert all("error" not in line for line in lines)


async def in_state_when_known(wire: Wire, request_id: str) -> None:
    """Wait for the end of a request that another connection may still be sending."""

    async def known() -> bool:
        reply = await wire.post("completion:get", {"request_id": request_id})
        return "data" in reply and reply["data"]["status"] == "completed"

    await until(known)


# Half closed


@pytest.mark.promise("S1")
async def test_a_client_that_closes_its_writing_side_still_gets_all_it_is_owed(connect: Connect) -> None:
    wire = await connect()
    script = {"delay": 0.05}
    sync = wire.post("completion:request", {"prompt": "sync", "provider_options": script})
    late = await wire.ask("completion:async", prompt="async", request_id="a", provider_options={"delay": 0.1})
    waiting = wire.post("completion:wait", {"request_id": "a"})
    wire.raw(b'{"event": "completion:status", "data": {}}')  # and no newline, as printf leaves it
    wire.shut()
    await wire.end()
    assert (await answer(sync))["result"] == "echo: sync"
    assert late["status"] == "ready"
    assert (await answer(waiting))["result"] == "echo: async"
    status, result = sorted(wire.lines, key=lambda line: str(line["event"]), reverse=True)
    assert status["data"]["status"] == "ok"
    assert (result["event"], result["data"]["result"]) == ("completion:result", "echo: async")


@pytest.mark.promise("S1")
async def test_a_line_of_nc_is_answered_with_one_line_and_the_end(served: Daemon) -> None:
    reader, writer = await asyncio.open_unix_connection(str(served.config.socket_path))
    writer.write(b'{"event": "completion:status", "data": {}}\n')
    writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        lines = (await reader.read()).splitlines()
    (line,) = map(json.loads, lines)
    assert line["event"] == "completion:status"
    writer.close()


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    "last",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half a line"),
        pytest.param(b'{"event": "nonsense"}', id="an unknown event"),
        pytest.param(b'{"event": "completion:async", "data": {"prompt": "x", "model": "no/x"}}', id="a refusal"),
        pytest.param(b'{"event": "completion:cancel", "data": {"request_id": "done"}}', id="a cancel of what is final"),
        pytest.param(b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "done"}}', id="an attach"),
        pytest.param(b'{"event": "completion:wait", "data": {"request_id": "done", "timeout": 5}}', id="a wait"),
        pytest.param(b'{"event": "completion:wait", "data": {"request_id": "runs", "timeout": 0.01}}', id="a timeout"),
        pytest.param(
            b'{"event": "conversation:acquire_lock", "data": {"request_id": "l", "conversation_id": "free"}}',
            id="a lock that is free",
        ),
        pytest.param(
            b'{"event": "conversation:acquire_lock",'
            b' "data": {"request_id": "l", "conversation_id": "taken", "timeout": 0.01}}',
            id="a lock that is not granted in time",
        ),
        pytest.param(
            b'{"event": "conversation:acquire_lock",'
            b' "data": {"request_id": "l", "conversation_id": "taken", "wait": false}}',
            id="a lock that is taken",
        ),
    ],
)
async def test_a_half_closed_connection_ends_when_nothing_more_can_come(
    wire: Wire, connect: Connect, last: bytes
) -> None:
    await wire.ask("completion:request", prompt="x", request_id="done")
    await wire.ask("completion:async", prompt="x", request_id="runs", session_id="taken", provider_options=LONG)
    leaving = await connect()
    leaving.raw(last)
    leaving.shut()
    await leaving.end()
    assert len(leaving.lines) >= (last != b"")


@pytest.mark.promise("L5", "S1")
async def test_a_half_closed_waiter_for_a_lock_gets_its_grant_and_then_the_end(wire: Wire, connect: Connect) -> None:
    await wire.ask("conversation:acquire_lock", request_id="first", conversation_id="c")
    waiter = await connect()
    assert (await waiter.ask("conversation:acquire_lock", request_id="second", conversation_id="c"))["position"] == 1
    waiter.shut()
    await wire.ask("conversation:release_lock", request_id="first")
    assert (await waiter.pushed("conversation:locked"))["request_id"] == "second"
    await waiter.end()


@pytest.mark.promise("F8", "L5", "S1")
async def test_a_half_closed_waiter_whose_wait_is_cancelled_is_notified_and_closed(
    wire: Wire, connect: Connect
) -> None:
    await wire.ask("conversation:acquire_lock", request_id="first", conversation_id="c")
    waiter = await connect()
    await waiter.ask("conversation:acquire_lock", request_id="second", conversation_id="c")
    waiter.shut()
    assert (await wire.ask("completion:cancel", request_id="second"))["status"] == "cancelled"
    await waiter.end()
    (told,) = waiter.lines
    assert told["data"]["request_id"] == "second"


@pytest.mark.promise("F8", "Q7", "S1")
@pytest.mark.parametrize("state", ["queued", "scheduled", "expired"])
async def test_a_half_closed_submitter_is_closed_when_its_request_ends_without_running(
    wire: Wire, connect: Connect, state: str
) -> None:
    await wire.ask("completion:async", prompt="x", session_id="c", provider_options=LONG)
    submitter = await connect()
    when: dict[str, Json] = {"queued": {}, "scheduled": {"delay": 600}, "expired": {"ttl": 0.01}}
    await submitter.ask("completion:async", prompt="x", request_id="r", session_id="c", **when[state])
    submitter.shut()
    if state != "expired":
        await wire.ask("completion:cancel", request_id="r")
    await submitter.end()
    (told,) = submitter.lines
    assert told["data"]["status"] == ("expired" if state == "expired" else "cancelled")


@pytest.mark.promise("S1")
async def test_a_half_closed_subscriber_goes_on_listening(wire: Wire, connect: Connect) -> None:
    watcher = await connect()
    await watcher.ask("monitor:subscribe", pattern="completion:result")
    watcher.shut()
    await lives(wire)
    await watcher.pushed("completion:result")
    assert not watcher.closed


# Foreign


@pytest.mark.promise("S2")
async def test_socket_and_folder_are_for_this_user_only(tmp_path: Path) -> None:
    run_dir = tmp_path / "var" / "run"
    run_dir.mkdir(parents=True, mode=0o777)
    run_dir.chmod(0o777)
    async with running_daemon(tmp_path) as daemon:
        path = daemon.config.socket_path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        for private in (tmp_path / "var" / "db").iterdir():
            assert stat.S_IMODE(private.stat().st_mode) & 0o077 == 0, private
        folder = tmp_path / "var" / "logs" / "responses"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


class Peer:
    """A socket whose other end belongs to some user."""

    def __init__(self, uid: int) -> None:
        self._credentials = struct.pack("3i", 1, uid, uid)

    def getsockopt(self, *_: int) -> bytes:
        return self._credentials


class Line(asyncio.Transport):
    """A transport to a peer."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._peer if name == "socket" else default

    def close(self) -> None:
        self.closed = True


@pytest.mark.promise("S2")
async def test_another_user_s_client_is_turned_away_and_root_s_and_ours_are_not(served: Daemon) -> None:
    import os

    from ksi.transports.unix_socket import SocketConnection

    us = os.geteuid()
    for uid, welcome in ((us, True), (0, True), (us + 1, False), (65_534, False)):
        transport = Line(Peer(uid))
        connection = SocketConnection(served.socket)
        before = served.socket.connections
        connection.connection_made(transport)
        assert transport.closed is not welcome
        assert served.socket.connections == before + welcome
        connection.connection_lost(None)
        assert served.socket.connections == before


NETCAT = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
for line in sys.stdin:
    connection.sendall(line.encode())
while data := connection.recv(65536):
    sys.stdout.write(data.decode())
"""


def piped(tmp_path: Path, name: str, socket_path: Path, *lines: Json) -> subprocess.Popen[str]:
    """A program of this name that sends lines and, like Debian's netcat, then waits without closing its side."""
    program = tmp_path / name
    program.symlink_to(sys.executable)
    process = subprocess.Popen(
        [program, "-c", NETCAT, socket_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
    process.stdin.close()
    process.stdin = None
    return process


@pytest.mark.promise("S1")
def test_a_netcat_that_keeps_its_side_open_ends_when_it_has_all_that_it_asked_for(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path / "home")) as process:
        path = process.socket_path
        status: Json = {"event": "completion:status", "data": {}}
        submit: Json = {"event": "completion:async", "data": {"prompt": "x", "model": "drip/x"}}
        nc = piped(tmp_path, "nc", path, status, submit)
        printed = [json.loads(line) for line in nc.communicate(timeout=60)[0].splitlines()]
        assert [line["event"] for line in printed] == ["completion:status", "completion:async", "completion:result"]


@pytest.mark.promise("S1")
async def test_another_program_that_keeps_its_side_open_stays_connected(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path / "home")) as process:
        status: Json = {"event": "completion:status", "data": {}}
        other = piped(tmp_path, "thinker", process.socket_path, status)
        try:
            nc = piped(tmp_path, "nc", process.socket_path, status)
            await asyncio.to_thread(nc.communicate, timeout=60)
            again = piped(tmp_path / "home", "nc", process.socket_path, status)
            await asyncio.to_thread(again.communicate, timeout=60)
            assert other.poll() is None, "two looks later it is still there"
        finally:
            other.kill()
            other.communicate()
