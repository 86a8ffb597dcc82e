"""A client that sends and reads bare lines, so that tests see the bytes of the wire."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

Json = dict[str, Any]
T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that anything gets before the test gives up on it."""


class Refused(AssertionError):
    """The daemon answered an error where data was expected."""

    def __init__(self, error: Json) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: str = error["code"]
        self.message: str = error["message"]
        self.details: Json = error["details"]
        self.retryable: bool = error["retryable"]


class Wire:
    """One connection. Replies go to who asked, by correlation id; all other lines stay until they are asked for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._asked: dict[int | str, asyncio.Future[Json]] = {}
        self._changed = asyncio.Condition()
        self.lines: list[Json] = []
        """Pushed events, and replies that carry no correlation id, in order."""
        self.closed = False
        """True if the daemon closed its side."""
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, path: Path) -> Wire:
        """Connect to a socket."""
        reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 27)
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Go away without a word."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                await self._take(json.loads(line))
        except ConnectionError:
            pass  # the daemon was killed: the same as its end
        finally:
            self.closed = True
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("the daemon closed the connection"))
            async with self._changed:
                self._changed.notify_all()

    async def _take(self, message: Json) -> None:
        future = self._asked.pop(message.get("correlation_id", ""), None)
        if future is not None:
            if not future.done():
                future.set_result(message)
            return
        async with self._changed:
            self.lines.append(message)
            self._changed.notify_all()

    # -- out ------------------------------------------------------------------------------------------------------

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the daemon has read most of the input."""
        async with asyncio.timeout(PATIENCE):
            await self._writer.drain()

    def shut(self) -> None:
        """Close the writing side, as `nc` does at the end of its input."""
        self._writer.write_eof()

    def post(self, event: str, data: Json) -> asyncio.Future[Json]:
        """Send an event; the future gets the whole reply."""
        number = next(self._numbers)
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        if self.closed:
            future.set_exception(ConnectionResetError("the daemon closed the connection"))
        else:
            message = {"event": event, "data": data, "correlation_id": number, "replies": "v2"}
            self.raw(json.dumps(message).encode() + b"\n")
        return future

    # -- in -------------------------------------------------------------------------------------------------------

    async def ask(self, event: str, /, **data: Any) -> Json:
        """The reply's data.

        Raises:
            Refused: it was an error.
        """
        return await answer(self.post(event, data))

    async def refused(self, event: str, /, **data: Any) -> Refused:
        """The error that must come."""
        with pytest.raises(Refused) as refused:
            await self.ask(event, **data)
        return refused.value

    async def next(self, fits: Callable[[Json], bool], what: str = "line") -> Json:
        """The first line that fits, now or when it comes; it is taken away."""
        async with asyncio.timeout(PATIENCE), self._changed:
            while True:
                for place, line in enumerate(self.lines):
                    if fits(line):
                        return self.lines.pop(place)
                if self.closed:
                    raise AssertionError(f"the connection closed before the {what} came")
                await self._changed.wait()

    async def line(self) -> Json:
        """The next line, whatever it is."""
        return await self.next(lambda _: True)

    async def pushed(self, event: str, /, **fields: Any) -> Json:
        """The data of the next pushed event of this name whose data has these fields."""
        line = await self.next(
            lambda message: (
                message["event"] == event
                and fields.items() <= {k: v for k, v in message.get("data", {}).items() if k in fields}.items()
            ),
            what=event,
        )
        data: Json = line["data"]
        return data

    async def end(self) -> None:
        """Wait until the daemon closes the connection."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: self.closed)


async def answer(future: asyncio.Future[Json]) -> Json:
    """The data of a posted event's reply.

    Raises:
        Refused: it was an error.
    """
    async with asyncio.timeout(PATIENCE):
        reply = await future
    if "error" in reply:
        raise Refused(reply["error"])
    data: Json = reply["data"]
    return data


async def until(look: Callable[[], Awaitable[T]], *, patience: float = PATIENCE) -> T:
    """Look again and again until there is something; returns it."""
    async with asyncio.timeout(patience):
        while not (found := await look()):  # noqa: ASYNC110 — nothing else tells when the inside changes
            await asyncio.sleep(0.005)
    return found


async def in_state(wire: Wire, request_id: str, *states: str) -> Json:
    """Wait until a request is in one of these states; the request as it then stands."""

    async def look() -> Json | None:
        try:
            reply = await wire.ask("completion:get", request_id=request_id)
        except Refused as refused:
            if refused.code != "not_found":
                raise
            return None  # another connection is sending it just now
        return reply if reply["status"] in states else None

    reply = await until(look)
    assert reply is not None
    return reply
