"""What only the store on Redis has: calls that are sent again, lives, layouts, addresses."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from ksi.clock import Chance
from ksi.errors import ConfigError, StoreUnavailable, StoreVersion
from ksi.request import State
from ksi.store.redis import RedisStore
from ksi.store.redis_address import Address
from ksi.store.redis_link import Link
from ksi.store.values import StoreRules
from tests.conformance.world import OFFER, RedisHome, World
from tests.redis_server import RedisServer


@pytest_asyncio.fixture
async def world(redis_server: RedisServer) -> AsyncIterator[World]:
    """An open store in a namespace of its own."""
    made = World(RedisHome(redis_server.url), StoreRules())
    await made.open()
    yield made
    await made.store.close()


@pytest.mark.promise("D3", "F10")
async def test_a_call_that_is_sent_again_is_answered_as_the_first_time_and_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Link, tuple[Any, ...], Any]] = []
    submit = Link.submit

    def note(link: Link, *command: Any) -> Any:
        future = submit(link, *command)
        sent.append((link, command, future))
        return future

    monkeypatch.setattr(Link, "submit", note)
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
    for link, command, future in sent:
        first = await future
        answer = await link.submit(*command, "again")
        # Bodies of claims do not come twice: they are asked for by themselves.
        assert (answer[0] if isinstance(answer, list) else answer) == (first[0] if isinstance(first, list) else first)
    assert await world.store.totals() == totals
    assert [await world.store.get(name) for name in "ab"] == views


@pytest.mark.promise("D3")
async def test_a_claim_whose_answer_was_lost_brings_its_bodies_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.enqueue("a", body=b'{"prompt":"hello"}')
    submit = Link.submit

    def lose(link: Link, *command: Any) -> Any:
        if "_claim" in str(command[1]):
            submit(link, *command)
            return submit(link, *command, "again")
        return submit(link, *command)

    monkeypatch.setattr(Link, "submit", lose)
    (claim,) = await world.claim()
    assert (claim.request_id, claim.body) == ("a", b'{"prompt":"hello"}')
    assert await world.state("a") is State.RUNNING


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
    await two.store.renew(one.clock.now())
    assert await two.state("a") is State.RUNNING
    for _ in range(2):
        one.clock.forward(0.9)
        await two.store.renew(one.clock.now())
    assert await two.state("a") is State.QUEUED
    assert await one.store.renew(one.clock.now()) == (claim.key,)
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


async def test_a_server_that_asks_for_a_password_is_told_apart_from_one_that_is_away(redis_server: RedisServer) -> None:
    redis_server.ask("ACL", "SETUSER", "guarded", "on", ">secret", "~*", "&*", "+@all")
    url = f"unix://guarded:wrong@{redis_server.socket}"
    world = World(RedisHome(url), StoreRules())
    with pytest.raises(StoreUnavailable, match="user and password") as refused:
        await world.open()
    assert "wrong@" not in refused.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:7000/2?namespace=team", "redis://user@host:7000/2"),
        ("rediss://host", "rediss://host"),
        ("redis+sentinel://:secret@a:1,b/team/3", "redis+sentinel://@a:1,b/team/3"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("unix:///run/redis.sock?db=3", "unix:///run/redis.sock"),
    ],
)
@pytest.mark.promise("S3")
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert str(Address(url)) == shown


@pytest.mark.parametrize(
    "url",
    ["http://host", "redis+sentinel://host", "redis://host?namespace={a}", "redis://h:port", "redis+cluster://h:port"],
)
def test_an_address_that_cannot_be_read_says_so(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url"):
        Address(url)
