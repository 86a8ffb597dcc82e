"""Counts a provider's calls and measures their times since the daemon started."""

from __future__ import annotations

from collections import deque
from typing import Any

from ksi.clock import MICROSECONDS
from ksi.events.reports import FailureReport, PercentilesReport
from ksi.request import Attempt, Outcome

KEPT_SAMPLES = 1_000
"""Calls whose times make up the percentiles."""


class Health:
    """One provider's figures since the daemon started."""

    def __init__(self) -> None:
        self.running = 0
        self._calls = 0
        self._outcomes: dict[str, int] = {}
        self._last_error: FailureReport | None = None
        self._latencies: deque[int] = deque(maxlen=KEPT_SAMPLES)
        self._first_tokens: deque[int] = deque(maxlen=KEPT_SAMPLES)

    @property
    def answered(self) -> int:
        """Calls that were answered."""
        return self._outcomes.get("completed", 0)

    def ended(self, attempt: Attempt) -> None:
        """A call is over; one stopped from outside says nothing about the provider."""
        if attempt.outcome is Outcome.COMPLETED:
            self._count("completed")
            self._latencies.append(attempt.finished_at - attempt.started_at)
            if attempt.first_token_us is not None:
                self._first_tokens.append(attempt.first_token_us)
        elif attempt.outcome in (Outcome.FAILED, Outcome.PARKED):
            self._count(attempt.error or "failed")
            self._last_error = FailureReport(
                code=attempt.error, message=attempt.message, at=attempt.finished_at / MICROSECONDS
            )

    def _count(self, outcome: str) -> None:
        self._calls += 1
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1

    def report(self) -> dict[str, Any]:
        """The figures; times in milliseconds."""
        good = self.answered
        return {
            "running": self.running,
            "calls": self._calls,
            "failures": self._calls - good,
            "outcomes": dict(self._outcomes),
            "success_rate": round(good / self._calls, 4) if self._calls else None,
            "latency_ms": _percentiles(self._latencies),
            "time_to_first_token_ms": _percentiles(self._first_tokens),
            "last_error": self._last_error,
        }


def _percentiles(samples: deque[int]) -> PercentilesReport | None:
    if not samples:
        return None
    ordered = sorted(samples)
    p50, p95 = (ordered[-(-len(ordered) * share // 100) - 1] / 1000 for share in (50, 95))
    return PercentilesReport(p50=p50, p95=p95)
