"""Watches the system's wall clock: logs its leaps, and keeps the time for the next start."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import structlog

from ksi.clock import EARLIEST, FARTHEST, GENTLE, MICROSECONDS, KeptTime, Leap, SystemClock, microseconds, to_seconds
from ksi.events.reports import ClockHealth, LeapReport
from ksi.host.private_files import make_folder, write_whole
from ksi.host.supervise import Periodic

LOOK_EVERY = 1.0
"""Seconds between two looks at the clock."""
KEEP_EVERY = 60.0
"""Seconds between two writes of the file while nothing happens to the clock."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def start_clock(path: Path) -> SystemClock:
    """The machine's clock, going on from the time that the last daemon kept in a file.

    A file that is missing or damaged only means that nothing is known of the time before.
    """
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=KeptTime)
    except FileNotFoundError:
        kept = KeptTime(machine_boot="", boot=0, wall=EARLIEST)
    except (OSError, msgspec.MsgspecError) as error:
        structlog.get_logger("ksi.clock").warning("kept time is unreadable", path=str(path), error=str(error))
        kept = KeptTime(machine_boot="", boot=0, wall=EARLIEST)
    return SystemClock(kept, machine_boot())


def machine_boot(platform: str = sys.platform) -> str:
    """A name for the machine's present boot; empty if the system does not tell."""
    try:
        if platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        return _BOOT_ID.read_text().strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def clock_problem(clock: SystemClock, path: Path) -> str | None:
    """One sentence on a large leap that stands, with the way out; `path` is the file of the kept time."""
    leap = clock.leap()
    apart = microseconds(clock.apart())
    if leap is None or not leap.standing or abs(apart) <= GENTLE:
        return None
    if abs(apart) > FARTHEST:
        course = f"if it is right now, stop KSI, remove {path} and start it: requests due by it then start or expire"
    elif apart > 0:
        course = "KSI follows it if it stays so for an hour"
    else:
        course = "KSI approaches it by three minutes an hour"
    return (
        f"the system's wall clock leapt by {_span(leap.size)} at {_date(leap.at)}, which the monotonic clock "
        f"does not confirm; KSI uses {_date(clock.now().wall)}; {course}"
    )


def clock_report(clock: SystemClock) -> ClockHealth:
    """The clock in `system:health`."""
    leap = clock.leap()
    told = None
    if leap is not None:
        told = LeapReport(at=to_seconds(leap.at), seconds=to_seconds(leap.size), standing=leap.standing)
    return ClockHealth(apart_seconds=round(clock.apart(), 3), leap=told)


class ClockKeeper:
    """One long-lived task, `ksi-clock`."""

    def __init__(self, clock: SystemClock, path: Path) -> None:
        self._clock = clock
        self._path = path
        self._told: Leap | None = None
        self._kept = 0
        """Monotonic time at which the file was written last."""
        self.task = Periodic("ksi-clock", self._watch, LOOK_EVERY, clock, longest_pause=KEEP_EVERY)
        self._log = structlog.get_logger("ksi.clock")

    def start(self) -> None:
        """Begin."""
        self._look()
        self._keep()
        self.task.start()

    async def stop(self) -> None:
        """Keep the time once more, and end."""
        if self.task.alive:
            await self.task.stop()
            self._keep()

    async def _watch(self) -> None:
        if self._look() or self._clock.now().mono - self._kept >= KEEP_EVERY * MICROSECONDS:
            self._keep()

    def _look(self) -> bool:
        """Log changes of the clock since the last look; True if there were any."""
        leap = self._clock.leap()
        if leap == self._told:
            return False
        self._told = leap
        if leap is not None:
            facts = {
                "leap_seconds": to_seconds(leap.size),
                "leap_at": _date(leap.at),
                "going_by": _date(self._clock.now().wall),
                "apart_seconds": round(self._clock.apart(), 3),
            }
            if leap.standing:
                self._log.warning("wall clock leapt", **facts)
            else:
                self._log.info("wall clock agrees again", **facts)
        return True

    def _keep(self) -> None:
        """Write the file. Without it the next start only knows less of the time, so a full disk stops nothing."""
        self._kept = self._clock.now().mono
        try:
            make_folder(self._path.parent)
            write_whole(self._path, msgspec.json.encode(self._clock.keep()) + b"\n")
        except OSError as error:
            self._log.warning("time is not kept", path=str(self._path), error=str(error))


def _date(wall: int) -> str:
    return datetime.fromtimestamp(wall / MICROSECONDS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _span(size: int) -> str:
    """A leap's size for people, with its sign."""
    seconds = abs(size) // MICROSECONDS
    days, hours, minutes = seconds // 86_400, seconds // 3_600 % 24, seconds // 60 % 60
    return f"{'-' if size < 0 else '+'}{f'{days} d ' if days else ''}{hours} h {minutes} min"
