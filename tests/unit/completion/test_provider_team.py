"""What daemons know of providers together: when it is written, who hears of it, and what becomes of it on the way."""

from __future__ import annotations

import random
from functools import partial

import msgspec
import pytest

from ksi.clock import Chance, Moment, microseconds
from ksi.completion.pool.breaker import BreakerRecord, BreakerState
from ksi.completion.pool.limits import Hit, Limit, LimitCause
from ksi.completion.pool.record import (
    PlaceRecord,
    ProviderRecord,
    Seen,
    decode_record,
    encode_record,
    learned,
)
from ksi.completion.pool.team import LAZY, PACE, Place, Team, View
from ksi.config.schema import BreakerConfig
from ksi.errors import StoreUnavailable
from ksi.store.provider_records import HeldRecords, KeptRecords, PutRecord
from ksi.store.values import StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore

CONFIG = BreakerConfig(failures=3, rate=0.5, max_samples=6, open_for=10.0)
CLOSED, OPEN, HALF_OPEN = BreakerState


class Board(MemoryStore):
    """A store whose time is ahead, that counts what is put, tells the teams, and can say no."""

    def __init__(self, ahead: float) -> None:
        super().__init__(StoreRules(), Chance(random.Random(1)))
        self.ahead = microseconds(ahead)
        self.puts = 0
        self.down = False
        self.teams: list[Team] = []

    def shifted(self, now: Moment) -> Moment:
        return Moment(now.wall + self.ahead, now.mono)

    def check(self) -> None:
        if self.down:
            raise StoreUnavailable("away")

    async def provider_records(self, now: Moment) -> KeptRecords:
        self.check()
        return await super().provider_records(self.shifted(now))

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        self.check()
        self.puts += 1
        put = await super().put_provider_record(name, version, value, self.shifted(now), tell=tell)
        for team in self.teams if put.written and tell else ():
            team.look()
        return put


class House:
    """Teams of two daemons on one store, and what each sees."""

    def __init__(self, *, ahead: float = 0.0) -> None:
        self.clock = SimulatedClock()
        self.store = Board(ahead)
        self.teams = [Team(self.store, {"p": Place()}, CONFIG, self.clock) for _ in range(2)]
        self.views: list[list[View]] = [[], []]
        self.changes = [0, 0]
        for number, team in enumerate(self.teams):
            team.on_view = partial(self._see, number)
            team.on_change = partial(self._changed, number)
        self.store.teams = self.teams

    def _see(self, number: int, name: str, view: View) -> None:
        assert name == "p"
        self.views[number].append(view)

    def _changed(self, number: int) -> None:
        self.changes[number] += 1

    async def __aenter__(self) -> House:
        for team in self.teams:
            await team.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for team in self.teams:
            await team.stop()

    def saw(self, number: int, failed: bool = False, times: int = 1, era: int = 0, quota: float | None = None) -> None:
        """Calls of a daemon end."""
        now = self.clock.now()
        hit = None if quota is None else Hit(LimitCause.QUOTA, "spent", until=now.after(quota).wall)
        for _ in range(times):
            seen = Seen(now.wall, era, now.wall, failed=failed, reason="it broke" if failed else "", hit=hit)
            self.teams[number].saw("p", seen)

    async def pass_by(self, seconds: float = 4 * PACE) -> None:
        """Let words go round."""
        await settle_down()
        await self.clock.advance(seconds)

    async def kept(self) -> ProviderRecord:
        """The record as it is stored."""
        found = await self.store.provider_records(self.clock.now())
        return decode_record(found.records["p"].value)

    def state(self, number: int) -> BreakerState:
        """As a daemon sees it."""
        return self.views[number][-1].place.breaker.state if self.views[number] else CLOSED


@pytest.mark.promise("D1", "F3")
async def test_a_provider_that_is_well_costs_nothing() -> None:
    async with House() as house:
        for _ in range(50):
            house.saw(0)
            house.saw(1)
            await house.pass_by(LAZY)
        assert (house.store.puts, house.views) == (0, [[], []])


@pytest.mark.promise("D1", "F3")
async def test_a_failure_is_written_at_once_with_the_calls_before_it_and_the_others_add_theirs() -> None:
    async with House() as house:
        house.saw(0, times=2)
        house.saw(1, times=3)
        await house.pass_by(1.0)
        house.saw(0, failed=True)
        await house.pass_by()
        samples = (await house.kept()).place("").breaker.samples
        assert [failed for _, failed, _ in samples] == [False] * 5 + [True]
        assert [views[-1].place.wary for views in house.views] == [True, True]


@pytest.mark.promise("D1", "F3")
async def test_two_concurrent_writes_count_together() -> None:
    async with House() as house:
        house.saw(0, failed=True, times=2)
        house.saw(1, failed=True)
        await house.pass_by()
        assert (await house.kept()).place("").breaker.state is OPEN
        assert [house.state(number) for number in (0, 1)] == [OPEN, OPEN]
        assert min(house.changes) > 0


@pytest.mark.promise("D1", "F3")
async def test_the_slower_writer_takes_its_step_from_the_other_s_record() -> None:
    house = House()
    for number in (0, 1):
        house.saw(number, failed=True)
    for team in house.teams:
        await team.write()
    assert (await house.kept()).place("").breaker.samples == ((house.clock.now().wall, True, 0),) * 2
    await house.teams[1].switch("p", enabled=False)
    house.saw(0, failed=True)
    await house.teams[0].write()
    kept = await house.kept()
    assert (kept.enabled, kept.place("").breaker.state) == (False, OPEN)


@pytest.mark.promise("D1", "D3", "F3")
async def test_who_could_not_look_looks_when_the_store_is_back() -> None:
    async with House() as house:
        await house.teams[0].switch("p", enabled=False)
        house.store.down = True
        await house.pass_by()
        assert house.views[1] == []
        house.store.down = False
        await house.pass_by(1.0)
        assert house.views[1][-1].enabled is False


@pytest.mark.promise("D1", "F3")
async def test_answers_of_a_suspected_provider_are_written_in_batches() -> None:
    async with House() as house:
        house.saw(0, failed=True)
        await house.pass_by(1.0)
        puts = house.store.puts
        for _ in range(10):
            house.saw(1)
            await house.pass_by(LAZY / 20)
        assert house.store.puts == puts
        await house.pass_by(LAZY)
        assert house.store.puts == puts + 1
        assert (await house.kept()).place("").breaker.samples[-1][1] is False


@pytest.mark.promise("D1", "F3")
async def test_a_storm_of_failures_takes_few_writes() -> None:
    async with House() as house:
        # Of an era that is over: each could be written, and none changes anything.
        house.saw(0, failed=True, times=3)
        await house.pass_by()
        puts = house.store.puts
        for _ in range(200):
            house.saw(0, failed=True, times=5)
        await house.pass_by(1.0)
        assert house.store.puts == puts
        for _ in range(200):
            house.saw(0, failed=True, era=1, times=5)
        await house.pass_by(PACE)
        assert house.store.puts <= puts + 2


@pytest.mark.promise("D1", "F5")
async def test_a_quota_is_reported_whatever_was_answered_after_it() -> None:
    async with House(ahead=1_000_000.0) as house:
        back = house.clock.now().after(30.0).wall
        house.saw(0, quota=20.0)
        house.saw(0, quota=30.0)
        house.saw(0, quota=25.0)
        house.saw(0, times=20)
        await house.pass_by()
        assert [views[-1].place.limits[0].until for views in house.views] == [back, back]
        assert (await house.kept()).place("").limits[0].until == back + microseconds(1_000_000)


@pytest.mark.promise("D1", "D3", "F3")
async def test_a_failed_write_is_repeated_when_the_store_is_back() -> None:
    async with House() as house:
        house.store.down = True
        house.saw(0, failed=True, times=3)
        house.saw(0, quota=60.0)
        await house.pass_by(2.0)
        assert (house.store.puts, all(team.task.alive for team in house.teams)) == (0, True)
        house.store.down = False
        await house.pass_by(1.0)
        assert [house.state(number) for number in (0, 1)] == [OPEN, OPEN]
        assert house.views[1][-1].place.limits[0].until > house.clock.now().wall


@pytest.mark.promise("D1", "F3")
async def test_an_operator_s_word_holds_for_all_or_is_refused() -> None:
    async with House() as house:
        house.store.down = True
        with pytest.raises(StoreUnavailable):
            await house.teams[0].switch("p", enabled=False)
        house.store.down = False
        await house.pass_by()
        assert house.views == [[], []]
        await house.teams[0].switch("p", enabled=False)
        await house.pass_by()
        assert [views[-1].enabled for views in house.views] == [False, False]
        # Who has not heard of it yet does not undo it.
        late = Team(house.store, {"p": Place()}, CONFIG, house.clock)
        await late.reset("p")
        assert (await house.kept()).enabled is False


@pytest.mark.promise("D1", "F3")
async def test_calls_from_before_a_reset_judge_nothing() -> None:
    async with House() as house:
        house.saw(0, failed=True, times=2)
        await house.teams[1].reset("p")
        await house.pass_by()
        house.saw(0, failed=True, times=2)
        await house.pass_by()
        assert house.state(1) is CLOSED
        house.saw(0, failed=True, times=3, era=1)
        await house.pass_by()
        assert house.state(1) is OPEN


@pytest.mark.promise("D1", "F3")
async def test_an_unreadable_or_missing_record_starts_empty() -> None:
    async with House() as house:
        house.saw(0, failed=True, times=3)
        await house.pass_by()
        now = house.clock.now()
        version = (await house.store.provider_records(now)).records["p"].version
        await house.store.put_provider_record("p", version, b"\xff", now, tell=True)
        await house.pass_by()
        assert house.state(1) is CLOSED
        house.saw(0, failed=True, times=3)
        await house.pass_by()
        assert house.state(1) is OPEN
        house.store.data.records = HeldRecords()
        house.teams[1].look()
        await house.pass_by()
        assert house.state(1) is CLOSED


def test_a_record_says_the_same_after_a_journey() -> None:
    breaker = BreakerRecord(state=HALF_OPEN, reason="why", era=3, until=7, samples=((5, True, 1), (6, False, 2)))
    limit = Limit(LimitCause.QUOTA, since=1, struck_at=2, until=9, reason="spent", told=True)
    place = PlaceRecord(breaker, (limit,))
    record = ProviderRecord(enabled=False, places={"here": place})
    assert decode_record(encode_record(record)) == record
    assert place.shifted(10).shifted(-10) == place
    assert place.shifted(10).breaker.samples == ((15, True, 1), (16, False, 2))
    assert place.shifted(10).limits[0].until == 19
    assert record.place("there") == PlaceRecord()


def judged(record: PlaceRecord, *seen: Seen) -> PlaceRecord:
    """A record after these calls."""
    return learned(record, seen, CONFIG, 4)


@pytest.mark.promise("F3")
def test_late_calls_take_their_place_among_the_latest() -> None:
    record = judged(PlaceRecord(), *(Seen(at, 0) for at in (10, 20, 30, 40)))
    record = judged(record, Seen(25, 0, failed=True), Seen(5, 0, failed=True), Seen(15, 0))
    assert [sample[:2] for sample in record.breaker.samples] == [
        (10, False),
        (15, False),
        (20, False),
        (25, True),
        (30, False),
        (40, False),
    ]
    assert record.breaker.state is CLOSED


@pytest.mark.promise("F3")
def test_a_call_of_the_present_era_shows_that_the_breaker_is_half_open() -> None:
    opened = judged(PlaceRecord(), *(Seen(at, 0, failed=True, reason="it broke") for at in (1, 2, 3)))
    until = opened.breaker.until
    assert (opened.breaker.state, opened.breaker.era, until) == (OPEN, 1, 3 + microseconds(10.0))
    # By a clock that is a little behind.
    probed = judged(opened, Seen(until - 5, 1))
    assert (probed.breaker.state, probed.breaker.probes_passed) == (HALF_OPEN, 1)
    assert judged(probed, Seen(until + 1, 0, failed=True)) == probed
    again = judged(probed, Seen(until + 2, 1, failed=True)).breaker
    assert (again.state, again.era, again.reopens) == (OPEN, 2, 1)
    closed = judged(probed, Seen(until + 2, 1)).breaker
    assert (closed.state, closed.era) == (CLOSED, 1)
    assert msgspec.structs.replace(closed, samples=()) == closed
