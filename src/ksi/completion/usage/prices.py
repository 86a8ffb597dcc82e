"""Finds prices of calls: first in the configuration; local models are free; else in the provider's public list.

Tokens are stored; they are priced in a report. An unknown price is unknown, never zero.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog

from ksi.config.schema import PriceConfig
from ksi.providers.base import Capabilities, bare_model
from ksi.request import UNPRICED, Attempt, Usage
from ksi.store.usage import MILLION, PRICE_SLICE, Rates, Tariff, rates_for

if TYPE_CHECKING:
    from ksi.completion.usage.public_prices import PriceLibrary

K = TypeVar("K")
V = TypeVar("V")

KEPT_TARIFFS = 10_000
"""Tariffs that are remembered."""

UNKNOWN: Tariff = ()
FREE: Tariff = (Rates(input=0.0, output=0.0, cache_read=0.0, cache_write=0.0, reasoning=0.0),)

HOUR_FACTOR = 2.0
"""The price of a token that is written to a cache for an hour, in input tokens, if no price defines it."""


class ConfiguredRates(Rates, frozen=True, kw_only=True):
    """Rates of the configuration; only they can define the price of an hour's cache."""

    cache_write_hour: float


_Call = tuple[str, str | None, str | None]
"""Provider, model that answered, model that was asked for."""


class Prices:
    """Finds tariffs; `tariff` may be called from any thread."""

    def __init__(self, configured: Mapping[str, PriceConfig], providers: Mapping[str, Capabilities]) -> None:
        self._configured = {name: _configured_rates(price) for name, price in configured.items()}
        self._providers = providers
        self.unread = any(self._price_list(name) is not None for name in providers)
        """True if some prices are in lists that are not read yet."""
        self._library: PriceLibrary | None = None
        self._loading: asyncio.Future[None] | None = None
        self._settled: dict[_Call, Tariff | None] = {}
        """None if the public list has to be asked."""
        self._listed: dict[tuple[_Call, int], Tariff] = {}
        self._log = structlog.get_logger("ksi.prices")

    # -- the public lists -----------------------------------------------------------------------------------------

    def warm(self, provider: str) -> None:
        """A call goes out: have the provider's list at hand when its answer comes."""
        if self.unread and self._loading is None and self._price_list(provider) is not None:
            self._loading = asyncio.get_running_loop().run_in_executor(None, self._load)

    async def ready(self, providers: Collection[str]) -> None:
        """Wait until these providers' lists can be asked."""
        for provider in providers:
            self.warm(provider)
        if self._loading is not None and not self._loading.done():
            await asyncio.shield(self._loading)

    def _load(self) -> None:
        try:
            from ksi.completion.usage.public_prices import PriceLibrary

            self._library = PriceLibrary()
        except Exception:  # noqa: BLE001 - a table that cannot be read makes prices unknown, and loses no answer
            self._log.exception("the public prices cannot be read; costs are known only for models in [prices]")
        self.unread = False

    def _price_list(self, provider: str) -> str | None:
        can = self._providers.get(provider)
        return None if can is None or can.free else can.price_list

    # -- tariffs --------------------------------------------------------------------------------------------------

    def tariff(self, provider: str, model: str | None, asked: str | None, at: int) -> Tariff:
        """See `ksi.store.usage.Pricing`."""
        call = (provider, model, asked)
        if call in self._settled:
            settled = self._settled[call]
        else:
            settled = self._settle(call)
            _keep(self._settled, call, settled)
        return settled if settled is not None else self._from_list(call, at)

    def _settle(self, call: _Call) -> Tariff | None:
        provider, model, asked = call
        names = [name for name in (f"{provider}/{model}" if model else None, asked) if name]
        exact = (self._configured[name] for name in names if name in self._configured)
        fitting = (
            rates for pattern, rates in self._configured.items() if any(fnmatchcase(name, pattern) for name in names)
        )
        found = next(exact, None) or next(fitting, None)
        if found is not None:
            return (found,)
        can = self._providers.get(provider)
        if can is not None and can.free:
            return FREE
        return UNKNOWN if self._price_list(provider) is None else None

    def _from_list(self, call: _Call, at: int) -> Tariff:
        provider, model, asked = call
        price_list = self._price_list(provider)
        name = model or (bare_model(asked) if asked else None)
        if self._library is None or price_list is None or name is None:
            return UNKNOWN
        known = self._listed.get((call, at))
        if known is None:
            known = self._library.tariff(price_list, name, at)
            _keep(self._listed, (call, at), known)
        return known

    # -- costs ----------------------------------------------------------------------------------------------------

    def cost(self, attempt: Attempt) -> float | None:
        """Return an attempt's cost in US dollars, as reported or by price; None if it is unknown."""
        usage = attempt.usage
        if usage is None or usage.cost_usd is not None:
            return None if usage is None or usage.cost_usd == UNPRICED else usage.cost_usd
        rates = self._rates(attempt.provider, attempt.model, attempt.asked, usage, attempt.finished_at)
        return None if rates is None else rates.cost(usage)

    def with_hour_cache(
        self, provider: str, model: str | None, asked: str | None, usage: Usage, hour_tokens: int, at: int
    ) -> Usage:
        """The usage of a call that ends now, with its cost, if `hour_tokens` of its cache writes stay for an hour.

        Only the sum of all cache writes is kept, so this cost can be known at the call's end (`at`, in microseconds)
        and never again.
        """
        if not hour_tokens:
            return usage
        plain = msgspec.structs.replace(usage, cost_usd=None)
        rates = self._rates(provider, model, asked, plain, at)
        if rates is None:
            return usage
        hour = rates.cache_write_hour if isinstance(rates, ConfiguredRates) else HOUR_FACTOR * rates.input
        cost = rates.cost(plain) + hour_tokens * (hour - rates.cache_write) / MILLION
        return msgspec.structs.replace(plain, cost_usd=cost)

    def _rates(self, provider: str, model: str | None, asked: str | None, usage: Usage, at: int) -> Rates | None:
        return rates_for(self.tariff(provider, model, asked, at // PRICE_SLICE * PRICE_SLICE), usage)


def _keep(cache: dict[K, V], key: K, value: V) -> None:
    if len(cache) >= KEPT_TARIFFS:
        cache.clear()
    cache[key] = value


def _configured_rates(price: PriceConfig) -> ConfiguredRates:
    return ConfiguredRates(
        input=price.input,
        output=price.output,
        cache_read=price.input if price.cache_read is None else price.cache_read,
        cache_write=price.input if price.cache_write is None else price.cache_write,
        cache_write_hour=HOUR_FACTOR * price.input if price.cache_write_hour is None else price.cache_write_hour,
        reasoning=price.output,
    )
