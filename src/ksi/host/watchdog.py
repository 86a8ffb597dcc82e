"""A thread next to the event loop: it detects a blocked loop, names the blocking code, and keeps a lease alive
meanwhile."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from types import FrameType
from typing import Protocol

import msgspec
import structlog

from ksi.clock import Clock, Stopwatch, SystemStopwatch

LOOK = 0.05
"""Seconds between two questions to the loop."""

STALL = 0.15
"""Seconds without an answer that count as a stall. With `LOOK`, every stall of 0.2 s is seen."""

STEP = 0.25
"""Seconds between looks at a loop that is held."""

TOLD_AFTER = 2.0
"""Seconds after which a stall is reported while it lasts, and again each time it has lasted twice as long."""

GIVEN_UP = 300.0
"""Seconds after which a loop that does not come back is as good as dead: its lease is not kept any more."""

FRAMES = 12
"""Maximum number of reported innermost calls of a stack."""


class Lease(Protocol):
    """A lease that others take over unless it is renewed in time: by the loop, or by the thread if the loop is late."""

    def late(self, now: float) -> bool:
        """True if the loop should have renewed it by now, in the stopwatch's seconds."""
        ...

    def keep(self) -> None:
        """Renew it from this thread. It takes a few seconds at most, and never raises."""
        ...


class Stalls(msgspec.Struct, frozen=True):
    """The times for which the loop was held, so far."""

    count: int = 0
    longest: float = 0.0
    """Seconds, as are the others."""
    last: float = 0.0
    last_at: float | None = None
    """Unix time of the last one's end."""

    def with_one(self, seconds: float, at: float) -> Stalls:
        """These and one more."""
        return Stalls(self.count + 1, max(self.longest, seconds), seconds, at)


class Watchdog:
    """Asks the loop for a sign of life, again and again."""

    def __init__(self, clock: Clock, lease: Lease | None = None, stopwatch: Stopwatch | None = None) -> None:
        """`lease` is kept while the loop is held, for `GIVEN_UP` seconds at most."""
        self._clock = clock
        self._lease = lease
        self._stopwatch = stopwatch or SystemStopwatch()
        self._stopping = threading.Event()
        self._answered = threading.Event()
        self._answered_at = 0.0
        self._thread: threading.Thread | None = None
        self._log = structlog.get_logger("ksi.host.watchdog")
        self.stalls = Stalls()
        self.asked = 0
        self.late = 0.0
        """How often the loop answered, and how late it was in all, in seconds. Only the thread writes them."""

    @property
    def alive(self) -> bool:
        """True if its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Watch the loop that this is called on."""
        loop, thread = asyncio.get_running_loop(), threading.get_ident()
        self._thread = threading.Thread(target=self._run, args=(loop, thread), name="ksi-watchdog", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Watch no more."""
        self._stopping.set()
        self._answered.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        while not self._stopping.wait(LOOK):
            try:
                self._look(loop, thread)
            except RuntimeError:
                if loop.is_closed():
                    return
                self._log.exception("the watchdog failed, going on")
            except Exception:  # noqa: BLE001 - the top of a long-lived thread: a defect must not end it
                self._log.exception("the watchdog failed, going on")

    def _look(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        """Ask the loop, and wait for its answer."""
        asked = self._stopwatch.seconds()
        self._answered.clear()
        loop.call_soon_threadsafe(self._answer)
        stood = self._wait(STALL)
        if not self._answered.is_set():
            stood += self._watch_stall(asked, thread)
        if self._stopping.is_set():
            return
        held = self._answered_at - asked - stood
        self.asked += 1
        self.late += max(held, 0.0)
        if held >= STALL:
            loop.call_soon_threadsafe(self._count, held)
        self._keep_lease(held)

    def _answer(self) -> None:
        """The loop's sign of life, given on its own thread."""
        self._answered_at = self._stopwatch.seconds()
        self._answered.set()

    def _count(self, seconds: float) -> None:
        self.stalls = self.stalls.with_one(round(seconds, 3), self._clock.unix())

    def _wait(self, seconds: float) -> float:
        """Wait for the answer. Returns for how long the whole process stood still meanwhile, as one that is stopped."""
        began, worked = self._stopwatch.seconds(), self._stopwatch.cpu_seconds()
        self._answered.wait(seconds)
        late = self._stopwatch.seconds() - began - seconds
        return late if late > self._stopwatch.cpu_seconds() - worked + seconds else 0.0

    def _watch_stall(self, asked: float, thread: int) -> float:
        """Stay with a loop that is held until it answers. Returns for how long the process stood still meanwhile."""
        calls = _calls(thread)
        stood, told = 0.0, TOLD_AFTER
        while not self._answered.is_set():
            held = self._stopwatch.seconds() - asked - stood
            self._keep_lease(held)
            if held >= told:
                self._log.error("the event loop is held", seconds=round(held, 1), calls=_calls(thread))
                told *= 2
            stood += self._wait(STEP)
        held = self._answered_at - asked - stood
        if held >= STALL and not self._stopping.is_set():
            self._log.warning("the event loop was held", seconds=round(held, 3), calls=calls)
        return stood

    def _keep_lease(self, held: float) -> None:
        if self._lease is not None and held < GIVEN_UP and self._lease.late(self._stopwatch.seconds()):
            self._lease.keep()


def _calls(thread: int) -> list[str]:
    """The present stack of a thread: file, line and function of its calls, the innermost last. It contains no
    values."""
    frame: FrameType | None = sys._current_frames().get(thread)  # the only way to another thread's stack
    if frame is None:
        return []
    # Source lines are not looked up: that would read files.
    found = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=FRAMES, lookup_lines=False)
    return [f"{call.filename}:{call.lineno} {call.name}" for call in reversed(found)]
