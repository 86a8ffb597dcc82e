"""The common rate of daemons that take the same slots: probes, and calls and tokens in a minute.

Over the stores that several daemons can share; one that a daemon has for itself is given no terms.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ksi.clock import microseconds
from ksi.request import Usage
from ksi.store.values import Claims, Offer, Terms
from tests.conformance.world import OFFER, ROUTE, Home, MemoryHome, RedisHome, World


@pytest.fixture(params=["memory", "redis"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of one kind of store's data."""
    return MemoryHome() if request.param == "memory" else RedisHome(request.getfixturevalue("redis_server").url)


def offer(limit: int = 100, **terms: int) -> Offer:
    """Room at the provider on terms."""
    return Offer(ROUTE, "stub", limit, terms=Terms(**terms))


async def fill(world: World, count: int) -> None:
    """This many requests wait, each in a conversation of its own."""
    for number in range(count):
        await world.enqueue(f"r{number}", f"talk {number}")


async def claims(world: World, *offers: Offer) -> Claims:
    """Claim all that may run."""
    return await world.store.claim(offers, 100, world.clock.now())


@pytest.mark.promise("D1", "F3")
async def test_no_more_probes_run_than_may_whatever_hangs_from_before(world: World) -> None:
    hanging = [await world.run(f"h{number}", f"hangs {number}") for number in range(3)]
    await fill(world, 4)
    probes = await world.claim(offer(probes=2))
    assert len(probes) == 2
    assert await world.claim(offer(probes=2)) == []
    assert (await world.enqueue("new", "free", [offer(probes=2)])).claim is None
    await world.complete(hanging[0])
    assert await world.claim(offer(probes=2)) == [], "the end of one that hung makes no room for a probe"
    await world.fail(probes[0])
    assert len(await world.claim(offer(probes=2))) == 1
    assert len(await world.claim(OFFER)) == 2, "tried no more"
    assert (await claims(world, offer(probes=3))).waits == {}


@pytest.mark.promise("D1", "F3", "Q6")
async def test_probes_take_slots_and_find_none_if_none_is_free(world: World) -> None:
    await world.run("h", "hangs")
    await fill(world, 2)
    assert await world.claim(offer(limit=1, probes=1)) == []
    (probe,) = await world.claim(offer(limit=2, probes=1))
    assert await world.claim(Offer(ROUTE, "stub", 2)) == []
    await world.complete(probe)
    assert len(await world.claim(Offer(ROUTE, "stub", 2))) == 1


@pytest.mark.promise("D1", "F3")
async def test_a_daemon_with_an_older_record_probes_nothing(world: World) -> None:
    await fill(world, 2)
    assert await world.claim(offer(probes=1, known=1)) == []
    (probe,) = await world.claim(offer(probes=1, known=0))
    await world.store.put_provider_record("stub", 0, b"left alone", world.clock.now(), tell=True)
    await world.fail(probe)
    assert await world.claim(offer(probes=1, known=0)) == []
    assert (await world.enqueue("new", "free", [offer(probes=1, known=0)])).claim is None
    assert await world.claim_ids(offer(probes=1, known=1)) == ["r1"]


@pytest.mark.promise("D1", "D2", "F3")
async def test_a_probe_that_its_daemon_left_takes_no_place(world: World) -> None:
    await fill(world, 1)
    assert await world.claim_ids(offer(probes=1)) == ["r0"]
    await world.crash()
    assert await world.claim_ids(offer(probes=1)) == ["r0"]
    assert await world.claim_ids(offer(probes=1)) == []


@pytest.mark.promise("D1", "F3")
async def test_a_probe_that_waits_for_its_next_try_is_a_probe_only_while_it_runs(world: World) -> None:
    await fill(world, 1)
    (probe,) = await world.claim(offer(probes=1))
    await world.retry(probe, after=1.0)
    world.clock.forward(2.0)
    await world.expire()
    (usual,) = await world.claim(OFFER)
    await world.enqueue("next", "other")
    assert await world.claim_ids(offer(probes=1)) == ["next"]
    await world.complete(usual)
    assert await world.claim_ids(offer(probes=1)) == []


@pytest.mark.promise("D1", "F5")
async def test_so_many_calls_begin_in_a_minute_at_once_and_then_evenly(world: World) -> None:
    await fill(world, 6)
    first = await claims(world, offer(requests=3))
    assert len(first.started) == 3
    for claim in first.started:
        await world.complete(claim)
    again = await claims(world, offer(requests=3))
    assert (again.started, again.waits) == ((), {"stub": microseconds(20)})
    assert (await world.enqueue("new", "free", [offer(requests=3)])).claim is None
    world.clock.forward(20.0)
    assert len((await claims(world, offer(requests=3))).started) == 1
    world.clock.forward(600.0)
    assert len((await claims(world, offer(requests=2))).started) == 2, "no more than a minute's worth"


@pytest.mark.promise("D1", "F5")
async def test_a_request_that_runs_at_once_counts_in_its_minute(world: World) -> None:
    terms = offer(requests=2)
    assert (await world.enqueue("a", "one", [terms])).claim is not None
    assert (await world.enqueue("b", "two", [terms])).claim is not None
    assert (await world.enqueue("c", "three", [terms])).claim is None


@pytest.mark.promise("D1", "F5")
async def test_tokens_are_guessed_before_and_put_right_after(world: World) -> None:
    terms = offer(tokens=1_000)
    body = b"x" * 7_000
    first = (await world.enqueue("a", "one", [terms], body=body)).claim
    assert first is not None
    await world.enqueue("b", "two", body=body)
    late = await claims(world, terms)
    assert (late.started, late.waits["stub"]) == ((), microseconds(60.06))
    await world.complete(first, usage=Usage(input_tokens=300, output_tokens=100))
    (second,) = (await claims(world, terms)).started
    await world.complete(second, usage=Usage(input_tokens=600, output_tokens=500))
    await world.enqueue("c", "three")
    assert (await claims(world, terms)).started == ()
    world.clock.forward(31.0)
    assert len((await claims(world, terms)).started) == 1


@pytest.mark.promise("D1", "F5", "T1")
async def test_an_estimate_stays_without_a_report(world: World) -> None:
    terms = offer(tokens=1_000)
    claim = (await world.enqueue("a", "one", [terms], body=b"x" * 7_000)).claim
    assert claim is not None
    await world.fail(claim)
    await world.enqueue("b", "two")
    assert (await claims(world, terms)).waits == {"stub": microseconds(60.06)}


@pytest.mark.promise("D1", "F5", "Q6")
async def test_a_minute_that_is_used_up_delays_no_other_provider(world: World) -> None:
    await fill(world, 1)
    other = Offer("other", "another", 10)
    await claims(world, offer(requests=1))
    await world.enqueue("late", "two")
    await world.enqueue("free", "three", route="other")
    found = await claims(world, offer(requests=1), other)
    assert [claim.request_id for claim in found.started] == ["free"]
    assert found.waits == {"stub": microseconds(60)}
