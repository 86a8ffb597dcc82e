"""Claude Code's permission prompts through KSI: the real program, a person who answers, and the time in between."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.providers.base import Permission, PersonNeeded, Verdict
from tests.claude import Talk, living, number_messages
from tests.claude import until as until_seen
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer
from tests.integration.agents import Agents, agents, ask, uses_all, uses_numbered
from tests.integration.test_pauses import ksi
from tests.integration.wire import Wire, answer, in_state, until

MAKE = "echo made >> made.txt"
OPTIONS: dict[str, Any] = {"ksi_tools": False, "permission_prompt": "ksi", "tools": ["Bash", "Write"], "cwd": "."}


@pytest.fixture(autouse=True)
def _numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    number_messages(monkeypatch)


def bash(command: str, number: int = 1) -> Answer:
    return uses_numbered("Bash", number, command=command)


def maker(prompt: str, given: list[Any]) -> Answer | str:
    """An agent that makes a file, and reports the result."""
    if prompt.startswith("make") and not given:
        return bash(MAKE)
    return f"it said: {given[-1]}" if given else f"heard {prompt}"


@asynccontextmanager
async def waiting(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Agents, Wire]]:
    """A daemon whose agent has asked for a permission in `make`, in the conversation `talk`."""
    async with agents(tmp_path, maker) as place, serving(place, **options) as wire:
        await wire.ask("monitor:subscribe", patterns=["completion:app*", "completion:progress"])
        await wire.ask(
            "completion:async", prompt="make it", request_id="make", session_id="talk", model="claude-cli/haiku"
        )
        await in_state(wire, "make", "waiting_input")
        yield place, wire


def serving(place: Agents, **options: Any) -> AbstractAsyncContextManager[Wire]:
    return place.served(slots=1, **{**OPTIONS, **options})


def made(place: Agents) -> str | None:
    path = place.house.home / "made.txt"
    return path.read_text() if path.exists() else None


async def processes(wire: Wire) -> list[int]:
    status = await wire.ask("completion:provider_status")
    return [row["pid"] for row in status["providers"]["claude-cli"]["own"]["processes"]]


async def asks_for(wire: Wire, command: str) -> None:
    """Wait until the request `make` asks whether it may run this."""

    async def asks() -> bool:
        reply = await wire.ask("completion:get", request_id="make")
        question = reply.get("question") or {}
        return bool(reply["status"] == "waiting_input" and json.loads(question["input"])["command"] == command)

    await until(asks)


@pytest.mark.promise("M3")
async def test_a_turn_waits_for_a_person_without_its_slot_keeps_its_lock_and_goes_on_in_its_process(
    tmp_path: Path,
) -> None:
    async with waiting(tmp_path) as (place, wire):
        told = await wire.pushed("completion:approval_required")
        assert (told["request_id"], told["status"], told["prompt"]) == ("make", "waiting_input", "make it")
        question = told["question"]
        assert (question["kind"], question["tool"], question["text"]) == (
            "permission",
            "Bash",
            f"may it use Bash ({MAKE})?",
        )
        assert json.loads(question["input"])["command"] == MAKE
        assert question["expires_at"] > question["asked_at"]
        await wire.pushed("completion:progress", request_id="make", status="waiting_input")
        (pid,) = await processes(wire)

        # The slot is another's, and the conversation is not.
        assert (await ask(wire, "hello", session_id="another"))["status"] == "completed"
        lock = await wire.ask("conversation:lock_status", conversation_id="talk")
        assert lock["holder"] == "make"
        behind = wire.post("completion:request", {"prompt": "next", "session_id": "talk", "model": "claude-cli/haiku"})
        assert made(place) is None

        await wire.ask("completion:approve", request_id="make", by="ada")
        done = await in_state(wire, "make", "completed")
        assert done["result"].startswith("it said:")
        assert made(place) == "made\n"
        assert [one["outcome"] for one in done["attempts"]] == ["parked", "completed"]
        assert (done["question"]["answer"], done["question"]["by"]) == ("yes", "ada")
        assert pid in await processes(wire)
        assert (await answer(behind))["result"] == "heard next"


@pytest.mark.promise("M3")
async def test_a_no_is_given_to_the_model_with_its_reason_and_the_turn_continues(tmp_path: Path) -> None:
    async with waiting(tmp_path) as (place, wire):
        await wire.ask("completion:reject", request_id="make", by="ada", why="not on a Friday")
        done = await in_state(wire, "make", "completed")
        assert "Denied by ada: not on a Friday" in done["result"]
        assert (made(place), done["question"]["answer"]) == (None, "no")
        assert "denied the use of Bash" in done["note"]


@pytest.mark.promise("M3", "Q3")
async def test_over_a_restart_the_question_stands_and_its_answer_holds_for_the_turn_that_is_run_again(
    tmp_path: Path,
) -> None:
    async with agents(tmp_path, maker) as place:
        async with serving(place) as wire:
            first = await ask(wire, "hello", session_id="talk")
            assert first["status"] == "completed"
            await wire.ask(
                "completion:async", prompt="make it", request_id="make", session_id="talk", model="claude-cli/haiku"
            )
            await in_state(wire, "make", "waiting_input")
            pids = await processes(wire)
        await until_seen(lambda: not living(pids))
        async with serving(place) as wire:
            waits = await wire.ask("completion:approvals", kind="permission")
            assert [one["request_id"] for one in waits["approvals"]] == ["make"]
            assert (await wire.ask("completion:get", request_id="make"))["status"] == "waiting_input"
            await wire.ask("completion:approve", request_id="make")
            done = await in_state(wire, "make", "completed")
            assert (made(place), done["result"][:8]) == ("made\n", "it said:")
            assert (await ask(wire, "again", session_id="talk"))["result"] == "heard again"


@pytest.mark.promise("M3")
async def test_without_an_answer_in_time_it_is_a_no(tmp_path: Path) -> None:
    async with waiting(tmp_path, permission_timeout=0.2) as (place, wire):
        done = await in_state(wire, "make", "completed")
        assert "there was no answer in time" in done["result"]
        assert made(place) is None


@pytest.mark.promise("M3", "F13")
async def test_a_turn_that_has_done_something_is_not_run_again_when_its_process_is_gone(tmp_path: Path) -> None:
    def think(_: str, given: list[Any]) -> Answer | str:
        return bash(MAKE) if not given else bash("rm made.txt", 2) if len(given) == 1 else str(given)

    async with agents(tmp_path, think) as place:
        async with serving(place) as wire:
            await wire.ask("completion:async", prompt="make", request_id="make", model="claude-cli/haiku")
            await asks_for(wire, MAKE)
            await wire.ask("completion:approve", request_id="make")
            await asks_for(wire, "rm made.txt")
        async with serving(place) as wire:
            await wire.ask("completion:approve", request_id="make")
            ended = await in_state(wire, "make", "failed")
            assert (ended["error"]["code"], made(place)) == ("daemon_restart", "made\n")
            assert "it had already used Bash" in ended["error"]["message"]


@pytest.mark.promise("M3")
async def test_a_process_that_waits_too_long_is_ended_and_the_turn_is_run_again_at_the_answer(tmp_path: Path) -> None:
    async with waiting(tmp_path, permission_keep=0.05) as (place, wire):

        async def gone() -> bool:
            return not await processes(wire)

        await until(gone)
        await wire.ask("completion:approve", request_id="make")
        await in_state(wire, "make", "completed")
        assert made(place) == "made\n"


@pytest.mark.promise("M3", "F8")
async def test_a_request_that_is_cancelled_while_it_waits_leaves_no_process_and_frees_its_conversation(
    tmp_path: Path,
) -> None:
    async with waiting(tmp_path) as (place, wire):
        pids = await processes(wire)
        cancelled = await wire.ask("completion:cancel", request_id="make")
        assert cancelled["status"] == "cancelled"
        await until_seen(lambda: not living(pids))
        assert (await ask(wire, "hello", session_id="talk"))["result"] == "heard hello"
        assert made(place) is None
        error = await wire.refused("completion:approve", request_id="make")
        assert "is over" in error.message


@pytest.mark.promise("M3")
async def test_each_permission_of_a_turn_is_asked_for_and_another_input_is_another_question(tmp_path: Path) -> None:
    def think(_: str, given: list[Any]) -> Answer | str:
        return bash(f"echo {len(given)} >> made.txt", len(given) + 1) if len(given) < 3 else "done"

    async with agents(tmp_path, think) as place, serving(place) as wire:
        await wire.ask("completion:async", prompt="make", request_id="make", model="claude-cli/haiku")
        for step in range(3):
            await asks_for(wire, f"echo {step} >> made.txt")
            await wire.ask("completion:approve", request_id="make")
        done = await in_state(wire, "make", "completed")
        assert (done["result"], made(place)) == ("done", "0\n1\n2\n")
        assert "unknown_attempts" not in done["usage"]


@pytest.mark.promise("M3")
async def test_two_calls_of_one_message_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    def think(_: str, given: list[Any]) -> Answer | str:
        one, two = {"command": "echo one >> made.txt"}, {"command": "echo two >> made.txt"}
        return uses_all("Bash", one, two) if not given else f"it said: {given}"

    async with agents(tmp_path, think) as place, serving(place) as wire:
        await wire.ask("completion:async", prompt="make", request_id="make", model="claude-cli/haiku")
        asked: list[str] = []
        for event in ("completion:approve", "completion:reject"):
            waits = await in_state(wire, "make", "waiting_input")
            while json.loads(waits["question"]["input"])["command"] in asked:
                waits = await in_state(wire, "make", "waiting_input")
            asked.append(json.loads(waits["question"]["input"])["command"])
            await wire.ask(event, request_id="make", why="one is enough")
        done = await in_state(wire, "make", "completed")
        assert sorted(asked) == ["echo one >> made.txt", "echo two >> made.txt"]
        assert "one is enough" in done["result"]
        assert made(place) == ("one\n" if asked[0].startswith("echo one") else "two\n")


@pytest.mark.promise("M3", "F2")
async def test_an_answer_outlives_a_failure_of_the_turn_that_it_is_for(tmp_path: Path) -> None:
    failures = iter([True, False])

    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "make it" and not given and seen["again"] and next(failures, False):
            return Answer(status=500, error_type="api_error")
        return maker(prompt, given)

    seen = {"again": False}
    async with agents(tmp_path, think) as place:
        async with serving(place) as wire:
            await wire.ask("completion:async", prompt="make it", request_id="make", model="claude-cli/haiku")
            await in_state(wire, "make", "waiting_input")
        seen["again"] = True
        async with serving(place) as wire:
            await wire.ask("completion:approve", request_id="make", by="ada")
            done = await in_state(wire, "make", "completed", "waiting_input")
            assert (done["status"], made(place)) == ("completed", "made\n")
            assert [one["outcome"] for one in done["attempts"]][:2] == ["parked", "failed"]
            assert done["question"]["by"] == "ada"


@pytest.mark.promise("M3")
async def test_an_answer_is_for_the_input_that_was_shown_and_for_no_other(tmp_path: Path) -> None:
    commands = iter(["echo harmless >> made.txt", "rm -rf everything"])

    def think(_: str, given: list[Any]) -> Answer | str:
        return f"it said: {given}" if given else bash(next(commands))

    async with agents(tmp_path, think) as place:
        async with serving(place) as wire:
            await wire.ask("completion:async", prompt="make", request_id="make", model="claude-cli/haiku")
            await asks_for(wire, "echo harmless >> made.txt")
        async with serving(place) as wire:
            await wire.ask("completion:approve", request_id="make")
            await asks_for(wire, "rm -rf everything")
            await wire.ask("completion:reject", request_id="make")
            assert (await in_state(wire, "make", "completed"))["question"]["answer"] == "no"
            assert made(place) is None


CONFIG = """\
[providers.claude-cli]
kind = "claude-cli"
command = {command}
permission_prompt = "ksi"
tools = ["Bash"]
cwd = "."

[providers.claude-cli.env]
{variables}
"""


@pytest.mark.promise("M3", "Q3")
async def test_a_question_stands_over_a_kill_and_no_process_waits_for_its_answer(tmp_path: Path) -> None:
    async with agents(tmp_path, maker) as place:
        options = place.house.options()
        variables = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options["env"].items())
        home = make_home(place.house.home, CONFIG.format(command=json.dumps(options["command"]), variables=variables))
        process = DaemonProcess(home)
        process.start()
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:async", prompt="make", request_id="make", model="claude-cli/haiku")
            await in_state(wire, "make", "waiting_input")
            pids = await processes(wire)
        process.end(signal.SIGKILL)
        await until_seen(lambda: not living(pids))
        with process:
            async with await Wire.open(process.socket_path) as wire:
                assert (await wire.ask("completion:get", request_id="make"))["status"] == "waiting_input"
                assert "Bash" in ksi(home, "approvals")
                ksi(home, "approve", "make")
                done = await in_state(wire, "make", "completed")
                assert (made(place), done.get("interruptions", 0)) == ("made\n", 0)


class Denier:
    """A desk that knows no answer, of a daemon that shares its store."""

    used_before: tuple[str, ...] = ()
    keeps = False

    def verdict(self, permission: Permission) -> Verdict | None:
        return None


@pytest.mark.promise("M3", "D1")
async def test_on_a_shared_store_no_process_waits_and_a_turn_with_side_effects_asks_no_person(
    tmp_path: Path,
) -> None:
    def think(prompt: str, given: list[Any]) -> Answer | str:
        if prompt == "write" and not given:
            return uses_numbered("Write", file_path=str(tmp_path / "home" / "w.txt"), content="w")
        return bash(MAKE, len(given) + 1) if len(given) < 2 else f"it said: {given[-1]}"

    async with agents(tmp_path, think) as place:
        options = {name: value for name, value in OPTIONS.items() if name != "ksi_tools"}
        provider = await place.house.provider(**options, allowed_tools=["Write"])
        talk = Talk(provider)
        with pytest.raises(PersonNeeded) as needed:
            await talk.say("make", permissions=Denier())
        assert (needed.value.waiting, needed.value.permission.tool) == (False, "Bash")
        assert provider.report()["processes"] == []
        done = await talk.say("write", permissions=Denier())
        assert "Nobody was asked: the turn has used Write already" in done.text
        await place.house.close()
