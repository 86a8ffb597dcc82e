"""A daemon's lease on a Redis or Valkey server, renewed by a thread over a connection of its own.

The event loop renews it with all else that has to be done then. While the loop is blocked, no heartbeat reaches the
server, and others would take over and pay again for calls that this daemon has already paid for.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import structlog
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import MovedError, RedisError, ResponseError

from ksi.clock import Stopwatch, SystemStopwatch
from ksi.store.redis.address import Address
from ksi.store.redis.calls import Calls
from ksi.store.redis.library import Library

OVERDUE = 0.5
"""The part of a lease after which its renewal is late: the loop renews it after a third."""

TRIES = 10
"""Number of retries within the time of one lease."""

ANSWER_TIME = 2.0
"""Seconds in which the server answers, the connection included."""


class RedisLease:
    """The loop notes each renewal here, and the watchdog checks if one is late.

    It never revives an expired lease: the loop has to find out if others took its runs.
    """

    def __init__(
        self, address: Address, library: Library, calls: Calls, seconds: float, stopwatch: Stopwatch | None = None
    ) -> None:
        """`seconds` is how long the lease is."""
        self._address = address
        self._library = library
        self._calls = calls
        self._seconds = seconds
        self._stopwatch = stopwatch or SystemStopwatch()
        self._renewed_at: float | None = None
        self._tried_at = -math.inf
        self._log = structlog.get_logger("ksi.redis")

    def renewed(self) -> None:
        """The lease was renewed."""
        self._renewed_at = self._stopwatch.seconds()

    def given_back(self) -> None:
        """There is no lease any more."""
        self._renewed_at = None

    def late(self, now: float) -> bool:
        """True if it is time to renew it from here."""
        renewed = self._renewed_at
        overdue = renewed is not None and now - renewed >= self._seconds * OVERDUE
        return overdue and now - self._tried_at >= self._seconds / TRIES

    def keep(self) -> None:
        """Renew it. A server that is away is asked again a little later."""
        before, self._tried_at = self._renewed_at, self._stopwatch.seconds()
        try:
            kept = asyncio.run(self._keep())
        except (RedisError, OSError, TimeoutError) as error:
            self._address.lost()
            self._log.warning("lease not kept, trying again", error=str(error) or type(error).__name__)
            return
        # The loop may have given it back meanwhile.
        if kept and self._renewed_at is not None:
            self._renewed_at = max(self._renewed_at, self._tried_at)
            self._log.warning("lease kept for the event loop", after=round(self._tried_at - (before or 0.0), 1))

    async def _keep(self) -> bool:
        async with asyncio.timeout(ANSWER_TIME):
            try:
                return bool(await self._ask())
            except MovedError as moved:
                self._address.moved(moved.host, moved.port)
                return bool(await self._ask())

    async def _ask(self) -> Any:
        connection = await self._address.connect()
        call = ("FCALL", self._library.function("keep"), 1, self._calls.namespace, self._calls.caller)
        try:
            try:
                return await _said(connection, *call)
            except ResponseError as error:
                if "function not found" not in str(error).lower():
                    raise
            # The server has lost its functions, and the loop does not get round to it.
            await _said(connection, "FUNCTION", "LOAD", "REPLACE", self._library.text)
            return await _said(connection, *call)
        finally:
            await connection.disconnect(nowait=True)


async def _said(connection: AbstractConnection, *command: Any) -> Any:
    await connection.send_command(*command)
    return await connection.read_response(timeout=math.inf)
