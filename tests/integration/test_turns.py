"""Many lines, long answers, half lines and waits of clients that leave: no other waits, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from ksi.transports.unix_socket import IN_TURN, SocketConnection
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import PATIENCE, Wire, answer, until

WAITERS = 50
BEFORE = 10 * IN_TURN
"""Lines that are served before the one in question, in turns of their own: their answers have no reader."""
LATER = {"prompt": "later", "request_id": "later", "delay": 86_400}


@pytest.fixture(autouse=True)
def _new_objects_only() -> Iterator[None]:
    """Leaves what earlier tests made out of the collector's looks, which would hold the loop for most of a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.promise("O9", "S4")
@pytest.mark.parametrize("event", ["completion:get", "completion:wait"])
async def test_a_reader_gets_all_its_answers_however_long_they_are(event: str) -> None:
    async with daemon_and_wire(socket={"max_backlog": 1_000_000}) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="long", provider_options={"text": "y" * 900_000})
        replies = [wire.post(event, {"request_id": "long"}) for _ in range(100)]
        for reply in replies:
            assert len((await answer(reply))["result"]) == 900_000


@pytest.mark.promise("O9")
async def test_a_thousand_lines_of_one_client_do_not_stand_before_the_one_of_another() -> None:
    async with daemon_and_wire() as (daemon, wire), await Wire.open(daemon.config.socket_path) as other:
        await other.ask("system:startup")
        many = [wire.post("completion:queue_status", {}) for _ in range(1_000)]
        await wire.drain()
        await other.ask("system:startup")
        assert sum(reply.done() for reply in many) < 500
        await asyncio.gather(*many)


@pytest.mark.promise("S4")
async def test_half_lines_of_all_clients_have_one_bound_and_a_client_that_sends_its_line_is_served() -> None:
    config: dict[str, Any] = {"max_line": 1_000_000, "max_input": 4_000_000}
    async with daemon_and_wire(socket=config) as (daemon, wire):
        slow = [await Wire.open(daemon.config.socket_path) for _ in range(10)]
        for one in slow:
            one.raw(b'{"event": "' + b"x" * 900_000)
            await one.drain()

        async def bounded() -> bool:
            return daemon.socket.connections <= 5

        await until(bounded)
        assert (await wire.ask("completion:request", prompt="x" * 900_000))["status"] == "completed"
        gone = [one for one in slow if one.lines]
        assert gone == slow[: len(gone)], "those that let theirs lie for the longest time"
        for one in gone:
            await one.end()
            error = one.lines[0]["error"]
            assert (error["code"], error["retryable"], error["details"]["limit"]) == ("too_much_input", True, 4_000_000)
        for one in slow:
            await one.leave()


async def _nothing_waits(wire: Wire) -> None:
    async def look() -> bool:
        return bool((await wire.ask("system:health"))["connections"] == 1)

    await until(look)


@pytest.mark.promise("O9", "R1")
@pytest.mark.parametrize("timeout", [None, 3_600.0])
async def test_clients_that_wait_and_leave_are_forgotten_before_their_requests_end(timeout: float | None) -> None:
    async with daemon_and_wire() as (daemon, wire):
        await wire.ask("completion:async", **LATER)
        before = _connections()
        data = {"request_id": "later"} | ({} if timeout is None else {"timeout": timeout, "stream": True})
        for _ in range(WAITERS):
            client = await Wire.open(daemon.config.socket_path)
            client.post("completion:wait", data)
            await client.ask("system:startup")
            await client.leave()
        await _nothing_waits(wire)

        async def forgotten() -> bool:
            return not _connections() - before

        await until(forgotten)
        await wire.ask("completion:cancel", request_id="later")


@pytest.mark.promise("O9", "R1")
@pytest.mark.parametrize(
    "line",
    [
        {"event": "completion:wait", "data": {"request_id": "later", "stream": True}},
        {"event": "completion:request", "data": {"prompt": "x", "delay": 86_400, "stream": True}},
        {"event": "completion:async", "data": {"prompt": "x", "delay": 86_400}},
        {"event": "monitor:subscribe", "data": {"pattern": "*"}},
        {"event": "conversation:acquire_lock", "data": {"request_id": "l", "conversation_id": "taken"}},
    ],
    ids=lambda line: str(line["event"]),
)
async def test_a_client_that_is_gone_before_its_lines_are_served_is_forgotten_too(line: dict[str, Any]) -> None:
    async with daemon_and_wire() as (daemon, wire):
        await wire.ask("completion:async", **LATER)
        await wire.ask("conversation:acquire_lock", request_id="holder", conversation_id="taken")
        before = _connections()
        for _ in range(WAITERS):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(daemon.config.socket_path))
                client.sendall(b'{"event": "system:startup"}\n' * BEFORE + json.dumps(line).encode() + b"\n")
        await wire.ask("system:startup")
        await _nothing_waits(wire)

        async def forgotten() -> bool:
            return not _connections() - before

        await until(forgotten)


@pytest.mark.promise("O9")
async def test_a_wait_with_a_long_timeout_that_was_answered_holds_nothing() -> None:
    async with daemon_and_wire() as (daemon, wire):
        await wire.ask("system:startup")
        before = _connections()
        client = await Wire.open(daemon.config.socket_path)
        for number in range(WAITERS):
            name = f"r{number}"
            both = [
                client.post("completion:async", {"prompt": "x", "request_id": name}),
                client.post("completion:wait", {"request_id": name, "timeout": 3_600.0}),
            ]
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*both)
        await client.leave()
        await _nothing_waits(wire)

        async def forgotten() -> bool:
            return not _connections() - before

        await until(forgotten)


def _connections() -> weakref.WeakSet[SocketConnection]:
    """The clients of this test that anything still holds."""
    gc.collect()
    return weakref.WeakSet(one for one in gc.get_objects() if isinstance(one, SocketConnection))
