"""The bytes of one connection to a Redis or Valkey server: commands out and answers in, each as soon as it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, DefaultParser

_NOTHING = object()


class Wire(asyncio.Protocol):
    """A connection that redis-py made and greeted; from then on its bytes go through here.

    `on_answer` is called with each answer, in order, with errors as redis-py's; `on_ready` after those that came
    together, and when the server reads again.
    """

    def __init__(
        self, connection: AbstractConnection, on_answer: Callable[[Any], None], on_ready: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._on_answer = on_answer
        self._on_ready = on_ready
        self._answers = hiredis.Reader(replyError=DefaultParser.parse_error, notEnoughData=_NOTHING)
        self.full = False
        """Backpressure: the server does not read as fast as we write, so that output waits in memory."""
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Why the connection is over."""
        writer = connection._writer
        assert writer is not None
        # redis-py reads with a task's turn for each answer, and has no public way around that.
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)

    def write(self, data: bytes) -> None:
        """Send packed commands."""
        self._transport.write(data)

    def fail(self, error: Exception) -> None:
        """Take no more answers: the connection is over."""
        if not self.lost.done():
            self.lost.set_result(error)

    async def close(self) -> None:
        """Disconnect from the server."""
        self.fail(ConnectionAbortedError("closed"))
        await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        """Hand on the answers that are whole."""
        self._answers.feed(data)
        while not self.lost.done():
            try:
                answer = self._answers.gets(False)
            except hiredis.ProtocolError as error:
                self.fail(error)
                return
            if answer is _NOTHING:
                self._on_ready()
                return
            self._on_answer(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.fail(exc or ConnectionResetError("connection closed by the server"))

    def pause_writing(self) -> None:
        """The server does not read."""
        self.full = True

    def resume_writing(self) -> None:
        """It has read."""
        self.full = False
        self._on_ready()
