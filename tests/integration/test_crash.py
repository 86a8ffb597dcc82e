"""A daemon under load is killed again and again; what was acknowledged is neither lost nor done twice at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
import secrets
import signal
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Json, Refused, Wire, answer, until

KILLS = 30
KILLS_BEFORE_READY = 5
"""So many of them hit a daemon that is still starting."""

CONVERSATIONS = 8
SUBMITTERS = 6
ACKS_IN_A_LIFE = 25
"""Each life takes at least so much work before it is killed."""

BACKLOG = 60
"""Waiting requests above which nothing more is asked."""

FINAL = {"completed", "failed", "cancelled", "blocked", "expired"}

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


class Asked:
    """One request, and all that was heard of it."""

    def __init__(self, data: Json) -> None:
        self.data = data
        self.acknowledged = False
        self.refused = False
        """An interruption that met a holder of higher priority: nothing was taken in."""
        self.endings: list[Json] = []
        """Every final answer that came, from whichever event."""
        self.cancel_sent = False
        self.cancelled: str | None = None
        """What an answered cancel said."""
        self.chunks: dict[int, list[str]] = defaultdict(list)
        """By attempt, as they came over the connection of the last life."""

    @property
    def request_id(self) -> str:
        return str(self.data["request_id"])

    @property
    def echo(self) -> str:
        return f"echo: {self.data['prompt']}"


class Load:
    """Clients that ask without end, one life of the daemon after the other."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._numbers = itertools.count(1)
        self.asked: dict[str, Asked] = {}
        self.acks = 0
        self.more_acks = asyncio.Event()
        self.problems: list[str] = []

    def _compose(self) -> Asked:
        """A new request: mostly in one of few conversations, so that they stand in line."""
        dice, number = self._dice, next(self._numbers)
        script: Json = {"delay": dice.choice((0.0, 0.0, 0.005, 0.03, 0.2))}
        data: Json = {
            "request_id": f"crash-{number}",
            "prompt": f"word {number} " * dice.randint(1, 5),
            "priority": dice.choice(("critical", "high", "normal", "normal", "low", "background")),
            "model": dice.choice(("stub/a", "stub/b", "other/c")),
            "provider_options": script,
        }
        if dice.random() < 0.85:
            data["session_id"] = f"talk-{dice.randrange(CONVERSATIONS)}"
        if dice.random() < 0.15:
            data["delay"] = round(dice.uniform(0.01, 0.5), 3)
        if dice.random() < 0.05:
            data["ttl"] = round(dice.uniform(0.01, 0.2), 3)
        if dice.random() < 0.1:
            script.update(fail="overloaded", fail_attempts=1)
        if dice.random() < 0.03:
            script.update(fail="invalid_request")
        if dice.random() < 0.05:
            data["on_busy"] = "interrupt"
        if dice.random() < 0.2:
            data["stream"] = True
            script.update(pieces=4, piece_delay=0.002)
        return Asked(data)

    async def live(self, path: Path) -> None:
        """One life of the daemon, to its end: ask again what was not acknowledged, then ask on."""
        wires = [await Wire.open(path) for _ in range(SUBMITTERS)]
        watch = wires[0]
        try:
            await watch.ask("monitor:subscribe", patterns=["completion:result"])
            for one in self.unanswered:
                await self.submit(wires[-1], one)
            await asyncio.gather(*(self._ask_on(wire) for wire in wires))
        except ConnectionResetError:
            pass  # killed, as it should be
        finally:
            for wire in wires:
                self._hear(wire)
                await wire.leave()

    @property
    def unanswered(self) -> list[Asked]:
        """What may or may not have been taken in."""
        return [one for one in self.asked.values() if not one.acknowledged and not one.refused]

    async def _ask_on(self, wire: Wire) -> None:
        while True:
            figures = await answer(wire.post("completion:queue_status", {}))
            if figures["queued"] > BACKLOG:
                continue
            burst = [self._compose() for _ in range(self._dice.randint(1, 6))]
            for one in burst:
                self.asked[one.request_id] = one
            results = await asyncio.gather(*(self.submit(wire, one) for one in burst), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            taken = [one for one in burst if one.acknowledged]
            if taken and self._dice.random() < 0.3:
                await self._cancel(wire, self._dice.choice(taken))
            await asyncio.sleep(self._dice.uniform(0, 0.03))  # the pace of the load: nothing waits for it

    async def submit(self, wire: Wire, one: Asked) -> None:
        """Ask for it, again where no answer came."""
        one.chunks.clear()
        try:
            reply = await answer(wire.post("completion:async", one.data))
        except Refused as error:
            one.refused = error.code == "conversation_busy" and one.data.get("on_busy") == "interrupt"
            if not one.refused:
                self.problems.append(f"{one.request_id} refused: {error}")
            return
        one.acknowledged = True
        self.acks += 1
        self.more_acks.set()
        if reply["status"] in FINAL:
            one.endings.append(reply)

    async def _cancel(self, wire: Wire, one: Asked) -> None:
        one.cancel_sent = True
        try:
            reply = await answer(wire.post("completion:cancel", {"request_id": one.request_id}))
        except Refused as error:
            self.problems.append(f"{one.request_id} not cancelled: {error}")
            return
        one.cancelled = reply["state"]

    def _hear(self, wire: Wire) -> None:
        """What was pushed over a connection until its end."""
        pushed = Counter[str]()
        for line in wire.lines:
            if "data" not in line or line["data"].get("request_id") not in self.asked:
                continue
            one = self.asked[line["data"]["request_id"]]
            if line["event"] == "completion:result":
                pushed[one.request_id] += 1
                one.endings.append(line["data"])
            elif line["event"] == "completion:chunk":
                chunks = one.chunks[line["data"]["attempt"]]
                if line["data"]["seq"] != len(chunks):
                    self.problems.append(f"{one.request_id}: chunk {line['data']['seq']} came as {len(chunks)}")
                chunks.append(line["data"]["text"])
        self.problems += [f"{name}: result pushed {n} times on one connection" for name, n in pushed.items() if n > 1]

    async def reach(self, acks: int) -> None:
        """Wait until so many acknowledgements came in all."""
        while self.acks < acks:
            self.more_acks.clear()
            await self.more_acks.wait()


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
            await finish(load, wire)
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
    check_response_log(tmp_path / "var" / "logs" / "responses", answers)
    states = Counter(reply["status"] for reply in answers.values())
    interrupted = sum(reply.get("interruptions", 0) for reply in answers.values())
    print(f"{len(answers)} requests, {dict(states)}, {interrupted} interruptions")
    assert states["completed"] > KILLS
    assert interrupted > 0


async def finish(load: Load, wire: Wire) -> None:
    """Ask once more what was never acknowledged, then wait until the queue is empty."""
    for one in load.unanswered:
        await load.submit(wire, one)

    async def empty() -> bool:
        figures = await wire.ask("completion:queue_status")
        return not any(figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked"))

    await until(empty, patience=60)


def check_ending(one: Asked, reply: Json) -> None:
    """One final state, the same whoever was told, with the result where it completed."""
    told = {ending["status"] for ending in one.endings}
    assert reply["status"] in FINAL, reply
    assert told <= {reply["status"]}, (told, reply)
    if one.cancelled is not None:
        assert one.cancelled == reply["status"], (one.cancelled, reply)
    if reply["status"] == "completed":
        assert reply["result"] == one.echo
        assert all(ending["result"] == one.echo for ending in one.endings)
        assert reply["usage"]["output_tokens"] == one.echo.count(" ") + 1, "counted once, whatever was interrupted"
    elif reply["status"] == "failed":
        restarts = reply["error"]["code"] == "daemon_restart" and reply["interruptions"] == 3
        scripted = reply["error"]["code"] == one.data["provider_options"].get("fail") == "invalid_request"
        assert restarts or scripted, reply
    elif reply["status"] == "cancelled":
        assert one.cancel_sent or "interrupted_by" in reply, reply
    elif reply["status"] == "expired":
        assert "ttl" in one.data


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


def check_trail(one: Asked, reply: Json, begun: set[int]) -> None:
    """The trail says all that happened: each attempt once, in order, interruptions included."""
    attempts: list[Json] = reply.get("attempts", [])
    outcomes = [attempt["outcome"] for attempt in attempts]
    assert [attempt["attempt"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert outcomes.count("interrupted") == reply.get("interruptions", 0) <= 3
    assert outcomes.count("completed") == (reply["status"] == "completed")
    assert begun <= {attempt["attempt"] for attempt in attempts}
    for attempt in attempts:
        if attempt["outcome"] == "interrupted":
            assert attempt["error"] == "daemon_restart"
            assert attempt.get("usage", "unknown") == "unknown"
        if attempt["outcome"] in ("completed", "failed"):
            assert attempt["attempt"] in begun
        assert attempt["started_at"] >= reply["enqueued_at"] + one.data.get("delay", 0) - 1e-6
    completed = next((a["attempt"] for a in attempts if a["outcome"] == "completed"), None)
    if completed is not None and one.chunks.get(completed):
        assert one.echo.startswith("".join(one.chunks[completed]))
    if reply["status"] == "expired":
        assert attempts == []


def check_database(path: Path, answers: dict[str, Json], figures: Json) -> None:
    """Kept figures are what a recount gives, nobody holds a lock, and each history chains its completed requests."""
    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        assert database.pragma("integrity_check") == "ok"
        assert database.execute("SELECT count(*) FROM request WHERE place IS NOT NULL").get == 0
        kept = dict(database.execute("SELECT name, value FROM total"))
        states = Counter(reply["status"] for reply in answers.values())
        for state in ("scheduled", "queued", "running", "retrying", "parked", *FINAL):
            assert kept.get(state, 0) == states[state], state
        assert figures["completed"] == states["completed"]
        assert kept.get("locks", 0) == figures["locked_conversations"] == 0
        conversations = database.execute("SELECT id, name, head, turns FROM conversation").fetchall()
        assert kept["conversations"] == len(conversations)
        chained = Counter[str]()
        for number, name, head, turns in conversations:
            line = history(database, head)
            assert len(line) == turns
            assert all(conversation == number for _, conversation, _, _ in line)
            assert all(answers[request]["session_id"] == name for request, _, _, _ in line)
            times = [moment for _, _, *span in reversed(line) for moment in span]
            assert times == sorted(times), f"turns of {name} overlap"
            chained.update(request for request, *_ in line)
        assert chained == Counter(name for name, reply in answers.items() if reply["status"] == "completed")
        completed = database.execute("SELECT count(*) FROM attempt WHERE outcome = 'completed'").get
        assert completed == states["completed"]
    finally:
        database.close()


def history(database: apsw.Connection, head: Any) -> list[tuple[Any, ...]]:
    """A conversation's turns from its head backwards: request, conversation, started, finished."""
    turns = []
    while head is not None:
        row = database.execute(
            "SELECT r.request_id, a.conversation, a.started_at, a.finished_at, a.previous "
            "FROM attempt a JOIN request r ON r.key = a.request WHERE a.id = ? AND a.outcome = 'completed'",
            (head,),
        ).fetchone()
        assert row is not None, f"turn {head} is missing"
        *turn, head = row
        turns.append(tuple(turn))
    return turns


def check_response_log(folder: Path, answers: dict[str, Json]) -> None:
    """Each completed turn stands once in its session's file."""
    logged = Counter[tuple[str, str, str]]()
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            logged[path.name, entry["ksi"]["request_id"], entry["response"]["result"]] += 1
    assert logged == Counter(
        (log_file(reply["session_id"]), name, reply["result"])
        for name, reply in answers.items()
        if reply["status"] == "completed"
    )


def log_file(session: str) -> str:
    with contextlib.suppress(UnicodeEncodeError):
        if session.replace("-", "").replace("_", "").isalnum():
            return f"{session}.jsonl"
    return hashlib.sha256(session.encode()).hexdigest() + ".jsonl"
