"""Processes of providers: each in a group of its own, gone with the daemon, and none left behind (F7)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ksi.clock import Clock

LAUNCHER = Path(__file__).with_name("process_launcher.py")
MARK = "KSI_PROCESS_REGISTRY"
"""The variable that all of a process's offspring inherits: the registry's folder."""
STDERR_KEPT = 8 * 1024
"""Bytes of stderr that are kept for messages: the last."""
_READ = 256 * 1024
_REAP_PAUSE = 0.02
_REAP_PATIENCE = 5.0


class ProcessStartError(Exception):
    """A process could not be started; the message says why."""


class Entry(msgspec.Struct, frozen=True):
    """A process as the registry has it; `started` in clock ticks since boot, None where the system does not tell."""

    pid: int
    started: int | None
    name: str


class ProcessRegistry:
    """A folder with a file for each process, written by the process itself before it becomes the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = iter(range(1, sys.maxsize))

    def new_path(self) -> Path:
        """Where the next process is to register."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.folder / f"{os.getpid()}-{next(self._numbers)}"

    async def reap(self, clock: Clock) -> list[Entry]:
        """Kill what an earlier daemon left running, and wait until it is gone; what was found alive.

        A pid that another process has by now is left alone: its start time differs.
        """
        found: list[Entry] = []
        groups: set[int] = set()
        for path, entry in self._entries():
            groups.add(entry.pid)
            if _kill_left(entry, self._mark):
                found.append(entry)
            path.unlink(missing_ok=True)
        waited = 0.0
        while found and waited < _REAP_PATIENCE and any(_left(entry, self._mark) for entry in found):
            await clock.sleep(_REAP_PAUSE)
            waited += _REAP_PAUSE
        return found

    @property
    def _mark(self) -> bytes:
        return f"{MARK}={self.folder}".encode()

    def environment(self) -> dict[str, str]:
        """What a registered process must have in its environment."""
        return {MARK: str(self.folder)}

    def _entries(self) -> Iterator[tuple[Path, Entry]]:
        for path in sorted(self.folder.glob("*-*")) if self.folder.is_dir() else ():
            try:
                yield path, msgspec.json.decode(path.read_bytes(), type=Entry)
            except msgspec.DecodeError:
                path.unlink(missing_ok=True)  # killed while it registered: it never became the program


class ChildProcess:
    """A running program: pipes to it, its end, and the end of its group."""

    def __init__(self, process: asyncio.subprocess.Process, entry_path: Path) -> None:
        self._process = process
        self._entry_path = entry_path
        self._stderr = bytearray()
        self._stderr_reader = asyncio.create_task(self._keep_stderr(), name=f"stderr of {process.pid}")

    @classmethod
    async def start(
        cls,
        registry: ProcessRegistry,
        program: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str],
        folder: Path,
    ) -> ChildProcess:
        """Start a program in a session of its own; `name` is what the registry calls it.

        Raises:
            ProcessStartError: the system said no. That the program cannot be run comes by its exit code and stderr.
        """
        entry_path = registry.new_path()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(LAUNCHER),
                str(os.getpid()),
                str(entry_path),
                name,
                *program,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**environment, **registry.environment()},
                cwd=folder,
                start_new_session=True,
                limit=_READ,
            )
        except (OSError, ValueError) as error:
            raise ProcessStartError(str(error)) from None
        return cls(process, entry_path)

    @property
    def pid(self) -> int:
        """Of the process, which leads a group and a session of the same number."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._process.returncode is not None

    @property
    def ending(self) -> str:
        """How it ended, in words, with the end of what it wrote to stderr."""
        code = self._process.returncode
        if code is None:
            return "still running"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        said = self._stderr.decode("utf-8", "replace").strip()
        return f"{how}: {said[-500:]}" if said else how

    @property
    def stderr(self) -> str:
        """The last that it wrote there."""
        return self._stderr.decode("utf-8", "replace")

    async def write(self, data: bytes) -> None:
        """Send to its stdin; a process that does not read makes this wait, one that has ended takes it and is found
        out by `read`."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.is_closing():
            with suppress(ConnectionError):
                stdin.write(data)
                await stdin.drain()

    async def read(self) -> bytes:
        """What came on its stdout, as much as there is; empty at the end."""
        stdout = self._process.stdout
        return await stdout.read(_READ) if stdout is not None else b""

    async def ends_within(self, seconds: float) -> bool:
        """Wait for its end, at most so long; whether it came."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._process.wait()
        return self.ended

    async def finish(self, grace: float) -> None:
        """Let it end by the end of its stdin; after `grace` seconds kill what is left."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self.ends_within(grace)
        await self.kill()

    async def stop(self, grace: float) -> None:
        """Ask its group to end, and after `grace` seconds kill what is left of it."""
        self._signal(signal.SIGTERM)
        await self.ends_within(grace)
        await self.kill()

    async def kill(self) -> None:
        """Kill its group and take it off the system's table; a cancellation waits until that is done."""
        self._signal(signal.SIGKILL)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.shield(gone)
        except asyncio.CancelledError:
            await gone
            raise

    async def _gone(self) -> None:
        await self._process.wait()
        await self._stderr_reader
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._entry_path.unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group: the leader may have ended before what it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _keep_stderr(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (piece := await stderr.read(_READ)):
            self._stderr += piece
            del self._stderr[:-STDERR_KEPT]


def memory_of(pid: int) -> int | None:
    """A process's resident memory in bytes; None where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _kill_left(entry: Entry, mark: bytes) -> bool:
    """Kill what lives of a registered process and its group; whether there was any."""
    left = _left(entry, mark)
    for pid in left:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(left)


def _left(entry: Entry, mark: bytes) -> list[int]:
    """The pids that live of a registered process: itself, and what is in its group or session and has the mark."""
    if entry.started is None:
        return []
    left: list[int] = []
    for pid, (state, group, session, started) in _processes():
        if state in b"ZX" or started < entry.started:
            continue
        if pid == entry.pid:
            if started == entry.started:
                left.append(pid)
        elif entry.pid in (group, session) and _has_mark(pid, mark):
            left.append(pid)
    return left


def _processes() -> Iterator[tuple[int, tuple[bytes, int, int, int]]]:
    """All processes of the system: pid, then state, process group, session and start time."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
            yield int(path.name), (fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
