"""Limits keep a provider from being asked for a while: a spent quota, a throttle, an outage, a lapsed login, a model
that is gone. Pure: frozen values in, frozen values out.

A limit holds for the whole provider or for the models that a pattern names. Until its time no call goes out. Then it is
probed: one call at first, twice as many after each answer, until the limit is lifted. Another strike while it is probed
waits twice as long as the one before, up to the configured maximum. If the provider names the time of its return, that
time holds, and the first answer lifts the limit.

All times are microseconds of wall time: a quota that returns at three o'clock returns at three o'clock, whether the
machine slept or the daemon was restarted.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterable
from datetime import UTC, datetime, tzinfo
from enum import StrEnum

import msgspec

from ksi.clock import MICROSECONDS, Moment, microseconds
from ksi.config.schema import BreakerConfig
from ksi.errors import FailureClass, ProviderError

FIRST_GUESS = 1.0
"""First backoff in seconds if the provider names no time."""

SHORTEST_TOLD = 0.1
"""Shortest wait in seconds if it does; twice as long each time it repeats that."""

GONE_FOR = 600.0
"""Seconds in which a model that is not there is not asked for again at the same provider."""

LONGEST_TOLD = 31 * 86_400.0
"""Seconds. A provider that names a later time of return is not believed."""

_DOUBLINGS = 32
"""After so many the configured maximum has long been reached."""

NEVER = 2**62
"""A time that does not come: only a word from outside lifts such a limit."""


class LimitCause(StrEnum):
    """Why a provider cannot be asked."""

    QUOTA = "quota"
    """It named the time of its return."""
    THROTTLE = "throttle"
    """It limits its callers, or is overloaded, and names no time."""
    OUTAGE = "outage"
    """It cannot be reached, or its model is still being loaded."""
    LOGIN = "login"
    """Its login has expired; a person must log in."""
    MODEL_GONE = "model_gone"
    """It does not have this model."""


class Hit(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that ran into a limit."""

    cause: LimitCause
    reason: str = ""
    models: str = ""
    """The provider's own model names that it holds for, as a pattern; empty: all."""
    window: str | None = None
    """The provider's name for a limit of the account."""
    until: int | None = None
    """The time of return, if the provider named one."""

    def shifted(self, by: int) -> Hit:
        """The same on a clock that is ahead by so many microseconds."""
        return self if self.until is None else msgspec.structs.replace(self, until=self.until + by)


class Limit(msgspec.Struct, frozen=True, omit_defaults=True):
    """One limit as it stands."""

    cause: LimitCause
    since: int
    """The time of the first call that met this limit."""
    struck_at: int
    """The time of the last call that met it. Calls that began earlier carry no news about it."""
    until: int
    """No call before this time."""
    reason: str = ""
    models: str = ""
    window: str | None = None
    told: bool = False
    """True if the provider named `until`."""
    strikes: int = 1
    answers: int = 0
    """Calls that were answered since it may be probed."""

    def covers(self, model: str) -> bool:
        """Return whether it holds for a model, by the provider's own name for it."""
        return not self.models or fnmatch.fnmatchcase(model, self.models)

    def active(self, now: int) -> bool:
        """Return whether no call may go out."""
        return self.until > now

    @property
    def probes(self) -> int:
        """Return the number of calls that may run at once while the limit is probed."""
        return int(2 ** min(self.answers, _DOUBLINGS))

    @property
    def key(self) -> tuple[str, bool]:
        """The limit's identity. A missing model and a model's spent quota are two limits."""
        return self.models, self.cause is LimitCause.MODEL_GONE

    def shifted(self, by: int) -> Limit:
        """The same on a clock that is ahead by so many microseconds."""
        until = self.until if self.until >= NEVER else self.until + by
        return msgspec.structs.replace(self, since=self.since + by, struck_at=self.struck_at + by, until=until)


Limits = tuple[Limit, ...]


def told_wait(error: ProviderError) -> float | None:
    """Return the wait that the provider asked for, in seconds; None if it named no credible time."""
    wait = error.retry_after
    return wait if wait is not None and 0 < wait <= LONGEST_TOLD else None


def hit_of(error: ProviderError, model: str, now: Moment, *, login_may_return: bool) -> Hit | None:
    """The limit that a failed call for `model` met; None if the failure is none.

    `login_may_return` says that a person can log in again while the daemon runs.
    """
    wait = told_wait(error)
    until = None if wait is None else now.after(wait).wall
    if error.failure is FailureClass.MODEL_NOT_FOUND:
        return Hit(LimitCause.MODEL_GONE, error.message, glob.escape(model))
    if error.failure is FailureClass.AUTHENTICATION:
        return Hit(LimitCause.LOGIN, error.message) if login_may_return and error.status in (401, None) else None
    if error.failure is FailureClass.RATE_LIMITED:
        cause = LimitCause.THROTTLE if until is None else LimitCause.QUOTA
    elif error.unserved:
        cause = LimitCause.OUTAGE
    elif error.failure is FailureClass.OVERLOADED:
        cause = LimitCause.THROTTLE
    else:
        return None
    return Hit(cause, error.message, error.limited_models, error.limit_window, until)


def struck(limits: Limits, hit: Hit, began: int, at: int, config: BreakerConfig) -> Limits:
    """The limits after a call that began at `began` ran into one at `at`."""
    key = (hit.models, hit.cause is LimitCause.MODEL_GONE)
    before = next((limit for limit in limits if limit.key == key), None)
    beside = before is not None and began <= before.struck_at
    if before is None or not beside or (hit.cause is LimitCause.LOGIN and before.cause is not LimitCause.LOGIN):
        after = _strike(before, hit, at, config)
    else:
        after = _known_better(before, hit, at, config)
    return (*(limit for limit in limits if limit.key != key), after)


def _known_better(before: Limit, hit: Hit, at: int, config: BreakerConfig) -> Limit:
    """A call concurrent with the one that met the limit adds nothing, except perhaps a later time of return."""
    if hit.until is None or before.cause is LimitCause.LOGIN:
        return before
    told = _told(msgspec.structs.replace(before, cause=hit.cause), hit, at, config)
    return told if told.until > before.until else before


def _strike(before: Limit | None, hit: Hit, at: int, config: BreakerConfig) -> Limit:
    again = before is not None and before.cause is hit.cause
    struck = Limit(
        cause=hit.cause,
        since=before.since if again and before is not None else at,
        struck_at=at,
        until=at,
        reason=hit.reason,
        models=hit.models,
        window=hit.window,
        strikes=before.strikes + 1 if again and before is not None else 1,
    )
    if hit.until is not None:
        return _told(struck, hit, at, config)
    return msgspec.structs.replace(struck, until=_guessed(struck, at, config))


def _told(limit: Limit, hit: Hit, at: int, config: BreakerConfig) -> Limit:
    """The time that the provider named; a provider that says so again and again is not asked ever faster."""
    floor = at + microseconds(min(SHORTEST_TOLD * 2.0 ** min(limit.strikes - 1, _DOUBLINGS), config.open_for))
    until = max(hit.until or 0, floor)
    return msgspec.structs.replace(limit, until=until, told=True, reason=hit.reason, window=hit.window)


def _guessed(limit: Limit, at: int, config: BreakerConfig) -> int:
    if limit.cause is LimitCause.LOGIN:
        return NEVER
    if limit.cause is LimitCause.MODEL_GONE:
        return at + microseconds(GONE_FOR)
    first = min(FIRST_GUESS, config.open_for)
    return at + microseconds(min(first * 2.0 ** min(limit.strikes - 1, _DOUBLINGS), config.max_open_for))


def guess(strikes: int, config: BreakerConfig) -> float:
    """Seconds between two checks of a limit without a named time."""
    return min(FIRST_GUESS * 2.0 ** min(strikes, _DOUBLINGS), config.max_open_for)


def answered(limits: Limits, model: str, began: int, at: int, slots: int) -> Limits:
    """The limits after a call for `model` that began at `began` was answered; `slots` is the provider's concurrency."""
    if not limits:
        return limits
    return tuple(after for limit in limits if (after := _after_answer(limit, model, began, at, slots)) is not None)


def _after_answer(limit: Limit, model: str, began: int, at: int, slots: int) -> Limit | None:
    if not limit.covers(model) or began <= limit.struck_at:
        return limit
    if limit.told or limit.cause in (LimitCause.LOGIN, LimitCause.MODEL_GONE):
        return None
    answers = limit.answers + 1
    if 2**answers >= slots:
        return None
    return msgspec.structs.replace(
        limit, answers=answers, strikes=max(1, limit.strikes - 1), until=min(limit.until, at)
    )


def lifted(limits: Limits, cause: LimitCause, now: int) -> Limits:
    """The limits after a word from outside that a cause is over: it is probed at once."""
    return tuple(
        msgspec.structs.replace(limit, until=min(limit.until, now)) if limit.cause is cause else limit
        for limit in limits
    )


def without_old(limits: Limits, now: int) -> Limits:
    """The limits without models that were gone and may be asked for again."""
    return tuple(limit for limit in limits if limit.cause is not LimitCause.MODEL_GONE or limit.active(now))


def whole(limits: Iterable[Limit]) -> list[Limit]:
    """Those that hold for the whole provider."""
    return [limit for limit in limits if not limit.models]


def until(limits: Iterable[Limit], now: int) -> int | None:
    """Return the time at which the last of these limits lets a call out; None if none holds."""
    return max((limit.until for limit in limits if limit.active(now)), default=None)


_WORDS = {
    LimitCause.QUOTA: "its quota is spent",
    LimitCause.THROTTLE: "it limits its callers",
    LimitCause.OUTAGE: "it cannot be reached",
    LimitCause.LOGIN: "its login lapsed",
    LimitCause.MODEL_GONE: "it does not have this model",
}


def sentence(limit: Limit, now: int, zone: tzinfo = UTC) -> str:
    """Describe the limit in one sentence: its cause, its start and its end. `zone` is the reader's time zone."""
    words = _WORDS[limit.cause]
    if limit.window is not None and limit.cause is LimitCause.QUOTA:
        words = f"its {limit.window} quota is spent"
    about = f" for {limit.models}" if limit.models else ""
    since = f"since {shown_time(limit.since, now, zone)}"
    if limit.until >= NEVER:
        return f"{words}{about} {since}; it continues after the login: {limit.reason}"
    if limit.active(now):
        guess = "" if limit.told else ", a guess"
        return (
            f"{words}{about} {since}; it is asked again at {shown_time(limit.until, now, zone)}{guess}: {limit.reason}"
        )
    calls = "one call" if limit.probes == 1 else f"{limit.probes} calls"
    return f"{words}{about} {since}; it is probed with {calls} at a time: {limit.reason}"


def shown_time(wall: int, now: int, zone: tzinfo) -> str:
    """A time for people to read, with its day unless that is today."""
    at, today = (datetime.fromtimestamp(t / MICROSECONDS, zone) for t in (wall, now))
    return at.strftime("%H:%M:%S" if at.date() == today.date() else "%Y-%m-%d %H:%M")
