"""Several daemons on one server are killed and stopped under load: nothing is lost, nothing done twice at a time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ksi.clock import Chance, SystemClock
from ksi.store.redis.address import Address
from ksi.store.redis.store import RedisStore
from ksi.store.snapshot.move import move
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules
from tests.effort import effort
from tests.integration.crash_load import (
    Load,
    check_database,
    check_ending,
    check_response_log,
    check_trail,
    finish,
    look_up,
)
from tests.integration.redis_team import LEASE, Team, check_record, team
from tests.integration.test_chain_crash import CONFIG as CHAIN_CONFIG
from tests.integration.test_chain_crash import Load as ChainLoad
from tests.integration.test_chain_crash import check_chains
from tests.integration.test_chain_crash import finish as finish_chains
from tests.integration.test_crash import CONFIG
from tests.integration.weather import Weather, left_processes, small_disk, wall_clock
from tests.integration.wire import Wire
from tests.redis_server import RedisServer
from tests.tally import PROPERTY, Tally, summed

DAEMONS = 3
CONVERSATIONS = 200
SUBMITTERS = 3
"""At each daemon."""

LIVES = effort(3, 9)
"""The leases of each daemon; a kill ends each of them."""

ACKS, ROOTS = 40, 12
"""Each daemon takes at least so much in a life."""

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
    return config.replace('"record.tsv"', '"{record}"') + SHARED


@contextmanager
def skies(folder: Path, url: str, config: str, seed: int, tally: Tally) -> Iterator[tuple[Team, list[Weather]]]:
    """Daemons that serve, and the weather of each; they may also be stopped beyond their lease, or less."""
    with ExitStack() as stack:
        disks = [stack.enter_context(small_disk(folder / f"h{number}")) for number in range(DAEMONS)]
        clocks = [wall_clock(folder / f"clock{number}") for number in range(DAEMONS)]
        environs = [{} if clock is None else clock.environ for clock in clocks]
        daemons = stack.enter_context(team(folder, url, DAEMONS, several(config), environs))

        def sky(number: int) -> Weather:
            stops = {
                "stops beyond the lease": lambda: daemons.stop(number, 2 * LEASE),
                "stops within the lease": lambda: daemons.stop(number, LEASE / 10),
            }
            dice = random.Random(seed - number)
            return Weather(daemons.daemons[number], dice, tally, disks[number], clocks[number], **stops)

        yield daemons, [sky(number) for number in range(DAEMONS)]


async def suffer(sky: Weather, load: Load | ChainLoad, acks: int) -> None:
    """Harm one daemon in life after life under load; at last it serves, and gets no requests."""
    for _ in range(LIVES):
        await sky.life(load, acks)
    await sky.start()
    sky.clear()


@pytest.mark.timeout(effort(300, 1_200))
@pytest.mark.promise("D1", "D2", "Q1", "Q3", "Q4", "Q7", "F8", "F10", "L1", "O4", "R1", "R2", "R3", "T1")
async def test_daemons_that_are_killed_and_stopped_under_load_lose_nothing_and_do_nothing_twice(
    redis_server: RedisServer, tmp_path: Path, dice: random.Random, record_property: Callable[[str, object], None]
) -> None:
    seed, tally = dice.getrandbits(32), Tally()
    url = f"{redis_server.url}?namespace=crash"
    loads = [
        Load(random.Random(seed + number), f"crash-{number}", conversations=CONVERSATIONS, submitters=SUBMITTERS)
        for number in range(DAEMONS)
    ]
    with skies(tmp_path, url, CONFIG, seed, tally) as (daemons, weathers):
        await asyncio.gather(*(suffer(sky, load, ACKS) for sky, load in zip(weathers, loads, strict=True)))
        # Unacknowledged requests are sent once more, at any daemon.
        async with await Wire.open(daemons.path(seed % DAEMONS)) as wire:
            await finish(wire, *loads)
            asked = {name: one for load in loads for name, one in load.asked.items()}
            answers = await look_up(wire, asked, tally)
            figures = await wire.ask("completion:queue_status")
        daemons.end()
        for daemon in daemons.daemons:
            tally.orphans += left_processes(daemon.home)
        check_response_log(daemons.logs, answers, tally)
    begun = check_record(daemons.record, answers, tally)
    await bring_home(url, tmp_path)
    check_database(tmp_path / "home.db", answers, figures, tally, in_step=False)
    record_property(PROPERTY, tally.counts)
    print(summed([tally.counts]))
    tally.check()
    assert [problem for load in loads for problem in load.problems] == []
    for name, reply in answers.items():
        check_ending(asked[name], reply)
        check_trail(asked[name], reply, begun.get(name, set()), in_step=False)
    states = Counter(reply["status"] for reply in answers.values())
    interrupted = sum(reply.get("interruptions", 0) for reply in answers.values())
    late = sum(attempt["outcome"] == "fenced" for reply in answers.values() for attempt in reply.get("attempts", []))
    print(f"{len(answers)} requests, {dict(states)}, {interrupted} interruptions, {late} late answers")
    assert states["completed"] > CONVERSATIONS
    assert interrupted > 0


@pytest.mark.timeout(effort(240, 1_200))
@pytest.mark.promise("D1", "D2", "C2", "C3", "C6", "O4", "Q3")
async def test_daemons_that_die_over_their_chains_bring_every_result_to_each_of_its_targets_once(
    redis_server: RedisServer, tmp_path: Path, dice: random.Random, record_property: Callable[[str, object], None]
) -> None:
    seed, tally = dice.getrandbits(32), Tally()
    url = f"{redis_server.url}?namespace=chains"
    loads = [ChainLoad(random.Random(seed + number), f"root-{number}") for number in range(DAEMONS)]
    with skies(tmp_path, url, CHAIN_CONFIG, seed, tally) as (daemons, weathers):
        await asyncio.gather(*(suffer(sky, load, ROOTS) for sky, load in zip(weathers, loads, strict=True)))
        async with await Wire.open(daemons.path(seed % DAEMONS)) as wire:
            await finish_chains(wire, *loads)
            followed = await check_chains(wire, tally, *loads)
    record_property(PROPERTY, tally.counts)
    roots = sum(len(load.roots) for load in loads)
    print(f"{summed([tally.counts])}; {roots} chains, {followed} deliveries")
    tally.check()
    assert followed > roots


async def bring_home(url: str, folder: Path) -> None:
    """All that the server has, as a database."""
    source = RedisStore(Address(url), StoreRules(), Chance(), daemon="movers", node="movers")
    target = SqliteStore(folder / "home.db", StoreRules(), Chance(), durability="normal")
    await move(source, target, folder, SystemClock(), "1", lambda _: None)
