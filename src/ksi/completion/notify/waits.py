"""Keeps the waits of this daemon's clients for the ends of requests. A wait that is over is removed completely."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ksi.errors import ShuttingDown, WaitTimeout
from ksi.events.bus import Listener
from ksi.events.completions import RequestReply

Waiter = Callable[[RequestReply], None]
Refuse = Callable[[Exception], None]


class Wait:
    """One wait for one request's end: it is answered once, refused once, or taken back."""

    __slots__ = ("_timer", "_waits", "answer", "listener", "refuse", "request_id")

    def __init__(
        self, waits: Waits, request_id: str, answer: Waiter, refuse: Refuse | None, listener: Listener | None
    ) -> None:
        self._waits = waits
        self._timer: asyncio.TimerHandle | None = None
        self.request_id = request_id
        self.answer = answer
        self.refuse = refuse
        self.listener = listener

    @property
    def waiting(self) -> bool:
        """Return whether it is neither answered nor refused nor taken back yet."""
        return self in self._waits

    def take_back(self) -> bool:
        """End the wait; returns True if it was still open."""
        return self._waits.remove(self)

    def limit(self, seconds: float) -> None:
        """Refuse with WaitTimeout if it still waits after these seconds."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out, seconds)

    def _time_out(self, seconds: float) -> None:
        if self.take_back() and self.refuse is not None:
            request_id = self.request_id
            self.refuse(
                WaitTimeout(f"{request_id!r} is not done after {seconds:g} s; wait again", request_id=request_id)
            )

    def over(self) -> None:
        """The wait has ended, and its timer with it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Waits:
    """All waits, by request and by the client that waits."""

    def __init__(self) -> None:
        self._by_request: dict[str, dict[Wait, None]] = {}
        self._by_listener: dict[Listener, dict[Wait, None]] = {}

    def __contains__(self, wait: Wait) -> bool:
        """Return whether this wait still waits."""
        return wait in self._by_request.get(wait.request_id, ())

    def awaited(self, request_id: str) -> bool:
        """Return whether anybody waits for this request."""
        return request_id in self._by_request

    def request_ids(self) -> list[str]:
        """The requests with waiting clients."""
        return list(self._by_request)

    def add(
        self, request_id: str, answer: Waiter, refuse: Refuse | None = None, listener: Listener | None = None
    ) -> Wait:
        """Wait for a request's end; a wait of a `listener` ends when that is gone."""
        wait = Wait(self, request_id, answer, refuse, listener)
        self._by_request.setdefault(request_id, {})[wait] = None
        if listener is not None:
            self._by_listener.setdefault(listener, {})[wait] = None
        return wait

    def remove(self, wait: Wait) -> bool:
        """End a wait; returns True if it existed."""
        if wait not in self:
            return False
        waiting = self._by_request[wait.request_id]
        del waiting[wait]
        if not waiting:
            del self._by_request[wait.request_id]
        self._let_go(wait)
        return True

    def answer(self, request_id: str, reply: RequestReply) -> None:
        """A request has ended: answer everybody who waits for it."""
        for wait in self._by_request.pop(request_id, {}):
            self._let_go(wait)
            wait.answer(reply)

    def refuse(self, request_id: str, error: Exception) -> None:
        """A request's end cannot be published: its waiting clients are refused."""
        for wait in list(self._by_request.get(request_id, ())):
            if wait.refuse is not None and self.remove(wait):
                wait.refuse(error)

    def forget(self, listener: Listener) -> None:
        """A client is gone, and with it all that it waited for."""
        for wait in list(self._by_listener.get(listener, ())):
            self.remove(wait)

    def refuse_all(self) -> None:
        """The daemon stops: notify all waiting clients that the requests are kept and continue when it is back."""
        for wait in [wait for waiting in self._by_request.values() for wait in waiting]:
            if wait.refuse is not None and self.remove(wait):
                wait.refuse(
                    ShuttingDown(
                        f"the daemon is stopping; {wait.request_id!r} is kept and continues when it is back: "
                        "ask for its end with completion:wait",
                        request_id=wait.request_id,
                        goes_on=True,
                    )
                )

    def _let_go(self, wait: Wait) -> None:
        wait.over()
        if wait.listener is not None:
            mine = self._by_listener[wait.listener]
            del mine[wait]
            if not mine:
                del self._by_listener[wait.listener]
