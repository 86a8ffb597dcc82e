"""Counts and times of requests that ended here since the daemon started, for metrics. Each end costs some microseconds;
everything else is done in a scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from ksi.clock import MICROSECONDS
from ksi.completion.usage.prices import Prices
from ksi.request import Attempt, Outcome, Priority, RequestBody
from ksi.store.values import Claimed

MOST_MODELS = 100
"""Maximum number of models counted by name; further ones are counted together, as OTHER."""
OTHER = "other"

WAIT_BOUNDS = (0.005, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0)
RUN_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0)
FIRST_TOKEN_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of times, in seconds."""

TOKEN_KINDS = ("input", "output", "cache_read", "cache_write", "reasoning")


class Times:
    """How often times fell into each bucket, and their sum in seconds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, the last without an upper bound."""
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound with the number of times up to it, as metrics have it."""
        reached, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            reached += count
            found.append((bound, float(reached)))
        return found


class ModelTally:
    """The usage of one provider's model."""

    __slots__ = ("cost", "tokens", "unpriced", "unreported")

    def __init__(self) -> None:
        self.tokens = [0, 0, 0, 0, 0]
        """By TOKEN_KINDS."""
        self.cost = 0.0
        self.unpriced = 0
        """Attempts with a report of usage and without a known price."""
        self.unreported = 0
        """Answers without a report of usage."""


class Tallies:
    """Counts ends as they are settled."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices
        self._models: set[str] = set()
        self.attempts: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)
        """By provider, model, outcome and failure class."""
        self.models: defaultdict[tuple[str, str], ModelTally] = defaultdict(ModelTally)
        """By provider and model."""
        self.waits: defaultdict[str, Times] = defaultdict(lambda: Times(WAIT_BOUNDS))
        """By priority: from arrival to the first start, of requests that were not delayed on purpose."""
        self.runs: defaultdict[str, Times] = defaultdict(lambda: Times(RUN_BOUNDS))
        """By provider."""
        self.first_tokens: defaultdict[str, Times] = defaultdict(lambda: Times(FIRST_TOKEN_BOUNDS))
        """By provider."""

    def ended(self, claim: Claimed, body: RequestBody, attempt: Attempt, *, fenced: bool) -> None:
        """An attempt was settled; `fenced`: its lock had passed on, and it counts for nothing but its cost."""
        model = self._label(attempt.asked or "")
        provider = attempt.provider
        outcome = Outcome.FENCED if fenced else attempt.outcome
        self.attempts[provider, model, outcome.value, attempt.error or ""] += 1
        self.runs[provider].add((attempt.finished_at - attempt.started_at) / MICROSECONDS)
        if attempt.first_token_us is not None:
            self.first_tokens[provider].add(attempt.first_token_us / MICROSECONDS)
        if claim.attempt == 1 and body.delay is None and body.not_before is None:
            wait = (claim.started_at - claim.enqueued_at) / MICROSECONDS
            self.waits[Priority(claim.priority).name.lower()].add(max(wait, 0.0))
        usage = attempt.usage
        if usage is None and attempt.text is None:
            return
        tally = self.models[provider, model]
        if usage is None:
            tally.unreported += 1
            return
        tokens = tally.tokens
        tokens[0] += usage.input_tokens
        tokens[1] += usage.output_tokens
        tokens[2] += usage.cache_read_tokens
        tokens[3] += usage.cache_write_tokens
        tokens[4] += usage.reasoning_tokens
        cost = self._prices.cost(attempt)
        if cost is None:
            tally.unpriced += 1
        else:
            tally.cost += cost

    def _label(self, model: str) -> str:
        if model not in self._models:
            if len(self._models) >= MOST_MODELS:
                return OTHER
            self._models.add(model)
        return model
