"""Processes of providers. Each has a group of its own and ends with the daemon; none is left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, cast

import msgspec
import psutil

from ksi.clock import Clock
from ksi.host.marks import MARK
from ksi.host.private_files import make_folder
from ksi.providers.masking import masked

LAUNCHER = Path(__file__).with_name("process_launcher.py")
STDERR_KEPT = 8 * 1024
"""Bytes of stderr that are kept for messages: the last."""
_SHOWN_STDERR = 500
"""Characters of it that a message repeats."""
_AHEAD = 4 * 1024 * 1024
"""Bytes that are read ahead of the reader."""
_STDIN, _STDOUT = 0, 1
_LAST_WORDS = 0.5
"""Seconds in which the last output of an ended process must come."""
_NOTHING = 0
"""The signal that only asks if a process is there."""
_PAUSE = 0.02
_START_SLACK = 5.0
"""Seconds between a process's start and its entry in the registry, at most."""
_REAP_PATIENCE = 5.0


class ProcessStartError(Exception):
    """A process could not be started; the message says why."""


class StrayError(Exception):
    """A program belongs to a process of the registry that has ended, or has ended itself."""


class RegistryEntry(msgspec.Struct, frozen=True):
    """A process as the registry has it."""

    pid: int
    started: float
    """Clock ticks since the machine's boot on Linux, else Unix time in seconds."""
    name: str


class ProcessRegistry:
    """A folder with a file for each process, written by the process itself before it becomes the program.

    The file's path is also in the process's environment, which its own children inherit. They are known by it,
    whichever group or session they moved to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    def new_path(self) -> Path:
        """The path at which the next process is to register."""
        make_folder(self._folder)
        return self._folder / f"{os.getpid()}-{next(self._numbers)}"

    async def reap(self, clock: Clock) -> list[RegistryEntry]:
        """Kill the processes that an earlier daemon left running, and wait until they are gone; returns their entries.

        A pid that another process has by now is not touched: its start time differs.
        """
        entries = dict(self._entries())
        found = [entry for path, entry in entries.items() if _kill(_left(path, entry))]
        waited = 0.0
        while found and waited < _REAP_PATIENCE and any(_left(path, entry) for path, entry in entries.items()):
            await clock.sleep(_PAUSE)
            waited += _PAUSE
        for path in entries:
            path.unlink(missing_ok=True)
        return found

    def leader_of(self, pid: int, living: Mapping[int, str]) -> int | None:
        """The process that started a program, directly or by others: one of the `living`, whose marks are given by pid;
        None if it is none of the registry's.

        A program is known by its session, its mark, and its ancestors. One that has ended could be anybody's, so it
        counts as a stray one while any process lives.

        Raises:
            StrayError: its process is not there any more.
        """
        leaders = {mark: leader for leader, mark in living.items()}
        looked = False
        for process in _lineage(pid):
            looked = True
            session = _session(process)
            if session in living:
                return session
            mark = _mark(process)
            if mark in leaders:
                return leaders[mark]
            if mark is not None and Path(mark).parent == self._folder:
                raise StrayError
        if not looked and living and pid not in (0, os.getpid()):
            raise StrayError
        return None

    def _entries(self) -> Iterator[tuple[Path, RegistryEntry]]:
        for path in sorted(self._folder.glob("*-*")) if self._folder.is_dir() else ():
            try:
                yield path, msgspec.json.decode(path.read_bytes(), type=RegistryEntry)
            except msgspec.DecodeError:
                path.unlink(missing_ok=True)  # killed while it registered: it never became the program


class _Pipes(asyncio.SubprocessProtocol):
    """A process's output, and its readiness to read. Its children may hold its pipes after its end."""

    def __init__(self, *, keeps_stderr: bool) -> None:
        self.exited = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.stderr = bytearray()
        self.stderr_cut = False
        """True if only the end of it is kept."""
        self.stderr_ended = asyncio.Event()
        if not keeps_stderr:
            self.stderr_ended.set()
        self._transport: asyncio.SubprocessTransport | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._ended = False
        self._news = asyncio.Event()

    async def read(self) -> bytes:
        """Read the present output of stdout; empty at the end."""
        while not self._pieces and not self._ended:
            self._news.clear()
            try:
                async with asyncio.timeout(_LAST_WORDS if self.exited.is_set() else None):
                    await self._news.wait()
            except TimeoutError:
                return b""
        data = b"".join(self._pieces)
        self._pieces.clear()
        if self._size >= _AHEAD:
            self._out().resume_reading()
        self._size = 0
        return data

    def _out(self) -> asyncio.ReadTransport:
        transport = cast(asyncio.SubprocessTransport, self._transport)
        return cast(asyncio.ReadTransport, transport.get_pipe_transport(_STDOUT))

    # -- called by the loop ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The process runs."""
        self._transport = cast(asyncio.SubprocessTransport, transport)  # by its duties: uvloop's are of no such class

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """It wrote."""
        if fd != _STDOUT:
            self.stderr += data
            self.stderr_cut = self.stderr_cut or len(self.stderr) > STDERR_KEPT
            del self.stderr[:-STDERR_KEPT]
            return
        self._pieces.append(data)
        before, self._size = self._size, self._size + len(data)
        if before < _AHEAD <= self._size:
            self._out().pause_reading()
        self._news.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """It closed a pipe."""
        if fd == _STDOUT:
            self._ended = True
            self._news.set()
        elif fd == _STDIN:
            self.writable.set()
        else:
            self.stderr_ended.set()

    def process_exited(self) -> None:
        """It ended."""
        self.exited.set()
        self.writable.set()
        self._news.set()

    def pause_writing(self) -> None:
        """It does not read as fast as is written."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self.writable.set()


class ChildProcess:
    """A running program: pipes to it, its end, and the end of its group."""

    def __init__(
        self, transport: asyncio.SubprocessTransport, pipes: _Pipes, entry_path: Path, secrets: Sequence[str] = ()
    ) -> None:
        self._transport = transport
        self._pipes = pipes
        self._entry_path = entry_path
        self._secrets = secrets
        self._closing: asyncio.Task[None] | None = None
        self.pid: int = transport.get_pid() or 0
        """The pid of the process, which leads a group and a session of the same number."""

    @classmethod
    async def start(
        cls,
        registry: ProcessRegistry,
        program: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str],
        folder: Path | None = None,
        stderr: IO[bytes] | None = None,
        secrets: Sequence[str] = (),
    ) -> ChildProcess:
        """Start a program in a session of its own; the registry calls it `name`.

        It runs in `folder` (None: in the daemon's). Its stderr goes to the file `stderr`; without one the end of it is
        kept for `ending`, without `secrets` (longest first).

        Raises:
            ProcessStartError: the system said no. That the program cannot be run comes by its exit code and stderr.
        """
        entry_path = registry.new_path()
        command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(entry_path), name, *program]
        launch = asyncio.get_running_loop().subprocess_exec(
            partial(_Pipes, keeps_stderr=stderr is None),
            *command,
            stderr=asyncio.subprocess.PIPE if stderr is None else stderr,
            env={**environment, MARK: str(entry_path)},
            cwd=folder,
            start_new_session=True,
        )
        launching = asyncio.ensure_future(launch)
        try:
            return cls(*await asyncio.shield(launching), entry_path, secrets)
        except (OSError, ValueError) as error:
            raise ProcessStartError(str(error)) from None
        except asyncio.CancelledError:
            with suppress(OSError, ValueError):
                await cls(*await launching, entry_path).kill()
            raise

    @property
    def mark(self) -> str:
        """What its descendants have in their environment as `MARK`."""
        return str(self._entry_path)

    @property
    def ended(self) -> bool:
        """True once its end is known."""
        return self._pipes.exited.is_set()

    @property
    def ending(self) -> str:
        """How it ended, in words, with the end of its stderr."""
        code = self._transport.get_returncode()
        if code is None:
            return "still running"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        said = self._pipes.stderr.decode("utf-8", "replace")
        if self._pipes.stderr_cut:
            # The beginning may be half of a secret.
            said = said[max(map(len, self._secrets), default=0) :]
        said = masked(said, self._secrets).strip()
        return f"{how}: {said[-_SHOWN_STDERR:]}" if said else how

    async def write(self, data: bytes) -> None:
        """Send to its stdin. A process that does not read makes this wait. If it has ended, the data is lost and
        `read` shows the end."""
        stdin = cast(asyncio.WriteTransport | None, self._transport.get_pipe_transport(_STDIN))
        if stdin is not None and not stdin.is_closing():
            stdin.write(data)
            await self._pipes.writable.wait()

    async def read(self) -> bytes:
        """Read the present output of its stdout; empty at the end."""
        return await self._pipes.read()

    async def ends_within(self, seconds: float) -> bool:
        """Wait for its end and its last output, at most so long; True if it ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._pipes.exited.wait()
                await self._pipes.stderr_ended.wait()
        return self.ended

    async def finish(self, grace: float) -> None:
        """Close its stdin so that it ends; after `grace` seconds kill it and its group."""
        stdin = self._transport.get_pipe_transport(_STDIN)
        if stdin is not None:
            stdin.close()
        await self.ends_within(grace)
        await self.kill()

    async def stop(self, grace: float) -> None:
        """Kill it at once, give its children `grace` seconds to end in order, and kill those that are left."""
        self._signal(signal.SIGKILL, group=False)
        self._signal(signal.SIGTERM)
        waited = 0.0
        try:
            await self._pipes.exited.wait()
            while waited < grace and self._signal(_NOTHING):
                await asyncio.sleep(_PAUSE)
                waited += _PAUSE
        finally:
            await self.kill()
            await asyncio.shield(self._sweep())

    async def kill(self) -> None:
        """Kill its group and take it off the system's table; a cancellation waits until that is done."""
        if self._closing is None:
            self._signal(signal.SIGKILL)
            self._closing = asyncio.create_task(self._close(), name=f"end of {self.pid}")
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await self._closing
            raise

    async def _close(self) -> None:
        await self._pipes.exited.wait()
        self._transport.close()
        self._entry_path.unlink(missing_ok=True)

    async def _sweep(self) -> None:
        """Kill its descendants in other groups and sessions, and wait until they are gone."""
        waited = 0.0
        while _kill(await asyncio.to_thread(_left, self._entry_path)) and waited < _REAP_PATIENCE:
            await asyncio.sleep(_PAUSE)
            waited += _PAUSE

    def _signal(self, number: int, *, group: bool = True) -> bool:
        """Send a signal to the whole group, because the leader may end before its children; True if the group
        exists."""
        if self._closing is not None:
            return False
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def memory_of(pid: int) -> int | None:
    """A process's resident memory in bytes; None if the system does not tell."""
    try:
        return psutil.Process(pid).memory_info().rss
    except (psutil.Error, OSError):  # such as no descriptor left
        return None


def _kill(pids: Sequence[int]) -> bool:
    """Kill processes; True if there was any."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _left(entry_path: Path, entry: RegistryEntry | None = None) -> list[int]:
    """The living pids of a registered process: its own, those of its session, and those that inherited its mark.

    The session counts only while its leader lives and is ours, as its number may become another's later. It is needed
    on macOS, because many programs there do not show their environment.
    """
    found = [process for process in _processes() if _has_mark(process, str(entry_path))]
    if entry is not None and (leader := _registered(entry)) is not None:
        found += [process for process in _processes() if _session(process) == entry.pid]
        found.append(leader)
    return sorted({process.pid for process in found if _lives(process)})


def _processes() -> Iterator[psutil.Process]:
    """All processes of the system but this one, each freshly read."""
    for pid in psutil.pids():
        with suppress(psutil.Error):
            if pid != os.getpid():
                yield psutil.Process(pid)


def _registered(entry: RegistryEntry) -> psutil.Process | None:
    """The process of an entry, unless its pid is another's by now."""
    try:
        process = psutil.Process(entry.pid)
        since_boot = process.create_time() - psutil.boot_time()
        if sys.platform == "linux":
            same = round(since_boot * os.sysconf("SC_CLK_TCK")) == entry.started
        else:
            same = abs(process.create_time() - entry.started) < _START_SLACK
    except psutil.Error:
        return None
    return process if same else None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _has_mark(process: psutil.Process, mark: str) -> bool:
    return _mark(process) == mark


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def _lineage(pid: int) -> Iterator[psutil.Process]:
    """A process and its ancestors, up to this process or the system's first."""
    with suppress(psutil.Error):
        while pid > 1 and pid != os.getpid():
            process = psutil.Process(pid)
            yield process
            pid = process.ppid()
