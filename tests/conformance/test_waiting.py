"""How many requests wait, by priority."""

from __future__ import annotations

import pytest

from ksi.request import Priority
from ksi.store.redis.store import RedisStore
from tests.conformance.world import World


@pytest.mark.promise("V3")
async def test_waiting_requests_are_counted_by_priority(world: World) -> None:
    if isinstance(world.store, RedisStore):
        assert await world.store.waiting_by_priority() is None
        return
    assert await world.store.waiting_by_priority() == {}
    await world.run("running", priority=Priority.LOW)
    await world.enqueue("queued", priority=Priority.HIGH)
    await world.enqueue("scheduled", "other", priority=Priority.HIGH, due=world.clock.wall + 1)
    await world.retry(await world.run("retrying", "third", priority=Priority.LOW))
    await world.fail(await world.run("failed", "fifth", priority=Priority.CRITICAL))
    await world.give_back(await world.run("given back", "fourth", priority=Priority.CRITICAL))
    await world.acquire("waiter")
    counted = await world.store.waiting_by_priority()
    assert counted == {Priority.HIGH: 2, Priority.LOW: 1, Priority.CRITICAL: 1}
