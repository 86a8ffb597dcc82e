"""An agent that does something unusual is told once in an hour."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ksi.clock import MICROSECONDS, Chance
from ksi.completion.notify.alerts import HOUR, Alerts
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Alerts as Rules
from ksi.events.bus import EventBus
from ksi.store.usage import UsageQuery, UsageReport, UsageSums
from ksi.store.values import StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore

NOW = 1_800_000_000


class Account(MemoryStore):
    """A store whose account says what a test wants."""

    def __init__(self, *hours: float) -> None:
        super().__init__(StoreRules(), Chance(random.Random(1)))
        self.hours = hours
        self.looks = 0

    async def usage(self, query: UsageQuery, pricing: Any) -> UsageReport:
        self.looks += 1
        nothing = UsageSums()
        buckets = {number: UsageSums(cost_usd=cost) for number, cost in enumerate(self.hours)}
        return UsageReport(total=nothing, fenced=nothing, mcp=nothing, buckets=buckets)


class Told(Alerts):
    """The alerts, and what an agent did."""

    def __init__(self, *hours: float, **rules: Any) -> None:
        self.clock = SimulatedClock(wall=float(NOW))
        self.account = Account(*hours)
        super().__init__(Rules(**rules), self.account, Prices({}, {}), EventBus(self.clock), self.clock)
        self.count = 0

    async def ask(self, text: str = "the same", cost: float | None = None, agent: str = "ann") -> None:
        self.count += 1
        self.completed(agent, f"r{self.count}", self.clock.now().wall, cost, lambda: text)
        await settle_down()


@pytest.mark.promise("B1")
async def test_equal_requests_are_told_once_in_an_hour_and_others_are_not() -> None:
    alerts = Told(equal_requests=5)
    for _ in range(12):
        await alerts.ask()
        await alerts.ask(agent="bob", text=f"something else {alerts.count} of {random.random()}")
    (said,) = alerts.problems()
    assert said.startswith("agent 'ann' asked the same 5 times within an hour; `ksi show r")
    await alerts.clock.advance(3_600)
    assert alerts.problems() == []
    for _ in range(5):
        await alerts.ask()
    assert len(alerts.problems()) == 1


@pytest.mark.promise("B1")
async def test_an_agent_that_spends_ten_times_its_usual_hour_is_told_once() -> None:
    alerts = Told(0.2, 0.3, 0.1)
    for _ in range(60):
        await alerts.ask(cost=0.1)
    (said,) = alerts.problems()
    assert "agent 'ann' spent $2." in said and "usually it spends $0.20" in said
    # At a dollar and when that has doubled: not at each request.
    assert alerts.account.looks == 2


@pytest.mark.promise("B1")
@pytest.mark.parametrize("hours", [(), (0.01, 0.01), (1.0, 1.0, 1.0)], ids=["none", "few", "as usual"])
async def test_nothing_is_unusual_without_a_usual_or_within_it(hours: tuple[float, ...]) -> None:
    alerts = Told(*hours)
    for _ in range(30):
        await alerts.ask(cost=0.1)
    assert alerts.problems() == []


async def test_zero_looks_at_nothing() -> None:
    alerts = Told(0.001, 0.001, 0.001, equal_requests=0, spending_factor=0.0)
    for _ in range(20):
        await alerts.ask(cost=5.0)
    assert alerts.problems() == []
    assert alerts.account.looks == 0
    assert HOUR == 3_600 * MICROSECONDS
