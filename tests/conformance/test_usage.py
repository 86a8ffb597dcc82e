"""The account of usage: each attempt's report counts once, and unknown values are reported (T1, T2)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksi.clock import MICROSECONDS
from ksi.request import Outcome, State, Usage
from ksi.store.usage import (
    PRICE_SLICE,
    Rates,
    Tariff,
    UsageBy,
    UsageQuery,
    UsageReport,
    UsageSums,
    rates_for,
)
from ksi.store.values import Finish, Offer, StoreRules
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import DAY, HOUR, ROUTE, MemoryHome, SqliteHome, World
from tests.effort import effort

CHEAP = Rates(input=1.0, output=2.0, cache_read=0.1, cache_write=1.5, reasoning=3.0)
LARGE = Rates(above=1_000, input=10.0, output=20.0, cache_read=1.0, cache_write=15.0, reasoning=30.0)


def no_prices(*_: object) -> Tariff:
    return ()


def cheap(*_: object) -> Tariff:
    return (CHEAP,)


async def report(world: World, pricing: Any = no_prices, hours: float = 24.0, **fields: Any) -> UsageReport:
    until = world.clock.wall
    query = UsageQuery(since=until - round(hours * HOUR * MICROSECONDS), until=until, **fields)
    return await world.store.usage(query, pricing)


async def spend(world: World, name: str, usage: Usage | None, conversation: str | None = None, **fields: Any) -> None:
    """One completed request, by default in a conversation of its own."""
    attempt = {key: fields.pop(key) for key in ("asked", "model", "mcp") if key in fields}
    offer = Offer(ROUTE, fields.pop("provider", "stub"), 1_000)
    enqueued = await world.enqueue(name, conversation or f"talk of {name}", [offer], **fields)
    assert enqueued.claim is not None
    await world.complete(enqueued.claim, usage=usage, **attempt)
    world.clock.forward(1)


def keys(found: UsageReport, by: UsageBy) -> list[tuple[str | None, int]]:
    return [(row.key, row.sums.total_tokens) for row in found.groups[by].rows]


def tokens(given: int, made: int = 0) -> Usage:
    return Usage(input_tokens=given, output_tokens=made)


async def test_a_store_without_attempts_has_used_nothing(world: World) -> None:
    found = await report(world, groups=tuple(UsageBy), bucket=MICROSECONDS)
    assert found.total == found.fenced == found.mcp == UsageSums()
    assert [groups.rows for groups in found.groups.values()] == [(), (), (), ()]
    assert (found.buckets, found.first_turns, found.mcp_uses) == ({}, (), ())


@pytest.mark.promise("T1", "T2")
async def test_every_report_is_in_the_sums_to_the_last_token(world: World) -> None:
    usage = Usage(
        input_tokens=101, output_tokens=59, cache_read_tokens=1_003, cache_write_tokens=307, reasoning_tokens=13
    )
    for number in range(3):
        await spend(world, f"r{number}", usage)
    total = (await report(world)).total
    assert (total.requests, total.attempts) == (3, 3)
    assert (total.input_tokens, total.output_tokens, total.total_tokens) == (303, 177, 480)
    assert (total.cache_read_tokens, total.cache_write_tokens, total.reasoning_tokens) == (3_009, 921, 39)


@pytest.mark.promise("T1")
async def test_attempts_without_a_report_are_counted_and_are_never_zero(world: World) -> None:
    await spend(world, "silent", None)
    await world.fail(await world.run("failed", "b"))
    total = (await report(world, cheap)).total
    assert (total.attempts, total.unknown_attempts) == (2, 2)
    assert (total.input_tokens, total.cost_usd, total.cache_saved_usd) == (0, None, None)


@pytest.mark.promise("T1")
async def test_each_attempt_of_a_request_counts_and_the_request_once(world: World) -> None:
    claim = await world.run("again")
    await world.settle(
        claim, Finish(state=State.FAILED), world.attempt(claim, Outcome.FAILED, usage=tokens(7), error="overloaded")
    )
    first = await world.run("retried", "other")
    await world.retry(first, after=1.0)
    world.clock.forward(2)
    await world.expire()
    await world.complete(await world.claim_one(), usage=tokens(5))
    total = (await report(world)).total
    assert (total.requests, total.attempts, total.unknown_attempts, total.input_tokens) == (2, 3, 1, 12)


@pytest.mark.promise("T1", "F10")
async def test_a_late_report_takes_the_place_of_its_attempt_s_interruption(world: World) -> None:
    claim = await world.run("slow", agent_id="planner")
    await world.crash()
    interrupted = (await report(world, cheap)).total
    assert (interrupted.attempts, interrupted.unknown_attempts, interrupted.fenced_attempts) == (1, 1, 0)
    world.clock.forward(1)
    settled = await world.complete(claim, usage=tokens(100, 50))
    assert settled.fenced
    again = await world.claim_one()
    await world.complete(again, usage=tokens(3))

    found = await report(world, cheap, groups=(UsageBy.AGENT,))
    assert (found.total.requests, found.total.attempts, found.total.unknown_attempts) == (1, 2, 0)
    assert found.total.input_tokens == 103
    assert (found.fenced.attempts, found.fenced.input_tokens, found.fenced.output_tokens) == (1, 100, 50)
    assert found.fenced.cost_usd == pytest.approx((100 * 1 + 50 * 2) / 1e6)
    assert keys(found, UsageBy.AGENT) == [("planner", 153)]


@pytest.mark.promise("T2")
async def test_the_window_has_the_attempts_that_ended_in_it(world: World) -> None:
    await spend(world, "old", tokens(1))
    world.clock.forward(2 * HOUR)
    await spend(world, "young", tokens(20))
    assert (await report(world, hours=1)).total.input_tokens == 20
    assert (await report(world, hours=3)).total.input_tokens == 21
    query = UsageQuery(since=world.clock.wall - 3 * 3_600 * MICROSECONDS, until=world.clock.wall - 10 * MICROSECONDS)
    assert (await world.store.usage(query, no_prices)).total.input_tokens == 1


@pytest.mark.promise("T2")
async def test_usage_is_grouped_by_agent_model_provider_and_session(world: World) -> None:
    await spend(world, "a", tokens(10), "one", agent_id="planner", asked="stub/echo", model="echo")
    await spend(world, "b", tokens(30), "two", agent_id="planner", asked="stub/long", model="long")
    await spend(world, "c", tokens(25), "one", asked="stub/echo", model="echo", provider="other")
    found = await report(world, groups=tuple(UsageBy))
    assert keys(found, UsageBy.AGENT) == [("planner", 40), (None, 25)]
    assert keys(found, UsageBy.MODEL) == [("stub/echo", 35), ("stub/long", 30)]
    assert keys(found, UsageBy.PROVIDER) == [("stub", 40), ("other", 25)]
    assert keys(found, UsageBy.SESSION) == [("one", 35), ("two", 30)]
    assert [row.sums.requests for row in found.groups[UsageBy.SESSION].rows] == [2, 1]


@pytest.mark.promise("T2")
async def test_filters_leave_only_matching_attempts(world: World) -> None:
    await spend(world, "a", tokens(1), "one", agent_id="planner", asked="stub/echo", model="echo-2")
    await spend(world, "b", tokens(2), "two", agent_id="coder", asked="stub/long", model="long-1", provider="other")
    for wish, expected in (
        ({"agent_id": "planner"}, 1),
        ({"agent_id": "nobody"}, 0),
        ({"asked": "stub/echo", "answered": "stub/echo"}, 1),
        ({"asked": "claude-cli/long-1", "answered": "long-1"}, 2),
        ({"asked": "stub/x", "answered": "x"}, 0),
        ({"provider": "other"}, 2),
        ({"conversation": "two"}, 2),
        ({"conversation": "unknown"}, 0),
        ({"agent_id": "planner", "provider": "other"}, 0),
    ):
        assert (await report(world, **wish)).total.input_tokens == expected, wish  # type: ignore[arg-type]


async def test_a_conversation_is_known_by_its_provider_session_too(world: World) -> None:
    claim = await world.run("a", "talk")
    await world.complete(claim, usage=tokens(4), provider_session="their-name")
    found = await report(world, conversation="their-name", groups=(UsageBy.SESSION,))
    assert keys(found, UsageBy.SESSION) == [("talk", 4)]


@pytest.mark.promise("T2")
async def test_groups_come_in_pages_the_largest_first(world: World) -> None:
    for number in range(7):
        # Twice the same sum: names decide.
        await spend(world, f"r{number}", tokens(10 * (number // 2)), agent_id=f"agent {number}")
    seen: list[tuple[str | None, int]] = []
    after, more = None, True
    while more:
        found = await report(world, groups=(UsageBy.AGENT,), limit=2, after=after)
        page = found.groups[UsageBy.AGENT]
        seen += keys(found, UsageBy.AGENT)
        after, more = page.rows[-1].mark, page.more
    expected = [("agent 6", 30), ("agent 4", 20), ("agent 5", 20), ("agent 2", 10), ("agent 3", 10)]
    assert seen == [*expected, ("agent 0", 0), ("agent 1", 0)]


@pytest.mark.promise("T2")
async def test_buckets_begin_at_multiples_of_their_length(world: World) -> None:
    length = 600 * MICROSECONDS
    begin = world.clock.wall // length * length
    world.clock.wall = begin + 5
    await spend(world, "a", tokens(1))
    await spend(world, "b", tokens(2))
    world.clock.wall = begin + 3 * length - 1
    await spend(world, "c", tokens(4))
    found = await report(world, bucket=length)
    assert {start: sums.input_tokens for start, sums in found.buckets.items()} == {begin: 3, begin + 2 * length: 4}


# Prices.


@pytest.mark.promise("T2")
async def test_each_attempt_is_priced_by_the_size_of_its_input(world: World) -> None:
    small = Usage(
        input_tokens=400, output_tokens=30, cache_read_tokens=500, cache_write_tokens=100, reasoning_tokens=10
    )
    large = Usage(
        input_tokens=401, output_tokens=30, cache_read_tokens=500, cache_write_tokens=100, reasoning_tokens=10
    )
    await spend(world, "small", small)
    await spend(world, "large", large)
    total = (await report(world, lambda *_: (CHEAP, LARGE))).total
    assert total.cost_usd == pytest.approx(CHEAP.cost(small) + LARGE.cost(large))
    assert CHEAP.cost(small) == pytest.approx((400 * 1 + 20 * 2 + 10 * 3 + 500 * 0.1 + 100 * 1.5) / 1e6)
    assert total.cache_saved_usd == pytest.approx(500 * 0.9 / 1e6 + 500 * 9 / 1e6)
    assert total.unpriced_attempts == 0


@pytest.mark.promise("T2")
async def test_an_unknown_price_is_counted_and_never_zero(world: World) -> None:
    await spend(world, "known", tokens(1_000), asked="stub/known")
    await spend(world, "unknown", tokens(5), asked="stub/unknown")
    found = await report(
        world, lambda _p, _m, asked, _at: (CHEAP,) if asked == "stub/known" else (), groups=(UsageBy.MODEL,)
    )
    assert found.total.cost_usd == pytest.approx(0.001)
    assert found.total.unpriced_attempts == 1
    costs = {row.key: (row.sums.cost_usd, row.sums.unpriced_attempts) for row in found.groups[UsageBy.MODEL].rows}
    assert costs["stub/unknown"] == (None, 1)


@pytest.mark.promise("T1", "T2")
async def test_a_cost_that_the_provider_reported_wins(world: World) -> None:
    await spend(world, "told", Usage(input_tokens=1_000, cache_read_tokens=100, cost_usd=0.5))
    await spend(world, "free", Usage(input_tokens=1_000, cost_usd=0.0))
    total = (await report(world, cheap)).total
    assert total.cost_usd == pytest.approx(0.5)
    assert total.cache_saved_usd == pytest.approx(100 * 0.9 / 1e6)
    unpriced = (await report(world)).total
    assert unpriced.cost_usd == pytest.approx(0.5)
    assert (unpriced.unpriced_attempts, unpriced.cache_saved_usd) == (0, 0.0)


async def test_prices_are_asked_for_by_provider_models_and_half_hour(world: World) -> None:
    asked_for = set()

    def pricing(provider: str, model: str | None, asked: str | None, at: int) -> Tariff:
        asked_for.add((provider, model, asked, at))
        return (CHEAP,)

    begin = world.clock.wall // PRICE_SLICE * PRICE_SLICE
    world.clock.wall = begin
    await spend(world, "a", tokens(1), asked="stub/x", model="x-1")
    world.clock.forward(HOUR)
    await spend(world, "b", tokens(1))
    await spend(world, "silent", None, asked="stub/y")
    assert (await report(world, pricing)).total.cost_usd == pytest.approx(2e-6)
    assert asked_for == {("stub", "x-1", "stub/x", begin), ("stub", None, None, begin + 2 * PRICE_SLICE)}


# MCP.


@pytest.mark.promise("T2")
async def test_attempts_with_mcp_servers_are_summed_separately_and_first_turns_are_compared(world: World) -> None:
    async def turn(name: str, sent: int, mcp: bool, conversation: str | None = None, asked: str = "p/m") -> None:
        usage = Usage(input_tokens=sent, cache_read_tokens=1, cache_write_tokens=2)
        await spend(world, name, usage, conversation, mcp=mcp, asked=asked)

    for number, sent in enumerate((10, 40, 20)):
        await turn(f"plain {number}", sent, mcp=False)
    for number, sent in enumerate((100, 200)):
        await turn(f"tools {number}", sent, mcp=True)
    await turn("later turn", 9_000, mcp=True, conversation="talk of tools 0")
    await turn("elsewhere", 7, mcp=False, asked="p/without")
    await world.fail(await world.run("failed", "x"))
    found = await report(world)
    assert (found.mcp.attempts, found.mcp.input_tokens) == (3, 9_300)
    assert [(use.provider, use.model, use.attempts, use.reports) for use in found.mcp_uses] == [("stub", "p/m", 3, 3)]
    turns = [(t.provider, t.model, t.mcp, t.turns, t.input_tokens) for t in found.first_turns]
    assert turns == [("stub", "p/m", False, 3, 23.0), ("stub", "p/m", True, 2, 153.0)]


@pytest.mark.promise("T2")
async def test_an_interrupted_attempt_says_whether_it_had_mcp_servers(world: World) -> None:
    await world.run("with", "a", body=b'{"mcp_config":{"fs":{}},"prompt":"x"}')
    await world.run("without", "b", body=b'{"mcp_config":{},"prompt":"\\"mcp_config\\""}')
    await world.crash()
    found = await report(world, groups=(UsageBy.MODEL,))
    assert (found.total.unknown_attempts, found.mcp.unknown_attempts) == (2, 1)
    assert [(row.key, row.sums.attempts) for row in found.groups[UsageBy.MODEL].rows] == [("stub/echo", 2)]


# Keeping.


@pytest.mark.promise("T2")
async def test_the_account_outlives_restarts_and_crashes(world: World) -> None:
    await spend(world, "a", tokens(1), agent_id="planner")
    await world.restart()
    await spend(world, "b", tokens(2), agent_id="planner")
    await world.crash()
    found = await report(world, groups=(UsageBy.AGENT,))
    assert keys(found, UsageBy.AGENT) == [("planner", 3)]


@pytest.mark.promise("T2", "R7")
async def test_the_account_stays_when_its_requests_are_pruned(store_factory: StoreFactory) -> None:
    week, month = round(7 * DAY * MICROSECONDS), round(30 * DAY * MICROSECONDS)
    world = await store_factory(keep_finished=week, keep_sessions=month)
    await spend(world, "done", tokens(1), "one", agent_id="planner", asked="stub/echo")
    claim = await world.run("failed", "two", agent_id="coder")
    attempt = world.attempt(claim, Outcome.FAILED, error="overloaded", usage=tokens(2), asked="stub/echo")
    await world.settle(claim, Finish(state=State.FAILED), attempt)
    await world.store.set_log_watermark(1_000)
    world.clock.forward(8 * DAY)
    assert (await world.prune())[0] == 2
    found = await report(world, hours=24 * 9, groups=tuple(UsageBy))
    assert keys(found, UsageBy.AGENT) == [("coder", 2), ("planner", 1)]
    assert keys(found, UsageBy.MODEL) == [("stub/echo", 3)]
    assert keys(found, UsageBy.SESSION) == [("two", 2), ("one", 1)]
    world.clock.forward(30 * DAY)
    await world.prune()
    assert (await report(world, hours=24 * 90)).total.attempts == 0


# Both stores agree.

SPENT = st.tuples(
    st.sampled_from(["a", "b", None]),
    st.sampled_from(["one", "two", "three"]),
    st.booleans(),
    st.one_of(
        st.none(),
        st.builds(
            Usage,
            input_tokens=st.integers(0, 2_000),
            output_tokens=st.integers(20, 40),
            cache_read_tokens=st.sampled_from([0, 0, 500]),
            cache_write_tokens=st.integers(0, 3),
            reasoning_tokens=st.integers(0, 20),
            cost_usd=st.sampled_from([None, None, 0.25]),
        ),
    ),
    st.integers(0, 5_000),
)


def rounded(found: UsageReport) -> Any:
    """A report whose dollars are free of rounding differences."""

    def money(sums: UsageSums) -> tuple[Any, ...]:
        return tuple(round(value, 9) if isinstance(value, float) else value for value in _values(sums))

    return (
        *(money(sums) for sums in (found.total, found.fenced, found.mcp)),
        found.mcp_uses,
        found.first_turns,
        {by: ([(row.key, money(row.sums)) for row in page.rows], page.more) for by, page in found.groups.items()},
        {begin: money(sums) for begin, sums in found.buckets.items()},
    )


def _values(sums: UsageSums) -> list[Any]:
    return [getattr(sums, name) for name in UsageSums.__struct_fields__]


def two_sizes(_provider: str, _model: str | None, asked: str | None, _at: int) -> Tariff:
    return () if asked == "stub/two" else (CHEAP, LARGE)


@pytest.mark.promise("T1", "T2")
@settings(max_examples=effort(25, 250), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spent=st.lists(SPENT, max_size=12), hours=st.sampled_from([1.0, 5.0]), limit=st.sampled_from([1, 2, 50]))
async def test_the_stores_make_the_same_report(
    tmp_path_factory: pytest.TempPathFactory, spent: list[Any], hours: float, limit: int
) -> None:
    reports = []
    for home in (MemoryHome(), SqliteHome(tmp_path_factory.mktemp("db"), "normal")):
        world = World(home, StoreRules())
        await world.open()
        for number, (agent, conversation, mcp, usage, pause) in enumerate(spent):
            asked = f"stub/{conversation}"
            await spend(world, f"r{number}", usage, conversation, agent_id=agent, mcp=mcp, asked=asked)
            world.clock.forward(pause)
        query = {"groups": tuple(UsageBy), "limit": limit, "bucket": 900 * MICROSECONDS}
        reports.append(rounded(await report(world, two_sizes, hours, **query)))
        await world.store.close()
    assert reports[0] == reports[1]


def test_rates_go_by_the_whole_input() -> None:
    assert rates_for((), tokens(1)) is None
    assert rates_for((CHEAP, LARGE), Usage(input_tokens=0)) is CHEAP
    assert rates_for((CHEAP, LARGE), Usage(input_tokens=1, cache_read_tokens=999)) is CHEAP
    assert rates_for((CHEAP, LARGE), Usage(input_tokens=1, cache_write_tokens=1_000)) is LARGE
