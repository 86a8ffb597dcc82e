"""SQLite's figures of budgets in memory decide as the plain rules do, whatever they add up later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ksi.budgets import account
from ksi.budgets.rules import UNUSED, Ask, Caps, Facts, Hold, Spent, Use, caps_at
from ksi.budgets.settings import budget_of
from ksi.store.sqlite.budget_figures import BudgetFigures

AT = 1_700_000_000_000_000

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("usd", "tokens", "requests")),
    "time_zone": "UTC",
    "on_exceed": "wait",
    "warn_at": (0.5, 0.8),
    "unpriced": 0.02,
    "per": "day",
}
BUDGETS: dict[str, dict[str, Any]] = {
    "all": {"scope": "all", "tokens": 3_000},
    "calls": {"scope": "all", "requests": 12},
    "agents": {"scope": "agent:*", "tokens": 2_000},
    "money": {"scope": "provider:one", "usd": 0.000_08},
    "talks": {"scope": "session:*", "usd": 0.000_06},
}
CAPS: Caps = caps_at([budget_of(name, **(DEFAULTS | fields)) for name, fields in BUDGETS.items()], (), AT)

asks = st.builds(
    lambda agent, session, price, tokens, output, fixed: (
        Facts(agent, session),
        Ask("one", "one/m", tokens, output, fixed, price, 2.0, 3),
    ),
    agent=st.sampled_from(["ann", "abe"]),
    session=st.sampled_from(["talk", "other"]),
    price=st.sampled_from([1.0, 1.0, 1.0, None]),
    tokens=st.integers(1, 90),
    output=st.sampled_from([1, 30, 100, 500, 4_000]),
    fixed=st.booleans(),
)
reports = st.none() | st.builds(
    Spent,
    tokens=st.none() | st.integers(0, 700),
    nanos=st.none() | st.integers(0, 9_000),
    output=st.integers(0, 90),
)
steps = st.tuples(asks, st.integers(0, 5), reports, st.sampled_from(["begin", "begin", "end", "end", "died"]))


class NoRows:
    """A database without a row."""

    def __init__(self) -> None:
        self.at_begin: list[Callable[[], None]] = []
        self.at_write: list[Callable[[], None]] = []
        self.at_roll_back: list[Callable[[], None]] = []
        self.totals: dict[str, int] = {}

    def all(self, *_: Any) -> list[Any]:
        return []

    def one(self, *_: Any) -> None:
        return None

    scalar = run = count = one


class Plain:
    """The figures by the plain rules."""

    def __init__(self) -> None:
        self.uses: dict[account.Place, Use] = {}
        self.holds: dict[int, Hold] = {}


@given(transactions=st.lists(st.tuples(st.lists(steps, min_size=1, max_size=5), st.booleans()), max_size=20))
def test_figures_that_are_added_up_later_decide_as_figures_that_are_added_up_at_once(transactions: Any) -> None:
    rows: Any = NoRows()
    figures, plain = BudgetFigures(rows), Plain()
    key = 0
    for wanted, kept in transactions:
        before = copy.deepcopy(plain)
        for begin in rows.at_begin:
            begin()
        for (facts, ask), place, spent, what in wanted:
            if what == "begin":
                key += 1
                found, binding = figures.look(CAPS, facts, ask, 0)
                assert found == account.look(_uses(plain), CAPS, facts, ask, 0)
                if isinstance(found, Hold):
                    figures.begin(key, found, (ask,), binding, has_row=False)
                    account.set_aside(_uses(plain), found)
                    plain.holds[key] = found
                else:
                    assert account.exceeded(figures, found) == account.exceeded(_uses(plain), found)
            elif plain.holds:
                ended = sorted(plain.holds)[place % len(plain.holds)]
                hold = plain.holds.pop(ended)
                if what == "died":
                    figures.interrupted(ended)
                    account.interrupted(_uses(plain), hold)
                else:
                    notices = account.settle(_uses(plain), hold, spent, CAPS)
                    assert figures.settle(ended, spent, CAPS, final=True) == (hold, notices)
        for done in rows.at_write if kept else rows.at_roll_back:
            done()
        if not kept:
            plain = before
    for cap in CAPS:
        assert dict(figures.known(cap.name, 0)) == {
            place: plain.uses.get(place, UNUSED) for place, _ in figures.known(cap.name, 0)
        }
    assert set(plain.uses) <= {place for cap in CAPS for place, _ in figures.known(cap.name, 0)}


def _uses(plain: Plain) -> Any:
    return plain.uses
