"""A run that waits for a request gives back its provider's slot, and gets it again before it continues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec

from ksi.clock import Clock
from ksi.completion.completion_runner import Run
from ksi.completion.provider_manager import ProviderManager


class _Waiting(msgspec.Struct):
    """A run and the requests that it waits for at this moment."""

    run: Run
    left: int | None
    """The rest of its time when it began to wait, in microseconds: its time stands still meanwhile."""
    awaited: list[str] = []
    slot: bool = True
    """It has its provider's slot."""
    back: asyncio.Future[None] | None = None
    """It wants its slot again, and continues when this is done."""


class Lending:
    """Knows which runs of this daemon wait for which requests. The store counts them as running all the while: returned
    slots are offered in addition to their providers' own, and slots that they want again are kept free for them
    first."""

    def __init__(self, providers: ProviderManager, runs: Mapping[str, Run], clock: Clock) -> None:
        """`runs` are those of this daemon, by request id."""
        self._providers = providers
        self._runs = runs
        self._clock = clock
        self._waiting: dict[Run, _Waiting] = {}

    def awaited_by(self, request_id: str) -> tuple[str, ...]:
        """The requests that a run waits for."""
        run = self._runs.get(request_id)
        waiting = None if run is None else self._waiting.get(run)
        return () if waiting is None else tuple(waiting.awaited)

    @asynccontextmanager
    async def wait(self, run: Run, awaited: str) -> AsyncIterator[None]:
        """Inside, the run waits for this request without a slot; it leaves when it has one again.

        It may wait for several at once. A run that is stopped does not wait for its slot.
        """
        waiting = self._begin(run, awaited)
        try:
            yield
            if waiting.awaited == [awaited] and self._waiting.get(run) is waiting:
                await self._slot_again(waiting)
        finally:
            self._end(waiting, awaited)

    def look(self) -> None:
        """A run has ended: those that want their slot again may have it, in the order in which they began to wait.

        It lends nothing any more, even if a program of its own waits on.
        """
        for run in [run for run in self._waiting if self._runs.get(run.claim.request_id) is not run]:
            self._drop(self._waiting[run])
        for waiting in self._waiting.values():
            provider = waiting.run.claim.provider
            if waiting.back is not None and not waiting.back.done() and self._active(provider) < self._own(provider):
                self._take(waiting)
                waiting.back.set_result(None)

    def _own(self, provider: str) -> int:
        return self._providers.slots(provider)

    def _active(self, provider: str) -> int:
        """How many runs there have a slot."""
        running = [run for run in self._runs.values() if run.claim.provider == provider]
        without = [one for one in self._waiting.values() if not one.slot and one.run.claim.provider == provider]
        return len(running) - len(without)

    def _begin(self, run: Run, awaited: str) -> _Waiting:
        waiting = self._waiting.get(run)
        if waiting is None:
            left = None if run.deadline is None else max(0, run.deadline - self._clock.now().mono)
            run.deadline = None
            waiting = self._waiting[run] = _Waiting(run, left)
        waiting.awaited.append(awaited)
        if waiting.slot:
            self._give(waiting)
        return waiting

    def _drop(self, waiting: _Waiting) -> None:
        del self._waiting[waiting.run]
        self._tell(waiting)
        if waiting.back is not None and not waiting.back.done():
            waiting.back.set_result(None)

    async def _slot_again(self, waiting: _Waiting) -> None:
        back = waiting.back = asyncio.get_running_loop().create_future()
        self._tell(waiting)
        self.look()
        try:
            await back
        finally:
            waiting.back = None
            self._tell(waiting)

    def _end(self, waiting: _Waiting, awaited: str) -> None:
        waiting.awaited.remove(awaited)
        if self._waiting.get(waiting.run) is not waiting:
            return  # its run has ended
        if waiting.awaited:
            if waiting.slot:
                self._give(waiting)
            return
        if not waiting.slot:
            self._take(waiting)
        del self._waiting[waiting.run]
        self._tell(waiting)
        if waiting.left is not None:
            waiting.run.deadline = self._clock.now().mono + waiting.left

    def _give(self, waiting: _Waiting) -> None:
        waiting.slot = False
        self._tell(waiting)

    def _take(self, waiting: _Waiting) -> None:
        waiting.slot = True
        self._tell(waiting)

    def _tell(self, waiting: _Waiting) -> None:
        """Have the provider offered with the slots that are free now: those that are wanted again are not."""
        provider = waiting.run.claim.provider
        without = [one for one in self._waiting.values() if not one.slot and one.run.claim.provider == provider]
        wanted = sum(one.back is not None and not one.back.done() for one in without)
        self._providers.lend(provider, len(without) - wanted)
