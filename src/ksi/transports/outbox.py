"""Lines on their way to one client: gathered in each turn of the loop, with backpressure if they are not read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ksi.events.bus import News
from ksi.transports.rota import Rota

BURST = 1024 * 1024
"""Bytes that are collected in one turn of the loop before they are sent."""

NEWS_BURST = 1_000
"""News that are collected before they are made into lines."""

MOST_ANSWERS = 8
"""The answers that wait for a client which reads may be so many times the limit."""

READS = 5.0
"""Seconds in which a client that has more than the limit to read must take some of it."""

CLOSE_TIMEOUT = 5.0
"""Seconds that a disconnected client has to read the reason."""


class Outbox:
    """The output to one client.

    `limit` is the maximum of unread output in bytes. Nothing that it asks is begun meanwhile, so its own answers are
    few, unless they are long. While it reads, they may be more than the limit.
    """

    def __init__(self, limit: int, rota: Rota, let_go: Callable[[], None], sent: Callable[[], None]) -> None:
        """`let_go` is called when the client reads too little, `sent` when all that was there is written.

        `rota` has the turns of all clients for whom there are news.
        """
        self._rota = rota
        self._limit = limit
        self._let_go = let_go
        self._sent = sent
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._lines: deque[tuple[bytes, bool]] = deque()
        """Each with whether it is an answer."""
        self._size = 0
        self._unasked = 0
        """How many bytes of it are no answers."""
        self._news: list[News] = []
        self._flushing = False
        self._news_due = False
        self._written = 0
        self._look: asyncio.TimerHandle | None = None
        self.paused = False
        """True if the kernel accepts no more: the client does not read."""

    def open(self, transport: asyncio.Transport) -> None:
        """Send by this from now on."""
        self._transport = transport

    @property
    def empty(self) -> bool:
        """True if no line waits here."""
        return not (self._lines or self._news)

    # -- input -----------------------------------------------------------------------------------------------------

    def answer(self, line: bytes) -> None:
        """Send a line that the client has asked for, with all other lines of this turn of the loop."""
        self._send(line, asked=True)

    def push(self, line: bytes) -> None:
        """Send an unrequested line, with all other lines of this turn of the loop."""
        self._send(line, asked=False)

    def news(self, news: News) -> None:
        """Send a line that no one waits for, in its place among the lines, a moment later."""
        if self._transport is None:
            return
        self._news.append(news)
        if self.paused or len(self._news) >= NEWS_BURST:
            self._take_news()
        if not self._news_due and (news.apart or not self._flushing):
            self._news_due = True
            self._loop.call_later(news.pause, self._rota.add, self._flush_news)

    def _send(self, line: bytes, *, asked: bool) -> None:
        if self._news:
            self._take_news()
        if self._take(line, asked=asked) and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _take_news(self) -> None:
        waiting, self._news = self._news, []
        for news in waiting:
            self._take(news.line(), asked=False)

    def _take(self, line: bytes, *, asked: bool) -> bool:
        """Keep a line; returns True if it must be sent soon."""
        if self._transport is None:
            return False
        self._lines.append((line, asked))
        self._size += len(line)
        if not asked:
            self._unasked += len(line)
        if self.paused:
            self._bound()
            return False
        if self._size > BURST:
            self._flush()
            return False
        return True

    # -- output ----------------------------------------------------------------------------------------------------

    def _flush_news(self) -> None:
        self._news_due = False
        self._flush()

    def _flush(self) -> None:
        self._flushing = False
        if not self._news_due:
            self._take_news()
        while self._lines and not self.paused and self._transport is not None:
            data = self._next_burst()
            self._written += len(data)
            self._transport.write(data)
        if not self._lines:
            self._sent()

    def _next_burst(self) -> bytes:
        """Whole lines for one write."""
        lines: list[bytes] = []
        size = 0
        while self._lines and size < BURST:
            line, asked = self._lines.popleft()
            lines.append(line)
            size += len(line)
            if not asked:
                self._unasked -= len(line)
        self._size -= size
        return b"".join(lines)

    def pause(self) -> None:
        """The kernel accepts no more: keep further lines, up to the bound."""
        self.paused = True

    def resume(self) -> None:
        """The client reads again."""
        self.paused = False
        if self._lines and not self._flushing:
            self._flush()

    def _bound(self) -> None:
        if self._unasked > self._limit or self._size > MOST_ANSWERS * self._limit:
            self._let_go()
        elif self._size > self._limit and self._look is None:
            self._look_later()

    def _look_later(self) -> None:
        self._look = self._loop.call_later(READS, self._look_whether_it_reads, self._taken())

    def _look_whether_it_reads(self, before: int) -> None:
        self._look = None
        if self._size <= self._limit:
            return
        if self._taken() == before:
            self._let_go()
        else:
            self._look_later()

    def _taken(self) -> int:
        """Bytes that the kernel has taken so far."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._written - waiting

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send the pending lines, and close."""
        self._take_news()
        self._end(b"".join(line for line, _ in self._lines))

    def close_instead(self, last: bytes) -> None:
        """Send this in place of all that is there, and close."""
        self._end(last)

    def _end(self, last: bytes) -> None:
        transport = self._transport
        self.drop()
        if transport is not None:
            transport.write(last)
            transport.close()
            self._loop.call_later(CLOSE_TIMEOUT, transport.abort)

    def drop(self) -> None:
        """Send nothing more."""
        self._transport = None
        self.paused = False
        self._lines.clear()
        self._size = self._unasked = 0
        self._news.clear()
        if self._look is not None:
            self._look.cancel()
            self._look = None
