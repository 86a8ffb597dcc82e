"""A budget's settings make one, or say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.budgets.rules import NANO, Unit
from ksi.budgets.settings import budget_of

GOOD: dict[str, Any] = {
    "scope": "agent:*",
    "usd": 5.0,
    "tokens": None,
    "requests": None,
    "per": "day",
    "time_zone": "Europe/Berlin",
    "on_exceed": "wait",
    "warn_at": (0.8, 0.5, 0.8),
    "unpriced": "refuse",
}


@pytest.mark.promise("B1")
def test_good_settings_make_a_budget() -> None:
    made = budget_of("night", **GOOD)
    assert (made.unit, made.limit, made.scope, made.warn_at) == (Unit.USD, 5 * NANO, "agent:*", (0.5, 0.8))
    assert budget_of("night", **(GOOD | {"unpriced": 2.0})).unpriced == 2_000


@pytest.mark.promise("B1")
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("usd", {"usd": None}),
        ("usd", {"tokens": 5}),
        ("usd", {"usd": 1e12}),
        ("scope", {"scope": "everybody"}),
        ("scope", {"scope": "agent:"}),
        ("scope", {"scope": "agent:a*b"}),
        ("scope", {"scope": "all:x"}),
        ("time_zone", {"time_zone": "Europe/Atlantis"}),
        ("warn_at", {"warn_at": (1.5,)}),
        ("unpriced", {"unpriced": "free"}),
        ("unpriced", {"unpriced": -1.0}),
    ],
)
def test_bad_settings_are_refused_with_their_key(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        budget_of("night", **(GOOD | values))
    assert refused.value.args[0] == key
