"""A daemon on a loop of its own thread, and the CPU time that its longest turn took.

CPU time of that thread alone: the load of the machine and the work of other threads add nothing to it.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ksi.daemon.daemon import Daemon
from ksi.testing import running_daemon

_WORK = 200_000
_WORK_TAKES = 0.004
"""Seconds of CPU that counting takes if 50 ms were set as the bound."""


class Turns:
    """The longest turn of a loop since the last `reset`, in seconds of its thread's CPU time."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.began: float | None = None

    def ended(self) -> None:
        if self.began is not None:
            self.longest = max(self.longest, time.thread_time() - self.began)

    def reset(self) -> None:
        self.longest = 0.0


class _Selector(selectors.DefaultSelector):  # chosen when it is imported
    """Tells when the loop waits for news: a turn is over, and after it another one begins."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns.ended()
        found: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
        self._turns.began = time.thread_time()
        return found


@asynccontextmanager
async def daemon_in_thread(
    settings: Mapping[str, Mapping[str, Any]],
    environ: Mapping[str, str] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> AsyncIterator[tuple[Daemon, asyncio.AbstractEventLoop]]:
    """A daemon on a loop of its own thread."""
    ready: asyncio.Future[tuple[Daemon, asyncio.AbstractEventLoop, asyncio.Event]] = asyncio.Future()
    mine = asyncio.get_running_loop()

    async def serve() -> None:
        async with running_daemon(settings=settings, environ=environ) as daemon:
            enough = asyncio.Event()
            mine.call_soon_threadsafe(ready.set_result, (daemon, asyncio.get_running_loop(), enough))
            await enough.wait()

    def work() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            try:
                runner.run(serve())
            except BaseException as error:
                if not ready.done():
                    mine.call_soon_threadsafe(ready.set_exception, error)
                raise

    thread = threading.Thread(target=work, name="watched-daemon")
    thread.start()
    daemon, loop, enough = await ready
    try:
        yield daemon, loop
    finally:
        loop.call_soon_threadsafe(enough.set)
        await asyncio.to_thread(thread.join)


@asynccontextmanager
async def watched_daemon(
    settings: Mapping[str, Mapping[str, Any]], environ: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Path, Turns]]:
    """A daemon in a thread: the path of its socket, and its loop's turns."""
    turns = Turns()
    # As the daemon's own process does: objects of the start are frozen.
    gc.collect()
    gc.freeze()
    try:
        async with daemon_in_thread(settings, environ, lambda: asyncio.SelectorEventLoop(_Selector(turns))) as served:
            yield served[0].config.socket_path, turns
    finally:
        gc.unfreeze()


def allowed(seconds: float) -> float:
    """A bound for CPU time, larger by as much as this machine is slower than the one that it was set for."""
    began = time.thread_time()
    for _ in range(_WORK):
        pass
    return seconds * max(1.0, (time.thread_time() - began) / _WORK_TAKES)
