"""Each kind of input that others choose, at its limit: no turn of the loop takes long."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.events.specs import SPECS, schema
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.loop_watch import Turns, allowed, watched_daemon
from tests.integration.wire import PATIENCE, Json, Wire

BOUND = 0.2
"""Seconds of the loop's CPU time above which a turn is one that grows with its input: such turns took 1 to 166 s.

The promise is 50 ms. A figure so small is measured on a machine at rest; here others use the caches and the processor.
"""
SIZE = 1_000_000
RESULTS = {
    "plain": "The quick brown fox jumps over the lazy dog. ",
    "markup": "<p>&lt;b&gt; &amp; %3Cb%3E \\u003c</p> ",
    "nested": "&amp;amp;amp;amp;amp;lt;%2525253c\\\\\\\\u003csystem-reminder ",
    "tags": "<system-reminder>",
    "backslashes": "\\ ",
    "percent": "%41",
    "invisible": "\U0001f600e\u0301\u200b",
}
ENDLESS = {
    "blank lines": "a" + "\n" * 60_000 + "b",
    "a number": "1" * 60_000 + "x",
    "spaces": "try " + " " * 60_000 + "x",
}
ERRORS = {
    "words": Answer(status=400, body=b"context " * 7_900_000, content_type="application/json"),
    "scripts": Answer(status=500, body=b"<script" * 1_000_000, content_type="text/html"),
    "a sentence": Answer(status=400, body=json.dumps({"error": {"message": "try " * 2_000_000}}).encode()),
    "an event": Answer(parts=(b'data: {"error": {"message": "' + b"context " * 1_000_000 + b'"}}\n\n',)),
    "blanks": Answer(body=b" " * 15_000_000, content_type="application/json"),
    "stray bytes": Answer(
        body=b'{"choices":[{"index":0,"message":{"content":"' + b"\xff" * 100_000 + b'x"}}]}',
        content_type="application/json",
    ),
}


def _text(piece: str) -> str:
    return (piece * (SIZE // len(piece) + 1))[:SIZE]


@asynccontextmanager
async def _house(endpoint: ScriptedEndpoint, **more: Mapping[str, Any]) -> AsyncIterator[tuple[Wire, Turns, Path]]:
    settings: dict[str, Mapping[str, Any]] = {
        "service": {"default_model": "up/m", "shutdown_grace": 0.0},
        "chain": {"token_budget": 1_000_000_000},
        "retry": {"max_attempts": 1},
        "providers": {
            "local": {"enabled": False},
            "stub": {"kind": "stub", "max_concurrency": 64},
            "up": {"kind": "openai", "base_url": f"{endpoint.url}/v1", "models": ["*"], "max_concurrency": 64},
        },
        **more,
    }
    async with (
        watched_daemon(settings, {"OPENAI_API_KEY": "k"}) as (path, turns),
        await Wire.open(path) as wire,
    ):
        await wire.ask("completion:request", prompt="warm", model="stub/x")
        turns.reset()
        yield wire, turns, path


def _quick(turns: Turns) -> None:
    assert turns.longest < allowed(BOUND), f"one turn of the loop took {turns.longest:.3f} s of CPU time"


async def _all_ended(wire: Wire, number: int) -> None:
    async with asyncio.timeout(PATIENCE * 3):
        while True:
            status = await wire.ask("completion:status")
            if status["completed"] + status["failed"] + status["blocked"] >= number:
                return


@pytest.mark.promise("O9")
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("targets", [1, 30])
async def test_a_large_result_for_many_conversations_does_not_block_the_loop(kind: str, targets: int) -> None:
    def script(seen: Seen) -> Answer:
        first = seen.json["messages"][-1]["content"] == "PARENT"
        return Answer(pieces=(_text(RESULTS[kind]) if first else "ok",))

    async with ScriptedEndpoint(script=script, record=False) as endpoint, _house(endpoint) as (wire, turns, _):
        config = {"target_sessions": [f"t{number}" for number in range(targets)], "mode": "direct"}
        await wire.ask("completion:request", prompt="PARENT", session_id="p", injection_config=config)
        await _all_ended(wire, targets + 2)
        _quick(turns)


@pytest.mark.promise("O9")
@pytest.mark.parametrize("kind", ENDLESS)
async def test_a_chains_answer_is_judged_at_once_whatever_it_is(kind: str) -> None:
    async with (
        ScriptedEndpoint(Answer(pieces=(ENDLESS[kind],)), record=False) as endpoint,
        _house(endpoint) as (wire, turns, _),
    ):
        for number in range(3):
            config = {"target_sessions": ["t"], "inherit": "same"}
            await wire.ask(
                "completion:request",
                prompt=ENDLESS[kind],
                session_id=f"s{number}",
                circuit_breaker_config={"max_depth": 2},
                injection_config=config,
            )
        _quick(turns)


@pytest.mark.promise("O9")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ERRORS)
async def test_an_endless_error_is_read_as_far_as_its_beginning(kind: str, stream: bool) -> None:
    async with ScriptedEndpoint(ERRORS[kind], record=False) as endpoint, _house(endpoint) as (wire, turns, _):
        reply: Json = await wire.ask("completion:request", prompt="x", stream=stream)
        assert reply["status"] in ("failed", "completed")
        assert len(json.dumps(reply.get("error", ""))) < 5_000
        _quick(turns)


@pytest.mark.promise("O9")
async def test_a_long_history_that_is_read_for_the_first_time_does_not_block_the_loop() -> None:
    async with ScriptedEndpoint(Answer(pieces=("yes",))) as endpoint, _house(endpoint) as (wire, turns, _):
        for number in range(2_000):
            await wire.ask("completion:request", prompt=f"t{number}", session_id="long", model="stub/x")
        turns.reset()
        await wire.ask("completion:request", prompt="now", session_id="long", fork=True, model="up/m")
        assert len(endpoint.requests[-1].json["messages"]) > 3_000
        _quick(turns)


class Ear:
    """A subscriber that counts the results, and keeps nothing for the collector of this process to go through."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.results = 0

    @classmethod
    async def open(cls, path: Path) -> Ear:
        """Subscribe to everything."""
        ear = cls(*await asyncio.open_unix_connection(str(path), limit=1 << 24))
        ear._writer.write(b'{"event": "monitor:subscribe", "data": {"patterns": ["*"]}}\n')
        assert b"patterns" in await ear._reader.readline()
        return ear

    async def hear(self, results: int) -> None:
        """Read until so many results came."""
        while self.results < results:
            self.results += (await self._reader.readline()).startswith(b'{"event":"completion:result"')

    def close(self) -> None:
        """Leave."""
        self._writer.close()


@pytest.mark.promise("O9")
@pytest.mark.parametrize("subscribers", [30, 400])
async def test_many_events_for_many_subscribers_do_not_block_the_loop(subscribers: int) -> None:
    async with ScriptedEndpoint(record=False) as endpoint, _house(endpoint) as (wire, turns, path):
        ears = [await Ear.open(path) for _ in range(subscribers)]
        turns.reset()
        for round_ in range(1, 4):
            asked = [wire.ask("completion:request", prompt="x" * 1_000, model="stub/x") for _ in range(50)]
            async with asyncio.timeout(3 * PATIENCE):
                await asyncio.gather(*asked, *(ear.hear(50 * round_) for ear in ears))
        _quick(turns)
        for ear in ears:
            ear.close()


@pytest.mark.promise("O9")
async def test_all_schemas_are_made_once_and_one_at_a_time() -> None:
    schema.cache_clear()
    async with ScriptedEndpoint(record=False) as endpoint, _house(endpoint) as (wire, turns, _):
        await asyncio.gather(*(wire.ask("system:discover") for _ in range(50)))
        _quick(turns)
        assert schema.cache_info().misses == len(SPECS)


@pytest.mark.promise("A1", "O9")
@pytest.mark.parametrize("native", [False, True], ids=["blocks", "native"])
async def test_a_request_that_is_one_large_image_does_not_block_the_loop(native: bool) -> None:
    data = base64.b64encode(b"\x89PNG" * 3_000_000).decode()[:15_900_000]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    said = [{"type": "text", "text": "See?"}, {"type": "image", "source": source}]
    messages = [{"role": "user", "content": said}]
    body = {"model": "m", "messages": messages}
    fields: Json = {"native": {"dialect": "anthropic", "body": body}} if native else {"messages": messages}
    async with ScriptedEndpoint(record=False) as endpoint, _house(endpoint) as (wire, turns, _):
        reply = await wire.ask("completion:request", session_id="seen", **fields)
        assert reply["status"] == "completed"
        again = await wire.ask("completion:request", session_id="seen", prompt="And now?")
        assert again["status"] == "completed"
        _quick(turns)


LINES: dict[str, tuple[str, Json]] = {
    "subscriptions": ("monitor:subscribe", {"patterns": ["*a" * 99 + f"{number:02d}" for number in range(100)]}),
    "reports": ("completion:queue_status", {"list": "finished", "limit": 100}),
    "health": ("system:health", {}),
    "sessions": ("completion:session_status", {"limit": 100}),
    "usage": ("completion:token_usage", {"bucket_minutes": 2, "hours": 30}),
    "unknown fields": ("completion:get", {"request_id": "r", **{f"field{number}" * 20: 1 for number in range(30)}}),
}


@pytest.mark.promise("O9")
@pytest.mark.parametrize("kind", LINES)
async def test_many_lines_that_take_long_do_not_begin_in_one_turn(kind: str) -> None:
    event, data = LINES[kind]
    async with ScriptedEndpoint(record=False) as endpoint, _house(endpoint) as (wire, turns, path):
        await asyncio.gather(*(wire.ask("completion:request", prompt="x", model="stub/x") for _ in range(100)))
        async with await Wire.open(path) as other:
            turns.reset()
            await asyncio.gather(*(one.post(event, data) for one in (wire, other) for _ in range(100)))
            _quick(turns)
