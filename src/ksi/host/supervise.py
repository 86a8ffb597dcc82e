"""Long-lived tasks that do one step again and again, survive its faults, and tell of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from ksi.clock import Clock, Moment, to_seconds
from ksi.errors import KsiError

BACKOFF = 1.0
"""Seconds before a step that failed is tried again. The pause doubles with each fault after it."""

MAX_BACKOFF = 10.0
"""Seconds between two tries at most, and so for which `system:health` tells of a fault that has passed."""


class Supervised:
    """A task whose step waits for its own reason. A fault ends a step, never the task.

    A step that fails must leave its reason standing: the next one takes it up after a pause.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[None]],
        clock: Clock,
        *,
        backoff: float = BACKOFF,
        longest_pause: float = MAX_BACKOFF,
        vital: bool = False,
    ) -> None:
        """`name` is the task's, in the log and in `system:health`.

        After a fault the pause is `backoff` seconds and grows up to `longest_pause`. Without a `vital` task no requests
        are served: the daemon is not ready while its last step failed.
        """
        self.name = name
        self.vital = vital
        self._step = step
        self._backoff = backoff
        self._longest = longest_pause
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._hurried = asyncio.Event()
        self._finishing = False
        self._faults = 0
        self._fault = ""
        self._since: Moment | None = None
        self._log = structlog.get_logger("ksi.tasks")

    @property
    def alive(self) -> bool:
        """True while the task runs."""
        return self._task is not None and not self._task.done()

    @property
    def well(self) -> bool:
        """True while the task runs and its last step did not fail."""
        return self.alive and self._since is None

    @property
    def problem(self) -> str | None:
        """One sentence on why the step is failing, and for how long; None if the last one succeeded."""
        if not self.alive:
            return f"task {self.name} has ended"
        if self._since is None:
            return None
        lasted = to_seconds(self._clock.now().mono - self._since.mono)
        return f"task {self.name} has failed for {lasted:.0f} s: {self._fault}"

    def hurry(self) -> None:
        """End the pause between two steps."""
        self._hurried.set()

    def start(self) -> None:
        """Begin."""
        self._finishing = False
        self._task = asyncio.create_task(self._run(), name=self.name)

    async def stop(self) -> None:
        """End, also in the middle of a step."""
        if self._task is not None:
            self._task.cancel()
            await self._ended()

    async def finish(self) -> None:
        """End behind the present step."""
        self._finishing = True
        self._hurried.set()
        await self._ended()

    async def _ended(self) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while not self._finishing:
            try:
                await self._rest()
                if not self._finishing:
                    await self._step()
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - the top of a long-lived loop: a defect must not end it
                self._failed(error)
            else:
                self._faults, self._since = 0, None

    async def _rest(self) -> None:
        """Pause behind a fault."""
        if self._faults:
            await self._pause(min(self._backoff * self._growth(), self._longest))

    async def _pause(self, seconds: float) -> None:
        slept = asyncio.ensure_future(self._clock.sleep(seconds))
        hurried = asyncio.ensure_future(self._hurried.wait())
        try:
            await asyncio.wait((slept, hurried), return_when=asyncio.FIRST_COMPLETED)
        finally:
            slept.cancel()
            hurried.cancel()
        self._hurried.clear()

    def _growth(self) -> float:
        return float(2.0 ** min(self._faults - 1, 10))

    def _failed(self, error: BaseException) -> None:
        self._faults += 1
        self._fault = in_words(error)
        if self._since is None:
            self._since = self._clock.now()
        if isinstance(error, KsiError | OSError):
            self._log.error("task failed, trying again", task=self.name, error=self._fault)
        else:
            self._log.error("task failed, trying again", task=self.name, exc_info=error)


class Periodic(Supervised):
    """A task that waits so many seconds, does its step, and waits again."""

    def __init__(
        self,
        name: str,
        step: Callable[[], Awaitable[None]],
        every: float,
        clock: Clock,
        *,
        longest_pause: float = MAX_BACKOFF,
        vital: bool = False,
    ) -> None:
        """`every` is the pause between two steps in seconds, and the first one comes before the first step.

        After a fault the pause is at least a second and grows up to `longest_pause`, or stays at `every` if that is
        longer.
        """
        longest = max(longest_pause, every)
        super().__init__(name, step, clock, backoff=max(BACKOFF, every), longest_pause=longest, vital=vital)
        self._every = every

    async def _rest(self) -> None:
        if self._faults:
            await super()._rest()
        else:
            await self._pause(self._every)


def is_cancelled() -> bool:
    """True if the present task was cancelled: then its CancelledError must propagate.

    Code below a step can raise one by itself, as when it waits for a future that was cancelled. Nothing would say that
    the task has ended by it.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def in_words(error: BaseException) -> str:
    """The text of an error, even if its own formatting raises."""
    with suppress(Exception):
        return str(error) or type(error).__name__
    return type(error).__name__
