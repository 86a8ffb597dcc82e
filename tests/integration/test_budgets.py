"""Budgets with real daemons: waiting and refused requests, a kill, and three daemons of one store."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import ScriptedEndpoint
from tests.http_door import door
from tests.integration.redis_team import team
from tests.integration.test_pauses import ksi
from tests.integration.wire import Json, Refused, Wire, in_state, until
from tests.redis_server import RedisServer

PRICED = """
[prices."stub/*"]
input = 10.0
output = 10.0
"""


def subject(reply: Json, name: str = "all") -> Json:
    """One subject's figures in the only budget."""
    (budget,) = reply["budgets"]
    return next(one for one in budget["subjects"] if one["scope"] == name)


def with_budget(home: Path, text: str) -> Path:
    config = home / "ksi.toml"
    config.write_text(config.read_text() + PRICED + text)
    return home


@pytest.mark.promise("B1")
async def test_a_loop_that_always_succeeds_stops_at_its_budget_and_goes_on_when_it_is_raised(
    tmp_path: Path,
) -> None:
    home = with_budget(make_home(tmp_path), '[budgets.night]\nscope = "agent:*"\nrequests = 3\nper = "month"\n')
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("monitor:subscribe", patterns=["budget:*"])
            for number in range(5):
                await wire.ask("completion:async", prompt="again", request_id=f"r{number}", agent_id="ann")
            await wire.ask("completion:request", prompt="x", agent_id="bob")
            await until(lambda: _waiting(wire, 2))
            night = subject(await wire.ask("budget:status"), "agent:ann")
            assert (night["used"], night["limit"], night["left"], night["waiting"]) == (3, 3, 0, 2)
            view = await wire.ask("completion:get", request_id="r4")
            assert view["status"] == "queued"
            assert "budget 'night' of agent:ann has no room; it is reset at " in view["paused"]
            shown = ksi(home, "budgets")
            assert "100%  agent:ann" in shown and "2 waiting" in shown and "reset at" in shown
            assert "night" in ksi(home, "usage")
            raised = ksi(home, "budgets", "raise", "night", "1", "--agent", "ann", "--why", "one more")
            assert "raised by 1 requests for agent:ann" in raised and ": one more" in raised
            await in_state(wire, "r3", "completed")
            await until(lambda: _waiting(wire, 1))
            told = [await wire.pushed("budget:warning"), await wire.pushed("budget:exceeded")]
            assert all(push["scope"] == "agent:ann" for push in told)


async def _waiting(wire: Wire, requests: int) -> bool:
    found = (await wire.ask("completion:queue_status"))["over_budget"]
    return bool(sum(one["waiting"] for one in found) == requests)


@pytest.mark.promise("B1")
async def test_usage_and_raises_survive_a_kill_and_running_requests_count(tmp_path: Path) -> None:
    home = with_budget(make_home(tmp_path), "[budgets.all]\nrequests = 2\nper = 'month'\n")
    process = DaemonProcess(home)
    process.start()
    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:request", prompt="x")
        await wire.ask("completion:async", prompt="x", model="slow/x", request_id="ran")
        await in_state(wire, "ran", "running")
        await wire.ask("budget:raise", budget="all", amount=1, by="ann", why="tonight")
        await wire.ask("budget:set", budget="mine", scope="agent:me", tokens=5, per="month")
    process.end(signal.SIGKILL)
    with process:
        async with await Wire.open(process.socket_path) as wire:
            (budget,) = (await wire.ask("budget:status", budget="all"))["budgets"]
            (own,) = (await wire.ask("budget:status", budget="mine"))["budgets"]
            figures = budget["subjects"][0]
            # One was answered, one ran when the daemon was killed, and runs again.
            assert figures["used"] == 2 and figures["limit"] == 3
            assert [(one["by"], one["why"]) for one in budget["raises"]] == [("ann", "tonight")]
            assert (own["source"], own["limit"]) == ("set", 5)
            refused = ksi(home, "ask", "--agent", "me", "--max-tokens", "100", "no room", exit_code=Exit.LATER)
            assert refused == ""


@pytest.mark.promise("B1")
async def test_by_http_a_refusal_is_429_with_the_time_to_come_back_and_not_to_be_tried_again() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint, endpoint) as here:
        async with await Wire.open(here.daemon.config.socket_path) as wire:
            await wire.ask("budget:set", budget="tiny", requests=1, per="day", on_exceed="refuse")
        assert (await here.message()).status == 200
        for refused in (await here.message(), await here.chat()):
            assert refused.status == 429
            assert 0 < int(refused.headers["retry-after"]) <= 86_400
            assert refused.headers["x-should-retry"] == "false"
            assert "budget 'tiny' has no room" in refused.json["error"]["message"]


@pytest.mark.promise("B1")
async def test_three_daemons_of_one_store_never_overshoot_together(tmp_path: Path, redis_server: RedisServer) -> None:
    with team(tmp_path, redis_server.url, 3) as daemons:
        wires = [await Wire.open(daemons.path(number)) for number in range(3)]
        await wires[0].ask("budget:set", budget="all", requests=8, per="month")
        await until(lambda: _known(wires))
        sent = [
            wire.ask("completion:async", prompt="x", request_id=f"{at}-{number}")
            for at, wire in enumerate(wires)
            for number in range(6)
        ]
        await asyncio.gather(*sent)
        await until(lambda: _waiting(wires[1], 10))
        await until(lambda: _completed(wires[0], 8))
        assert subject(await wires[2].ask("budget:status"))["used"] == 8
        totals = await wires[0].ask("completion:queue_status")
        assert (totals["completed"], totals["queued"]) == (8, 10)
        await wires[2].ask("budget:drop", budget="all")
        await until(lambda: _completed(wires[0], 18))
        for wire in wires:
            await wire.leave()


async def _known(wires: list[Wire]) -> bool:
    replies = [await wire.ask("budget:status") for wire in wires]
    return all(reply["budgets"] for reply in replies)


async def _completed(wire: Wire, requests: int) -> bool:
    return bool((await wire.ask("completion:queue_status"))["completed"] == requests)


@pytest.mark.promise("B1", "H1")
async def test_a_tokens_budget_binds_all_agents_of_its_holder_and_goes_with_it() -> None:
    async with ScriptedEndpoint() as endpoint, door(endpoint, endpoint) as here:
        wire = await Wire.open(here.daemon.config.socket_path)
        async with wire:
            limit = {"requests": 2, "per": "day"}
            made = await wire.ask("token:create", name="intern", budget=limit)
            with pytest.raises(Refused, match="there is a token 'intern' already"):
                await wire.ask("token:create", name="intern", budget={"requests": 99})
            with pytest.raises(Refused, match="can raise every budget"):
                await wire.ask("token:create", name="boss", scope="operate", budget=limit)
            intern = {"Authorization": f"Bearer {made['token']}"}
            assert (await here.message(headers=intern)).status == 200
            assert (await here.message(headers={**intern, "x-ksi-agent": "helper"})).status == 200
            refused = await here.message(headers={**intern, "x-ksi-agent": "another"})
            assert refused.status == 429
            assert "budget 'token:intern' of token:intern has no room" in refused.json["error"]["message"]
            assert "ksi budgets raise token:intern" in refused.json["error"]["message"]
            assert (await here.message()).status == 200
            assert subject(await wire.ask("budget:status"), "token:intern")["used"] == 2
            await wire.ask("budget:raise", budget="token:intern", amount=1)
            assert (await here.message(headers=intern)).status == 200
            await wire.ask("token:revoke", name="intern")
            assert (await wire.ask("budget:status"))["budgets"] == []


@pytest.mark.promise("B1")
@pytest.mark.parametrize("on_exceed", ["wait", "refuse"])
async def test_requests_go_on_at_a_fallback_when_the_budget_of_their_provider_is_used_up(
    tmp_path: Path, on_exceed: str
) -> None:
    home = with_budget(
        make_home(tmp_path),
        '[providers.spare]\nkind = "stub"\n[models."stub/echo"]\nfallbacks = ["spare/echo"]\n'
        f'[budgets.paid]\nscope = "provider:stub"\nrequests = 2\nper = "month"\non_exceed = "{on_exceed}"\n',
    )
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            first = [await wire.ask("completion:request", prompt="x", model="stub/echo") for _ in range(4)]
            assert [one["provider"] for one in first] == ["stub", "stub", "spare", "spare"]
            await wire.ask("budget:raise", budget="paid", amount=1)
            again = [await wire.ask("completion:request", prompt="x", model="stub/echo") for _ in range(2)]
            assert [one["provider"] for one in again] == ["stub", "spare"]


@pytest.mark.promise("B1")
async def test_what_waits_for_its_provider_s_budget_goes_on_at_a_fallback(tmp_path: Path) -> None:
    home = with_budget(
        make_home(tmp_path),
        '[providers.spare]\nkind = "stub"\n[models."stub/echo"]\nfallbacks = ["spare/echo"]\n'
        '[budgets.paid]\nscope = "provider:*"\ntokens = 62\nper = "month"\n'
        '[budgets.free]\nscope = "all"\nrequests = 100\nper = "month"\n',
    )
    with DaemonProcess(home) as process:
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:request", prompt="x", model="stub/echo", max_tokens=60)
            large = await wire.ask("completion:request", prompt="x", model="stub/echo", max_tokens=60)
            assert large["provider"] == "spare"
