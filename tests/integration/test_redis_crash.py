"""Several daemons on one server are killed and stopped under load: nothing is lost, nothing done twice at a time."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from pathlib import Path

import pytest

from ksi.clock import Chance, SystemClock
from ksi.store.migrate import move
from ksi.store.redis import RedisStore
from ksi.store.redis_address import Address
from ksi.store.sqlite import SqliteStore
from ksi.store.values import StoreRules
from tests.integration.crash_load import (
    Load,
    check_database,
    check_ending,
    check_response_log,
    check_trail,
    finish,
)
from tests.integration.redis_team import LEASE, Team, check_record, team
from tests.integration.test_chain_crash import CONFIG as CHAIN_CONFIG
from tests.integration.test_chain_crash import Load as ChainLoad
from tests.integration.test_chain_crash import all_deliveries, check_chain, check_root
from tests.integration.test_chain_crash import finish as finish_chains
from tests.integration.test_crash import CONFIG
from tests.integration.wire import Json, Wire, answer
from tests.redis_server import RedisServer

DAEMONS = 3
CONVERSATIONS = 200
SUBMITTERS = 3
"""At each daemon."""

ACKS, ROOTS = 40, 12
"""Each daemon takes at least so much before harm is done to it."""

HARM = ("kill", "kill", "stop", "freeze")
"""What each daemon suffers, in an order of its own, and a kill at the end: stopped beyond its lease, or less."""

SHARED = """
[store]
url = "{url}"
node_id = "node-{number}"

[queue]
lease = {lease}
"""


def several(config: str) -> str:
    """The configuration of one daemon as a pattern for several."""
    assert "{" not in config
    return config.replace('"record.tsv"', '"../record.tsv"') + SHARED


async def suffer(daemons: Team, number: int, load: Load | ChainLoad, acks: int, dice: random.Random) -> None:
    """Kill and stop one daemon again and again while it is asked for more; at last it serves, and nobody asks it."""
    alive = asyncio.create_task(load.live(daemons.path(number)))
    for act in (*dice.sample(HARM, len(HARM)), "kill"):
        reached = asyncio.create_task(load.reach(load.acks + acks))
        await asyncio.wait((alive, reached), timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert reached.done(), alive
        await asyncio.sleep(dice.uniform(0, 0.3))  # the moment of the harm
        if act != "kill":
            await daemons.stop(number, 2 * LEASE if act == "stop" else LEASE / 10)
            continue
        daemons.kill(number)
        async with asyncio.timeout(30):
            await alive
        await asyncio.to_thread(daemons.daemons[number].start)
        alive = asyncio.create_task(load.live(daemons.path(number)))
    alive.cancel()
    await asyncio.gather(alive, return_exceptions=True)


@pytest.mark.timeout(300)
@pytest.mark.promise("D1", "D2", "Q1", "Q3", "Q4", "Q7", "F8", "F10", "L1", "R1", "R2", "R3", "T1")
async def test_daemons_that_are_killed_and_stopped_under_load_lose_nothing_and_do_nothing_twice(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    url = f"{redis_server.url}?namespace=crash"
    loads = [
        Load(random.Random(seed + number), f"crash-{number}", conversations=CONVERSATIONS, submitters=SUBMITTERS)
        for number in range(DAEMONS)
    ]
    with team(tmp_path, url, DAEMONS, several(CONFIG)) as daemons:
        await asyncio.gather(
            *(suffer(daemons, number, load, ACKS, random.Random(seed - number)) for number, load in enumerate(loads))
        )
        # What nobody acknowledged is asked for once more, at a daemon that need not be the one that was asked before.
        async with await Wire.open(daemons.path(seed % DAEMONS)) as wire:
            await finish(wire, *loads)
            asked = {name: one for load in loads for name, one in load.asked.items()}
            for one in asked.values():
                if one.refused:
                    assert (await wire.refused("completion:get", request_id=one.request_id)).code == "not_found"
            taken = [name for name, one in asked.items() if not one.refused]
            answers = {name: await wire.ask("completion:get", request_id=name) for name in taken}
            figures = await wire.ask("completion:queue_status")
    assert [problem for load in loads for problem in load.problems] == []
    for name, reply in answers.items():
        check_ending(asked[name], reply)
    runs = check_record(daemons.record, answers)
    for name, reply in answers.items():
        check_trail(asked[name], reply, runs.get(name, set()), in_step=False)
    check_response_log(daemons.logs, answers)
    await bring_home(url, tmp_path)
    check_database(tmp_path / "home.db", answers, figures, in_step=False)
    states = Counter(reply["status"] for reply in answers.values())
    interrupted = sum(reply.get("interruptions", 0) for reply in answers.values())
    late = sum(attempt["outcome"] == "fenced" for reply in answers.values() for attempt in reply.get("attempts", []))
    print(f"{len(answers)} requests, {dict(states)}, {interrupted} interruptions, {late} late answers")
    assert states["completed"] > CONVERSATIONS
    assert interrupted > 0


@pytest.mark.timeout(240)
@pytest.mark.promise("D1", "D2", "C2", "C3", "C6", "Q3")
async def test_daemons_that_die_over_their_chains_bring_every_result_to_each_of_its_targets_once(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    url = f"{redis_server.url}?namespace=chains"
    loads = [ChainLoad(random.Random(seed + number), f"root-{number}") for number in range(DAEMONS)]
    roots: dict[str, Json] = {}
    with team(tmp_path, url, DAEMONS, several(CHAIN_CONFIG)) as daemons:
        await asyncio.gather(
            *(suffer(daemons, number, load, ROOTS, random.Random(seed - number)) for number, load in enumerate(loads))
        )
        for load in loads:
            roots |= load.roots
        async with await Wire.open(daemons.path(seed % DAEMONS)) as wire:
            for data in roots.values():
                await answer(wire.post("completion:async", data))
            await finish_chains(wire)
            sent = await all_deliveries(wire)
            for name, data in roots.items():
                await check_root(wire, name, data, sent)
                await check_chain(wire, name, sent)
    followed = sum(map(len, sent.values()))
    print(f"{len(roots)} chains, {followed} deliveries")
    assert followed > len(roots)


async def bring_home(url: str, folder: Path) -> None:
    """All that the server has, as a database."""
    source = RedisStore(Address(url), StoreRules(), Chance(), daemon="movers", node="movers")
    target = SqliteStore(folder / "home.db", StoreRules(), Chance(), durability="normal")
    await move(source, target, folder, SystemClock(), "1", lambda _: None)
