"""A digest of pushed events, for clients that only need to know that something changed: counts, at intervals."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from ksi.clock import Clock
from ksi.events.bus import News
from ksi.events.completions import ChangedPush
from ksi.protocol import encode_reply

CHANGED = "monitor:changed"


class Digest:
    """Counts events by name until it is read. However many come, nothing is kept of them and none is encoded."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._news = asyncio.Event()
        self._end = asyncio.Event()

    def push(self, line: bytes) -> None:
        """See `Listener`. It follows no request, so nothing comes by this way."""

    def news(self, news: News) -> None:
        """See `Listener`."""
        self._counts[news.name] += 1
        self._news.set()

    def answer(self, line: bytes) -> None:
        """See `Connection`. It sends no events, so nothing is answered."""

    def close(self) -> None:
        """Nothing more comes."""
        self._end.set()
        self._news.set()

    async def next(self, seconds: float) -> bytes | None:
        """The counts since the last time, as a line; empty without events for that long, None at the end."""
        if not self._counts and not self._end.is_set():
            self._news.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                return b""
        if self._end.is_set():
            return None
        counts, self._counts = self._counts, Counter()
        return encode_reply(CHANGED, ChangedPush(events=dict(counts)), None, self._clock.unix())

    async def rest(self, seconds: float) -> None:
        """Wait out an interval; the end cuts it short."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._end.wait()
