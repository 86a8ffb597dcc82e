"""A chain's usage: all attempts of its requests, and no others (T2)."""

from __future__ import annotations

import pytest

from ksi.clock import MICROSECONDS
from ksi.request import Usage
from ksi.store.usage import UsageBy, UsageQuery, UsageReport
from tests.conformance.chain_parts import begin, born, claims, complete, fail
from tests.conformance.world import DAY, World


async def used(world: World, chain: str | None, **fields: object) -> UsageReport:
    until = world.clock.wall
    query = UsageQuery(since=until - DAY * MICROSECONDS, until=until, chain=chain, **fields)  # type: ignore[arg-type]
    return await world.store.usage(query, lambda *_: ())


def counts(report: UsageReport) -> tuple[int, int, int, int]:
    total = report.total
    return total.requests, total.attempts, total.unknown_attempts, total.total_tokens


@pytest.mark.promise("T2")
async def test_a_chain_s_usage_is_that_of_all_its_requests_and_of_no_other(world: World) -> None:
    root = await begin(world)
    await complete(world, root, usage=Usage(input_tokens=10, output_tokens=5))
    await born(world, "child", "root")
    await born(world, "failing", "root")
    await world.enqueue("alone", "elsewhere")
    for claim in (await claims(world)).started:
        if claim.request_id == "failing":
            await fail(world, claim)
        else:
            await complete(world, claim, usage=Usage(input_tokens=100, output_tokens=20))
    other = await begin(world, "other", "third")
    await complete(world, other, usage=Usage(input_tokens=1_000, output_tokens=0))
    world.clock.forward(1)

    assert counts(await used(world, None)) == (5, 5, 1, 15 + 120 + 120 + 1_000)
    assert counts(await used(world, "root")) == (3, 3, 1, 15 + 120)
    assert counts(await used(world, "other")) == (1, 1, 0, 1_000)
    assert counts(await used(world, "child")) == (0, 0, 0, 0), "a chain has its root's name"
    assert counts(await used(world, "nobody")) == (0, 0, 0, 0)
    by_session = (await used(world, "root", groups=(UsageBy.SESSION,))).groups[UsageBy.SESSION]
    assert [(row.key, row.sums.attempts) for row in by_session.rows] == [
        ("talk of child", 1),
        ("talk", 1),
        ("talk of failing", 1),
    ]
    assert counts(await used(world, "root", conversation="talk")) == (1, 1, 0, 15)


@pytest.mark.promise("T2")
async def test_a_root_that_was_in_no_chain_when_it_came_belongs_to_it(world: World) -> None:
    root = await world.run("root", "talk")
    await complete(world, root, usage=Usage(input_tokens=10, output_tokens=5))
    await born(world, "child", "root")
    world.clock.forward(1)
    assert counts(await used(world, "root")) == (1, 1, 0, 15)
