"""One configured provider at work: its calls, its slots, and its state."""

from __future__ import annotations

import zlib
from collections import OrderedDict

import msgspec

from ksi.clock import Moment
from ksi.completion.pool.breaker import BreakerState, ProviderBreaker
from ksi.completion.pool.health import Health
from ksi.completion.pool.limits import Limit, LimitCause, Limits, until, whole
from ksi.completion.pool.rate_limit import Bucket
from ksi.completion.pool.record import SwitchedOff
from ksi.config.schema import BreakerConfig, ProviderConfig
from ksi.providers.base import Provider
from ksi.store.values import Claimed, Terms
from ksi.tokens import BYTES_PER_TOKEN

KEPT_FAILURES = 10_000
"""Requests that failed here and are remembered, so that their next failure is known to be their own."""

LATELY = 600.0
"""Seconds for which an answer shows that its model is served."""

KEPT_MODELS = 64
"""Models whose latest answer is remembered."""

PROBE_PAUSE = 1.0
"""Seconds after which a request looks again whether the probe of its model came back."""


class CallStart(msgspec.Struct, frozen=True):
    """A call as it began."""

    era: int
    """As the breaker counts time."""
    began: int
    """Wall time in microseconds."""
    model: str
    """The provider's own name of the model."""
    probe: bool
    """True if it tries a provider that failed, or was away, before."""


class Member:
    """One provider with all that is kept about it."""

    def __init__(
        self, config: ProviderConfig, provider: Provider, breaker: BreakerConfig, now: Moment, *, shared: bool
    ) -> None:
        """`shared`: other daemons ask it too. Then the store counts probes and the starts in a minute."""
        self.config = config
        self.shared = shared
        self.provider = provider
        self.health = Health()
        self.breaker = ProviderBreaker(breaker)
        self.limits: Limits = ()
        self.calls: dict[int, CallStart] = {}
        """The calls that run, by fence."""
        self.lent = 0
        """Free slots in addition to its own: waiting runs gave them back."""
        self.enabled = True
        self.off: SwitchedOff | None = None
        per_minute = (None, None) if shared else (config.requests_per_minute, config.tokens_per_minute)
        self.requests, self.tokens = (Bucket(limit, now.mono) if limit else None for limit in per_minute)
        self.version = 0
        """The version of the record that all daemons share."""
        self.waits_until = 0
        """Monotonic time at which the store lets a call begin again."""
        self._failed: OrderedDict[str, None] = OrderedDict()
        self._answered: OrderedDict[str, int] = OrderedDict()
        """The wall time of each model's last answer."""
        self._probes = breaker.probes
        self._terms = Terms(None, config.requests_per_minute, config.tokens_per_minute)
        self._limited = bool(config.requests_per_minute or config.tokens_per_minute)

    # -- admission -----------------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Return whether it is asked as usual: its breaker is closed, and no limit holds for all of it."""
        return self.breaker.state is BreakerState.CLOSED and not whole(self.limits)

    def usable(self, now: Moment) -> bool:
        """Return whether it is asked at all, a slot or a rate limit aside."""
        return self.enabled and self.breaker.limit(1) > 0 and self.away_until(now) is None

    def away_until(self, now: Moment) -> int | None:
        """The wall time at which a limit admits calls again; None without a limit."""
        return until(whole(self.limits), now.wall)

    def away(self, model: str, now: Moment) -> Limit | None:
        """The limit of one model by which no call for it may go out now."""
        for limit in self.limits:
            if limit.models and limit.covers(model) and (limit.active(now.wall) or self._probed(limit)):
                return limit
        return None

    def _probed(self, limit: Limit) -> bool:
        """Return whether as many calls as may probe it run already."""
        running = sum(call.began > limit.struck_at and limit.covers(call.model) for call in self.calls.values())
        return running >= limit.probes

    def gone(self, model: str, now: int) -> bool:
        """Return whether it is known not to have a model."""
        return any(
            limit.cause is LimitCause.MODEL_GONE and limit.covers(model) and limit.active(now) for limit in self.limits
        )

    @property
    def terms(self) -> Terms | None:
        """Return the terms that the store enforces for all daemons."""
        if not self.shared:
            return None
        probes = self._probes_now()
        if probes is None:
            return self._terms if self._limited else None
        # A machine's own breaker shares its record with those of other machines, whose changes are nothing to it.
        known = None if self.provider.capabilities.process else self.version
        return msgspec.structs.replace(self._terms, probes=probes, known=known)

    def _probes_now(self) -> int | None:
        """Return the number of calls that may probe it at once; None if it is asked as usual."""
        probes = [limit.probes for limit in whole(self.limits)]
        if self.breaker.state is BreakerState.HALF_OPEN:
            probes.append(self._probes)
        return min(probes, default=None)

    def limit(self, now: Moment) -> int:
        """Return the number of calls that may run at once."""
        slots = self.config.max_concurrency + self.lent
        if self.shared:
            return slots if self.usable(now) else 0
        if self.away_until(now) is not None:
            return 0
        limit = self.breaker.limit(slots)
        for one in whole(self.limits):
            beside = sum(call.began <= one.struck_at for call in self.calls.values())
            limit = min(limit, beside + one.probes)
        if self.requests is not None:
            limit = min(limit, self.health.running + int(self.requests.level(now.mono)))
        if self.tokens is not None and self.tokens.level(now.mono) < 1:
            limit = min(limit, self.health.running)
        return limit

    def wait(self, now: Moment) -> int | None:
        """Microseconds until more calls may run by time alone; None if time does not help."""
        waits: list[int] = []
        away = self.away_until(now)
        if away is not None:
            waits.append(away - now.wall)
        if self.breaker.open_until is not None:
            waits.append(max(1, self.breaker.open_until - now.wall))
        if self.waits_until > now.mono:
            waits.append(self.waits_until - now.mono)
        for bucket in (self.requests, self.tokens):
            if bucket is not None and bucket.level(now.mono) < 1:
                waits.append(bucket.full_enough(1, now.mono) - now.mono)
        return max(waits, default=None)

    def back(self, model: str, now: Moment) -> int:
        """The wall time at which it can be asked for a model again. A model that is gone may be requested at any time:
        if no other provider serves it, its former one is asked."""
        limits = [one for one in self.limits if one.covers(model) and one.cause is not LimitCause.MODEL_GONE]
        probed = any(one.models and not one.active(now.wall) and self._probed(one) for one in limits)
        soonest = now.after(PROBE_PAUSE if probed else 0.0).wall
        return max(until(limits, now.wall) or 0, self.breaker.open_until or 0, soonest)

    # -- calls ----------------------------------------------------------------------------------------------------

    def began(self, claim: Claimed, model: str, now: Moment) -> None:
        """A call goes out."""
        probe = self.breaker.state is BreakerState.HALF_OPEN or any(limit.covers(model) for limit in self.limits)
        self.calls[claim.fence] = CallStart(self.breaker.began(), claim.started_at, model, probe)
        self.health.running += 1
        if self.requests is not None:
            self.requests.take(1, now.mono)
        if self.tokens is not None:
            self.tokens.take(_guess(claim), now.mono)

    def ended(self, claim: Claimed, used: int | None, now: Moment) -> CallStart:
        """It is over; `used` are its tokens, if they are known."""
        call = self.calls.pop(claim.fence)
        self.breaker.dropped(call.era)
        self.health.running -= 1
        if self.tokens is not None and used is not None:
            self.tokens.take(used - _guess(claim), now.mono)
        return call

    def answered(self, model: str, now: Moment) -> None:
        """A call for a model was answered."""
        self._answered[model] = now.wall
        self._answered.move_to_end(model)
        if len(self._answered) > KEPT_MODELS:
            self._answered.popitem(last=False)

    def serves_others(self, model: str, now: Moment) -> bool:
        """Return whether other models than this one were answered lately."""
        since = now.after(-LATELY).wall
        return any(at >= since for name, at in self._answered.items() if name != model)

    def failed_before(self, request_id: str) -> bool:
        """Return whether this request failed here already, and remember it."""
        known = request_id in self._failed
        self._failed[request_id] = None
        self._failed.move_to_end(request_id)
        if len(self._failed) > KEPT_FAILURES:
            self._failed.popitem(last=False)
        return known


def caller_of(claim: Claimed) -> int:
    """A number for the caller: the agent, or the conversation without an agent."""
    return zlib.crc32((claim.agent_id or claim.conversation).encode("utf-8", "surrogatepass"))


def _guess(claim: Claimed) -> float:
    """The rate limit's first guess of a call's tokens, which is corrected when the call is over."""
    return len(claim.body) / BYTES_PER_TOKEN
