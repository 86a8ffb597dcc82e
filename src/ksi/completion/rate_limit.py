"""A provider's own limits per minute, kept on our side: a bucket that fills evenly."""

from __future__ import annotations

from ksi.clock import MICROSECONDS

MINUTE = 60 * MICROSECONDS


class Bucket:
    """Holds a minute's worth at most. It may be overdrawn by what was not known before; then it fills up first."""

    def __init__(self, per_minute: int, now: int) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: int) -> float:
        """What is in it at this monotonic time, in microseconds."""
        grown = (now - self._at) * self._per_minute / MINUTE
        return min(float(self._per_minute), self._level + max(0.0, grown))

    def take(self, amount: float, now: int) -> None:
        """Take something out; a negative amount puts it back."""
        self._level = self.level(now) - amount
        self._at = now

    def full_enough(self, amount: float, now: int) -> int:
        """When there will be so much in it, as a monotonic time."""
        missing = amount - self.level(now)
        return now if missing <= 0 else now + int(missing * MINUTE / self._per_minute) + 1
