"""The asyncio client against a daemon's side in memory: replies, losses, handles, streams, subscriptions, locks."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ksi.client import Chunk, Client, Handle
from ksi.client.channel import MAX_DELAY
from ksi.client.fields import ONCE, REPEATABLE, CompletionFields
from ksi.clock import Chance
from ksi.errors import (
    ConnectionFailed,
    ConversationBusy,
    InvalidData,
    PayloadTooLarge,
    RemoteError,
    SlowConsumer,
    WaitTimeout,
)
from ksi.events.completions import CompletionData
from ksi.events.specs import SPECS
from ksi.protocol import field_names
from tests.scripted_daemon import ScriptedDaemon, SteppingClock


@pytest.fixture
def daemon() -> ScriptedDaemon:
    return ScriptedDaemon()


@pytest.fixture
def clock() -> SteppingClock:
    return SteppingClock()


@pytest.fixture
async def client(daemon: ScriptedDaemon, clock: SteppingClock) -> AsyncIterator[Client]:
    async with connected(daemon, clock) as client:
        yield client


@asynccontextmanager
async def connected(daemon: ScriptedDaemon, clock: SteppingClock, **options: Any) -> AsyncIterator[Client]:
    chance = Chance(random.Random(7))
    client = Client("/nowhere/daemon.sock", clock=clock, chance=chance, connect=daemon.connect, **options)
    async with asyncio.timeout(10), client:
        yield client


def reply(request_id: str, status: str = "completed", **more: Any) -> dict[str, Any]:
    return {"request_id": request_id, "status": status, "session_id": "s1", **more}


async def submitted(client: Client, daemon: ScriptedDaemon, **fields: Any) -> Handle:
    daemon.answers["completion:async"] = lambda event: {
        **reply(event["data"]["request_id"], "ready"),
        "state": "running",
        "position": 0,
    }
    return await client.submit("Hello", **fields)


async def settled() -> None:
    """Let all that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


# Events and replies


async def test_an_event_s_reply_is_its_data(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["completion:status"] = lambda event: {"queued": 3, "echo": event["data"]}
    assert await client.send_event("completion:status", {"a": 1}) == {"queued": 3, "echo": {"a": 1}}


async def test_an_error_answer_is_raised_with_all_that_it_says(client: Client, daemon: ScriptedDaemon) -> None:
    error = {
        "code": "queue_full",
        "message": "the queue is full",
        "retryable": True,
        "details": {"code": 1, "limit": 2},
    }
    daemon.answers["completion:async"] = lambda event: {"error": error}
    with pytest.raises(RemoteError, match="the queue is full") as caught:
        await client.send_event("completion:async", {"prompt": "Hello"})
    assert caught.value.code == "queue_full"
    assert caught.value.retryable
    assert caught.value.details == {"code": 1, "limit": 2}


async def test_replies_in_another_order_reach_who_asked(client: Client, daemon: ScriptedDaemon) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(client.send_event("completion:get", {"request_id": "a"}))
        second = group.create_task(client.send_event("completion:get", {"request_id": "b"}))
        await daemon.came("completion:get", 2)
        for event in reversed(daemon.events):
            daemon.reply(event, {"was": event["data"]["request_id"]})
    assert first.result() == {"was": "a"}
    assert second.result() == {"was": "b"}


async def test_a_reply_that_does_not_come_in_time_is_a_wait_timeout(client: Client, daemon: ScriptedDaemon) -> None:
    with pytest.raises(WaitTimeout, match="completion:status was not answered"):
        await client.send_event("completion:status", timeout=0.01)
    daemon.reply(daemon.events[0], {"late": True})
    daemon.answers["system:health"] = lambda event: {"status": "healthy"}
    assert await client.send_event("system:health") == {"status": "healthy"}


async def test_a_client_that_is_not_open_says_how_to_open_it(daemon: ScriptedDaemon, clock: SteppingClock) -> None:
    client = Client("/nowhere/daemon.sock", clock=clock, connect=daemon.connect)
    with pytest.raises(ConnectionFailed, match="async with"):
        await client.send_event("completion:status")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (FileNotFoundError(2, "No such file"), "start it with `ksi start`"),
        (ConnectionRefusedError(111, "refused"), "start it with `ksi start`"),
        (PermissionError(13, "denied"), "belongs to another user"),
        (OSError("AF_UNIX path too long"), "path too long"),
    ],
)
async def test_without_a_daemon_opening_fails_at_once_with_advice(
    daemon: ScriptedDaemon, clock: SteppingClock, refusal: OSError, words: str
) -> None:
    daemon.refusal = refusal
    with pytest.raises(ConnectionFailed, match=words):
        async with connected(daemon, clock):
            pytest.fail("it opened")
    assert daemon.attempts == 1


async def test_closing_fails_pending_calls(client: Client, daemon: ScriptedDaemon) -> None:
    waiting = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "a"}))
    handle = await submitted(client, daemon)
    await daemon.came("completion:get")
    await client.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        await waiting
    with pytest.raises(ConnectionFailed, match="closed"):
        await handle.result()


@pytest.mark.parametrize("data", [{"x": object()}, {"x": "\ud800"}, {1.5: {}, object(): 1}])
async def test_invalid_json_is_refused_before_it_is_sent(
    client: Client, daemon: ScriptedDaemon, data: dict[Any, Any]
) -> None:
    with pytest.raises(InvalidData, match="completion:status"):
        await client.send_event("completion:status", data)
    assert daemon.events == []


# Lines that are too long


@pytest.mark.promise("S1")
async def test_an_event_longer_than_a_line_may_be_is_refused_here(daemon: ScriptedDaemon, clock: SteppingClock) -> None:
    async with connected(daemon, clock, max_line=1000) as client:
        with pytest.raises(PayloadTooLarge, match="more than the 1000"):
            await client.send_event("completion:get", {"request_id": "x" * 1000})
    assert daemon.events == []


@pytest.mark.promise("S1")
async def test_an_event_that_is_too_long_for_the_daemon_alone_fails_and_no_other(
    client: Client, daemon: ScriptedDaemon
) -> None:
    long = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "x" * 1000}))
    short = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "y"}))
    await daemon.came("completion:get", 2)
    daemon.say(
        {"event": None, "error": {"code": "payload_too_large", "message": "too long", "details": {"limit": 900}}}
    )
    with pytest.raises(RemoteError, match="too long") as caught:
        await long
    assert caught.value.code == "payload_too_large"
    daemon.reply(daemon.named("completion:get")[1], {"fine": True})
    assert await short == {"fine": True}


async def test_an_answer_longer_than_a_line_may_be_fails_its_call_and_is_not_asked_again(
    daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    async with connected(daemon, clock, max_line=1000) as client:
        asking = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "x"}))
        await daemon.came("completion:get")
        daemon.send_bytes(b"x" * 1001)
        with pytest.raises(PayloadTooLarge, match="raise max_line"):
            await asking
        daemon.answers["system:health"] = lambda event: {"status": "healthy"}
        assert await client.send_event("system:health") == {"status": "healthy"}
    assert len(daemon.named("completion:get")) == 1


async def test_a_foreign_program_at_the_other_end_is_reported(client: Client, daemon: ScriptedDaemon) -> None:
    asking = asyncio.ensure_future(client.send_event("conversation:release_lock", {"request_id": "x"}))
    await daemon.came("conversation:release_lock")
    daemon.send_bytes(b"HTTP/1.1 400 Bad Request\r\n")
    with pytest.raises(ConnectionFailed, match="does not speak KSI's protocol"):
        await asking


# Lost connections


def test_each_event_is_known_to_be_repeatable_or_not() -> None:
    incoming = {name for name, spec in SPECS.items() if spec.incoming}
    assert incoming == REPEATABLE | ONCE
    assert not REPEATABLE & ONCE


def test_the_typed_fields_are_the_fields_of_a_completion() -> None:
    assert CompletionFields.__annotations__.keys() | {"prompt"} == field_names(CompletionData)


@pytest.mark.promise("Q4")
@pytest.mark.parametrize("event", ["completion:request", "completion:async"])
async def test_a_completion_gets_an_id_here_and_is_asked_for_again_under_it(
    client: Client, daemon: ScriptedDaemon, event: str
) -> None:
    asking = asyncio.ensure_future(client.send_event(event, {"prompt": "Hello"}))
    first = await daemon.came(event)
    daemon.drop()
    second = await daemon.came(event, 2)
    assert first["data"] == second["data"]
    assert first["data"]["request_id"].startswith("req_")
    daemon.reply(second, reply(second["data"]["request_id"]))
    assert (await asking)["request_id"] == first["data"]["request_id"]


async def test_an_id_that_the_caller_gave_is_kept(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["completion:request"] = lambda event: reply(event["data"]["request_id"], result="Hi")
    answer = await client.complete("Hello", request_id="mine", model="stub/x")
    assert answer.request_id == "mine"
    assert answer.result == "Hi"
    assert daemon.events[0]["data"] == {"prompt": "Hello", "request_id": "mine", "model": "stub/x"}


async def test_an_event_that_may_not_be_sent_twice_fails_with_its_connection(
    client: Client, daemon: ScriptedDaemon
) -> None:
    asking = asyncio.ensure_future(client.send_event("conversation:release_lock", {"request_id": "x"}))
    await daemon.came("conversation:release_lock")
    daemon.drop(ConnectionResetError("reset by peer"))
    with pytest.raises(ConnectionFailed, match=r"lost \(reset by peer\) before conversation:release_lock"):
        await asking
    await daemon.until(lambda: len(daemon.wires) == 2)
    assert len(daemon.events) == 1


async def test_the_daemon_s_last_word_is_in_the_error(client: Client, daemon: ScriptedDaemon) -> None:
    asking = asyncio.ensure_future(client.send_event("conversation:release_lock", {"request_id": "x"}))
    await daemon.came("conversation:release_lock")
    daemon.say({"event": None, "error": {"code": "slow_consumer", "message": "you read too slowly"}})
    await settled()
    daemon.drop()
    with pytest.raises(ConnectionFailed, match="you read too slowly"):
        await asking


@pytest.mark.promise("S4")
async def test_an_answer_that_is_too_much_to_read_is_not_asked_for_without_end(
    client: Client, daemon: ScriptedDaemon
) -> None:
    asking = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "x"}))
    for times in (1, 2, 3):
        await daemon.came("completion:get", times)
        daemon.say({"event": None, "error": {"code": "slow_consumer", "message": "much was not read"}})
        await settled()
        daemon.drop()
    with pytest.raises(SlowConsumer, match="much was not read"):
        await asking
    assert len(daemon.named("completion:get")) == 3


async def test_a_call_while_the_connection_is_away_waits_for_it(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["conversation:release_lock"] = lambda event: {"released": True}
    daemon.refusal = ConnectionRefusedError()
    daemon.drop()
    await daemon.until(lambda: daemon.attempts == 2)
    asking = asyncio.ensure_future(client.send_event("conversation:release_lock", {"request_id": "x"}))
    await daemon.until(lambda: daemon.attempts == 4)
    daemon.refusal = None
    assert await asking == {"released": True}


async def test_a_daemon_that_stays_away_fails_all_that_waits_for_it(
    client: Client, daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    handle = await submitted(client, daemon)
    async with client.subscribe("completion:*") as events:
        asking = asyncio.ensure_future(client.send_event("completion:get", {"request_id": "x"}))
        await daemon.came("completion:get")
        daemon.refusal = ConnectionRefusedError()
        daemon.drop()
        for waiting in (asking, handle.result(), anext(events)):
            with pytest.raises(ConnectionFailed, match="ksi start"):
                await waiting
    assert 30 <= sum(clock.slept) <= 30 + MAX_DELAY


async def test_waits_between_attempts_grow_to_a_limit_and_are_not_alike(
    client: Client, daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    daemon.refusal = ConnectionRefusedError()
    daemon.drop()
    await daemon.until(lambda: daemon.attempts == 2)
    with pytest.raises(ConnectionFailed):
        await client.send_event("system:health")
    assert clock.slept[0] < 0.1
    assert min(clock.slept[8:]) >= MAX_DELAY / 2
    assert max(clock.slept) <= MAX_DELAY
    assert len(set(clock.slept)) == len(clock.slept)


async def test_a_daemon_that_was_given_up_is_found_again_when_it_is_back(
    client: Client, daemon: ScriptedDaemon
) -> None:
    daemon.answers["system:health"] = lambda event: {"status": "healthy"}
    daemon.refusal = ConnectionRefusedError()
    daemon.drop()
    await daemon.until(lambda: daemon.attempts == 2)
    with pytest.raises(ConnectionFailed):
        await client.send_event("system:health")
    daemon.refusal = None
    assert await client.send_event("system:health") == {"status": "healthy"}


async def test_a_daemon_that_hangs_up_at_once_is_not_asked_without_end(
    client: Client, daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    daemon.hangs_up = True
    daemon.drop()
    with pytest.raises(ConnectionFailed, match="hangs up at once"):
        await client.send_event("system:health")
    assert daemon.attempts < 40
    assert 30 <= sum(clock.slept) <= 30 + MAX_DELAY


# Submitted requests


async def test_a_submitted_request_s_result_is_the_pushed_one(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, session_id="s1")
    assert handle.submitted["position"] == 0
    assert handle.session_id == "s1"
    assert not handle.done
    daemon.push("completion:result", **reply("somebody else's"))
    daemon.push("completion:result", **reply(handle.request_id, result="Hi", usage={"input_tokens": 4}))
    answer = await handle.result()
    assert answer.result == "Hi"
    assert answer.usage is not None
    assert answer.usage.input_tokens == 4
    assert handle.done


async def test_a_request_that_failed_raises_its_class_and_can_be_looked_at(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon)
    error = {"code": "rate_limited", "message": "too many requests"}
    daemon.push("completion:result", **reply(handle.request_id, "failed", error=error))
    assert (await handle.wait()).status == "failed"
    with pytest.raises(RemoteError, match="too many requests") as caught:
        await handle.result()
    assert caught.value.code == "rate_limited"
    assert caught.value.retryable
    assert caught.value.details == {"request_id": handle.request_id, "status": "failed", "session_id": "s1"}


@pytest.mark.parametrize("status", ["cancelled", "blocked", "expired"])
async def test_a_completion_that_ended_without_an_answer_raises_its_state(
    client: Client, daemon: ScriptedDaemon, status: str
) -> None:
    daemon.answers["completion:request"] = lambda event: reply(event["data"]["request_id"], status)
    with pytest.raises(RemoteError, match=status) as caught:
        await client.complete("Hello")
    assert caught.value.code == status
    assert not caught.value.retryable


async def test_a_submission_that_was_refused_leaves_no_handle(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["completion:async"] = lambda event: {"error": {"code": "queue_full", "message": "full"}}
    with pytest.raises(RemoteError):
        await client.submit("Hello")
    daemon.drop()
    await daemon.until(lambda: len(daemon.wires) == 2)
    await settled()
    assert daemon.named("completion:wait") == []


async def test_a_request_that_was_final_at_its_submission_is_fetched(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["completion:async"] = lambda event: {**reply("r1", "blocked"), "state": "blocked"}
    daemon.answers["completion:wait"] = lambda event: reply(event["data"]["request_id"], "blocked")
    handle = await client.submit("Hello", request_id="r1")
    assert (await handle.wait()).status == "blocked"


async def test_waiting_for_a_result_can_end_before_it_does(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon)
    with pytest.raises(WaitTimeout, match="it continues"):
        await handle.result(timeout=0.01)
    daemon.push("completion:result", **reply(handle.request_id, result="Hi"))
    assert (await handle.result()).result == "Hi"


@pytest.mark.promise("R1")
async def test_a_handle_is_attached_again_by_its_id_after_a_lost_connection(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon)
    daemon.drop()
    asked = await daemon.came("completion:wait")
    assert asked["data"] == {"request_id": handle.request_id}
    daemon.drop()
    asked = await daemon.came("completion:wait", 2)
    daemon.reply(asked, reply(handle.request_id, result="Hi"))
    assert (await handle.result()).result == "Hi"
    daemon.push("completion:result", **reply(handle.request_id, result="Hi"))
    await settled()
    assert (await handle.result()).result == "Hi"


@pytest.mark.promise("R1")
async def test_a_submission_whose_answer_was_lost_is_repeated_and_then_waited_for(
    client: Client, daemon: ScriptedDaemon
) -> None:
    submitting = asyncio.ensure_future(client.submit("Hello"))
    await daemon.came("completion:async")
    daemon.drop()
    again = await daemon.came("completion:async", 2)
    assert daemon.named("completion:wait") == []
    request_id = again["data"]["request_id"]
    daemon.answers["completion:wait"] = lambda event: reply(event["data"]["request_id"], result="Hi")
    daemon.reply(again, {**reply(request_id, "ready"), "state": "running"})
    assert (await (await submitting).result()).result == "Hi"


async def test_a_request_that_the_daemon_forgot_fails_its_handle(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon)
    daemon.answers["completion:wait"] = lambda event: {"error": {"code": "not_found", "message": "no such request"}}
    daemon.drop()
    with pytest.raises(RemoteError) as caught:
        await handle.result()
    assert caught.value.code == "not_found"


async def test_a_dropped_handle_is_not_asked_for_again(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon)
    del handle
    gc.collect()
    daemon.drop()
    await daemon.until(lambda: len(daemon.wires) == 2)
    await settled()
    assert daemon.named("completion:wait") == []


async def test_a_request_from_elsewhere_can_be_attached_to(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["completion:wait"] = lambda event: reply(event["data"]["request_id"], result="Hi")
    assert (await client.attach("r1").result()).result == "Hi"


async def test_one_request_has_one_handle_while_it_is_waited_for(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, request_id="r1")
    assert await submitted(client, daemon, request_id="r1") is handle
    assert client.attach("r1") is handle
    assert daemon.named("completion:wait") == []
    assert client.attach("r1", stream=True) is handle
    assert (await daemon.came("completion:wait"))["data"] == {"request_id": "r1", "stream": True, "after_seq": -1}
    end(daemon, handle, "Hi")
    assert (await handle.result()).result == "Hi"
    assert client.attach("r1") is not handle


async def test_an_answer_of_another_version_fails_the_handle_and_not_the_client(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon)
    daemon.push("completion:result", request_id=handle.request_id, status=3)
    with pytest.raises(InvalidData, match="not understood"):
        await handle.result()
    assert len(daemon.wires) == 1


async def test_a_request_is_cancelled_by_its_handle(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon)
    daemon.answers["completion:cancel"] = lambda event: {
        "request_id": event["data"]["request_id"],
        "status": "cancelled",
        "state": "cancelled",
    }
    assert (await handle.cancel()).status == "cancelled"
    assert daemon.named("completion:cancel")[0]["data"] == {"request_id": handle.request_id}


# Streams


def chunk(daemon: ScriptedDaemon, handle: Handle, attempt: int, seq: int, text: str) -> None:
    daemon.push("completion:chunk", request_id=handle.request_id, attempt=attempt, seq=seq, text=text)


def end(daemon: ScriptedDaemon, handle: Handle, text: str) -> None:
    daemon.push("completion:result", **reply(handle.request_id, result=text))


async def all_chunks(handle: Handle) -> list[Chunk]:
    return [piece async for piece in handle.chunks()]


@pytest.mark.promise("R2")
async def test_text_comes_piece_by_piece(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    assert daemon.events[0]["data"]["stream"] is True
    pieces = handle.stream()
    chunk(daemon, handle, 1, 0, "Red, ")
    assert await anext(pieces) == "Red, "
    chunk(daemon, handle, 1, 1, "green")
    assert await anext(pieces) == "green"
    end(daemon, handle, "Red, green")
    assert [piece async for piece in pieces] == []


@pytest.mark.promise("R2")
async def test_a_new_attempt_voids_the_text_before_it(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    reading = asyncio.ensure_future(all_chunks(handle))
    chunk(daemon, handle, 1, 0, "Re")
    await settled()
    chunk(daemon, handle, 2, 0, "Blue")
    chunk(daemon, handle, 1, 1, "d of an attempt that is over")
    chunk(daemon, handle, 2, 1, ".")
    end(daemon, handle, "Blue.")
    assert await reading == [Chunk("Re", 1, 0), Chunk("Blue", 2, 0, restarted=True), Chunk(".", 2, 1)]


@pytest.mark.promise("R2")
async def test_a_text_that_is_read_late_has_only_the_last_attempt_s_pieces(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon, stream=True)
    chunk(daemon, handle, 1, 0, "Re")
    chunk(daemon, handle, 2, 0, "Blue")
    end(daemon, handle, "Blue")
    await handle.wait()
    assert await all_chunks(handle) == [Chunk("Blue", 2, 0)]


@pytest.mark.promise("R2")
async def test_pieces_that_come_twice_after_a_lost_connection_are_given_once(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon, stream=True)
    reading = asyncio.ensure_future(all_chunks(handle))
    chunk(daemon, handle, 1, 0, "Red, ")
    await settled()
    daemon.drop()
    asked = await daemon.came("completion:wait")
    assert asked["data"] == {"request_id": handle.request_id, "stream": True, "after_seq": -1}
    chunk(daemon, handle, 1, 0, "Red, ")
    chunk(daemon, handle, 1, 1, "green")
    daemon.reply(asked, reply(handle.request_id, result="Red, green"))
    assert await reading == [Chunk("Red, ", 1, 0), Chunk("green", 1, 1)]


@pytest.mark.promise("R2")
async def test_the_result_brings_the_lost_pieces(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    chunk(daemon, handle, 1, 0, "Red, ")
    chunk(daemon, handle, 1, 2, "blue")
    end(daemon, handle, "Red, green, blue")
    assert await all_chunks(handle) == [Chunk("Red, ", 1, 0), Chunk("green, blue", 1, 1)]


@pytest.mark.promise("R2")
async def test_a_result_that_differs_from_the_streamed_text_comes_whole(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    reading = asyncio.ensure_future(all_chunks(handle))
    chunk(daemon, handle, 1, 0, "Red")
    await settled()
    end(daemon, handle, "Blue")
    assert await reading == [Chunk("Red", 1, 0), Chunk("Blue", 2, 0, restarted=True)]


async def test_a_request_that_is_not_streamed_gives_its_text_in_one_piece(
    client: Client, daemon: ScriptedDaemon
) -> None:
    handle = await submitted(client, daemon)
    end(daemon, handle, "Red")
    assert await all_chunks(handle) == [Chunk("Red", 1, 0)]


async def test_several_can_read_one_answer(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    first, second = asyncio.ensure_future(all_chunks(handle)), asyncio.ensure_future(all_chunks(handle))
    for seq, text in enumerate("abc"):
        chunk(daemon, handle, 1, seq, text)
        await settled()
    end(daemon, handle, "abc")
    assert await first == await second == [Chunk("a", 1, 0), Chunk("b", 1, 1), Chunk("c", 1, 2)]


async def test_a_stream_ends_with_the_error_of_its_request(client: Client, daemon: ScriptedDaemon) -> None:
    handle = await submitted(client, daemon, stream=True)
    pieces = handle.stream()
    chunk(daemon, handle, 1, 0, "Re")
    assert await anext(pieces) == "Re"
    error = {"code": "network_error", "message": "the provider hung up"}
    daemon.push("completion:result", **reply(handle.request_id, "failed", error=error))
    with pytest.raises(RemoteError, match="hung up"):
        await anext(pieces)


# Subscriptions


async def test_a_subscription_gets_the_events_that_match_its_patterns(client: Client, daemon: ScriptedDaemon) -> None:
    async with client.subscribe("completion:*", "conversation:forked") as events:
        daemon.push("conversation:locked", conversation_id="a")
        daemon.push("something:new", of="a later version")
        daemon.push("conversation:forked", conversation_id="b")
        daemon.push("completion:progress", request_id="r")
        assert (await anext(events)).data == {"conversation_id": "b"}
        event = await anext(events)
    assert (event.event, event.data, event.timestamp) == ("completion:progress", {"request_id": "r"}, 2.5)
    assert daemon.named("monitor:subscribe")[0]["data"] == {"patterns": ["completion:*", "conversation:forked"]}


async def test_a_subscription_without_patterns_gets_everything_even_unknown_events(
    client: Client, daemon: ScriptedDaemon
) -> None:
    async with client.subscribe() as events:
        daemon.push("something:new", of="a later version")
        assert (await anext(events)).event == "something:new"


async def test_a_subscription_that_was_not_entered_begins_with_its_first_read(
    client: Client, daemon: ScriptedDaemon
) -> None:
    reading = asyncio.ensure_future(anext(client.subscribe("*")))
    await daemon.came("monitor:subscribe")
    await settled()
    daemon.push("something:new")
    assert (await reading).event == "something:new"


async def test_a_reply_without_a_call_is_no_event(client: Client, daemon: ScriptedDaemon) -> None:
    async with client.subscribe() as events:
        with pytest.raises(WaitTimeout):
            await client.send_event("completion:status", timeout=0.01)
        daemon.reply(daemon.named("completion:status")[0], {"late": True})
        daemon.push("something:new")
        assert (await anext(events)).event == "something:new"


async def test_only_patterns_that_no_other_subscription_has_are_unsubscribed(
    client: Client, daemon: ScriptedDaemon
) -> None:
    async with client.subscribe("a:*", "b:*"):
        async with client.subscribe("b:*", "c:*", "c:*"):
            pass
        assert daemon.named("monitor:unsubscribe")[0]["data"] == {"patterns": ["c:*"]}
    assert daemon.named("monitor:unsubscribe")[1]["data"] == {"patterns": ["a:*", "b:*"]}


async def test_a_subscription_is_made_again_after_a_lost_connection_and_counts_the_gap(
    client: Client, daemon: ScriptedDaemon
) -> None:
    async with client.subscribe("a:*") as events:
        daemon.drop()
        again = await daemon.came("monitor:subscribe", 2)
        assert again["data"] == {"patterns": ["a:*"]}
        daemon.push("a:b")
        assert (await anext(events)).event == "a:b"
        assert events.gaps == 1


@pytest.mark.promise("S4")
async def test_a_subscriber_that_does_not_read_costs_bounded_memory_and_is_notified(
    daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    async with connected(daemon, clock, max_unread=10_000) as client, client.subscribe("a:*") as events:
        for number in range(100):
            daemon.push("a:b", number=number, text="x" * 1000)
        await settled()
        read = []
        with pytest.raises(SlowConsumer, match="10000 bytes"):
            async for event in events:
                read.append(event.data["number"])
        assert read == list(range(9))
        daemon.answers["system:health"] = lambda event: {"status": "healthy"}
        assert await client.send_event("system:health") == {"status": "healthy"}


async def test_a_reader_of_a_closed_subscription_comes_to_its_end(client: Client, daemon: ScriptedDaemon) -> None:
    subscription = client.subscribe()
    reading = asyncio.ensure_future(anext(subscription, None))
    await daemon.came("monitor:subscribe")
    await settled()
    await subscription.close()
    await subscription.close()
    assert await reading is None


async def test_a_subscription_that_the_daemon_refuses_is_forgotten(client: Client, daemon: ScriptedDaemon) -> None:
    daemon.answers["monitor:subscribe"] = lambda event: {"error": {"code": "invalid_data", "message": "no"}}
    with pytest.raises(RemoteError):
        async with client.subscribe("a:*"):
            pytest.fail("it was entered")
    daemon.drop()
    await daemon.until(lambda: len(daemon.wires) == 2)
    await settled()
    assert len(daemon.named("monitor:subscribe")) == 1


# Locks


def lock_answers(daemon: ScriptedDaemon, clock: SteppingClock, acquired: bool) -> None:
    def acquire(event: dict[str, Any]) -> dict[str, Any]:
        data = {"request_id": event["data"]["request_id"], "conversation_id": "c"}
        if acquired:
            return {**data, "acquired": True, "state": "locked", "fence": 7, "expires_at": clock.now().unix + 300}
        return {**data, "acquired": False, "state": "queued", "position": 1, "holder": "r1"}

    daemon.answers["conversation:acquire_lock"] = acquire
    daemon.answers["conversation:release_lock"] = lambda event: {"released": True}
    daemon.answers["completion:cancel"] = lambda event: {"status": "cancelled"}


class HeldClock(SteppingClock):
    """Sleeps only as often as it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        await self.allowed.acquire()
        await super().sleep(seconds)


@pytest.fixture
def held_clock() -> HeldClock:
    return HeldClock()


@pytest.mark.promise("L5")
async def test_a_free_conversation_s_lock_is_held_and_given_back(daemon: ScriptedDaemon, held_clock: HeldClock) -> None:
    lock_answers(daemon, held_clock, acquired=True)
    async with connected(daemon, held_clock) as client:
        async with client.lock("c", metadata={"by": "me"}, priority="high") as lock:
            assert lock.fence == 7
        wish, release = daemon.events
        assert wish["data"] == {
            "request_id": lock.request_id,
            "conversation_id": "c",
            "wait": True,
            "while_connected": True,
            "priority": "high",
            "metadata": {"by": "me"},
        }
        assert release["data"] == {"request_id": lock.request_id, "fence": 7}


@pytest.mark.promise("L5")
async def test_a_waiter_for_a_lock_continues_when_it_is_granted(daemon: ScriptedDaemon, held_clock: HeldClock) -> None:
    lock_answers(daemon, held_clock, acquired=False)
    async with connected(daemon, held_clock) as client:
        lock = client.lock("c", request_id="me")
        entering = asyncio.ensure_future(lock.__aenter__())
        await daemon.came("conversation:acquire_lock")
        daemon.push("conversation:locked", conversation_id="c", request_id="another", fence=8)
        await settled()
        assert not entering.done()
        daemon.push("conversation:locked", conversation_id="c", request_id="me", fence=9, expires_at=2e9)
        await entering
        assert lock.fence == 9
        await lock.__aexit__(None, None, None)


@pytest.mark.promise("L5")
async def test_a_waiter_for_a_lock_joins_the_queue_again_after_a_lost_connection(
    daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    lock_answers(daemon, clock, acquired=False)
    async with connected(daemon, clock) as client:
        lock = client.lock("c", request_id="me")
        entering = asyncio.ensure_future(lock.__aenter__())
        await daemon.came("conversation:acquire_lock")
        await settled()
        daemon.answers["conversation:acquire_lock"] = lambda event: {"acquired": True, "state": "locked", "fence": 3}
        daemon.drop()
        await entering
        assert lock.fence == 3
        await lock.__aexit__(None, None, None)


async def test_who_waited_long_enough_for_a_lock_leaves_the_line(
    client: Client, daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    lock_answers(daemon, clock, acquired=False)
    with pytest.raises(WaitTimeout, match="did not become free"):
        async with client.lock("c", request_id="me", timeout=0.01):
            pytest.fail("it was entered")
    assert daemon.named("completion:cancel")[0]["data"] == {"request_id": "me"}


async def test_who_stops_waiting_for_a_lock_leaves_the_line(
    client: Client, daemon: ScriptedDaemon, clock: SteppingClock
) -> None:
    lock_answers(daemon, clock, acquired=False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), client.lock("c", request_id="me"):
            pytest.fail("it was entered")
    assert (await daemon.came("completion:cancel"))["data"] == {"request_id": "me"}


async def test_a_client_that_does_not_want_to_wait_for_a_lock_gets_its_holder(
    client: Client, daemon: ScriptedDaemon
) -> None:
    daemon.answers["conversation:acquire_lock"] = lambda event: {"acquired": False, "state": "busy", "holder": "r1"}
    with pytest.raises(ConversationBusy, match="held by r1"):
        async with client.lock("c", wait=False):
            pytest.fail("it was entered")


@pytest.mark.promise("L4")
async def test_a_lock_is_renewed_while_it_is_held(daemon: ScriptedDaemon, held_clock: HeldClock) -> None:
    lock_answers(daemon, held_clock, acquired=True)
    daemon.answers["conversation:renew_lock"] = lambda event: {"acquired": True}
    async with connected(daemon, held_clock) as client, client.lock("c", request_id="me"):
        for times in (1, 2):
            held_clock.allowed.release()
            renewal = await daemon.came("conversation:renew_lock", times)
            assert renewal["data"] == {"request_id": "me", "fence": 7}
    assert held_clock.slept == pytest.approx([100, 100])


@pytest.mark.promise("L4")
async def test_a_lock_that_was_lost_says_so_at_its_renewal_and_at_its_end(
    daemon: ScriptedDaemon, held_clock: HeldClock
) -> None:
    lock_answers(daemon, held_clock, acquired=True)
    gone = {"error": {"code": "not_lock_holder", "message": "it ran out"}}
    daemon.answers["conversation:renew_lock"] = lambda event: gone
    daemon.answers["conversation:release_lock"] = lambda event: gone
    async with connected(daemon, held_clock) as client:
        with pytest.raises(RemoteError, match="it ran out"):
            async with client.lock("c") as lock:
                held_clock.allowed.release()
                await daemon.came("conversation:renew_lock")
                await settled()
                assert lock.lost


async def test_an_error_under_a_lock_is_not_hidden_by_its_release(
    daemon: ScriptedDaemon, held_clock: HeldClock
) -> None:
    lock_answers(daemon, held_clock, acquired=True)
    daemon.answers["conversation:release_lock"] = lambda event: {
        "error": {"code": "not_lock_holder", "message": "it ran out"}
    }
    async with connected(daemon, held_clock) as client:
        with pytest.raises(ZeroDivisionError) as caught:
            async with client.lock("c"):
                raise ZeroDivisionError
    assert "it ran out" in caught.value.__notes__[0]


@pytest.mark.promise("L5")
async def test_a_release_whose_answer_was_lost_is_made_sure_of(daemon: ScriptedDaemon, clock: SteppingClock) -> None:
    lock_answers(daemon, clock, acquired=True)
    daemon.answers["conversation:renew_lock"] = lambda event: None
    del daemon.answers["conversation:release_lock"]
    async with connected(daemon, clock) as client:
        lock = await client.lock("c").__aenter__()
        leaving = asyncio.ensure_future(lock.__aexit__(None, None, None))
        await daemon.came("conversation:release_lock")
        daemon.drop()
        again = await daemon.came("conversation:release_lock", 2)
        daemon.reply(again, {"error": {"code": "not_lock_holder", "message": "not yours"}})
        await leaving
