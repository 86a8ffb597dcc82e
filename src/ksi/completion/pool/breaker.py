"""One provider's circuit breaker: it opens when calls fail too often, then lets a few probes through.

    closed --(failures >= threshold and >= rate in the window)--> open
    open --(its time is over)--> half_open
    half_open --(a probe failed)--> open, for twice as long
    half_open --(enough probes succeeded)--> closed

A call belongs to the era in which it began; an era ends when the breaker opens. Outcomes of calls from an earlier era
are ignored: a hundred calls that hung before the opening do not count against a provider that is being probed.

The breaker judges the provider, not its callers. A request that fails again at the same provider says something about
the request and is not counted. Failures of one caller alone open nothing while others are answered.

A provider that names the time of its return, or that cannot be reached, is no case for the breaker: see
`ksi.completion.pool.limits`. All times are microseconds of wall time; nothing here reads a clock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from enum import StrEnum

import msgspec

from ksi.clock import microseconds
from ksi.config.schema import BreakerConfig

_DOUBLINGS = 32
"""After so many the configured maximum has long been reached."""


class BreakerState(StrEnum):
    """The three states of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Change(msgspec.Struct, frozen=True):
    """A step from one state to another, and why."""

    before: BreakerState
    after: BreakerState
    reason: str


class BreakerRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A breaker's whole memory, except for running calls: the part that daemons on one store share."""

    state: BreakerState = BreakerState.CLOSED
    reason: str = ""
    """Why it is in this state."""
    era: int = 0
    until: int = 0
    reopens: int = 0
    probes_passed: int = 0
    samples: tuple[tuple[int, bool, int], ...] = ()
    """Its latest calls in the order of their ends: when, whether they failed, and a number for their caller."""

    @property
    def wary(self) -> bool:
        """Return whether calls that succeed change it too; a healthy breaker ignores them."""
        return self.state is not BreakerState.CLOSED or any(failed for _, failed, _ in self.samples)

    def shifted(self, by: int) -> BreakerRecord:
        """The same on a clock that is ahead by so many microseconds."""
        return msgspec.structs.replace(
            self,
            until=self.until + by,
            samples=tuple((at + by, failed, caller) for at, failed, caller in self.samples),
        )


class ProviderBreaker:
    """Counts outcomes of calls and limits how many may run. Each call that `began` is ended by exactly one of
    `succeeded`, `failed` and `dropped`, with the era that `began` gave it."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._state = BreakerState.CLOSED
        self._reason = ""
        self._outcomes: deque[tuple[int, bool, int]] = deque()
        self._failures = 0
        self._reopens = 0
        self._until = 0
        self._probes_passed = 0
        self._era = 0
        self._running = 0
        self._stragglers = 0

    @property
    def era(self) -> int:
        """The generation of a call that begins now."""
        return self._era

    @property
    def record(self) -> BreakerRecord:
        """Return the breaker's memory."""
        return BreakerRecord(
            state=self._state,
            reason=self._reason,
            era=self._era,
            until=self._until,
            reopens=self._reopens,
            probes_passed=self._probes_passed,
            samples=tuple(self._outcomes),
        )

    def adopt(self, record: BreakerRecord) -> None:
        """Remember this instead; calls that run belong to their eras as before."""
        if record.era != self._era:
            self._stragglers += self._running
            self._running = 0
        self._state = record.state
        self._reason = record.reason
        self._era = record.era
        self._until = record.until
        self._reopens = record.reopens
        self._probes_passed = record.probes_passed
        self._outcomes = deque(record.samples)
        self._failures = sum(failed for _, failed, _ in record.samples)

    # -- running calls ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> BreakerState:
        """The state as of the last step."""
        return self._state

    def limit(self, slots: int) -> int:
        """Return how many of the provider's `slots` calls may use at once: 0 while the breaker is open.

        While it is half-open these are the probes, in addition to calls that still hang from before.
        """
        if self._state is BreakerState.OPEN:
            return 0
        if self._state is BreakerState.HALF_OPEN:
            return min(slots, self._stragglers + self._config.probes)
        return slots

    @property
    def open_until(self) -> int | None:
        """Return the time at which it becomes half-open; None if it is not open."""
        return self._until if self._state is BreakerState.OPEN else None

    # -- calls ----------------------------------------------------------------------------------------------------

    def began(self) -> int:
        """A call goes out; its era."""
        self._running += 1
        return self._era

    def succeeded(self, now: int, era: int, caller: int = 0) -> Change | None:
        """A call brought an answer; `caller` is a number for who asked."""
        return self.saw_success(now, caller) if self._take(era) else None

    def saw_success(self, now: int, caller: int = 0) -> Change | None:
        """A call of this era succeeded, at any daemon."""
        if self._state is not BreakerState.HALF_OPEN:
            self._note(now, failed=False, caller=caller)
            return None
        self._probes_passed += 1
        if self._probes_passed < self._config.probes_to_close:
            return None
        self._reopens = 0
        return self._become(BreakerState.CLOSED, f"{self._probes_passed} probes in a row succeeded")

    def failed(self, now: int, era: int, reason: str, caller: int = 0) -> Change | None:
        """A call failed by the provider's fault; `caller` is a number for who asked."""
        return self.saw_failure(now, reason, caller) if self._take(era) else None

    def saw_failure(self, now: int, reason: str, caller: int = 0) -> Change | None:
        """A call of this era failed by the provider's fault, at any daemon."""
        if self._state is BreakerState.HALF_OPEN:
            self._reopens += 1
            return self._open(now, f"a probe failed: {reason}")
        self._note(now, failed=True, caller=caller)
        calls = len(self._outcomes)
        often = self._failures >= self._config.failures and self._failures >= self._config.rate * calls
        if often and not self._blames_one_caller():
            return self._open(now, f"{self._failures} of {calls} calls failed, the last: {reason}")
        return None

    def _blames_one_caller(self) -> bool:
        """Return whether one caller made all calls that failed, while others were answered."""
        failing = {caller for _, failed, caller in self._outcomes if failed}
        return len(failing) == 1 and any(not failed and caller not in failing for _, failed, caller in self._outcomes)

    def dropped(self, era: int) -> None:
        """A call ended that says nothing about the provider: it was stopped, or the request was at fault."""
        self._take(era)

    def _take(self, era: int) -> bool:
        """Count a call off; returns True if it belongs to this era."""
        if era == self._era:
            self._running -= 1
            return True
        self._stragglers -= 1
        return False

    # -- time and words from outside ------------------------------------------------------------------------------

    def tick(self, now: int) -> Change | None:
        """Become half-open when only its time was missing."""
        if self._state is BreakerState.OPEN and now >= self._until:
            self._probes_passed = 0
            return self._become(BreakerState.HALF_OPEN, "its time alone is over")
        return None

    def reset(self) -> Change | None:
        """An operator says that it is well."""
        self._next_era()
        self._reopens = 0
        if self._state is BreakerState.CLOSED:
            return None
        return self._become(BreakerState.CLOSED, "reset by an operator")

    # -- within ---------------------------------------------------------------------------------------------------

    def _open(self, now: int, reason: str) -> Change:
        alone = min(self._config.open_for * 2.0 ** min(self._reopens, _DOUBLINGS), self._config.max_open_for)
        self._until = now + microseconds(alone)
        self._next_era()
        return self._become(BreakerState.OPEN, reason)

    def _next_era(self) -> None:
        self._era += 1
        self._stragglers += self._running
        self._running = 0
        self._outcomes.clear()
        self._failures = 0

    def _note(self, now: int, *, failed: bool, caller: int) -> None:
        if not self._outcomes or self._outcomes[-1][0] <= now:
            self._outcomes.append((now, failed, caller))
        else:
            insort(self._outcomes, (now, failed, caller))
        self._failures += failed
        oldest = self._outcomes[-1][0] - microseconds(self._config.window)
        while self._outcomes[0][0] < oldest or len(self._outcomes) > self._config.max_samples:
            _, was_failure, _ = self._outcomes.popleft()
            self._failures -= was_failure

    def _become(self, after: BreakerState, reason: str) -> Change:
        change = Change(self._state, after, reason)
        self._state, self._reason = after, reason
        return change
