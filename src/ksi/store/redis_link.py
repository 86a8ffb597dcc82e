"""One connection to a Redis or Valkey server: calls of one turn of the event loop go out together, in order.

A call whose answer did not come is sent again when the server is back: each function knows a call that it has answered.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog
from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from ksi.errors import InternalError, KsiError, StoreFull, StoreUnavailable
from ksi.store.redis_address import Address
from ksi.store.redis_library import Library

BATCH = 256
"""Calls that are sent before the first answer is read."""

ANSWER_TIME = 10.0
"""Seconds in which a server answers a batch; then the connection is taken for dead."""

PATIENCE = 10.0
"""Seconds for which a call that was not sent yet waits for the server. One that was sent waits for its answer."""

_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.5)
"""Seconds between tries to connect; the last one goes on."""

_GONE = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError)
_ELSEWHERE = (AskError, ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)


class Call:
    """One command on its way."""

    __slots__ = ("command", "future", "sent", "until")

    def __init__(self, command: tuple[Any, ...], future: asyncio.Future[Any], until: float) -> None:
        self.command = command
        self.future = future
        self.until = until
        self.sent = False

    @property
    def said(self) -> tuple[Any, ...]:
        """What goes over the line: a function that may have been called already hears so."""
        return (*self.command, "again") if self.sent and self.command[0] == "FCALL" else self.command


class Link:
    """Sends commands and brings answers, over one server's restart or many."""

    def __init__(self, address: Address, library: Library, name: str) -> None:
        self._address = address
        self._library = library
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._connection: AbstractConnection | None = None
        self._failures = 0
        self._closed = False
        self._log = structlog.get_logger("ksi.redis")
        self._task = asyncio.create_task(self._serve(), name=f"ksi-redis-{name}")
        self.batches = 0
        """Round trips so far."""
        self.commands = 0

    def submit(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command with the next batch.

        The future raises StoreUnavailable where the server is away, StoreFull where it has no room.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closed:
            future.set_exception(StoreUnavailable("the store is closed"))
        else:
            self._queue.append(Call(command, future, self._loop.time() + PATIENCE))
            self._wake.set()
        return future

    def fcall(self, verb: str, namespace: str, *args: bytes | str) -> asyncio.Future[Any]:
        """Call one of the library's functions."""
        return self.submit("FCALL", self._library.function(verb), 1, namespace, *args)

    async def close(self) -> None:
        """Take no more, and let go of the server. What is under way is not waited for."""
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for call in self._queue:
            if not call.future.done():
                call.future.set_exception(StoreUnavailable("the store is closed"))
        self._queue.clear()
        await self._disconnect()

    # -- the loop -------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                batch = [call for call in batch if call.sent or not call.future.cancelled()]
                await self._deliver(batch)

    async def _deliver(self, batch: list[Call]) -> None:
        """Send a batch and take its answers; what got none goes back to the front of the queue."""
        unanswered = deque(batch)
        try:
            connection = await self._connected()
            await self._exchange(connection, unanswered)
            self._failures = 0
        except KsiError as error:
            self._refuse(unanswered, error)
        except MovedError as moved:
            self._address.moved(moved.host, moved.port)
            await self._disconnect()
        except (*_GONE, *_ELSEWHERE) as error:
            await self._lost(error, unanswered)
        except asyncio.CancelledError:
            self._queue.extendleft(reversed(unanswered))
            raise
        self._queue.extendleft(reversed(unanswered))

    async def _exchange(self, connection: AbstractConnection, unanswered: deque[Call]) -> None:
        commands = [call.said for call in unanswered]
        for call in unanswered:
            call.sent = True
        self.batches += 1
        self.commands += len(unanswered)
        again: list[Call] = []
        async with asyncio.timeout(ANSWER_TIME):
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            while unanswered:
                try:
                    answer = await connection.read_response(disable_decoding=True, timeout=math.inf)
                except (MovedError, *_ELSEWHERE):
                    raise
                except ResponseError as error:
                    if "function not found" in str(error).lower():
                        again.append(unanswered.popleft())
                    else:
                        _fail(unanswered.popleft(), _as_ksi_error(error))
                    continue
                call = unanswered.popleft()
                if not call.future.done():
                    call.future.set_result(answer)
        if again:
            unanswered.extend(again)
            await self._load(connection)

    # -- the connection -------------------------------------------------------------------------------------------

    async def _connected(self) -> AbstractConnection:
        if self._connection is None:
            try:
                connection = await self._address.connect()
            except exceptions.ConnectionError as error:
                # What the server says to a wrong password comes wrapped as a lost connection.
                if not isinstance(error.__cause__ or error, AuthenticationError):
                    raise
                raise StoreUnavailable(f"{self._address}: {error} Put user and password into store.url") from None
            self._connection = connection
            if self._failures:
                self._log.info("the server is back", link=self._name, server=str(self._address))
        return self._connection

    async def _load(self, connection: AbstractConnection) -> None:
        """Give the server the library, where it does not have it: after its first start or a failover."""
        async with asyncio.timeout(ANSWER_TIME):
            await connection.send_command("FUNCTION", "LOAD", "REPLACE", self._library.text)
            try:
                await connection.read_response(timeout=math.inf)
            except (MovedError, *_ELSEWHERE):
                raise
            except ResponseError as error:
                raise StoreUnavailable(f"{self._address} does not take KSI's functions: {error}") from None

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.disconnect(nowait=True)
            except (RedisError, OSError) as error:
                self._log.debug("connection not closed in order", error=str(error))

    async def _lost(self, error: BaseException, unanswered: deque[Call]) -> None:
        """The server is away: let go of what has waited long enough, and pause before the next try."""
        await self._disconnect()
        self._address.lost()
        if self._failures == 0:
            self._log.error(
                "the server is away, trying again", link=self._name, server=str(self._address), error=_word(error)
            )
        pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        away = StoreUnavailable(f"{self._address} is away ({_word(error)}); try again when it is back")
        now = self._loop.time()
        self._queue.extendleft(reversed(unanswered))
        unanswered.clear()
        kept = [call for call in self._queue if call.sent or call.until > now]
        for call in self._queue:
            if not call.sent and call.until <= now:
                _fail(call, away)
        self._queue = deque(kept)
        await asyncio.sleep(pause)

    def _refuse(self, calls: deque[Call], error: KsiError) -> None:
        for call in calls:
            _fail(call, error)
        calls.clear()


def _fail(call: Call, error: KsiError) -> None:
    if not call.future.done():
        call.future.set_exception(error)


def _word(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _as_ksi_error(error: ResponseError) -> KsiError:
    if isinstance(error, OutOfMemoryError):
        return StoreFull(f"the server has no room left ({error}); raise its maxmemory or shorten [retention]")
    word = str(error)
    if word.startswith(("MISCONF", "NOREPLICAS", "NOPERM", "NOAUTH", "BUSY")):
        return StoreUnavailable(f"the server refuses: {word}")
    return InternalError(f"the server's answer: {word}")


def commands_of(links: Sequence[Link]) -> tuple[int, int]:
    """How many round trips and commands went over these links."""
    return sum(link.batches for link in links), sum(link.commands for link in links)
