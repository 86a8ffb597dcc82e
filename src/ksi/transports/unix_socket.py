"""The Unix socket: admits clients, reads and writes lines, and handles clients that are slow or gone."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import structlog

from ksi.clock import Clock, Stopwatch, SystemStopwatch
from ksi.config.schema import Socket
from ksi.errors import ConfigError, KsiError, PayloadTooLarge, SlowConsumer, TooManyConnections, TooMuchInput
from ksi.events.bus import News
from ksi.host.platforms import SOCKET_PATH_LIMIT, peer_pid, peer_uid, private_folder, socket_place
from ksi.host.supervise import Periodic
from ksi.protocol import LineReader, encode_error
from ksi.transports.dispatch import Dispatcher
from ksi.transports.held_input import HeldInput
from ksi.transports.netcat import is_piped_netcat
from ksi.transports.outbox import Outbox
from ksi.transports.rota import Budget, Rota

IN_FLIGHT = 1_000
"""Lines of one connection that are served at a time; above it, reading waits."""

IN_TURN = 32
"""Lines of one connection that begin in one turn of the loop: then others have their turn."""

TURN_TIME = 0.01
"""Seconds that the lines of all connections may take in one turn of the loop until they are answered or wait."""

LONG_LINE = 256 * 1024
"""Bytes above which a line that waits counts as input that is held. All shorter ones came in one read."""

HALF_CLOSED_LOOK = 1.0
"""Seconds between looks at clients that send no more, whether they are still there."""


class SocketConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: UnixSocket) -> None:
        self._server = server
        self.client = f"connection:{next(server.numbers)}"
        """The agent of requests that name none."""
        self._reader = LineReader(server.config.max_line)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._lines: deque[bytes | PayloadTooLarge] = deque()
        """Lines that came and are not begun; while there are any, no more is read."""
        self._long_bytes = 0
        """How much of them is long lines."""
        self._put_back = 0
        """How many of them, the first ones, were begun in vain in this turn."""
        self._in_turn = IN_TURN
        """How many begin in one turn of the loop."""
        self._turn_due = False
        self._owed = 0
        self._outbox = Outbox(server.config.max_backlog, server.rota, self._let_go_slow, self._sent)
        self._reading = True
        self._half_closed = False
        self._closing = False
        self._asked = False
        self._looks_in_vain = 0

    # -- coming and going -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check which user connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        if self._server.admit(self, self._transport):
            self._outbox.open(self._transport)
        else:
            self._closing = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone. Its requests continue, even those that have not begun."""
        self._closing = True
        self._outbox.drop()
        self._reader.skip()
        self._transport = None
        self._server.forget(self)
        self._go_on()

    def eof_received(self) -> bool:
        """The client closed its sending side but still reads: it gets all replies that are due."""
        rest = self._reader.finish()
        if rest is not None and rest.strip():
            self._lines.append(rest)
            self._long_bytes += _counted(rest)
            self._take_turn()
        self._note_input()
        self._half_closed = True
        if self.is_gone():
            self._abort()
        else:
            self._server.half_closed.add(self)
            self._close_if_done()
        return True

    def is_gone(self) -> bool:
        """True if the client closed both directions. Its end of file alone does not tell: the kernel does."""
        if self._transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        return any(happened & (select.POLLHUP | select.POLLERR) for _, happened in poll.poll(0))

    def look_after(self) -> None:
        """After its end of file nothing is read any more, so a client that leaves then must be asked after.

        The requests it waited for may also have ended without a line for it: then it is closed. So is a netcat that has
        asked, was answered, and said nothing more until the next look.
        """
        if self.is_gone():
            self._abort()
        elif self._half_closed:
            self._close_if_done()
        elif self._idle():
            self._looks_in_vain += 1
            if self._looks_in_vain > 1:
                self._close_if_idle()
        else:
            self._looks_in_vain = 0

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _close_if_done(self) -> None:
        if self._half_closed:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._idle() and not self._closing and self._transport is not None:
            self._closing = True
            self._transport.close()

    def _idle(self) -> bool:
        """True if it has no outstanding replies or pushes; a client that may still ask is not idle."""
        return (self._asked or self._half_closed) and not (
            self._owed or self._lines or not self._outbox.empty or self._server.awaits(self)
        )

    # -- in -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Serve each line as it is complete."""
        if self._closing:
            return
        progress = False
        for line in self._reader.feed(data):
            progress = True
            if isinstance(line, PayloadTooLarge) or line.strip():
                self._lines.append(line)
                self._long_bytes += _counted(line)
        if not self._turn_due:
            self._take_turn()
        self._note_input(progress=progress)

    def _note_input(self, *, progress: bool = False) -> None:
        self._server.note_input(self, self._reader.held + self._long_bytes, progress=progress)

    def _take_turn(self) -> None:
        """Begin some of the lines that came. While answers wait to be read, or too many are being made, none begins."""
        self._turn_due = False
        # A line that is begun in vain costs a task: begin as many as recent turns had time for.
        self._in_turn = max(1, self._in_turn // 2) if self._put_back else min(IN_TURN, 2 * self._in_turn)
        self._put_back = 0
        for _ in range(self._in_turn):
            if not self._lines or not self._has_room():
                break
            line = self._lines.popleft()
            self._long_bytes -= _counted(line)
            self._begin(line)
        self._go_on()

    def _has_room(self) -> bool:
        return not self._outbox.paused and len(self._serving) < IN_FLIGHT

    def _go_on(self) -> None:
        """Have the next turn when it is time, and read on when nothing is left."""
        if self._lines and self._has_room() and not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._take_turn)
        reading = not self._lines and len(self._serving) < IN_FLIGHT
        if reading is not self._reading and self._transport is not None and not self._closing:
            self._reading = reading
            if reading:
                self._note_input()
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _begin(self, line: bytes | PayloadTooLarge) -> None:
        if isinstance(line, PayloadTooLarge):
            self._outbox.answer(encode_error(None, line, None, self._server.clock.unix()))
            return
        self._asked = True
        self._looks_in_vain = 0
        self._owed += 1
        task = self._loop.create_task(self._serve(line))
        self._serving.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, line: bytes) -> None:
        """Serve a line. Put it back if this turn is over, or the answers to earlier lines wait by now."""
        if self._put_back or self._outbox.paused or self._server.budget.spent(self):
            self._owed -= 1
            self._lines.insert(self._put_back, line)
            self._long_bytes += _counted(line)
            self._put_back += 1
            self._note_input()
        else:
            await self._server.dispatcher.serve(line, self)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if self._lines or (not self._reading and len(self._serving) < IN_FLIGHT // 2):
            self._go_on()
        if self._half_closed:
            self._close_if_done()
        if self._transport is None and not self._serving and not self._lines:
            # Its last request may have waited for something on its behalf.
            self._server.leave(self)

    # -- out ------------------------------------------------------------------------------------------------------

    def answer(self, line: bytes) -> None:
        """Send the answer that is owed to a line."""
        self._owed -= 1
        self._server.catch_up(self)
        self._outbox.answer(line)

    def push(self, line: bytes) -> None:
        """Send a line that was not asked for now."""
        self._outbox.push(line)

    def news(self, news: News) -> None:
        """Send a line that no one waits for, in its place among the lines, a moment later."""
        self._outbox.news(news)

    def pause_writing(self) -> None:
        """The client does not read: begin nothing more for it."""
        self._outbox.pause()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._outbox.resume()
        self._go_on()

    def _sent(self) -> None:
        if self._half_closed:
            self._close_if_done()

    def _let_go_slow(self) -> None:
        """Disconnect a client that does not read. It can fetch the results later."""
        limit = self._server.config.max_backlog
        self._let_go(SlowConsumer(f"more than {limit} bytes were not read; results can be fetched with completion:get"))

    def let_go_with_input(self, error: KsiError) -> None:
        """Disconnect it, and drop its input that has not begun."""
        self._reader.skip()
        self._lines.clear()
        self._long_bytes = 0
        self._let_go(error)

    def _let_go(self, error: KsiError) -> None:
        """Say why, and close."""
        self._closing = True
        self._server.log.warning("client disconnected", code=error.code, reason=error.message)
        self._outbox.close_instead(encode_error(None, error, None, self._server.clock.unix()))

    def close(self) -> None:
        """The daemon stops: send the pending lines, then close."""
        if not self._closing:
            self._server.catch_up(self)
            self._closing = True
            self._outbox.close()


class UnixSocket:
    """Listens on a path that only this user can reach."""

    def __init__(
        self,
        path: Path,
        config: Socket,
        dispatcher: Dispatcher,
        clock: Clock,
        *,
        awaits: Callable[[SocketConnection], bool],
        on_gone: Callable[[SocketConnection], Awaitable[None]],
        catch_up: Callable[[SocketConnection], None] = lambda _: None,
        on_come: Callable[[SocketConnection, int], None] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """`on_come` is called with each admitted client and the pid of its process."""
        self.config = config
        self.dispatcher = dispatcher
        self.clock = clock
        self.awaits = awaits
        self.catch_up = catch_up
        self.log = structlog.get_logger("ksi.socket")
        self.path = path
        self._place = path
        self._on_gone = on_gone
        self._on_come = on_come
        self._connections: set[SocketConnection] = set()
        self.rota = Rota(stopwatch)
        self.numbers = itertools.count(1)
        self.budget = Budget(stopwatch or SystemStopwatch(), TURN_TIME)
        self._input: HeldInput[SocketConnection] = HeldInput(max(config.max_input, 2 * config.max_line))
        self._leaving: set[asyncio.Task[None]] = set()
        self.half_closed: set[SocketConnection] = set()
        """Clients that send no more, and netcats that may not: they are looked after."""
        self._watch = Periodic("ksi-half-closed", self._look_after_half_closed, HALF_CLOSED_LOOK, clock)
        self._bound: tuple[int, int] | None = None
        """Device and inode of the socket that was bound."""
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def bind(self) -> None:
        """Bind the path. The caller knows that no other daemon runs here, so a socket at this path is stale.

        Raises:
            ConfigError: no place for the socket fits the kernel, or something else lies there.
        """
        place = socket_place(self.path)
        if place is None:
            raise ConfigError(
                f"{self.path} is too long for a socket ({SOCKET_PATH_LIMIT} bytes); set a shorter socket.path",
                place="socket.path",
            )
        self._place = place
        _clear(place)
        if place != self.path:
            _clear(self.path, link=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if place != self.path:
                private_folder(place.parent)
            listener.bind(str(place))
            # No client can connect before it listens, so the mode given by the umask admits none.
            place.chmod(0o600)
            status = place.lstat()
            if place != self.path:
                self.path.symlink_to(place)
        except OSError as error:
            listener.close()
            raise ConfigError(f"{self.path} cannot be used: {error.strerror}", place="socket.path") from None
        self._listener = listener
        self._bound = (status.st_dev, status.st_ino)

    async def start(self) -> None:
        """Listen on the path that `bind` took; before this clients are refused."""
        if self._listener is None:
            self.bind()
        self._watch.start()
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: SocketConnection(self), sock=self._listener, backlog=1024
        )

    async def restore(self) -> bool:
        """Bind the path again if its socket was removed or replaced; returns True if so. Clients stay connected.

        Raises:
            ConfigError: something else lies there, or the path cannot be used.
        """
        if self._is_bound():
            return False
        before = self._server
        self.bind()
        await self._listen()
        if before is not None:
            before.close()
        return True

    def is_served_by_another(self) -> bool:
        """True if another process listens on the path."""
        return not self._is_bound() and _answers(self._place)

    def _is_bound(self) -> bool:
        """True if the path leads to our socket. Its inode is not given to another file while our listener is open."""
        try:
            status = self._place.lstat()
            leads_there = self._place == self.path or self.path.readlink() == self._place
        except OSError:
            return False
        return leads_there and (status.st_dev, status.st_ino) == self._bound

    async def stop(self) -> None:
        """Accept no more connections; close the open ones once their lines are sent."""
        if self._is_bound():
            self.path.unlink(missing_ok=True)
            self._place.unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        await self._watch.stop()
        for connection in list(self._connections):
            connection.close()
        if self._leaving:
            await asyncio.wait(self._leaving)

    def tasks(self) -> tuple[Periodic, ...]:
        """The long-lived tasks."""
        return (self._watch,)

    @property
    def connections(self) -> int:
        """How many clients are there."""
        return len(self._connections)

    def admit(self, connection: SocketConnection, transport: asyncio.Transport) -> bool:
        """Admit a client if it belongs to this user or to root, and if there are not too many."""
        peer = transport.get_extra_info("socket")
        try:
            uid = peer_uid(peer)
        except OSError as error:
            self.log.error("client refused, its user is unknown", error=str(error))
            return False
        if uid not in (os.geteuid(), 0):
            self.log.warning("client of another user refused", uid=uid)
            return False
        if len(self._connections) >= self.config.max_connections:
            limit = self.config.max_connections
            self.log.warning("too many connections", limit=limit)
            full = TooManyConnections(f"{limit} clients are connected already; try again later", limit=limit)
            transport.write(encode_error(None, full, None, self.clock.unix()))
            return False
        if self._on_come is not None:
            try:
                pid = peer_pid(peer)
            except OSError as error:
                self.log.error("client refused, its process is unknown", error=str(error))
                return False
            self._on_come(connection, pid)
        self._connections.add(connection)
        if is_piped_netcat(peer):
            self.half_closed.add(connection)
        return True

    async def _look_after_half_closed(self) -> None:
        """One look at all of them, so that none has a timer of its own."""
        for connection in list(self.half_closed):
            connection.look_after()

    def note_input(self, connection: SocketConnection, size: int, *, progress: bool) -> None:
        """A client holds so many bytes of lines that are not begun: some client may have to go for that."""
        limit = self._input.bound
        for loser in self._input.note(connection, size, progress=progress):
            loser.let_go_with_input(
                TooMuchInput(
                    f"all clients together sent more than {limit} bytes of unfinished lines, or lines whose "
                    "answers they do not read, and this one has held its own for the longest time; connect again, send "
                    "each line at once, and read",
                    limit=limit,
                )
            )

    def forget(self, connection: SocketConnection) -> None:
        """A client is gone."""
        self.half_closed.discard(connection)
        self._input.forget(connection)
        if connection in self._connections:
            self._connections.discard(connection)
            self.leave(connection)

    def leave(self, connection: SocketConnection) -> None:
        """Remove everything that waits on behalf of a disconnected client."""
        self.budget.forget(connection)
        task = asyncio.ensure_future(self._on_gone(connection))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


def _counted(line: bytes | PayloadTooLarge) -> int:
    """Size of a waiting line in bytes, if it is a long one."""
    return len(line) if isinstance(line, bytes) and len(line) > LONG_LINE else 0


def _clear(path: Path, *, link: bool = False) -> None:
    """Take away a stale socket, or the link to one.

    Raises:
        ConfigError: another kind of file is there, or a process listens on it.
    """
    if not path.exists() and not path.is_symlink():
        return
    if link and path.is_symlink():
        path.unlink()
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path} is no socket; move it away or set socket.path", place="socket.path")
    if _answers(path):
        raise ConfigError(f"another process listens on {path}; stop it or set another socket.path", place="socket.path")
    path.unlink()


def _answers(path: Path) -> bool:
    """True if a process listens on a socket. Only a refusal proves that none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
