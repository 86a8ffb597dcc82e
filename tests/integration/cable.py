"""A line to a server that a test can cut, mute and freeze: it has a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from tests.redis_server import RedisServer


class _Pair:
    """One connection and the one behind it. Bytes pass while the way is free; otherwise they wait without notice."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter, heed: Callable[[bytes], None]) -> None:
        """`heed` gets the client's bytes before they are forwarded."""
        self._halves = (near, far)
        self._heed = heed
        self._copies: tuple[asyncio.Task[None], ...] = ()
        self.to_server = asyncio.Event()
        self.to_client = asyncio.Event()
        self.swallowed = b""
        """The client's bytes while the way was not free."""
        self.given_up = False
        """The client has closed it, whatever is still on the way."""

    def start(self, client: asyncio.StreamReader, server: asyncio.StreamReader) -> None:
        """Begin to copy."""
        near, far = self._halves
        self._copies = (
            asyncio.create_task(self._up(client, far)),
            asyncio.create_task(self._pass(server, near, self.to_client)),
        )

    def free(self) -> None:
        """Let waiting and coming bytes pass."""
        self.to_server.set()
        self.to_client.set()

    async def _up(self, client: asyncio.StreamReader, far: asyncio.StreamWriter) -> None:
        """The client's bytes are read at once: so its end is noticed, even if the way is not free."""
        taken = asyncio.StreamReader()
        passing = asyncio.create_task(self._pass(taken, far, self.to_server))
        try:
            with contextlib.suppress(ConnectionError):
                while data := await client.read(1 << 16):
                    self._heed(data)
                    taken.feed_data(data)
                    if not self.to_server.is_set():
                        self.swallowed += data
            self.given_up = True
            taken.feed_eof()
            await passing
        finally:
            passing.cancel()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await way.wait()
                target.write(data)
                await target.drain()
        await way.wait()
        target.transport.abort()

    async def cut(self) -> None:
        """Break it off for both sides."""
        for half in self._halves:
            half.transport.abort()
        for copy in self._copies:
            copy.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)


class Cable:
    """Copies bytes between a port and the server, while it is not cut."""

    def __init__(self, server: RedisServer | int, tls: ssl.SSLContext | None) -> None:
        self._server = server
        self.tls = tls
        """The certificates shown to clients and required of them; None for a plain line. Another holds from `mend`
        on."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._door: asyncio.Server | None = None
        self._pairs: list[_Pair] = []
        self._frozen = False
        self._freezes_at: bytes | None = None
        self.port = 0
        self._do(self._open())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def cut(self) -> None:
        """Admit no connection; cut off the open ones."""
        self._do(self._shut())

    def mend(self) -> None:
        """Let everybody through who comes."""
        self._do(self._open())

    def mute(self) -> None:
        """The server hears, and its answers stay on the way."""
        self._do(self._mute())

    def freeze(self) -> None:
        """Let no byte through, but cut off no connection and admit new ones: a black hole."""
        self._do(self._freeze())

    def freeze_at(self, words: bytes) -> None:
        """Freeze as soon as a client says these words, which are swallowed."""
        self._freezes_at = words

    def thaw(self) -> None:
        """Everything is forwarded, except bytes written to connections that were given up meanwhile."""
        self._do(self._thaw(lambda pair: not pair.given_up))

    def thaw_all(self) -> None:
        """That too, late as it is."""
        self._do(self._thaw(lambda _: True))

    def swallowed(self, words: bytes) -> bool:
        """True if these bytes went into the black hole."""
        return any(words in pair.swallowed for pair in self._pairs)

    def close(self) -> None:
        """Cut it for good."""
        self._do(self._shut())
        self._do(_nothing_left())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._door = await asyncio.start_server(self._join, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._door.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        assert self._door is not None
        self._door.close()
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            await pair.cut()

    async def _mute(self) -> None:
        for pair in self._pairs:
            pair.to_client.clear()

    def _heed(self, data: bytes) -> None:
        if self._freezes_at is not None and self._freezes_at in data:
            self._freezes_at = None
            self._freeze_all()

    async def _freeze(self) -> None:
        self._freeze_all()

    def _freeze_all(self) -> None:
        self._frozen = True
        for pair in self._pairs:
            pair.to_server.clear()
            pair.to_client.clear()

    async def _thaw(self, which: Callable[[_Pair], bool]) -> None:
        self._frozen = False
        for pair in filter(which, self._pairs):
            pair.free()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(self._server, int):
                behind, out = await asyncio.open_connection("127.0.0.1", self._server)
            else:
                behind, out = await asyncio.open_unix_connection(str(self._server.socket))
        except BaseException:
            writer.transport.abort()
            raise
        pair = _Pair(writer, out, self._heed)
        pair.start(reader, behind)
        self._pairs.append(pair)
        if not self._frozen:
            pair.free()


async def _nothing_left() -> None:
    """End what still connects, until nothing of it is left."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # connections that were broken off close a turn later


@contextlib.contextmanager
def cable(server: RedisServer | int, tls: ssl.SSLContext | None = None) -> Iterator[Cable]:
    """A line to a server, or to a port, that is there while the block runs."""
    line = Cable(server, tls)
    try:
        yield line
    finally:
        line.close()
