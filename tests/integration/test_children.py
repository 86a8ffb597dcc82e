"""Agents that run under KSI and ask others through it: the real Claude Code, and its limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.endpoint import Answer
from tests.integration.agents import agents, ask, call
from tests.integration.wire import Json, Wire


@pytest.fixture(autouse=True)
def _numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.claude import number_messages

    number_messages(monkeypatch)


def heard(given: Any) -> str:
    """A tool's result, in a text."""
    return str(given.get("text") or given.get("message")) if isinstance(given, dict) else str(given)


def deeper(prompt: str, given: list[Any]) -> Answer | str:
    """An agent of level N asks one of level N - 1, and reports its answer; level 0 answers by itself."""
    level = int(re.findall(r"\d+", prompt)[0])
    if level == 0:
        return "the ground"
    if not given:
        return call("ask", prompt=f"level {level - 1}", model="claude-cli/haiku")
    return f"{level} heard: {heard(given[0])}"


async def members(wire: Wire, chain: str) -> list[Json]:
    reply = await wire.ask("circuit_breaker:status", chain_id=chain, members=True)
    found: list[Json] = reply["requests"]
    return found


@pytest.mark.promise("M2")
async def test_an_agent_asks_another_three_deep_with_one_slot_and_all_are_one_chain(tmp_path: Path) -> None:
    async with agents(tmp_path, deeper) as place, place.served(slots=1) as wire:
        reply = await ask(wire, "level 3", request_id="top", agent_id="ada", priority="low")
        assert reply["result"] == "3 heard: 2 heard: 1 heard: the ground"
        rows = await members(wire, "top")
        assert [(row["depth"], row["status"]) for row in rows] == [(depth, "completed") for depth in range(4)]
        assert [row.get("parent_request_id") for row in rows[1:]] == [row["request_id"] for row in rows[:-1]]
        # Whatever it says of itself, it is its parent's agent, of its parent's urgency.
        assert {row["agent_id"] for row in rows} == {"ada"}
        child = await wire.ask("completion:get", request_id=rows[1]["request_id"])
        assert (child["priority"], child["metadata"]["tool_use_id"]) == ("low", "toolu_1_mcp__ksi__ask")


@pytest.mark.promise("M2", "C5")
async def test_an_agent_that_calls_itself_for_ever_is_stopped_at_the_depth_with_a_reason(tmp_path: Path) -> None:
    def for_ever(_: str, given: list[Any]) -> Answer | str:
        if not given:
            return call("ask", prompt="once more", model="claude-cli/haiku", priority="critical")
        return f"heard: {heard(given[0])}"

    sections: dict[str, Any] = {"chain": {"max_depth": 2}}
    async with agents(tmp_path, for_ever) as place, place.served(slots=1, sections=sections) as wire:
        reply = await ask(wire, "once more", request_id="top", patterns={"enabled": False})
        assert reply["status"] == "completed"
        assert "max_depth" in reply["result"]
        rows = await members(wire, "top")
        assert [(row["depth"], row["status"]) for row in rows] == [
            (0, "completed"),
            (1, "completed"),
            (2, "completed"),
            (3, "blocked"),
        ]
        assert {(await wire.ask("completion:get", request_id=row["request_id"]))["priority"] for row in rows} == {
            "normal"
        }


@pytest.mark.promise("M2", "C6")
async def test_a_run_whose_chain_has_no_tokens_left_cannot_ask(tmp_path: Path) -> None:
    async with agents(tmp_path, deeper) as place, place.served(slots=1) as wire:
        small = {"token_budget": 30, "max_depth": 9}
        reply = await ask(wire, "level 3", request_id="top", circuit_breaker_config=small)
        assert reply["status"] == "completed"
        rows = await members(wire, "top")
        assert rows[-1]["status"] == "blocked"
        assert "tokens used" in reply["result"]
        assert len(rows) < 4


@pytest.mark.promise("M2", "B1")
async def test_what_an_agents_children_ask_counts_against_its_own_budget(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"budgets": {"ada": {"scope": "agent:ada", "requests": 2, "on_exceed": "refuse"}}}
    async with agents(tmp_path, deeper) as place, place.served(slots=1, sections=sections) as wire:
        reply = await ask(wire, "level 3", request_id="top", agent_id="ada")
        assert reply["status"] == "completed"
        assert reply["result"].startswith("3 heard: 2 heard: ")
        assert "budget" in reply["result"]
        assert [row["depth"] for row in await members(wire, "top") if row["status"] == "completed"] == [0, 1]


@pytest.mark.promise("M2", "L1")
async def test_a_child_that_asks_in_its_parents_conversation_is_refused_with_the_reason(tmp_path: Path) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt.startswith("start") and not given:
            return call("ask", prompt="ask back", model="claude-cli/haiku")
        if prompt == "ask back" and not given:
            return call("ask", prompt="are you there?", session_id="home", model="claude-cli/haiku")
        return f"heard: {heard(given[0])}"

    async with agents(tmp_path, think) as place, place.served(slots=1) as wire:
        reply = await ask(wire, "start", request_id="top", session_id="home", agent_id="ada")
        assert "conversation 'home' waits for the request that asks" in reply["result"]
        assert len(await members(wire, "top")) == 2


@pytest.mark.promise("M2", "L1")
async def test_an_agent_that_asks_in_its_own_conversation_is_refused_and_may_submit_there(tmp_path: Path) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "later":
            return "done later"
        if not given:
            return call("ask", prompt="later", session_id="home", model="claude-cli/haiku")
        if len(given) == 1:
            return call("submit", 2, prompt="later", session_id="home", model="claude-cli/haiku")
        if len(given) == 2:
            return call("result", 3, request_id=given[1]["request_id"], timeout=60)
        return " | ".join(str(one) for one in given)

    async with agents(tmp_path, think) as place, place.served(slots=1) as wire:
        reply = await ask(wire, "start", request_id="top", session_id="home", agent_id="ada")
        first, _, third = reply["result"].split(" | ")
        assert "waits for the request that asks" in first
        assert "waits for the request that asks" in third
        later = (await members(wire, "top"))[1]["request_id"]
        assert (await wire.ask("completion:wait", request_id=later))["result"] == "done later"


@pytest.mark.promise("M2")
async def test_a_run_sees_its_own_requests_alone_and_can_do_no_more_than_ask(tmp_path: Path) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if not given:
            return call("result", request_id="secret")
        if len(given) == 1:
            return call("ask", 2, prompt="x", session_id="other", model="stub/echo")
        return " | ".join(str(one) for one in given)

    async with agents(tmp_path, think) as place, place.served() as wire:
        await wire.ask(
            "completion:request",
            prompt="x",
            request_id="secret",
            session_id="other",
            agent_id="eve",
            model="stub/e",
        )
        reply = await ask(wire, "look around", agent_id="ada")
        assert "no request 'secret'" in reply["result"]
        assert "is not one of" in reply["result"]


@pytest.mark.promise("M2")
async def test_a_cancelled_run_takes_the_request_that_it_waits_for_along(tmp_path: Path) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "slow":
            return Answer(silent=True)
        return "never" if given else call("ask", prompt="slow", model="claude-cli/haiku")

    async with agents(tmp_path, think) as place, place.served(slots=1) as wire:
        await wire.ask("monitor:subscribe", patterns=["completion:progress"])
        await wire.ask("completion:async", prompt="go", request_id="top", model="claude-cli/haiku")
        await wire.pushed("completion:progress", request_id="top", status="running")
        child = (await wire.next(lambda m: m.get("data", {}).get("status") == "running"))["data"]["request_id"]
        await wire.ask("completion:cancel", request_id="top")
        assert (await wire.ask("completion:wait", request_id=child))["status"] == "cancelled"
        assert (await ask(wire, "level 0", model="stub/echo"))["status"] == "completed"
