"""Every test here runs over every store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.store.values import StoreRules
from tests.conformance.world import Home, MemoryHome, RedisHome, SqliteHome, World, check

StoreFactory = Callable[..., Awaitable[World]]


@pytest.fixture(params=["memory", "sqlite", "redis"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """The place of one kind of store's data."""
    if request.param == "redis":
        return RedisHome(request.getfixturevalue("redis_server").url)
    return MemoryHome() if request.param == "memory" else SqliteHome(tmp_path)


@pytest_asyncio.fixture
async def store_factory(home: Home) -> AsyncIterator[StoreFactory]:
    """Makes an open store by the rules it is given. When the test is over, the invariants must hold in it."""
    worlds: list[World] = []

    async def make(**rules: Any) -> World:
        world = World(home, StoreRules(**rules))
        await world.open()
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        await check(world.store, pruned=world.pruned)
        await world.store.close()


@pytest_asyncio.fixture
async def world(store_factory: StoreFactory) -> World:
    """An open store by the usual rules."""
    return await store_factory()
