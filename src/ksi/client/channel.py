"""Replies matched to requests over a reconnecting connection: backoff, and resending of repeatable events."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ksi.client.link import Connect, ErrorAnswer, Link, Message, unreachable
from ksi.clock import MICROSECONDS, Chance, Clock
from ksi.errors import (
    ConnectionFailed,
    InvalidData,
    KsiError,
    PayloadTooLarge,
    RemoteError,
    ShuttingDown,
    SlowConsumer,
    WaitTimeout,
)
from ksi.protocol import encode

FIRST_DELAY = 0.05
MAX_DELAY = 2.0
STEADY = 5.0
"""Seconds after which a connection counts as good even if it was silent."""
TOO_SLOW = 3
"""Hang-ups because too much was unread after which a request is not sent again: its answer may be the cause."""


class Event(msgspec.Struct, frozen=True):
    """A pushed event. `timestamp` is Unix time in seconds."""

    event: str
    data: dict[str, Any]
    timestamp: float


class Listener(Protocol):
    """The owner of a channel."""

    def on_event(self, event: Event, size: int) -> None:
        """The daemon pushed an event; `size` is its line's length in bytes."""
        ...

    def on_lost(self) -> None:
        """The connection is gone, and is tried again."""
        ...

    def on_reconnect(self) -> None:
        """The connection is back: the owner must ask again for everything that belonged to the old one."""
        ...

    def on_down(self, error: ConnectionFailed) -> None:
        """The connection did not come back in time."""
        ...


class _Call:
    """One request on its way."""

    __slots__ = ("event", "future", "line", "repeatable", "sent", "too_slow")

    def __init__(self, event: str, line: bytes, repeatable: bool, future: asyncio.Future[dict[str, Any]]) -> None:
        self.event = event
        self.line = line
        self.repeatable = repeatable
        self.future = future
        self.sent = False
        self.too_slow = 0

    def fail(self, error: KsiError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def remote_error(answer: ErrorAnswer) -> RemoteError:
    """An error reply as the exception to raise for it."""
    return RemoteError(answer.code, answer.message, answer.details, retryable=answer.retryable)


def _goes_on(answer: ErrorAnswer) -> bool:
    """True if the daemon stops and keeps the requested work."""
    return answer.code == ShuttingDown.code and answer.details.get("goes_on") is True


class Channel:
    """Asks and is answered, in any order, over one connection at a time.

    A lost connection is tried again with backoff for `patience` seconds. Requests that were sent and not answered are
    sent again if they are repeatable, else they fail: the daemon may or may not have done them. Requests made in the
    meantime wait for the connection.
    """

    def __init__(
        self,
        path: Path,
        listener: Listener,
        *,
        connect: Connect,
        clock: Clock,
        chance: Chance,
        patience: float,
        max_line: int,
    ) -> None:
        self._path = path
        self._listener = listener
        self._connect = connect
        self._clock = clock
        self._chance = chance
        self._patience = patience
        self._max_line = max_line
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._link: Link | None = None
        self._linked_at = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self._trouble_since: float | None = None
        self._failures = 0
        self._last_word: ErrorAnswer | None = None
        self._open = False
        self.generation = 0
        """How many connections there have been."""

    @property
    def connected(self) -> bool:
        """True if there is a connection at this moment."""
        return self._link is not None

    async def open(self) -> None:
        """Connect, at once or not at all.

        Raises:
            ConnectionFailed: no daemon listens there.
        """
        if self._open:
            return
        try:
            link = await self._dial()
        except (OSError, ConnectionFailed) as error:
            raise self._unreachable(error) from None
        self._open = True
        self._adopt(link)

    async def close(self) -> None:
        """Close the connection; pending calls fail. Again is harmless."""
        self._open = False
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        link, self._link = self._link, None
        if link is not None:
            link.close()
            await link.wait_closed()
        self._fail_all(ConnectionFailed("the client was closed before the answer came"))

    async def call(
        self, event: str, data: Mapping[str, Any], *, repeatable: bool, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send an event and return its reply's data; see `Client.send_event` for its errors."""
        if not self._open:
            raise ConnectionFailed("the client is not open; use it inside `async with ksi.Client() as client:`")
        number = next(self._numbers)
        line = self._encode(event, data, number)
        call = _Call(event, line, repeatable, asyncio.get_running_loop().create_future())
        self._calls[number] = call
        try:
            if self._link is not None:
                self._send(self._link, call)
            else:
                self._keep()
            if timeout is None:
                return await call.future
            async with asyncio.timeout(timeout):
                return await call.future
        except TimeoutError:
            raise WaitTimeout(f"{event} was not answered within {timeout:g} s; its work may still continue") from None
        finally:
            del self._calls[number]

    def _encode(self, event: str, data: Mapping[str, Any], number: int) -> bytes:
        try:
            line = encode({"event": event, "data": data, "correlation_id": number, "replies": "v2"})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidData(f"the data of {event} cannot be written as JSON: {error}") from None
        if len(line) > self._max_line:
            raise PayloadTooLarge(
                f"{event} is {len(line)} bytes long, more than the {self._max_line} of one line; send less text",
                limit=self._max_line,
            )
        return line + b"\n"

    def _send(self, link: Link, call: _Call) -> None:
        call.sent = True
        link.write(call.line)

    async def _dial(self) -> Link:
        return await self._connect(self._path, lambda: Link(self._message, self._lost, self._max_line))

    def _adopt(self, link: Link) -> None:
        self._link = link
        self._linked_at = self._mono()
        self._last_word = None
        self.generation += 1
        for call in self._calls.values():
            self._send(link, call)
        if link.lost:  # it ended before it could be looked after
            self._lost(link, None)

    def _message(self, link: Link, message: Message, size: int) -> None:
        if message.correlation_id is not None:
            self._answer(message)
        elif message.error is not None:
            self._unaddressed(message.error)
        elif message.event is not None:
            self._listener.on_event(Event(message.event, message.data, message.timestamp), size)

    def _answer(self, message: Message) -> None:
        call = self._calls.get(message.correlation_id) if isinstance(message.correlation_id, int) else None
        if call is None or call.future.done():
            return  # whoever asked has gone
        if message.error is not None and call.repeatable and _goes_on(message.error):
            return  # asked again when the daemon is back
        if message.error is not None:
            call.future.set_exception(remote_error(message.error))
        else:
            call.future.set_result(message.data)

    def _unaddressed(self, error: ErrorAnswer) -> None:
        """An error that names no request: a line too long to be read, or the daemon's word before it hangs up."""
        self._last_word = error
        limit = error.details.get("limit")
        if error.code == PayloadTooLarge.code and isinstance(limit, int):
            for call in list(self._calls.values()):
                if call.sent and len(call.line) - 1 > limit:
                    call.fail(remote_error(error))

    def _lost(self, link: Link, reason: KsiError | OSError | None) -> None:
        if link is not self._link:
            return
        self._link = None
        if link.heard or self._mono() - self._linked_at >= STEADY:
            self._trouble_since = None
            self._failures = 0
        for call in list(self._calls.values()):
            if call.sent:
                call.sent = False
                self._unanswered(call, reason)
        if self._open:
            self._listener.on_lost()
            self._keep()

    def _unanswered(self, call: _Call, reason: KsiError | OSError | None) -> None:
        """A request was under way when the connection was lost: fail it, or leave it to be sent again."""
        if isinstance(reason, PayloadTooLarge):
            call.fail(reason)  # asked again, the same answer would come
        elif not call.repeatable:
            call.fail(self._interrupted(call.event, reason))
        elif self._last_word is not None and self._last_word.code == SlowConsumer.code:
            call.too_slow += 1
            if call.too_slow >= TOO_SLOW:
                call.fail(
                    SlowConsumer(f"the daemon hung up before {call.event} was answered: {self._last_word.message}")
                )

    def _keep(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._reconnect(), name="ksi-client-reconnect")

    async def _reconnect(self) -> None:
        """Connect again, or say that it cannot be done."""
        if self._trouble_since is None:
            self._trouble_since = self._mono()
        failure = ConnectionFailed(
            f"the daemon at {self._path} hangs up at once{self._why(None)}", path=str(self._path)
        )
        while self._mono() - self._trouble_since < self._patience:
            delay = min(MAX_DELAY, FIRST_DELAY * 2 ** min(self._failures, 10))
            self._failures += 1
            await self._clock.sleep(self._chance.uniform(delay / 2, delay))
            try:
                link = await self._dial()
            except (OSError, ConnectionFailed) as error:
                failure = self._unreachable(error)
                continue
            self._keeper = None
            self._adopt(link)
            self._listener.on_reconnect()
            return
        self._down(failure)

    def _down(self, error: ConnectionFailed) -> None:
        self._keeper = None
        self._trouble_since = None
        self._failures = 0
        self._fail_all(error)
        self._listener.on_down(error)

    def _fail_all(self, error: ConnectionFailed) -> None:
        for call in list(self._calls.values()):
            call.fail(error)

    def _unreachable(self, error: OSError | ConnectionFailed) -> ConnectionFailed:
        return error if isinstance(error, ConnectionFailed) else unreachable(self._path, error)

    def _interrupted(self, event: str, reason: KsiError | OSError | None) -> ConnectionFailed:
        return ConnectionFailed(
            f"the connection was lost{self._why(reason)} before {event} was answered; "
            "it may have been done: look before asking again"
        )

    def _why(self, reason: KsiError | OSError | None) -> str:
        if self._last_word is not None:
            return f" ({self._last_word.message})"
        return f" ({reason})" if reason is not None else ""

    def _mono(self) -> float:
        return self._clock.now().mono / MICROSECONDS
