"""Held requests and chains that ask for a person's word, with real daemons: over kills, and by every door."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import DaemonProcess, make_home
from tests.http_door import Door, door
from tests.integration.redis_team import team
from tests.integration.test_pauses import ksi
from tests.integration.wire import Json, Wire, answer, in_state, until
from tests.redis_server import RedisServer

DEEP = {"max_depth": 9, "token_budget": 1_000_000, "approve_at": {"depth": 1}}
"""A chain in which a person has to approve each follow-up."""


async def asking(wire: Wire, **wishes: Any) -> list[str]:
    reply = await wire.ask("completion:approvals", **wishes)
    return [one["request_id"] for one in reply["approvals"]]


async def one_asking(wire: Wire, **wishes: Any) -> Json:
    """Wait until something asks; the first of it."""

    async def look() -> Json | None:
        found: list[Json] = (await wire.ask("completion:approvals", **wishes))["approvals"]
        return found[0] if found else None

    found = await until(look)
    assert found is not None
    return found


@pytest.mark.promise("B3", "Q3")
async def test_a_held_request_is_held_over_a_kill_and_comes_into_the_line_when_it_is_released(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    process = DaemonProcess(home)
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        reply = await wire.ask("completion:async", prompt="x", request_id="h", session_id="talk", hold=True)
        assert (reply["state"], reply["question"]["kind"]) == ("held", "hold")
        assert (await wire.ask("completion:request", prompt="y", session_id="talk"))["status"] == "completed"
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            assert (await wire.ask("completion:get", request_id="h"))["status"] == "held"
            assert await asking(wire) == ["h"]
            assert "hold" in ksi(home, "approvals")
            assert "yes" in ksi(home, "release", "h", "--why", "it is time")
            done = await in_state(wire, "h", "completed")
            assert (done["question"]["answer"], done["question"]["why"]) == ("yes", "it is time")
            assert await asking(wire) == []
            again = await wire.ask("completion:release", request_id="h")
            assert (again["status"], again["question"]["why"]) == ("completed", "it is time")


@pytest.mark.promise("B3")
async def test_a_released_request_keeps_its_delay_and_its_time_to_live(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:async", prompt="x", request_id="later", hold=True, delay=3_600)
            assert (await wire.ask("completion:release", request_id="later"))["status"] == "scheduled"
            assert (await wire.ask("completion:get", request_id="later"))["due_at"]
            waiting = wire.post("completion:request", {"prompt": "x", "request_id": "short", "hold": True, "ttl": 0.05})
            done = await answer(waiting)
            assert (done["status"], done["error"]["code"]) == ("expired", "rejected")


@pytest.mark.promise("B3")
async def test_a_request_that_waits_for_no_answer_refuses_one_with_a_reason(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:request", prompt="x", request_id="done")
            await wire.ask("completion:async", prompt="x", request_id="h", hold=True)
            await wire.ask("completion:reject", request_id="h", by="ada")
            for event, name, code, words in (
                ("completion:approve", "nobody", "not_found", "no request"),
                ("completion:approve", "done", "invalid_data", "it asks nothing"),
                ("completion:release", "h", "invalid_data", "ada has said no"),
            ):
                error = await wire.refused(event, request_id=name)
                assert (error.code, words in error.message) == (code, True), error.message
            assert (await wire.ask("completion:reject", request_id="h"))["question"]["by"] == "ada"
            await wire.ask("completion:async", prompt="x", request_id="c", hold=True)
            await wire.ask("completion:cancel", request_id="c")
            assert "is over" in (await wire.refused("completion:release", request_id="c")).message


async def begin_chain(wire: Wire, name: str, **chain: Any) -> None:
    """A chain whose first request is done, and whose result is on its way to another conversation."""
    await wire.ask(
        "completion:async",
        prompt="x",
        request_id=name,
        session_id=f"{name} talk",
        injection_config={"target_sessions": [f"{name} next"], "inherit": "same"},
        circuit_breaker_config={**DEEP, **chain},
    )
    await in_state(wire, name, "completed")


@pytest.mark.promise("B3", "C3")
async def test_a_chain_stops_at_its_depth_until_a_person_approves_and_over_a_kill(tmp_path: Path) -> None:
    process = DaemonProcess(make_home(tmp_path))
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("monitor:subscribe", patterns=["completion:app*", "completion:rej*"])
        await begin_chain(wire, "a")
        told = await wire.pushed("completion:approval_required")
        assert (told["request_id"], told["question"]["code"], told["ideation_depth"]) == ("a/1", "depth", 1)
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("monitor:subscribe", patterns=["completion:app*", "completion:rej*"])
            first = await one_asking(wire)
            assert (first["request_id"], first["chain_id"], first["parent_request_id"]) == ("a/1", "a", "a")
            assert "system-reminder" in first["prompt"]
            assert "approve" in (await wire.refused("completion:release", request_id="a/1")).message
            await wire.ask("completion:approve", request_id="a/1", by="ada")
            assert (await wire.pushed("completion:approved"))["question"]["by"] == "ada"
            await in_state(wire, "a/1", "completed")
            # The parent's setting holds for it too.
            second = await one_asking(wire)
            assert (second["request_id"], second["ideation_depth"]) == ("a/1/1", 2)
            await wire.ask("completion:reject", request_id="a/1/1", by="ada", why="enough")
            assert (await wire.pushed("completion:rejected"))["question"]["why"] == "enough"
            ended = await wire.ask("completion:get", request_id="a/1/1")
            assert ended["status"] == "cancelled"
            assert ended["error"] == {"code": "rejected", "message": "ada said no: enough"}
            dead = await wire.ask("injection:status", injection_id="a/1/1")
            assert dead["injection"]["state"] == "failed"
            # The result of a rejected request goes to no others.
            chain = await wire.ask("circuit_breaker:status", chain_id="a")
            assert chain["chain"]["members"] == 3
            assert await asking(wire) == []


@pytest.mark.promise("B3")
async def test_a_child_asks_if_its_parent_said_so_whatever_it_says_itself(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:request", prompt="x", request_id="p", circuit_breaker_config=DEEP)
            mild = {"parent_request_id": "p", "approve_at": {"depth": 100}}
            reply = await wire.ask("completion:async", prompt="y", request_id="c", circuit_breaker_config=mild)
            assert (reply["state"], reply["question"]["kind"]) == ("held", "approval")
            same = await wire.ask("completion:async", prompt="y", request_id="c", circuit_breaker_config=mild)
            assert same["status"] == "held"


@pytest.mark.promise("B3")
async def test_without_a_yes_in_time_the_answer_is_no(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            await begin_chain(wire, "a", approve_at={"depth": 1, "timeout": 0.05})
            ended = await in_state(wire, "a/1", "expired")
            assert ended["error"]["code"] == "rejected"
            assert "in time" in ended["error"]["message"]


PRICED = """
[service]
default_model = "stub/echo"
[chain]
approve_at_cost = 0.5
[providers.stub]
kind = "stub"
models = ["stub/*"]
[prices."stub/*"]
input = 100000
output = 100000
"""


@pytest.mark.promise("B3")
async def test_a_chain_asks_once_it_has_cost_as_much_as_the_configuration_says(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path, PRICED)) as process:
        async with await Wire.open(process.socket_path) as wire:
            chain = {"max_depth": 9, "token_budget": 1_000_000}
            first = await wire.ask("completion:request", prompt="x " * 50, request_id="p", circuit_breaker_config=chain)
            assert first["cost_usd"] > 0.5
            held = await wire.ask("completion:async", prompt="y", circuit_breaker_config={"parent_request_id": "p"})
            assert (held["state"], held["question"]["code"]) == ("held", "cost")


@pytest.mark.promise("B3")
async def test_a_chain_asks_from_a_risk_on_that_would_not_stop_it(tmp_path: Path) -> None:
    with DaemonProcess(make_home(tmp_path)) as process:
        async with await Wire.open(process.socket_path) as wire:
            said = "the very same words again and again, nothing new in them at all"
            limits = {"max_depth": 50, "token_budget": 1_000_000, "approve_at": {"risk": 0.05}}
            parent = None
            for step in range(30):
                chain = limits if parent is None else {**limits, "parent_request_id": parent}
                name = f"r{step}"
                reply = await wire.ask(
                    "completion:async", prompt=said, request_id=name, session_id=f"s{step % 2}",
                    circuit_breaker_config=chain, patterns={"threshold": 1.0},
                )  # fmt: skip
                if reply["state"] == "held":
                    assert reply["question"]["code"] == "risk"
                    break
                await in_state(wire, name, "completed")
                parent = name
            else:
                raise AssertionError("nobody was asked")


@pytest.mark.promise("B3", "D1")
async def test_a_question_stands_at_every_daemon_of_a_store(redis_server: RedisServer, tmp_path: Path) -> None:
    with team(tmp_path, f"{redis_server.url}?namespace=approvals", 2) as daemons:
        async with await Wire.open(daemons.path(0)) as here, await Wire.open(daemons.path(1)) as there:
            await here.ask("completion:async", prompt="x", request_id="h", hold=True, model="stub/echo")
            ended = here.post("completion:wait", {"request_id": "h"})
            assert await asking(there) == ["h"]
            await there.ask("completion:release", request_id="h")
            assert (await answer(ended))["status"] == "completed"
            await begin_chain(here, "a")
            assert (await one_asking(there))["request_id"] == "a/1"
            await there.ask("completion:reject", request_id="a/1")
            assert (await in_state(here, "a/1", "cancelled"))["error"]["code"] == "rejected"


async def tool(here: Door, name: str, token: str | None = None, **arguments: Any) -> Json:
    """The result of a tool's call by the protocol."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
    result: Json = (await here.post("/mcp", message, **headers)).json["result"]
    return result


@pytest.mark.promise("B3", "M1")
async def test_who_may_only_submit_releases_its_own_and_approves_nothing() -> None:
    async with door() as here:
        agent, other = await here.new_token("agent"), await here.new_token("other")
        await here.told("completion:async", token=agent, prompt="x", request_id="h", hold=True)
        assert (await here.event("completion:release", token=other, request_id="h")).status == 404
        for event in ("completion:approve", "completion:reject"):
            assert (await here.event(event, token=agent, request_id="h")).status == 403
        assert (await tool(here, "approve", agent, request_id="h", approved=True))["isError"]
        given = await here.told("completion:release", token=agent, request_id="h", by="the boss")
        assert given["question"]["by"] == "agent"


@pytest.mark.promise("B3", "M1")
async def test_an_operator_answers_by_the_protocol_and_is_named() -> None:
    async with door() as here:
        await here.told("completion:async", prompt="Shall I?", request_id="h", hold=True)
        boss = await here.new_token("boss", "operate")
        (one,) = (await tool(here, "approvals", boss))["structuredContent"]["approvals"]
        assert (one["request_id"], one["kind"], one["prompt"]) == ("h", "hold", "Shall I?")
        given = (await tool(here, "approve", boss, request_id="h", approved=False, why="no"))["structuredContent"]
        assert given == {"request_id": "h", "status": "cancelled", "answer": "no"}
        ended = await here.told("completion:get", request_id="h")
        assert ended["error"]["message"] == "boss said no: no"


@pytest.mark.promise("B3")
def test_the_commands_show_the_questions_and_refuse_unknown_ones(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    with DaemonProcess(home):
        assert "nothing waits" in ksi(home, "approvals")
        ksi(home, "send", "completion:async", '{"prompt": "Shall I?", "request_id": "h", "hold": true}')
        shown = ksi(home, "approvals", "h")
        assert "Shall I?" in shown
        assert json.loads(ksi(home, "approvals", "--json"))["request_id"] == "h"
        assert "h" in ksi(home, "queue", "--list", "asking")
        assert ksi(home, "approvals", "--kind", "permission").startswith("nothing")
        assert "no; it is cancelled" in ksi(home, "reject", "h")
        ksi(home, "reject", "nobody", exit_code=Exit.NOT_FOUND)
        assert "hold" in ksi(home, "show", "h")
