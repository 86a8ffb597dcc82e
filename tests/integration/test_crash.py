"""A daemon under load is killed again and again; what was acknowledged is neither lost nor done twice at a time."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.crash_load import Load, check_database, check_ending, check_response_log, check_trail, finish
from tests.integration.wire import Wire

KILLS = 30
KILLS_BEFORE_READY = 5
"""So many of them hit a daemon that is still starting."""

ACKS_IN_A_LIFE = 25
"""Each life takes at least so much work before it is killed."""

CONFIG = """\
[service]
default_model = "stub/echo"

[retry]
initial_delay = 0.05
max_delay = 0.1

[providers.stub]
kind = "stub"
max_concurrency = 6
record = "record.tsv"

[providers.second]
kind = "stub"
models = ["stub/b"]
priority = 20
max_concurrency = 3
record = "record.tsv"

[providers.other]
kind = "stub"
max_concurrency = 3
record = "record.tsv"
"""


@pytest.mark.timeout(240)
@pytest.mark.promise("Q1", "Q3", "Q4", "Q7", "Q8", "F8", "F10", "L1", "R1", "R2", "R3", "R7", "T1")
async def test_a_daemon_killed_thirty_times_loses_nothing_and_does_nothing_twice_at_a_time(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    durability = f'\n[store]\ndurability = "{dice.choice(("full", "normal"))}"\n'
    process = DaemonProcess(make_home(tmp_path, CONFIG + durability))
    request.addfinalizer(lambda: process.end(signal.SIGKILL))
    load = Load(dice)
    pids = []
    early = set(dice.sample(range(1, KILLS), KILLS_BEFORE_READY))
    for life in range(KILLS):
        alive = None
        process.spawn()
        pids.append(process.pid)
        if life in early:
            # Somewhere in the start: loading, recovery, or just after.
            await asyncio.sleep(dice.uniform(0.05, 0.6))
        else:
            assert await asyncio.to_thread(process.wait_ready)
            alive = asyncio.create_task(load.live(process.socket_path))
            reached = asyncio.create_task(load.reach(load.acks + ACKS_IN_A_LIFE))
            await asyncio.wait((alive, reached), timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert reached.done(), alive
            await asyncio.sleep(dice.uniform(0, 0.3))
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        if alive is not None:
            async with asyncio.timeout(30):
                await alive
    with process:
        pids.append(process.pid)
        async with await Wire.open(process.socket_path) as wire:
            await finish(wire, load)
            for one in load.asked.values():
                if one.refused:
                    assert (await wire.refused("completion:get", request_id=one.request_id)).code == "not_found"
            taken = [name for name, one in load.asked.items() if not one.refused]
            answers = {name: await wire.ask("completion:get", request_id=name) for name in taken}
            figures = await wire.ask("completion:queue_status")
    assert load.problems == []
    for name, reply in answers.items():
        check_ending(load.asked[name], reply)
    runs = check_record(tmp_path / "record.tsv", pids)
    for name, reply in answers.items():
        check_trail(load.asked[name], reply, runs[name])
    check_database(tmp_path / "var" / "db" / "ksi.db", answers, figures)
    check_response_log([tmp_path / "var" / "logs" / "responses"], answers)
    states = Counter(reply["status"] for reply in answers.values())
    interrupted = sum(reply.get("interruptions", 0) for reply in answers.values())
    print(f"{len(answers)} requests, {dict(states)}, {interrupted} interruptions")
    assert states["completed"] > KILLS
    assert interrupted > 0


def check_record(path: Path, pids: list[int]) -> dict[str, set[int]]:
    """No two runs of one conversation at a time; returns the attempts of each request that reached the provider.

    A run ends where the provider says so, or with its daemon: all of that came before the next daemon's first line.
    """
    order = {pid: number for number, pid in enumerate(pids)}
    assert len(order) == len(pids), "a process id came twice; run again"
    begun: dict[str, set[int]] = defaultdict(set)
    running: dict[str, tuple[int, str, str]] = {}
    latest = 0
    for line in path.read_text().splitlines():
        word, pid, conversation, request, attempt = line.split("\t")
        life = order[int(pid)]
        assert life >= latest, "a dead daemon wrote"
        latest = life
        run = (life, request, attempt)
        if word == "begin":
            assert running.get(conversation, (-1,))[0] < life, f"{run} while {running[conversation]} in {conversation}"
            assert int(attempt) not in begun[request], f"{run} began twice"
            running[conversation] = run
            begun[request].add(int(attempt))
        else:
            assert running.pop(conversation) == run
    return begun
