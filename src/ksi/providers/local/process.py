"""The local model's process: it is started, gets its settings, and loads the model before calls begin."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from ksi.host.private_files import make_folder
from ksi.providers.process import ChildProcess, ProcessRegistry, ProcessStartError

SCRIPT = Path(__file__).with_name("server.py")
_LOG_LIMIT = 1024 * 1024
"""Bytes at which the next start puts the log aside (`.1`)."""
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("LC_", "DYLD_", "CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "VK_", "GGML_", "OMP_")


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that `server.py` reads from its stdin."""

    model_path: str
    alias: str
    """The model's name in answers."""
    context_tokens: int
    """The context of one slot, prompt and answer."""
    parallel: int
    """Slots: answers that are made at once."""
    threads: int | None
    fit: bool
    """If True, the library fits the model into the device's free memory, which costs a second."""
    unload_after: int
    """Seconds without a call until the model's memory is given back; -1: never."""
    api_key: str
    verbosity: int = 1


class ModelServer(msgspec.Struct, frozen=True):
    """A process that serves a model at `address` to callers with `api_key`."""

    process: ChildProcess
    address: str
    api_key: str


class _Introduction(msgspec.Struct, frozen=True):
    """The one line that the process prints."""

    address: str = ""
    error: str = ""


async def start_server(
    registry: ProcessRegistry,
    settings: ModelSettings,
    *,
    name: str,
    inherited: Mapping[str, str],
    log_path: Path,
    timeout: float,
) -> ModelServer:
    """Start a process and wait until it has loaded its model, at most `timeout` seconds.

    The registry calls it `name`; `inherited` is the daemon's environment; the file at `log_path` gets its stderr.

    Raises:
        ProcessStartError: it refused, ended, or took too long. Nothing of it is left running.
    """
    command = [sys.executable, "-I", str(SCRIPT)]
    try:
        with _open_log(log_path) as log:
            process = await ChildProcess.start(
                registry, command, name=name, environment=environment(inherited), stderr=log
            )
    except (OSError, ProcessStartError) as fault:
        raise ProcessStartError(f"its process cannot be started: {fault}") from None
    try:
        async with asyncio.timeout(timeout):
            await process.write(msgspec.json.encode(settings) + b"\n")
            said = await _introduction(process)
    except TimeoutError:
        await process.kill()
        raise ProcessStartError(f"it was not loaded after {timeout:g} s") from None
    except BaseException:
        await process.kill()
        raise
    if not said.address:
        await process.kill()
        raise ProcessStartError(said.error or f"its process ended while it loaded ({process.ending})")
    return ModelServer(process, said.address, settings.api_key)


async def _introduction(process: ChildProcess) -> _Introduction:
    """The process's line; an empty one if it ended instead."""
    line = b""
    while not line.endswith(b"\n") and (data := await process.read()):
        line += data
    return msgspec.json.decode(line, type=_Introduction) if line.endswith(b"\n") else _Introduction()


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The daemon's variables that find libraries and devices. No keys are among them."""
    return {name: value for name, value in inherited.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


def _open_log(path: Path) -> IO[bytes]:
    make_folder(path.parent)
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_LIMIT:
            path.replace(path.with_name(path.name + ".1"))
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))
