"""A chain's budget: reserved before a run, charged by its usage (C6, T1)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ksi.request import Outcome, State, Usage
from ksi.store.chains import Block, Grant, Spending, admit, charge, check
from ksi.store.values import Claimed, Finish
from tests.conformance.chain_parts import LOOP, begin, born, claims, complete, fail, figures, limits, member
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import OFFER, World

End = Callable[[World, Claimed], Awaitable[Any]]


async def cancelled(world: World, claim: Claimed) -> None:
    await world.cancel(claim.request_id)
    verdict = Finish(state=State.CANCELLED, error="cancelled")
    await world.settle(claim, verdict, world.attempt(claim, Outcome.CANCELLED))


async def parked(world: World, claim: Claimed) -> None:
    await world.retry(claim, 60, parked=True)


async def crashed(world: World, claim: Claimed) -> None:
    await world.crash()


ENDS: dict[str, End] = {
    "failed": fail,
    "cancelled": cancelled,
    "retried": lambda world, claim: world.retry(claim),
    "parked": parked,
    "given back": lambda world, claim: world.give_back(claim),
    "crashed": crashed,
}


@pytest.mark.promise("C6")
async def test_a_running_request_is_reserved_and_charged_by_its_usage(world: World) -> None:
    claim = await begin(world, estimate=30, output_cap=200)
    spending = (await figures(world)).spending
    assert (spending.reserved, spending.used) == (230, 0)
    await complete(world, claim, usage=Usage(input_tokens=40, output_tokens=5, cache_read_tokens=900))
    chain = await figures(world)
    assert (chain.spending.reserved, chain.spending.used, chain.estimated) == (0, 45, 0)
    (row,) = (await world.store.members("root", 5)).items
    assert (row.tokens, row.estimated) == (45, False)


@pytest.mark.promise("C6", "T1")
@pytest.mark.parametrize("how", ENDS)
async def test_each_ended_attempt_is_charged_by_estimate_without_a_report(world: World, how: str) -> None:
    claim = await begin(world, estimate=30, output_cap=200)
    await ENDS[how](world, claim)
    chain = await figures(world)
    assert (chain.spending.reserved, chain.spending.used, chain.estimated) == (0, 30, 30)
    (row,) = (await world.store.members("root", 5)).items
    assert (row.tokens, row.estimated) == (30, True)


@pytest.mark.promise("C6", "T1")
async def test_an_estimate_counts_the_text_that_came(world: World) -> None:
    await complete(world, await begin(world), usage=None, text="x" * 43)
    chain = await figures(world)
    assert (chain.spending.used, chain.estimated) == (20, 20)


@pytest.mark.promise("C6")
async def test_every_attempt_of_a_request_is_charged(world: World) -> None:
    await world.retry(await begin(world), 0)
    await world.expire()
    (again,) = await world.claim()
    assert (await figures(world)).spending.reserved == 110
    await complete(world, again, tokens=50)
    chain = await figures(world)
    assert (chain.spending.used, chain.estimated) == (60, 10)
    (row,) = (await world.store.members("root", 5)).items
    assert (row.tokens, row.estimated) == (60, True)


@pytest.mark.promise("C6", "F10")
async def test_a_late_answer_under_an_old_fence_is_not_charged_again(world: World) -> None:
    late = await begin(world)
    await world.crash()
    settled = await complete(world, late, tokens=500)
    assert settled.fenced
    assert (await figures(world)).spending.used == 10


@pytest.mark.promise("C6")
async def test_a_run_may_only_ask_for_the_rest_of_the_budget(world: World) -> None:
    first = await begin(world, limits=limits(budget=300), estimate=50, output_cap=100)
    second = await world.run("second", "other", chain=member("root", estimate=50, output_cap=900))
    assert first.chain is not None
    assert second.chain is not None
    assert (first.chain.output_cap, second.chain.output_cap) == (100, 100)
    assert (await figures(world)).spending.reserved == 300
    blocked = await world.enqueue("third", "third", [OFFER], chain=member("root", estimate=0, output_cap=1))
    assert (blocked.state, blocked.block and blocked.block.code) == (State.BLOCKED, "token_budget")
    await complete(world, first, tokens=10)
    third = await world.run("fourth", "third", chain=member("root", estimate=100, output_cap=900))
    assert third.chain is not None
    assert third.chain.output_cap == 40


@pytest.mark.promise("C5", "C6")
@pytest.mark.parametrize(("estimate", "starts"), [(99, True), (100, False)])
async def test_without_one_token_left_after_the_input_a_request_is_blocked_at_its_arrival(
    world: World, estimate: int, starts: bool
) -> None:
    at_once = await world.enqueue("a", "a", [OFFER], chain=member(limits=limits(budget=100), estimate=estimate))
    assert (at_once.state is State.RUNNING, at_once.block is None) == (starts, starts)
    waits = await world.enqueue("b", "b", chain=member(limits=limits(budget=100), estimate=estimate))
    assert (waits.state is State.QUEUED, waits.block is None) == (starts, starts)
    took = await claims(world)
    assert [claim.request_id for claim in took.started] == (["b"] if starts else [])


@pytest.mark.promise("C5", "C6")
async def test_a_request_that_others_leave_no_room_for_while_it_waits_is_blocked_before_it_runs(world: World) -> None:
    claim = await begin(world, limits=limits(budget=100), estimate=10, output_cap=10)
    waits = await born(world, "waits", "root", estimate=60)
    assert waits.block is None
    await complete(world, claim, tokens=40)
    took = await claims(world)
    assert (took.started, [ended.request_id for ended in took.blocked]) == ((), ["waits"])
    (ended,) = took.blocked
    assert ended.block is not None
    assert (ended.block.code, "input is about 60" in ended.block.message) == ("token_budget", True)


@pytest.mark.promise("C6")
async def test_the_overshoot_is_at_most_the_errors_of_the_running_estimates(store_factory: StoreFactory) -> None:
    world = await store_factory()
    running = [await begin(world, limits=limits(budget=1_000), estimate=10, output_cap=90)]
    for number in range(30):
        await born(world, f"r{number}", "root", estimate=10, output_cap=90)
    running += (await claims(world)).started
    chain = await figures(world)
    assert (len(running), chain.spending.reserved) == (10, 1_000)
    for claim in running:
        await complete(world, claim, tokens=110)
    chain = await figures(world)
    assert (chain.spending.used, chain.spending.reserved, chain.unfinished) == (1_100, 0, 0)


# The rules alone.


def test_a_check_names_the_first_thing_that_stands_against_it() -> None:
    spending = Spending(started_at=0, used=100, closed=True, tripped=LOOP)
    bounds = limits(1, 100, 10)

    def code(spending: Spending, depth: int, now: int) -> str | None:
        block = check(spending, bounds, depth, now)
        return None if block is None else block.code

    late = 10_000_001
    assert code(spending, 2, late) == "chain_closed"
    assert code(Spending(started_at=0, used=100, tripped=LOOP), 2, late) == "cycle"
    assert code(Spending(started_at=0, used=100), 2, late) == "max_depth"
    assert code(Spending(started_at=0, used=100), 1, late) == "time_window"
    assert code(Spending(started_at=0, used=60, reserved=40), 1, late - 1) == "token_budget"
    assert code(Spending(started_at=0, used=60, reserved=39), 1, late - 1) is None


def test_an_admission_cuts_the_output_to_the_rest() -> None:
    spending = Spending(started_at=0, used=50, reserved=20)
    bounds = limits(1, 100, 10)
    assert admit(spending, bounds, 0, 0, estimate=10, output_cap=5) == Grant(5, 15)
    assert admit(spending, bounds, 0, 0, estimate=10, output_cap=50) == Grant(20, 30)
    assert isinstance(admit(spending, bounds, 0, 0, estimate=30, output_cap=50), Block)
    assert isinstance(admit(spending, bounds, 2, 0, estimate=0, output_cap=1), Block)


def test_a_charge_is_the_report_or_an_estimate(world: World) -> None:
    claim: Any = Claimed(
        key=1,
        request_id="a",
        conversation="talk",
        body=b"{}",
        route="r",
        provider="p",
        priority=world.new("a").priority,
        attempt=1,
        fence=1,
        token=1,
        started_at=0,
        enqueued_at=0,
        head=None,
    )
    assert charge(world.attempt(claim, usage=Usage(input_tokens=3, output_tokens=4, reasoning_tokens=2)), 9) == (
        7,
        False,
    )
    assert charge(world.attempt(claim, usage=Usage()), 9) == (0, False)
    assert charge(world.attempt(claim, usage=None, text="x" * 7), 9) == (10, True)
    assert charge(world.attempt(claim, usage=None, text=None), 9) == (9, True)
