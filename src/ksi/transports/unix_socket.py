"""The Unix socket: who may connect, lines in, lines out, and clients that are slow or gone (S1, S2, S4)."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import structlog

from ksi.clock import Clock
from ksi.config import Socket
from ksi.errors import ConfigError, PayloadTooLarge, SlowConsumer, TooManyConnections
from ksi.event_bus import News
from ksi.platforms import SOCKET_PATH_LIMIT, peer_uid, private_folder, socket_place
from ksi.protocol import LineReader, encode_error
from ksi.transports.dispatch import Dispatcher
from ksi.transports.netcat import is_piped_netcat

IN_FLIGHT = 1_000
"""Lines of one connection that are served at a time; above it, reading waits."""

BURST = 1024 * 1024
"""Bytes that are collected in one turn of the loop before they are sent."""

NEWS_BURST = 1_000
"""News that are collected before they are made into lines."""

HALF_CLOSED_LOOK = 1.0
"""Seconds between looks at clients that send no more, whether they are still there."""

LAST_WORD = 5.0
"""Seconds that a client which was let go has to read why."""


class SocketConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: UnixSocket) -> None:
        self._server = server
        self._reader = LineReader(server.config.max_line)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._owed = 0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._news: list[News] = []
        self._flushing = False
        self._news_due = False
        self._paused = False
        self._reading = True
        self._half_closed = False
        self._closing = False
        self._asked = False
        self._looks_in_vain = 0

    # -- coming and going -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check who it is (S2)."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        if not self._server.admit(self, self._transport):
            self._closing = True
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; what it asked for goes on (R1)."""
        self._closing = True
        self._out.clear()
        self._news.clear()
        self._transport = None
        self._server.forget(self)

    def eof_received(self) -> bool:
        """The client sends no more, but reads: it still gets what it is owed (S1)."""
        rest = self._reader.finish()
        if rest is not None and rest.strip():
            self._serve(rest)
        self._half_closed = True
        if self.is_gone():
            self._abort()
        else:
            self._server.half_closed.add(self)
            self._close_if_done()
        return True

    def is_gone(self) -> bool:
        """Whether the client closed both ways. Its end of file alone does not tell: the kernel does."""
        if self._transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        return any(happened & (select.POLLHUP | select.POLLERR) for _, happened in poll.poll(0))

    def look_after(self) -> None:
        """After its end of file nothing is read any more, so a client that leaves then must be asked after.

        What it waited for may also have ended without a word for it: then it is closed. So is a netcat that has asked,
        was answered, and said nothing more until the next look.
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
        """Whether nothing is owed to it or may still come for it; one that may yet ask is not idle."""
        return (self._asked or self._half_closed) and not (
            self._owed or self._out or self._news or self._server.awaits(self)
        )

    # -- in -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Serve each line as it is complete."""
        for line in self._reader.feed(data):
            if isinstance(line, PayloadTooLarge):
                self.push(encode_error(None, line, None, self._server.clock.unix()))
            elif line.strip():
                self._serve(line)

    def _serve(self, line: bytes) -> None:
        self._asked = True
        self._looks_in_vain = 0
        self._owed += 1
        task = self._loop.create_task(self._server.dispatcher.serve(line, self))
        self._serving.add(task)
        task.add_done_callback(self._served)
        if len(self._serving) >= IN_FLIGHT and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not self._reading and len(self._serving) < IN_FLIGHT // 2 and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()
        if self._half_closed:
            self._close_if_done()

    # -- out ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """An owed answer was sent."""
        self._owed -= 1

    def push(self, line: bytes) -> None:
        """Send a line with all others of this turn of the loop; a client that does not read is let go."""
        if self._news:
            self._take_news()
        if self._take(line) and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def news(self, news: News) -> None:
        """Send what nobody waits for, in its place among the lines, a moment later."""
        if self._closing:
            return
        self._news.append(news)
        if self._paused or len(self._news) >= NEWS_BURST:
            self._take_news()
        if not self._news_due and (news.apart or not self._flushing):
            self._news_due = True
            self._loop.call_later(news.pause, self._flush_news)

    def _take_news(self) -> None:
        waiting, self._news = self._news, []
        for news in waiting:
            self._take(news.line())

    def _take(self, line: bytes) -> bool:
        """Keep a line; whether it must be sent by and by."""
        if self._closing:
            return False
        self._out.append(line)
        self._out_bytes += len(line)
        if self._paused:
            if self._out_bytes > self._server.config.max_backlog:
                self._let_go()
            return False
        if self._out_bytes > BURST:
            self._flush()
            return False
        return True

    def _flush_news(self) -> None:
        self._news_due = False
        self._flush()

    def _flush(self) -> None:
        self._flushing = False
        if not self._news_due:
            self._take_news()
        if self._paused or self._transport is None or not self._out:
            return
        data = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        self._transport.write(data)
        if self._half_closed:
            self._close_if_done()

    def pause_writing(self) -> None:
        """The kernel takes no more: keep what comes, up to the bound."""
        self._paused = True

    def resume_writing(self) -> None:
        """The client reads again."""
        self._paused = False
        if self._out and not self._flushing:
            self._flush()

    def _let_go(self) -> None:
        """Say why, and close; what was not read stays fetchable (S4)."""
        limit = self._server.config.max_backlog
        self._out.clear()
        self._out_bytes = 0
        self._news.clear()
        self._closing = True
        self._server.log.warning("slow client let go", limit=limit)
        transport = self._transport
        if transport is not None:
            error = SlowConsumer(f"more than {limit} bytes were not read; results can be fetched with completion:get")
            transport.write(encode_error(None, error, None, self._server.clock.unix()))
            transport.close()
            self._loop.call_later(LAST_WORD, transport.abort)

    def close(self) -> None:
        """The daemon stops: send what is there, then close."""
        if self._transport is not None and not self._closing:
            self._paused = False
            self._take_news()
            self._flush()
            self._closing = True
            self._transport.close()
            self._loop.call_later(LAST_WORD, self._transport.abort)


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
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self.clock = clock
        self.awaits = awaits
        self.log = structlog.get_logger("ksi.socket")
        self._path = path
        self._place = path
        self._on_gone = on_gone
        self._connections: set[SocketConnection] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self.half_closed: set[SocketConnection] = set()
        """Clients that send no more, and netcats that may not: they are looked after."""
        self._watch: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def bind(self) -> None:
        """Take the path. The caller knows that no other daemon lives here: a socket that lies there is stale (R7).

        Raises:
            ConfigError: no place for the socket fits the kernel, or something else lies there.
        """
        place = socket_place(self._path)
        if place is None:
            raise ConfigError(
                f"{self._path} is too long for a socket ({SOCKET_PATH_LIMIT} bytes); set a shorter socket.path",
                place="socket.path",
            )
        self._place = place
        _clear(place)
        if place != self._path:
            _clear(self._path, link=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if place != self._path:
                private_folder(place.parent)
            listener.bind(str(place))
            if place != self._path:
                self._path.symlink_to(place)
        except OSError as error:
            listener.close()
            raise ConfigError(f"{self._path} cannot be used: {error.strerror}", place="socket.path") from None
        finally:
            os.umask(mask)
        self._listener = listener

    async def start(self) -> None:
        """Listen on the path that `bind` took; before this clients are refused."""
        if self._listener is None:
            self.bind()
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._watch_half_closed(), name="ksi-half-closed")
        self._server = await loop.create_unix_server(lambda: SocketConnection(self), sock=self._listener, backlog=1024)

    async def stop(self) -> None:
        """Take no more connections; close those that are there once they have what was sent."""
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
        if self._watch is not None:
            self._watch.cancel()
        self._path.unlink(missing_ok=True)
        self._place.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()
        if self._leaving:
            await asyncio.wait(self._leaving)

    @property
    def connections(self) -> int:
        """How many clients are there."""
        return len(self._connections)

    def admit(self, connection: SocketConnection, transport: asyncio.Transport) -> bool:
        """Whether a client may come in: this user's, or root's, and not too many (S2)."""
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
        self._connections.add(connection)
        if is_piped_netcat(peer):
            self.half_closed.add(connection)
        return True

    async def _watch_half_closed(self) -> None:
        """One look at all of them, so that none has a timer of its own."""
        while True:
            await self.clock.sleep(HALF_CLOSED_LOOK)
            for connection in list(self.half_closed):
                connection.look_after()

    def forget(self, connection: SocketConnection) -> None:
        """A client is gone."""
        self.half_closed.discard(connection)
        if connection in self._connections:
            self._connections.discard(connection)
            task = asyncio.ensure_future(self._on_gone(connection))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)


def _clear(path: Path, *, link: bool = False) -> None:
    """Take away a stale socket, or the link to one.

    Raises:
        ConfigError: something else lies there.
    """
    if path.exists() or path.is_symlink():
        if not (stat.S_ISSOCK(path.lstat().st_mode) or (link and path.is_symlink())):
            raise ConfigError(f"{path} is no socket; move it away or set socket.path", place="socket.path")
        path.unlink()
