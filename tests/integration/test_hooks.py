"""Hooks of real daemons: signed webhooks and commands, at least once, in order, over faults and kills."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ksi.daemon.daemon import Daemon
from ksi.testing import SimulatedClock, running_daemon
from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Wire, in_state, until

SECRET = base64.b64encode(b"a secret of some length").decode()


class Receiver:
    """A webhook's end, which answers as it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.seen.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response(status=self.statuses.pop(0) if self.statuses else 204)

    @property
    def events(self) -> list[Any]:
        """The bodies, decoded."""
        return [json.loads(body) for _, body in self.seen]

    async def has(self, count: int) -> bool:
        return len(self.seen) >= count


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_post("/hook", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield made
    finally:
        await runner.cleanup()


def hooks(**keys: Any) -> dict[str, Any]:
    return {"hooks": keys, "http": {"listen": ""}}


async def opened(daemon: Daemon) -> Wire:
    return await Wire.open(daemon.config.socket_path)


@pytest.mark.promise("U6")
async def test_an_end_a_block_and_a_budget_are_told_by_signed_webhooks() -> None:
    async with receiver() as there:
        settings = hooks(on_end=there.url, on_block=there.url, on_budget=there.url)
        settings["budgets"] = {"all": {"requests": 1, "per": "month", "on_exceed": "refuse"}}
        environ = {"KSI_WEBHOOK_KEY": f"whsec_{SECRET}"}
        async with running_daemon(settings=settings, environ=environ) as daemon, await opened(daemon) as wire:
            await wire.ask("completion:request", prompt="x", request_id="one", agent_id="ann")
            await until(lambda: there.has(3))
            types = {event["type"] for event in there.events}
            assert types == {"completion.end", "budget.warning", "budget.exceeded"}
            headers, body = next(seen for seen in there.seen if seen[0]["webhook-id"] == "end_one")
            said = f"end_one.{headers['webhook-timestamp']}.".encode() + body
            expected = base64.b64encode(hmac.new(base64.b64decode(SECRET), said, hashlib.sha256).digest()).decode()
            assert headers["webhook-signature"] == f"v1,{expected}"
            event = json.loads(body)
            assert event["data"]["request_id"] == "one" and event["data"]["status"] == "completed"


@pytest.mark.promise("U6")
async def test_a_delivery_that_fails_is_tried_again_in_order_and_given_up_into_a_file() -> None:
    clock = SimulatedClock(wall=1_800_000_000.0)
    async with receiver() as there:
        there.statuses = [500, 500, 204, 204, 500, 500, 500]
        settings = hooks(on_end=there.url, attempts=3)
        async with running_daemon(settings=settings, clock=clock) as daemon, await opened(daemon) as wire:
            for name in ("first", "second"):
                await wire.ask("completion:request", prompt="x", request_id=name, session_id="talk")

            async def goes_on(count: int) -> bool:
                await clock.advance(1.0)
                return len(there.seen) >= count

            await until(lambda: goes_on(4))
            ids = [headers["webhook-id"] for headers, _ in there.seen]
            assert ids == ["end_first", "end_first", "end_first", "end_second"]
            await wire.ask("completion:request", prompt="x", request_id="lost")
            await until(lambda: goes_on(7))
            dead = daemon.config.path("var/hooks/dead.jsonl")

            async def buried() -> bool:
                await clock.advance(1.0)
                return dead.exists()

            await until(buried)
            (line,) = [json.loads(text) for text in dead.read_text().splitlines()]
            assert (line["id"], line["error"]) == ("end_lost", "status 500")
            assert line["event"]["data"]["request_id"] == "lost"
            assert any("given up" in problem for problem in (await wire.ask("system:health"))["problems"])


@pytest.mark.promise("U6")
async def test_what_ended_while_the_daemon_was_killed_is_told_to_a_command_after_it(tmp_path: Path) -> None:
    home, out = make_home(tmp_path / "home"), tmp_path / "told.jsonl"
    script = tmp_path / "note.py"
    script.write_text(f"import sys; open({str(out)!r}, 'a').write(sys.stdin.read() + '\\n')\n")
    text = (home / "ksi.toml").read_text()
    (home / "ksi.toml").write_text(text + f"\n[hooks]\non_end = [{sys.executable!r}, {str(script)!r}]\n")
    process = DaemonProcess(home)
    process.start()

    async def told(name: str) -> bool:
        lines = out.read_text().splitlines() if out.exists() else []
        return any(json.loads(line)["data"]["request_id"] == name for line in lines)

    async with await Wire.open(process.socket_path) as wire:
        await wire.ask("completion:request", prompt="x", request_id="before")
        await until(lambda: told("before"))
        await wire.ask("completion:request", prompt="x", request_id="then")
    process.end(signal.SIGKILL)
    with process:
        await until(lambda: told("then"))
        async with await Wire.open(process.socket_path) as wire:
            await wire.ask("completion:async", prompt="x", request_id="asks", hold=True)
            await wire.ask("completion:cancel", request_id="asks")
            await in_state(wire, "asks", "cancelled")
            await until(lambda: told("asks"))


@pytest.mark.promise("U6")
async def test_a_question_is_told_once() -> None:
    async with receiver() as there:
        settings = hooks(on_approval=there.url)
        async with running_daemon(settings=settings) as daemon, await opened(daemon) as wire:
            await wire.ask("completion:async", prompt="x", request_id="asks", hold=True)
            await until(lambda: there.has(1))
            (event,) = there.events
            assert (event["type"], event["data"]["request_id"]) == ("completion.approval_required", "asks")
            assert event["data"]["question"]["kind"] == "hold"
