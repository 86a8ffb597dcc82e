"""Keeps a provider's limits per minute on our side, with a token bucket."""

from __future__ import annotations

from ksi.clock import MICROSECONDS

MINUTE = 60 * MICROSECONDS


class Bucket:
    """A token bucket that holds a minute's worth at most. A cost known only afterwards may overdraw it."""

    def __init__(self, per_minute: int, now: int) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: int) -> float:
        """Return the bucket's level at a monotonic time in microseconds."""
        grown = (now - self._at) * self._per_minute / MINUTE
        return min(float(self._per_minute), self._level + max(0.0, grown))

    def take(self, amount: float, now: int) -> None:
        """Take something out; a negative amount puts it back."""
        self._level = self.level(now) - amount
        self._at = now

    def full_enough(self, amount: float, now: int) -> int:
        """Return the monotonic time at which the bucket will hold `amount`."""
        missing = amount - self.level(now)
        return now if missing <= 0 else now + int(missing * MINUTE / self._per_minute) + 1
