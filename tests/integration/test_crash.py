"""A daemon under load is killed again and again; acknowledged requests are neither lost nor run twice at a time."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

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
from tests.integration.weather import weather
from tests.integration.wire import Wire
from tests.tally import PROPERTY, Tally, summed

KILLS = effort(9, 90)
KILLS_BEFORE_READY = effort(2, 15)
"""This many of them hit a daemon that is still starting."""

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


@pytest.mark.timeout(effort(240, 1_200))
@pytest.mark.promise("Q1", "Q3", "Q4", "Q7", "Q8", "F8", "F10", "L1", "O4", "R1", "R2", "R3", "R7", "T1")
async def test_a_daemon_killed_again_and_again_loses_nothing_and_does_nothing_twice_at_a_time(
    tmp_path: Path, dice: random.Random, record_property: Callable[[str, object], None]
) -> None:
    durability = f'\n[store]\ndurability = "{dice.choice(("full", "normal"))}"\n'
    config = CONFIG.replace("record.tsv", str(tmp_path / "record.tsv")) + durability
    load, tally = Load(dice), Tally()
    early = set(dice.sample(range(1, KILLS), KILLS_BEFORE_READY))
    with weather(tmp_path, config, dice, tally) as sky:
        for life in range(KILLS):
            if life in early:
                await sky.short_life()
            else:
                await sky.life(load, ACKS_IN_A_LIFE)
        async with sky.last_life() as path, await Wire.open(path) as wire:
            await finish(wire, load)
            answers = await look_up(wire, load.asked, tally)
            figures = await wire.ask("completion:queue_status")
        begun = check_record(tmp_path / "record.tsv", sky.pids, tally)
        check_database(sky.process.home / "var" / "db" / "ksi.db", answers, figures, tally)
        check_response_log([sky.process.home / "var" / "logs" / "responses"], answers, tally)
    record_property(PROPERTY, tally.counts)
    print(summed([tally.counts]))
    tally.check()
    assert load.problems == []
    for name, reply in answers.items():
        check_ending(load.asked[name], reply)
        check_trail(load.asked[name], reply, begun[name])
    states = Counter(reply["status"] for reply in answers.values())
    interrupted = sum(reply.get("interruptions", 0) for reply in answers.values())
    print(f"{len(answers)} requests, {dict(states)}, {interrupted} interruptions")
    assert states["completed"] > KILLS
    assert interrupted > 0


def check_record(path: Path, pids: list[int], tally: Tally) -> dict[str, set[int]]:
    """No two runs of one conversation at a time; returns the attempts of each request that reached the provider.

    A run ends when the provider says so, or with its daemon: all of that came before the next daemon's first line.
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
            before = running.get(conversation, (-1, "", ""))
            tally.overlapping += [f"{run} in {conversation} while {before}"] * (before[0] == life)
            tally.doubled += [f"the beginning of {run}"] * (int(attempt) in begun[request])
            running[conversation] = run
            begun[request].add(int(attempt))
        else:
            assert running.pop(conversation) == run
    return begun
