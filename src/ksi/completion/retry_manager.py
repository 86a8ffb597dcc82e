"""What becomes of a failed attempt: another provider, a later try, a wait for a quota, or the end (F2, F4, F5).

quota spent, time of return named --> another provider, else parked until then; no attempt is used up
fault of the provider ------------> another provider of the route, else again after a wait, else failed
fault of the request -------------> failed
"""

from __future__ import annotations

import msgspec

from ksi.clock import Chance, Moment
from ksi.config import Retry
from ksi.errors import FailureClass, ProviderError
from ksi.request import RetryBody

LONGEST_WAIT = 31 * 86_400.0
"""Seconds. A provider that names a later time of return is asked again all the same."""

_DOUBLINGS = 64
"""After so many, any configured maximum has been reached."""


class FailOver(msgspec.Struct, frozen=True):
    """Go on at once, at another provider."""


class RetryAt(msgspec.Struct, frozen=True):
    """Try again at this wall time, in microseconds."""

    at: int


class ParkUntil(msgspec.Struct, frozen=True):
    """Wait for the provider's quota, until this wall time in microseconds."""

    at: int


class GiveUp(msgspec.Struct, frozen=True):
    """Do not try again; `reason` is `not_retryable` or `attempts_used_up`."""

    reason: str


Decision = FailOver | RetryAt | ParkUntil | GiveUp


def told_wait(error: ProviderError) -> float:
    """How long the provider asked to wait, in seconds, 0 where it did not; bounded by LONGEST_WAIT."""
    return min(max(0.0, error.retry_after or 0.0), LONGEST_WAIT)


def is_quota(error: ProviderError) -> bool:
    """Whether a provider said that its quota is spent and when it returns."""
    return error.failure is FailureClass.RATE_LIMITED and told_wait(error) > 0


def is_providers_fault(error: ProviderError) -> bool:
    """Whether another provider may do better with the same request."""
    return error.retryable or error.failure is FailureClass.AUTHENTICATION


def policy_of(policy: Retry, wish: RetryBody | None) -> Retry:
    """The configured policy, as far as a request does not say otherwise."""
    if wish is None:
        return policy
    given = {name: value for name, value in msgspec.structs.asdict(wish).items() if value is not None}
    return msgspec.structs.replace(policy, **given)


def decide(
    error: ProviderError,
    failures: int,
    policy: Retry,
    now: Moment,
    chance: Chance,
    *,
    others: bool = False,
    route_length: int = 1,
    back: int | None = None,
) -> Decision:
    """What to do after `failures` counted failures, the last one with `error`.

    `others` says that the route has another provider that was not tried since the last wait. Each provider of a route
    is tried once, whatever `max_attempts` says. Waits have full jitter: a random time up to an exponentially growing
    bound; the provider's own Retry-After is the floor. `back` is the wall time at which the first provider of the route
    can be asked again, where that is known: a parked request does not wait for the last one.
    """
    if is_quota(error):
        until = now.after(told_wait(error)).wall
        return FailOver() if others else ParkUntil(until if back is None else min(until, max(back, now.wall)))
    if others and is_providers_fault(error) and failures < max(policy.max_attempts, route_length):
        return FailOver()
    if not error.retryable:
        return GiveUp("not_retryable")
    if failures >= policy.max_attempts:
        return GiveUp("attempts_used_up")
    bound = min(policy.max_delay, policy.initial_delay * 2.0 ** min(failures - 1, _DOUBLINGS))
    return RetryAt(now.after(max(chance.uniform(0.0, bound), told_wait(error))).wall)
