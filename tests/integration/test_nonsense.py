"""Thousands of events of which hardly one makes sense: each gets one typed answer, and the daemon comes out whole."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import apsw
import pytest

from ksi.events.specs import SPECS
from ksi.protocol import field_names
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Wire, until

EVENTS = [
    name
    for name, spec in SPECS.items()
    if spec.incoming
    and name != "system:shutdown"
    and name.partition(":")[0] in ("completion", "conversation", "monitor", "system")
]
NAMES = ["r1", "r2", "r3", "c1", "c2", "../x", "a\x00b", "-"]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1e-300, 1e18, 1e300, 1.7e308, -1.5),
    *("", " ", "x", "\x00", "\n", "é😀" * 300, "x" * 70_000, "NaN", "1", "true", "stub/x", "no/x", "haiku", "*"),
    *("critical", "Background", "urgent", "reject", "interrupt", "enqueue", "failed", "finished", "timeout"),
    *(
        [],
        [None],
        ["a", "b"],
        [1, 2],
        [[[[[]]]]],
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": ""}],
    ),
    *({}, {"a": {"b": [1, None]}}, {"delay": 0.01}, {"delay": 1e300}, {"fail": "overloaded"}, {"pieces": 3}, {"x": 1}),
    *({"pieces": 10**9}, {"usage": False}, {"fail": "invalid_request"}, {"": ""}, {"text": "\x00"}),
]
GOOD: dict[str, list[Any]] = {
    "prompt": ["x", "two words"],
    "request_id": NAMES,
    "session_id": NAMES,
    "conversation_id": NAMES,
    "model": ["stub/a", "stub/b"],
    "timeout": [0.01, 5],
    "limit": [1, 5, 1000],
    "stream": [True],
    "provider_options": [{}, {"delay": 0.01}, {"pieces": 2}, {"fail": "overloaded"}],
}
HARMLESS = {
    *("invalid_data", "invalid_json", "invalid_envelope", "not_found", "request_id_conflict", "queue_full"),
    *("conversation_busy", "not_lock_holder", "unknown_model", "unknown_parent", "wait_timeout", "unknown_event"),
    *("not_retryable", "provider_unknown"),
}


def nonsense(dice: random.Random) -> tuple[str, Json]:
    """An event with some of its own fields, some of others', and values of which some fit."""
    event = dice.choice(EVENTS)
    request = SPECS[event].request
    assert request is not None
    fields = sorted(field_names(request))
    data: Json = {}
    for name in dice.sample(fields, dice.randint(0, len(fields))) if fields else []:
        if dice.random() < 0.9:
            data[name] = dice.choice(GOOD[name] if name in GOOD and dice.random() < 0.8 else VALUES)
    if dice.random() < 0.7 and event in ("completion:async", "completion:request"):
        data = {**{name: value for name, value in data.items() if dice.random() < 0.3}, "prompt": "x"}
        data["request_id"] = f"n{dice.randrange(200)}" if dice.random() < 0.5 else dice.choice(NAMES)
    if dice.random() < 0.1:
        data[dice.choice(["promt", "", "\x00", "x" * 500])] = dice.choice(VALUES)
    return event, data


async def cancel_all(wire: Wire) -> None:
    """Bring everything to an end that is under way."""
    for listing in ("active", "ready", "waiting", "delayed"):
        page = await wire.ask("completion:queue_status", list=listing, limit=1000)
        for row in page["items"]:
            await wire.post("completion:cancel", {"request_id": row["request_id"]})
    locks = await wire.ask("conversation:lock_status", limit=1000)
    for lock in locks["locks"]:
        await wire.post("completion:cancel", {"request_id": lock["holder"]})


@pytest.mark.promise("S1", "Q8", "L1")
async def test_nonsense_is_answered_each_with_one_typed_answer_and_leaves_no_trace(
    tmp_path: Path, dice: random.Random
) -> None:
    codes = Counter[str]()
    retry = {"max_attempts": 2, "initial_delay": 0.001, "max_delay": 0.002}
    async with daemon_and_wire(tmp_path, retry=retry) as (daemon, wire):
        others = [await Wire.open(daemon.config.socket_path) for _ in range(3)]
        asked: list[tuple[str, Json, asyncio.Future[Json]]] = []
        for number in range(3_000):
            event, data = nonsense(dice)
            speaker = dice.choice(others)
            asked.append((event, data, speaker.post(event, data)))
            if number % 50 == 0:
                await wire.ask("system:ready")
            if number % 500 == 250:
                left = dice.randrange(3)
                await others[left].leave()
                others[left] = await Wire.open(daemon.config.socket_path)

        async def all_answered() -> bool:
            await cancel_all(wire)
            return all(future.done() for _, _, future in asked)

        await until(all_answered)
        for event, data, future in asked:
            if future.exception() is None:
                reply = future.result()
                code = reply["error"]["code"] if "error" in reply else "data"
                codes[code] += 1
                assert code in {"data", *HARMLESS}, (event, data, reply)
                assert reply["event"] == event

        async def healthy() -> bool:
            # A client may report that a provider is overloaded: then it waits for a caller that probes it.
            await wire.ask("provider:reset", provider="stub")
            health = await wire.ask("system:health")
            return (health["status"], health["problems"]) == ("healthy", [])

        await until(healthy)
        assert all((await wire.ask("system:ready"))["tasks"].values())
        assert (await wire.ask("completion:request", prompt="still there?"))["result"] == "echo: still there?"

        async def quiet() -> bool:
            await cancel_all(wire)
            figures = await wire.ask("completion:queue_status")
            busy = ("queued", "active", "scheduled", "retrying", "parked", "locked_conversations", "external_waiters")
            return not any(figures[name] for name in busy)

        await until(quiet)
        for other in others:
            await other.leave()
    assert codes["data"] > 300, codes
    assert codes["invalid_data"] > 300, codes
    deletions = [future for event, _, future in asked if event == "conversation:delete"]
    told = [future.result().get("data", {}) for future in deletions if not future.exception()]
    deleted = sum(reply.get("requests", 0) for reply in told)
    # The replies to a client that left are not known.
    check_totals(tmp_path / "var" / "db" / "ksi.db", deleted, exact=len(told) == len(deletions))


def check_totals(path: Path, deleted: int, *, exact: bool) -> None:
    """The counts, which go on counting what was deleted with its conversation, equal the records."""
    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    assert database.pragma("integrity_check") == "ok"
    kept = dict(database.execute("SELECT name, value FROM total"))
    ended = {5: "completed", 6: "failed", 7: "cancelled", 9: "expired"}
    counted = dict(database.execute("SELECT state, count(*) FROM request WHERE external = 0 GROUP BY state"))
    gone = {name: kept.get(name, 0) - counted.get(code, 0) for code, name in ended.items()}
    assert min(gone.values()) >= 0, gone
    assert sum(gone.values()) == deleted or (not exact and sum(gone.values()) > deleted), gone
    assert counted.keys() <= ended.keys()
    assert database.execute("SELECT count(*) FROM request WHERE place IS NOT NULL OR external = 1").get == 0
    assert kept["conversations"] == database.execute("SELECT count(*) FROM conversation").get
    database.close()
