"""One client's connection without a loop's transport, and the socket's path."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from ksi.clock import SystemStopwatch
from ksi.config.schema import Socket
from ksi.errors import ConfigError
from ksi.host.platforms import SOCKET_PATH_LIMIT, find_socket, peer_uid, socket_place
from ksi.testing import SimulatedClock, settle_down
from ksi.transports.dispatch import Connection, Dispatcher
from ksi.transports.outbox import BURST, MOST_ANSWERS
from ksi.transports.rota import Budget
from ksi.transports.unix_socket import (
    HALF_CLOSED_LOOK,
    IN_FLIGHT,
    IN_TURN,
    LONG_LINE,
    SocketConnection,
    UnixSocket,
)


class FakeTransport:
    """Keeps what is written, and says when it is closed; its socket is one end of a real pair."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.writes: list[bytes] = []
        self.closed = False
        self.aborted = False
        self.reading = True
        self.buffered = 0
        self.looked = 0

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self._end

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def get_write_buffer_size(self) -> int:
        self.looked += 1
        return self.buffered

    def events(self) -> list[dict[str, Any]]:
        """What was written, line by line."""
        return [msgspec.json.decode(line) for line in b"".join(self.writes).splitlines()]


class Echo:
    """A dispatcher that keeps each line until it is told to answer."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.later = False

    async def serve(self, line: bytes, connection: Connection) -> None:
        self.lines.append(line)
        await self.go_on.wait()
        if not self.later:
            connection.answer(b'"' + line + b'"\n')


class Door:
    """A server with one client at it."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.echo = Echo()
        self.clock = SimulatedClock(wall=7.5)
        self.waits = False
        self.gone: list[SocketConnection] = []
        self.server = UnixSocket(
            folder / "daemon.sock",
            Socket(**config),
            cast(Dispatcher, self.echo),
            self.clock,
            awaits=lambda _: self.waits,
            on_gone=self._on_gone,
        )
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    async def _on_gone(self, connection: SocketConnection) -> None:
        self.gone.append(connection)

    def connect(self) -> tuple[SocketConnection, FakeTransport]:
        """Another client comes in."""
        pair = socket.socketpair()
        self.pairs.append(pair)
        connection, transport = SocketConnection(self.server), FakeTransport(pair[0])
        connection.connection_made(cast(asyncio.Transport, transport))
        return connection, transport

    def close(self) -> None:
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[list[Door]]:
    doors: list[Door] = []
    yield doors
    for door in doors:
        door.close()


@pytest.fixture
async def door(tmp_path: Path, doors: list[Door]) -> Door:
    doors.append(Door(tmp_path))
    return doors[0]


# -- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
async def test_lines_are_served_as_they_are_complete_and_empty_ones_are_nothing(door: Door) -> None:
    connection, transport = door.connect()
    connection.data_received(b"one\ntw")
    connection.data_received(b"o\n\n  \r\nthree")
    await settle_down()
    assert door.echo.lines == [b"one", b"two"]
    assert transport.writes == [b'"one"\n"two"\n']


@pytest.mark.promise("S1")
async def test_a_line_that_is_too_long_is_answered_and_the_next_one_served(tmp_path: Path, doors: list[Door]) -> None:
    doors.append(Door(tmp_path, max_line=10))
    connection, transport = doors[0].connect()
    connection.data_received(b"x" * 50)
    connection.data_received(b"x" * 50 + b"\nnext\n")
    await settle_down()
    refused, answered = b"".join(transport.writes).splitlines()
    assert msgspec.json.decode(refused)["error"]["code"] == "payload_too_large"
    assert answered == b'"next"'
    assert len(doors[0].echo.lines) == 1


@pytest.mark.promise("S4")
async def test_reading_waits_while_too_much_is_served_and_goes_on_later(door: Door) -> None:
    connection, transport = door.connect()
    door.echo.go_on.clear()
    connection.data_received(b"x\n" * (IN_FLIGHT - 1))
    await settle_down()
    assert transport.reading
    connection.data_received(b"x\n")
    assert not transport.reading
    door.echo.go_on.set()
    await settle_down()
    assert transport.reading
    assert len(transport.events()) == IN_FLIGHT


async def test_the_lines_of_one_client_take_turns_and_nothing_is_read_meanwhile(door: Door) -> None:
    connection, transport = door.connect()
    other, _ = door.connect()
    connection.data_received(b"x\n" * (3 * IN_TURN))
    assert not transport.reading, "what came is begun first"
    other.data_received(b"y\n")
    await settle_down()
    begun = door.echo.lines
    assert begun.index(b"y") <= 2 * IN_TURN, "the other client is not behind all of them"
    assert len(begun) == 3 * IN_TURN + 1
    assert transport.reading


class OneInTurn(Budget):
    """There is time for one line in each turn of the loop."""

    def __init__(self) -> None:
        super().__init__(SystemStopwatch(), 0.0)
        self.asked = 0
        self._taken = False

    def spent(self, who: object) -> bool:
        self.asked += 1
        if not self._taken:
            self._taken = True
            asyncio.get_running_loop().call_soon(self._next)
            return False
        return True

    def _next(self) -> None:
        self._taken = False


@pytest.mark.promise("O9")
async def test_where_turns_have_little_time_few_lines_are_begun_in_vain(door: Door) -> None:
    door.server.budget = budget = OneInTurn()
    connection, _ = door.connect()
    lines = [b"%d" % number for number in range(2 * IN_TURN)]
    connection.data_received(b"\n".join(lines) + b"\n")
    await settle_down(10 * IN_TURN)
    assert door.echo.lines == lines
    assert budget.asked <= 5 * len(lines), "each turn began as many as if it had time for all"


async def test_a_client_whose_answers_wait_is_not_served_further_and_never_disconnected(door: Door) -> None:
    connection, transport = door.connect()
    connection.pause_writing()
    connection.data_received(b"x\n" * 5)
    await settle_down()
    assert door.echo.lines == []
    assert not transport.reading
    connection.resume_writing()
    await settle_down()
    assert len(door.echo.lines) == 5
    assert transport.reading


async def test_lines_that_were_begun_when_the_answers_began_to_wait_are_put_back_in_order(door: Door) -> None:
    connection, transport = door.connect()
    connection.data_received(b"".join(b"%d\n" % number for number in range(3)))
    connection.pause_writing()
    await settle_down()
    assert door.echo.lines == []
    assert not transport.reading
    connection.data_received(b"3\n")
    connection.resume_writing()
    await settle_down()
    assert door.echo.lines == [b"0", b"1", b"2", b"3"]
    assert transport.reading


@pytest.mark.promise("R1")
async def test_the_input_of_a_client_that_left_is_served_to_the_end(door: Door) -> None:
    connection, _ = door.connect()
    connection.data_received(b"x\n" * (2 * IN_TURN))
    connection.pause_writing()
    await settle_down()
    connection.connection_lost(None)
    await settle_down()
    assert len(door.echo.lines) == 2 * IN_TURN


async def test_a_client_that_left_is_taken_away_again_when_its_last_line_is_served(door: Door) -> None:
    """What it asked for last may have entered something on its behalf after it was gone."""
    connection, _ = door.connect()
    door.echo.go_on.clear()
    connection.data_received(b"x\n")
    await settle_down()
    connection.connection_lost(None)
    await settle_down()
    assert door.gone == [connection]
    door.echo.go_on.set()
    await settle_down()
    assert door.gone == [connection, connection]


@pytest.mark.promise("S4")
async def test_all_clients_together_hold_unfinished_lines_up_to_one_bound(tmp_path: Path, doors: list[Door]) -> None:
    doors.append(Door(tmp_path, max_line=1_000, max_input=2_000))
    clients = [doors[0].connect() for _ in range(3)]
    for connection, _ in clients[:2]:
        connection.data_received(b"x" * 900)
    with capture_logs() as logs:
        clients[2][0].data_received(b"y" * 900)
    assert [transport.closed for _, transport in clients] == [True, True, False]
    (event,) = clients[0][1].events()
    error = event["error"]
    assert (error["code"], error["retryable"], error["details"]) == ("too_much_input", True, {"limit": 2_000})
    assert [entry["code"] for entry in logs] == ["too_much_input"] * 2
    clients[0][0].data_received(b"more\n")
    clients[2][0].data_received(b"\n")
    await settle_down()
    assert doors[0].echo.lines == [b"y" * 900]


@pytest.mark.promise("S4")
async def test_long_lines_of_a_client_that_does_not_read_count_as_unfinished_ones(
    tmp_path: Path, doors: list[Door]
) -> None:
    doors.append(Door(tmp_path, max_line=2 * LONG_LINE, max_input=1))
    deaf = [doors[0].connect() for _ in range(2)]
    for connection, _ in deaf:
        connection.pause_writing()
        connection.data_received(b"x" * (2 * LONG_LINE - 1) + b"\n")
    assert [transport.closed for _, transport in deaf] == [False, False]
    late, _ = doors[0].connect()
    late.data_received(b"x" * LONG_LINE)
    assert [transport.closed for _, transport in deaf] == [True, False]


# -- out --------------------------------------------------------------------------------------------------------------


async def test_lines_of_one_turn_are_written_together(door: Door) -> None:
    connection, transport = door.connect()
    for number in range(3):
        connection.push(b"%d\n" % number)
    assert transport.writes == []
    await settle_down()
    connection.push(b"3\n")
    await settle_down()
    assert transport.writes == [b"0\n1\n2\n", b"3\n"]


async def test_a_burst_does_not_wait_for_the_turn_s_end(door: Door) -> None:
    connection, transport = door.connect()
    connection.push(b"x" * BURST)
    assert transport.writes == []
    connection.push(b"y\n")
    assert [len(data) for data in transport.writes] == [BURST, 2]
    await settle_down()
    assert len(transport.writes) == 2


@pytest.mark.promise("S4")
async def test_output_that_a_paused_client_does_not_read_is_kept_in_order(door: Door) -> None:
    connection, transport = door.connect()
    connection.pause_writing()
    for number in range(3):
        connection.push(b"%d\n" % number)
    await settle_down()
    assert transport.writes == []
    connection.resume_writing()
    await settle_down()
    assert b"".join(transport.writes) == b"0\n1\n2\n"


@pytest.mark.promise("S4")
async def test_a_client_that_reads_too_little_is_disconnected_with_the_reason(
    tmp_path: Path, doors: list[Door]
) -> None:
    doors.append(Door(tmp_path, max_backlog=1_000))
    connection, transport = doors[0].connect()
    connection.pause_writing()
    connection.push(b"x" * 1_000)
    assert not transport.closed
    with capture_logs() as logs:
        connection.push(b"y")
    assert transport.closed
    (event,) = transport.events()
    assert (event["error"]["code"], event["error"]["retryable"]) == ("slow_consumer", True)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    connection.push(b"more\n")
    connection.resume_writing()
    await settle_down()
    assert len(transport.events()) == 1


@pytest.mark.promise("S4")
@pytest.mark.parametrize("reads", [True, False])
async def test_too_many_answers_cost_only_those_their_connection_who_read_nothing(
    tmp_path: Path, doors: list[Door], reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.transports.outbox.READS", 0.01)
    doors.append(Door(tmp_path, max_backlog=1_000))
    connection, transport = doors[0].connect()
    connection.answer(b"x" * 5_000 + b"\n")
    await settle_down()
    transport.buffered = 5_001
    connection.pause_writing()
    connection.answer(b"y" * 2_000 + b"\n")
    assert not transport.closed
    async with asyncio.timeout(10):
        while transport.looked < 5 and not transport.closed:
            transport.buffered -= 100 * reads
            await asyncio.sleep(0)
    assert transport.closed is not reads
    connection.resume_writing()
    await settle_down()
    assert (b"yy" in b"".join(transport.writes)) is reads


@pytest.mark.promise("S4")
async def test_answers_are_bounded_for_a_client_that_reads_too(tmp_path: Path, doors: list[Door]) -> None:
    doors.append(Door(tmp_path, max_backlog=1_000))
    connection, transport = doors[0].connect()
    connection.pause_writing()
    connection.answer(b"x" * (MOST_ANSWERS * 1_000))
    assert not transport.closed
    connection.answer(b"y")
    assert transport.closed


async def test_nothing_is_written_to_a_client_that_is_gone(door: Door) -> None:
    connection, transport = door.connect()
    connection.push(b"before\n")
    connection.connection_lost(None)
    connection.push(b"after\n")
    await settle_down()
    assert transport.writes == []
    assert door.gone == [connection]
    assert door.server.connections == 0


async def test_the_daemon_s_stop_sends_pending_lines_and_closes(door: Door) -> None:
    connection, transport = door.connect()
    connection.pause_writing()
    connection.push(b"last words\n")
    connection.close()
    connection.close()
    assert transport.writes == [b"last words\n"]
    assert transport.closed
    connection.push(b"too late\n")
    await settle_down()
    assert transport.writes == [b"last words\n"]


# -- clients that send no more ----------------------------------------------------------------------------------------


@pytest.mark.promise("S1")
async def test_a_client_that_sends_no_more_gets_its_outstanding_lines_and_is_closed_then(door: Door) -> None:
    connection, transport = door.connect()
    door.echo.go_on.clear()
    connection.data_received(b"one\nlast without an end")
    assert connection.eof_received()
    await settle_down()
    assert not transport.closed
    door.echo.go_on.set()
    await settle_down()
    assert transport.writes == [b'"one"\n"last without an end"\n']
    assert transport.closed


async def test_a_client_that_sends_no_more_without_outstanding_lines_is_closed(door: Door) -> None:
    connection, transport = door.connect()
    connection.data_received(b"one\n")
    await settle_down()
    connection.eof_received()
    assert transport.closed


async def test_a_client_that_sends_no_more_and_waits_stays_until_its_result_came(door: Door) -> None:
    connection, transport = door.connect()
    door.waits = True
    connection.eof_received()
    await settle_down()
    assert not transport.closed
    door.waits = False
    connection.push(b"the result\n")
    await settle_down()
    assert transport.writes == [b"the result\n"]
    assert transport.closed


async def test_a_later_answer_that_is_still_owed_keeps_the_connection(door: Door) -> None:
    connection, transport = door.connect()
    door.echo.later = True
    connection.data_received(b"ask\n")
    connection.eof_received()
    await settle_down()
    assert not transport.closed
    connection.answer(b"answer\n")
    await settle_down()
    assert transport.writes == [b"answer\n"]
    assert transport.closed


@pytest.mark.promise("L5")
async def test_who_closed_both_ways_is_gone_at_once(door: Door) -> None:
    connection, transport = door.connect()
    door.waits = True
    door.pairs[0][1].close()
    connection.eof_received()
    assert transport.aborted
    assert connection.is_gone()


@pytest.mark.promise("L5")
async def test_a_half_closed_client_is_looked_after_again_and_again(door: Door) -> None:
    await door.server.start()
    connection, transport = door.connect()
    door.waits = True
    door.pairs[0][1].shutdown(socket.SHUT_WR)
    connection.eof_received()
    await door.clock.advance(3 * HALF_CLOSED_LOOK)
    assert not transport.aborted
    assert not transport.closed
    door.pairs[0][1].close()
    await door.clock.advance(HALF_CLOSED_LOOK)
    assert transport.aborted
    connection.connection_lost(None)
    assert connection.is_gone()
    await door.clock.advance(HALF_CLOSED_LOOK)
    await door.server.stop()


async def test_a_half_closed_client_for_which_nothing_can_come_any_more_is_closed(door: Door) -> None:
    """What it waited for ended in silence: there is no last line after which it could be closed."""
    await door.server.start()
    connection, transport = door.connect()
    door.waits = True
    door.pairs[0][1].shutdown(socket.SHUT_WR)
    connection.eof_received()
    door.waits = False
    await settle_down()
    await door.clock.advance(HALF_CLOSED_LOOK)
    assert transport.closed
    assert not transport.aborted
    connection.connection_lost(None)
    await door.server.stop()


# -- who may come in --------------------------------------------------------------------------------------------------


@pytest.mark.promise("S2")
def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()


class Peer:
    """The end of a socket whose other end is somebody."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if hasattr(socket, "SO_PEERCRED"):
            return struct.pack("3i", 1234, self._uid, 5)
        return struct.pack("2I", 0, self._uid) + bytes(68)


@pytest.mark.promise("S2")
@pytest.mark.parametrize(("uid", "welcome"), [(os.geteuid(), True), (0, True), (os.geteuid() + 1, False)])
async def test_only_this_user_and_root_come_in(door: Door, uid: int, welcome: bool) -> None:
    transport = FakeTransport(cast(socket.socket, Peer(uid)))
    connection = SocketConnection(door.server)
    with capture_logs() as logs:
        connection.connection_made(cast(asyncio.Transport, transport))
    assert transport.closed is not welcome
    assert door.server.connections == (1 if welcome else 0)
    assert transport.writes == []
    assert bool(logs) is not welcome
    connection.connection_lost(None)
    await settle_down()
    assert len(door.gone) == (1 if welcome else 0)


@pytest.mark.promise("S4")
async def test_one_client_too_many_is_refused_and_the_others_stay(tmp_path: Path, doors: list[Door]) -> None:
    doors.append(Door(tmp_path, max_connections=2))
    inside = [doors[0].connect() for _ in range(2)]
    _, refused = doors[0].connect()
    (event,) = refused.events()
    assert (event["error"]["code"], event["error"]["details"]) == ("too_many_connections", {"limit": 2})
    assert refused.closed
    assert not any(transport.closed for _, transport in inside)
    inside[0][0].connection_lost(None)
    _, welcome = doors[0].connect()
    assert not welcome.closed
    await settle_down()


# -- the path ---------------------------------------------------------------------------------------------------------


def at(path: Path, door: Door) -> UnixSocket:
    async def on_gone(_: SocketConnection) -> None: ...

    dispatcher = cast(Dispatcher, door.echo)
    return UnixSocket(path, Socket(), dispatcher, door.clock, awaits=lambda _: False, on_gone=on_gone)


@pytest.mark.promise("S2")
async def test_the_socket_is_for_this_user_alone_and_gone_after_the_stop(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    mask = os.umask(0)
    try:
        await door.server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.is_socket()
        assert os.umask(0) == 0
    finally:
        os.umask(mask)
    await door.server.stop()
    assert not path.exists()


@pytest.mark.promise("R7")
async def test_a_stale_socket_is_taken_over(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))
    await door.server.start()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b'"hello"\n'
    writer.close()
    await writer.wait_closed()
    await door.server.stop()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_a_path_that_is_no_socket_is_not_touched(door: Door, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "daemon.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        await door.server.start()
    assert caught.value.place == "socket.path"
    assert path.is_symlink() or path.exists()


async def test_a_path_with_no_place_that_fits_the_kernel_is_named_before_it_is_tried(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksi.transports.unix_socket.socket_place", lambda path: None)
    with pytest.raises(ConfigError, match=f"{SOCKET_PATH_LIMIT} bytes") as caught:
        await at(tmp_path / ("é" * 60), door).start()
    assert caught.value.place == "socket.path"


@pytest.mark.promise("O12")
async def test_a_path_that_is_too_long_for_the_kernel_is_a_link_to_a_short_place(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        path = tmp_path / ("é" * 60)
        stale = socket_place(path)
        assert stale is not None
        path.symlink_to(stale)
        stale.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(stale))
        server = at(path, door)
        await server.start()
        place = path.readlink()
        assert place.parent.parent == Path(short)
        _, writer = await asyncio.open_unix_connection(find_socket(path))
        writer.close()
        await writer.wait_closed()
        await server.stop()
        assert not path.is_symlink()
        assert not place.exists()


@pytest.mark.promise("O12")
async def test_a_file_at_a_long_path_is_not_taken_away(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        path = tmp_path / ("é" * 60)
        path.write_text("in the way")
        with pytest.raises(ConfigError, match="no socket"):
            at(path, door).bind()
        assert path.read_text() == "in the way"


async def test_a_folder_that_is_not_there_is_named(door: Door, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        await at(Path("/nowhere/d.sock"), door).start()


async def test_stopping_an_unstarted_socket_is_harmless(door: Door) -> None:
    await door.server.stop()


# -- a path that was taken away ---------------------------------------------------------------------------------------


async def echoed(path: Path) -> bool:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"hello\n")
    answer = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()
    return answer == b'"hello"\n'


@pytest.mark.promise("O2")
@pytest.mark.parametrize("how", ["removed", "moved", "replaced by a stale one"])
async def test_a_socket_that_was_taken_away_is_bound_again_and_clients_stay(
    door: Door, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "daemon.sock"
    await door.server.start()
    assert await door.server.restore() is False
    reader, writer = await asyncio.open_unix_connection(str(path))
    if how == "moved":
        path.rename(tmp_path / "elsewhere")
    else:
        path.unlink()
    if how.startswith("replaced"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(str(path))
    assert not door.server.is_served_by_another()
    assert await door.server.restore() is True
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await echoed(path)
    assert await door.server.restore() is False
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b'"hello"\n'
    writer.close()
    await writer.wait_closed()
    await door.server.stop()
    assert not path.exists()


@pytest.mark.promise("O2")
async def test_a_socket_that_another_process_listens_on_is_not_touched(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    await door.server.start()
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        theirs = path.stat().st_ino
        assert door.server.is_served_by_another()
        with pytest.raises(ConfigError, match="another process listens"):
            await door.server.restore()
        with pytest.raises(ConfigError, match="another process listens"):
            at(path, door).bind()
        await door.server.stop()
        assert path.stat().st_ino == theirs, "nobody removes what is not his"


@pytest.mark.promise("O2")
async def test_a_file_in_the_socket_s_place_is_named_and_not_touched(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    await door.server.start()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        await door.server.restore()
    await door.server.stop()
    assert path.read_text() == "precious"
