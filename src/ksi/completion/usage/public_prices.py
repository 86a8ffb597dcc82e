"""Public list prices out of the package genai-prices, as the store's `Rates`.

The package and its table take a third of a second and 25 MiB: this module is imported in a thread, if a price is wanted
that no other source has. It asks no network: its table is as new as the installed package.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import genai_prices
from genai_prices.types import ModelPrice, TieredPrices

from ksi.clock import MICROSECONDS
from ksi.store.usage import Rates, Tariff

_EVERY_SIZE = -1


class PriceLibrary:
    """The package's table, read."""

    def __init__(self) -> None:
        self._usage = genai_prices.Usage(input_tokens=1, output_tokens=1)
        # The first question reads the table, whatever is asked.
        self.tariff("anthropic", "claude-haiku-4-5", 0)

    def tariff(self, price_list: str, model: str, at: int) -> Tariff:
        """A model's rates at a time, in microseconds; empty if the list does not have it.

        `price_list` is a provider's name, or the address at which it is asked.
        """
        by_address = "://" in price_list
        try:
            found = genai_prices.calc_price(
                self._usage,
                model,
                provider_id=None if by_address else price_list,
                provider_api_url=price_list if by_address else None,  # type: ignore[call-overload]  # one of them is None
                genai_request_timestamp=datetime.fromtimestamp(at / MICROSECONDS, UTC),
            )
        except (LookupError, ValueError):
            return ()
        return _tariff(found.model_price)


def _tariff(price: ModelPrice) -> Tariff:
    kinds = (price.input_mtok, price.output_mtok, price.cache_read_mtok, price.cache_write_mtok)
    if price.input_mtok is None or price.output_mtok is None:
        return ()
    starts = {tier.start for kind in kinds if isinstance(kind, TieredPrices) for tier in kind.tiers}
    return tuple(_rates(price, above) for above in (_EVERY_SIZE, *sorted(starts)))


def _rates(price: ModelPrice, above: int) -> Rates:
    """The rates of calls with more input than `above`. A kind of token without a price of its own has that of the kind
    it is a part of."""
    given = _dollars(price.input_mtok, above) or 0.0
    made = _dollars(price.output_mtok, above) or 0.0
    read = _dollars(price.cache_read_mtok, above)
    written = _dollars(price.cache_write_mtok, above)
    reasoning = _dollars(price.output_reasoning_mtok, above)
    return Rates(
        above=above,
        input=given,
        output=made,
        cache_read=given if read is None else read,
        cache_write=given if written is None else written,
        reasoning=made if reasoning is None else reasoning,
        call=(_dollars(price.requests_kcount, above) or 0.0) / 1000,
    )


def _dollars(price: Decimal | TieredPrices | None, above: int) -> float | None:
    if isinstance(price, TieredPrices):
        reached = [tier.price for tier in price.tiers if tier.start <= above]
        price = reached[-1] if reached else price.base
    return None if price is None else float(price)
