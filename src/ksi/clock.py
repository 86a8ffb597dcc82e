"""Time and chance as arguments: nothing else in KSI reads a clock or rolls dice.

asyncio is loaded where it is used: a command that shows a report needs none, and starts sooner without.
"""

from __future__ import annotations

import enum
import random
import time
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, overload

import msgspec

MICROSECONDS = 1_000_000


class Moment(msgspec.Struct, frozen=True):
    """One instant, read off two clocks, both in microseconds.

    `wall` (Unix time) orders and dates things; a leap of the system's clock does not move it. `mono` measures how long
    a lease or an external lock has lived, and neither steps nor runs while the machine sleeps.
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


@overload
def to_seconds(time: int) -> float: ...


@overload
def to_seconds(time: int | None) -> float | None: ...


def to_seconds(time: int | None) -> float | None:
    """Microseconds as seconds; None stays None."""
    return None if time is None else time / MICROSECONDS


def microseconds(seconds: float) -> int:
    """Seconds as whole microseconds."""
    return round(seconds * MICROSECONDS)


def iso_time(unix: float) -> str:
    """Unix seconds as ISO 8601 in UTC, as version 1 wrote times."""
    return datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")


class Leap(msgspec.Struct, frozen=True):
    """A step of the system's wall clock that the clock which counts sleep did not confirm."""

    at: int
    """The wall time that KSI went by when it saw the leap, in microseconds."""
    size: int
    """Microseconds; negative when the system's clock went back."""
    standing: bool
    """True while the system's clock and KSI's wall time differ by more than `LEAP`."""


class KeptTime(msgspec.Struct, frozen=True):
    """The previous daemon's time, which a start needs because the wall times in the store come from it."""

    machine_boot: str
    """The machine's boot in which this was noted; empty if unknown."""
    boot: int
    """Microseconds since that boot, with sleep."""
    wall: int
    """The wall time that KSI went by, in microseconds."""
    followed: int = 0
    """Microseconds of leaps that were followed at once since that boot."""


class Clock(Protocol):
    """Time as the daemon knows it."""

    def unix(self) -> float:
        """Wall time in seconds."""
        ...

    def now(self) -> Moment:
        """This instant."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for so long, by the monotonic clock."""
        ...


class Stopwatch(Protocol):
    """Measures spans in a thread that must not ask the loop."""

    def seconds(self) -> float:
        """Seconds that have passed since some moment, by the monotonic clock."""
        ...

    def cpu_seconds(self) -> float:
        """Seconds that the processor has worked for this process."""
        ...


class SystemStopwatch:
    """The machine's."""

    def seconds(self) -> float:
        """See `Stopwatch`."""
        return time.monotonic()

    def cpu_seconds(self) -> float:
        """See `Stopwatch`."""
        return time.process_time()


def sleep_counting_clock(names: object) -> int:
    """The system's clock that cannot be set and that continues while the machine sleeps.

    Linux calls it CLOCK_BOOTTIME. macOS has CLOCK_MONOTONIC_RAW for it; its CLOCK_MONOTONIC counts sleep too, but is
    calculated from the wall clock.
    """
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC_RAW"):
        if (number := getattr(names, name, None)) is not None:
            return int(number)
    return time.CLOCK_MONOTONIC


SLEEP_COUNTED = sleep_counting_clock(time)

LEAP = 2 * MICROSECONDS
"""A larger difference is a leap. A smaller one comes from NTP and is followed without a word."""
GENTLE = 10 * 60 * MICROSECONDS
"""A leap up to this size is followed slowly."""
SLOWNESS = 20
"""Following slowly, wall time gains or loses one part in so many."""
HOLD = 3_600 * MICROSECONDS
"""A larger leap forward is believed when it has stood for so long. A virtual machine that was paused needs this: all of
its clocks stood still, and only the wall clock is put right afterwards."""
FARTHEST = 7 * 86_400 * MICROSECONDS
"""A leap beyond this is not followed."""
YOUNG = 15 * 60 * MICROSECONDS
"""A machine that was booted less than this ago may get its time from the network only now."""
YOUNG_HOLD = 2 * 60 * MICROSECONDS
"""On a young machine a leap forward, however large, is believed when it has stood for so long."""
EARLIEST = 1_735_689_600 * MICROSECONDS
"""2025-01-01, before KSI's first release: a clock that shows an earlier time is known to be wrong."""
LONGEST_TURN = 10_000
"""Microseconds for which one reading of the clocks counts in a turn of the event loop."""
_LONGEST_STEP = MICROSECONDS
"""The time between two readings counts for slow following up to this much, so that an idle program makes no leap."""
_NOISE = 500
"""Microseconds that two readings of the same clocks may differ by."""


class Follow(enum.Enum):
    """The way in which KSI's wall time comes to agree with the system's clock."""

    SLOWLY = "slowly"
    AT_ONCE = "at once"
    NOT = "not"


def follow(apart: int, stood: int, uptime: int, *, behind: bool) -> Follow:
    """Decide how to follow the system's clock after a leap.

    Args:
        apart: microseconds by which the system's clock is ahead.
        stood: microseconds for which it has been so, without the machine's sleep.
        uptime: microseconds since the machine was booted.
        behind: since the start, the system's clock has shown a time that is known to have passed.
    """
    if apart > 0 and (behind or (uptime < YOUNG and stood >= YOUNG_HOLD)):
        return Follow.AT_ONCE
    if abs(apart) <= GENTLE:
        return Follow.SLOWLY
    if abs(apart) > FARTHEST:
        return Follow.NOT
    if apart < 0:
        return Follow.SLOWLY
    return Follow.AT_ONCE if stood >= HOLD else Follow.NOT


class _Standing(NamedTuple):
    """A leap that stands: the wall clock's offset from the clock that counts sleep, and since when (monotonic)."""

    offset: int
    since: int


class SystemClock:
    """The machine's clocks, with a wall time that a leap does not move.

    `Moment.wall` goes with the clock that counts sleep, and follows the system's wall clock as `follow` decides. It
    never goes back, and never stands still.
    """

    def __init__(self, kept: KeptTime | None = None, machine_boot: str = "") -> None:
        """Continue from `kept` within one boot of the machine. Else begin at the system's wall clock, or at the time in
        `kept` if the system's clock is behind it, for then it is wrong."""
        real, boot, _ = self._read()
        self._machine_boot = machine_boot
        self._followed = 0
        self._behind = False
        self._leap: Leap | None = None
        self._standing: _Standing | None = None
        self._in_turn = Moment(0, 0)
        """The time of the event loop's present turn, while the monotonic clock is before `_in_turn_until`."""
        self._in_turn_until = 0
        if kept is None:
            wall = real
        elif machine_boot and kept.machine_boot == machine_boot:
            wall = kept.wall + max(0, boot - kept.boot)
            self._followed = kept.followed
        else:
            wall = max(real, kept.wall)
            self._behind = kept.wall > real
        self._offset = wall - boot
        self._read_at = boot
        self.read()

    def _read(self) -> tuple[int, int, int]:
        """Wall time, time since boot with sleep, and time without sleep, in microseconds."""
        return (
            time.time_ns() // 1000,
            time.clock_gettime_ns(SLEEP_COUNTED) // 1000,
            time.monotonic_ns() // 1000,
        )

    def unix(self) -> float:
        """Wall time in seconds."""
        return self.now().unix

    def now(self) -> Moment:
        """This instant. The clocks are read once in a turn of the event loop: all that happens in it has one time."""
        if time.monotonic_ns() < self._in_turn_until:
            return self._in_turn
        import asyncio

        moment = self.read()
        loop = asyncio._get_running_loop()
        if loop is not None:
            self._in_turn = moment
            # In nanoseconds, so that a thread, or a reader after the loop has ended, never sees a value far behind.
            self._in_turn_until = time.monotonic_ns() + LONGEST_TURN * 1000
            loop.call_soon(self._turn_over)
        return moment

    def _turn_over(self) -> None:
        self._in_turn_until = 0

    def read(self) -> Moment:
        """This instant, read off the clocks in any case. `mono` is the system's monotonic clock, which stands still
        while the machine sleeps."""
        real, boot, mono = self._read()
        if not -_NOISE <= real - boot - self._offset <= _NOISE or self._standing is not None:
            # Once more: it may be only that this thread had to wait between two of the clocks.
            real, boot, mono = self._read()
            self._follow(real, boot, mono)
        self._read_at = boot
        return Moment(boot + self._offset, mono)

    def _follow(self, real: int, boot: int, mono: int) -> None:
        """Bring wall time nearer to the system's clock, as far as that is right."""
        apart = real - boot - self._offset
        way = self._weigh(apart, Moment(boot + self._offset, mono), boot)
        if way is Follow.AT_ONCE:
            self._offset += apart
        elif way is Follow.SLOWLY:
            most = min(max(0, boot - self._read_at), _LONGEST_STEP) // SLOWNESS
            self._offset += max(-most, min(most, apart))

    def _weigh(self, apart: int, moment: Moment, uptime: int) -> Follow:
        """Note that a leap has come, stands or is over, and decide how to follow it."""
        if -LEAP <= apart <= LEAP:
            self._is_over()
            return Follow.SLOWLY
        offset = moment.wall + apart - uptime
        if self._standing is None or abs(offset - self._standing.offset) > LEAP:
            self._standing = _Standing(offset, moment.mono)
            self._leap = Leap(at=moment.wall, size=apart, standing=True)
        way = follow(apart, moment.mono - self._standing.since, uptime, behind=self._behind)
        if way is Follow.AT_ONCE:
            if not self._behind and uptime >= YOUNG:
                self._followed += apart
            self._is_over()
        return way

    def _is_over(self) -> None:
        self._standing = None
        self._behind = False
        if self._leap is not None:
            self._leap = Leap(at=self._leap.at, size=self._leap.size, standing=False)

    def aged(self) -> Moment:
        """This instant as retention counts it: a leap that was followed at once is left out."""
        now = self.read()
        return Moment(now.wall - self._followed, now.mono)

    def apart(self) -> float:
        """Seconds by which the system's wall clock is ahead of the wall time that KSI goes by."""
        wall = self.read().wall
        return (self._read()[0] - wall) / MICROSECONDS

    def leap(self) -> Leap | None:
        """The last leap of the system's wall clock since the start."""
        self.read()
        return self._leap

    def keep(self) -> KeptTime:
        """The time to keep for the next start."""
        self.read()
        boot = self._read()[1]
        return KeptTime(self._machine_boot, boot, boot + self._offset, self._followed)

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop."""
        import asyncio

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
