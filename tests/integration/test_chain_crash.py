"""A daemon with chains in it is killed again and again; every result reaches each of its targets once (C3)."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Json, Wire, answer, until

KILLS = 30
ROOTS_IN_A_LIFE = 12
BACKLOG = 40
FINAL = {"completed", "failed", "cancelled", "blocked", "expired"}

CONFIG = """\
[service]
default_model = "stub/echo"

[retry]
initial_delay = 0.05
max_delay = 0.1

[patterns]
enabled = false

[providers.stub]
kind = "stub"
max_concurrency = 6
"""


class Load:
    """Clients that begin chains without end."""

    def __init__(self, dice: random.Random, name: str = "root") -> None:
        """All requests' ids begin with `name`."""
        self._dice = dice
        self._name = name
        self._numbers = itertools.count(1)
        self.roots: dict[str, Json] = {}
        """What was sent, by id; also what was perhaps not taken in."""
        self.acks = 0
        self.more = asyncio.Event()

    def _compose(self) -> Json:
        dice, number = self._dice, next(self._numbers)
        targets = dice.sample([f"talk-{n}" for n in range(6)], dice.randint(1, 3))
        script: Json = {"delay": dice.choice((0.0, 0.0, 0.005, 0.05))}
        if dice.random() < 0.1:
            script["fail"] = "invalid_request"
        data: Json = {
            "request_id": f"{self._name}-{number}",
            "prompt": f"word {number}",
            "session_id": f"home-{dice.randrange(4)}",
            "provider_options": script,
            "injection_config": {
                "target_sessions": targets,
                "mode": dice.choice(("direct", "direct", "next")),
                "inherit": dice.choice((False, False, "reply")),
            },
            "circuit_breaker_config": {"max_depth": 2},
        }
        if dice.random() < 0.1:
            data["ttl"] = 0.02
        return data

    async def live(self, path: Path) -> None:
        """One life of the daemon, to its end."""
        wires = [await Wire.open(path) for _ in range(3)]
        try:
            for data in self.roots.values():
                await self._submit(wires[0], data)
            await asyncio.gather(*(self._ask_on(wire) for wire in wires))
        except ConnectionResetError:
            pass  # killed, as it should be
        finally:
            for wire in wires:
                await wire.leave()

    async def _ask_on(self, wire: Wire) -> None:
        while True:
            figures = await answer(wire.post("completion:queue_status", {}))
            if figures["queued"] > BACKLOG:
                continue
            data = self._compose()
            self.roots[data["request_id"]] = data
            await self._submit(wire, data)
            self.acks += 1
            self.more.set()
            if self._dice.random() < 0.1:
                await answer(wire.post("completion:cancel", {"request_id": data["request_id"]}))

    async def _submit(self, wire: Wire, data: Json) -> None:
        """Ask; again for what was asked before, which changes nothing where it was taken in."""
        await answer(wire.post("completion:async", data))

    async def reach(self, acks: int) -> None:
        """Wait until so many were taken in."""
        while self.acks < acks:
            self.more.clear()
            await self.more.wait()


@pytest.mark.timeout(240)
@pytest.mark.promise("C2", "C3", "C6", "Q3")
async def test_after_thirty_kills_every_result_reached_each_of_its_targets_once(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    process = DaemonProcess(make_home(tmp_path, CONFIG))
    request.addfinalizer(lambda: process.end(signal.SIGKILL))
    load = Load(dice)
    for _ in range(KILLS):
        process.spawn()
        assert await asyncio.to_thread(process.wait_ready)
        alive = asyncio.create_task(load.live(process.socket_path))
        reached = asyncio.create_task(load.reach(load.acks + ROOTS_IN_A_LIFE))
        await asyncio.wait((alive, reached), timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert reached.done(), alive
        await asyncio.sleep(dice.uniform(0, 0.1))  # the moment of the kill
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        async with asyncio.timeout(30):
            await alive
    with process:
        async with await Wire.open(process.socket_path) as wire:
            for data in load.roots.values():
                await answer(wire.post("completion:async", data))
            await finish(wire)
            sent = await all_deliveries(wire)
            for name, data in load.roots.items():
                await check_root(wire, name, data, sent)
                await check_chain(wire, name, sent)
    followed = sum(map(len, sent.values()))
    print(f"{len(load.roots)} chains, {followed} deliveries")
    assert followed > KILLS


async def finish(wire: Wire) -> None:
    """Wait until nothing waits, nothing runs, and every end is routed."""
    before: Json = {}

    async def still() -> bool:
        nonlocal before
        figures = await wire.ask("completion:queue_status")
        quiet = not any(figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked"))
        same, before = figures == before, figures
        return quiet and same

    await until(still, patience=60)


async def all_deliveries(wire: Wire) -> dict[str, dict[str, Json]]:
    """Every delivery, by the request whose result it is, then by id."""
    found: dict[str, dict[str, Json]] = defaultdict(dict)
    cursor: Json = {}
    while True:
        page = await wire.ask("injection:status", limit=500, **cursor)
        for one in page["injections"]:
            assert one["injection_id"] not in found[one["parent_request_id"]], "listed once"
            found[one["parent_request_id"]][one["injection_id"]] = one
        if "cursor" not in page:
            return found
        cursor = {"cursor": page["cursor"]}


async def check_root(wire: Wire, name: str, data: Json, sent: dict[str, dict[str, Json]]) -> None:
    """It ended, and its end went to each of its targets once."""
    reply = await wire.ask("completion:get", request_id=name)
    assert reply["status"] in FINAL, reply
    mine = sent[name]
    targets = data["injection_config"]["target_sessions"]
    assert [mine[f"{name}/{n}"]["target"] for n in range(1, len(targets) + 1)] == targets
    assert len(mine) == len(targets), mine
    assert {one["mode"] for one in mine.values()} == {data["injection_config"]["mode"]}


async def check_chain(wire: Wire, name: str, sent: dict[str, dict[str, Json]]) -> None:
    """Its figures are its members', each delivery is what became of its carrier, and each reply was sent back."""
    status = await wire.ask("circuit_breaker:status", chain_id=name, members=True)
    figures, requests = status["chain"], {one["request_id"]: one for one in status["requests"]}
    assert figures["unfinished"] == figures["tokens_reserved"] == 0
    assert figures["members"] == len(requests)
    assert figures["tokens_used"] == sum(one["tokens"] for one in requests.values())
    for parent in requests:
        for number, one in sent.get(parent, {}).items():
            await check_delivery(wire, number, one, requests)


async def check_delivery(wire: Wire, number: str, one: Json, requests: dict[str, Json]) -> None:
    if one["mode"] == "next":
        assert one["state"] in ("queued", "delivered"), one
        if one["state"] == "delivered":
            taker = await wire.ask("completion:get", request_id=one["request_id"])
            assert taker["status"] == "completed"
        return
    if one["state"] == "blocked":
        assert number not in requests
        return
    carrier = requests[number]
    assert (carrier["status"] == "completed") == (one["state"] == "delivered"), (carrier, one)
