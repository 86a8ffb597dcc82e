"""The local model's process as the daemon holds it: started, watched, stopped, never left behind (F7)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

SCRIPT = Path(__file__).with_name("local_server.py")
_GRACE = 2.0
"""Seconds between the polite end of the process and the kill."""
_LOG_LIMIT = 1024 * 1024
"""Bytes at which the next start puts the log aside (`.1`)."""
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("LC_", "DYLD_", "CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "VK_", "GGML_", "OMP_")


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told, as `local_server` reads it."""

    model_path: str
    alias: str
    """The model's name in answers."""
    context_tokens: int
    """Of one slot, prompt and answer."""
    parallel: int
    """Slots: answers that are made at once."""
    threads: int | None
    fit: bool
    """Whether to look for a device's free memory and fit the model in; costs a second."""
    unload_after: int
    """Seconds without a call until the model's memory is given back; -1: never."""
    api_key: str
    verbosity: int = 1


class ChildFailedError(Exception):
    """The process did not get ready; the message says why."""


class _Report(msgspec.Struct, frozen=True):
    """The process's one line."""

    address: str = ""
    error: str = ""


class Child:
    """One process that serves a model at `address`, in a process group of its own.

    It dies with the daemon: by the kernel's parent-death signal on Linux, and everywhere by the end of its stdin.
    """

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @classmethod
    async def start(cls, settings: ModelSettings, log_path: Path, timeout: float) -> Child:
        """Start a process and wait until its model is loaded, at most `timeout` seconds.

        Raises:
            ChildFailedError: it said no, ended, or took too long; nothing of it is left running.
        """
        try:
            with _open_log(log_path) as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-I",
                    str(SCRIPT),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment(os.environ),
                    start_new_session=True,
                )
        except OSError as fault:
            raise ChildFailedError(f"its process cannot be started: {fault}") from None
        child = cls(process, "")
        try:
            async with asyncio.timeout(timeout):
                report = await child._introduce(settings)
        except TimeoutError:
            await child.kill()
            raise ChildFailedError(f"it was not loaded after {timeout:g} s") from None
        except BaseException:
            await child.kill()
            raise
        if not report.address:
            await child.kill()
            raise ChildFailedError(report.error or f"its process ended while it loaded ({child.ending})")
        child.address = report.address
        return child

    @property
    def pid(self) -> int:
        """Of the process, which leads a process group of the same number."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._process.returncode is not None

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if code is None:
            return "still running"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    async def ends_within(self, seconds: float) -> bool:
        """Wait for its end, at most so long; whether it came."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._process.wait()
        return self.ended

    async def stop(self) -> None:
        """End it: its stdin is closed, and after a grace it is killed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self.ends_within(_GRACE)
        await self.kill()

    async def kill(self) -> None:
        """Kill its process group and take it off the system's table."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            await self._process.stdout.read()

    async def _introduce(self, settings: ModelSettings) -> _Report:
        """Tell it the settings, hear its line; an empty report when it ended instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ChildFailedError("its process has no pipes")
        with suppress(ConnectionError):
            stdin.write(msgspec.json.encode(settings) + b"\n")
            await stdin.drain()
        line = await stdout.readline()
        return msgspec.json.decode(line, type=_Report) if line.endswith(b"\n") else _Report()


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What of the daemon's environment the process gets: what finds libraries and devices, and no keys (S3)."""
    return {name: value for name, value in inherited.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_LIMIT:
            path.replace(path.with_name(path.name + ".1"))
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))
