"""One provider's circuit breaker: when it has failed too often it is left alone, then tried with care (F3, F5).

    closed --(failures >= threshold and >= rate in the window)--> open
    open --(its time is over)--> half_open
    half_open --(a probe failed)--> open, for twice as long
    half_open --(enough probes succeeded)--> closed

A provider that names the time of its return is parked until then, whatever state it is in. All times are monotonic
microseconds; nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

import msgspec

from ksi.clock import microseconds
from ksi.config import BreakerConfig


class BreakerState(StrEnum):
    """Whether calls go out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Change(msgspec.Struct, frozen=True):
    """A step from one state to another, and why."""

    before: BreakerState
    after: BreakerState
    reason: str


class ProviderBreaker:
    """Counts what calls bring and says how many may run."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._state = BreakerState.CLOSED
        self._outcomes: deque[tuple[int, bool]] = deque()
        self._failures = 0
        self._reopens = 0
        self._until = 0
        self._parked_until = 0
        self._probes_passed = 0

    @property
    def state(self) -> BreakerState:
        """The state as of the last step."""
        return self._state

    def parked_until(self, now: int) -> int | None:
        """When the provider comes back by its own word; None where it is not away."""
        return self._parked_until if self._parked_until > now else None

    def limit(self, now: int, limit: int) -> int:
        """How many calls may run at once of the `limit` that the provider has: 0 while it is left alone."""
        if self._parked_until > now:
            return 0
        if self._state is BreakerState.OPEN:
            return 0
        if self._state is BreakerState.HALF_OPEN:
            return min(limit, self._config.probes)
        return limit

    def next_change(self, now: int) -> int | None:
        """When calls may go out again, where they may not now."""
        times = [self._parked_until] if self._parked_until > now else []
        if self._state is BreakerState.OPEN:
            times.append(self._until)
        return max(times, default=None)

    def tick(self, now: int) -> Change | None:
        """Go on to half-open when the time alone is over."""
        if self._state is BreakerState.OPEN and now >= self._until:
            self._probes_passed = 0
            return self._become(BreakerState.HALF_OPEN, "its time alone is over")
        return None

    def park(self, until: int) -> None:
        """The provider said when it comes back: no call goes out before."""
        self._parked_until = max(self._parked_until, until)

    def succeeded(self, now: int) -> Change | None:
        """A call brought an answer."""
        if self._state is BreakerState.HALF_OPEN:
            self._probes_passed += 1
            if self._probes_passed < self._config.probes_to_close:
                return None
            self._reopens = 0
            self._forget()
            return self._become(BreakerState.CLOSED, f"{self._probes_passed} probes in a row succeeded")
        self._note(now, failed=False)
        return None

    def failed(self, now: int, reason: str) -> Change | None:
        """A call failed by the provider's fault. One that was sent before the breaker opened changes nothing."""
        if self._state is BreakerState.HALF_OPEN:
            self._reopens += 1
            return self._open(now, f"a probe failed: {reason}")
        self._note(now, failed=True)
        enough = self._failures >= self._config.failures
        if self._state is BreakerState.CLOSED and enough and self._failures >= self._config.rate * len(self._outcomes):
            return self._open(now, f"{self._failures} of {len(self._outcomes)} calls failed, the last: {reason}")
        return None

    def reset(self) -> Change | None:
        """An operator says that it is well."""
        self._forget()
        self._reopens = 0
        self._parked_until = 0
        if self._state is BreakerState.CLOSED:
            return None
        return self._become(BreakerState.CLOSED, "reset by an operator")

    def _open(self, now: int, reason: str) -> Change:
        alone = min(self._config.open_for * 2.0**self._reopens, self._config.max_open_for)
        self._until = now + microseconds(alone)
        self._forget()
        return self._become(BreakerState.OPEN, reason)

    def _note(self, now: int, *, failed: bool) -> None:
        self._outcomes.append((now, failed))
        self._failures += failed
        oldest = now - microseconds(self._config.window)
        while self._outcomes[0][0] < oldest or len(self._outcomes) > self._config.max_samples:
            _, was_failure = self._outcomes.popleft()
            self._failures -= was_failure

    def _forget(self) -> None:
        self._outcomes.clear()
        self._failures = 0

    def _become(self, after: BreakerState, reason: str) -> Change:
        change = Change(self._state, after, reason)
        self._state = after
        return change
