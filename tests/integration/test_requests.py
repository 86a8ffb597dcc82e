"""A request's way over the wire: priorities, delays, attaching, cancelling, waiting, streams."""

from __future__ import annotations

import asyncio
import json

import pytest

from ksi.daemon.daemon import Daemon
from ksi.events.bus import News
from ksi.testing import SimulatedClock, settle_down
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.conftest import Connect
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Json, Wire, answer, in_state, until

HOUR = 3600.0
NARROW = {"stub": {"kind": "stub", "max_concurrency": 1}, "other": {"kind": "stub", "max_concurrency": 1}}
QUICK_RETRY = {"initial_delay": 0.001, "max_delay": 0.002}


async def order_of_results(wire: Wire, count: int) -> list[str]:
    """The requests in the order in which they ended."""
    return [(await wire.pushed("completion:result"))["request_id"] for _ in range(count)]


# Priorities


@pytest.mark.promise("Q1", "Q2")
async def test_on_a_saturated_provider_higher_priorities_come_first_and_within_one_who_came_first() -> None:
    async with daemon_and_wire(providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="block", provider_options=LONG)
        words = ["background", "LOW", "Normal", "high", "CRITICAL"]
        for turn in "12":
            for word in words:
                await wire.ask("completion:async", prompt="x", priority=word, request_id=f"{word.lower()}{turn}")
        await wire.ask("completion:async", prompt="x", request_id="normal3")
        await wire.ask("completion:cancel", request_id="block")
        assert await order_of_results(wire, 12) == [
            "block",
            *("critical1", "critical2", "high1", "high2", "normal1", "normal2", "normal3"),
            *("low1", "low2", "background1", "background2"),
        ]


@pytest.mark.promise("Q2")
async def test_a_lower_priority_waits_at_most_the_difference_of_head_starts_longer() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="block", provider_options=LONG)
        await wire.ask("completion:async", prompt="x", request_id="low", priority="low")
        clock.sleep_machine(4.9 * HOUR)
        await wire.ask("completion:async", prompt="x", request_id="high in time", priority="high")
        clock.sleep_machine(0.2 * HOUR)
        await wire.ask("completion:async", prompt="x", request_id="high too late", priority="high")
        clock.sleep_machine(10 * HOUR)
        await wire.ask("completion:async", prompt="x", request_id="critical", priority="critical")
        await wire.ask("completion:cancel", request_id="block")
        assert await order_of_results(wire, 5) == ["block", "critical", "high in time", "low", "high too late"]


@pytest.mark.promise("Q2", "Q7")
@pytest.mark.parametrize("when", [0, 1, 1_000_000])
async def test_a_time_that_has_passed_jumps_no_line(when: float) -> None:
    async with daemon_and_wire(providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="block", provider_options=LONG)
        await wire.ask("completion:async", prompt="x", request_id="first")
        await wire.ask("completion:async", prompt="x", request_id="second", not_before=when)
        await wire.ask("completion:cancel", request_id="block")
        assert await order_of_results(wire, 3) == ["block", "first", "second"]


@pytest.mark.promise("Q6")
async def test_a_saturated_provider_delays_no_other() -> None:
    async with daemon_and_wire(providers=NARROW) as (_, wire):
        for number in range(200):
            await wire.ask(
                "completion:async", prompt="x", priority="critical", request_id=f"b{number}", provider_options=LONG
            )
        reply = await wire.ask("completion:request", prompt="x", model="other/x", priority="background")
        assert reply["status"] == "completed"
        figures = await wire.ask("completion:queue_status")
        assert (figures["active"], figures["queued"]) == (1, 199)
        providers = (await wire.ask("completion:provider_status"))["providers"]
        assert (providers["stub"]["running"], providers["stub"]["max_concurrency"]) == (1, 1)
        assert (providers["other"]["running"], providers["other"]["calls"]) == (0, 1)


@pytest.mark.promise("Q6")
async def test_a_provider_never_runs_more_than_its_limit() -> None:
    async with daemon_and_wire(providers={"stub": {"kind": "stub", "max_concurrency": 3}}) as (_, wire):
        most = 0
        asked = [
            wire.post("completion:request", {"prompt": "x", "provider_options": {"delay": 0.01}}) for _ in range(30)
        ]
        while not all(future.done() for future in asked):
            stub = (await wire.ask("completion:provider_status"))["providers"]["stub"]
            most = max(most, (await wire.ask("completion:queue_status"))["active"], stub["running"])
        assert most == 3
        assert all(future.result()["data"]["status"] == "completed" for future in asked)


@pytest.mark.promise("Q5")
async def test_a_full_queue_refuses_and_keeps_acknowledged_requests() -> None:
    async with daemon_and_wire(providers=NARROW, queue={"max_queued": 3}) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="block", provider_options=LONG)
        for number in range(2):
            await wire.ask("completion:async", prompt="x", request_id=f"r{number}")
        await wire.ask("completion:async", prompt="x", request_id="later", delay=600)
        error = await wire.refused("completion:async", prompt="x", request_id="too many")
        assert (error.code, error.retryable, error.details["limit"]) == ("queue_full", True, 3)
        assert (await wire.refused("completion:request", prompt="x", delay=5)).code == "queue_full"
        assert (await wire.ask("completion:async", prompt="x", request_id="r1"))["status"] == "queued", "attach is free"
        assert (await wire.ask("completion:request", prompt="x", model="other/x"))["status"] == "completed"
        await wire.ask("completion:cancel", request_id="later")
        await wire.ask("completion:async", prompt="x", request_id="too many")
        await wire.ask("completion:cancel", request_id="block")
        assert await order_of_results(wire, 5) == ["later", "block", "r0", "r1", "too many"]


# Times


@pytest.mark.promise("Q7")
async def test_a_delayed_request_runs_when_it_is_due() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock) as (_, wire):
        reply = await wire.ask("completion:async", prompt="x", request_id="r", delay=10)
        now = clock.now().unix
        assert (reply["state"], reply["status"], reply["due_at"]) == ("scheduled", "queued", now + 10)
        await wire.ask("completion:async", prompt="x", request_id="s", not_before=now + 5)
        await clock.advance(4.9)
        assert (await wire.ask("completion:get", request_id="s"))["status"] == "scheduled"
        await clock.advance(0.2)
        await wire.pushed("completion:result", request_id="s")
        await clock.advance(4.8)
        assert (await wire.ask("completion:get", request_id="r"))["status"] == "scheduled"
        await clock.advance(0.2)
        result = await wire.pushed("completion:result", request_id="r")
        assert result["status"] == "completed"
        assert result["started_at"] >= now + 10


@pytest.mark.promise("Q7")
async def test_a_sooner_time_that_comes_later_wakes_the_daemon_in_time() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="far", delay=1000)
        await clock.advance(1)
        await wire.ask("completion:async", prompt="x", request_id="near", delay=2)
        await clock.advance(2)
        assert (await wire.pushed("completion:result"))["request_id"] == "near"


@pytest.mark.promise("Q7")
async def test_a_time_to_live_ends_unstarted_requests_and_nothing_else() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock, providers=NARROW) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="runs", ttl=1, provider_options=LONG)
        await wire.ask("completion:async", prompt="x", request_id="waits", ttl=5, session_id="c")
        await wire.ask("completion:async", prompt="x", request_id="behind", session_id="c")
        await wire.ask("completion:async", prompt="x", request_id="scheduled", ttl=5, delay=10)
        await clock.advance(4)
        assert (await wire.ask("completion:get", request_id="waits"))["status"] == "queued"
        await clock.advance(2)
        ended = [await wire.pushed("completion:result") for _ in range(2)]
        assert {(one["request_id"], one["status"]) for one in ended} == {
            ("waits", "expired"),
            ("scheduled", "expired"),
        }
        assert all("attempts" not in one for one in ended)
        assert (await wire.ask("completion:get", request_id="runs"))["status"] == "running"
        assert (await wire.ask("completion:get", request_id="behind"))["position"] == 0
        await wire.ask("completion:cancel", request_id="runs")
        assert (await wire.pushed("completion:result", request_id="behind"))["status"] == "completed"


@pytest.mark.promise("Q7", "O4")
async def test_a_request_due_after_the_machines_sleep_runs() -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(clock=clock) as (_, wire):
        await wire.ask("completion:async", prompt="x", request_id="r", delay=HOUR)
        clock.sleep_machine(2 * HOUR)
        await clock.advance(1)
        assert (await wire.pushed("completion:result"))["request_id"] == "r"


# The same id again


async def brought_into(wire: Wire, state: str) -> Json:
    """Bring the request `twice` into a state; its data, to send again."""
    data: Json = {"request_id": "twice", "prompt": "x", "session_id": "c"}
    if state == "scheduled":
        data["delay"] = 600
    elif state == "queued":
        await wire.ask("completion:async", request_id="block", prompt="x", session_id="c", provider_options=LONG)
    elif state in ("running", "cancelled"):
        data["provider_options"] = LONG
    elif state == "retrying":
        data["provider_options"] = {"fail": "provider_error", "retry_after": 600}
    elif state == "failed":
        data["provider_options"] = {"fail": "invalid_request"}
    elif state == "expired":
        data.update(delay=5, ttl=0.001)
    await wire.ask("completion:async", **data)
    if state == "cancelled":
        await wire.ask("completion:cancel", request_id="twice")
    await in_state(wire, "twice", state)
    return data


STATES = ["scheduled", "queued", "running", "retrying", "completed", "failed", "cancelled", "expired"]


@pytest.mark.promise("Q4")
@pytest.mark.parametrize("state", STATES)
async def test_the_same_request_again_answers_as_it_stands(wire: Wire, connect: Connect, state: str) -> None:
    data = await brought_into(wire, state)
    other = await connect()
    for again in (data, {**data, "stream": True}, {**data, "priority": "NORMAL", "conversation_id": "c"}):
        reply = await other.ask("completion:async", **again)
        assert (reply["request_id"], reply["status"], reply["session_id"]) == ("twice", state, "c")
        assert reply.get("result") == ("echo: x" if state == "completed" else None)
    figures = await wire.ask("completion:queue_status")
    assert sum(figures[name] for name in STATES if name not in ("queued", "running")) <= 1
    if state not in ("completed", "failed", "cancelled", "expired"):
        await wire.ask("completion:cancel", request_id="twice")
        for one in (wire, other):
            assert (await one.pushed("completion:result", request_id="twice"))["status"] == "cancelled"


@pytest.mark.promise("Q4")
@pytest.mark.parametrize("state", STATES)
async def test_other_content_under_a_kept_id_is_a_conflict(wire: Wire, state: str) -> None:
    data = await brought_into(wire, state)
    for other in ({"prompt": "y"}, {"priority": "high"}, {"session_id": "d"}, {"metadata": {"a": 1}}):
        for event in ("completion:async", "completion:request"):
            error = await wire.refused(event, **{**data, **other})
            assert (error.code, error.details["request_id"]) == ("request_id_conflict", "twice")
    error = await wire.refused("conversation:acquire_lock", request_id="twice", conversation_id="c")
    assert error.code == "request_id_conflict"
    assert (await wire.ask("completion:get", request_id="twice"))["status"] == state


@pytest.mark.promise("Q4", "R1")
async def test_a_conflict_takes_no_other_s_result_away(wire: Wire) -> None:
    await wire.ask("completion:async", request_id="twice", prompt="x", provider_options=LONG)
    assert (await wire.refused("completion:async", request_id="twice", prompt="y")).code == "request_id_conflict"
    assert (await wire.refused("completion:request", request_id="twice", prompt="y")).code == "request_id_conflict"
    lock = await wire.refused("conversation:acquire_lock", request_id="twice", conversation_id="c")
    assert lock.code == "request_id_conflict"
    await wire.ask("completion:cancel", request_id="twice")
    assert (await wire.pushed("completion:result", request_id="twice"))["status"] == "cancelled"


@pytest.mark.promise("Q4", "L5")
async def test_a_lock_s_id_is_no_request_s(wire: Wire) -> None:
    await wire.ask("conversation:acquire_lock", request_id="lock", conversation_id="c")
    assert (await wire.refused("completion:async", request_id="lock", prompt="x")).code == "request_id_conflict"
    assert (await wire.refused("completion:get", request_id="lock")).code == "not_found"
    assert (await wire.refused("completion:wait", request_id="lock")).code == "not_found"


class Collector:
    """A connection without a socket: the lines sent to it, and those outstanding."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.owed = 0

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def answer(self, line: bytes) -> None:
        self.owed -= 1
        self.push(line)


@pytest.mark.promise("Q4", "R1")
@pytest.mark.parametrize("event", ["completion:request", "completion:wait", "completion:async", "completion:cancel"])
async def test_one_question_gets_one_answer_however_it_meets_the_request_s_end(served: Daemon, event: str) -> None:
    """The second question comes in at every moment of the first one's short life."""
    serve = served.socket.dispatcher.serve
    for turns in range(40):
        first, second = Collector(), Collector()
        name = f"{event}-{turns}"
        ask = b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "%s"}}' % name.encode()
        again = b'{"event": "%s", "data": {%s"request_id": "%s"}, "correlation_id": 1}' % (
            event.encode(),
            b'"prompt": "x", ' if event in ("completion:request", "completion:async") else b"",
            name.encode(),
        )
        first.owed += 1
        task = asyncio.create_task(served.socket.dispatcher.serve(ask, first))
        await settle_down(turns)
        second.owed += 1
        await serve(again, second)
        await task

        async def answered(second: Collector = second) -> bool:
            return second.owed <= 0

        await until(answered)
        await settle_down()
        replies = [line for line in second.lines if b'"correlation_id":1' in line]
        assert (len(replies), second.owed) == (1, 0), f"after {turns} turns: {second.lines}"
        pushed = [line for line in second.lines if b'"completion:result"' in line]
        assert len(pushed) <= (event == "completion:async")


# Cancelling


@pytest.mark.promise("F8")
@pytest.mark.parametrize("state", ["scheduled", "queued", "running", "retrying"])
async def test_a_request_that_is_not_final_is_cancelled(wire: Wire, connect: Connect, state: str) -> None:
    await brought_into(wire, state)
    other = await connect()
    reply = await other.ask("completion:cancel", request_id="twice")
    assert (reply["status"], reply["state"], reply["session_id"]) == ("cancelled", "cancelled", "c")
    result = await wire.pushed("completion:result", request_id="twice")
    assert result["status"] == "cancelled"
    assert result["error"]["code"] == "cancelled"
    again = await other.ask("completion:cancel", request_id="twice")
    assert (again["status"], again["state"]) == ("already_final", "cancelled")
    line = await wire.ask("conversation:lock_status", conversation_id="c")
    assert line.get("holder") == ("block" if state == "queued" else None)


@pytest.mark.promise("F8")
@pytest.mark.parametrize("state", ["completed", "failed", "expired"])
async def test_a_cancel_that_comes_too_late_says_how_it_ended(wire: Wire, state: str) -> None:
    await brought_into(wire, state)
    reply = await wire.ask("completion:cancel", request_id="twice")
    assert (reply["status"], reply["state"]) == ("already_final", state)
    assert (await wire.ask("completion:get", request_id="twice"))["status"] == state


@pytest.mark.promise("F8")
async def test_a_cancel_of_nothing_is_not_found(wire: Wire) -> None:
    assert (await wire.refused("completion:cancel", request_id="nothing")).code == "not_found"


@pytest.mark.promise("F8", "T1")
async def test_a_cancel_stops_the_provider_s_work_and_keeps_the_received_text(wire: Wire) -> None:
    script = {"pieces": 2, "piece_delay": 600}
    await wire.ask("completion:async", prompt="abcdef", request_id="r", stream=True, provider_options=script)
    chunk = await wire.pushed("completion:chunk", request_id="r")
    await wire.ask("completion:cancel", request_id="r")
    reply = await wire.ask("completion:get", request_id="r")
    (attempt,) = reply["attempts"]
    assert (attempt["outcome"], attempt["usage"], attempt["text"]) == ("cancelled", "unknown", chunk["text"])
    assert "result" not in reply
    assert "usage" not in reply, "no report is not zero"
    assert (await wire.ask("completion:provider_status"))["providers"]["stub"]["running"] == 0


@pytest.mark.promise("F8", "L1", "L3")
@pytest.mark.parametrize("how", ["cancel", "interrupt"])
async def test_a_request_stopped_at_any_moment_has_one_end_and_frees_its_conversation(served: Daemon, how: str) -> None:
    """The stop comes in at every turn of the loop, from the submission on."""
    serve = served.socket.dispatcher.serve
    async with await Wire.open(served.config.socket_path) as wire:
        for turns in range(40):
            first, second, conversation = f"{how}-{turns}-1", f"{how}-{turns}-2", f"{how}-{turns}"
            ask = b'{"event": "completion:async", "data": {"prompt": "x", "request_id": "%s", "session_id": "%s"%s}}'
            task = asyncio.create_task(serve(ask % (first.encode(), conversation.encode(), b""), Collector()))
            await settle_down(turns)
            stopping = Collector()
            if how == "cancel":
                stop = b'{"event": "completion:cancel", "data": {"request_id": "%s"}}' % first.encode()
            else:
                stop = ask % (second.encode(), conversation.encode(), b', "on_busy": "interrupt"')
            await serve(stop, stopping)
            await task
            reply = json.loads(stopping.lines[-1])
            ended = await wire.ask("completion:wait", request_id=first) if turns else None
            if how == "interrupt":
                assert (await wire.ask("completion:wait", request_id=second))["status"] == "completed"
            elif ended is not None:
                assert reply["data"]["state"] == ended["status"], f"after {turns} turns"
            assert ended is None or ended["status"] in ("completed", "cancelled")
            free = await wire.ask("completion:request", prompt="x", session_id=conversation)
            assert free["status"] == "completed"
            assert (await wire.ask("conversation:lock_status", conversation_id=conversation))["locked"] is False


@pytest.mark.promise("F8")
async def test_many_cancels_of_one_request_are_all_answered(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
    replies = await asyncio.gather(*(answer(wire.post("completion:cancel", {"request_id": "r"})) for _ in range(20)))
    assert {reply["state"] for reply in replies} == {"cancelled"}


# Results and waiting


@pytest.mark.promise("R1")
async def test_a_result_is_pushed_once_to_a_submitter_who_also_subscribes(wire: Wire, connect: Connect) -> None:
    watcher = await connect()
    await watcher.ask("monitor:subscribe", patterns=["completion:result", "completion:*", "*"])
    await wire.ask("monitor:subscribe", pattern="completion:result")
    await wire.ask("completion:async", prompt="x", request_id="r", provider_options={"delay": 0.01})
    await wire.ask("completion:async", prompt="x", request_id="r", provider_options={"delay": 0.01})
    for one in (wire, watcher):
        result = await one.pushed("completion:result", request_id="r")
        assert (result["status"], result["result"]) == ("completed", "echo: x")
    await wire.ask("completion:request", prompt="y", request_id="marker")
    for one in (wire, watcher):
        await one.pushed("completion:result", request_id="marker")
        assert [line for line in one.lines if line["event"] == "completion:result"] == []


@pytest.mark.promise("R1")
@pytest.mark.parametrize("stream", [False, True])
async def test_completion_request_gets_its_reply_only(wire: Wire, stream: bool) -> None:
    reply = await wire.ask("completion:request", prompt="x", request_id="r", stream=stream)
    assert reply["result"] == "echo: x"
    await wire.ask("completion:request", prompt="y")
    assert [line["event"] for line in wire.lines if line["event"] != "completion:chunk"] == []


@pytest.mark.promise("R1")
async def test_a_vanished_client_cancels_nothing(wire: Wire, connect: Connect) -> None:
    leaving = await connect()
    script = {"delay": 0.05}
    future = leaving.post("completion:request", {"prompt": "x", "request_id": "sync", "provider_options": script})
    await leaving.ask("completion:async", prompt="x", request_id="async", provider_options=script)
    await leaving.ask("completion:async", prompt="x", request_id="later", session_id="c", delay=0.05)
    await leaving.leave()
    future.exception()
    for name in ("sync", "async", "later"):
        reply = await wire.ask("completion:wait", request_id=name)
        assert (reply["status"], reply["result"]) == ("completed", "echo: x")


@pytest.mark.promise("R1")
async def test_anybody_can_fetch_and_await_a_result(wire: Wire, connect: Connect) -> None:
    other = await connect()
    await wire.ask("completion:async", prompt="x", request_id="r", provider_options={"delay": 0.05})
    waiting = [other.post("completion:wait", {"request_id": "r"}) for _ in range(3)]
    waiting += [wire.post("completion:wait", {"request_id": "r", "timeout": 60})]
    replies = [await answer(future) for future in waiting]
    fetched = await other.ask("completion:get", request_id="r")
    assert replies == [fetched] * 4
    assert await other.ask("completion:wait", request_id="r") == fetched, "it is final already"
    assert await wire.pushed("completion:result", request_id="r") == fetched
    assert (await other.refused("completion:wait", request_id="nothing")).code == "not_found"
    assert other.lines == []


@pytest.mark.promise("R1")
async def test_a_wait_ends_with_its_time_and_the_request_goes_on(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", provider_options=LONG)
    error = await wire.refused("completion:wait", request_id="r", timeout=0.01)
    assert (error.code, error.retryable, error.details["request_id"]) == ("wait_timeout", True, "r")
    waiting = wire.post("completion:wait", {"request_id": "r"})
    assert (await wire.ask("completion:get", request_id="r"))["status"] == "running"
    await wire.ask("completion:cancel", request_id="r")
    assert (await answer(waiting))["status"] == "cancelled"


@pytest.mark.promise("R1", "T1")
async def test_a_reply_names_the_provider_and_the_usage(wire: Wire) -> None:
    reply = await wire.ask(
        "completion:request", prompt="one two three", model="stub/parrot", agent_id="a", metadata={"k": [1, None]}
    )
    assert reply["status"] == "completed"
    assert (reply["model"], reply["requested_model"], reply["provider"]) == ("parrot", "stub/parrot", "stub")
    assert (reply["agent_id"], reply["metadata"], reply["stop_reason"]) == ("a", {"k": [1, None]}, "end_turn")
    assert reply["usage"] == {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    (attempt,) = reply["attempts"]
    assert attempt["usage"] == reply["usage"]
    assert reply["enqueued_at"] <= reply["started_at"] <= reply["finished_at"]
    assert (await wire.ask("completion:get", request_id=reply["request_id"])) == reply


@pytest.mark.promise("T1")
async def test_an_attempt_without_a_report_is_unknown_and_others_are_summed() -> None:
    async with daemon_and_wire(retry=QUICK_RETRY) as (_, wire):
        script = {"fail": "provider_error", "fail_attempts": 2}
        reply = await wire.ask("completion:request", prompt="one two", provider_options=script)
        assert [attempt["outcome"] for attempt in reply["attempts"]] == ["failed", "failed", "completed"]
        assert [attempt["usage"] for attempt in reply["attempts"][:2]] == ["unknown", "unknown"]
        assert reply["usage"] == {
            "input_tokens": 2,
            "output_tokens": 3,
            "total_tokens": 5,
            "unknown_attempts": 2,
        }
        silent = await wire.ask("completion:request", prompt="x", provider_options={"usage": False})
        assert silent["attempts"][0]["usage"] == "unknown"
        assert "usage" not in silent


# Streams


def seen_chunks(wire: Wire) -> list[Json]:
    return [line["data"] for line in wire.lines if line["event"] == "completion:chunk"]


@pytest.mark.promise("R2")
async def test_chunks_come_in_order_from_nought_and_make_up_the_result(wire: Wire) -> None:
    reply = await wire.ask(
        "completion:request", prompt="a b c d e f", request_id="r", stream=True, provider_options={"pieces": 5}
    )
    chunks = seen_chunks(wire)
    assert [chunk["seq"] for chunk in chunks] == [0, 1, 2, 3, 4]
    assert {(chunk["request_id"], chunk["attempt"]) for chunk in chunks} == {("r", 1)}
    assert "".join(chunk["text"] for chunk in chunks) == reply["result"]


@pytest.mark.promise("R2")
async def test_a_client_that_asks_for_no_chunks_gets_none(wire: Wire) -> None:
    await wire.ask("completion:request", prompt="x y z", provider_options={"pieces": 3})
    await wire.ask("completion:async", prompt="x y z", request_id="r", provider_options={"pieces": 3})
    await wire.pushed("completion:result", request_id="r")
    assert wire.lines == []


@pytest.mark.promise("R2")
async def test_a_client_that_comes_back_gets_the_missed_pieces_and_then_the_rest(wire: Wire, connect: Connect) -> None:
    leaving = await connect()
    script = {"pieces": 6, "piece_delay": 0.03, "text": "abcdef"}
    await leaving.ask("completion:async", prompt="x", request_id="r", stream=True, provider_options=script)
    await leaving.pushed("completion:chunk", seq=2)
    await leaving.leave()
    reply = await wire.ask("completion:wait", request_id="r", stream=True, after_seq=0)
    chunks = seen_chunks(wire)
    assert [chunk["seq"] for chunk in chunks] == [1, 2, 3, 4, 5]
    assert "".join(chunk["text"] for chunk in chunks) == "bcdef"
    assert reply["result"] == "abcdef"
    assert not reply.get("chunks_lost")


@pytest.mark.promise("Q4", "R2")
@pytest.mark.parametrize("event", ["completion:async", "completion:request"])
async def test_attaching_to_a_running_stream_gives_it_from_the_beginning(
    wire: Wire, connect: Connect, event: str
) -> None:
    data = {
        "prompt": "x",
        "request_id": "r",
        "stream": True,
        "provider_options": {"pieces": 6, "piece_delay": 0.03, "text": "abcdef"},
    }
    await wire.ask("completion:async", **data)
    await wire.pushed("completion:chunk", seq=2)
    other = await connect()
    attached = await other.ask(event, **data)
    if event == "completion:async":
        assert attached["status"] == "running"
        attached = await other.pushed("completion:result")
    assert attached["result"] == "abcdef"
    assert [(chunk["seq"], chunk["text"]) for chunk in seen_chunks(other)] == list(enumerate("abcdef"))


@pytest.mark.promise("R2")
async def test_the_text_so_far_can_be_fetched_while_it_runs(wire: Wire) -> None:
    script = {"pieces": 3, "piece_delay": 0.2, "text": "abc"}
    await wire.ask("completion:async", prompt="x", request_id="r", stream=True, provider_options=script)
    await wire.pushed("completion:chunk", seq=1)
    reply = await wire.ask("completion:get", request_id="r", after_seq=-1)
    assert (reply["text_so_far"], reply["next_seq"]) == ("ab", 2)
    reply = await wire.ask("completion:get", request_id="r", after_seq=0)
    assert (reply["text_so_far"], reply["next_seq"]) == ("b", 2)


@pytest.mark.promise("R2")
async def test_after_the_end_chunks_are_lost_and_the_result_is_there(wire: Wire) -> None:
    await wire.ask("completion:request", prompt="x", request_id="r", stream=True)
    waited = await wire.ask("completion:wait", request_id="r", stream=True, after_seq=0)
    assert (waited["chunks_lost"], waited["result"]) == (True, "echo: x")
    assert (await wire.ask("completion:get", request_id="r", after_seq=0))["chunks_lost"] is True
    assert "chunks_lost" not in await wire.ask("completion:get", request_id="r")


@pytest.mark.promise("R2")
async def test_a_stream_is_followed_while_it_still_waits(wire: Wire, connect: Connect) -> None:
    await wire.ask("completion:async", prompt="x", request_id="block", session_id="c", provider_options=LONG)
    data = {"prompt": "x", "request_id": "r", "session_id": "c", "provider_options": {"pieces": 2, "text": "ab"}}
    await wire.ask("completion:async", stream=True, **data)
    other = await connect()
    waiting = other.post("completion:wait", {"request_id": "r", "stream": True})
    await other.ask("system:ready")
    await wire.ask("completion:cancel", request_id="block")
    assert (await answer(waiting))["result"] == "ab"
    await wire.pushed("completion:result", request_id="r")
    for one in (wire, other):
        assert [chunk["text"] for chunk in seen_chunks(one)] == ["a", "b"]


@pytest.mark.promise("R2")
async def test_a_new_attempt_s_chunks_begin_at_nought() -> None:
    broken = Answer(pieces=("ab", "c"), piece_delay=0.05, fail_after=2, error_type="overloaded_error")
    async with ScriptedEndpoint(broken, Answer(pieces=("d", "e"))) as endpoint:
        team = {"kind": "openai", "base_url": endpoint.openai_url}
        async with daemon_and_wire(retry=QUICK_RETRY, providers={"team": team}) as (_, wire):
            reply = await wire.ask("completion:request", prompt="x", model="team/m", stream=True)
            assert [attempt["outcome"] for attempt in reply["attempts"]] == ["parked", "completed"]
            texts: dict[int, str] = {1: "", 2: ""}
            for attempt in texts:
                chunks = [chunk for chunk in seen_chunks(wire) if chunk["attempt"] == attempt]
                assert [chunk["seq"] for chunk in chunks] == list(range(len(chunks)))
                texts[attempt] = "".join(chunk["text"] for chunk in chunks)
            assert texts == {1: reply["attempts"][0]["text"], 2: "de"}
            assert texts[1].startswith("ab")
            assert reply["result"] == "de"


# Reports


@pytest.mark.promise("R4", "Q8")
async def test_figures_follow_the_events(wire: Wire) -> None:
    nothing = await wire.ask("completion:queue_status")
    assert [nothing[name] for name in ("queued", "active", "completed", "locked_conversations")] == [0, 0, 0, 0]
    await wire.ask("completion:request", prompt="x", session_id="done")
    await wire.ask("completion:async", prompt="x", request_id="run", session_id="c", provider_options=LONG)
    await wire.ask("completion:async", prompt="x", request_id="wait", session_id="c")
    await wire.ask("completion:async", prompt="x", request_id="later", session_id="c", delay=600)
    await wire.ask("completion:async", prompt="x", request_id="bad", provider_options={"fail": "invalid_request"})
    await wire.pushed("completion:result", request_id="bad")
    figures = await wire.ask("completion:queue_status")
    expected = {"queued": 1, "active": 1, "completed": 1, "failed": 1, "scheduled": 1, "locked_conversations": 1}
    assert {name: figures[name] for name in expected} == expected
    status = await wire.ask("completion:status")
    assert {name: status[name] for name in ("queued", "active", "completed")} == {
        "queued": 1,
        "active": 1,
        "completed": 1,
    }
    assert [row["request_id"] for row in status["running"]] == ["run"]
    for listing, names in {
        "active": ["run"],
        "waiting": ["wait"],
        "delayed": ["later"],
        "failed": ["bad"],
        "ready": [],
    }.items():
        page = await wire.ask("completion:queue_status", list=listing)
        assert [row["request_id"] for row in page["items"]] == names


@pytest.mark.promise("Q8")
@pytest.mark.parametrize("listing", ["finished", "waiting", "delayed"])
async def test_every_list_is_paged(wire: Wire, listing: str) -> None:
    data: Json = {"delay": 600} if listing == "delayed" else {}
    if listing == "waiting":
        await wire.ask("completion:async", prompt="x", session_id="c", provider_options=LONG)
    for number in range(25):
        await wire.ask("completion:async", prompt="x", request_id=f"r{number}", session_id="c", **data)
    if listing == "finished":
        await wire.ask("completion:wait", request_id="r24")
    names: list[str] = []
    cursor: Json = {}
    pages = 0
    while True:
        page = await wire.ask("completion:queue_status", list=listing, limit=10, **cursor)
        names += [row["request_id"] for row in page["items"]]
        pages += 1
        if "cursor" not in page:
            break
        cursor = {"cursor": page["cursor"]}
    assert sorted(names) == sorted(f"r{number}" for number in range(25))
    assert pages == 3


@pytest.mark.promise("R4")
async def test_a_subscriber_gets_the_events_that_its_patterns_name_and_no_more(wire: Wire, connect: Connect) -> None:
    watcher = await connect()
    reply = await watcher.ask("monitor:subscribe", patterns=["conversation:*", "completion:prog*"])
    assert reply["patterns"] == ["conversation:*", "completion:prog*"]
    await wire.ask("completion:request", prompt="x", session_id="c", request_id="r")
    locked = await watcher.pushed("conversation:locked")
    assert (locked["conversation_id"], locked["request_id"]) == ("c", "r")
    assert (await watcher.pushed("completion:progress"))["status"] == "running"
    assert (await watcher.pushed("conversation:unlocked"))["conversation_id"] == "c"
    assert watcher.lines == []
    assert (await watcher.ask("monitor:unsubscribe", pattern="conversation:*"))["patterns"] == ["completion:prog*"]
    assert (await watcher.ask("monitor:unsubscribe"))["patterns"] == []
    await wire.ask("completion:request", prompt="x", session_id="c")
    await watcher.ask("system:ready")
    assert watcher.lines == []


@pytest.mark.promise("R4", "S1")
@pytest.mark.parametrize(
    "pattern", ["[", "[!", "]*[", "(?P<x>", "\\\\", "*" * 200, "*a" * 100, "\n", "completion:[r]esult"]
)
async def test_a_strange_pattern_matches_literally_and_harms_no_other(
    wire: Wire, connect: Connect, pattern: str
) -> None:
    watcher = await connect()
    assert (await watcher.ask("monitor:subscribe", pattern=pattern))["patterns"] == [pattern]
    assert (await wire.ask("completion:request", prompt="x"))["status"] == "completed"
    await watcher.ask("system:ready")
    heard = [line["event"] for line in watcher.lines if line["event"] == "completion:result"]
    assert heard == (["completion:result"] if pattern == "*" * 200 else [])


@pytest.mark.promise("R4")
async def test_discover_lists_every_event_with_its_schema(wire: Wire) -> None:
    events = {event["name"]: event for event in (await wire.ask("system:discover"))["events"]}
    assert events["completion:async"]["schema"]["request"]
    assert events["completion:result"]["direction"] == "out"
    for event in events.values():
        if event["direction"] == "in" and event["name"] != "system:shutdown":
            reply = await wire.post(event["name"], {})
            assert "data" in reply or reply["error"]["code"] in ("invalid_data", "not_found"), reply
        assert event["doc"]
    assert (await wire.refused("system:discover", event="system:helth")).code == "unknown_event"
