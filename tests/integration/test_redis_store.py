"""Features of the store on Redis alone: repeated calls, leases, layouts, addresses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from ksi.clock import Chance
from ksi.errors import ConfigError, ConversationBusy, InternalError, StoreUnavailable, StoreVersion
from ksi.request import OnBusy, State
from ksi.store.redis.address import Address
from ksi.store.redis.library import LAYOUT
from ksi.store.redis.link import BUNDLE, Bundle, Call, Link
from ksi.store.redis.store import RedisStore
from ksi.store.usage import UsageQuery
from ksi.store.values import StoreRules
from tests.conformance.world import OFFER, RedisHome, World
from tests.integration.cable import cable
from tests.integration.wire import until
from tests.redis_server import RedisServer, running

RING = 64
"""Answers that the server keeps of each life."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer) -> AsyncIterator[World]:
    """An open store in a namespace of its own."""
    made = World(RedisHome(redis_server.url), StoreRules())
    await made.open()
    yield made
    await made.store.close()


def note_bundles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Link, Bundle]]:
    """The changes that are sent from now on."""
    sent: list[tuple[Link, Bundle]] = []
    take = Link._next

    def note(link: Link) -> Call | None:
        call = take(link)
        if isinstance(call, Bundle):
            sent.append((link, call))
        return call

    monkeypatch.setattr(Link, "_next", note)
    return sent


@pytest.mark.promise("T1")
async def test_an_account_of_many_pages_counts_each_attempt_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksi.store.redis.reads._ACCOUNT_PAGE", 2)
    for number in range(5):
        await world.complete(await world.run(f"r{number}"))
    report = await world.store.usage(UsageQuery(since=0, until=2**62), lambda *_: ())
    assert (report.total.attempts, report.total.requests) == (5, 5)


@pytest.mark.promise("D3", "F10")
async def test_a_call_that_is_sent_again_is_answered_as_the_first_time_and_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = note_bundles(monkeypatch)
    claim = await world.run("a")
    await world.enqueue("b")
    await world.acquire("lock", "other")
    await world.complete(claim)
    (again,) = await world.claim()
    await world.retry(again)
    await world.release("lock")
    monkeypatch.undo()
    totals = await world.store.totals()
    views = [await world.store.get(name) for name in "ab"]
    for link, bundle in sent:
        for change, answer in zip(bundle.changes, await link.submit(*bundle.command), strict=True):
            first = await change.future
            # Bodies of claims do not come twice: they are asked for by themselves.
            assert answer == (first[0] if isinstance(first, list) else first)
    assert await world.store.totals() == totals
    assert [await world.store.get(name) for name in "ab"] == views


@pytest.mark.promise("D3")
async def test_a_claim_whose_answer_was_lost_brings_its_bodies_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.enqueue("a", body=b'{"prompt":"hello"}')
    take = Link._next

    def lose(link: Link) -> Call | None:
        call = take(link)
        if not isinstance(call, Bundle) or call.sent or call.changes[0].verb != "claim":
            return call
        call.sent = 1
        link._queue.appendleft(call)
        return Call(call.command, asyncio.get_running_loop().create_future(), call.until)

    monkeypatch.setattr(Link, "_next", lose)
    (claim,) = await world.claim()
    assert (claim.request_id, claim.body) == ("a", b'{"prompt":"hello"}')
    assert await world.state("a") is State.RUNNING


@pytest.mark.promise("D3", "Q3")
async def test_a_late_write_after_its_own_repetition_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = note_bundles(monkeypatch)
    claim = await world.run("a")
    monkeypatch.undo()
    await world.complete(claim)
    await world.enqueue("b")
    for _ in range(2):
        for link, bundle in sent:
            await link.submit(*bundle.command)
        assert await world.state("b") is State.QUEUED, "nobody would run it"
        for _ in range(RING):
            await world.renew()


@pytest.mark.promise("D3", "Q3")
async def test_a_claim_that_found_nothing_takes_nothing_when_it_comes_once_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = note_bundles(monkeypatch)
    assert await world.claim() == []
    monkeypatch.undo()
    await world.enqueue("a")
    for link, bundle in sent:
        await link.submit(*bundle.command)
    assert await world.state("a") is State.QUEUED, "nobody would run it"


@pytest.mark.promise("D3")
async def test_a_refusal_stands_though_the_call_comes_once_more_when_it_could_be_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = await world.run("a")
    sent = note_bundles(monkeypatch)
    with pytest.raises(ConversationBusy):
        await world.enqueue("b", on_busy=OnBusy.REJECT)
    monkeypatch.undo()
    await world.complete(claim)
    for link, bundle in sent:
        await link.submit(*bundle.command)
    assert await world.store.get("b") is None


@pytest.mark.promise("D3", "Q3")
async def test_a_call_that_may_have_been_served_is_asked_until_a_server_that_refuses_it_says() -> None:
    with running() as server, cable(server) as line:
        world = World(RedisHome(f"redis://127.0.0.1:{line.port}"), StoreRules())
        await world.open()
        await world.enqueue("a")
        line.mute()
        claiming = asyncio.create_task(world.claim())
        await until(lambda: runs(server))
        server.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        line.cut()
        line.mend()
        await until(lambda: refuses(world))
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            await world.enqueue("b")
        assert not claiming.done()
        server.ask("CONFIG", "SET", "min-replicas-to-write", "0")
        (claim,) = await claiming
        await world.complete(claim)
        await world.store.close()


async def refuses(world: World) -> bool:
    """True if the server has refused a call that may have been executed."""
    assert isinstance(world.store, RedisStore)
    return "NOREPLICAS" in world.store._links[0].trouble


async def runs(server: RedisServer) -> bool:
    """True if the server has a running request."""
    keys = server.ask("KEYS", "{ksi:*}:runs:*")
    return not keys.startswith(b"*0")


@pytest.mark.promise("D1")
async def test_requests_of_one_moment_go_in_few_calls(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = note_bundles(monkeypatch)
    await asyncio.gather(*(world.enqueue(f"r{number}", f"talk {number}") for number in range(3 * BUNDLE + 1)))
    assert [len(bundle.changes) for _, bundle in sent] == [BUNDLE, BUNDLE, BUNDLE, 1]
    assert (await world.store.totals()).queued == 3 * BUNDLE + 1
    assert [claim.request_id for claim in await world.claim(limit=2)] == ["r0", "r1"]


@pytest.mark.promise("D1", "Q3")
async def test_one_of_a_bundle_that_fails_in_the_interpreter_changes_nothing_of_the_others(world: World) -> None:
    claim, tried = await world.run("a"), await world.run("d", "talk d")
    assert isinstance(world.store, RedisStore)
    calls = world.store._calls
    await calls.plain("SET", f"{calls.namespace}:r:{'7' * 16}", "no record")
    broken = msgspec.structs.replace(claim, key=int("7" * 16))
    first, before, wrong, after, last = await asyncio.gather(
        world.retry(tried),
        world.enqueue("b", "talk b"),
        world.complete(broken),
        world.complete(claim),
        world.enqueue("c", "talk c"),
        return_exceptions=True,
    )
    assert isinstance(wrong, InternalError)
    for outcome in (first, before, after, last):
        assert not isinstance(outcome, BaseException), outcome
    assert [await world.state(name) for name in "abc"] == [State.COMPLETED, State.QUEUED, State.QUEUED]
    assert len(await world.claim()) == 2
    assert len((await world.view("d")).attempts) == 1


@pytest.mark.promise("D2", "L1")
async def test_a_life_that_was_declared_dead_loses_its_runs_and_begins_another(redis_server: RedisServer) -> None:
    url = f"{redis_server.url}?namespace={uuid.uuid4().hex}"
    one, two = (World(RedisHome(redis_server.url), StoreRules()) for _ in range(2))
    two.clock = one.clock
    for world, name in ((one, "one"), (two, "two")):
        world.store = RedisStore(
            Address(url), StoreRules(), Chance(), daemon=name, node=name, lease=1_000_000, hand=True
        )
        await world.open()
    claim = await one.run("a")
    one.clock.forward(2)
    # Its own lease is over too: everybody gets the time of one to say that he is there.
    await two.renew()
    assert await two.state("a") is State.RUNNING
    for _ in range(2):
        one.clock.forward(0.9)
        await two.renew()
    assert await two.state("a") is State.QUEUED
    assert await one.renew() == (claim.key,)
    assert (await one.complete(claim)).fenced
    (again,) = await two.claim(OFFER)
    await two.complete(again)
    assert [attempt.outcome for attempt in (await one.view("a")).attempts] == ["interrupted", "fenced", "completed"]
    assert (await one.run("b", "other")).attempt == 1
    for world in (one, two):
        await world.store.close()


@pytest.mark.promise("D1")
async def test_another_layout_is_refused(redis_server: RedisServer) -> None:
    world = World(RedisHome(redis_server.url), StoreRules())
    await world.open()
    assert isinstance(world.store, RedisStore)
    calls = world.store._calls
    await calls.plain("HSET", f"{calls.namespace}:meta", "layout", 99)
    with pytest.raises(StoreVersion, match="holds layout 99"):
        await world.crash()


@pytest.mark.promise("D1", "D2")
async def test_an_older_layout_is_taken_over_when_its_daemons_are_gone(redis_server: RedisServer) -> None:
    home = RedisHome(redis_server.url)
    one, two = World(home, StoreRules()), World(home.beside("there"), StoreRules())
    two.clock = one.clock
    await one.open()
    assert isinstance(one.store, RedisStore)
    calls = one.store._calls
    await calls.plain("HSET", f"{calls.namespace}:meta", "layout", LAYOUT - 1)
    with pytest.raises(StoreVersion, match=f"holds layout {LAYOUT - 1}.*stop the daemons"):
        await two.open()
    one.clock.forward(31)  # its lease is over
    await two.open()
    assert await calls.plain("HGET", f"{calls.namespace}:meta", "layout") == str(LAYOUT).encode()
    await two.store.close()
    await one.home.crash(one.store)


async def test_a_server_that_asks_for_a_password_is_distinguished_from_one_that_is_away(
    redis_server: RedisServer,
) -> None:
    redis_server.ask("ACL", "SETUSER", "guarded", "on", ">secret", "~*", "&*", "+@all")
    url = f"unix://guarded:wrong@{redis_server.socket}"
    world = World(RedisHome(url), StoreRules())
    with pytest.raises(StoreUnavailable, match="user and password") as refused:
        await world.open()
    assert "wrong@" not in refused.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:7000/2?namespace=team", "redis://***@host:7000/2?namespace=team"),
        ("rediss://host", "rediss://host"),
        ("redis+sentinel://:secret@a:1,b/team/3", "redis+sentinel://***@a:1,b/team/3"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("unix:///run/redis.sock?db=3", "unix:///run/redis.sock?db=3"),
    ],
)
@pytest.mark.promise("S3")
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert str(Address(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:pa/SECRET@host/0",
        "redis://user:[SECRET@host/0",
        "redis://user:SECRET@host:port/0",
        "redis://host/0?password=SECRET&no_such_option=SECRET",
        "redis://host/0?socket_timeout=SECRET",
        "redis+sentinel://user:pa/SECRET@host/team/x",
    ],
)
@pytest.mark.promise("S3", "U4")
def test_an_address_that_cannot_be_used_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^store\.url: ") as refused:
        Address(url)
    assert "SECRET" not in refused.value.message


@pytest.mark.parametrize(
    "url",
    ["http://host", "redis+sentinel://host", "redis://host?namespace={a}", "redis://h:port", "redis+cluster://h:port"],
)
def test_an_address_that_cannot_be_read_says_so(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url"):
        Address(url)
