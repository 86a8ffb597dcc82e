"""The record of a provider: a frozen value, and its changes by calls and operators.

Everything here is values in, a value out. It is written by compare and set: if another daemon was faster, the same step
is repeated from its record (`ksi.completion.pool.team`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import tzinfo
from typing import Any

import msgspec

from ksi.completion.pool.breaker import BreakerRecord, BreakerState, ProviderBreaker
from ksi.completion.pool.limits import (
    Hit,
    LimitCause,
    Limits,
    answered,
    lifted,
    shown_time,
    struck,
    without_old,
)
from ksi.config.schema import BreakerConfig

LONGEST_REASON = 300
"""Characters of a reason that are kept."""


class Seen(msgspec.Struct, frozen=True):
    """The evidence of one ended call about its provider. Times are wall time in microseconds."""

    at: int
    era: int
    """As the breaker had it when the call began."""
    began: int = 0
    failed: bool = False
    """The call failed by the provider's fault."""
    neutral: bool = False
    """It was answered, but with a fault of the request: that lifts limits, and says nothing to the breaker."""
    reason: str = ""
    caller: int = 0
    """A number for who asked."""
    model: str = ""
    """The provider's own name of the model."""
    hit: Hit | None = None
    """The limit that it ran into; then the rest of the call says nothing."""

    def shifted(self, by: int) -> Seen:
        """The same on a clock that is ahead by so many microseconds."""
        hit = None if self.hit is None else self.hit.shifted(by)
        return msgspec.structs.replace(self, at=self.at + by, began=self.began + by, hit=hit)


class PlaceRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A provider as it is reached from one place."""

    breaker: BreakerRecord = BreakerRecord()
    limits: Limits = ()

    @property
    def wary(self) -> bool:
        """Return whether calls that succeed change it too; a healthy record ignores them."""
        return self.breaker.wary or bool(self.limits)

    def shifted(self, by: int) -> PlaceRecord:
        """The same on a clock that is ahead by so many microseconds."""
        if not by:
            return self
        return PlaceRecord(self.breaker.shifted(by), tuple(limit.shifted(by) for limit in self.limits))


class SwitchedOff(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operator's switch: the operator, the time and the reason of a disabled provider."""

    at: int
    by: str = ""
    why: str = ""

    def sentence(self, name: str, now: int, zone: tzinfo) -> str:
        """The same for the eye."""
        since = f"provider {name} is disabled since {shown_time(self.at, now, zone)}"
        by = f" by {self.by}" if self.by else ""
        return f"{since}{by}: {self.why}" if self.why else f"{since}{by}"

    @property
    def reason(self) -> str:
        """Say who disabled the provider, and why."""
        by = f"by {self.by or 'an operator'}"
        return f"{by}: {self.why}" if self.why else by

    def shifted(self, by: int) -> SwitchedOff:
        """The same on a clock that is ahead by so many microseconds."""
        return msgspec.structs.replace(self, at=self.at + by)


class ProviderRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One provider, for all daemons of a store; times in microseconds of the store's wall clock."""

    enabled: bool = True
    """True if an operator lets it be asked."""
    off: SwitchedOff | None = None
    """The operator who disabled it. A record of an earlier version does not have it."""
    places: Mapping[str, PlaceRecord] = {}
    """States by place. The place is "" for a provider that all daemons share, else the machine of its processes."""

    def place(self, name: str) -> PlaceRecord:
        """The record of a place; one of which nothing is known is healthy."""
        return self.places.get(name, _HEALTHY)

    def learned(self, place: str, seen: Sequence[Seen], config: BreakerConfig, slots: int) -> ProviderRecord:
        """After these calls of a place, whichever daemons made them; `slots` is the provider's concurrency."""
        before = self.place(place)
        after = learned(before, seen, config, slots)
        return self if after == before else self._with({place: after})

    def switched(self, off: SwitchedOff | None) -> ProviderRecord:
        """After an operator switched it off, or on."""
        return msgspec.structs.replace(self, enabled=off is None, off=off)

    def lifted(self, place: str, cause: LimitCause, at: int) -> ProviderRecord:
        """After a word from outside that a limit's cause is over at this place."""
        before = self.place(place)
        after = msgspec.structs.replace(before, limits=lifted(before.limits, cause, at))
        return self if after == before else self._with({place: after})

    def reset(self, place: str, config: BreakerConfig) -> ProviderRecord:
        """After an operator at this place said that it is healthy, wherever it is."""
        return self._with({where: _reset(self.place(where), config) for where in {*self.places, place}})

    @property
    def told(self) -> Any:
        """The part whose changes other daemons must hear of at once. They learn the rest in time."""
        # While a limit is probed everyone needs the very version that is kept: the store takes no other one's probes.
        return (
            self.enabled,
            self.off,
            sorted(
                (place, b.state, b.era, b.until, b.probes_passed, b.wary, one.limits, b.samples if one.limits else ())
                for place, one in self.places.items()
                for b in (one.breaker,)
            ),
        )

    def _with(self, places: Mapping[str, PlaceRecord]) -> ProviderRecord:
        return msgspec.structs.replace(self, places={**self.places, **places})


def learned(before: PlaceRecord, seen: Sequence[Seen], config: BreakerConfig, slots: int) -> PlaceRecord:
    """A place's record after these calls. Those of an era that is over say nothing to the breaker.

    Calls of several daemons arrive late: each is sorted into the latest ones.
    """
    breaker = ProviderBreaker(config)
    breaker.adopt(before.breaker)
    limits = before.limits
    for one in sorted(seen, key=lambda one: one.at):
        if one.hit is not None:
            limits = struck(without_old(limits, one.at), one.hit, one.began, one.at, config)
            continue
        if not one.failed:
            limits = answered(limits, one.model, one.began, one.at, slots)
        if one.era == breaker.era and not one.neutral:
            _judge(breaker, one, before.breaker.until)
    return PlaceRecord(breaker.record, limits)


def _judge(breaker: ProviderBreaker, one: Seen, until: int) -> None:
    if breaker.state is BreakerState.OPEN:
        # A call of this era began after the opening: its daemon has seen the breaker become half-open.
        breaker.tick(max(one.at, until))
    if one.failed:
        breaker.saw_failure(one.at, one.reason, one.caller)
    else:
        breaker.saw_success(one.at, one.caller)


def _reset(before: PlaceRecord, config: BreakerConfig) -> PlaceRecord:
    breaker = ProviderBreaker(config)
    breaker.adopt(before.breaker)
    breaker.reset()
    return PlaceRecord(breaker.record)


_HEALTHY = PlaceRecord()

encode_record = msgspec.msgpack.Encoder().encode
decode_record = msgspec.msgpack.Decoder(ProviderRecord).decode
