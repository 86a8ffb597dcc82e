"""A manager whose providers other daemons ask too: what it offers, what it says, and whose word it takes."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.clock import Chance, Moment, microseconds
from ksi.completion.pool.routes import Router
from ksi.completion.pool.team import Place, Team
from ksi.completion.provider_manager import ProviderManager
from ksi.config.schema import BreakerConfig, Config, ProviderConfig
from ksi.errors import FailureClass, ProviderError
from ksi.events.bus import EventBus
from ksi.request import Attempt, Outcome, Priority
from ksi.store.provider_records import KeptRecords
from ksi.store.values import Claimed, Offer, StoreRules, Terms
from ksi.testing import SimulatedClock
from tests.reference_store.store import MemoryStore
from tests.unit.completion.parts import Ear, Player

BREAKER = BreakerConfig(failures=2, max_samples=4, open_for=10.0, probes=2, probes_to_close=1)


class Skewed(MemoryStore):
    """A store whose time a daemon cannot read to the microsecond."""

    skew = 0

    async def provider_records(self, now: Moment) -> KeptRecords:
        found = await super().provider_records(now)
        return msgspec.structs.replace(found, at=found.at + self.skew)


class Office:
    """One daemon's manager on a store."""

    def __init__(self, store: MemoryStore, clock: SimulatedClock, place: str = "", **keys: Any) -> None:
        self.clock = clock
        providers = {"p": ProviderConfig(kind="player", models=("m/*",), max_concurrency=4, **keys)}
        config = Config(home=Path("/nowhere"), providers=providers, breaker=BREAKER)
        self.team = Team(store, {"p": Place(place, 4)}, BREAKER, clock)
        bus = EventBus(clock)
        self.ear = Ear()
        bus.subscribe(self.ear, ["provider:*"])
        players = {"p": Player("p", process=bool(place))}
        router = Router(providers, {})
        self.manager = ProviderManager(config, players, router, bus, clock, self.team, shared=True)
        self.route = self.manager.route("m/x")
        self._fence = 0

    def offers(self) -> list[Offer]:
        return list(self.manager.offers(self.clock.now()))

    def call(self, failure: FailureClass | None = None, retry_after: float | None = None) -> None:
        """One call begins and ends."""
        self._fence += 1
        now = self.clock.now()
        claim = Claimed(
            key=self._fence,
            request_id=f"r{self._fence}",
            conversation=f"talk {self._fence}",
            body=b"{}",
            route=self.route,
            provider="p",
            priority=Priority.NORMAL,
            attempt=1,
            fence=self._fence,
            token=1,
            started_at=now.wall,
            enqueued_at=now.wall,
            head=None,
        )
        error = None if failure is None else ProviderError(failure, "it broke", retry_after=retry_after)
        attempt = Attempt(
            number=1,
            provider="p",
            outcome=Outcome.COMPLETED if error is None else Outcome.FAILED,
            started_at=now.wall,
            finished_at=now.wall,
        )
        self.manager.began(claim, "m/x")
        self.manager.ended(claim, attempt, error, now)

    async def fail(self, times: int = 2) -> None:
        for _ in range(times):
            self.call(FailureClass.PROVIDER_ERROR)
        await self.team.write()

    def told(self) -> list[tuple[str, str, str]]:
        """What it said since it was asked last."""
        return [(data["before"], data["after"], data["reason"]) for _, data in self.ear.heard()]


def two(**keys: Any) -> tuple[Office, Office, Skewed]:
    """Two daemons on one store."""
    clock, store = SimulatedClock(), Skewed(StoreRules(), Chance(random.Random(1)))
    return Office(store, clock, **keys), Office(store, clock, **keys), store


@pytest.mark.promise("D1", "F3")
async def test_each_daemon_reports_its_own_changes_and_offers_by_them() -> None:
    here, there, _ = two()
    assert here.offers() == [Offer("p", "p", 4)]
    await here.fail()
    assert here.told() == [("closed", "open", "2 of 2 calls failed, the last: it broke")]
    assert (here.offers(), there.offers()) == ([], [Offer("p", "p", 4)])
    await there.team.refresh()
    assert there.told() == [("closed", "open", "2 of 2 calls failed, the last: it broke")]
    assert there.offers() == []
    await here.clock.advance(10.0)
    for office in (here, there):
        assert office.offers() == [Offer("p", "p", 4, terms=Terms(probes=2, known=1))]
        assert office.told() == [("open", "half_open", "its time alone is over")]
    there.call()
    await there.team.write()
    await here.team.refresh()
    for office in (here, there):
        assert office.told() == [("half_open", "closed", "1 probes in a row succeeded")]
        assert office.offers() == [Offer("p", "p", 4)]


@pytest.mark.promise("D1", "F3")
async def test_a_daemon_that_saw_the_time_end_does_not_see_it_again() -> None:
    here, there, store = two()
    await here.fail()
    await there.team.refresh()
    await here.clock.advance(10.0)
    assert len(there.offers()) == 1
    there.told()
    # The record changes, and is still the one that was written at the opening; the server's clock seems to be behind.
    await here.manager.set_enabled("p", False)
    store.skew = -microseconds(1.0)
    await there.team.refresh()
    assert there.told() == [("enabled", "disabled", "by an operator")]
    await here.manager.set_enabled("p", True)
    await there.team.refresh()
    assert there.offers() == [Offer("p", "p", 4, terms=Terms(probes=2, known=3))]
    assert there.told() == [("disabled", "enabled", "by an operator")]


@pytest.mark.promise("D1", "F3", "F5")
async def test_a_new_daemon_starts_from_the_others_knowledge() -> None:
    here, there, _ = two()
    here.call(FailureClass.RATE_LIMITED, retry_after=30.0)
    await here.fail()
    await here.manager.set_enabled("p", False)
    await there.manager.start()
    report = there.manager.report()["p"]
    assert (report.breaker, report.enabled) == ("open", False)
    assert report.parked_until == here.manager.report()["p"].parked_until is not None
    assert [task.well for task in there.manager.tasks()] == [True]
    await there.manager.stop()
    assert [task.well for task in there.manager.tasks()] == [False]


@pytest.mark.promise("D1", "F5")
async def test_a_quota_is_reported_by_each_daemon_and_so_is_its_return_by_reset() -> None:
    here, there, _ = two()
    here.call(FailureClass.RATE_LIMITED, retry_after=30.0)
    await here.team.write()
    await there.team.refresh()
    told = here.told()
    assert there.told() == told
    assert [line[:2] for line in told] == [("closed", "parked")]
    assert re.match(r"its quota is spent since .*; it is asked again at .*: it broke", told[0][2])
    assert there.manager.next_change(there.clock.now()) == microseconds(30.0)
    await there.manager.reset("p")
    await here.team.refresh()
    assert there.told() == here.told() == [("parked", "closed", "reset by an operator")]


@pytest.mark.promise("D1", "F3", "F5")
async def test_a_decisive_outcome_holds_before_it_is_written() -> None:
    here, there, _ = two()
    here.call(FailureClass.RATE_LIMITED, retry_after=30.0)
    assert (here.offers(), len(there.offers())) == ([], 1)
    assert here.manager.back("p", "m/x", here.clock.now()) == here.clock.now().after(30.0).wall
    await here.team.write()
    assert [line[:2] for line in here.told()] == [("closed", "parked")]
    await here.manager.reset("p")
    await there.team.refresh()
    await there.fail()
    await here.team.refresh()
    await here.clock.advance(10.0)
    assert len(here.offers()) == 1
    here.told()
    here.call(FailureClass.PROVIDER_ERROR)
    assert here.offers() == []
    await here.team.write()
    assert here.told() == [("half_open", "open", "a probe failed: it broke")]
    await here.clock.advance(20.0)
    assert len(here.offers()) == 1
    here.told()
    here.call()
    assert here.offers() == [Offer("p", "p", 4)]
    await here.team.write()
    await there.team.refresh()
    assert here.told() == [("half_open", "closed", "1 probes in a row succeeded")]
    assert there.offers() == [Offer("p", "p", 4)]


@pytest.mark.promise("D1", "F3")
async def test_a_failure_that_others_may_outweigh_is_judged_when_it_is_written() -> None:
    here, there, _ = two()
    for _ in range(3):
        there.call()
    await here.clock.advance(1.0)
    here.call(FailureClass.PROVIDER_ERROR)
    await here.team.write()
    await there.team.refresh()
    await there.team.write()
    here.call(FailureClass.PROVIDER_ERROR)
    assert len(here.offers()) == 1
    await here.team.write()
    assert here.told() == [("closed", "open", "2 of 4 calls failed, the last: it broke")]


@pytest.mark.promise("D1", "F5")
async def test_limits_per_minute_go_with_the_offer_and_the_store_reports_when_they_end() -> None:
    here, _, _ = two(requests_per_minute=3, tokens_per_minute=1_000)
    here.call()
    assert here.offers() == [Offer("p", "p", 4, terms=Terms(requests=3, tokens=1_000))]
    now = here.clock.now()
    assert here.manager.next_change(now) is None
    here.manager.waits({"p": microseconds(20.0)}, now)
    assert here.manager.next_change(now) == microseconds(20.0)
    await here.clock.advance(20.0)
    assert here.manager.next_change(here.clock.now()) is None
    await here.fail()
    await here.clock.advance(10.0)
    assert here.offers() == [Offer("p", "p", 4, terms=Terms(2, 3, 1_000, known=1))]


@pytest.mark.promise("D1", "D4", "F3")
async def test_a_provider_with_processes_is_judged_on_each_machine_and_switched_on_all() -> None:
    clock, store = SimulatedClock(), Skewed(StoreRules(), Chance(random.Random(1)))
    here, there = Office(store, clock, "here"), Office(store, clock, "there")
    await here.fail()
    await there.team.refresh()
    assert (here.offers(), there.offers()) == ([], [Offer("p", "p", 4, by_node=True)])
    await there.manager.reset("p")
    await here.team.refresh()
    assert here.offers() == [Offer("p", "p", 4, by_node=True)]
    await here.manager.set_enabled("p", False)
    await there.team.refresh()
    assert (here.offers(), there.offers()) == ([], [])
