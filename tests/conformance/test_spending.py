"""Budgets in every store: reserved before a call, settled after it, and requests without room wait."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from ksi.budgets.rules import NANO, NOTHING, Amount, Ask, Cap, Caps, Demand, Spent, Unit
from ksi.clock import MICROSECONDS, microseconds
from ksi.errors import BudgetExceeded
from ksi.request import Outcome, State, Usage
from ksi.store.redis.store import RedisStore
from ksi.store.values import CLAIM_ASIDE, Claimed, Claims, Finish, Paused, Retry, Settled
from tests.conformance.world import OFFER, START, World

DAY = 86_400 * MICROSECONDS
TODAY = START // DAY * DAY
CALLS = Spent(tokens=15, nanos=150)


def cap(name: str = "day", unit: Unit = Unit.TOKENS, limit: int = 100, kind: Any = "all", **fields: Any) -> Cap:
    """A budget of this day."""
    defaults: dict[str, Any] = {"named": "" if kind == "all" else "*", "start": TODAY, "end": TODAY + DAY}
    return Cap(name=name, unit=unit, limit=limit, kind=kind, **(defaults | fields))


def demand(input_tokens: int = 10, output: int = 20, **fields: Any) -> Demand:
    """The caps of a request at the one provider; by default it names its `max_tokens`, and a token costs 10."""
    defaults: dict[str, Any] = {
        "provider": "stub",
        "model": "stub/echo",
        "input": input_tokens,
        "output": output,
        "fixed": True,
        "input_rate": 10.0,
        "output_rate": 10.0,
        "call": 0,
    }
    return (Ask(**(defaults | fields)),)


async def come(world: World, name: str, caps: Caps, **fields: Any) -> Any:
    """A request of a conversation of its own that waits for a claim."""
    fields.setdefault("demand", demand())
    new = world.new(name, fields.pop("conversation", f"talk-{name}"), **fields)
    return await world.store.enqueue(new, fields.pop("offers", ()), world.clock.now(), caps=caps)


async def run(world: World, name: str, caps: Caps, **fields: Any) -> Any:
    """A request that may run at once."""
    fields.setdefault("demand", demand())
    new = world.new(name, f"talk-{name}", **fields)
    return await world.store.enqueue(new, [OFFER], world.clock.now(), caps=caps)


async def claim(world: World, caps: Caps, limit: int = 100) -> Claims:
    return await world.store.claim((OFFER,), limit, world.clock.now(), caps=caps)


async def ids(world: World, caps: Caps) -> list[str]:
    return [one.request_id for one in (await claim(world, caps)).started]


async def end(world: World, run: Claimed, caps: Caps, spent: Spent | None = CALLS, **attempt: Any) -> Settled:
    """A run completed, or failed if it used nothing."""
    outcome = Outcome.FAILED if spent is None else Outcome.COMPLETED
    verdict = Finish(state=State.FAILED if spent is None else State.COMPLETED)
    kept = world.attempt(run, outcome, **attempt)
    return await world.store.settle(run, kept, verdict, world.clock.now(), None, spent, caps)


async def figures(world: World, name: str = "day", subject: str = "all", start: int = TODAY) -> tuple[Amount, Amount]:
    """The usage and the reservations."""
    found = [use for use in await world.store.budget_uses(name, start) if (use.subject, use.start) == (subject, start)]
    return (found[0].use.used, found[0].use.held) if found else (NOTHING, NOTHING)


@pytest.mark.promise("B1")
async def test_a_call_reserves_its_estimate_and_counts_its_usage(world: World) -> None:
    caps = (cap(),)
    entered = await run(world, "one", caps)
    assert await figures(world) == (NOTHING, Amount(1, 30, 300))
    await end(world, entered.claim, caps)
    assert await figures(world) == (Amount(1, 15, 150), NOTHING)


@pytest.mark.promise("B1")
async def test_a_claimed_call_sets_the_same_aside_and_a_failure_without_usage_gives_it_back(world: World) -> None:
    caps = (cap(),)
    await come(world, "one", caps)
    (started,) = (await claim(world, caps)).started
    assert await figures(world) == (NOTHING, Amount(1, 30, 300))
    await end(world, started, caps, spent=None)
    assert await figures(world) == (NOTHING, NOTHING)


@pytest.mark.promise("B1")
async def test_unknown_usage_counts_by_estimate(world: World) -> None:
    caps = (cap(),)
    entered = await run(world, "one", caps)
    await end(world, entered.claim, caps, spent=Spent(output=7))
    assert await figures(world) == (Amount(1, 17, 170), NOTHING)


@pytest.mark.promise("B1")
async def test_concurrent_calls_never_have_more_reserved_than_the_limit(world: World) -> None:
    caps = (cap(limit=100),)
    for number in range(10):
        await come(world, f"r{number}", caps)
    first = (await claim(world, caps)).started
    assert [one.request_id for one in first] == ["r0", "r1", "r2"]
    assert (await figures(world))[1].tokens == 90
    assert await ids(world, caps) == []
    # 30 were set aside, 15 were used: 15 + 60 + 30 does not fit, the next end makes room.
    await end(world, first[0], caps)
    assert await ids(world, caps) == []
    await end(world, first[1], caps)
    assert await ids(world, caps) == ["r3"]


@pytest.mark.promise("B1")
async def test_a_waiting_request_keeps_its_place_until_the_window_ends(world: World) -> None:
    caps = (cap(limit=30),)
    entered = await run(world, "one", caps)
    await end(world, entered.claim, caps)
    for name in ("two", "three"):
        await come(world, name, caps)
    assert await ids(world, caps) == []
    (waiting,) = await world.store.budget_waits()
    assert (waiting.budget, waiting.requests, waiting.until) == ("day\nall", 2, TODAY + DAY)
    assert (await world.view("two")).budget == "day\nall"
    assert (await world.expire()).next_wall == TODAY + DAY
    await come(world, "four", caps)
    world.clock.forward((TODAY + DAY - world.clock.wall) / MICROSECONDS)
    assert (await world.expire()).woken == 2
    tomorrow = (cap(limit=30, start=TODAY + DAY, end=TODAY + 2 * DAY),)
    assert await ids(world, tomorrow) == ["two"]
    assert (await world.view("three")).budget == "day\nall"


@pytest.mark.promise("B1")
async def test_a_request_that_waits_for_a_budget_expires_and_can_be_cancelled(world: World) -> None:
    caps = (cap(limit=10),)
    one = cap(limit=35)
    await end(world, (await run(world, "first", (one,))).claim, (one,))
    await come(world, "late", (one,), expires=world.clock.wall + microseconds(5))
    await come(world, "stopped", (one,))
    await come(world, "stays", (one,))
    assert await ids(world, (one,)) == []
    assert caps
    await world.cancel("stopped")
    world.clock.forward(6)
    assert [ended.request_id for ended in (await world.expire()).ended] == ["late"]
    (waiting,) = await world.store.budget_waits()
    assert waiting.requests == 1
    assert await world.state("stays") is State.QUEUED


@pytest.mark.promise("B1")
async def test_a_budget_that_is_raised_lets_those_go_on_that_wait_for_it(world: World) -> None:
    caps = (cap(limit=30),)
    await end(world, (await run(world, "one", caps)).claim, caps)
    await come(world, "two", caps)
    await come(world, "three", caps)
    assert await ids(world, caps) == []
    assert not await world.store.reconsider("other", world.clock.now())
    raised = (cap(limit=60),)
    assert await ids(world, raised) == []
    assert await world.store.reconsider("day", world.clock.now(), 1)
    assert await ids(world, raised) == ["two"]
    while await world.store.reconsider(None, world.clock.now(), 1):
        pass
    assert await ids(world, (cap(limit=600),)) == ["three"]


@pytest.mark.promise("B1")
async def test_a_request_with_room_passes_waiting_ones(world: World) -> None:
    caps = (cap("agents", kind="agent", limit=40),)
    for number in range(8):
        await come(world, f"a{number}", caps, agent_id="ann")
    await come(world, "b0", caps, agent_id="bob")
    offer = msgspec.structs.replace(OFFER, limit=2)
    started = await world.store.claim((offer,), 100, world.clock.now(), caps=caps)
    assert [one.request_id for one in started.started] == ["a0", "b0"]
    assert (await figures(world, "agents", "agent:ann"))[1].tokens == 30


@pytest.mark.promise("B1")
async def test_a_budget_that_refuses_says_so_before_anything_is_kept(world: World) -> None:
    caps = (cap("money", Unit.USD, 200, refuse=True),)
    with pytest.raises(BudgetExceeded) as over:
        await come(world, "one", caps)
    assert over.value.details["budget"] == "money"
    assert over.value.details["resets_at"] == TODAY + DAY
    assert await world.store.get("one") is None
    assert await figures(world, "money") == (NOTHING, NOTHING)


@pytest.mark.promise("B1")
async def test_a_waiting_request_of_a_budget_that_refuses_ends_when_it_is_used_up(world: World) -> None:
    caps = (cap(limit=40, refuse=True),)
    await come(world, "one", caps)
    await come(world, "two", caps)
    started = await claim(world, caps)
    assert [one.request_id for one in started.started] == ["one"]
    assert not started.blocked
    settled = await end(world, started.started[0], caps, spent=Spent(tokens=30, nanos=300))
    assert settled.state is State.COMPLETED
    await world.store.reconsider("day", world.clock.now())
    (ended,) = (await claim(world, caps)).blocked
    assert (ended.request_id, ended.state, ended.error) == ("two", State.BLOCKED, "budget_exceeded")
    view = await world.view("two")
    assert view.error == "budget_exceeded"
    assert "budget 'day' has no room" in (view.message or "")


@pytest.mark.promise("B1")
async def test_a_request_that_no_window_has_room_for_is_refused_and_never_waits(world: World) -> None:
    with pytest.raises(BudgetExceeded, match="more than the whole of budget 'day'"):
        await come(world, "one", (cap(limit=29),))
    await come(world, "two", ())
    (ended,) = (await claim(world, (cap(limit=29),))).blocked
    assert ended.error == "budget_exceeded"


@pytest.mark.promise("B1")
async def test_a_model_without_a_price_is_refused_by_name_or_counts_as_the_budget_says(world: World) -> None:
    unpriced = demand(input_rate=None, output_rate=0.0)
    with pytest.raises(BudgetExceeded, match="no price is known for 'stub/echo'"):
        await come(world, "one", (cap("money", Unit.USD, NANO),), demand=unpriced)
    caps = (cap("money", Unit.USD, NANO, unpriced=2.5),)
    entered = await run(world, "two", caps, demand=unpriced)
    assert (await figures(world, "money"))[1] == Amount(1, 30, 75)
    await end(world, entered.claim, caps, spent=Spent(tokens=15))
    assert (await figures(world, "money"))[0] == Amount(1, 15, 38)


@pytest.mark.promise("B1")
async def test_an_answer_without_max_tokens_is_cut_to_the_rest_of_the_tightest_budget(world: World) -> None:
    wide = demand(output=8_000, fixed=False)
    caps = (cap("tokens", limit=5_010), cap("money", Unit.USD, 30_101))
    entered = await run(world, "one", caps, demand=wide)
    # The money pays for 3,010 tokens, one nanodollar is kept for the rounding.
    assert entered.claim.output_cap == 3_000
    assert (await figures(world, "money"))[1].nanos <= 30_101
    await end(world, entered.claim, caps, spent=Spent(tokens=2_000, nanos=20_000))
    # Less than a thousand tokens of an answer is no answer.
    assert (await run(world, "two", caps, demand=wide)).claim is None


@pytest.mark.promise("B1")
async def test_the_conversation_so_far_counts_as_input(world: World) -> None:
    caps = (cap(limit=1_000),)
    first = await run(world, "one", caps)
    await end(world, first.claim, caps, usage=Usage(input_tokens=100, cache_read_tokens=30, output_tokens=20))
    new = world.new("two", "talk-one", demand=demand())
    second = await world.store.enqueue(new, [OFFER], world.clock.now(), caps=caps)
    assert second.claim is not None
    assert (await figures(world))[1].tokens == 180


@pytest.mark.promise("B1")
async def test_each_threshold_is_reported_once_and_again_after_a_raise(world: World) -> None:
    caps = (cap(limit=100, warn_at=(0.5, 0.8)),)
    told: list[tuple[float | None, int]] = []
    for number in range(6):
        entered = await run(world, f"r{number}", caps, demand=demand(1, 1))
        settled = await end(world, entered.claim, caps, spent=Spent(tokens=25, nanos=0))
        told += [(notice.threshold, notice.used) for notice in settled.notices]
        if number == 3:
            break
    assert told == [(0.5, 50), (None, 100)] or told == [(0.5, 50), (0.8, 100), (None, 100)]
    raised = (cap(limit=200, warn_at=(0.5, 0.8)),)
    entered = await run(world, "again", raised, demand=demand(1, 1))
    settled = await end(world, entered.claim, raised, spent=Spent(tokens=1, nanos=0))
    assert [notice.threshold for notice in settled.notices] == [0.5]


@pytest.mark.promise("B1")
async def test_a_request_that_waits_for_a_used_up_budget_tells_it_once(world: World) -> None:
    caps = (cap(limit=40),)
    await end(world, (await run(world, "one", caps)).claim, caps, spent=Spent(tokens=20, nanos=0))
    for name in ("two", "three"):
        await come(world, name, caps)
    (notice,) = (await claim(world, caps)).notices
    assert (notice.name, notice.subject, notice.threshold, notice.end) == ("day", "all", None, TODAY + DAY)


@pytest.mark.promise("B1")
async def test_figures_survive_a_crash_and_running_requests_count_as_reserved(world: World) -> None:
    caps = (cap(limit=100),)
    await end(world, (await run(world, "one", caps)).claim, caps)
    await run(world, "two", caps)
    await come(world, "three", caps)
    await world.crash()
    assert await figures(world) == (Amount(2, 45, 450), NOTHING)
    assert await ids(world, caps) == ["two"]
    assert (await figures(world))[1].tokens == 30


@pytest.mark.promise("B1")
async def test_a_retry_reserves_again(world: World) -> None:
    caps = (cap(limit=100),)
    first = (await run(world, "one", caps)).claim
    failed = world.attempt(first, Outcome.FAILED, error="overloaded")
    retry = Retry(at=world.clock.wall + 1, error="overloaded")
    await world.store.settle(first, failed, retry, world.clock.now(), None, Spent(output=5), caps)
    assert await figures(world) == (Amount(1, 15, 150), NOTHING)
    world.clock.forward(1)
    await world.expire()
    assert await ids(world, caps) == ["one"]
    assert (await figures(world))[1].tokens == 30


@pytest.mark.promise("B1")
async def test_a_call_counts_in_the_window_in_which_it_began(world: World) -> None:
    today = (cap(),)
    entered = await run(world, "one", today)
    world.clock.forward((TODAY + DAY - world.clock.wall) / MICROSECONDS + 1)
    tomorrow = (cap(start=TODAY + DAY, end=TODAY + 2 * DAY),)
    await end(world, entered.claim, tomorrow)
    assert await figures(world) == (Amount(1, 15, 150), NOTHING)
    assert await figures(world, start=TODAY + DAY) == (NOTHING, NOTHING)


@pytest.mark.promise("B1")
async def test_scopes_bind_whom_they_name(world: World) -> None:
    caps = (
        cap("one", kind="agent", named="ann"),
        cap("beginning", kind="agent", named="a*"),
        cap("each", kind="agent"),
        cap("model", kind="model", named="stub/echo"),
        cap("provider", kind="provider", named="other"),
        cap("session", kind="session"),
        cap("token", kind="token", named="ann"),
        cap("tokens", kind="token"),
        cap("another", kind="token", named="an"),
    )
    await run(world, "r", caps, agent_id="ann")
    await run(world, "s", (cap("token", kind="token", named="ann"), cap("tokens", kind="token")), agent_id="ann/x")
    found = {(name.name, use.subject) for name in caps for use in await world.store.budget_uses(name.name, 0)}
    assert found == {
        ("one", "agent:ann"),
        ("beginning", "agent:a*"),
        ("each", "agent:ann"),
        ("model", "model:stub/echo"),
        ("session", "session:talk-r"),
        ("token", "token:ann"),
        ("tokens", "token:ann"),
    }
    assert (await figures(world, "token", "token:ann"))[1].calls == 2


@pytest.mark.promise("B1", "B2")
async def test_a_request_released_by_a_pause_still_waits_for_its_budget(world: World) -> None:
    caps = (cap(limit=40),)
    await end(world, (await run(world, "one", caps)).claim, caps, spent=Spent(tokens=20, nanos=0))
    await come(world, "two", caps, agent_id="ann")
    await come(world, "three", caps, agent_id="bob")
    ann = Paused(agents=frozenset({"ann"}))
    await world.store.claim((OFFER,), 100, world.clock.now(), ann, caps)
    await world.store.bring_back(Paused(), world.clock.now())
    assert await ids(world, caps) == []
    (waiting,) = await world.store.budget_waits()
    assert waiting.requests == 2


@pytest.mark.promise("B1")
async def test_one_claim_passes_so_many_that_wait_and_says_that_there_may_be_more(world: World) -> None:
    caps = (cap("agents", kind="agent", limit=40),)
    await end(world, (await run(world, "first", caps, agent_id="ann")).claim, caps, spent=Spent(tokens=20, nanos=0))
    for number in range(CLAIM_ASIDE + 10):
        await come(world, f"a{number}", caps, agent_id="ann")
    await come(world, "b", caps, agent_id="bob")
    found = await claim(world, caps)
    assert found.more
    assert [one.request_id for one in (await claim(world, caps)).started] == ["b"]


@pytest.mark.promise("B1")
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_the_figures_are_the_sums_over_the_charges(world: World, seed: int) -> None:
    dice = random.Random(seed)
    caps = (
        cap("all", limit=400),
        cap("agents", kind="agent", limit=200),
        cap("money", Unit.USD, 3_000, kind="agent", named="a*"),
        cap("calls", Unit.REQUESTS, 30),
    )
    running: list[Claimed] = []
    charged = NOTHING
    for number in range(120):
        match dice.randrange(6):
            case 0 | 1:
                agent, wants = (
                    dice.choice(["ann", "abe", "bob", None]),
                    demand(dice.randrange(6, 20), dice.randrange(6, 20)),
                )
                try:
                    entered = await run(world, f"r{number}", caps, agent_id=agent, demand=wants)
                except BudgetExceeded:
                    continue
                running += [entered.claim] if entered.claim is not None else []
            case 2:
                running += (await claim(world, caps)).started
            case 3 | 4 if running:
                one = running.pop(dice.randrange(len(running)))
                spent = dice.choice([None, Spent(tokens=12, nanos=77), Spent(tokens=12, nanos=77)])
                await end(world, one, caps, spent)
                charged = charged if spent is None else charged.plus(Amount(1, 12, 77))
            case _:
                if running and dice.random() < 0.2:
                    held = (await figures(world, "all"))[1]
                    await world.crash()
                    running, charged = [], charged.plus(held)
        used, held = await figures(world, "all")
        assert used == charged
        assert held.calls == len(running)
        assert used.tokens + held.tokens <= 400, "the limit was overshot, though no estimate was too low"
        uses = await world.store.budget_uses("agents", 0)
        assert sum(one.use.used.tokens for one in uses) == used.tokens
        assert sum(one.use.held.tokens for one in uses) == held.tokens


@pytest.mark.promise("B1", "F10")
async def test_a_late_report_takes_the_place_of_the_estimate_on_shared_stores(
    world: World,
) -> None:
    caps = (cap(limit=1_000),)
    stale = (await run(world, "one", caps)).claim
    await world.crash()
    assert (await figures(world))[0].tokens == 30
    again = (await claim(world, caps)).started[0]
    await end(world, again, caps)
    assert (await end(world, stale, caps)).fenced
    shared = isinstance(world.store, RedisStore)
    assert (await figures(world))[0] == (Amount(2, 30, 300) if shared else Amount(2, 45, 450))
    # Once: a report that is sent twice counts once.
    await end(world, stale, caps)
    assert (await figures(world))[0] == (Amount(2, 30, 300) if shared else Amount(2, 45, 450))


@pytest.mark.promise("B1")
async def test_a_model_that_costs_nothing_runs_though_the_money_is_used_up(world: World) -> None:
    caps = (cap("money", Unit.USD, 300, refuse=True),)
    await end(world, (await run(world, "one", caps)).claim, caps, spent=Spent(tokens=40, nanos=400))
    free = demand(input_rate=0.0, output_rate=0.0)
    assert (await run(world, "free", caps, demand=free)).claim is not None
    with pytest.raises(BudgetExceeded):
        await come(world, "paid", caps)


@pytest.mark.promise("B1")
async def test_a_request_too_large_for_the_room_holds_up_no_smaller_one_behind_it(world: World) -> None:
    caps = (cap(limit=100),)
    first = (await run(world, "first", caps, demand=demand(45, 45))).claim
    await come(world, "large", caps, demand=demand(45, 45))
    await come(world, "small", caps)
    assert await ids(world, caps) == []
    await end(world, first, caps, spent=Spent(tokens=60, nanos=0))
    assert await ids(world, caps) == ["small"]


@pytest.mark.promise("B1", "F10")
async def test_late_reports_of_two_runs_both_take_their_estimates_place_and_let_others_go_on(world: World) -> None:
    if not isinstance(world.store, RedisStore):
        return
    caps = (cap(limit=90),)
    lost = [(await run(world, "one", caps)).claim]
    await world.crash()
    lost += (await claim(world, caps)).started
    await world.crash()
    assert (await figures(world))[0].tokens == 60
    await come(world, "two", caps, demand=demand(20, 20))
    assert await ids(world, caps) == ["one"]
    for one in lost:
        assert (await end(world, one, caps)).fenced
    assert (await figures(world))[0] == Amount(2, 30, 300)
    assert await ids(world, caps) == []
    caps = (cap(limit=110),)
    await world.store.reconsider(None, world.clock.now())
    assert await ids(world, caps) == ["two"]


@pytest.mark.promise("B1")
async def test_what_waited_for_running_calls_is_refused_when_they_have_used_the_budget_up(world: World) -> None:
    caps = (cap(unit=Unit.REQUESTS, limit=1, refuse=True),)
    first = await run(world, "first", caps)
    for number in range(70):
        await come(world, f"waits-{number}", caps)
    assert (await claim(world, caps)).blocked == ()
    await end(world, first.claim, caps)
    claims = await claim(world, caps)
    assert claims.started == ()
    assert {(one.state, one.error) for one in claims.blocked} == {(State.BLOCKED, "budget_exceeded")}
    assert len(claims.blocked) == 70
