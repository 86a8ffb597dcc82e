"""Whether and when a failed attempt is tried again: a pure decision (F1, F2)."""

from __future__ import annotations

import msgspec

from ksi.clock import Chance, Moment
from ksi.config import Retry
from ksi.errors import ProviderError


class RetryAt(msgspec.Struct, frozen=True):
    """Try again at this wall time, in microseconds."""

    at: int


class GiveUp(msgspec.Struct, frozen=True):
    """Do not try again; `reason` is `not_retryable` or `attempts_used_up`."""

    reason: str


def decide(error: ProviderError, failures: int, policy: Retry, now: Moment, chance: Chance) -> RetryAt | GiveUp:
    """What to do after `failures` failed attempts, the last one with `error`.

    Full jitter: a random wait up to an exponentially growing bound. The provider's own Retry-After is the floor.
    """
    if not error.retryable:
        return GiveUp("not_retryable")
    if failures >= policy.max_attempts:
        return GiveUp("attempts_used_up")
    bound = min(policy.max_delay, policy.initial_delay * 2.0 ** (failures - 1))
    wait = chance.uniform(0.0, bound)
    if error.retry_after is not None:
        wait = max(wait, error.retry_after)
    return RetryAt(now.after(wait).wall)
