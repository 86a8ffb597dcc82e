"""A budget as people write it, in the configuration or in an event."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ksi.budgets.rules import KINDS, NANO, Budget, Kind, Unit
from ksi.budgets.windows import Period, zone_named

LARGEST = 1e9
"""Dollars that a budget may hold at most: more is not counted exactly."""


def budget_of(
    name: str,
    *,
    scope: str,
    usd: float | None,
    tokens: int | None,
    requests: int | None,
    per: str,
    time_zone: str,
    on_exceed: str,
    warn_at: Sequence[float],
    unpriced: str | float,
) -> Budget:
    """Make a budget of its settings.

    Raises:
        ValueError: they do not make one; the first argument says which, the second why.
    """
    if not name or len(name) > 100 or not name.isprintable():
        raise ValueError("name", "a budget's name has 1 to 100 characters on one line")
    kind, named = _scope(scope)
    amounts = ((Unit.USD, usd), (Unit.TOKENS, tokens), (Unit.REQUESTS, requests))
    given = {unit: value for unit, value in amounts if value is not None}
    if len(given) != 1:
        raise ValueError("usd", "a budget counts one thing: give usd, tokens or requests, above zero")
    unit, value = next(iter(given.items()))
    if not 0 < value <= LARGEST * (1 if unit is Unit.USD else 1_000_000):
        raise ValueError(unit.value, f"must be above zero and at most {LARGEST:.0f} (tokens: a million times that)")
    try:
        zone_named(time_zone)
    except LookupError:
        raise ValueError(
            "time_zone",
            f"this system knows no time zone {time_zone!r}; names are as Europe/Berlin, from the package tzdata",
        ) from None
    if any(not 0 < share <= 1 for share in warn_at) or len(warn_at) > 8:
        raise ValueError("warn_at", "up to eight shares of the limit, above 0 and up to 1")
    if isinstance(unpriced, str) and unpriced != "refuse":
        raise ValueError("unpriced", '"refuse", or US dollars for a million tokens')
    price = None if isinstance(unpriced, str) else unpriced * NANO / 1_000_000
    if price is not None and not 0 <= price <= NANO:
        raise ValueError("unpriced", "US dollars for a million tokens, from zero to a million")
    return Budget(
        name=name,
        kind=kind,
        named=named,
        unit=unit,
        limit=to_units(unit, value),
        per=Period(per),
        time_zone=time_zone,
        refuse=on_exceed == "refuse",
        warn_at=tuple(sorted(set(warn_at))),
        unpriced=price,
    )


def to_units(unit: Unit, value: float) -> int:
    """An amount as it is counted."""
    return math.floor(value * NANO + 0.5) if unit is Unit.USD else int(value)


def _scope(scope: str) -> tuple[Kind, str]:
    word, colon, named = scope.partition(":")
    kind = next((one for one in KINDS if one == word), None)
    if kind is None or (kind == "all") != (not colon) or (kind != "all" and not named):
        raise ValueError(
            "scope",
            f"{scope!r} is none of all, agent:NAME, token:NAME, model:NAME, provider:NAME, "
            "session:NAME (* for each one)",
        )
    if "*" in named[:-1] or not named.isprintable():
        raise ValueError("scope", f"{scope!r}: a star stands at the end, or alone for each one")
    return kind, named
