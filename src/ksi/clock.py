"""Time and chance as arguments: nothing else in KSI reads a clock or rolls dice."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC, datetime
from typing import Protocol

import msgspec

MICROSECONDS = 1_000_000


class Moment(msgspec.Struct, frozen=True):
    """One instant, read off two clocks, both in microseconds.

    `wall` (Unix time) orders and dates things and may step; `mono` measures how long a lease or
    an external lock has lived, and neither steps nor runs while the machine sleeps (promise L4).
    """

    wall: int
    mono: int

    @property
    def unix(self) -> float:
        """Wall time in seconds, as it goes over the wire."""
        return self.wall / MICROSECONDS

    def after(self, seconds: float) -> Moment:
        """The instant `seconds` later on both clocks."""
        return self.after_us(microseconds(seconds))

    def after_us(self, step: int) -> Moment:
        """The instant `step` microseconds later on both clocks."""
        return Moment(self.wall + step, self.mono + step)


def to_seconds(time: int | None) -> float | None:
    """Microseconds as seconds; None stays None."""
    return None if time is None else time / MICROSECONDS


def microseconds(seconds: float) -> int:
    """Seconds as whole microseconds."""
    return round(seconds * MICROSECONDS)


def iso_time(unix: float) -> str:
    """Unix seconds as ISO 8601 in UTC, as version 1 wrote times."""
    return datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")


class Clock(Protocol):
    """What the daemon knows of time."""

    def unix(self) -> float:
        """Wall time in seconds."""
        ...

    def now(self) -> Moment:
        """This instant."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for so long, by the monotonic clock."""
        ...


class SystemClock:
    """The machine's clocks."""

    def unix(self) -> float:
        """Wall time by CLOCK_REALTIME."""
        return time.time()

    def now(self) -> Moment:
        """This instant by CLOCK_REALTIME and CLOCK_MONOTONIC."""
        return Moment(time.time_ns() // 1000, time.monotonic_ns() // 1000)

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop."""
        await asyncio.sleep(max(0.0, seconds))


class Chance:
    """All randomness of a daemon: ids, holder tokens, jitter."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source if source is not None else random.Random()

    def token(self) -> int:
        """A holder token: 62 random bits, never 0."""
        return self._random.getrandbits(62) | 1

    def identifier(self, prefix: str, moment: Moment) -> str:
        """A new id, `prefix_` and 26 hex digits; later ones sort after earlier ones.

        Ids that grow with time keep index inserts at the end of the tree.
        """
        return f"{prefix}_{moment.wall // 1000:011x}{self._random.getrandbits(60):015x}"

    def uniform(self, low: float, high: float) -> float:
        """A number between the two."""
        return self._random.uniform(low, high)
