"""Daemons on one store, of which one has its loop held for several leases."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from ksi.clock import Chance, SystemClock, microseconds
from ksi.daemon.daemon import Daemon
from ksi.errors import StoreError
from ksi.host import watchdog
from ksi.store.redis.address import Address
from ksi.store.redis.store import RedisStore
from ksi.store.values import StoreRules
from ksi.testing import running_daemon
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.loop_watch import daemon_in_thread
from tests.integration.wire import PATIENCE, Json, Wire, in_state, until
from tests.redis_server import RedisServer

LEASE = 2.0
LONG = 3 * LEASE
"""For so long the loop is held: several leases."""


def work(enough: threading.Event) -> None:
    """Hold a loop, as a long computation does."""
    while not enough.is_set():
        pass


def block(enough: threading.Event) -> None:
    """Hold a loop, as a call that waits does."""
    enough.wait()


class Server:
    """The server's records of the daemons' leases."""

    def __init__(self, redis: Redis, namespace: str) -> None:
        self._redis = redis
        self._key = f"{{ksi:{namespace}}}:lives"

    async def time(self) -> int:
        """Its clock, in microseconds."""
        seconds, micros = await self._redis.time()
        return int(seconds) * 1_000_000 + int(micros)

    async def lives(self) -> list[str]:
        """The lives that have a lease."""
        found = await self._redis.zrange(self._key, 0, -1)
        return [str(life) for life in found]

    async def passed(self, seconds: float) -> None:
        """Wait until so much time has passed there."""
        end = await self.time() + microseconds(seconds)

        async def over() -> bool:
            return await self.time() > end

        await until(over, patience=seconds + PATIENCE)


@asynccontextmanager
async def server_of(redis: RedisServer, namespace: str) -> AsyncIterator[Server]:
    client = Redis(unix_socket_path=str(redis.socket))
    try:
        yield Server(client, namespace)
    finally:
        await client.aclose()


def settings(redis: RedisServer, namespace: str, node: str, endpoint: ScriptedEndpoint) -> dict[str, dict[str, Any]]:
    return {
        "service": {"default_model": "up/m", "shutdown_grace": 0.0},
        "store": {"url": f"{redis.url}?namespace={namespace}", "node_id": node},
        "queue": {"lease": LEASE, "max_interruptions": 1_000},
        "providers": {
            "local": {"enabled": False},
            "up": {"kind": "openai", "base_url": f"{endpoint.url}/v1", "models": ["*"], "max_concurrency": 4},
        },
    }


async def _while_held(
    redis: RedisServer, namespace: str, hold: Callable[[threading.Event], None]
) -> tuple[Json, ScriptedEndpoint, Daemon]:
    """One daemon has a paid call under way when its loop is held. The end of the request, and the paid calls."""
    environ = {"OPENAI_API_KEY": "k"}
    async with (
        ScriptedEndpoint(Answer(pieces=("paid",), delay=1.0)) as endpoint,
        server_of(redis, namespace) as server,
        daemon_in_thread(settings(redis, namespace, "a", endpoint), environ) as (held, loop),
        running_daemon(settings=settings(redis, namespace, "b", endpoint), environ=environ) as other,
        await Wire.open(held.config.socket_path) as here,
        await Wire.open(other.config.socket_path) as there,
    ):
        waiting = here.post("completion:request", {"prompt": "x", "request_id": "r", "session_id": "talk"})
        await endpoint.wait_for_requests(1)
        enough = threading.Event()
        loop.call_soon_threadsafe(hold, enough)
        try:
            await server.passed(LONG)
        finally:
            enough.set()
        async with asyncio.timeout(PATIENCE):
            await waiting
        return await in_state(there, "r", "completed", "failed"), endpoint, held


@pytest.mark.promise("O9", "D2", "L4")
@pytest.mark.parametrize("hold", [work, block])
async def test_a_daemon_whose_loop_is_held_for_several_leases_keeps_its_runs_and_pays_once(
    redis_server: RedisServer, hold: Callable[[threading.Event], None]
) -> None:
    reply, endpoint, held = await _while_held(redis_server, f"held-{hold.__name__}", hold)
    assert (reply["status"], reply["result"]) == ("completed", "paid")
    assert [attempt["outcome"] for attempt in reply["attempts"]] == ["completed"]
    assert len(endpoint.requests) == 1
    stalls = held._watchdog.stalls
    assert stalls.count >= 1
    assert stalls.longest > LEASE


@pytest.mark.promise("O9", "D2", "L4")
async def test_a_loop_that_does_not_come_back_loses_its_runs_to_another_daemon(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GIVEN_UP", 0.0)
    reply, endpoint, _ = await _while_held(redis_server, "lost", block)
    assert reply["status"] == "completed"
    assert [attempt["outcome"] for attempt in reply["attempts"]][:2] == ["interrupted", "completed"]
    assert len(endpoint.requests) == 2


@asynccontextmanager
async def _store(redis: RedisServer, namespace: str, name: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(
        Address(f"{redis.url}?namespace={namespace}"),
        StoreRules(),
        Chance(),
        daemon=name,
        node=name,
        lease=microseconds(LEASE),
    )
    await store.open(SystemClock().now(), lambda: None)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.promise("D2", "L4")
async def test_a_lease_is_kept_from_a_thread_but_no_life_is_brought_back(redis_server: RedisServer) -> None:
    async with (
        server_of(redis_server, "keep") as server,
        _store(redis_server, "keep", "held") as held,
        _store(redis_server, "keep", "other") as other,
    ):
        mine, _ = await server.lives()
        assert held.lease is not None
        for _ in range(4):
            await server.passed(LEASE / 2)
            await asyncio.to_thread(held.lease.keep)
            await other.renew(SystemClock().now())
        assert mine in await server.lives(), "two leases long it was only kept"

        async def lost() -> bool:
            await other.renew(SystemClock().now())
            return mine not in await server.lives()

        await until(lost)
        await asyncio.to_thread(held.lease.keep)
        assert mine not in await server.lives()


@pytest.mark.promise("D3", "L4")
async def test_a_lease_is_kept_if_the_server_lost_its_functions_and_not_if_it_is_away(
    redis_server: RedisServer,
) -> None:
    async with server_of(redis_server, "flushed") as server, _store(redis_server, "flushed", "held") as held:
        assert held.lease is not None
        await server.passed(LEASE * 0.6)
        assert held.lease.late(asyncio.get_running_loop().time())
        await server._redis.function_flush()
        await asyncio.to_thread(held.lease.keep)
        assert not held.lease.late(asyncio.get_running_loop().time())
        (mine,) = await server.lives()
        assert mine
    assert not held.lease.late(float("inf"))
    await asyncio.to_thread(held.lease.keep)
    with pytest.raises(StoreError):
        await held.renew(SystemClock().now())
