"""Events at other daemons of the same store that a client here may wait for, received over pub/sub as hints."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog
from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from ksi.store.news import Kind, News, OnNews
from ksi.store.redis.address import Address

QUIET = 10.0
"""Seconds of silence after which the server is asked whether it is there."""

PAUSE = 0.2
"""Seconds between tries to connect."""

_GONE = (exceptions.RedisError, OSError, TimeoutError)


_decoder = msgspec.msgpack.Decoder(News, strict=False)


class Listener:
    """Receives the news for one lease of this daemon, across any number of the server's restarts."""

    def __init__(self, address: Address, channel: str, on_news: OnNews, *, quiet: float = QUIET) -> None:
        self._address = address
        self._quiet = quiet
        self._channel = channel
        self._on_news = on_news
        self._listening = asyncio.Event()
        self._log = structlog.get_logger("ksi.redis")
        self._task = asyncio.create_task(self._listen(), name="ksi-redis-news")

    async def ready(self, seconds: float) -> None:
        """Wait until it hears; no longer than so many seconds: without it everything only takes a moment longer."""
        try:
            await asyncio.wait_for(self._listening.wait(), seconds)
        except TimeoutError:
            self._log.warning("no news from other daemons yet", server=str(self._address))

    async def close(self) -> None:
        """Hear nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await self._address.connect()
                await self._hear(connection)
            except _GONE as error:
                self._log.debug("news interrupted", error=str(error))
            except Exception:  # noqa: BLE001 - the top of a long-lived loop: without it this daemon gets no news of the others
                self._log.exception("news interrupted")
            finally:
                if connection is not None:
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(PAUSE)

    async def _hear(self, connection: AbstractConnection) -> None:
        await connection.send_command("SUBSCRIBE", self._channel)
        asked = False
        while True:
            message: Any = await connection.read_response(timeout=self._quiet, disconnect_on_error=False)
            if message is None:
                if asked:
                    raise TimeoutError(f"{self._address} says nothing")
                asked = True
                await connection.send_command("PING")
                continue
            asked = False
            if message[0] == b"subscribe":
                self._listening.set()
                self._on_news(News(kind=Kind.MISSED))
            elif message[0] == b"message":
                self._on_news(_decoder.decode(message[2]))
