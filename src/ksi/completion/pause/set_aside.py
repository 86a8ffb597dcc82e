"""Returns requests that a pause has set aside to the queue after its end."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.store.base import Store
from ksi.store.values import Paused

LOOKS = 4
"""Looks after a change. The first comes at once, the others each with a renewal of the lease: until then another daemon
may set requests aside by outdated pauses, and die before it gets the news."""


class SetAside:
    """Looks through all that is set aside, one step at a time, after the start and whenever less is paused."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._paused: Paused | None = None
        self._after: str | None = None
        self._looking = False
        self._left = 0

    def look_again(self) -> None:
        """A lease was renewed: look once more if there was a change lately."""
        if self._left and not self._looking:
            self._begin()

    async def step(self, paused: Paused, now: Moment) -> bool:
        """Bring back some requests that are not paused any more; returns True if there may be more.

        Raises:
            StoreError: the step is to be taken again.
        """
        if self._paused is None or not paused.covers(self._paused):
            self._left = LOOKS
            self._begin()
        self._paused = paused
        if self._looking:
            self._after = await self._store.bring_back(paused, now, self._after)
            self._looking = self._after is not None
        return self._looking

    def _begin(self) -> None:
        self._left -= 1
        self._after, self._looking = None, True
