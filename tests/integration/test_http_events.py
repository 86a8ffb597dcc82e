"""All that the socket can, by HTTP: events in by POST, events out as server-sent events, a request's pieces."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from ksi.events.specs import SCOPES, SPECS
from ksi.http import event_stream
from tests.claude import until
from tests.http_door import Door, door
from tests.integration.serving import AT_ONCE

SLOW: dict[str, Any] = {"kind": "stub", "delay": 600}
DRIP: dict[str, Any] = {"kind": "stub", "pieces": 4, "piece_delay": 0.02}


def slow_and_drip() -> dict[str, Any]:
    return {"slow": SLOW, "drip": DRIP, "stub": {"kind": "stub", "max_concurrency": 64}, "local": OFF}


OFF: dict[str, Any] = {"kind": "local", "enabled": False}


@pytest.mark.promise("H4")
async def test_an_event_is_answered_as_by_the_socket_with_a_status() -> None:
    async with door() as here:
        asked = {"event": "completion:request", "data": {"prompt": "hi"}, "correlation_id": "c1"}
        reply = await here.post("/v1/events", asked)
        assert (reply.status, reply.json["event"], reply.json["correlation_id"]) == (200, "completion:request", "c1")
        assert reply.json["data"]["result"] == "echo: hi"
        unknown = await here.event("completion:gett", request_id="x")
        assert (unknown.status, unknown.json["error"]["code"]) == (404, "unknown_event")
        assert "completion:get" in unknown.json["error"]["message"]
        wrong = await here.event("completion:get", request_id=7)
        assert (wrong.status, wrong.json["error"]["details"]["path"]) == (400, "request_id")
        typo = await here.event("completion:get", request_id=reply.json["data"]["request_id"], contnt=True)
        assert "did you mean 'content'" in typo.json["data"]["warnings"][0]
        out = await here.event("completion:result")
        assert (out.status, out.json["error"]["code"]) == (400, "invalid_direction")


@pytest.mark.promise("H4")
async def test_every_event_that_comes_in_has_a_scope_and_no_other_has() -> None:
    assert SCOPES.keys() == {name for name, spec in SPECS.items() if spec.incoming}


@pytest.mark.promise("H4")
async def test_a_wait_is_held_until_the_end_and_a_client_that_leaves_cancels_nothing() -> None:
    async with door(providers=slow_and_drip(), service=AT_ONCE) as here:
        await here.told("completion:async", prompt="x", model="slow/x", request_id="r1")
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.3):
                await here.event("completion:wait", request_id="r1")
        late = await here.event("completion:wait", request_id="r1", timeout=0.1)
        assert (late.status, late.json["error"]["code"]) == (408, "wait_timeout")
        assert (await here.told("completion:get", request_id="r1"))["status"] == "running"
        held = asyncio.create_task(here.event("completion:wait", request_id="r1"))
        assert (await here.told("completion:cancel", request_id="r1"))["status"] == "cancelled"
        assert (await held).json["data"]["status"] == "cancelled"


@pytest.mark.promise("H4")
@pytest.mark.parametrize(
    ("event", "data", "word"),
    [
        ("conversation:acquire_lock", {"request_id": "l", "conversation_id": "c", "while_connected": True}, "while_co"),
        ("monitor:subscribe", {"pattern": "*"}, "monitor:subscribe"),
        ("monitor:unsubscribe", {}, "monitor:unsubscribe"),
        ("completion:wait", {"request_id": "r", "stream": True}, "/v1/requests/ID/stream"),
    ],
)
async def test_an_event_that_needs_a_lasting_connection_is_refused_by_name(
    event: str, data: dict[str, Any], word: str
) -> None:
    async with door() as here:
        reply = await here.event(event, **data)
        assert reply.status == 400
        assert word in reply.json["error"]["message"]
        v1 = await here.post("/v1/events", {"event": "system:ready", "data": {}, "replies": "v1"})
        assert (v1.status, v1.json["error"]["code"]) == (400, "invalid_envelope")


@pytest.mark.promise("H4")
async def test_pushed_events_come_as_a_stream_and_those_of_ones_own_without_a_pattern() -> None:
    async with (
        door() as here,
        here.stream("/v1/events?pattern=completion:result,queue:*") as everything,
        here.stream("/v1/events") as own,
    ):
        await here.told("completion:request", prompt="not mine")
        await here.event("completion:async", via=own.name, prompt="mine", request_id="r1", metadata={"a": "\n"})
        mine = await own.next()
        assert (mine["event"], mine["data"]["request_id"]) == ("completion:result", "r1")
        await here.told("queue:pause", why="x")
        names = [(await everything.next())["event"] for _ in range(3)]
        assert names == ["completion:result", "completion:result", "queue:paused"]


@pytest.mark.promise("H4")
async def test_a_stream_stands_for_a_connection_that_lasts() -> None:
    async with door() as here, here.stream("/v1/events") as first, here.stream("/v1/events") as second:
        lock: dict[str, Any] = {"conversation_id": "c", "while_connected": True}
        assert (await here.event("conversation:acquire_lock", via=first.name, request_id="a", **lock)).json["data"][
            "acquired"
        ]
        waits = await here.event("conversation:acquire_lock", via=second.name, request_id="b", **lock)
        assert waits.json["data"]["state"] == "queued"
        await here.event("monitor:subscribe", via=first.name, pattern="system:*")
        await here.told("conversation:release_lock", request_id="a")
        granted = await second.until("conversation:locked")
        assert granted["data"]["request_id"] == "b"
        nobody = await here.event("system:ready", via="stream_of_nobody")
        assert (nobody.status, nobody.json["error"]["code"]) == (404, "not_found")


@pytest.mark.promise("H4")
async def test_a_broken_stream_goes_on_behind_the_last_event_that_was_seen() -> None:
    async with door() as here:
        path = "/v1/events?pattern=completion:result"
        async with here.stream(path) as before:
            for number in range(3):
                await here.told("completion:request", prompt=str(number))
            await before.next()
            seen = before.last_id
            name = before.name
        await here.told("completion:request", prompt="3")
        async with here.stream(path, Last_Event_ID=seen) as after:
            assert after.name == name
            results = [(await after.next())["data"]["result"] for _ in range(3)]
            assert results == ["echo: 1", "echo: 2", "echo: 3"]
            # Another reader takes the place of this one, whose stream ends.
            async with here.stream(path, Last_Event_ID=after.last_id) as third:
                await here.told("completion:request", prompt="4")
                assert (await third.next())["data"]["result"] == "echo: 4"
                with pytest.raises((aiohttp.ClientError, AssertionError)):
                    await after.until("nothing more")


@pytest.mark.promise("H4")
async def test_a_stream_that_broke_before_its_first_event_loses_none() -> None:
    async with door() as here:
        path = "/v1/events?pattern=completion:result"
        async with here.stream(path) as before:
            assert await before.answer.content.readline() == f"id: {before.name}-0\n".encode()
        await here.told("completion:request", prompt="1")
        async with here.stream(path, Last_Event_ID=f"{before.name}-0") as after:
            assert (await after.next())["data"]["result"] == "echo: 1"


@pytest.mark.promise("H4")
async def test_lost_events_of_a_broken_stream_are_reported_by_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEPT_EVENTS", 2)
    async with door() as here:
        path = "/v1/events?pattern=completion:result"
        async with here.stream(path) as before:
            await here.told("completion:request", prompt="0")
            await before.next()
            seen = before.last_id
        for number in range(1, 6):
            await here.told("completion:request", prompt=str(number))
        async with here.stream(path, Last_Event_ID=seen) as after:
            assert (await after.next())["data"] == {"events": 3}
            assert [(await after.next())["data"]["result"] for _ in range(2)] == ["echo: 4", "echo: 5"]
        async with here.stream(path, Last_Event_ID="stream_of_yesterday-7") as other:
            told = await other.next()
            assert (told["event"], told["data"]) == ("monitor:lost", {})


@pytest.mark.promise("H4")
async def test_a_stream_without_a_reader_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "RESUME", 0.0)
    async with door() as here:
        streams = here.daemon.http
        assert streams is not None
        async with here.stream("/v1/events?pattern=*") as reader:
            name = reader.name

        async def forgotten() -> bool:
            assert here.daemon.http is not None
            await here.daemon.http._look()
            return (await here.event("system:ready", via=name)).status == 404

        await until_true(forgotten)
        assert here.daemon.bus.wanted("system:anything") is False


@pytest.mark.promise("H4", "S4")
async def test_a_reader_that_does_not_read_is_disconnected_and_harms_no_other() -> None:
    async with door(socket={"max_backlog": 300_000}) as here:
        reader, writer = await asyncio.open_connection(*address(here), limit=1024)
        writer.write(
            f"GET /v1/events?pattern=completion:result HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {here.token}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        name = next(line for line in head.decode().split("\r\n") if line.lower().startswith("x-ksi-stream"))
        stream = name.partition(": ")[2]
        text = "x" * 200_000

        async def let_go() -> bool:
            await here.told("completion:request", prompt=text)
            found = here.daemon.http._streams.find(stream, here.daemon._tokens.tokens.find(here.token))  # type: ignore[arg-type, union-attr]
            return found is not None and found.away_since is not None

        await until_true(let_go)
        writer.transport.abort()
        async with here.stream("/v1/events?pattern=completion:result", Last_Event_ID=f"{stream}-0") as again:
            assert (await again.next())["event"] == "monitor:lost"


@pytest.mark.promise("H4", "R2")
async def test_a_requests_pieces_can_be_read_from_any_piece_on_to_its_end() -> None:
    async with door(providers=slow_and_drip(), service=AT_ONCE) as here:
        await here.told("completion:async", prompt="one two three four", model="drip/x", stream=True, request_id="r1")
        async with here.stream("/v1/requests/r1/stream") as pieces:
            found = [await pieces.next()]
            while found[-1]["event"] == "completion:chunk":
                found.append(await pieces.next())
            assert await pieces.next() is None
        texts = [one["data"]["text"] for one in found[:-1]]
        assert "".join(texts) == "echo: one two three four"
        assert found[-1]["data"]["result"] == "echo: one two three four"
        async with here.stream("/v1/requests/r1/stream") as late:
            assert (await late.next())["data"]["chunks_lost"] is True
        async with here.stream("/v1/requests/nix/stream") as none:
            assert none.status == 404
            assert json.loads(await none.answer.read())["error"]["code"] == "not_found"


@pytest.mark.promise("H4", "R2")
async def test_pieces_that_were_seen_before_a_break_do_not_come_again() -> None:
    providers = slow_and_drip() | {"drip": {"kind": "stub", "pieces": 4, "piece_delay": 0.3}}
    async with door(providers=providers, service=AT_ONCE) as here:
        await here.told("completion:async", prompt="one two three four", model="drip/x", stream=True, request_id="r1")
        async with here.stream("/v1/requests/r1/stream") as before:
            first = await before.next()
            seen = before.last_id
        async with here.stream("/v1/requests/r1/stream", Last_Event_ID=seen) as after:
            second = await after.next()
            assert second["data"]["seq"] == first["data"]["seq"] + 1
            assert (await after.until("completion:result"))["data"]["status"] == "completed"


@pytest.mark.promise("H4")
async def test_a_stop_ends_held_streams_and_notifies_waiting_clients() -> None:
    async with door(providers=slow_and_drip(), service=AT_ONCE) as here:
        await here.told("completion:async", prompt="x", model="slow/x", request_id="r1")
        async with here.stream("/v1/events?pattern=*") as events, here.stream("/v1/requests/r1/stream") as pieces:
            held = asyncio.create_task(here.event("completion:wait", request_id="r1"))
            await until(lambda: len(here.daemon._announcer._waits._by_request.get("r1", {})) == 2)
            await here.daemon.stop()
            assert (await held).json["error"]["code"] == "shutting_down"
            assert (await pieces.until("completion:result"))["error"]["details"]["goes_on"] is True
            while await events.next() is not None:
                pass


def address(here: Door) -> tuple[str, int]:
    host, _, port = here.url.removeprefix("http://").rpartition(":")
    return host, int(port)


async def until_true(condition: Any) -> None:
    """Wait until a condition holds that has to be asked."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - it has to be asked
            await asyncio.sleep(0.01)
