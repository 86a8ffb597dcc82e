"""Claude Code behind the daemon: the real program against a scripted endpoint, seen over the wire."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.claude import House, living, number_messages, said, scripted, session_of
from tests.claude import until as until_seen
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import daemon_and_wire
from tests.integration.test_claude_tools import uses
from tests.integration.wire import Json, Wire, answer, in_state

SLOW = "take your time"


def echo(seen: Seen) -> Answer:
    """An endpoint that answers with its last prompt, and never ends if it was asked to take its time."""
    prompt = said(seen)[-1][1]
    return Answer(pieces=("You said: ", prompt, "."), stall_after=2 if prompt == SLOW else None)


class Place:
    """A home with Claude Code, and its endpoint."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    @asynccontextmanager
    async def served(self, **options: Any) -> AsyncIterator[Wire]:
        """A daemon in the home, and a connection to it."""
        claude = {"kind": "claude-cli", **self.house.options(**options)}
        providers = {"claude-cli": claude, "stub": {"kind": "stub", "models": ["stub/*", "any/*"], "priority": 2}}
        retry = {"initial_delay": 0.001, "max_delay": 0.002}
        async with daemon_and_wire(self.house.home, providers=providers, retry=retry) as (_, wire):
            yield wire

    def heard(self, prompt: str) -> list[tuple[str, str]]:
        """The messages that the endpoint got with this prompt at their end."""
        found = [said(seen) for seen in self.endpoint.requests]
        return next(one for one in reversed(found) if one[-1][1] == prompt)

    def transcript(self, session: str) -> list[Json]:
        """The messages of a session."""
        lines = self.house.transcript(session).read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["type"] in ("user", "assistant")]


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint(script=echo) as endpoint:
        yield Place(House(tmp_path, endpoint.url), endpoint)


async def ask(wire: Wire, prompt: str, **fields: Any) -> Json:
    return await wire.ask("completion:request", **{"model": "haiku", "prompt": prompt, **fields})


async def test_a_conversation_is_led_in_claude_code_over_a_restart(place: Place) -> None:
    async with place.served() as wire:
        first = await ask(wire, "one", session_id="trip")
        assert (first["status"], first["result"], first["session_id"]) == ("completed", "You said: one.", "trip")
        assert (first["provider"], first["requested_model"]) == ("claude-cli", "claude-cli/haiku")
        assert first["model"].startswith("claude-haiku")
        second = await ask(wire, "two", session_id="trip")
        assert place.heard("two")[:2] == [("user", "one"), ("assistant", "You said: one.")]
    async with place.served() as wire:
        third = await ask(wire, "three", session_id="trip")
        assert len(place.heard("three")) == 5
        by_its_other_name = await ask(wire, "four", session_id=first["provider_session_id"])
        assert len(place.heard("four")) == 7
    assert {one["provider_session_id"] for one in (first, second, third)} == {first["provider_session_id"]}
    assert by_its_other_name["provider_session_id"] == first["provider_session_id"]


@pytest.mark.promise("R2", "T1")
async def test_an_answer_is_streamed_and_its_usage_reported(place: Place) -> None:
    async with place.served() as wire:
        reply = await ask(wire, "one", request_id="r", stream=True)
        pieces = [line["data"]["text"] for line in wire.lines if line["event"] == "completion:chunk"]
        assert "".join(pieces) == reply["result"] == "You said: one."
        assert len(pieces) > 1
        assert (reply["usage"]["input_tokens"], reply["usage"]["output_tokens"]) == (10, 5)
        assert reply["cost_usd"] > 0


@pytest.mark.promise("L9")
async def test_a_session_of_a_terminal_goes_on_under_its_own_name(place: Place) -> None:
    begun = await place.house.run(prompt="begun in a terminal")
    async with place.served() as wire:
        reply = await ask(wire, "and here", session_id=begun["session_id"])
        assert reply["provider_session_id"] == begun["session_id"]
        assert place.heard("and here")[:2] == [("user", "begun in a terminal"), ("assistant", begun["result"])]
        await ask(wire, "on", session_id=begun["session_id"])
        assert len(place.heard("on")) == 5


@pytest.mark.promise("L7")
async def test_a_fork_that_was_asked_for_goes_its_own_way(place: Place) -> None:
    async with place.served() as wire:
        parent = await ask(wire, "one", session_id="trunk")
        child = await ask(wire, "in the branch", session_id="trunk", fork=True)
        assert child["session_id"] != "trunk"
        assert child["provider_session_id"] != parent["provider_session_id"]
        assert place.heard("in the branch")[:2] == [("user", "one"), ("assistant", "You said: one.")]
        await ask(wire, "in the trunk", session_id="trunk")
        assert len(place.heard("in the trunk")) == 3
        await ask(wire, "on in the branch", session_id=child["session_id"])
        assert len(place.heard("on in the branch")) == 5


@pytest.mark.promise("L7")
async def test_a_foreign_turn_is_an_event_and_stands_in_the_tree(place: Place) -> None:
    async with place.served() as wire:
        first = await ask(wire, "one", session_id="trip")
        session = first["provider_session_id"]
        await wire.ask("monitor:subscribe", patterns=["conversation:forked"])
        await place.house.run(f"--resume={session}", prompt="behind your back", folder=place.house.work)
        second = await ask(wire, "two", session_id="trip", request_id="r2")
        forked = await wire.pushed("conversation:forked", conversation_id="trip")
        assert second["forked"] == {"parent": forked["parent"], "child": session, "kind": "foreign_turn"}
        assert (forked["kind"], forked["request_id"], forked["child"]) == ("foreign_turn", "r2", session)
        assert len(place.heard("two")) == 3
        status = await wire.ask("conversation:lock_status", conversation_id="trip")
        assert [one["kind"] for one in status["forks"]] == ["foreign_turn"]


@pytest.mark.promise("L1", "L7")
async def test_twenty_requests_at_once_are_twenty_turns_in_order_without_a_branch(place: Place) -> None:
    async with place.served() as wire:
        futures = [
            wire.post("completion:request", {"model": "haiku", "prompt": f"number {n}", "session_id": "line"})
            for n in range(20)
        ]
        replies = [await answer(future) for future in futures]
    (session,) = {reply["provider_session_id"] for reply in replies}
    messages = place.transcript(session)
    prompts = [line["message"]["content"] for line in messages if line["type"] == "user"]
    assert prompts == [f"number {n}" for n in range(20)]
    assert len([line for line in messages if line["type"] == "assistant"]) == 20
    assert len({line["parentUuid"] for line in messages}) == 40, "two children of one parent are a branch"
    assert len(place.heard("number 19")) == 39


async def test_eight_conversations_at_once_do_not_mix(place: Place) -> None:
    async with place.served() as wire:
        for word in ("first", "second"):
            futures = [
                wire.post("completion:request", {"model": "haiku", "prompt": f"{word} {n}", "session_id": f"c{n}"})
                for n in range(8)
            ]
            for future in futures:
                assert (await answer(future))["status"] == "completed"
    for n in range(8):
        assert [text for _, text in place.heard(f"second {n}")] == [
            f"first {n}",
            f"You said: first {n}.",
            f"second {n}",
        ]


@pytest.mark.promise("F8", "F9")
async def test_a_cancel_stops_the_work_and_leaves_no_trace(place: Place) -> None:
    async with place.served() as wire:
        await ask(wire, "one", session_id="trip")
        await wire.ask(
            "completion:async", model="haiku", prompt=SLOW, session_id="trip", request_id="slow", stream=True
        )
        await wire.pushed("completion:chunk", request_id="slow")
        reply = await wire.ask("completion:cancel", request_id="slow")
        assert reply["status"] == "cancelled"
        await ask(wire, "two", session_id="trip")
        assert place.heard("two") == [("user", "one"), ("assistant", "You said: one."), ("user", "two")]


@pytest.mark.promise("F7")
async def test_a_request_s_timeout_ends_its_process(place: Place) -> None:
    async with place.served() as wire:
        await ask(wire, "one", session_id="trip")  # its process is warm then: the time is the endpoint's alone
        reply = await ask(wire, SLOW, session_id="trip", timeout=3.0, retry={"max_attempts": 1})
        assert (reply["status"], reply["error"]["code"]) == ("failed", "timeout")
        async with asyncio.timeout(5):
            await place.endpoint.requests[-1].gone.wait()


@pytest.mark.promise("F1", "F2")
async def test_an_overloaded_api_is_tried_again_without_a_trace(place: Place) -> None:
    async with place.served() as wire:
        await ask(wire, "one", session_id="trip")
        answers = iter([Answer(status=529), Answer(status=500)])
        place.endpoint._script = lambda seen: next(answers, None) or echo(seen)
        reply = await ask(wire, "two", session_id="trip")
        assert reply["status"] == "completed"
        assert [one.get("error") for one in reply["attempts"]] == ["overloaded", "provider_error", None]
        assert len(place.heard("two")) == 3


@pytest.mark.promise("F1", "F4")
@pytest.mark.parametrize(
    ("trouble", "told", "code", "advice"),
    [
        ("missing", "Claude Code is not installed", "provider_error", "npm install"),
        ("old", "Claude Code 1.0.3 is too old", "provider_error", "claude update"),
    ],
)
async def test_one_that_cannot_work_is_said_once_in_health_and_the_route_goes_on(
    place: Place, trouble: str, told: str, code: str, advice: str
) -> None:
    options: dict[str, Any] = {"missing": {"command": ["no-such-claude"]}, "old": {"command": scripted("old")}}[trouble]
    async with place.served(models=["claude-cli/*", "any/*"], priority=1, **options) as wire:
        alone = await ask(wire, "hi", retry={"max_attempts": 1})
        assert (alone["status"], alone["error"]["code"]) == ("failed", code)
        assert advice in alone["error"]["message"]
        (problem,) = (await wire.ask("system:health"))["problems"]
        assert problem.startswith(f"provider claude-cli: {told}") and advice in problem
        passed_on = await ask(wire, "hi", model="any/haiku")
        assert (passed_on["result"], passed_on["provider"]) == ("echo: hi", "stub")
        assert [one.get("error") for one in passed_on["attempts"]] == [code, None]
    assert place.endpoint.requests == []


@pytest.mark.promise("F11")
async def test_one_that_is_not_logged_in_parks_its_requests_until_it_is_and_the_route_goes_on(place: Place) -> None:
    del place.house.variables["ANTHROPIC_API_KEY"]
    folder = Path(place.house.variables["CLAUDE_CONFIG_DIR"])
    async with place.served(models=["claude-cli/*", "any/*"], priority=1) as wire:
        name = (await wire.ask("completion:async", model="haiku", prompt="hi"))["request_id"]
        view = await in_state(wire, name, "parked")
        assert view["error"]["code"] == "authentication"
        problems = (await wire.ask("system:health"))["problems"]
        assert problems and all("provider claude-cli: " in one and "and log in" in one for one in problems)
        passed_on = await ask(wire, "hi", model="any/haiku")
        assert (passed_on["result"], passed_on["provider"]) == ("echo: hi", "stub")
        assert place.endpoint.requests == []
        login = {"accessToken": "a", "refreshToken": "b", "expiresAt": 4_000_000_000_000, "scopes": ["user:inference"]}
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath(".credentials.json").write_text(json.dumps({"claudeAiOauth": login}))
        reply = await wire.ask("completion:wait", request_id=name)
    assert reply["status"] == "completed"
    assert [one.get("error") for one in reply["attempts"]] == ["authentication", None]
    assert len(place.endpoint.requests) == 1


@pytest.mark.promise("A4", "F13")
async def test_a_turn_that_did_its_work_and_failed_is_not_run_again_and_names_its_actions(place: Place) -> None:
    work = uses("Bash", command="echo done >> work", description="Work")
    async with place.served(tools=["Bash"], allowed_tools=["Bash"]) as wire:
        answers = iter([work, Answer(pieces=()), Answer(pieces=())])  # it asks twice for an answer by itself
        place.endpoint._script = lambda seen: next(answers, None) or echo(seen)
        reply = await ask(wire, "Work.", session_id="trip")
        assert (reply["status"], reply["error"]["code"]) == ("failed", "empty_answer")
        assert "Bash" in reply["error"]["message"]
        assert len(reply["attempts"]) == 1
    assert place.house.work.joinpath("work").read_text() == "done\n"


@pytest.mark.promise("A4")
async def test_denied_calls_are_in_the_reply(place: Place) -> None:
    async with place.served(tools=["Bash"]) as wire:
        answers = iter([uses("Bash", command="touch release-4711", description="Release")])
        place.endpoint._script = lambda seen: next(answers, None) or echo(seen)
        reply = await ask(wire, "Release it.")
    assert reply["status"] == "completed"
    assert "Claude Code was denied the use of Bash (touch release-4711)." in json.dumps(reply)


@pytest.mark.promise("F6")
async def test_the_kept_processes_are_bounded_and_shown(place: Place) -> None:
    async with place.served(warm=2) as wire:
        for n in range(3):
            await ask(wire, "hi", session_id=f"c{n}")
        own = (await wire.ask("completion:provider_status"))["providers"]["claude-cli"]["own"]
        sessions = [(await wire.ask("completion:session_status", session_id=f"c{n}")) for n in (1, 2)]
    assert (own["warm"], own["warm_limit"], own["working"]) == (2, 2, 0)
    assert [row["session"] for row in own["processes"]] == [one["provider_session_id"] for one in sessions]
    assert own["memory_bytes"] == sum(row["memory_bytes"] for row in own["processes"]) > 50_000_000
    assert own["version"][0].isdigit()


CONFIG = """\
[service]
default_model = "claude-cli/haiku"
shutdown_grace = 1.0

[providers.claude-cli]
kind = "claude-cli"
command = {command}

[providers.claude-cli.env]
{variables}
"""


@pytest.mark.promise("F7", "F9", "F10")
async def test_a_killed_daemon_leaves_no_process_and_its_turn_runs_again_without_a_trace(place: Place) -> None:
    options = place.house.options()
    variables = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options["env"].items())
    config = CONFIG.format(command=json.dumps(options["command"]), variables=variables)
    with DaemonProcess(make_home(place.house.home, config)) as daemon:
        async with await Wire.open(daemon.socket_path) as wire:
            await ask(wire, "one", session_id="trip")
            await wire.ask("completion:async", prompt=SLOW, session_id="trip", request_id="slow", stream=True)
            await wire.pushed("completion:chunk", request_id="slow")
            registered = list((place.house.home / "var/run/claude-cli/processes").iterdir())
            processes = [json.loads(path.read_text())["pid"] for path in registered]
            assert living(processes) == processes != []
            daemon.end(signal.SIGKILL)
        await until_seen(lambda: not living(processes), patience=5)
        place.endpoint._script = lambda seen: Answer(pieces=("You said: ", said(seen)[-1][1], "."))
        count = len(place.endpoint.requests)
        daemon.start()
        async with await Wire.open(daemon.socket_path) as wire:
            ended = await in_state(wire, "slow", "completed")
            assert [one["outcome"] for one in ended["attempts"]] == ["interrupted", "completed"]
        (again,) = place.endpoint.requests[count:]
        assert said(again) == [("user", "one"), ("assistant", "You said: one."), ("user", SLOW)]
        assert session_of(again) == session_of(place.endpoint.requests[0])


@pytest.mark.promise("S3")
async def test_a_request_names_no_programs_if_the_configuration_closes_it(place: Place) -> None:
    servers: Json = {"mcpServers": {"x": {"command": "sh", "args": ["-c", "id > pwned"]}}}
    async with place.served(command=scripted("answers"), request_options=[]) as wire:
        for config in (servers, servers["mcpServers"], json.dumps(servers), "/etc/mcp.json"):
            for event in ("completion:async", "completion:request"):
                refused = await wire.refused(event, model="haiku", prompt="hi", mcp_config=config)
                assert (refused.code, refused.details["path"]) == ("invalid_data", "mcp_config")
        reply = await ask(wire, "hi", provider_options={"mcp_config": servers})
        assert (reply["status"], reply["error"]["code"]) == ("failed", "invalid_request")
        assert "mcp_config is not open to requests; leave it away, or add" in reply["error"]["message"]
        assert (await ask(wire, "hi"))["status"] == "completed"
