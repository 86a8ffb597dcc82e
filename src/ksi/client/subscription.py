"""Pushed events, by pattern, as something to iterate over."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable
from fnmatch import translate
from types import TracebackType
from typing import Self

from ksi.client.channel import Event
from ksi.errors import KsiError, SlowConsumer


def pattern_regex(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Events that match one of the patterns, as the daemon interprets them."""
    return re.compile("|".join(map(translate, patterns)))


class Subscription:
    """The events that fit some patterns, from the moment it was entered.

    `async with client.subscribe("completion:*") as events: async for event in events: ...`

    Events that were sent while the connection was away do not come; `gaps` counts how often that was.
    """

    def __init__(
        self,
        patterns: tuple[str, ...],
        begin: Callable[[Subscription], Awaitable[None]],
        end: Callable[[Subscription], Awaitable[None]],
        max_unread: int,
    ) -> None:
        self.patterns = patterns
        self.gaps = 0
        """How often the connection was lost since."""
        self._fits = pattern_regex(patterns)
        self._begin = begin
        self._end = end
        self._max_unread = max_unread
        self._unread: deque[tuple[Event, int]] = deque()
        self._held = 0
        self._more = asyncio.Event()
        self._over: KsiError | None = None
        self._begun = False
        self._closed = False

    async def __aenter__(self) -> Self:
        """Begin to get them. `async for` does so too, if it is not started yet."""
        if not self._begun:
            self._begun = True
            await self._begin(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            SlowConsumer: the unread events took more memory than allowed; later events are lost.
            ConnectionFailed: the daemon was lost and did not come back in time.
        """
        await self.__aenter__()
        while not self._unread:
            if self._closed:
                raise StopAsyncIteration
            if self._over is not None:
                raise self._over
            self._more.clear()
            await self._more.wait()
        event, size = self._unread.popleft()
        self._held -= size
        return event

    async def close(self) -> None:
        """End the subscription; iteration over it ends. Again is harmless."""
        if self._closed:
            return
        self._closed = True
        self._unread.clear()
        self._more.set()
        if self._begun:
            await self._end(self)

    def offer(self, event: Event, size: int) -> None:
        """Take an event if it fits and there is room."""
        if self._over is not None or not self._fits.match(event.event):
            return
        if self._held + size > self._max_unread:
            self.fail(
                SlowConsumer(
                    f"more than {self._max_unread} bytes of events were not read; read faster, or subscribe to less"
                )
            )
            return
        self._unread.append((event, size))
        self._held += size
        self._more.set()

    def fail(self, error: KsiError) -> None:
        """Raise this error once the buffered events were read."""
        if self._over is None:
            self._over = error
            self._more.set()
