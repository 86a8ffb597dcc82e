"""Clients take turns: those that are due at one moment, and those whose lines take long to begin."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ksi.clock import Stopwatch, SystemStopwatch

AT_ONCE = 50
"""Clients that are served in one turn of the loop, at most."""

TURN_TIME = 0.01
"""Seconds after which no further one is served in the same turn."""


class Rota:
    """Calls due functions in order, some of them in each turn of the loop."""

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self._stopwatch = stopwatch or SystemStopwatch()
        self._due: deque[Callable[[], None]] = deque()
        self._turn_due = False

    def add(self, serve: Callable[[], None]) -> None:
        """Call this when those before it had their turn."""
        self._due.append(serve)
        self._go_on()

    def _go_on(self) -> None:
        if self._due and not self._turn_due:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        began = self._stopwatch.seconds()
        for _ in range(min(AT_ONCE, len(self._due))):
            self._due.popleft()()
            if self._stopwatch.seconds() - began > TURN_TIME:
                break
        self._go_on()


PASSED_OVER = 10
"""Turns after which a client that was passed over and has not asked since is not waited for."""


class Budget:
    """The time that beginning lines may take in one turn of the loop, for all clients together.

    Turns do not begin with another client each time: one that sends many lines would always come first, and use all of
    it up. So whoever found no time left, and had begun nothing, goes before all others in the next turns.
    """

    def __init__(self, stopwatch: Stopwatch, seconds: float) -> None:
        self._stopwatch = stopwatch
        self._most = seconds
        self._began: float | None = None
        self._turn = 0
        self._served: set[object] = set()
        """Clients that began something in this turn."""
        self._passed_over: dict[object, int] = {}
        """Clients that found no time left before they began anything: the turn in which they asked last."""
        self._due: set[object] = set()
        """Those of them for whom this turn is."""

    def spent(self, client: object) -> bool:
        """True if this client is to begin no more in this turn. The first that asks may always begin."""
        now = self._stopwatch.seconds()
        if self._began is None:
            self._begin(now)
        elif now - self._began > self._most:
            if client not in self._served:
                self._passed_over[client] = self._turn
            return True
        elif self._due and client not in self._due:
            return True
        self._passed_over.pop(client, None)
        self._served.add(client)
        return False

    def _begin(self, now: float) -> None:
        self._began = now
        self._turn += 1
        if self._passed_over:
            oldest = self._turn - PASSED_OVER
            self._passed_over = {client: turn for client, turn in self._passed_over.items() if turn >= oldest}
            self._due.update(self._passed_over)
        asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._began = None
        self._served.clear()
        self._due.clear()

    def forget(self, client: object) -> None:
        """A client is gone."""
        self._served.discard(client)
        self._due.discard(client)
        self._passed_over.pop(client, None)
