"""Conversations over the wire: one request at a time, priorities, history, forks and states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ksi.testing import SimulatedClock
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Json, Wire, answer, in_state, until


def team(endpoint: ScriptedEndpoint, **options: Any) -> Json:
    """A provider that sends its calls to a scripted endpoint, in addition to the stub."""
    return {"team": {"kind": "openai", "base_url": endpoint.openai_url, **options}, "stub": {"kind": "stub"}}


def said(seen: Seen) -> list[tuple[str, str]]:
    """The messages of a call to the endpoint."""
    return [(message["role"], message["content"]) for message in seen.json["messages"]]


def numbered(seen: Seen) -> Answer:
    """An answer that quotes its prompt."""
    return Answer(pieces=(f"answer to {seen.json['messages'][-1]['content']}",))


# One at a time


@pytest.mark.promise("L1", "L2")
async def test_a_conversation_s_requests_run_one_at_a_time_in_their_order(tmp_path: Path) -> None:
    stub = {"kind": "stub", "max_concurrency": 8, "record": "record.tsv", "delay": 0.002}
    async with daemon_and_wire(tmp_path, providers={"stub": stub}) as (_, wire):
        futures = [
            wire.post("completion:request", {"prompt": str(n), "request_id": f"r{n}", "session_id": f"c{n % 3}"})
            for n in range(30)
        ]
        for future in futures:
            assert (await answer(future))["status"] == "completed"
    running: dict[str, str] = {}
    begun: dict[str, list[int]] = {}
    together = 0
    for line in (tmp_path / "record.tsv").read_text().splitlines():
        word, _, conversation, request, _ = line.split("\t")
        if word == "begin":
            assert conversation not in running
            running[conversation] = request
            begun.setdefault(conversation, []).append(int(request[1:]))
            together = max(together, len(running))
        else:
            assert running.pop(conversation) == request
    assert begun == {f"c{n}": list(range(n, 30, 3)) for n in range(3)}
    assert together > 1, "different conversations run beside each other"


@pytest.mark.promise("L2")
async def test_the_reply_tells_the_place_in_the_conversation_s_line(wire: Wire) -> None:
    first = await wire.ask("completion:async", prompt="x", request_id="r0", session_id="c", provider_options=LONG)
    assert (first["status"], first["session_id"]) == ("ready", "c")
    assert "position" not in first
    for number in range(3):
        reply = await wire.ask("completion:async", prompt="x", request_id=f"w{number}", session_id="c")
        assert (reply["status"], reply["position"]) == ("queued", number)
        assert (reply["conversation_locked"], reply["holder"]) == (True, "r0")
    passing = await wire.ask("completion:async", prompt="x", request_id="h", session_id="c", priority="high")
    assert passing["position"] == 0
    assert (await wire.ask("completion:get", request_id="w2"))["position"] == 3
    other = await wire.ask("completion:async", prompt="x", conversation_id="elsewhere")
    assert other["status"] == "ready"
    status = await wire.ask("conversation:lock_status", conversation_id="c")
    assert [(one["request_id"], one["position"]) for one in status["queue"]] == [
        ("h", 0),
        ("w0", 1),
        ("w1", 2),
        ("w2", 3),
    ]
    await wire.ask("completion:cancel", request_id="r0")
    ended = [(await wire.pushed("completion:result", session_id="c"))["request_id"] for _ in range(5)]
    assert ended == ["r0", "h", "w0", "w1", "w2"]


@pytest.mark.promise("L2", "Q8")
async def test_positions_are_exact_up_to_a_thousand(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=LONG)
    replies = [wire.post("completion:async", {"prompt": "x", "session_id": "c"}) for _ in range(1_010)]
    positions = [(await answer(reply))["position"] for reply in replies]
    assert positions == [*range(1_000), *[1_000] * 10]
    status = await wire.ask("conversation:lock_status", conversation_id="c", limit=10)
    assert (len(status["queue"]), status["waiting"]) == (10, 1_000)


@pytest.mark.promise("L3")
async def test_a_request_that_will_not_wait_gets_the_holder(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=LONG)
    await wire.ask("completion:async", prompt="x", request_id="w", session_id="c")
    error = await wire.refused("completion:async", prompt="x", request_id="n", session_id="c", on_busy="reject")
    assert (error.code, error.retryable) == ("conversation_busy", True)
    assert (error.details["holder"], error.details["position"]) == ("r", 1)
    assert 0 <= error.details["age"] < 60
    assert (await wire.refused("completion:get", request_id="n")).code == "not_found"
    free = await wire.ask("completion:async", prompt="x", session_id="free", on_busy="reject")
    assert free["status"] == "ready"


@pytest.mark.promise("L3")
async def test_an_interruption_ends_the_holder_and_takes_the_head_of_the_line(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=LONG)
    await wire.ask("completion:async", prompt="x", request_id="w", session_id="c", priority="high")
    reply = await wire.ask("completion:async", prompt="x", request_id="i", session_id="c", on_busy="interrupt")
    assert (reply["status"], reply["position"]) == ("queued", 0)
    results = [await wire.pushed("completion:result") for _ in range(3)]
    assert [(one["request_id"], one["status"]) for one in results] == [
        ("r", "cancelled"),
        ("i", "completed"),
        ("w", "completed"),
    ]
    assert results[0]["interrupted_by"] == "i"


@pytest.mark.promise("L3", "L8")
async def test_an_interruption_ends_a_holder_that_waits_for_its_retry(wire: Wire) -> None:
    script = {"fail": "provider_error", "retry_after": 600}
    await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=script)
    await in_state(wire, "r", "retrying")
    await wire.ask("completion:async", prompt="x", request_id="i", session_id="c", on_busy="interrupt")
    ended = await wire.pushed("completion:result", request_id="r")
    assert (ended["status"], ended["interrupted_by"]) == ("cancelled", "i")
    assert (await wire.pushed("completion:result", request_id="i"))["status"] == "completed"


@pytest.mark.promise("L3")
async def test_an_interruption_spares_outside_holders_and_higher_priorities(wire: Wire) -> None:
    await wire.ask(
        "completion:async", prompt="x", request_id="r", session_id="c", priority="high", provider_options=LONG
    )
    error = await wire.refused("completion:async", prompt="x", session_id="c", on_busy="interrupt")
    assert (error.code, error.details["holder"]) == ("conversation_busy", "r")
    await wire.ask("conversation:acquire_lock", request_id="lock", conversation_id="d")
    error = await wire.refused("completion:async", prompt="x", session_id="d", on_busy="interrupt", priority="critical")
    assert (error.code, error.details["holder"]) == ("conversation_busy", "lock")
    assert (await wire.ask("completion:get", request_id="r"))["status"] == "running"


@pytest.mark.promise("L8", "Q2")
async def test_a_request_that_waits_for_its_retry_is_not_overtaken() -> None:
    async with daemon_and_wire(retry={"initial_delay": 0.001, "max_delay": 0.002}) as (_, wire):
        script = {"fail": "provider_error", "fail_attempts": 1, "retry_after": 0.05}
        await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", provider_options=script)
        await wire.ask("completion:async", prompt="x", request_id="w", session_id="c", priority="critical")
        ended = [(await wire.pushed("completion:result"))["request_id"] for _ in range(2)]
        assert ended == ["r", "w"]


@pytest.mark.promise("L8")
async def test_a_request_that_lets_others_pass_on_its_retry_is_overtaken(wire: Wire) -> None:
    script = {"fail": "provider_error", "retry_after": 600}
    await wire.ask(
        "completion:async",
        prompt="x",
        request_id="r",
        session_id="c",
        provider_options=script,
        hold_on_retry=False,
    )
    await in_state(wire, "r", "retrying")
    assert (await wire.ask("completion:request", prompt="x", session_id="c"))["status"] == "completed"
    assert (await wire.ask("completion:get", request_id="r"))["status"] == "retrying"


@pytest.mark.promise("L8", "Q7")
async def test_a_delayed_request_that_is_not_due_holds_nothing(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", session_id="c", delay=600)
    reply = await wire.ask("completion:async", prompt="x", request_id="r", session_id="c")
    assert reply["status"] == "ready"
    assert (await wire.pushed("completion:result"))["request_id"] == "r"


# History


@pytest.mark.promise("L9")
async def test_a_stateless_provider_gets_the_whole_dialogue(tmp_path: Path) -> None:
    async with ScriptedEndpoint(script=numbered) as endpoint:
        async with daemon_and_wire(tmp_path, providers=team(endpoint)) as (_, wire):
            await wire.ask("completion:request", prompt="one", session_id="c", model="team/m", system="be brief")
            await wire.ask("completion:request", prompt="two", session_id="c", model="team/m")
            await wire.ask("completion:request", prompt="else", session_id="other", model="team/m")
            dialogue = [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": [{"type": "text", "text": "three "}, {"type": "text", "text": "more"}]},
            ]
            await wire.ask("completion:request", messages=dialogue, session_id="c", model="team/m")
        # The next daemon knows it from the store.
        async with daemon_and_wire(tmp_path, providers=team(endpoint)) as (_, wire):
            await wire.ask("completion:request", prompt="four", session_id="c", model="team/m")
        first, second, other, third, fourth = map(said, endpoint.requests)
    assert first == [("system", "be brief"), ("user", "one")]
    so_far = [("user", "one"), ("assistant", "answer to one")]
    assert second == [*so_far, ("user", "two")]
    assert other == [("user", "else")]
    so_far += [("user", "two"), ("assistant", "answer to two")]
    assert third == [
        ("system", "be kind"),
        *so_far,
        ("user", "three"),
        ("assistant", "yes?"),
        ("user", "three more"),
    ]
    so_far += [("user", "three"), ("assistant", "yes?"), ("user", "three more"), ("assistant", "answer to three more")]
    assert fourth == [*so_far, ("user", "four")]


@pytest.mark.promise("L9")
async def test_a_conversation_can_change_its_provider(tmp_path: Path) -> None:
    async with ScriptedEndpoint(script=numbered) as endpoint:
        async with daemon_and_wire(tmp_path, providers=team(endpoint)) as (_, wire):
            await wire.ask("completion:request", prompt="one", session_id="c", model="stub/echo")
            reply = await wire.ask("completion:request", prompt="two", session_id="c", model="team/m")
            assert (reply["provider"], reply["session_id"]) == ("team", "c")
        assert said(endpoint.requests[0]) == [("user", "one"), ("assistant", "echo: one"), ("user", "two")]


@pytest.mark.promise("F9", "L9")
async def test_a_turn_that_did_not_complete_leaves_no_trace(tmp_path: Path) -> None:
    async with ScriptedEndpoint(script=numbered) as endpoint:
        async with daemon_and_wire(tmp_path, providers=team(endpoint)) as (_, wire):
            await wire.ask("completion:request", prompt="one", session_id="c", model="team/m")
            failing = {"fail": "invalid_request"}
            await wire.ask("completion:request", prompt="bad", session_id="c", model="stub/x", provider_options=failing)
            stopped = {"pieces": 2, "piece_delay": 600}
            await wire.ask(
                "completion:async",
                prompt="half",
                request_id="h",
                session_id="c",
                model="stub/x",
                stream=True,
                provider_options=stopped,
            )
            await wire.pushed("completion:chunk")
            await wire.ask("completion:cancel", request_id="h")
            await wire.ask("completion:request", prompt="two", session_id="c", model="team/m")
            assert (await wire.ask("completion:session_status", session_id="c"))["turns"] == 2
        assert said(endpoint.requests[-1]) == [("user", "one"), ("assistant", "answer to one"), ("user", "two")]


@pytest.mark.promise("L9")
@pytest.mark.parametrize("restart", [False, True])
async def test_a_full_context_drops_whole_turns_from_the_oldest(tmp_path: Path, restart: bool) -> None:
    def long(seen: Seen) -> Answer:
        name = seen.json["messages"][-1]["content"].split()[0]
        return Answer(pieces=(f"answer-{name} " + "y" * 350,))

    async with ScriptedEndpoint(script=long) as endpoint:
        providers = team(endpoint, context_tokens=1_000)
        system = "be brief " * 10
        async with daemon_and_wire(tmp_path, providers=providers) as (_, wire):
            for number in range(8):
                await wire.ask(
                    "completion:request",
                    prompt=f"q{number} " + "x" * 350,
                    session_id="c",
                    model="team/m",
                    system=system,
                )
            if not restart:
                await wire.ask("completion:request", prompt="last", session_id="c", model="team/m", system=system)
        if restart:
            async with daemon_and_wire(tmp_path, providers=providers) as (_, wire):
                await wire.ask("completion:request", prompt="last", session_id="c", model="team/m", system=system)
        words = [(role, content.split()[0]) for role, content in said(endpoint.requests[-1])]
    assert words[0] == ("system", "be")
    assert words[-1] == ("user", "last")
    kept = words[1:-1]
    first = 8 - len(kept) // 2
    assert 0 < len(kept) // 2 < 8, "some were dropped and some were not"
    assert kept == [turn for n in range(first, 8) for turn in (("user", f"q{n}"), ("assistant", f"answer-q{n}"))]
    total = sum(len(content) for _, content in said(endpoint.requests[-1]))
    assert total / 3.5 < 1_000


@pytest.mark.promise("L9")
async def test_a_prompt_that_fills_the_context_is_sent_without_history(tmp_path: Path) -> None:
    async with ScriptedEndpoint(script=numbered) as endpoint:
        async with daemon_and_wire(tmp_path, providers=team(endpoint, context_tokens=500)) as (_, wire):
            await wire.ask("completion:request", prompt="one", session_id="c", model="team/m")
            huge = "x" * 5_000
            await wire.ask("completion:request", prompt=huge, session_id="c", model="team/m")
        assert said(endpoint.requests[-1]) == [("user", huge)]


@pytest.mark.promise("L9")
async def test_a_context_that_is_too_long_after_all_is_halved_and_tried_once_more(tmp_path: Path) -> None:
    def picky(seen: Seen) -> Answer:
        if len(seen.json["messages"]) > 5:
            return Answer(status=400, error_code="context_length_exceeded", error_message="too long")
        return Answer(pieces=("y" * 100,))

    async with ScriptedEndpoint(script=picky) as endpoint:
        short = {"history_tokens": 300}
        async with daemon_and_wire(tmp_path, providers=team(endpoint), session=short) as (_, wire):
            for number in range(5):
                reply = await wire.ask("completion:request", prompt=f"{number}" * 100, session_id="c", model="team/m")
                assert (reply["status"], len(reply["attempts"])) == ("completed", 1)
        lengths = [len(seen.json["messages"]) for seen in endpoint.requests]
    assert max(lengths) > 5, "it was too long once"
    assert lengths[-1] <= 5


# Forks and lives


@pytest.mark.promise("L6", "L7")
async def test_a_fork_continues_from_its_parent_s_head_and_leaves_it_unchanged(tmp_path: Path) -> None:
    async with ScriptedEndpoint(script=numbered) as endpoint:
        async with daemon_and_wire(tmp_path, providers=team(endpoint)) as (_, wire):
            await wire.ask("completion:request", prompt="one", session_id="c", model="team/m")
            forked = await wire.ask(
                "completion:request", prompt="other", session_id="c", model="team/m", fork=True, request_id="f"
            )
            child = forked["session_id"]
            assert child != "c"
            assert forked["forked"] == {"parent": "c", "child": child, "kind": "requested"}
            await wire.ask("completion:request", prompt="two", session_id="c", model="team/m")
            await wire.ask("completion:request", prompt="more", session_id=child, model="team/m")
            status = await wire.ask("conversation:lock_status", conversation_id="c")
            (fork,) = status["forks"]
            assert (fork["parent"], fork["child"], fork["request_id"], fork["kind"]) == ("c", child, "f", "requested")
            session = await wire.ask("completion:session_status", session_id=child)
            assert (session["forked_from"], session["turns"]) == ("c", 2)
            assert (
                await wire.refused("completion:async", prompt="x", session_id="none", fork=True)
            ).code == "not_found"
        one = [("user", "one"), ("assistant", "answer to one")]
        assert said(endpoint.requests[1]) == [*one, ("user", "other")]
        assert said(endpoint.requests[2]) == [*one, ("user", "two")]
        assert said(endpoint.requests[3]) == [
            *one,
            ("user", "other"),
            ("assistant", "answer to other"),
            ("user", "more"),
        ]


@pytest.mark.promise("L10")
async def test_a_session_lives_from_created_to_expired() -> None:
    clock = SimulatedClock()
    session = {"idle_after": 10.0, "expire_after": 1_000.0}
    async with daemon_and_wire(clock=clock, session=session) as (_, wire):

        async def life() -> str:
            state: str = (await wire.ask("completion:session_status", session_id="c"))["state"]
            return state

        assert (await wire.refused("completion:session_status", session_id="c")).code == "not_found"
        await wire.ask("completion:async", prompt="x", request_id="r", session_id="c", delay=1, agent_id="a1")
        assert await life() == "created"
        await clock.advance(1)
        await wire.pushed("completion:result")
        assert await life() == "active"
        clock.sleep_machine(11)
        assert await life() == "idle"
        clock.sleep_machine(1_000)
        assert await life() == "expired"
        await wire.ask("completion:request", prompt="x", session_id="c", agent_id="a2")
        assert await life() == "active"
        assert (await wire.ask("completion:session_status", session_id="c"))["agents"] == ["a1", "a2"]


@pytest.mark.promise("L10", "Q8")
async def test_sessions_are_listed_by_agent_and_in_pages(wire: Wire) -> None:
    for number in range(25):
        await wire.ask("completion:request", prompt="x", session_id=f"s{number}", agent_id=f"a{number % 2}")
    names: list[str] = []
    cursor: Json = {}
    while True:
        page = await wire.ask("completion:session_status", limit=10, **cursor)
        names += [one["session_id"] for one in page["sessions"]]
        if "cursor" not in page:
            break
        cursor = {"cursor": page["cursor"]}
    assert names == [f"s{number}" for number in reversed(range(25))]
    mine = await wire.ask("completion:session_status", agent_id="a1")
    assert [one["session_id"] for one in mine["sessions"]] == [f"s{number}" for number in range(23, 0, -2)]


async def until_gone(clock: SimulatedClock, wire: Wire, event: str, **data: Any) -> None:
    """Let time pass until something is not found any more."""

    async def look() -> bool:
        await clock.advance(1)
        reply = await wire.post(event, data)
        return "error" in reply and bool(reply["error"]["code"] == "not_found")

    await until(look)


@pytest.mark.promise("R7", "Q4")
async def test_a_request_past_its_retention_is_deleted_and_its_history_stays() -> None:
    clock = SimulatedClock()
    retention = {"finished": 100.0, "sessions": 1_000.0, "clean_every": 1.0}
    async with daemon_and_wire(clock=clock, retention=retention) as (_, wire):
        await wire.ask("completion:request", prompt="x", request_id="r", session_id="c")
        await clock.advance(50)
        assert (await wire.ask("completion:get", request_id="r"))["status"] == "completed"
        clock.sleep_machine(60)
        await until_gone(clock, wire, "completion:get", request_id="r")
        assert (await wire.ask("completion:session_status", session_id="c"))["turns"] == 1
        reply = await wire.ask("completion:request", prompt="other", request_id="r", session_id="c")
        assert reply["result"] == "echo: other", "the id is free again"
        assert (await wire.ask("completion:queue_status"))["completed"] == 2, "counted since the store was made"
        clock.sleep_machine(1_200)
        await until_gone(clock, wire, "completion:session_status", session_id="c")
        assert (await wire.ask("completion:queue_status"))["conversations"] == 0
