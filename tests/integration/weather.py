"""Bad weather for daemons: a small disk that fills up and empties, and a wall clock that leaps."""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import psutil

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Wire, until
from tests.tally import Tally

DISK_BYTES = 48 * 1024 * 1024

LEAPS = ("+100d", "-400d", "+6d", "-6d", "+8h", "+5m", "-5m", "+30s", "-30s")
"""Of each kind that a clock follows, slowly, later or not."""

STANDS = "kills on a full disk"
PASSES = "disks full for a while"
LEAP = "leaps of the clock"
CALM = "calm"


class SmallDisk:
    """A file system of its own, with little room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    @property
    def full(self) -> bool:
        """Whether the filler is there."""
        return self._filler.exists()

    def fill(self) -> None:
        """Leave no room; again, it takes what was freed since."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(64 * 1024))
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))

    def empty(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk | None]:
    """A disk in a folder while the block runs; None where this user or system cannot mount one (it takes root)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        # It would be busy, and this fail, if any process of a daemon were left.
        subprocess.run(["umount", str(folder)], check=True)


class WallClock:
    """The wall clock of the daemons that are started with its `environ`. Their other clocks are the machine's."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.environ: Mapping[str, str] = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.leap("+0")

    def leap(self, by: str) -> None:
        """Set it so far beside the machine's clock."""
        new = self._file.with_suffix(".new")
        new.write_text(by)
        new.replace(self._file)


@cache
def faketime() -> Path | None:
    """libfaketime: of the wheel, else the machine's own; None where neither works."""
    found: list[Path] = []
    spec = importlib.util.find_spec("libfaketime")
    # The wheel says that it is for all systems; the library in it is for one.
    if sys.platform == "linux" and platform.machine() == "x86_64" and spec is not None:
        for place in spec.submodule_search_locations or ():
            found.append(Path(place) / "vendor" / "libfaketime" / "src" / "libfaketime.so.1")
    found += sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return next((library for library in found if library.is_file()), None)


def wall_clock(file: Path) -> WallClock | None:
    """A clock that is moved through a file; None where it cannot be."""
    library = faketime()
    return None if library is None else WallClock(library, file)


Harm = Callable[[], Awaitable[None]]


class Clients(Protocol):
    """Load on a daemon."""

    acks: int
    """How much was acknowledged."""
    away: int
    """How often the daemon said that its store is away or full."""

    async def live(self, path: Path) -> None:
        """Ask without end, until the daemon dies."""
        ...

    async def reach(self, acks: int) -> None:
        """Wait until so much was acknowledged."""
        ...


class Weather:
    """What befalls one daemon in its lives, as the dice will have it."""

    def __init__(
        self,
        process: DaemonProcess,
        dice: random.Random,
        tally: Tally,
        disk: SmallDisk | None,
        clock: WallClock | None,
        **more: Harm,
    ) -> None:
        """`more` is what can befall it besides, with the words that it is counted by."""
        self.process = process
        self.pids: list[int] = []
        """Of all its lives."""
        self._dice = dice
        self._tally = tally
        self._disk = disk
        self._clock = clock
        self._more = more
        self._kinds = [CALM, *([STANDS, PASSES] if disk else []), *([LEAP, LEAP] if clock else []), *more]
        self._left: list[str] = []
        """The kinds that are still to come before any comes again."""

    async def short_life(self) -> None:
        """One life that ends somewhere in the start: loading, recovery, or just after."""
        self._spawn()
        await asyncio.sleep(self._dice.uniform(0.05, 0.6))
        self.kill()

    async def life(self, load: Clients, acks: int, longest: float = 0.3) -> None:
        """One life: the daemon starts, takes so much work, has bad weather in the midst of it, and is killed within
        `longest` seconds after it."""
        await self.start()
        alive = asyncio.create_task(load.live(self.process.socket_path))
        course = asyncio.create_task(self._pass(load, acks))
        await asyncio.wait((alive, course), timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert course.done(), alive
        course.result()
        await asyncio.sleep(self._dice.uniform(0, longest))  # the moment of the kill
        self.kill()
        async with asyncio.timeout(30):
            await alive

    def kill(self) -> None:
        """kill -9."""
        assert self.process.end(signal.SIGKILL) == -signal.SIGKILL
        self._tally.kills += 1

    async def start(self) -> None:
        """Start the daemon, unless it runs, whatever its last life left. A disk that is full stays so for a moment; if
        the daemon ended by that, it is started again."""
        if self.process.process is not None:
            return
        self._spawn()
        ready = asyncio.create_task(asyncio.to_thread(self.process.wait_ready))
        if self._disk is not None and self._disk.full:
            self._tally.harms["starts on a full disk"] += 1
            await asyncio.wait((ready,), timeout=self._dice.uniform(0, 2))
            self._disk.empty()
            if not await ready:
                assert self.process.wait() == 1
                self._spawn()
                ready = asyncio.create_task(asyncio.to_thread(self.process.wait_ready))
        assert await ready, "the daemon ended before it was ready"

    @asynccontextmanager
    async def last_life(self) -> AsyncIterator[Path]:
        """One more life, in which nothing happens, to its orderly end: the socket's path."""
        await self.start()
        self.clear()
        async with await Wire.open(self.process.socket_path) as wire:

            async def ready() -> bool:
                return bool((await wire.ask("system:ready"))["ready"])

            await until(ready)
        yield self.process.socket_path
        assert self.process.end(signal.SIGTERM) == 0
        self._tally.orphans += left_processes(self.process.home)

    def clear(self) -> None:
        """The sun comes out: there is room, and the clock is right."""
        if self._disk is not None:
            self._disk.empty()
        if self._clock is not None:
            self._clock.leap("+0")

    def _spawn(self) -> None:
        self.process.spawn()
        self.pids.append(self.process.pid)

    async def _pass(self, load: Clients, acks: int) -> None:
        """The work of a life, with what befalls the daemon meanwhile."""
        end = load.acks + acks
        await load.reach(end - acks // 2)
        if not self._left:
            self._left = self._dice.sample(self._kinds, len(self._kinds))
        kind = self._left.pop()
        if kind is not CALM:
            self._tally.harms[kind] += 1
        if self._clock is not None:
            # A leap of the life before does not stand for long: a young machine would come to believe it.
            self._clock.leap(self._dice.choice(LEAPS) if kind is LEAP else "+0")
        if kind is PASSES:
            assert self._disk is not None
            await self._fill(self._disk, load)
            await asyncio.sleep(self._dice.uniform(0, 0.5))  # so long there is no room
            self._disk.empty()
        if kind in self._more:
            await self._more[kind]()
        await load.reach(end)
        if kind is STANDS:
            assert self._disk is not None
            await self._fill(self._disk, load)

    async def _fill(self, disk: SmallDisk, load: Clients) -> None:
        """Fill the disk until a client was told."""
        before = load.away
        while load.away == before:
            disk.fill()
            await asyncio.sleep(0.05)  # then it takes what the daemon gave back


@contextmanager
def weather(folder: Path, config: str, dice: random.Random, tally: Tally) -> Iterator[Weather]:
    """A daemon's home on a disk of its own, as long as the block runs."""
    with small_disk(folder / "disk") as disk:
        clock = wall_clock(folder / "clock")
        home = make_home(folder / "disk" / "home", config)
        process = DaemonProcess(home, None if clock is None else clock.environ)
        try:
            yield Weather(process, dice, tally, disk, clock)
        finally:
            process.end(signal.SIGKILL)


def left_processes(home: Path) -> list[str]:
    """Processes that still have to do with a home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(home) in word for word in process.cmdline()):
                found.append(f"process {process.pid}")
    return found
