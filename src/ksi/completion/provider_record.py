"""What daemons on one store share of a provider: a frozen value, and how calls and operators change it (D1, F3, F5).

Everything here is values in, a value out. Who writes it compares and sets: when another daemon was faster, the same
step is taken again from what that one wrote (`ksi.completion.provider_team`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ksi.completion.provider_breaker import BreakerRecord, BreakerState, ProviderBreaker
from ksi.config import BreakerConfig

LONGEST_REASON = 300
"""Characters of a reason that are kept."""


class Seen(msgspec.Struct, frozen=True):
    """What one call said about its provider when it ended."""

    at: int
    era: int
    """As the breaker had it when the call began."""
    failed: bool = False
    reason: str = ""
    quota: int | None = None
    """When the provider is back by its own word; then the rest of the call says nothing."""

    def shifted(self, by: int) -> Seen:
        """The same on a clock that is ahead by so many microseconds."""
        quota = None if self.quota is None else self.quota + by
        return msgspec.structs.replace(self, at=self.at + by, quota=quota)


class ProviderRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One provider, for all daemons; times in microseconds of the store's clock."""

    enabled: bool = True
    """Whether an operator lets it be asked."""
    breakers: Mapping[str, BreakerRecord] = {}
    """By place: "" where all daemons reach the same provider, else a machine, whose own processes it judges."""

    def breaker(self, place: str) -> BreakerRecord:
        """The breaker of a place; one of which nothing is known is well."""
        return self.breakers.get(place, _WELL)

    def learned(self, place: str, seen: Sequence[Seen], config: BreakerConfig) -> ProviderRecord:
        """After these calls of a place, whichever daemons made them."""
        before = self.breaker(place)
        after = learned(before, seen, config)
        return self if after == before else self._with({place: after})

    def switched(self, enabled: bool) -> ProviderRecord:
        """After an operator switched it."""
        return msgspec.structs.replace(self, enabled=enabled)

    def reset(self, place: str, config: BreakerConfig) -> ProviderRecord:
        """After an operator at this place said that it is well, wherever it is."""
        return self._with({where: _reset(self.breaker(where), config) for where in {*self.breakers, place}})

    @property
    def told(self) -> Any:
        """What other daemons must hear of at once when it changes; the rest they learn in time."""
        return self.enabled, sorted(
            (place, b.state, b.era, b.until, b.probes_passed, b.parked_until, b.wary)
            for place, b in self.breakers.items()
        )

    def _with(self, breakers: Mapping[str, BreakerRecord]) -> ProviderRecord:
        return msgspec.structs.replace(self, breakers={**self.breakers, **breakers})


def learned(before: BreakerRecord, seen: Sequence[Seen], config: BreakerConfig) -> BreakerRecord:
    """A breaker after these calls. Those of an era that is over say nothing; a quota is believed whenever it is told.

    Calls of several daemons come in late: each is put where it belongs among the latest ones.
    """
    breaker = ProviderBreaker(config)
    breaker.adopt(before)
    for one in sorted(seen, key=lambda one: one.at):
        if one.quota is not None:
            breaker.park(one.at, one.quota, one.reason)
            continue
        if one.era != breaker.era:
            continue
        if breaker.state is BreakerState.OPEN:
            # A call of this era began after the opening: whoever made it has seen the time alone end.
            breaker.tick(max(one.at, before.until))
        if one.failed:
            breaker.saw_failure(one.at, one.reason)
        else:
            breaker.saw_success(one.at)
    return breaker.record


def _reset(before: BreakerRecord, config: BreakerConfig) -> BreakerRecord:
    breaker = ProviderBreaker(config)
    breaker.adopt(before)
    breaker.reset()
    return breaker.record


_WELL = BreakerRecord()

encode_record = msgspec.msgpack.Encoder().encode
decode_record = msgspec.msgpack.Decoder(ProviderRecord).decode
