"""The data of the events about providers."""

from __future__ import annotations

import msgspec

from ksi.events.common import Data, Name


class ProviderPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A provider's circuit breaker changed its state, the provider was parked for its quota, or an operator switched
    it."""

    provider: str
    """The provider's name."""
    before: str
    """The state before."""
    after: str
    """The state now."""
    reason: str
    """The reason for the change."""
    until: float | None = None
    """Unix time when it is tried again."""


class ProviderName(Data):
    """Names one provider."""

    provider: Name
    """The provider's name."""


class SwitchData(ProviderName):
    """Names the provider to switch, and says who switches it and why."""

    by: str = ""
    """The person who switches it."""
    why: str = ""
    """The reason, for other operators."""
