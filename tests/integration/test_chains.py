"""Chains over the wire: results put into other conversations, limits, dead letters, and the operator's hand."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import CORPUS, read_corpus
from ksi.testing import SimulatedClock
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.conftest import Connect
from tests.integration.serving import LONG, daemon_and_wire
from tests.integration.wire import Json, Wire, answer, in_state, until


async def chain(wire: Wire, name: str) -> Json:
    """A chain's figures."""
    reply = await wire.ask("circuit_breaker:status", request_id=name)
    return dict(reply["chain"])


async def members(wire: Wire, name: str) -> dict[str, str]:
    """A chain's requests and their states, in order."""
    reply = await wire.ask("circuit_breaker:status", chain_id=name, members=True)
    return {one["request_id"]: one["status"] for one in reply["requests"]}


async def deliveries(wire: Wire, **wish: Any) -> dict[str, str]:
    """Deliveries and their states, the oldest first."""
    reply = await wire.ask("injection:status", **wish)
    return {one["injection_id"]: one["state"] for one in reversed(reply["injections"])}


async def quiet(wire: Wire) -> None:
    """Wait until nothing waits and nothing runs."""

    async def done() -> bool:
        figures = await wire.ask("completion:queue_status")
        return not any(figures[name] for name in ("queued", "active", "retrying", "parked"))

    await until(done)


def into(*targets: str, **more: Any) -> Json:
    """An injection into these conversations."""
    return {"enabled": True, "target_sessions": list(targets), **more}


# Results into other conversations


@pytest.mark.promise("C1", "C3")
@pytest.mark.parametrize("trigger", ["research", "coordination", "memory", "antThinking", "general"])
async def test_a_result_becomes_a_request_of_the_target_conversation(wire: Wire, trigger: str) -> None:
    config = into("coordinator", trigger_type=trigger, follow_up_guidance="Store findings in memory")
    await wire.ask("completion:async", prompt="Research", request_id="r", session_id="s", injection_config=config)
    result = await wire.pushed("completion:result", request_id="r")
    assert result["chain_id"] == "r"
    child = await wire.ask("completion:wait", request_id="r/1")
    assert (child["session_id"], child["parent_request_id"], child["ideation_depth"]) == ("coordinator", "r", 1)
    prompt = child["result"].removeprefix("echo: ")
    assert prompt.startswith("<system-reminder>\n")
    assert prompt.endswith("\n</system-reminder>")
    assert prompt.count("system-reminder>") == 2
    for words in ("echo: Research", "request r", "conversation s", "Store findings in memory", "Chain: r, hop 1"):
        assert words in prompt
    assert child["metadata"]["injection"] == {
        "injection_id": "r/1",
        "request_id": "r",
        "conversation_id": "s",
        "chain_id": "r",
        "hop": 1,
        "trigger_type": trigger,
        "outcome": "completed",
    }
    assert await deliveries(wire) == {"r/1": "delivered"}


@pytest.mark.promise("C1")
async def test_without_a_target_the_result_goes_into_its_own_conversation_and_each_target_counts_once(
    wire: Wire,
) -> None:
    await wire.ask("completion:async", prompt="x", request_id="own", session_id="s", injection_config={})
    child = await wire.ask("completion:wait", request_id="own/1")
    assert child["session_id"] == "s"
    await wire.ask(
        "completion:async",
        prompt="x",
        request_id="m",
        session_id="s",
        injection_config=into("a", "b", "a", "originating"),
    )
    await quiet(wire)
    assert set(await members(wire, "m")) == {"m", "m/1", "m/2", "m/3"}
    assert [(await wire.ask("completion:get", request_id=f"m/{n}"))["session_id"] for n in (1, 2, 3)] == ["a", "b", "s"]


@pytest.mark.promise("C1")
async def test_a_disabled_injection_does_nothing(wire: Wire) -> None:
    config = {"enabled": False, "trigger_type": "nothing-of-this-name"}
    reply = await wire.ask("completion:request", prompt="x", request_id="r", injection_config=config)
    assert reply["status"] == "completed"
    assert await deliveries(wire) == {}
    assert (await wire.refused("circuit_breaker:status", request_id="r")).code == "not_found"


@pytest.mark.promise("C2")
async def test_waiting_results_go_before_the_next_prompt_as_one_reminder_and_stay_in_the_history(
    tmp_path: Path,
) -> None:
    def counting(call: Seen) -> Answer:
        return Answer(pieces=(f"answer {len(call.json['messages'])}",))

    async with ScriptedEndpoint(script=counting) as endpoint:
        team = {"kind": "openai", "base_url": endpoint.openai_url}
        async with daemon_and_wire(tmp_path, providers={"team": team, "stub": {"kind": "stub"}}) as (_, wire):
            for number in (1, 2):
                config = into("boss", mode="next")
                await wire.ask(
                    "completion:request", prompt=f"fact {number}", model="stub/x", request_id=f"n{number}",
                    injection_config=config,
                )  # fmt: skip
            assert await deliveries(wire, state="queued") == {"n1/1": "queued", "n2/1": "queued"}
            await wire.ask("completion:request", prompt="What is new?", model="team/x", session_id="boss")
            assert set((await deliveries(wire)).values()) == {"delivered"}
            await wire.ask("completion:request", prompt="And now?", model="team/x", session_id="boss")
        first, second = endpoint.requests
        (asked,) = first.json["messages"]
        assert asked["content"].count("system-reminder>") == 2
        assert asked["content"].index("fact 1") < asked["content"].index("fact 2") < asked["content"].index("What is")
        assert [m["content"] for m in second.json["messages"]] == [asked["content"], "answer 1", "And now?"]


@pytest.mark.promise("C2")
async def test_a_reminder_of_a_prompt_without_an_answer_waits_for_the_next_one(wire: Wire) -> None:
    await wire.ask("completion:request", prompt="fact", request_id="n", injection_config=into("boss", mode="next"))
    await wire.ask("completion:async", prompt="x", request_id="slow", session_id="boss", provider_options=LONG)
    await in_state(wire, "slow", "running")
    assert await deliveries(wire) == {"n/1": "taken"}
    await wire.ask("completion:cancel", request_id="slow")
    assert await deliveries(wire) == {"n/1": "queued"}
    reply = await wire.ask("completion:request", prompt="x", session_id="boss")
    assert "fact" in reply["result"]
    assert await deliveries(wire) == {"n/1": "delivered"}


@pytest.mark.promise("C1", "C5")
async def test_two_agents_in_dialogue_continue_until_the_chain_s_depth_and_get_the_reason(wire: Wire) -> None:
    await wire.ask("monitor:subscribe", patterns=["injection:*"])
    await wire.ask(
        "completion:async", prompt="hello", request_id="d", session_id="alice", agent_id="a",
        injection_config=into("bob", inherit="reply"), circuit_breaker_config={"max_depth": 3},
    )  # fmt: skip
    blocked = await wire.pushed("injection:blocked")
    assert (blocked["target"], blocked["reason"]["code"]) == ("alice", "max_depth")
    notice = await wire.pushed("injection:delivered", injection_id="d/1/1/1/2")
    assert notice["target"] == "alice"
    await quiet(wire)
    where = [(await wire.ask("completion:get", request_id=name))["session_id"] for name in await members(wire, "d")]
    assert where == ["alice", "bob", "alice", "bob", "alice"]
    text = (await wire.ask("completion:get", request_id="d/1/1/1/2"))["result"]
    assert "max_depth" in text
    assert "injection:retry" in text


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    ("how", "outcome", "words"),
    [
        ("failed", "failed", "It failed and brought no result"),
        ("cancelled while it ran", "cancelled", "It was cancelled"),
        ("cancelled while it waited", "cancelled", "It was cancelled"),
        ("expired", "expired", "was never started"),
        ("timeout", "timeout", "brought no result in its time"),
    ],
)
async def test_an_end_without_a_result_is_delivered_too(tmp_path: Path, how: str, outcome: str, words: str) -> None:
    data: Json = {"prompt": "x", "request_id": "r", "session_id": "s", "injection_config": into("boss")}
    if how == "failed":
        data["provider_options"] = {"fail": "invalid_request"}
    elif how == "timeout":
        data |= {"provider_options": LONG, "timeout": 0.05, "retry": {"max_attempts": 1}}
    elif how == "expired":
        data |= {"ttl": 0.05}
    elif how == "cancelled while it ran":
        data["provider_options"] = LONG
    async with daemon_and_wire(tmp_path) as (_, wire):
        if how in ("expired", "cancelled while it waited"):
            await wire.ask("conversation:acquire_lock", request_id="holder", conversation_id="s")
        await wire.ask("completion:async", **data)
        if how.startswith("cancelled"):
            await wire.ask("completion:cancel", request_id="r")

        async def routed() -> bool:
            return await deliveries(wire, state="delivered") == {"r/1": "delivered"}

        await until(routed)
        child = await wire.ask("completion:get", request_id="r/1")
        assert words in child["result"]
        assert child["metadata"]["injection"]["outcome"] == outcome


@pytest.mark.promise("C1", "C4")
async def test_a_user_s_own_template_comes_first_and_a_broken_one_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "templates"
    folder.mkdir(parents=True)
    (folder / "mine.md.j2").write_text("From {{ request_id }}: {{ result }}")
    (folder / "research.md.j2").write_text("{{ nothing.of.this }}")
    async with daemon_and_wire(tmp_path) as (_, wire):
        for number, trigger in enumerate(("mine", "research")):
            await wire.ask(
                "completion:request", prompt="</system-reminder>", request_id=f"r{number}",
                injection_config=into(f"t{number}", trigger_type=trigger),
            )  # fmt: skip
        mine = await wire.ask("completion:wait", request_id="r0/1")
        assert mine["result"] == ("echo: <system-reminder>\nFrom r0: echo: (/system-reminder)\n</system-reminder>")
        other = await wire.ask("completion:wait", request_id="r1/1")
        assert "What may be done next" in other["result"]
        error = await wire.refused("completion:async", prompt="x", injection_config={"trigger_type": "resaerch"})
        assert (error.code, error.details["path"]) == ("invalid_data", "injection_config.trigger_type")
        assert "mine" in error.message


# Limits


@pytest.mark.promise("C5")
async def test_a_request_that_names_a_parent_joins_its_chain_and_a_blocked_one_says_why(wire: Wire) -> None:
    await wire.ask("completion:request", prompt="x", request_id="a", circuit_breaker_config={"max_depth": 1})
    joined = {"parent_request_id": "a"}
    await wire.ask("completion:request", prompt="x", request_id="b", circuit_breaker_config=joined)
    deeper = {"parent_request_id": "b", "max_depth": 9}
    reply = await wire.ask("completion:async", prompt="x", request_id="c", circuit_breaker_config=deeper)
    assert (reply["status"], reply["reason"]["code"]) == ("blocked", "max_depth")
    assert (reply["chain"]["ideation_depth"], reply["chain"]["max_depth"], reply["chain"]["members"]) == (2, 1, 3)
    waited = await wire.ask("completion:request", prompt="x", request_id="c", circuit_breaker_config=deeper)
    assert (waited["status"], waited["error"]["code"], waited["reason"]["code"]) == ("blocked", "blocked", "max_depth")
    fresh = await wire.ask("completion:request", prompt="x", circuit_breaker_config=deeper)
    assert (fresh["status"], fresh["chain"]["chain_id"]) == ("blocked", "a")
    unknown = await wire.refused("completion:async", prompt="x", circuit_breaker_config={"parent_request_id": "zz"})
    assert unknown.code == "unknown_parent"


@pytest.mark.promise("C5", "R1")
async def test_a_blocked_request_is_reported_to_its_sender_once_and_to_subscribers(
    connect: Connect, wire: Wire
) -> None:
    await wire.ask("completion:request", prompt="x", request_id="a", circuit_breaker_config={"max_depth": 0})
    data = {"prompt": "x", "request_id": "deep", "circuit_breaker_config": {"parent_request_id": "a"}}
    listener = await connect()
    await listener.ask("monitor:subscribe", patterns=["completion:result"])
    wire.raw(json.dumps({"event": "completion:async", "data": data}).encode() + b"\n")
    assert (await wire.line())["data"]["status"] == "blocked"
    assert (await listener.pushed("completion:result", request_id="deep"))["status"] == "blocked"
    await wire.ask("system:ready")
    assert [line["event"] for line in wire.lines] == []


@pytest.mark.promise("C5", "C6", "C8")
async def test_a_spent_budget_blocks_and_a_reset_lets_the_chain_go_on(wire: Wire) -> None:
    limits = {"token_budget": 100}
    used = {"usage": {"input_tokens": 60, "output_tokens": 50}}
    await wire.ask(
        "completion:request", prompt="x", request_id="a", circuit_breaker_config=limits, provider_options=used
    )
    figures = await chain(wire, "a")
    assert (figures["state"], figures["tokens_used"], figures["tokens_reserved"]) == ("exhausted", 110, 0)
    child = {"parent_request_id": "a", **limits}
    reply = await wire.ask("completion:async", prompt="x", circuit_breaker_config=child)
    assert reply["reason"]["code"] == "token_budget"
    reset = await wire.ask("circuit_breaker:reset", chain_id="a")
    assert (reset["state"], reset["tokens_used"], reset["resets"]) == ("open", 0, 1)
    reply = await wire.ask("completion:request", prompt="x", circuit_breaker_config=child)
    assert reply["status"] == "completed"


@pytest.mark.promise("C6")
async def test_a_running_request_is_reserved_and_the_provider_is_asked_for_no_more_than_the_rest(
    tmp_path: Path,
) -> None:
    async with ScriptedEndpoint() as endpoint:
        team = {"kind": "openai", "base_url": endpoint.openai_url}
        async with daemon_and_wire(tmp_path, providers={"team": team, "stub": {"kind": "stub"}}) as (_, wire):
            limits = {"token_budget": 500}
            await wire.ask(
                "completion:async", prompt="x" * 40, request_id="a", model="stub/x", max_tokens=300,
                circuit_breaker_config=limits, provider_options=LONG,
            )  # fmt: skip
            await in_state(wire, "a", "running")
            assert (await chain(wire, "a"))["tokens_reserved"] == 310
            beside = {"parent_request_id": "a", **limits}
            await wire.ask("completion:request", prompt="y" * 40, model="team/x", circuit_breaker_config=beside)
            (call,) = endpoint.requests
            assert call.json.get("max_tokens", call.json.get("max_completion_tokens")) == 500 - 310 - 10


@pytest.mark.promise("C5")
async def test_a_chain_s_time_ends_for_waiting_requests(tmp_path: Path) -> None:
    clock = SimulatedClock()
    async with daemon_and_wire(tmp_path, clock) as (_, wire):
        await wire.ask("conversation:acquire_lock", request_id="holder", conversation_id="s")
        await wire.ask(
            "completion:async", prompt="x", request_id="a", session_id="s", circuit_breaker_config={"time_window": 60}
        )
        await clock.advance(61)
        await wire.ask("conversation:release_lock", request_id="holder")
        result = await wire.pushed("completion:result", request_id="a")
        assert (result["status"], result["reason"]["code"]) == ("blocked", "time_window")


@pytest.mark.promise("C7", "C8")
async def test_agents_that_repeat_each_other_are_stopped_by_the_pattern_checks_and_the_state_outlives_a_restart(
    tmp_path: Path,
) -> None:
    same = "The sky is blue because of the way that light of short wave length is scattered by the air above us."
    async with daemon_and_wire(tmp_path) as (_, wire):
        await wire.ask(
            "completion:async", prompt="why?", request_id="d", session_id="alice",
            injection_config=into("alice", inherit="same"), provider_options={"text": same},
        )  # fmt: skip
        await quiet(wire)
        figures = await chain(wire, "d")
        assert figures["state"] == "tripped"
        assert figures["reason"]["code"] in ("repetition", "cycle")
        assert figures["reason"]["risk_score"] >= 0.7
        assert figures["reason"]["evidence"]
        assert figures["ideation_depth"] <= 5
    async with daemon_and_wire(tmp_path) as (_, wire):
        assert (await chain(wire, "d"))["state"] == "tripped"
        reply = await wire.ask("completion:async", prompt="x", circuit_breaker_config={"parent_request_id": "d"})
        assert reply["status"] == "blocked"
        await wire.ask("circuit_breaker:reset", request_id="d/1")
        reply = await wire.ask("completion:request", prompt="x", circuit_breaker_config={"parent_request_id": "d"})
        assert reply["status"] == "completed"


@pytest.mark.promise("C7")
async def test_agents_that_thank_each_other_in_ever_new_words_are_stopped_and_the_reason_says_why(
    tmp_path: Path,
) -> None:
    (thanks,) = (one for one in read_corpus(CORPUS) if one.id == "written-reports-005")
    async with daemon_and_wire(tmp_path, patterns={"vectors": True}) as (_, wire):
        parent: str | None = None
        for number, hop in enumerate(thanks.hops):
            reply = await wire.ask(
                "completion:request", prompt=thanks.hops[0].prompt if parent is None else "Go on.",
                request_id=f"h{number}", session_id=hop.speaker, agent_id=hop.agent,
                circuit_breaker_config={} if parent is None else {"parent_request_id": parent},
                provider_options={"text": hop.result},
            )  # fmt: skip
            if reply["status"] == "blocked":
                break
            parent = f"h{number}"
        figures = await chain(wire, "h0")
        assert figures["state"] == "tripped"
        assert figures["reason"]["code"] == "no_progress"
        assert "without getting on" in figures["reason"]["message"]
        shown = [one for one in figures["reason"]["evidence"] if "“" in one]
        assert len(shown) == 4, "a sentence of each of the last four results"
        assert {one.split(":")[0] for one in shown} == {"backend", "frontend", "security"}
        assert (await wire.ask("system:health"))["problems"] == []


@pytest.mark.promise("C7")
async def test_at_half_the_threshold_agents_and_listeners_are_told_before_anything_is_stopped(wire: Wire) -> None:
    await wire.ask("monitor:subscribe", patterns=["circuit_breaker:warning"])
    same = "The sky is blue because of the way that light of short wave length is scattered by the air above us."
    await wire.ask(
        "completion:async", prompt="why?", request_id="d", session_id="alice",
        injection_config=into("alice", inherit="same"), provider_options={"text": same},
    )  # fmt: skip
    warning = await wire.pushed("circuit_breaker:warning")
    assert (warning["chain_id"], warning["request_id"], warning["session_id"]) == ("d", "d/1", "alice")
    assert 0.35 <= warning["risk_score"] < 0.7
    assert warning["code"] == "repetition"
    await quiet(wire)
    told = (await wire.ask("injection:status", injection_id="d/1/1"))["injection"]["text"]
    assert f"Note by KSI: {warning['message']}." in told
    assert "say what is missing" in told
    first = (await wire.ask("injection:status", injection_id="d/1"))["injection"]["text"]
    assert "Note by KSI" not in first


@pytest.mark.promise("C7")
async def test_a_request_can_switch_its_pattern_checks_off(wire: Wire) -> None:
    await wire.ask(
        "completion:async", prompt="why?", request_id="d", session_id="alice", patterns={"enabled": False},
        injection_config={"inherit": "same"}, provider_options={"text": "the same words again and again"},
        circuit_breaker_config={"max_depth": 6},
    )  # fmt: skip
    await quiet(wire)
    figures = await chain(wire, "d")
    assert (figures["state"], figures["reason"]["code"]) == ("exhausted", "max_depth"), "no pattern tripped it"
    assert figures["ideation_depth"] == 6, "the notice of the limit is none of its hops"


# The operator's hand


@pytest.mark.promise("F8")
async def test_a_cancelled_chain_stops_whole_and_takes_nothing_more(wire: Wire) -> None:
    await wire.ask("completion:async", prompt="x", request_id="a", circuit_breaker_config={}, provider_options=LONG)
    for number in range(3):
        join = {"parent_request_id": "a"}
        await wire.ask(
            "completion:async", prompt="x", request_id=f"b{number}", session_id="one", circuit_breaker_config=join,
            provider_options=LONG,
        )  # fmt: skip
    await in_state(wire, "b0", "running")
    reply = await wire.ask("completion:cancel", chain_id="a")
    assert (reply["status"], reply["cancelled"]) == ("closed", 4)
    assert set((await members(wire, "a")).values()) == {"cancelled"}
    late = await wire.ask("completion:async", prompt="x", circuit_breaker_config={"parent_request_id": "a"})
    assert late["reason"]["code"] == "chain_closed"
    again = await wire.ask("completion:cancel", chain_id="a")
    assert (again["status"], again["cancelled"]) == ("closed", 0)
    assert (await wire.refused("completion:cancel", chain_id="zz")).code == "not_found"
    assert (await wire.refused("completion:cancel")).code == "invalid_data"
    assert (await wire.refused("completion:cancel", chain_id="a", request_id="b0")).code == "invalid_data"


@pytest.mark.promise("C3", "C8")
async def test_a_dead_letter_is_listed_and_sent_again(wire: Wire) -> None:
    config = into("boss")
    await wire.ask("completion:async", prompt="fact", request_id="a", injection_config=config, provider_options=LONG)
    await in_state(wire, "a", "running")
    await wire.ask("completion:cancel", chain_id="a")

    async def dead() -> bool:
        return await deliveries(wire, state="blocked") == {"a/1": "blocked"}

    await until(dead)
    one = (await wire.ask("injection:status", injection_id="a/1"))["injection"]
    assert one["reason"]["code"] == "chain_closed"
    assert "It was cancelled" in one["text"]
    await wire.ask("circuit_breaker:reset", chain_id="a")
    again = await wire.ask("injection:retry", injection_id="a/1")
    assert (again["retried"], again["injection"]["injection_id"]) == ("a/1", "a/1+1")
    reply = await wire.ask("completion:wait", request_id="a/1+1")
    assert (reply["status"], reply["session_id"], reply["chain_id"]) == ("completed", "boss", "a")
    assert await deliveries(wire) == {"a/1": "retried", "a/1+1": "delivered"}
    assert (await wire.refused("injection:retry", injection_id="a/1")).code == "invalid_data"
    assert (await wire.refused("injection:retry", injection_id="zz")).code == "not_found"


@pytest.mark.promise("C3")
async def test_a_delivery_whose_request_fails_is_a_dead_letter(tmp_path: Path) -> None:
    providers = {"stub": {"kind": "stub"}, "other": {"kind": "stub", "fail": "invalid_request"}}
    async with daemon_and_wire(tmp_path, providers=providers) as (_, wire):
        await wire.ask("monitor:subscribe", patterns=["injection:failed"])
        await wire.ask("completion:async", prompt="x", request_id="a", model="other/x", injection_config=into("boss"))
        failed = await wire.pushed("injection:failed")
        assert (failed["injection_id"], failed["reason"]["code"]) == ("a/1", "invalid_request")


@pytest.mark.promise("C3", "L3")
async def test_who_interrupts_a_waiting_carrier_tells_that_its_delivery_failed(tmp_path: Path) -> None:
    providers = {"stub": {"kind": "stub"}, "other": {"kind": "stub", "fail": "provider_error"}}
    retry = {"initial_delay": 600.0, "max_delay": 600.0}
    async with daemon_and_wire(tmp_path, providers=providers, retry=retry) as (_, wire):
        await wire.ask("monitor:subscribe", patterns=["injection:failed"])
        first = {"prompt": "x", "request_id": "a", "model": "other/x", "provider_options": {"fail": "invalid_request"}}
        await wire.ask("completion:async", **first, injection_config=into("boss"))
        await in_state(wire, "a", "failed")
        await in_state(wire, "a/1", "retrying")
        await wire.ask("completion:async", prompt="urgent", session_id="boss", on_busy="interrupt")
        failed = await wire.pushed("injection:failed")
        assert (failed["injection_id"], failed["reason"]["code"]) == ("a/1", "cancelled")


@pytest.mark.promise("C5", "R4")
async def test_chains_are_listed_newest_first_page_by_page(wire: Wire) -> None:
    for name in ("a", "b", "c"):
        await wire.ask("completion:request", prompt="x", request_id=name, circuit_breaker_config={})
    first = await wire.ask("circuit_breaker:status", limit=2)
    rest = await wire.ask("circuit_breaker:status", limit=2, cursor=first["cursor"])
    assert [one["chain_id"] for one in first["chains"] + rest["chains"]] == ["c", "b", "a"]
    assert "cursor" not in rest
    error = await wire.refused("circuit_breaker:status", request_id="a", chain_id="b")
    assert error.code == "invalid_data"


@pytest.mark.promise("F2", "C5")
async def test_a_requeued_member_stays_in_its_chain(wire: Wire) -> None:
    broken = {"fail": "invalid_request"}
    await wire.ask("completion:request", prompt="x", request_id="a", circuit_breaker_config={})
    await wire.ask(
        "completion:request", prompt="x", request_id="b", circuit_breaker_config={"parent_request_id": "a"},
        provider_options=broken,
    )  # fmt: skip
    again = await wire.ask("completion:requeue", request_id="b")
    reply = await wire.ask("completion:wait", request_id=again["request_id"])
    assert (reply["chain_id"], reply["parent_request_id"], reply["ideation_depth"]) == ("a", "a", 1)


@pytest.mark.promise("C3", "Q5")
async def test_fifty_answers_into_one_conversation_come_each_once_and_one_at_a_time(wire: Wire) -> None:
    futures = [
        wire.post(
            "completion:request",
            {"prompt": f"part {n}", "request_id": f"p{n}", "injection_config": into("reduce")},
        )
        for n in range(50)
    ]
    await asyncio.gather(*(answer(future) for future in futures))
    await quiet(wire)
    done = await deliveries(wire, limit=200)
    assert done == {f"p{n}/1": "delivered" for n in range(50)}
    assert (await wire.ask("completion:session_status", session_id="reduce"))["turns"] == 50
