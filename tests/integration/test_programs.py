"""Programs that an agent starts: what they send over the socket is the agent's, whatever they say. The real Claude Code
starts them by its shell."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from ksi.protocol import encode_reply
from tests.endpoint import Answer
from tests.integration.agents import Agents, agents, ask, uses_numbered
from tests.integration.test_children import members
from tests.integration.wire import Json, Wire

OPTIONS: dict[str, Any] = {"ksi_tools": False, "tools": ["Bash"], "allowed_tools": ["Bash"]}
"""An agent with a shell, and without KSI's tools."""

SENDS = """
import json, socket, sys
path, *events = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as wire:
    wire.connect(path)
    answers = wire.makefile()
    for event in events:
        wire.sendall(event.encode() + b"\\n")
        told = json.loads(answers.readline())
        print(told.get("error", {}).get("message") or told["data"].get("result") or told["data"].get("status"))
"""
"""A program that knows nothing of KSI: it sends lines to a socket, and prints their answers."""


class Shell:
    """Commands for an agent's shell, at the home of its daemon."""

    home: Path

    def __init__(self, folder: Path) -> None:
        self.program = folder / "sends.py"
        self.program.write_text(SENDS)

    @property
    def socket(self) -> Path:
        return self.home / "var" / "run" / "daemon.sock"

    def ask(self, prompt: str, *options: str, number: int = 1) -> Answer:
        """`ksi ask`."""
        command = [
            sys.executable,
            "-m",
            "ksi.cli",
            "--home",
            str(self.home),
            "ask",
            "--no-start",
            "--no-stdin",
            "--no-stream",
        ]
        return self.run(shlex.join([*command, *options, "-m", "claude-cli/haiku", prompt]), number)

    def send(self, event: str, number: int = 1, **data: Any) -> Answer:
        """A line to the socket."""
        return self.run(self.line(event, **data), number)

    def line(self, event: str, **data: Any) -> str:
        line = encode_reply(event, data, None, 0.0).decode().strip()
        return shlex.join([sys.executable, str(self.program), str(self.socket), line])

    def run(self, command: str, number: int = 1) -> Answer:
        return uses_numbered("Bash", number, command=command, description="ask")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(autouse=True)
def _numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.claude import number_messages

    number_messages(monkeypatch)


def at(place: Agents, shell: Shell) -> Agents:
    shell.home = place.house.home
    return place


def last(given: list[Any]) -> str:
    return str(given[-1]).strip()


@pytest.mark.promise("M2")
@pytest.mark.parametrize("by", ["ksi ask", "a request", "a request that is waited for"])
async def test_agents_that_ask_by_their_shells_are_one_chain_three_deep_with_one_slot(
    tmp_path: Path, shell: Shell, by: str
) -> None:
    def deeper(prompt: str, given: list[Any]) -> Answer | str:
        level = int(re.findall(r"\d+", prompt)[0])
        if level == 0:
            return "the ground"
        if given:
            return f"{level} heard: {last(given)}"
        below = f"level {level - 1}"
        wanted: dict[str, Any] = {
            "prompt": below,
            "model": "claude-cli/haiku",
            "agent_id": "eve",
            "priority": "critical",
        }
        if by == "ksi ask":
            return shell.ask(below, "--agent", "eve", "--priority", "critical")
        if by == "a request":
            return shell.send("completion:request", **wanted)
        name = f"request-{level - 1}"
        two = [
            shell.line("completion:async", request_id=name, **wanted),
            shell.line("completion:wait", request_id=name),
        ]
        return shell.run(" > /dev/null; ".join(two))

    async with agents(tmp_path, deeper) as place, at(place, shell).served(slots=1, **OPTIONS) as wire:
        reply = await ask(wire, "level 3", request_id="top", agent_id="ada", priority="low")
        assert reply["result"] == "3 heard: 2 heard: 1 heard: the ground"
        rows = await members(wire, "top")
        assert [(row["depth"], row["status"]) for row in rows] == [(depth, "completed") for depth in range(4)]
        assert [row.get("parent_request_id") for row in rows[1:]] == [row["request_id"] for row in rows[:-1]]
        assert {row["agent_id"] for row in rows} == {"ada"}
        assert (await wire.ask("completion:get", request_id=rows[1]["request_id"]))["priority"] == "low"


@pytest.mark.promise("M2", "C5")
async def test_an_agent_that_calls_itself_by_its_shell_for_ever_is_stopped_at_the_depth(
    tmp_path: Path, shell: Shell
) -> None:
    def for_ever(_: str, given: list[Any]) -> Answer | str:
        if given:
            return f"heard: {last(given)}"
        chain = {"max_depth": 1_000, "token_budget": 10**9}
        return shell.send(
            "completion:request", prompt="once more", model="claude-cli/haiku", circuit_breaker_config=chain
        )

    sections: dict[str, Any] = {"chain": {"max_depth": 2}}
    async with (
        agents(tmp_path, for_ever) as place,
        at(place, shell).served(slots=1, sections=sections, **OPTIONS) as wire,
    ):
        await ask(wire, "once more", request_id="top", patterns={"enabled": False})
        rows = await members(wire, "top")
        assert [row["depth"] for row in rows] == [0, 1, 2, 3]
        assert [row["status"] for row in rows] == ["completed", "completed", "completed", "blocked"]


@pytest.mark.promise("M2", "B1")
async def test_what_an_agents_programs_ask_counts_against_its_budget_under_any_name(
    tmp_path: Path, shell: Shell
) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt != "start":
            return "done"
        if given:
            return last(given)
        return shell.send("completion:request", prompt="x", model="claude-cli/haiku", agent_id="eve")

    sections: dict[str, Any] = {"budgets": {"ada": {"scope": "agent:ada", "requests": 1, "on_exceed": "refuse"}}}
    async with agents(tmp_path, think) as place, at(place, shell).served(sections=sections, **OPTIONS) as wire:
        reply = await ask(wire, "start", request_id="top", agent_id="ada")
        assert "budget" in reply["result"]


@pytest.mark.promise("M2", "B1")
async def test_a_run_does_not_wait_by_its_programs_for_a_budget_that_it_holds_itself(
    tmp_path: Path, shell: Shell
) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt != "start":
            return "done"
        if not given:
            return shell.send("completion:request", prompt="x", model="claude-cli/haiku", request_id="child-1")
        if len(given) == 1:
            return shell.ask("x", "--id", "child-2", number=2)
        return " | ".join(str(one) for one in given)

    sections: dict[str, Any] = {"budgets": {"ada": {"scope": "agent:ada", "requests": 1}}}
    async with agents(tmp_path, think) as place, at(place, shell).served(sections=sections, **OPTIONS) as wire:
        reply = await ask(wire, "start", request_id="top", agent_id="ada")
        told, cancelled = reply["result"].split(" | ")
        assert "A run does not wait for a budget" in told
        assert "cancelled" in cancelled
        for child in ("child-1", "child-2"):
            assert (await wire.ask("completion:get", request_id=child))["status"] == "cancelled"


@pytest.mark.promise("M2", "L1")
async def test_a_program_that_asks_in_its_agents_own_conversation_is_refused_with_the_reason(
    tmp_path: Path, shell: Shell
) -> None:
    def think(_: str, given: list[Any]) -> Answer | str:
        if not given:
            return shell.ask("are you there?", "--session", "home")
        if len(given) == 1:
            return shell.send("completion:wait", 2, request_id="top")
        return " | ".join(str(one) for one in given)

    async with agents(tmp_path, think) as place, at(place, shell).served(slots=1, **OPTIONS) as wire:
        reply = await ask(wire, "start", request_id="top", session_id="home", agent_id="ada")
        first, second = reply["result"].split(" | ")
        assert "waits for the request that asks" in first
        assert "waits for the request that asks" in second


@pytest.mark.promise("M2", "S2")
async def test_a_program_of_an_agent_may_look_around_and_do_no_more_than_ask(tmp_path: Path, shell: Shell) -> None:
    events: list[tuple[str, Json]] = [
        ("completion:status", {}),
        ("system:shutdown", {}),
        ("completion:cancel", {"request_id": "other"}),
        ("budget:set", {"budget": "ada", "scope": "agent:ada", "requests": 1}),
        ("completion:approve", {"request_id": "top"}),
        ("completion:request", {"prompt": "x", "session_id": "others", "model": "stub/echo"}),
        ("completion:request", {"prompt": "x", "model": "stub/echo", "provider_options": {"delay": 1}}),
    ]

    def think(_: str, given: list[Any]) -> Answer | str:
        if len(given) < len(events):
            event, data = events[len(given)]
            return shell.send(event, len(given) + 1, **data)
        return " | ".join(str(one).strip() for one in given)

    async with agents(tmp_path, think) as place, at(place, shell).served(**OPTIONS) as wire:
        other = {"request_id": "other", "session_id": "others", "agent_id": "eve"}
        await wire.ask("completion:request", prompt="x", model="stub/echo", **other)
        reply = await ask(wire, "look around", request_id="top", agent_id="ada")
        looked, *refused = reply["result"].split(" | ")
        assert looked == "running" or "error" not in looked
        assert "no request 'other'" in refused[1]
        assert "is not one of" in refused[4]
        assert all("needs operate" in refused[number] for number in (0, 2, 3, 5))


@pytest.mark.promise("M2")
async def test_the_owner_may_give_an_agents_programs_the_owners_rights(tmp_path: Path, shell: Shell) -> None:
    def think(_: str, given: list[Any]) -> Answer | str:
        return last(given) if given else shell.send("completion:async", prompt="x", request_id="free", model="stub/x")

    async with agents(tmp_path, think) as place, at(place, shell).served(programs="owner", **OPTIONS) as wire:
        await ask(wire, "start", request_id="top", agent_id="ada")
        free = await wire.ask("completion:wait", request_id="free")
        assert (free["status"], free.get("agent_id")) == ("completed", None)


@pytest.mark.promise("M2")
async def test_the_request_of_a_program_that_died_goes_on_and_the_slot_goes_back(tmp_path: Path, shell: Shell) -> None:
    runs = tmp_path / "runs"

    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "slow":
            runs.touch()
            return "slow indeed"
        if not given:
            line = shell.line("completion:request", prompt="slow", model="claude-cli/haiku", request_id="child")
            return shell.run(f"{line} & until [ -e {runs} ]; do sleep 0.05; done; kill -9 $!")
        return last(given)

    async with agents(tmp_path, think) as place, at(place, shell).served(slots=1, **OPTIONS) as wire:
        reply = await ask(wire, "start", request_id="top", agent_id="ada")
        assert reply["status"] == "completed"
        assert (await wire.ask("completion:wait", request_id="child"))["status"] == "completed"
        status = await wire.ask("completion:provider_status")
        assert status["providers"]["claude-cli"]["running"] == 0


@pytest.mark.promise("M2")
async def test_a_cancelled_run_takes_the_request_that_its_program_waits_for_along(tmp_path: Path, shell: Shell) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "slow":
            return Answer(silent=True)
        return "never" if given else shell.ask("slow", "--id", "child")

    async with agents(tmp_path, think) as place, at(place, shell).served(slots=1, **OPTIONS) as wire:
        await wire.ask("monitor:subscribe", patterns=["completion:progress"])
        await wire.ask("completion:async", prompt="go", request_id="top", model="claude-cli/haiku")
        await wire.pushed("completion:progress", request_id="child", status="running")
        await wire.ask("completion:cancel", request_id="top")
        assert (await wire.ask("completion:wait", request_id="child"))["status"] == "cancelled"


@pytest.mark.promise("M2")
async def test_a_program_that_outlives_its_turn_still_asks_for_it_and_one_that_outlives_its_process_is_refused(
    tmp_path: Path, shell: Shell
) -> None:
    """Both have left their shell, its group and its session."""
    told, go = tmp_path / "told", tmp_path / "go"

    def think(_: str, given: list[Any]) -> Answer | str:
        if given:
            return "done"
        wait = f"until [ -e {go}-$n ]; do sleep 0.05; done"
        ask = [shell.line("completion:request", prompt="x", model="stub/echo", request_id=f"late-{n}") for n in (1, 2)]
        steps = [f"n={n}; {wait}; {line} > {told}-part; mv {told}-part {told}-{n}" for n, line in enumerate(ask, 1)]
        return shell.run(f"setsid -f bash -c {shlex.quote('; '.join(steps))} > /dev/null 2>&1 < /dev/null")

    async def said(number: int) -> str:
        Path(f"{go}-{number}").touch()
        async with asyncio.timeout(60):
            while not (path := Path(f"{told}-{number}")).exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.02)
        return path.read_text().strip()

    async with agents(tmp_path, think) as place, at(place, shell).served(warm_age=600.0, **OPTIONS) as wire:
        await ask(wire, "start", request_id="top", agent_id="ada")
        await said(1)
        rows = await members(wire, "top")
        assert [(row["request_id"], row["depth"], row["agent_id"]) for row in rows] == [
            ("top", 0, "ada"),
            ("late-1", 1, "ada"),
        ]
        report = (await wire.ask("completion:provider_status"))["providers"]["claude-cli"]["own"]
        (process,) = report["processes"]
        os.kill(process["pid"], 9)
        assert "has ended" in await said(2)
        assert await refused(wire, "late-2")


async def refused(wire: Wire, request_id: str) -> bool:
    found = await wire.ask("completion:find", beginning=request_id)
    return request_id not in found["names"]
