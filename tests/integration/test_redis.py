"""Several daemons on one Redis or Valkey server: they share queue, locks and results, and survive each other and it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ksi.clock import Chance, SystemClock, microseconds
from ksi.daemon.daemon import Daemon
from ksi.store.redis.address import Address
from ksi.store.redis.store import RedisStore
from ksi.store.values import NewRequest, StoreRules
from ksi.testing import running_daemon
from tests.conformance.chain_parts import member
from tests.daemon_process import make_home, start_in_vain
from tests.integration.redis_team import LEASE, check_runs, team
from tests.integration.wire import Json, Wire, in_state, until
from tests.redis_server import RedisServer, cluster, running, watched

AOF = ("--appendonly", "yes", "--appendfsync", "always")


def url_of(server: RedisServer, namespace: str) -> str:
    """A namespace of a test's own."""
    return f"{server.url}?namespace={namespace}"


async def submit(wire: Wire, request_id: str, **data: object) -> Json:
    """Submit a request that runs until it is stopped."""
    return await wire.ask("completion:async", request_id=request_id, prompt="hello", **{"model": "slow/echo", **data})


@pytest.mark.promise("D1", "R1")
async def test_a_request_of_one_daemon_is_waited_for_and_cancelled_at_another(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    with team(tmp_path, url_of(redis_server, "cancel"), 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await submit(here, "long")
            waiting = there.post("completion:wait", {"request_id": "long"})
            cancelled = await there.ask("completion:cancel", request_id="long")
            assert cancelled["status"] == "cancelled"
            assert (await waiting)["data"]["status"] == "cancelled"
            assert (await here.pushed("completion:result", request_id="long"))["status"] == "cancelled"


@pytest.mark.promise("D1", "L1", "L2")
async def test_a_conversation_has_one_holder_over_all_daemons(redis_server: RedisServer, tmp_path: Path) -> None:
    with team(tmp_path, url_of(redis_server, "holder"), 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await submit(here, "first", session_id="talk")
            reply = await submit(there, "second", session_id="talk")
            assert (reply["status"], reply["position"], reply["holder"]) == ("queued", 0, "first")
            lock = await there.ask("conversation:acquire_lock", request_id="lock", conversation_id="talk")
            assert (lock["acquired"], lock["position"]) == (False, 2)
            await here.ask("completion:cancel", request_id="first")
            await in_state(there, "second", "running")
            await here.ask("completion:cancel", request_id="second")
            locked = await there.pushed("conversation:locked", request_id="lock")
            assert locked["conversation_id"] == "talk"


@pytest.mark.promise("D2", "Q3")
async def test_a_daemon_that_dies_loses_its_runs_to_another_one(redis_server: RedisServer, tmp_path: Path) -> None:
    with team(tmp_path, url_of(redis_server, "dies"), 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await submit(here, "long", session_id="talk")
            await submit(there, "behind", session_id="talk", model="stub/echo")
            daemons.kill(0)
            again = await until(lambda: begun_again(there, "long"))
            assert again is not None
            assert [attempt["outcome"] for attempt in again["attempts"]] == ["interrupted"]
            assert (await there.ask("completion:get", request_id="behind"))["status"] == "queued"


async def begun_again(wire: Wire, request_id: str) -> Json | None:
    """The request, once it runs in another attempt than its first."""
    reply = await wire.ask("completion:get", request_id=request_id)
    return reply if reply["status"] == "running" and reply.get("attempts") else None


@pytest.mark.promise("D2", "L1", "L4")
async def test_a_daemon_that_was_stopped_beyond_its_lease_writes_nothing_when_it_goes_on(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    with team(tmp_path, url_of(redis_server, "stopped"), 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            delayed = {"model": "stub/echo", "provider_options": {"delay": LEASE}}
            await submit(here, "slow", session_id="talk", **delayed)
            stopped = asyncio.create_task(daemons.stop(0, 3 * LEASE))
            reply = await in_state(there, "slow", "completed")
            await stopped
            assert [attempt["outcome"] for attempt in reply["attempts"]][:2] == ["interrupted", "completed"]
            # Its own answer, if it brought one, is kept outside the trail and belongs to no request.
            await in_state(here, "slow", "completed")
            session = await here.ask("completion:session_status", session_id="talk")
            assert session["turns"] == 1
            assert (await submit(here, "next", model="stub/echo", session_id="talk"))["status"] in ("ready", "queued")
            await in_state(there, "next", "completed")


async def idle(wire: Wire) -> bool:
    """True if none waits or runs."""
    figures = await wire.ask("completion:queue_status")
    return not any(figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked"))


@pytest.mark.promise("D3", "Q3")
async def test_a_server_that_is_killed_and_comes_back_has_all_that_was_acknowledged(tmp_path: Path) -> None:
    with running(*AOF) as server, team(tmp_path, server.url, 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            options = {"delay": 0.02}
            asked = [
                here.post(
                    "completion:async",
                    {
                        "request_id": f"r{number}",
                        "prompt": "hello",
                        "session_id": f"t{number % 20}",
                        "provider_options": options,
                    },
                )
                for number in range(300)
            ]
            await asked[100]
            server.kill()
            server.start()
            replies = await asyncio.gather(*asked)
            assert not [reply for reply in replies if "error" in reply]
            await until(lambda: idle(there), patience=60)
            answers = {
                f"r{number}": await there.ask("completion:get", request_id=f"r{number}") for number in range(300)
            }
            check_runs(daemons.record, answers)


@pytest.mark.promise("D1")
async def test_a_daemon_serves_from_a_cluster_of_three() -> None:
    with cluster(3) as url:
        settings = {"store": {"url": f"{url}?namespace=team"}}
        async with running_daemon(settings=settings) as daemon:
            await ask_once(daemon)


@pytest.mark.promise("D3", "L1")
async def test_daemons_go_on_with_a_replica_that_took_over(tmp_path: Path) -> None:
    with watched() as (url, master), team(tmp_path, url, 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            before = await here.ask("conversation:acquire_lock", request_id="before", conversation_id="talk")
            await here.ask("completion:request", prompt="hello", request_id="first")
            replicated = master.ask("WAIT", "1", "5000")
            assert replicated.startswith(b":1"), replicated
            asked = [
                wire.post("completion:async", work(number))
                for wire in (here, there)
                for number in range(int(wire is there), 200, 2)
            ]
            await asked[20]
            master.kill()
            reply = await until(lambda: answered(there), patience=30)
            assert reply is not None
            assert reply["result"] == "echo: again"
            assert (await there.ask("completion:get", request_id="first"))["status"] == "completed"
            # Changes that the replica had not received are lost; a client that asks again gets the record, or a new
            # run.
            for number in range(200):
                done = await there.ask("completion:request", **work(number))
                assert (done["status"], done["result"]) == ("completed", f"echo: number {number}")
            await until(lambda: idle(here))
            figures = await here.ask("completion:queue_status")
            assert (figures["completed"], figures["locked_conversations"]) == (202, 1)
            lock = await there.ask("conversation:acquire_lock", request_id="after", conversation_id="other")
            assert lock["fence"] > before["fence"]


def work(number: int) -> Json:
    """A request of many."""
    return {
        "request_id": f"r{number}",
        "prompt": f"number {number}",
        "session_id": f"talk-{number % 20}",
        "provider_options": {"delay": 0.02},
    }


async def answered(wire: Wire) -> Json | None:
    """A request's reply, once the store is there again."""
    reply = await wire.post("completion:request", {"prompt": "again"})
    return None if "error" in reply else reply["data"]


async def ask_once(daemon: Daemon) -> None:
    """One request, from asking to its answer."""
    async with await Wire.open(daemon.config.socket_path) as wire:
        reply = await wire.ask("completion:request", prompt="hello", model="stub/echo")
        assert (reply["status"], reply["result"]) == ("completed", "echo: hello")


@pytest.mark.promise("C3", "D2")
async def test_an_end_that_a_daemon_left_unrouted_is_routed_by_one_that_has_nothing_to_do(
    redis_server: RedisServer,
) -> None:
    url, now = url_of(redis_server, "unrouted"), SystemClock().now()
    settings: Json = {"store": {"url": url}, "queue": {"lease": LEASE}}
    request = NewRequest(
        request_id="one",
        conversation="talk",
        body=b'{"prompt": "hello", "injection_config": {"target_sessions": ["there"], "mode": "next"}}',
        route="stub",
        rank=now.wall,
        model="stub/echo",
        due=now.wall + microseconds(3600),
        chain=member(injects=True),
    )
    async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        gone = RedisStore(Address(url), StoreRules(), Chance(), daemon="gone", node="gone")
        await gone.open(now, lambda: None)
        await gone.enqueue(request, [], now)
        await gone.cancel("one", now)
        await gone.leave()
        found = await until(lambda: delivered(wire))
        assert [(one["injection_id"], one["target"]) for one in found] == [("one/1", "there")]


async def delivered(wire: Wire) -> list[Json]:
    """All deliveries."""
    page = await wire.ask("injection:status")
    found: list[Json] = page["injections"]
    return found


@pytest.mark.promise("D1")
async def test_a_wrong_address_stops_the_start_with_its_place(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", '[store]\nurl = "redis+sentinel://localhost"\n')
    done = start_in_vain(home)
    assert done.returncode != 0
    assert "which service" in done.stderr


@pytest.mark.promise("L4", "L5")
async def test_an_outside_lock_lapses_by_the_server_s_clock_and_the_next_one_has_it(redis_server: RedisServer) -> None:
    settings: Json = {"store": {"url": url_of(redis_server, "lapse")}, "lock": {"expiry": 0.5}}
    async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        first = await wire.ask("conversation:acquire_lock", request_id="first", conversation_id="talk")
        assert first["acquired"] is True
        second = await wire.ask("conversation:acquire_lock", request_id="second", conversation_id="talk")
        assert second["state"] == "queued"
        locked = await wire.pushed("conversation:locked", request_id="second")
        assert locked["fence"] > first["fence"]


@pytest.mark.promise("R5")
async def test_a_daemon_that_has_the_server_for_itself_saves_a_checkpoint(redis_server: RedisServer) -> None:
    settings = {"store": {"url": url_of(redis_server, "checkpoint")}}
    async with running_daemon(settings=settings) as daemon, await Wire.open(daemon.config.socket_path) as wire:
        await wire.ask("completion:request", prompt="hello", request_id="one")
        saved = await wire.ask("checkpoint:collect")
        assert saved["requests"] == 1
