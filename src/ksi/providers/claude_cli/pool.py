"""The warm Claude Code processes: one for each conversation that was just active, bounded by number, age and memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import structlog

from ksi.clock import MICROSECONDS, Clock, microseconds
from ksi.providers.claude_cli.process import ClaudeProcess


class ClaudePool:
    """Holds processes between turns. It ends the others in the background, and by `close` at the latest."""

    def __init__(self, clock: Clock, *, limit: int, age: float, memory: int) -> None:
        """At most `limit` processes and `memory` bytes between turns, none longer than `age` seconds without one."""
        self._clock = clock
        self._limit = limit
        self._age = age
        self._memory = memory
        self._idle: OrderedDict[str, ClaudeProcess] = OrderedDict()
        self._working: set[ClaudeProcess] = set()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.claude")

    async def take(self, session: str) -> ClaudeProcess | None:
        """Take a session's process for the caller; None if there is none. An ending process of the session is waited
        for."""
        process = self._idle.pop(session, None)
        if process is not None:
            self._working.add(process)
        elif session in self._ending:
            await asyncio.shield(self._ending[session])
        return process

    def working(self, process: ClaudeProcess) -> None:
        """A process was started and works."""
        self._working.add(process)

    def put(self, process: ClaudeProcess) -> None:
        """Keep a process for its session's next turn; if there are too many, end the one that has waited longest."""
        self._working.discard(process)
        before = self._idle.pop(process.session, None)
        if before is not None:
            self._let_go(before)
        self._idle[process.session] = process
        while self._idle and self._is_too_much():
            self._let_go(self._idle.popitem(last=False)[1])
        if self._idle and (self._timer is None or self._timer.done()):
            self._timer = asyncio.create_task(self._keep_time(), name="claude pool")

    async def discard(self, process: ClaudeProcess, *, gently: bool = False) -> None:
        """End a process that must not continue, with its children; returns when that is done.

        `gently` gives it two seconds to write its pending output.
        """
        self._idle.pop(process.session, None)
        try:
            await (process.finish() if gently else process.stop())
        finally:
            self._working.discard(process)

    async def close(self) -> None:
        """End all processes: the warm ones politely, the working ones at once."""
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            self._let_go(self._idle.popitem()[1])
        async with asyncio.TaskGroup() as ends:
            for process in self._working:
                ends.create_task(process.stop())
        if self._ending:
            await asyncio.wait(self._ending.values())
        self._working.clear()

    def report(self) -> dict[str, Any]:
        """Size, limits and memory, and each process."""
        now = self._clock.now().mono
        listed = [
            *(_row(process, "working", now) for process in self._working),
            *(_row(process, "warm", now) for process in self._idle.values()),
        ]
        return {
            "warm": len(self._idle),
            "warm_limit": self._limit,
            "warm_age": self._age,
            "warm_memory": self._memory,
            "working": len(self._working),
            "memory_bytes": sum(row["memory_bytes"] or 0 for row in listed),
            "processes": listed,
        }

    def processes(self) -> Iterable[ClaudeProcess]:
        """All processes of this pool."""
        return [*self._working, *self._idle.values()]

    def _is_too_much(self) -> bool:
        """Measure at each turn's end, as warm processes do not grow."""
        return len(self._idle) > self._limit or sum(p.memory or 0 for p in self._idle.values()) > self._memory

    def _let_go(self, process: ClaudeProcess) -> None:
        session = process.session
        task = asyncio.create_task(process.finish(), name=f"end of claude {process.pid}")
        self._ending[session] = task
        task.add_done_callback(lambda _: self._ending.pop(session, None))

    async def _keep_time(self) -> None:
        """End processes that got too old, while there are any."""
        while self._idle:
            oldest = next(iter(self._idle.values()))
            left = oldest.used_at + microseconds(self._age) - self._clock.now().mono
            if left > 0:
                await self._clock.sleep(left / MICROSECONDS)
            elif self._idle.pop(oldest.session, None) is not None:
                self._log.debug("warm process ended", session=oldest.session, pid=oldest.pid)
                self._let_go(oldest)


def _row(process: ClaudeProcess, state: str, now: int) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "session": process.session,
        "model": process.launch.model,
        "state": state,
        "turns": process.turns,
        "idle_seconds": (now - process.used_at) / MICROSECONDS if state == "warm" else 0.0,
        "memory_bytes": process.memory,
    }
