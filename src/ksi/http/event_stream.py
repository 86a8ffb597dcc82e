"""Streams of pushed events for clients by HTTP: numbered, kept for a while, and bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import structlog

from ksi.clock import Clock, microseconds
from ksi.events.bus import News
from ksi.events.conversations import LostPush
from ksi.http.digest import Digest
from ksi.http.tokens import Identity
from ksi.protocol import encode_reply

KEPT_BYTES = 1024 * 1024
KEPT_EVENTS = 10_000
"""The latest events that are kept for a reader that comes back; at most so many, and so many bytes."""

RESUME = 60.0
"""Seconds for which a stream without a reader is kept."""

MOST_AWAY = 100
"""Streams without a reader; above it the one that has been without the longest is dropped."""

BATCH = 256
"""Events that are written at a time."""

LOST = "monitor:lost"


class EventStream:
    """The pushes to one client. It outlives a lost connection by `RESUME` seconds."""

    def __init__(self, name: str, identity: Identity, clock: Clock, max_behind: int) -> None:
        """`max_behind`: bytes that a reader may leave unread before it is disconnected."""
        self.name = name
        self.identity = identity
        self.away_since: int | None = None
        """Since when it has no reader, in monotonic microseconds."""
        self._clock = clock
        self._max_behind = max_behind
        self._kept: deque[bytes] = deque()
        self._first = 1
        """The number of the first event that is kept."""
        self._kept_bytes = 0
        self._unsent = 0
        """Bytes that the reader has not been sent."""
        self._sent = 0
        """The number of the last event that was sent."""
        self._news = asyncio.Event()
        self._let_go: Callable[[], None] | None = None
        self._closed = False

    # -- the daemon's side: see `ksi.transports.dispatch.Connection` -------------------------------------------------

    def push(self, line: bytes) -> None:
        """Keep an event, and wake the reader."""
        self._kept.append(line)
        self._kept_bytes += len(line)
        self._unsent += len(line)
        reader = self._let_go
        if reader is not None and self._unsent > self._max_behind:
            self._let_go = None
            reader()
        self._trim()
        self._news.set()

    def news(self, news: News) -> None:
        """Keep an event that answers no call."""
        self.push(news.line())

    def answer(self, line: bytes) -> None:
        """See `Connection`. The answer goes back with the request itself."""

    def _trim(self) -> None:
        """Drop events that are not kept any more: of a stream that is read, only sent ones."""
        while self._kept_bytes > KEPT_BYTES or len(self._kept) > KEPT_EVENTS:
            if self._first > self._sent:
                if self._let_go is not None:
                    return
                self._unsent -= len(self._kept[0])
            self._kept_bytes -= len(self._kept.popleft())
            self._first += 1

    # -- the reader's side --------------------------------------------------------------------------------------------

    def attach(self, let_go: Callable[[], None], after: int | None) -> int:
        """Begin to read behind event number `after`, or behind the last one; returns how many of them are lost.

        `let_go` ends the reader: because it is too far behind, or another has taken its place.
        """
        before, self._let_go = self._let_go, let_go
        if before is not None:
            before()
        self.away_since = None
        last = self._first + len(self._kept) - 1
        wanted = last if after is None else min(after, last)
        self._sent = max(wanted, self._first - 1)
        self._unsent = sum(len(line) for line in islice(self._kept, self._sent + 1 - self._first, None))
        self._news.set()
        return self._sent - wanted

    def mark(self) -> bytes:
        """The reader's position, as an event without data: a break before the next one loses nothing."""
        return f"id: {self.name}-{self._sent}\n\n".encode()

    def detach(self, let_go: Callable[[], None]) -> None:
        """The reader is gone; another may come."""
        if self._let_go is let_go or self._let_go is None:
            self._let_go = None
            self.away_since = self._clock.now().mono
            self._trim()

    async def next(self, seconds: float) -> bytes | None:
        """The next events in wire form; empty if there were none for that long, None at the stream's end."""
        if not self._waiting():
            self._news.clear()
            if self._closed:
                return None
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                return b""
        start = self._sent + 1 - self._first
        lines = list(islice(self._kept, start, start + BATCH))
        first, self._sent = self._sent + 1, self._sent + len(lines)
        self._unsent -= sum(map(len, lines))
        self._trim()
        return b"".join(sse(line, f"{self.name}-{number}") for number, line in enumerate(lines, first))

    def _waiting(self) -> bool:
        return self._sent < self._first + len(self._kept) - 1

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._news.set()


class EventStreams:
    """The streams by name, with and without a reader."""

    def __init__(self, clock: Clock, max_behind: int, on_gone: Callable[[Any], Awaitable[None]]) -> None:
        """`on_gone` is called for each stream that ends, as the socket does for its connections."""
        self._clock = clock
        self._max_behind = max_behind
        self._on_gone = on_gone
        self._streams: dict[str, EventStream] = {}
        self._leaving: set[asyncio.Future[None]] = set()
        self._digests: set[Digest] = set()
        self._log = structlog.get_logger("ksi.http")

    def make(self, name: str, identity: Identity) -> EventStream:
        """A new one."""
        stream = self._streams[name] = EventStream(name, identity, self._clock, self._max_behind)
        return stream

    def find(self, name: str, identity: Identity) -> EventStream | None:
        """One that is there, for who made it."""
        stream = self._streams.get(name)
        return stream if stream is not None and stream.identity.key == identity.key else None

    def look(self) -> None:
        """End streams whose reader does not come back."""
        oldest = self._clock.now().mono - microseconds(RESUME)
        away = sorted(
            ((stream.away_since, name) for name, stream in self._streams.items() if stream.away_since is not None),
            reverse=True,
        )
        for place, (since, name) in enumerate(away):
            if since <= oldest or place >= MOST_AWAY:
                self.end(self._streams[name])

    def end(self, stream: EventStream) -> None:
        """End one for good."""
        if self._streams.pop(stream.name, None) is None:
            return
        stream.close()
        leaving = asyncio.ensure_future(self._on_gone(stream))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    @contextmanager
    def digest(self) -> Iterator[Digest]:
        """A digest that ends with the daemon. It needs no name: a client that reconnects asks for the present state."""
        made = Digest(self._clock)
        self._digests.add(made)
        try:
            yield made
        finally:
            self._digests.discard(made)

    async def close(self) -> None:
        """End all: the daemon stops."""
        for digest in self._digests:
            digest.close()
        for stream in list(self._streams.values()):
            self.end(stream)
        if self._leaving:
            await asyncio.wait(self._leaving)


def sse(line: bytes, event_id: str | None = None) -> bytes:
    """One event of the wire as a server-sent event. JSON on one line has no line break in it."""
    head = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return head + b"data: " + line.rstrip(b"\n") + b"\n\n"


def lost(count: int | None, at: float) -> bytes:
    """The word that events are lost, as a server-sent event."""
    return sse(encode_reply(LOST, LostPush(events=count), None, at))


def position(given: str) -> tuple[str, int] | None:
    """The stream and the number in a `Last-Event-ID`; None for one that is not ours."""
    name, _, number = given.rpartition("-")
    return (name, int(number)) if name and number.isascii() and number.isdigit() and len(number) < 19 else None
