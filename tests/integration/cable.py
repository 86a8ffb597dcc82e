"""A line to a server that a test can cut: it has a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from tests.redis_server import RedisServer


class Cable:
    """Copies bytes between a port and the server, while it is not cut."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._door: asyncio.Server | None = None
        self._halves: set[asyncio.StreamWriter] = set()
        self._copies: set[asyncio.Task[None]] = set()
        self.port = 0
        self._do(self._open())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def cut(self, seconds: float) -> None:
        """Let nobody through for so long; who is through is cut off."""
        self._do(self._shut())
        threading.Event().wait(seconds)
        self._do(self._open())

    def close(self) -> None:
        """Cut it for good."""
        self._do(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._door = await asyncio.start_server(self._join, "127.0.0.1", self.port)
        self.port = self._door.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        assert self._door is not None
        self._door.close()
        for half in list(self._halves):
            half.transport.abort()
        await asyncio.gather(*self._copies, return_exceptions=True)
        self._halves.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, out = await asyncio.open_unix_connection(str(self._server.socket))
        self._halves |= {writer, out}
        for source, target in ((reader, out), (behind, writer)):
            task = asyncio.create_task(self._copy(source, target))
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.transport.abort()


@contextlib.contextmanager
def cable(server: RedisServer) -> Iterator[Cable]:
    """A line that is there while the block runs."""
    line = Cable(server)
    try:
        yield line
    finally:
        line.close()
