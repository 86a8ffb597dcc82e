"""The number of waiting requests by priority, counted no more often than is cheap."""

from __future__ import annotations

from collections.abc import Mapping

from ksi.clock import Clock
from ksi.request import Priority
from ksi.store.base import Store

SHARE = 50
"""The share of time that counting waiting requests by priority may take; between counts the last one is used."""


class WaitingCount:
    """Counts waiting requests by priority, no more often than is cheap."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._last: Mapping[Priority, int] | None = None
        self._next_at = 0

    async def now(self) -> Mapping[Priority, int] | None:
        """The present count, or the last one; None if the store cannot count."""
        begun = self._clock.now().mono
        if begun >= self._next_at:
            self._last = await self._store.waiting_by_priority()
            ended = self._clock.now().mono
            self._next_at = ended + SHARE * (ended - begun)
        return self._last
