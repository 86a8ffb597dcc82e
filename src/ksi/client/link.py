"""One connection to the daemon: lines out, messages in. It knows nothing of requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from ksi.errors import ConnectionFailed, KsiError, PayloadTooLarge
from ksi.host.platforms import find_socket
from ksi.protocol import LineReader


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The `error` of an answer."""

    code: str = "internal_error"
    message: str = ""
    retryable: bool = False
    details: dict[str, Any] = {}


class Message(msgspec.Struct, frozen=True):
    """A message of the daemon: a reply has a `correlation_id`, a pushed event has none."""

    event: str | None = None
    data: dict[str, Any] = {}
    error: ErrorAnswer | None = None
    correlation_id: str | int | None = None
    timestamp: float = 0.0


_decoder = msgspec.json.Decoder(Message)


class Link(asyncio.Protocol):
    """A connection's lines.

    `on_message` gets each message with its size in bytes; `on_lost` is called once, when the connection has ended or
    was closed because of unreadable input.
    """

    def __init__(
        self,
        on_message: Callable[[Link, Message, int], None],
        on_lost: Callable[[Link, KsiError | OSError | None], None],
        max_line: int,
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._lines = LineReader(max_line)
        self._transport: asyncio.Transport | None = None
        self._fault: KsiError | None = None
        self.heard = False
        """True if any data has arrived."""
        self.lost = False
        """True if it has ended."""
        self._ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        # Other loops' transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Cut the input into messages."""
        self.heard = True
        for line in self._lines.feed(data):
            if self._fault is not None:
                return
            if isinstance(line, PayloadTooLarge):
                limit = line.details.get("limit")
                self._give_up(
                    PayloadTooLarge(f"the daemon's answer is longer than {limit} bytes; raise max_line", limit=limit)
                )
                return
            try:
                message = _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                self._give_up(ConnectionFailed(f"the process at the socket does not speak KSI's protocol: {error}"))
                return
            self._on_message(self, message, len(line))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.lost = True
        self._ended.set()
        reason = self._fault if self._fault is not None else exc
        self._on_lost(self, reason if isinstance(reason, KsiError | OSError) else None)

    def write(self, line: bytes) -> None:
        """Send a line; it waits in memory while the daemon does not read."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(line)

    def close(self) -> None:
        """End the connection now; unsent data are dropped."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when nothing of the connection is left."""
        if self._transport is not None:
            await self._ended.wait()

    def _give_up(self, fault: KsiError) -> None:
        self._fault = fault
        self.close()


Connect = Callable[[Path, Callable[[], Link]], Awaitable[Link]]
"""How a connection is made: `dial`, by HTTP, or a test's. Raises OSError, or ConnectionFailed in words of its own."""


def unreachable(path: Path, error: OSError) -> ConnectionFailed:
    """The reason why a socket cannot be reached, with advice."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        message = f"no daemon listens at {path}; start it with `ksi start`"
    elif isinstance(error, PermissionError):
        message = f"the daemon's socket {path} belongs to another user"
    else:
        message = f"the daemon's socket {path} cannot be used: {error.strerror or error}"
    return ConnectionFailed(message, path=str(path))


async def dial(path: Path, make: Callable[[], Link]) -> Link:
    """Connect to the daemon's socket.

    Raises:
        OSError: no process listens there, or this user may not connect.
    """
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(make, path=os.fspath(find_socket(Path(path))))
    return link
