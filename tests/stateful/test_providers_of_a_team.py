"""Several managers over one store, on a clock by hand: whatever they have heard of each other, too many never probe."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ksi.clock import Chance, Moment, microseconds
from ksi.completion.pool.breaker import BreakerState, ProviderBreaker
from ksi.completion.pool.limits import Hit, LimitCause, Limits, answered, struck
from ksi.completion.pool.member import caller_of
from ksi.completion.pool.record import PlaceRecord, decode_record
from ksi.completion.pool.routes import Router
from ksi.completion.pool.team import Place, Team
from ksi.completion.provider_manager import ProviderManager
from ksi.config.schema import BreakerConfig, Config, ProviderConfig
from ksi.errors import FailureClass, ProviderError
from ksi.events.bus import EventBus
from ksi.request import Attempt, Outcome, Priority, State
from ksi.store.values import Claimed, Finish, NewRequest, StoreRules
from tests.effort import effort
from tests.reference_store.store import MemoryStore
from tests.unit.completion.parts import Player

SLOTS = 6
TEAM = 3


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = Moment(microseconds(1_800_000_000), microseconds(5_000))

    def now(self) -> Moment:
        return self.moment

    def unix(self) -> float:
        return self.moment.unix

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody waits here")


class Member:
    """One daemon's manager and its part in the team."""

    def __init__(self, store: MemoryStore, config: Config, clock: Clock) -> None:
        providers = {"p": Player("p")}
        self.team = Team(store, {"p": Place(slots=SLOTS)}, config.breaker, clock)
        router = Router(config.providers, config.models)
        bus = EventBus(clock)
        self.manager = ProviderManager(config, providers, router, bus, clock, self.team, shared=True)
        self.route = self.manager.route("m/x")

    @property
    def report(self) -> dict[str, Any]:
        """What it says of the provider."""
        shown: dict[str, Any] = msgspec.to_builtins(self.manager.report()["p"])
        return shown

    @property
    def view(self) -> tuple[Any, ...]:
        """What it goes by."""
        return tuple(self.report[name] for name in ("breaker", "open_until", "parked_until", "enabled"))


class Running:
    """A call that is under way."""

    def __init__(self, member: Member, claim: Claimed) -> None:
        self.member = member
        self.claim = claim
        self.view = member.report["breaker"]
        member.manager.began(claim, "m/x")
        self.era = member.manager._members["p"].calls[claim.fence].era


class Machine(RuleBasedStateMachine):
    """Managers claim, calls end, and words between them come when they come."""

    at_once = False
    """Whether every word is heard before anything else happens."""

    @initialize(
        breaker=st.builds(
            BreakerConfig,
            failures=st.integers(1, 3),
            rate=st.sampled_from([0.2, 0.5, 1.0]),
            window=st.sampled_from([5.0, 60.0]),
            max_samples=st.integers(3, 6),
            open_for=st.just(1.0),
            probes=st.integers(1, 3),
            probes_to_close=st.integers(1, 3),
        ),
        per_minute=st.sampled_from([None, None, 5]),
        opened=st.booleans(),
    )
    def begin(self, breaker: BreakerConfig, per_minute: int | None, opened: bool) -> None:
        provider = ProviderConfig(kind="player", models=("m/*",), max_concurrency=SLOTS, requests_per_minute=per_minute)
        self.config = Config(home=Path("/nowhere"), providers={"p": provider}, breaker=breaker)
        self.per_minute = per_minute
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.store = MemoryStore(StoreRules(), Chance(random.Random(1)))
        self.members = [Member(self.store, self.config, self.clock) for _ in range(TEAM)]
        self.running: list[Running] = []
        self.begun: list[int] = []
        """When calls began."""
        self.plain = ProviderBreaker(breaker)
        """One breaker that sees it all."""
        self.plain_limits: Limits = ()
        self.plain_eras: dict[int, int] = {}
        self.number = 0
        self.runner.run(self.store.open(self.clock.now(), lambda: None))
        if opened:
            self.call(0, 3)
            for _ in range(3):
                self.end(0, "bad")
            self.spread()
            self.wait(1.0)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()

    def spread(self) -> None:
        """All is written, and all is heard."""
        for member in self.members:
            self.runner.run(member.team.write())
        for member in self.members:
            self.runner.run(member.team.refresh())
            # What was said before somebody became wary is told then.
            self.runner.run(member.team.write())
        for member in self.members:
            self.runner.run(member.team.refresh())

    def settled(self) -> None:
        """Every word is heard, even what nobody would tell of a provider that is well."""
        if not self.at_once:
            return
        for member in self.members:
            for kept in member.team._providers.values():
                self.runner.run(member.team._learn(kept))
        for member in self.members:
            self.runner.run(member.team.refresh())

    @rule(which=st.integers(0, TEAM - 1), count=st.integers(1, 4))
    def call(self, which: int, count: int) -> None:
        """A daemon gets requests and starts what it may."""
        member = self.members[which]
        for _ in range(count):
            self.number += 1
            new = NewRequest(
                request_id=f"r{self.number}",
                conversation=f"c{self.number}",
                body=b"{}",
                route=member.route,
                rank=self.number,
                priority=Priority.NORMAL,
            )
            self.runner.run(self.store.enqueue(new, (), self.clock.now()))
        now = self.clock.now()
        offers = member.manager.offers(now)
        view = member.view
        claims = self.runner.run(self.store.claim(offers, 100, now))
        if claims.started:
            assert view[0] != "open", "a call to a provider that is left alone"
            assert view[2] is None, "a call to one whose quota is spent"
            assert view[3], "a call to one that is disabled"
            if view[0] == "half_open":
                known = self.known()
                breaker = known.breaker
                assert breaker.state is not BreakerState.OPEN or breaker.until <= now.wall, (
                    "a probe after another failed"
                )
                assert not any(limit.active(now.wall) for limit in known.limits), "a probe although the quota is spent"
        for claim in claims.started:
            self.running.append(Running(member, claim))
            self.begun.append(now.mono)
            self.plain_eras[claim.fence] = self.plain.began()

    def known(self) -> PlaceRecord:
        """What is written of the provider."""
        found = self.runner.run(self.store.provider_records(self.clock.now())).records.get("p")
        return PlaceRecord() if found is None else decode_record(found.value).place("")

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1))
    def succeed(self, which: int) -> None:
        """A call brings an answer."""
        self.end(which, "good")

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1), written=st.booleans())
    def fail(self, which: int, written: bool) -> None:
        """A call fails by the provider's fault."""
        team = self.end(which, "bad").member.team
        if written:
            self.runner.run(team.write())

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1), outcome=st.sampled_from(["stopped", "quota"]))
    def say_nothing(self, which: int, outcome: str) -> None:
        """A call ends otherwise."""
        self.end(which, outcome)

    def end(self, which: int, outcome: str) -> Running:
        run = self.running.pop(which % len(self.running))
        # No two calls end in the same microsecond: which of them is the later one nobody could say.
        self.clock.moment = now = self.clock.moment.after_us(1)
        error = None
        state = State.COMPLETED if outcome == "good" else State.FAILED
        if outcome == "bad":
            error = ProviderError(FailureClass.PROVIDER_ERROR, "it broke")
        elif outcome == "quota":
            error = ProviderError(FailureClass.RATE_LIMITED, "spent", retry_after=3.0)
        outcomes = {"good": Outcome.COMPLETED, "stopped": Outcome.CANCELLED, "quota": Outcome.PARKED}
        attempt = Attempt(
            number=1,
            provider="p",
            outcome=outcomes.get(outcome, Outcome.FAILED),
            started_at=run.claim.started_at,
            finished_at=now.wall,
        )
        run.member.manager.ended(run.claim, attempt, error, now)
        self.runner.run(self.store.settle(run.claim, attempt, Finish(state=state), now))
        self.mirror(run, outcome, now)
        self.settled()
        return run

    def mirror(self, run: Running, outcome: str, now: Moment) -> None:
        """The same for the one breaker that sees it all."""
        era, began = self.plain_eras.pop(run.claim.fence), run.claim.started_at
        caller = caller_of(run.claim)
        if outcome == "good":
            self.plain.succeeded(now.wall, era, caller)
            self.plain_limits = answered(self.plain_limits, "x", began, now.wall, SLOTS)
        elif outcome == "bad":
            self.plain.failed(now.wall, era, "it broke", caller)
        else:
            self.plain.dropped(era)
        if outcome == "quota":
            hit = Hit(LimitCause.QUOTA, "spent", until=now.after(3.0).wall)
            self.plain_limits = struck(self.plain_limits, hit, began, now.wall, self.config.breaker)

    @rule(which=st.integers(0, TEAM - 1), word=st.sampled_from(["write", "hear"]))
    def speak(self, which: int, word: str) -> None:
        """A daemon writes what its calls said, or looks at what the others wrote."""
        team = self.members[which].team
        self.runner.run(team.write() if word == "write" else team.refresh())

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.clock.moment = self.clock.moment.after(seconds)
        self.plain.tick(self.clock.moment.wall)
        for member in self.members:
            member.manager._tick(self.clock.now())

    @rule(which=st.integers(0, TEAM - 1), word=st.sampled_from(["reset", "disable", *["enable"] * 5]))
    def operate(self, which: int, word: str) -> None:
        """An operator says something at one daemon."""
        manager = self.members[which].manager
        if word == "reset":
            self.runner.run(manager.reset("p"))
            self.plain.reset()
            self.plain_limits = ()
        else:
            self.runner.run(manager.set_enabled("p", word == "enable"))
        self.settled()

    @rule()
    def agree(self) -> None:
        """When all is heard, all go by the same."""
        self.spread()
        assert len({member.view for member in self.members}) == 1

    @invariant()
    def not_too_many_probe(self) -> None:
        if not hasattr(self, "running"):
            return
        probing: dict[int, int] = {}
        for run in self.running:
            if run.view == "half_open":
                probing[run.era] = probing.get(run.era, 0) + 1
        assert sum(probing.values()) <= self.config.breaker.probes, "more probes than are allowed"
        assert len(self.running) <= SLOTS

    @invariant()
    def not_too_many_begin_in_a_minute(self) -> None:
        if not hasattr(self, "running") or self.per_minute is None:
            return
        minute = self.clock.now().mono - microseconds(60)
        assert sum(at > minute for at in self.begun) <= 2 * self.per_minute


class AtOnce(Machine):
    """As long as every word is heard at once, the team is as one breaker that sees every call."""

    at_once = True

    @invariant()
    def it_is_one_breaker(self) -> None:
        if not hasattr(self, "members"):
            return
        for member in self.members:
            breaker = member.manager._members["p"].breaker
            assert breaker.state is self.plain.state
            assert breaker.open_until == self.plain.open_until
            known = member.manager._members["p"].limits
            assert [(one.until, one.strikes) for one in known] == [
                (one.until, one.strikes) for one in self.plain_limits
            ]


TestMachine = pytest.mark.promise("D1", "F3", "F5")(
    type(
        "TestMachine",
        (Machine.TestCase,),
        {"settings": settings(max_examples=effort(80, 800), stateful_step_count=50, deadline=None)},
    )
)
TestAtOnce = pytest.mark.promise("D1", "F3", "F5")(
    type(
        "TestAtOnce",
        (AtOnce.TestCase,),
        {"settings": settings(max_examples=effort(80, 800), stateful_step_count=50, deadline=None)},
    )
)
