"""Percentiles, medians, and the values that the measuring parts hand to one another."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least `percent` per cent of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def median(values: Sequence[float]) -> float:
    """The middle one; of an even number, the mean of the two in the middle."""
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else (ordered[half - 1] + ordered[half]) / 2


class Times(msgspec.Struct, frozen=True):
    """How long something took, in milliseconds."""

    p50: float
    p99: float
    samples: int

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Times:
        """From single measurements."""
        return cls(percentile(nanoseconds, 50) / 1e6, percentile(nanoseconds, 99) / 1e6, len(nanoseconds))


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One run under load."""

    completions: int
    seconds: float
    submitted: int
    seen: int
    """What the subscriber to `*` heard of."""
    daemon_cpu: float | None
    """Seconds of processor time that the daemon used, user and system; None where the system does not tell."""
    load_cpu: float
    """The same of the load generator."""

    @property
    def per_second(self) -> float:
        """Completions per second."""
        return self.completions / self.seconds

    @property
    def daemon_us(self) -> float | None:
        """Microseconds of the daemon's processor time for one completion: hardly moved by what else runs here."""
        return None if self.daemon_cpu is None else self.daemon_cpu / max(1, self.completions) * 1e6

    @property
    def load_us(self) -> float:
        """Microseconds of the load generator's processor time for one completion."""
        return self.load_cpu / max(1, self.completions) * 1e6


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One closed loop, and what the disk did between its turns."""

    loop: Times
    commit: Times
    """One small transaction in a database of its own, in the daemon's mode of durability."""
    sync: Times
    """Eight KiB appended and synced, without a database."""
    daemon_us: float | None
    """As in `Rate`."""
