"""Decides what becomes of a failed attempt: another provider, a later attempt, a wait for the provider, or the end.

tools with effects were used ------> failed: the turn is not run again by itself
the provider is limited, away -----> another provider, else parked until it is back; no attempt is used up
it was probing the provider -------> likewise: a probe is nobody's last attempt
the provider failed ---------------> another provider of the route, else again after a backoff, else failed
the model declined to answer ------> a fallback model, else failed
no login, no money, no such model -> another provider, else failed
the request is at fault -----------> failed
"""

from __future__ import annotations

import msgspec

from ksi.clock import Chance, Moment, microseconds
from ksi.completion.pool.limits import LONGEST_TOLD, told_wait
from ksi.config.schema import Retry
from ksi.errors import FailureClass, ProviderError
from ksi.request import RetryBody

LONGEST_PARK = 60.0
"""Seconds that a request is parked if no time of return is known. Then it waits in the queue."""

_DOUBLINGS = 64
"""After so many, any configured maximum has been reached."""

_ELSEWHERE = frozenset({FailureClass.AUTHENTICATION, FailureClass.BILLING, FailureClass.MODEL_NOT_FOUND})
"""Failures that another provider may not have, though trying again does not help."""


class FailOver(msgspec.Struct, frozen=True):
    """Continue at once, at another provider."""


class RetryAt(msgspec.Struct, frozen=True):
    """Try again at this wall time, in microseconds."""

    at: int


class ParkUntil(msgspec.Struct, frozen=True):
    """Wait for the provider, until this wall time in microseconds."""

    at: int


class GiveUp(msgspec.Struct, frozen=True):
    """Do not try again; `reason` is `not_retryable`, `tools_used` or `attempts_used_up`."""

    reason: str


Decision = FailOver | RetryAt | ParkUntil | GiveUp


def is_providers_fault(error: ProviderError) -> bool:
    """Return whether the failure says something about the provider, so that another one may do better."""
    return (error.retryable and error.failure is not FailureClass.EMPTY_ANSWER) or error.failure in _ELSEWHERE


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
    away: bool = False,
    probe: bool = False,
    tools_used: bool = False,
) -> Decision:
    """Decide the next step after `failures` counted failures, the last one with `error`.

    `others` says that the route has another provider that was not tried since the last wait; after a refusal, one that
    asks another model. Each provider of a route is tried once, whatever `max_attempts` says. `away` says that the
    provider is limited or cannot be reached, and `probe` that the attempt was sent to find out whether it is healthy
    again. `tools_used` says that the turn has used tools with effects. Retries use exponential backoff with full
    jitter; the provider's own Retry-After is the floor. `back` is the wall time at which the first provider of the
    route can be asked again: a parked request does not wait for the last.
    """
    if tools_used:
        return GiveUp("tools_used")
    if error.failure is FailureClass.REFUSED:
        return FailOver() if others else GiveUp("not_retryable")
    if away:
        return FailOver() if others else ParkUntil(_park(error, now, back))
    within = failures < max(policy.max_attempts, route_length)
    if others and (is_providers_fault(error) or error.retryable) and within:
        return FailOver()
    if not error.retryable:
        return GiveUp("not_retryable")
    if failures >= policy.max_attempts and not probe:
        return GiveUp("attempts_used_up")
    bound = min(policy.max_delay, policy.initial_delay * 2.0 ** min(max(failures - 1, 0), _DOUBLINGS))
    backoff = chance.uniform(0.0, bound)
    if probe:
        # Behind those that wait in the queue: the next probe is to be another request.
        return ParkUntil(_park(error, now, back) + microseconds(backoff))
    return RetryAt(now.after(max(backoff, told_wait(error) or 0.0)).wall)


def _park(error: ProviderError, now: Moment, back: int | None) -> int:
    """Until when a request waits for its provider."""
    told = told_wait(error)
    if back is None:
        return now.after(LONGEST_PARK if told is None else told).wall
    return max(now.wall, min(back, now.after(LONGEST_PARK if told is None else LONGEST_TOLD).wall))
