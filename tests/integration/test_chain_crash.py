"""A daemon with chains in it is killed again and again; every result reaches each of its targets once (C3)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.effort import effort
from tests.integration.crash_load import AWAY
from tests.integration.weather import weather
from tests.integration.wire import Json, Refused, Wire, answer, until
from tests.tally import PROPERTY, Tally, summed

KILLS = effort(8, 70)
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
        """Sent requests, by id; including those that were perhaps not accepted."""
        self.acknowledged: set[str] = set()
        self.acks = 0
        self.away = 0
        """How often the daemon said that its store is away or full."""
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
            for name in self.roots.keys() - self.acknowledged:
                await self.submit(wires[0], name)
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
            name = data["request_id"]
            self.roots[name] = data
            if await self.submit(wire, name) and self._dice.random() < 0.1:
                await self._try(wire, "completion:cancel", {"request_id": name})
            await asyncio.sleep(self._dice.uniform(0, 0.03))  # the pace of the load: nothing waits for it

    async def submit(self, wire: Wire, name: str) -> bool:
        """Ask for a root that may or may not have been taken in; True if it is now."""
        if await self._try(wire, "completion:async", self.roots[name]):
            self.acknowledged.add(name)
            self.acks += 1
            self.more.set()
        return name in self.acknowledged

    async def _try(self, wire: Wire, event: str, data: Json) -> bool:
        """Send an event; False if the store is away or full."""
        try:
            await answer(wire.post(event, data))
        except Refused as error:
            if error.code not in AWAY or not error.retryable:
                raise
            self.away += 1
            return False
        return True

    async def reach(self, acks: int) -> None:
        """Wait until so many were taken in."""
        while self.acks < acks:
            self.more.clear()
            await self.more.wait()


@pytest.mark.timeout(effort(240, 1_200))
@pytest.mark.promise("C2", "C3", "C6", "O4", "Q3")
async def test_after_many_kills_every_result_reached_each_of_its_targets_once(
    tmp_path: Path, dice: random.Random, record_property: Callable[[str, object], None]
) -> None:
    load, tally = Load(dice), Tally()
    with weather(tmp_path, CONFIG, dice, tally) as sky:
        for _ in range(KILLS):
            await sky.life(load, ROOTS_IN_A_LIFE, longest=0.1)
        async with sky.last_life() as path, await Wire.open(path) as wire:
            await finish(wire, load)
            followed = await check_chains(wire, tally, load)
    record_property(PROPERTY, tally.counts)
    print(f"{summed([tally.counts])}; {len(load.roots)} chains, {followed} deliveries")
    tally.check()
    assert followed > KILLS


async def finish(wire: Wire, *loads: Load) -> None:
    """Repeat unacknowledged requests, then wait until none waits, none runs, and every end is routed."""
    for load in loads:
        for name in load.roots.keys() - load.acknowledged:
            assert await load.submit(wire, name)
    before: Json = {}

    async def still() -> bool:
        nonlocal before
        figures = await wire.ask("completion:queue_status")
        quiet = not any(figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked"))
        same, before = figures == before, figures
        return quiet and same

    await until(still, patience=60)


async def check_chains(wire: Wire, tally: Tally, *loads: Load) -> int:
    """Each root of the loads ended and went to each of its targets once; how many deliveries there are."""
    sent = await all_deliveries(wire, tally)
    members: set[str] = set()
    for load in loads:
        tally.acknowledged += len(load.acknowledged)
        for name, data in load.roots.items():
            if await check_root(wire, name, data, sent, tally):
                members |= await check_chain(wire, name, sent, tally)
    tally.orphans += [f"the deliveries of {name}" for name in sent.keys() - members]
    figures = await wire.ask("completion:queue_status")
    tally.orphans += ["a lock"] * figures["locked_conversations"]
    return sum(map(len, sent.values()))


async def all_deliveries(wire: Wire, tally: Tally) -> dict[str, dict[str, Json]]:
    """Every delivery, by the request whose result it is, then by id."""
    found: dict[str, dict[str, Json]] = defaultdict(dict)
    cursor: Json = {}
    while True:
        page = await wire.ask("injection:status", limit=500, **cursor)
        for one in page["injections"]:
            known = found[one["parent_request_id"]]
            tally.doubled += [f"the delivery {one['injection_id']}"] * (one["injection_id"] in known)
            known[one["injection_id"]] = one
        if "cursor" not in page:
            return found
        cursor = {"cursor": page["cursor"]}


async def check_root(wire: Wire, name: str, data: Json, sent: dict[str, dict[str, Json]], tally: Tally) -> bool:
    """It ended, and its end went to each of its targets once; False if it is lost."""
    whole = await wire.post("completion:get", {"request_id": name})
    if "error" in whole or whole["data"]["status"] not in FINAL:
        tally.lost.append(name)
        return False
    targets = data["injection_config"]["target_sessions"]
    wanted = {f"{name}/{n}": target for n, target in enumerate(targets, 1)}
    mine = {number: one["target"] for number, one in sent[name].items()}
    tally.lost += [f"the delivery {number}" for number in wanted.keys() - mine.keys()]
    tally.doubled += [f"the delivery {number}" for number in mine.keys() - wanted.keys()]
    assert all(wanted.get(number, target) == target for number, target in mine.items())
    assert {one["mode"] for one in sent[name].values()} <= {data["injection_config"]["mode"]}
    return True


async def check_chain(wire: Wire, name: str, sent: dict[str, dict[str, Json]], tally: Tally) -> set[str]:
    """Its figures are its members', each delivery has the state of its carrier, and each reply was sent back.

    Returns the ids of its members.
    """
    status = await wire.ask("circuit_breaker:status", chain_id=name, members=True)
    figures, requests = status["chain"], {one["request_id"]: one for one in status["requests"]}
    assert figures["tokens_reserved"] == 0
    tally.lost += [f"the end of {figures['unfinished']} in {name}"] * (figures["unfinished"] > 0)
    assert figures["members"] + figures["guard_messages"] == len(requests), "notices are listed and are no members"
    assert figures["tokens_used"] == sum(one["tokens"] for one in requests.values())
    for parent in requests:
        for number, one in sent.get(parent, {}).items():
            await check_delivery(wire, number, one, requests)
    return set(requests)


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
