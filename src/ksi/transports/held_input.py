"""Lines of all clients together that are not finished, or wait to be begun: they have one bound."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import msgspec

Owner = TypeVar("Owner", bound=Hashable)

REST = 0.75
"""The part of the bound that stays in use after clients have lost their input, so that this happens rarely."""


class Held(msgspec.Struct):
    """The unfinished input of one client."""

    order: int
    """Grows with each line that comes to its end: the lowest has been without progress for the longest time."""
    size: int
    """Bytes."""


def losers(clients: Iterable[tuple[Owner, Held]], bound: int) -> list[Owner]:
    """Choose the clients that lose their input, so that all others hold `REST` of the bound at most.

    Small clients are spared: only who holds more than its equal share of the bound can lose. Of those, the one without
    progress for the longest time loses first. So a client that sends a long line does not lose to one that began a long
    line earlier and left it unfinished.
    """
    all_clients = list(clients)
    total = sum(held.size for _, held in all_clients)
    if total <= bound:
        return []
    chosen = []
    share = bound * REST / len(all_clients)
    for owner, held in sorted(all_clients, key=lambda client: client[1].order):
        if total <= bound * REST:
            break
        if held.size > share:
            chosen.append(owner)
            total -= held.size
    return chosen


class HeldInput(Generic[Owner]):
    """Counts for each client, and says who loses when all together hold more than the bound."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._clients: dict[Owner, Held] = {}
        self._total = 0
        self._order = 0

    @property
    def total(self) -> int:
        """Bytes that all clients hold."""
        return self._total

    def note(self, owner: Owner, size: int, *, progress: bool) -> list[Owner]:
        """A client holds so many bytes now. `progress` says that a line came to its end.

        Returns who loses by that. They are not counted any more: the caller drops their input.
        """
        held = self._clients.get(owner)
        if not size:
            self.forget(owner)
            return []
        if held is None:
            held = self._clients[owner] = Held(self._next(), 0)
        elif progress:
            held.order = self._next()
        self._total += size - held.size
        held.size = size
        if self._total <= self.bound:
            return []
        chosen = losers(self._clients.items(), self.bound)
        for one in chosen:
            self.forget(one)
        return chosen

    def forget(self, owner: Owner) -> None:
        """A client holds nothing any more."""
        held = self._clients.pop(owner, None)
        if held is not None:
            self._total -= held.size

    def _next(self) -> int:
        self._order += 1
        return self._order
