"""A daemon's side of the wire in memory, for tests of the client: no socket, no time, every loss on command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksi.client.link import Link
from ksi.clock import MICROSECONDS, Moment

Answer = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Event as it came → reply's `data` (or `{"error": ...}`), or None for no reply yet."""


class SteppingClock:
    """Time that passes only in sleeps; `slept` keeps their lengths."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._now = 1_700_000_000.0

    def unix(self) -> float:
        return self.now().unix

    def now(self) -> Moment:
        """This instant."""
        return Moment(round(self._now * MICROSECONDS), round(self._now * MICROSECONDS))

    async def sleep(self, seconds: float) -> None:
        """Let so much time pass, at once."""
        self.slept.append(seconds)
        self._now += seconds
        await asyncio.sleep(0)


class _Wire(asyncio.Transport):
    """The connection, as the client sees it."""

    def __init__(self, daemon: ScriptedDaemon, link: Link) -> None:
        super().__init__()
        self._daemon = daemon
        self._closing = False
        self.link = link

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        for line in bytes(data).splitlines():
            self._daemon.take(self, json.loads(line))

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.end(None)

    def end(self, error: Exception | None) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self.link.connection_lost, error)


class ScriptedDaemon:
    """Takes events and answers them by `answers`; others stay unanswered."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {
            "monitor:subscribe": lambda event: event["data"],
            "monitor:unsubscribe": lambda event: event["data"],
        }
        self.events: list[dict[str, Any]] = []
        """The received events, in order, over all connections."""
        self.wires: list[_Wire] = []
        self.refusal: OSError | None = None
        """The reason why connecting fails at the moment."""
        self.attempts = 0
        """The number of tries to connect."""
        self.hangs_up = False
        """True if each new connection is ended at once."""
        self._changed = asyncio.Event()

    async def connect(self, path: Path, make: Callable[[], Link]) -> Link:
        """The object that the client gets in place of a socket."""
        self.attempts += 1
        self._changed.set()
        if self.refusal is not None:
            raise self.refusal
        link = make()
        wire = _Wire(self, link)
        self.wires.append(wire)
        link.connection_made(wire)
        if self.hangs_up:
            wire.end(None)
        self._changed.set()
        return link

    def take(self, wire: _Wire, event: dict[str, Any]) -> None:
        """An event came."""
        self.events.append(event)
        self._changed.set()
        answer = self.answers.get(event["event"])
        if answer is not None:
            data = answer(event)
            if data is not None:
                self.reply(event, data, wire)

    def reply(self, event: dict[str, Any], data: dict[str, Any], wire: _Wire | None = None) -> None:
        """Answer an event; `data` with the one key `error` is an error answer."""
        body = data if data.keys() == {"error"} else {"data": data}
        self.say({"event": event["event"], **body, "correlation_id": event["correlation_id"], "timestamp": 1.5}, wire)

    def push(self, event: str, **data: Any) -> None:
        """Send an event of the daemon's own."""
        self.say({"event": event, "data": data, "timestamp": 2.5})

    def say(self, message: dict[str, Any], wire: _Wire | None = None) -> None:
        """Send a message over the given connection, or the last."""
        self.send_bytes(json.dumps(message).encode() + b"\n", wire)

    def send_bytes(self, data: bytes, wire: _Wire | None = None) -> None:
        """Send bytes as they are."""
        wire = wire if wire is not None else self.wires[-1]
        asyncio.get_running_loop().call_soon(self._deliver, wire, data)

    def _deliver(self, wire: _Wire, data: bytes) -> None:
        if not wire.is_closing():
            wire.link.data_received(data)

    def drop(self, error: Exception | None = None) -> None:
        """End the connection."""
        self.wires[-1].end(error)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The events of one name that came."""
        return [event for event in self.events if event["event"] == name]

    async def came(self, name: str, times: int = 1) -> dict[str, Any]:
        """The last of so many events of a name, once they came."""
        await self.until(lambda: len(self.named(name)) >= times)
        return self.named(name)[times - 1]

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something that depends on what came is true."""
        async with asyncio.timeout(5):
            while not true():
                self._changed.clear()
                await self._changed.wait()
