"""What calls cost: the configuration's word, else nothing at home, else the public list of the provider.

Tokens are what is kept; they are priced when somebody asks. An unknown price is unknown, never zero.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import structlog

from ksi.config import PriceConfig
from ksi.providers.base import Capabilities, bare_model
from ksi.request import Attempt
from ksi.store.usage import PRICE_SLICE, Rates, Tariff, rates_for

if TYPE_CHECKING:
    from ksi.completion.price_library import PriceLibrary

KEPT_TARIFFS = 10_000
"""Tariffs that are remembered, by model and half hour."""

UNKNOWN: Tariff = ()
FREE: Tariff = (Rates(input=0.0, output=0.0, cache_read=0.0, cache_write=0.0, reasoning=0.0),)

_Name = tuple[str, str | None, str | None]
"""Provider, model that answered, model that was asked for."""


class Prices:
    """Finds tariffs. `tariff` may be called from any thread."""

    def __init__(self, configured: Mapping[str, PriceConfig], providers: Mapping[str, Capabilities]) -> None:
        self._configured = configured
        self._providers = providers
        self._library: PriceLibrary | None = None
        self._loading: asyncio.Future[None] | None = None
        self._fixed: dict[_Name, Tariff | None] = {}
        """None where the list is to be asked."""
        self._listed: dict[tuple[_Name, int], Tariff] = {}
        self._log = structlog.get_logger("ksi.prices")

    # -- the public lists -----------------------------------------------------------------------------------------

    def warm(self, provider: str) -> None:
        """A call goes out: have its provider's list at hand when the answer comes."""
        if self._library is None and self._loading is None and self._has_list(provider):
            self._loading = asyncio.get_running_loop().run_in_executor(None, self._load)

    async def ready(self, providers: Iterable[str]) -> None:
        """Wait until the lists of these providers can be asked."""
        if self._library is None and any(self._has_list(name) for name in providers):
            for name in providers:
                self.warm(name)
            if self._loading is not None:
                await asyncio.shield(self._loading)

    def _has_list(self, provider: str) -> bool:
        can = self._providers.get(provider)
        return can is not None and can.price_list is not None and not can.free

    def _load(self) -> None:
        from ksi.completion.price_library import PriceLibrary

        self._library = PriceLibrary()
