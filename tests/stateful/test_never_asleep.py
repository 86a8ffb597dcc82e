"""Whenever something could run, something runs: providers, limits, breakers and operators in simulated time.

The clock wakes sleepers a moment early, as a real one may. Several daemons share one store in the second machine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ksi.clock import Moment
from ksi.completion.retry_manager import LONGEST_PARK
from ksi.completion.wakeup import TICK
from ksi.config.schema import BreakerConfig, Retry
from ksi.errors import FailureClass, ProviderError
from ksi.events.pauses import PauseData, ResumeData
from ksi.providers.base import Call, Chunk, Completion
from ksi.request import State
from ksi.store.provider_records import PutRecord
from ksi.store.values import Listing, Offer, StoreRules
from ksi.testing import SimulatedClock, settle_down
from tests.effort import effort
from tests.unit.completion.parts import FaultyStore, Parts, Player, whole

T = TypeVar("T")

BREAKER = BreakerConfig(
    failures=2, rate=0.5, max_samples=4, open_for=1.0, max_open_for=4.0, probes=1, probes_to_close=1
)
RETRY = Retry(max_attempts=3, initial_delay=0.5, max_delay=2.0)
PER_MINUTE = 30
LONGEST = LONGEST_PARK + 10.0
"""Seconds: more than any limit, breaker or backoff here can last."""

WEATHER = {
    "good": None,
    "throttled": lambda: ProviderError(FailureClass.RATE_LIMITED, "slow down"),
    "back in a moment": lambda: ProviderError(FailureClass.RATE_LIMITED, "slow down", retry_after=0.001),
    "back in 3 s": lambda: ProviderError(FailureClass.RATE_LIMITED, "spent", retry_after=3.0),
    "model limited": lambda: ProviderError(FailureClass.RATE_LIMITED, "spent", retry_after=2.0, limited_models="e*"),
    "unreachable": lambda: ProviderError(FailureClass.NETWORK_ERROR, "no connection", unserved=True),
    "broken": lambda: ProviderError(FailureClass.PROVIDER_ERROR, "HTTP 500"),
    "without the model": lambda: ProviderError(FailureClass.MODEL_NOT_FOUND, "no such model"),
}
ENDS = {State.COMPLETED, State.FAILED}


class EarlyClock(SimulatedClock):
    """Wakes sleepers up to a millisecond before their time."""

    def __init__(self) -> None:
        super().__init__(wall=1_800_000_000.0)
        self._dice = random.Random(7)

    async def sleep(self, seconds: float) -> None:
        early = self._dice.choice((0.0, 0.000001, 0.0009))
        await super().sleep(seconds - early if seconds > 2 * early else seconds)


class Weathered(Player):
    """A provider that does to each call as its weather is; one call takes some time."""

    def __init__(self, name: str, clock: SimulatedClock) -> None:
        super().__init__(name)
        self.weather = "good"
        self._clock = clock

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        await self._clock.sleep(0.05)
        failure = WEATHER[self.weather]
        if failure is not None:
            raise failure()
        yield whole(model=call.model)


class SharedStore(FaultyStore):
    """A store of several daemons: it tells all of them of work and of records that changed."""

    def __init__(self) -> None:
        super().__init__(StoreRules())
        self.daemons: list[Parts] = []

    def tell(self) -> None:
        for daemon in self.daemons:
            daemon.queue.on_work()

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        put = await super().put_provider_record(name, version, value, now, tell=tell)
        if put.written and tell:
            for daemon in self.daemons:
                daemon.team.look()
        return put


class Machine(RuleBasedStateMachine):
    """Requests come, the weather changes, operators speak, and time passes."""

    DAEMONS = 1

    @initialize(per_minute=st.sampled_from([None, PER_MINUTE]))
    def begin(self, per_minute: int | None) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        self.runner = asyncio.Runner()
        self.per_minute = per_minute
        self.submitted: list[str] = []
        self.run(self._begin(per_minute))

    async def _begin(self, per_minute: int | None) -> None:
        self.clock = EarlyClock()
        self.store = SharedStore()
        weather = [Weathered(name, self.clock) for name in ("a", "b")]
        self.players = {player.name: player for player in weather}
        self.parts = [
            Parts(
                *weather,
                store=self.store,
                clock=self.clock,
                shared=self.DAEMONS > 1,
                per_minute=per_minute,
                breaker=BREAKER,
                retry=RETRY,
            )
            for _ in range(self.DAEMONS)
        ]
        self.store.daemons = self.parts
        recovery = await self.store.open(self.clock.now(), self.store.tell)
        for daemon in self.parts:
            await daemon.team.start()
            if self.DAEMONS > 1:
                daemon.team.on_change = daemon.queue.on_work
            await daemon.queue.start(recovery)
        await settle_down()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.run(self._all_ends())
            self.run(self._stop())
        finally:
            self.runner.close()
            structlog.reset_defaults()

    async def _stop(self) -> None:
        for daemon in self.parts:
            await daemon.queue.stop(0)
            await daemon.providers.stop()

    async def _all_ends(self) -> None:
        """In good weather everything that waits comes to its end in a bounded time."""
        await self._resume(self.parts[0])
        for player in self.players.values():
            player.weather = "good"
            await self.parts[0].providers.set_enabled(player.name, True)
        span = LONGEST + (len(self.submitted) * 60 / PER_MINUTE if self.per_minute else len(self.submitted) * 0.1)
        for _ in range(int(span / 0.5)):
            await self.clock.advance(0.5)
            if not await self._waiting():
                return
        left = {name: (await self.parts[0].view(name)).state for name in await self._waiting()}
        raise AssertionError(f"asleep: {left}, {self.parts[0].providers.report()}")

    async def _waiting(self) -> list[str]:
        return [name for name in self.submitted if (await self.parts[0].view(name)).state not in ENDS]

    @rule(count=st.integers(1, 6), conversation=st.sampled_from([None, "talk"]), which=st.integers(0, 2))
    def submit(self, count: int, conversation: str | None, which: int) -> None:
        """Requests come in at one of the daemons."""
        daemon = self.parts[which % self.DAEMONS]

        async def enqueue() -> None:
            for _ in range(count):
                daemon.count = len(self.submitted)
                enqueued = await daemon.enqueue(conversation=conversation)
                self.submitted.append(enqueued.request_id)
            await settle_down()

        self.run(enqueue())

    @rule(name=st.sampled_from(["a", "b"]), weather=st.sampled_from(sorted(WEATHER)))
    def change(self, name: str, weather: str) -> None:
        """A provider's weather changes."""
        self.players[name].weather = weather

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3, 1.0, 2.5, 7.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.run(self.clock.advance(seconds))

    @rule(name=st.sampled_from(["a", "b"]), word=st.sampled_from(["disable", "enable", "reset"]))
    def operate(self, name: str, word: str) -> None:
        """An operator speaks to the first daemon."""
        providers = self.parts[0].providers

        async def speak() -> None:
            if word == "reset":
                await providers.reset(name)
            else:
                await providers.set_enabled(name, word == "enable")
            self.parts[0].queue.on_work()
            await settle_down()

        self.run(speak())

    @rule(
        thing=st.sampled_from([{}, {"provider": "a"}, {"session_id": "talk"}, {"priority": "normal"}]),
        seconds=st.sampled_from([None, 0.2, 5.0]),
        which=st.integers(0, 2),
    )
    def pause(self, thing: dict[str, Any], seconds: float | None, which: int) -> None:
        """An operator holds something back."""
        self.run(self.parts[which % self.DAEMONS].pauses.pause(PauseData(**thing, seconds=seconds)))

    @rule(which=st.integers(0, 2))
    def resume(self, which: int) -> None:
        """An operator lets everything go on, at any of the daemons."""
        self.run(self._resume(self.parts[which % self.DAEMONS]))

    async def _resume(self, daemon: Parts) -> None:
        for thing in ({}, {"provider": "a"}, {"session_id": "talk"}, {"priority": "normal"}):
            await daemon.pauses.resume(ResumeData(**thing))  # type: ignore[arg-type]
        await settle_down()

    @invariant()
    def nobody_sleeps_while_something_could_run(self) -> None:
        if hasattr(self, "parts"):
            self.run(self._nobody_sleeps())

    async def _nobody_sleeps(self) -> None:
        before = await self._asleep()
        calls = {name: len(player.calls) for name, player in self.players.items()}
        # By then everyone has read the clock again.
        await self.clock.advance(2 * TICK)
        still = {one for one in before & await self._asleep() if len(self.players[one[1]].calls) == calls[one[1]]}
        assert not still, f"these wait although there is room, and nothing happens: {sorted(still)}"

    async def _asleep(self) -> set[tuple[str, str]]:
        """What is ready, with each provider that has room for it."""
        now = self.clock.now()
        rows = (await self.store.requests(Listing.READY, 100)).items
        ready = [await self.parts[0].view(row.request_id) for row in rows]
        offers = [(daemon, offer) for daemon in self.parts for offer in daemon.providers.offers(now)]
        return {
            (view.request_id, offer.provider)
            for view in ready
            for daemon, offer in offers
            if offer.route == view.route and self._free(daemon, offer)
            if daemon.providers.why_paused(view.agent_id, view.conversation, view.priority) is None
        }

    def _free(self, daemon: Parts, offer: Offer) -> bool:
        running = sum(run.claim.provider == offer.provider for one in self.parts for run in one.queue.runs.values())
        if daemon.providers._members[offer.provider].waits_until > self.clock.now().mono:
            return False
        limit = offer.limit
        if offer.terms is not None and offer.terms.probes is not None:
            limit = min(limit, offer.terms.probes)
        return running < limit


class Team(Machine):
    """The same with three daemons on one store."""

    DAEMONS = 3


TestAlone = pytest.mark.promise("F3", "F5", "Q6")(
    type(
        "TestAlone",
        (Machine.TestCase,),
        {"settings": settings(max_examples=effort(40, 400), stateful_step_count=30, deadline=None)},
    )
)
TestTeam = pytest.mark.promise("D1", "F3", "F5", "Q6")(
    type(
        "TestTeam",
        (Team.TestCase,),
        {"settings": settings(max_examples=effort(25, 250), stateful_step_count=30, deadline=None)},
    )
)
