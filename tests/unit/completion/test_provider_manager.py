"""Who is asked next: offers by route, breakers that are being tried, quotas, limits per minute, and what is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ksi.clock import Moment, microseconds
from ksi.completion.pool.kinds import build_providers
from ksi.completion.pool.routes import Router
from ksi.completion.pool.team import Place, Team
from ksi.completion.provider_manager import ProviderManager
from ksi.config.schema import BreakerConfig, Config, ModelConfig, ProviderConfig
from ksi.errors import ConfigError, FailureClass, NotFound, ProviderError
from ksi.events.bus import EventBus, News
from ksi.providers.base import Call, Capabilities, Chunk, Completion
from ksi.request import Attempt, Outcome, Priority, Usage
from ksi.store.provider_records import HeldRecords
from ksi.store.values import Claimed, Offer
from ksi.testing import SimulatedClock


class Idle:
    """A provider that is never asked in earnest."""

    capabilities = Capabilities()

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.trouble: str | None = None
        self._log = log

    async def start(self) -> None:
        self._log.append(f"{self.name} starts")

    async def stop(self) -> None:
        self._log.append(f"{self.name} stops")
        if self.trouble is not None:
            raise RuntimeError(self.trouble)

    def problem(self) -> str | None:
        return self.trouble

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        yield Completion(text="", model=call.model)


class Ear:
    """Hears what is published."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def push(self, line: bytes) -> None:
        self.lines.append(msgspec.json.decode(line)["data"])

    def news(self, news: News) -> None:
        self.push(news.line())

    def steps(self) -> list[tuple[str, str, str]]:
        """What came since it was asked last."""
        heard = [(line["provider"], line["before"], line["after"]) for line in self.lines]
        self.lines.clear()
        return heard


class House:
    """A manager with three providers of one model, on a clock by hand."""

    def __init__(self, models: Mapping[str, ModelConfig] | None = None, **keys: Any) -> None:
        self.clock = SimulatedClock()
        self.log: list[str] = []
        configs = {
            name: ProviderConfig(kind="stub", models=("m/*",), priority=number, max_concurrency=4, **keys)
            for number, name in enumerate(("a", "b", "c"))
        }
        breaker = BreakerConfig(failures=2, max_samples=4, open_for=10.0, probes_to_close=1)
        config = Config(home=Path("/nowhere"), providers=configs, models=models or {}, breaker=breaker)
        bus = EventBus(self.clock)
        self.ear = Ear()
        bus.subscribe(self.ear, ["provider:*"])
        self.providers = {name: Idle(name, self.log) for name in configs}
        places = {name: Place(slots=4) for name in configs}
        team = Team(HeldRecords(), places, breaker, self.clock, alone=True)
        self.manager = ProviderManager(config, self.providers, Router(configs, config.models), bus, self.clock, team)
        self.route = self.manager.route("m/x")
        self._fence = 0

    @property
    def now(self) -> Moment:
        return self.clock.now()

    def offers(self, route: str | None = None) -> list[tuple[str, int]]:
        """Who is offered for a route, and how many calls each may have."""
        wanted = self.route if route is None else route
        return [(offer.provider, offer.limit) for offer in self.manager.offers(self.now) if offer.route == wanted]

    def begin(self, provider: str, body: bytes = b"{}", model: str = "m/x", agent: str | None = None) -> Claimed:
        self._fence += 1
        claim = Claimed(
            key=self._fence,
            request_id=f"r{self._fence}",
            conversation=f"talk {self._fence}",
            agent_id=agent,
            body=body,
            route=self.route,
            provider=provider,
            priority=Priority.NORMAL,
            attempt=1,
            fence=self._fence,
            token=1,
            started_at=self.now.wall,
            enqueued_at=self.now.wall,
            head=None,
        )
        self.manager.began(claim, model)
        return claim

    def end(
        self,
        claim: Claimed,
        failure: FailureClass | None = None,
        retry_after: float | None = None,
        tokens: int = 0,
        model: str = "m/x",
    ) -> None:
        error = ProviderError(failure, "it failed", retry_after=retry_after) if failure is not None else None
        attempt = Attempt(
            number=1,
            provider=claim.provider,
            outcome=Outcome.COMPLETED if error is None else Outcome.FAILED,
            error=failure,
            asked=model,
            started_at=claim.started_at,
            finished_at=self.now.wall,
            usage=Usage(input_tokens=tokens) if tokens else None,
        )
        self.manager.ended(claim, attempt, error, self.now)

    def fail(self, provider: str, times: int = 2, failure: FailureClass = FailureClass.PROVIDER_ERROR) -> None:
        for _ in range(times):
            self.end(self.begin(provider), failure)


@pytest.mark.promise("F4", "Q6")
async def test_a_route_is_offered_with_the_first_provider_that_can_be_asked() -> None:
    house = House()
    assert house.route == "a,b,c"
    assert house.offers() == [("a", 4)]
    await house.manager.set_enabled("a", enabled=False)
    assert house.offers() == [("b", 4)]
    house.fail("b")
    assert house.offers() == [("c", 4)]
    house.end(house.begin("c"), FailureClass.RATE_LIMITED, 30.0)
    assert house.offers() == []
    await house.manager.set_enabled("a", enabled=True)
    assert house.offers() == [("a", 4)]


@pytest.mark.promise("F3", "Q6")
async def test_one_that_is_being_tried_is_offered_with_its_probes_before_the_next() -> None:
    house = House()
    house.fail("a")
    assert house.offers() == [("b", 4)]
    await house.clock.advance(10)
    assert house.offers() == [("a", 1), ("b", 4)]
    probe = house.begin("a")
    assert house.offers() == [("a", 1), ("b", 4)]
    house.end(probe)
    assert house.offers() == [("a", 4)]
    assert house.ear.steps() == [("a", "closed", "open"), ("a", "open", "half_open"), ("a", "half_open", "closed")]


@pytest.mark.promise("F4")
async def test_a_failed_provider_is_last_and_offered_only_when_no_other_is_left() -> None:
    house = House()
    rest = house.manager.others("a,b,c", "a", "m/x", house.now)
    assert rest == "b,c,~a"
    assert house.offers(rest) == [("b", 4)]
    for name in ("b", "c"):
        await house.manager.set_enabled(name, enabled=False)
    assert house.offers(rest) == [("a", 4)]
    assert house.manager.others(rest, "b", "m/x", house.now) is None
    await house.manager.set_enabled("c", enabled=True)
    assert house.manager.others(rest, "b", "m/x", house.now) == "c,~a,~b"
    assert house.manager.others("c,~a,~b", "c", "m/x", house.now) is None


@pytest.mark.promise("F4")
async def test_a_provider_that_answers_by_two_models_is_offered_once() -> None:
    house = House(models={"m/x": ModelConfig(fallbacks=("m/y",))})
    assert house.route == "a,b,c,a=m/y,b=m/y,c=m/y"
    for name in ("a", "b", "c"):
        house.fail(name)
    await house.clock.advance(10)
    assert house.offers() == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.promise("F5")
async def test_a_route_is_back_with_the_first_of_its_providers() -> None:
    house = House()
    later = microseconds(30)
    house.end(house.begin("a"), FailureClass.RATE_LIMITED, 30.0)
    assert house.manager.back("a", "m/x", house.now) == house.now.wall + later
    assert house.manager.back("a,b", "m/x", house.now) == house.now.wall
    house.fail("b")
    assert house.manager.back("a,b", "m/x", house.now) == house.now.wall + microseconds(10)
    await house.manager.set_enabled("b", enabled=False)
    assert house.manager.back("a,b", "m/x", house.now) == house.now.wall + later
    await house.manager.set_enabled("a", enabled=False)
    assert house.manager.back("a,b", "m/x", house.now) is None
    assert house.manager.back("stranger", "m/x", house.now) is None


@pytest.mark.promise("F5")
async def test_a_quota_is_reported_once_however_many_calls_meet_it_and_its_return_too() -> None:
    house = House()
    claims = [house.begin("a") for _ in range(3)]
    for number, claim in enumerate(claims):
        house.end(claim, FailureClass.RATE_LIMITED, 30.0 + number)
    assert house.ear.steps() == [("a", "closed", "parked")]
    assert house.manager.next_change(house.now) == microseconds(32)
    assert any("quota is spent" in problem for problem in house.manager.problems())
    await house.clock.advance(32)
    assert house.offers() == [("a", 1), ("b", 4)], "one call finds out whether it is back"
    probe = house.begin("a")
    await house.clock.advance(1)
    house.end(probe)
    assert house.offers() == [("a", 4)]
    assert house.ear.steps() == [("a", "parked", "closed")]
    assert house.manager.problems() == []


def limited(house: House, model: str) -> bool:
    """Whether a request for a model must not be sent to the first provider now."""
    return house.manager.away("a", model, house.now) is not None


@pytest.mark.promise("F5")
@pytest.mark.parametrize("failure", [FailureClass.RATE_LIMITED, FailureClass.OVERLOADED])
async def test_a_limit_that_names_nothing_holds_for_one_model_if_others_were_answered(failure: FailureClass) -> None:
    house = House()
    house.end(house.begin("a", model="m/small"), model="m/small")
    house.end(house.begin("a", model="m/large"), failure, model="m/large")
    assert house.offers() == [("a", 4)], "the provider goes on"
    assert (limited(house, "m/large"), limited(house, "m/small")) == (True, False)
    house.end(house.begin("a", model="m/small"), failure, model="m/small")
    assert house.offers() == [("b", 4)], "no other model was answered lately: the provider is away"


@pytest.mark.promise("F5")
async def test_a_limit_that_names_nothing_holds_for_the_provider_if_nothing_else_is_asked_of_it() -> None:
    house = House()
    house.end(house.begin("a"), FailureClass.OVERLOADED)
    assert house.offers() == [("b", 4)]
    assert not limited(house, "m/other"), "the provider itself is away"


@pytest.mark.promise("F4", "F5")
async def test_a_limit_that_names_nothing_leaves_a_fallback_at_the_same_provider() -> None:
    house = House(models={"m/x": ModelConfig(fallbacks=("m/y",))})
    claim = msgspec.structs.replace(house.begin("a"), route="a,a=m/y")
    house.end(claim, FailureClass.OVERLOADED)
    assert house.manager.others("a,a=m/y", "a", "m/x", house.now) == "a=m/y,~a"


@pytest.mark.promise("F12")
async def test_a_model_that_is_gone_is_left_out_of_routes_if_another_provider_may_have_it() -> None:
    house = House()
    house.end(house.begin("a"), FailureClass.MODEL_NOT_FOUND)
    assert house.manager.route("m/x") == "b,c"
    assert house.manager.route("m/other") == "a,b,c", "the provider keeps its name for other models"
    for name in ("b", "c"):
        house.end(house.begin(name), FailureClass.MODEL_NOT_FOUND)
    assert house.manager.route("m/x") == "a,b,c", "nobody has it: it is asked for where it was"


@pytest.mark.promise("F3", "F5")
async def test_a_reset_is_reported_for_each_thing_that_it_ends() -> None:
    house = House()
    house.fail("a")
    house.end(house.begin("a"), FailureClass.RATE_LIMITED, 30.0)
    house.ear.steps()
    report = await house.manager.reset("a")
    assert (report.breaker, report.open_until, report.parked_until) == ("closed", None, None)
    assert house.ear.steps() == [("a", "open", "closed"), ("a", "parked", "closed")]
    assert house.offers() == [("a", 4)]
    await house.manager.reset("a")
    assert house.ear.steps() == []
    with pytest.raises(NotFound, match="there are: a, b, c"):
        await house.manager.reset("nobody")


@pytest.mark.promise("F5")
async def test_requests_per_minute_leave_running_calls_and_admit_their_number_more() -> None:
    house = House(requests_per_minute=3)
    running = [house.begin("a") for _ in range(2)]
    assert house.offers() == [("a", 3)], "two run, one more may go"
    third = house.begin("a")
    assert house.offers() == [("a", 3)]
    for claim in (*running, third):
        house.end(claim)
    assert house.offers() == [("a", 0)]
    assert house.manager.next_change(house.now) == pytest.approx(microseconds(20), abs=2)
    await house.clock.advance(20.001)
    assert house.offers() == [("a", 1)]


@pytest.mark.promise("F5")
async def test_tokens_are_guessed_before_and_put_right_after() -> None:
    house = House(tokens_per_minute=1_000)
    claim = house.begin("a", body=b"x" * 7_000)
    assert house.offers() == [("a", 1)], "the guess of 2,000 leaves room for nobody else"
    house.end(claim, tokens=400)
    assert house.offers() == [("a", 4)]
    house.end(house.begin("a"), tokens=1_100)
    assert house.offers() == [("a", 0)]
    await house.clock.advance(31)
    assert house.offers() == [("a", 4)]


@pytest.mark.promise("F3")
def test_a_fault_of_the_request_and_a_stop_say_nothing_of_the_provider() -> None:
    house = House()
    for failure in (FailureClass.INVALID_REQUEST, FailureClass.CONTEXT_TOO_LONG, FailureClass.REFUSED):
        house.fail("a", 10, failure)
    assert house.offers() == [("a", 4)]
    house.fail("a", 2, FailureClass.AUTHENTICATION)
    assert house.offers() == [("b", 4)]


async def test_all_are_stopped_whatever_one_of_them_does() -> None:
    house = House()
    house.providers["a"].trouble = "no key"
    await house.manager.start()
    await house.manager.stop()
    assert house.log == [f"{name} {word}" for word in ("starts", "stops") for name in "abc"]
    assert house.manager.problems() == ["provider a: no key"]


async def test_an_unknown_provider_is_reported_and_one_that_the_configuration_switched_off_too() -> None:
    house = House()
    with pytest.raises(NotFound, match="there are: a, b, c"):
        await house.manager.reset("nobody")
    configs = {
        "here": ProviderConfig(kind="stub", models=("m/*",)),
        "away": ProviderConfig(kind="stub", models=("m/*",), enabled=False),
    }
    config = Config(home=Path("/nowhere"), providers=configs)
    enabled = {"here": configs["here"]}
    here = {"here": Idle("here", [])}
    team = Team(HeldRecords(), {"here": Place()}, config.breaker, house.clock)
    manager = ProviderManager(config, here, Router(enabled, {}), EventBus(house.clock), house.clock, team)
    for ask in (manager.reset, lambda name: manager.set_enabled(name, True)):
        with pytest.raises(NotFound, match="enabled = false"):
            await ask("away")
        with pytest.raises(NotFound, match="did you mean 'here'"):
            await ask("hera")


@pytest.mark.promise("Q6")
def test_routes_of_the_store_are_offered_and_unserved_ones_are_reported() -> None:
    house = House()
    house.manager.know(["b", "gone", "gone,c"])
    offers = house.manager.offers(house.now)
    assert Offer("b", "b", 4) in offers
    assert Offer("gone,c", "c", 4) in offers
    assert house.manager.orphans({"gone": 3, "gone,c": 1}) == ["gone"]
    assert house.manager.orphans({"gone": 0}) == []
    assert sorted(house.manager.routes_of("c")) == ["a,b,c", "gone,c"]


@pytest.mark.parametrize("kind", ["nonsense", "base", "../evil", ""])
def test_an_unknown_kind_of_provider_stops_the_start(kind: str, tmp_path: Path) -> None:
    config = Config(home=tmp_path, providers={"x": ProviderConfig(kind=kind, models=("x/*",))})
    with pytest.raises(ConfigError, match="no provider kind"):
        build_providers(config, {}, SimulatedClock())
