"""Wakes the queue: by a signal that something happened, or at a time.

This is the one place where wake-ups are kept, and none can be lost. A word stays until it is taken. A time stays until
it has passed by the clock reading of the next look: a sleeper that wakes a moment early reads the clock again and
sleeps on.
"""

from __future__ import annotations

import asyncio

from ksi.clock import MICROSECONDS, Clock, Moment

TICK = 0.25
"""Seconds between two readings of the clock while a time is awaited: the wall clock may step, a machine may sleep."""


class Wakeup:
    """One reason to look: rung by a word, or due at a time of either clock."""

    def __init__(self, stirred: asyncio.Event) -> None:
        """`stirred` is set with each word."""
        self._stirred = stirred
        self._rung = False
        self._wall: int | None = None
        self._mono: int | None = None

    def ring(self) -> None:
        """Something happened."""
        self._rung = True
        self._stirred.set()

    def at(self, *, wall: int | None = None, mono: int | None = None) -> None:
        """Look again at these times, in place of those before; None: time alone changes nothing."""
        self._wall, self._mono = wall, mono

    def due(self, now: Moment) -> bool:
        """Return whether it was rung, or its time has come."""
        return (
            self._rung
            or (self._wall is not None and now.wall >= self._wall)
            or (self._mono is not None and now.mono >= self._mono)
        )

    def take(self) -> None:
        """Begin the look: later rings ask for another one."""
        self._rung = False
        self.at()

    def away(self, now: Moment) -> list[float]:
        """In how many seconds its times come."""
        times = ((self._wall, now.wall), (self._mono, now.mono))
        return [(at - here) / MICROSECONDS for at, here in times if at is not None]


class Alarm:
    """Sleeps until one of its wakeups is due: `work` for admissible requests, `time` for due, late or expired ones."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stirred = asyncio.Event()
        self.work = Wakeup(self._stirred)
        self.time = Wakeup(self._stirred)

    async def wait(self) -> Moment:
        """The instant at which one of them was found due: decide by this one reading."""
        while True:
            now = self._clock.now()
            if self.work.due(now) or self.time.due(now):
                return now
            self._stirred.clear()
            await self._sleep([*self.work.away(now), *self.time.away(now)])

    async def _sleep(self, spans: list[float]) -> None:
        """Until a word comes, or the clock should be read again."""
        if not spans:
            await self._stirred.wait()
            return
        stirred = asyncio.ensure_future(self._stirred.wait())
        slept = asyncio.ensure_future(self._clock.sleep(min(*spans, TICK)))
        try:
            await asyncio.wait((stirred, slept), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stirred.cancel()
            slept.cancel()
