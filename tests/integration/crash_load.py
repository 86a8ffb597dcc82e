"""Clients that send requests without end and record all replies, and the invariants of every request after any
crash."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import apsw

from tests.integration.wire import Json, Refused, Wire, answer, until
from tests.tally import Tally

BACKLOG = 60
"""Waiting requests above which nothing more is asked."""

FINAL = {"completed", "failed", "cancelled", "blocked", "expired"}

AWAY = {"store_unavailable", "store_full", "disk_full"}
"""Errors that a client may get from a store in trouble, and after which it may retry."""

FAR = 86_400.0
"""Seconds in the future that no test reaches and some leaps of a clock do."""


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
        """The reply of an answered cancel."""
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

    def __init__(
        self, dice: random.Random, name: str = "crash", *, conversations: int = 8, submitters: int = 6
    ) -> None:
        """All requests' ids begin with `name`."""
        self._dice = dice
        self._name = name
        self._conversations = conversations
        self._submitters = submitters
        self._numbers = itertools.count(1)
        self.asked: dict[str, Asked] = {}
        self.acks = 0
        self.more_acks = asyncio.Event()
        self.away = 0
        """How often the daemon said that its store is away or full: then it may have been taken in, or not."""
        self.problems: list[str] = []

    def _compose(self) -> Asked:
        """A new request: mostly in one of few conversations, so that queues form."""
        dice, number = self._dice, next(self._numbers)
        script: Json = {"delay": dice.choice((0.0, 0.0, 0.005, 0.03, 0.2))}
        data: Json = {
            "request_id": f"{self._name}-{number}",
            "prompt": f"word {number} " * dice.randint(1, 5),
            "priority": dice.choice(("critical", "high", "normal", "normal", "low", "background")),
            "model": dice.choice(("stub/a", "stub/b", "other/c")),
            "provider_options": script,
        }
        if dice.random() < 0.85:
            data["session_id"] = f"talk-{dice.randrange(self._conversations)}"
        if dice.random() < 0.15:
            data["delay"] = round(dice.uniform(0.01, 0.5), 3)
        elif dice.random() < 0.02:
            data["delay"] = FAR
        if dice.random() < 0.05:
            data["ttl"] = round(dice.uniform(0.01, 0.2), 3)
        elif dice.random() < 0.05:
            data["ttl"] = 2 * FAR
        if dice.random() < 0.1:
            script.update(fail="provider_error", fail_attempts=1)
        if dice.random() < 0.03:
            script.update(fail="invalid_request")
        if dice.random() < 0.05:
            data["on_busy"] = "interrupt"
        if dice.random() < 0.2:
            data["stream"] = True
            script.update(pieces=4, piece_delay=0.002)
        return Asked(data)

    async def live(self, path: Path) -> None:
        """One life of the daemon, to its end: repeat unacknowledged requests, then send new ones."""
        wires = [await Wire.open(path) for _ in range(self._submitters)]
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
        """Requests that may or may not have been accepted."""
        return [one for one in self.asked.values() if not one.acknowledged and not one.refused]

    async def _ask_on(self, wire: Wire) -> None:
        while True:
            try:
                figures = await answer(wire.post("completion:queue_status", {}))
            except Refused as error:
                self._note_away(error, "queue_status")
                continue
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
                await self.cancel(wire, self._dice.choice(taken))
            await asyncio.sleep(self._dice.uniform(0, 0.03))  # the pace of the load: nothing waits for it

    async def submit(self, wire: Wire, one: Asked) -> None:
        """Send it, and again without an answer."""
        one.chunks.clear()
        try:
            reply = await answer(wire.post("completion:async", one.data))
        except Refused as error:
            one.refused = error.code == "conversation_busy" and one.data.get("on_busy") == "interrupt"
            if not one.refused:
                self._note_away(error, one.request_id)
            return
        one.acknowledged = True
        self.acks += 1
        self.more_acks.set()
        if reply["status"] in FINAL:
            one.endings.append(reply)

    async def cancel(self, wire: Wire, one: Asked) -> None:
        """Cancel it, and note the effect."""
        one.cancel_sent = True
        try:
            reply = await answer(wire.post("completion:cancel", {"request_id": one.request_id}))
        except Refused as error:
            self._note_away(error, f"cancelling {one.request_id}")
            return
        one.cancelled = reply["state"]

    def _note_away(self, error: Refused, what: str) -> None:
        """Any other refusal is a problem."""
        self.away += error.code in AWAY
        if error.code not in AWAY or not error.retryable:
            self.problems.append(f"{what} refused: {error}")

    def _hear(self, wire: Wire) -> None:
        """The pushes over a connection until its end."""
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


async def finish(wire: Wire, *loads: Load) -> None:
    """Repeat unacknowledged requests, cancel those far off, then wait until the queue is empty."""
    for load in loads:
        for one in load.unanswered:
            await load.submit(wire, one)
        for one in load.asked.values():
            if one.data.get("delay") == FAR and not one.refused:
                await load.cancel(wire, one)

    async def empty() -> bool:
        figures = await wire.ask("completion:queue_status")
        return not any(figures[name] for name in ("queued", "active", "scheduled", "retrying", "parked"))

    await until(empty, patience=60)


async def look_up(wire: Wire, asked: dict[str, Asked], tally: Tally) -> dict[str, Json]:
    """The daemon's view of all requests, once nothing is left to do; it must not know refused ones."""
    answers: dict[str, Json] = {}
    for name, one in asked.items():
        tally.acknowledged += one.acknowledged
        whole = await wire.post("completion:get", {"request_id": name})
        if "error" in whole:
            assert whole["error"]["code"] == "not_found"
            tally.lost += [name] * (not one.refused)
            continue
        assert not one.refused
        reply = whole["data"]
        tally.lost += [f"the end of {name}"] * (reply["status"] not in FINAL)
        ends = sum(attempt["outcome"] == "completed" for attempt in reply.get("attempts", []))
        tally.doubled += [f"the end of {name}"] * (ends > 1)
        answers[name] = reply
    return answers


def check_ending(one: Asked, reply: Json) -> None:
    """One final state, the same for all clients, with the result if it completed."""
    told = {ending["status"] for ending in one.endings}
    assert reply["status"] in FINAL, reply
    assert told <= {reply["status"]}, (told, reply)
    if one.cancelled is not None:
        assert one.cancelled == reply["status"], (one.cancelled, reply)
    if reply["status"] == "completed":
        assert reply["result"] == one.echo
        assert all(ending["result"] == one.echo for ending in one.endings)
        answers = [attempt for attempt in reply["attempts"] if attempt.get("usage", "unknown") != "unknown"]
        assert {attempt["outcome"] for attempt in answers} <= {"completed", "fenced"}, reply
        tokens = len(answers) * (one.echo.count(" ") + 1)
        assert reply["usage"]["output_tokens"] == tokens, ("each answer counts once", reply)
    elif reply["status"] == "failed":
        restarts = reply["error"]["code"] == "daemon_restart" and reply["interruptions"] == 3
        scripted = reply["error"]["code"] == one.data["provider_options"].get("fail") == "invalid_request"
        assert restarts or scripted, reply
    elif reply["status"] == "cancelled":
        assert one.cancel_sent or "interrupted_by" in reply, reply
    elif reply["status"] == "expired":
        assert one.data["ttl"] < FAR


def check_trail(one: Asked, reply: Json, begun: set[int], *, in_step: bool = True) -> None:
    """The trail says all that happened: each attempt once, in order, interruptions included.

    `in_step`: all times are of one clock. A daemon that was stopped between looking at its clock and asking the store
    tells an earlier time than others.
    """
    # One more of the same number, if a daemon brought an answer after others took it for dead.
    attempts: list[Json] = [one for one in reply.get("attempts", []) if one["outcome"] != "fenced"]
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
        assert not in_step or attempt["started_at"] >= reply["enqueued_at"] + one.data.get("delay", 0) - 1e-6
    completed = next((a["attempt"] for a in attempts if a["outcome"] == "completed"), None)
    if completed is not None and one.chunks.get(completed):
        assert one.echo.startswith("".join(one.chunks[completed]))
    if reply["status"] == "expired":
        assert attempts == []


def check_database(path: Path, answers: dict[str, Json], figures: Json, tally: Tally, *, in_step: bool = True) -> None:
    """Kept figures equal a recount, no lock is held, and each history chains its completed requests.

    `in_step`: as in `check_trail`; then times too show that no two turns overlap.
    """
    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        assert database.pragma("integrity_check") == "ok"
        tally.orphans += [
            f"the place of {name}"
            for (name,) in database.execute("SELECT request_id FROM request WHERE place IS NOT NULL")
        ]
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
            assert not in_step or times == sorted(times), f"turns of {name} overlap"
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


def check_response_log(folders: Iterable[Path], answers: dict[str, Json], tally: Tally) -> None:
    """Each completed turn stands once in its session's file, in one of the folders."""
    logged = Counter[tuple[str, str, str]]()
    for path in (path for folder in folders for path in folder.iterdir()):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            logged[path.name, entry["ksi"]["request_id"], entry["response"]["result"]] += 1
    wanted = Counter(
        (log_file(reply["session_id"]), name, reply["result"])
        for name, reply in answers.items()
        if reply["status"] == "completed"
    )
    tally.lost += [f"the line of {name}" for _, name, _ in wanted - logged]
    tally.doubled += [f"the line of {name}" for _, name, _ in logged - wanted]


def log_file(session: str) -> str:
    with contextlib.suppress(UnicodeEncodeError):
        if session.replace("-", "").replace("_", "").isalnum():
            return f"{session}.jsonl"
    return hashlib.sha256(session.encode()).hexdigest() + ".jsonl"
