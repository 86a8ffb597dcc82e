"""External holders of conversations over the wire: acquire, wait, grant, renew, release, expire; and their
lifetimes."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.testing import SimulatedClock
from tests.daemon_process import DaemonProcess, make_home
from tests.integration.conftest import Connect
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Wire, until


@asynccontextmanager
async def timed(clock: SimulatedClock, expiry: float = 10.0) -> AsyncIterator[Wire]:
    """A connection to a daemon on this clock."""
    async with daemon_and_wire(clock=clock, lock={"expiry": expiry}) as (_, wire):
        yield wire


async def acquire(wire: Wire, request_id: str, conversation_id: str = "c", **data: Any) -> dict[str, Any]:
    return await wire.ask("conversation:acquire_lock", request_id=request_id, conversation_id=conversation_id, **data)


async def holder(wire: Wire, conversation: str = "c") -> str | None:
    name: str | None = (await wire.ask("conversation:lock_status", conversation_id=conversation)).get("holder")
    return name


@pytest.mark.promise("L5", "L6")
async def test_a_free_lock_is_acquired_and_given_back() -> None:
    clock = SimulatedClock()
    async with timed(clock) as wire:
        lock = await acquire(wire, "a", metadata={"why": ["test"]})
        assert (lock["acquired"], lock["state"], lock["conversation_id"]) == (True, "locked", "c")
        assert lock["expires_at"] == clock.now().unix + 10
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        assert (status["locked"], status["state"], status["holder"]) == (True, "locked", "a")
        assert (status["holder_kind"], status["fence"]) == ("external", lock["fence"])
        assert (status["metadata"], status["queue"], status["forks"]) == ({"why": ["test"]}, [], [])
        assert status["expires_at"] == lock["expires_at"]
        released = await wire.ask("conversation:release_lock", request_id="a")
        assert released == {"released": True, "conversation_id": "c", "request_id": "a"} | {
            name: released[name] for name in released if name == "next_request"
        }
        assert released.get("next_request") is None
        assert (await wire.ask("conversation:lock_status", conversation_id="c"))["locked"] is False
        again = await acquire(wire, "b")
        assert again["fence"] > lock["fence"]


@pytest.mark.promise("L5")
async def test_waiters_are_granted_the_lock_in_their_order_by_a_push(wire: Wire, connect: Connect) -> None:
    first = await acquire(wire, "a")
    waiters = [await connect() for _ in range(3)]
    for number, (waiter, priority) in enumerate(zip(waiters, ("low", "normal", "high"), strict=True)):
        reply = await acquire(waiter, f"w{number}", priority=priority)
        assert (reply["acquired"], reply["state"], reply["holder"]) == (False, "queued", "a")
        assert reply["position"] == 1, "each passes the ones before"
    status = await wire.ask("conversation:lock_status", conversation_id="c")
    assert [(one["request_id"], one["position"]) for one in status["queue"]] == [("w2", 0), ("w1", 1), ("w0", 2)]
    assert (await acquire(waiters[0], "w0"))["position"] == 3, "asking again tells the present place"
    fence = first["fence"]
    for held, number in (("a", 2), ("w2", 1), ("w1", 0)):
        released = await wire.ask("conversation:release_lock", request_id=held)
        assert released["next_request"] == f"w{number}"
        grant = await waiters[number].pushed("conversation:locked")
        assert (grant["request_id"], grant["conversation_id"], grant["external"]) == (f"w{number}", "c", True)
        assert grant["fence"] > fence
        fence = grant["fence"]
        assert await holder(wire) == f"w{number}"
    assert all(waiter.lines == [] for waiter in waiters), "nobody hears another's grant"


@pytest.mark.promise("L1", "L2", "L5")
async def test_requests_and_outside_holders_share_one_line(wire: Wire, connect: Connect) -> None:
    await acquire(wire, "outside")
    first = await wire.ask("completion:async", prompt="1", request_id="r1", session_id="c")
    assert (first["status"], first["position"], first["conversation_locked"], first["holder"]) == (
        "queued",
        0,
        True,
        "outside",
    )
    other = await connect()
    assert (await acquire(other, "later"))["position"] == 2
    second = await wire.ask("completion:async", prompt="2", request_id="r2", session_id="c")
    assert second["position"] == 2
    assert (await wire.ask("completion:get", request_id="r2"))["position"] == 2
    assert (await wire.ask("completion:get", request_id="r2"))["holder"] == "outside"
    await wire.ask("conversation:release_lock", request_id="outside")
    assert (await wire.pushed("completion:result"))["request_id"] == "r1"
    await other.pushed("conversation:locked", request_id="later")
    reply = await wire.ask("completion:get", request_id="r2")
    assert (reply["status"], reply["position"], reply["holder"]) == ("queued", 0, "later")
    await other.ask("conversation:release_lock", request_id="later")
    assert (await wire.pushed("completion:result"))["request_id"] == "r2"


@pytest.mark.promise("L1", "L5")
async def test_a_running_request_keeps_outside_holders_out(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=LONG)
    busy = await acquire(wire, "a", wait=False)
    assert (busy["acquired"], busy["state"], busy["holder"]) == (False, "busy", "r")
    assert (await wire.refused("conversation:release_lock", request_id="a")).code == "not_lock_holder"
    queued = await acquire(wire, "a")
    assert (queued["state"], queued["position"]) == ("queued", 1)
    await wire.ask("completion:cancel", request_id="r")
    assert (await wire.pushed("conversation:locked"))["request_id"] == "a"


@pytest.mark.promise("L5")
async def test_without_holding_a_lock_one_can_neither_release_nor_renew(wire: Wire) -> None:
    lock = await acquire(wire, "a")
    await acquire(wire, "waits")
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="d", provider_options=LONG)
    for event in ("conversation:release_lock", "conversation:renew_lock"):
        assert (await wire.refused(event, request_id="nobody")).code == "not_lock_holder"
        assert (await wire.refused(event, request_id="waits")).code == "not_lock_holder"
        assert (await wire.refused(event, request_id="a", fence=lock["fence"] + 1)).code == "not_lock_holder"
        assert (await wire.refused(event, request_id="r")).code == "request_id_conflict"
    assert await holder(wire) == "a"
    assert await holder(wire, "d") == "r"
    assert (await wire.ask("conversation:renew_lock", request_id="a", fence=lock["fence"]))["fence"] == lock["fence"]
    assert (await wire.ask("conversation:release_lock", request_id="a", fence=lock["fence"]))["next_request"] == "waits"
    assert (await wire.refused("conversation:release_lock", request_id="a")).code == "not_lock_holder"


@pytest.mark.promise("L5")
async def test_an_id_holds_or_awaits_one_lock(wire: Wire) -> None:
    await acquire(wire, "a", "c1")
    for conversation in ("c2", "new"):
        error = await wire.refused("conversation:acquire_lock", request_id="a", conversation_id=conversation)
        assert error.code == "request_id_conflict"
    await acquire(wire, "holds c2", "c2")
    await acquire(wire, "waits", "c2")
    assert (
        await wire.refused("conversation:acquire_lock", request_id="waits", conversation_id="c1")
    ).code == "request_id_conflict"
    assert await holder(wire, "new") is None


@pytest.mark.promise("L4", "L5")
async def test_an_outside_lock_expires_unless_it_is_renewed() -> None:
    clock = SimulatedClock()
    async with timed(clock) as wire:
        await wire.ask("monitor:subscribe", pattern="conversation:lock_*")
        first = await acquire(wire, "a")
        await wire.ask("completion:async", prompt="x", request_id="r", session_id="c")
        await clock.advance(9)
        renewed = await wire.ask("conversation:renew_lock", request_id="a")
        assert (renewed["acquired"], renewed["renewed"], renewed["fence"]) == (True, True, first["fence"])
        assert renewed["expires_at"] == clock.now().unix + 10
        await clock.advance(9)
        assert (await acquire(wire, "a"))["renewed"] is True, "acquiring again renews too"
        await clock.advance(9.9)
        assert await holder(wire) == "a"
        await clock.advance(0.2)
        expired = await wire.pushed("conversation:lock_expired")
        assert (expired["conversation_id"], expired["request_id"]) == ("c", "a")
        passed = await wire.pushed("conversation:lock_transferred")
        assert (passed["request_id"], passed["next_request"]) == ("a", "r")
        assert (await wire.pushed("completion:result"))["request_id"] == "r"
        assert (await wire.refused("conversation:renew_lock", request_id="a")).code == "not_lock_holder"
        assert (await acquire(wire, "a"))["fence"] > first["fence"]


@pytest.mark.promise("L4")
async def test_a_step_of_the_wall_clock_expires_nothing_healthy() -> None:
    clock = SimulatedClock()
    async with timed(clock) as wire:
        await acquire(wire, "a")
        for step in (86_400, -172_800):
            clock.step_wall(step)
            await clock.advance(1)
            assert await holder(wire) == "a"
        await clock.advance(9)

        async def free() -> bool:
            return await holder(wire) is None

        await until(free)


@pytest.mark.promise("L4", "L5")
async def test_a_waiter_s_timeout_ends_its_wait_and_is_reported() -> None:
    clock = SimulatedClock()
    async with timed(clock, expiry=100.0) as wire:
        await acquire(wire, "a")
        await acquire(wire, "b", timeout=5)
        await acquire(wire, "c")
        await clock.advance(5.1)
        expired = await wire.pushed("conversation:lock_expired")
        assert expired["request_id"] == "b"
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        assert [one["request_id"] for one in status["queue"]] == ["c"]
        assert (await wire.ask("conversation:release_lock", request_id="a"))["next_request"] == "c"


@pytest.mark.promise("L5")
async def test_a_waiter_stays_when_its_connection_goes_unless_it_waits_while_connected(
    wire: Wire, connect: Connect
) -> None:
    holding, waiting, patient = await connect(), await connect(), await connect()
    await acquire(holding, "a")
    await acquire(waiting, "gone", while_connected=True)
    await acquire(patient, "stays")
    await acquire(wire, "last")
    for one in (holding, waiting, patient):
        await one.leave()

    async def only_the_patient() -> bool:
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        return [one["request_id"] for one in status["queue"]] == ["stays", "last"]

    await until(only_the_patient)
    assert await holder(wire) == "a"
    assert (await wire.ask("conversation:release_lock", request_id="a"))["next_request"] == "stays"
    assert await holder(wire) == "stays"
    assert (await wire.ask("conversation:release_lock", request_id="stays"))["next_request"] == "last"
    await wire.pushed("conversation:locked", request_id="last")


@pytest.mark.promise("L5", "S4")
async def test_a_half_closed_waiter_that_vanishes_waits_no_longer(wire: Wire, connect: Connect) -> None:
    waiting = await connect()
    await acquire(wire, "a")
    await acquire(waiting, "gone", while_connected=True)
    waiting.shut()
    await acquire(wire, "b")
    await waiting.leave()

    async def alone() -> bool:
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        return [one["request_id"] for one in status["queue"]] == ["b"]

    await until(alone)
    assert (await wire.ask("system:health"))["connections"] == 1


@pytest.mark.promise("L5", "S4")
async def test_a_real_daemon_notices_who_is_gone_and_who_only_sends_no_more(tmp_path: Path) -> None:
    """In its own process, on the event loop that it really uses."""
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire, await Wire.open(process.socket_path) as quiet:
            await acquire(wire, "a")
            gone, late = await Wire.open(process.socket_path), await Wire.open(process.socket_path)
            await acquire(gone, "gone", while_connected=True)
            await acquire(late, "gone later", while_connected=True)
            await acquire(quiet, "stays")
            late.shut()
            quiet.shut()
            await gone.leave()
            await late.leave()

            async def one_left() -> bool:
                status = await wire.ask("conversation:lock_status", conversation_id="c")
                return [one["request_id"] for one in status["queue"]] == ["stays"]

            await until(one_left)
            await wire.ask("conversation:release_lock", request_id="a")
            await quiet.pushed("conversation:locked", request_id="stays")
            await quiet.end()


@pytest.mark.promise("L5")
async def test_a_waiter_on_two_connections_waits_until_both_are_gone(wire: Wire, connect: Connect) -> None:
    await acquire(wire, "a")
    first, second = await connect(), await connect()
    await acquire(first, "w", while_connected=True)
    await acquire(second, "w", while_connected=True)
    await first.leave()
    await wire.ask("system:ready")

    async def line() -> list[str]:
        status = await wire.ask("conversation:lock_status", conversation_id="c")
        return [one["request_id"] for one in status["queue"]]

    async def one_left() -> bool:
        return bool((await wire.ask("system:health"))["connections"] == 2)

    await until(one_left)
    assert await line() == ["w"], "it waits on the second connection too"
    await wire.ask("conversation:release_lock", request_id="a")
    assert (await second.pushed("conversation:locked"))["request_id"] == "w"


@pytest.mark.promise("F8", "L5")
async def test_locks_and_waiters_can_be_cancelled_by_their_id(wire: Wire) -> None:
    await acquire(wire, "a")
    await acquire(wire, "b")
    await acquire(wire, "c")
    assert (await wire.ask("completion:cancel", request_id="b"))["status"] == "cancelled"
    assert (await wire.ask("completion:cancel", request_id="a"))["status"] == "cancelled"
    assert (await wire.pushed("conversation:locked"))["request_id"] == "c"
    assert (await wire.refused("completion:cancel", request_id="a")).code == "not_found"
    assert await holder(wire) == "c"


@pytest.mark.promise("L6")
async def test_all_locks_are_listed_with_totals_and_in_pages(wire: Wire) -> None:
    for number in range(25):
        await acquire(wire, f"l{number}", f"c{number}")
    await acquire(wire, "waits", "c3")
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="busy", provider_options=LONG)
    names: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        page = await wire.ask("conversation:lock_status", limit=10, **cursor)
        assert (page["locked_conversations"], page["external_locks"], page["external_waiters"]) == (26, 25, 1)
        assert len(page["locks"]) <= 10
        names += [one["holder"] for one in page["locks"]]
        if "cursor" not in page:
            break
        cursor = {"cursor": page["cursor"]}
    assert sorted(names) == sorted([f"l{number}" for number in range(25)] + ["r"])
    assert (await wire.ask("conversation:lock_status", conversation_id="never seen"))["state"] == "free"


@pytest.mark.promise("L4", "L5", "Q3")
async def test_outside_locks_survive_the_daemon_s_death_with_their_fence(tmp_path: Path) -> None:
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        held = await acquire(wire, "a")
        await acquire(wire, "patient")
        await acquire(wire, "bound to its connection", while_connected=True)
        await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", model="stub/x")
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            status = await wire.ask("conversation:lock_status", conversation_id="c")
            assert (status["holder"], status["fence"]) == ("a", held["fence"])
            assert [one["request_id"] for one in status["queue"]] == ["patient", "r"]
            assert (await wire.ask("conversation:renew_lock", request_id="a", fence=held["fence"]))["acquired"] is True
            await wire.ask("conversation:release_lock", request_id="a", fence=held["fence"])
            assert await holder(wire) == "patient"
            await wire.ask("conversation:release_lock", request_id="patient")
            assert (await wire.ask("completion:wait", request_id="r"))["status"] == "completed"
            figures = await wire.ask("completion:queue_status")
            assert [figures[name] for name in ("locked_conversations", "external_locks", "external_waiters")] == [0] * 3
            assert (await acquire(wire, "next"))["fence"] > held["fence"]
