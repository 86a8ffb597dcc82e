"""Help for tests of KSI and of programs built on it: a daemon in this process, and a clock that moves only on
demand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ksi.clock import Chance, Moment, SystemClock, microseconds
from ksi.config.reader import load
from ksi.daemon.daemon import Daemon
from ksi.daemon.parts import build_store
from ksi.host.private_files import make_folder
from ksi.store.base import Store

STUB: Mapping[str, Any] = {"kind": "stub", "max_concurrency": 64}


_AWAKE_BEFORE = 86_400.0
"""Seconds that the simulated machine had been up before its monotonic clock began."""


class SimulatedClock(SystemClock):
    """Time that stands still until `advance`, by the rules of the real clock.

    `advance` moves all of the machine's clocks. `sleep_machine` moves those that count sleep. `step_wall` moves the
    system's wall clock alone, which the daemon does not believe.
    """

    def __init__(self, wall: float = 1_700_000_000.0, mono: float = 1_000.0) -> None:
        self._real = microseconds(wall)
        self._mono = microseconds(mono)
        self._asleep = microseconds(_AWAKE_BEFORE)
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        super().__init__()

    def now(self) -> Moment:
        """This instant. A test may move time within a turn of the loop."""
        return self.read()

    def _read(self) -> tuple[int, int, int]:
        return self._real, self._mono + self._asleep, self._mono

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock was advanced so far."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._mono + microseconds(max(0.0, seconds)), next(self._numbers), future))
        await future

    def step_wall(self, seconds: float) -> None:
        """Move the system's wall clock alone, as an administrator or NTP would."""
        self._real += microseconds(seconds)

    def sleep_machine(self, seconds: float) -> None:
        """Let the machine sleep: its wall clock continues, and its monotonic clock stops."""
        self._real += microseconds(seconds)
        self._asleep += microseconds(seconds)

    async def advance(self, seconds: float) -> None:
        """Move all clocks, waking each sleeper at its own instant."""
        end = self._mono + microseconds(seconds)
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, future = heapq.heappop(self._sleepers)
            self._move_to(at)
            if not future.done():
                future.set_result(None)
                await settle_down()
        self._move_to(end)
        await settle_down()

    def _move_to(self, mono: int) -> None:
        self._real += mono - self._mono
        self._mono = mono


async def settle_down(turns: int = 50) -> None:
    """Let woken tasks run on the event loop."""
    for _ in range(turns):
        await asyncio.sleep(0)


@asynccontextmanager
async def running_daemon(
    home: Path | None = None,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    clock: SystemClock | None = None,
    chance: Chance | None = None,
    store: Store | None = None,
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Daemon]:
    """A daemon in this process and event loop, on a home of its own, stopped at the end.

    It has the stub provider `stub/*` and uses it by default, and makes no sentence vectors. `settings` are sections of
    keys as in ksi.toml; `environ` has the providers' keys.
    """
    with tempfile.TemporaryDirectory(prefix="ksi-") as folder:
        flags: dict[str, dict[str, Any]] = {
            "service": {"default_model": "stub/echo", "shutdown_grace": 2.0},
            "http": {"listen": ""},
            "patterns": {"vectors": False},
            "providers": {"local": {"enabled": False}, "stub": dict(STUB)},
        }
        for section, values in (settings or {}).items():
            flags.setdefault(section, {}).update(values)
        config = load(home or Path(folder), {}, flags)
        make_folder(config.run_dir)
        chance = chance or Chance(random.Random(0))
        # A daemon that soon stops gains nothing from a log of full length.
        store = store or build_store(config, chance, log_bytes=0)
        daemon = Daemon(config, clock or SystemClock(), chance, environ or {}, store)
        await daemon.start()
        try:
            yield daemon
        finally:
            await daemon.stop()
