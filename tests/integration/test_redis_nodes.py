"""Claude Code's dialogues on the machines of a team: each continues on its machine, and elsewhere when that is gone
(D4).

Real daemons on a real server, the real Claude Code with a folder for each machine, and a scripted endpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.claude import environment, number_messages, real_claude, said
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.wire import Json, Wire, in_state, until
from tests.redis_server import RedisServer

pytestmark = [pytest.mark.promise("D4"), pytest.mark.timeout(300)]

LEASE = 2.0
NODE_TIMEOUT = 3.0
"""Seconds; short, so that a loss need not be waited for long."""

SLOW = "take your time"

CONFIG = """\
[service]
default_model = "claude-cli/haiku"
shutdown_grace = 0.5

[store]
url = "{url}"
node_id = "{node}"
node_timeout = {timeout}

[queue]
lease = {lease}

[providers.claude-cli]
kind = "claude-cli"
models = ["claude-cli/*"]
max_concurrency = 1
command = [{claude}]
env = {{ {env} }}

[providers.stub]
kind = "stub"
max_concurrency = 1
delay = 600
"""


class Machine:
    """A daemon with a Claude Code of its own."""

    def __init__(self, folder: Path, url: str, node: str, endpoint: str, node_timeout: float) -> None:
        self.node = node
        self.variables = environment(folder / f"user-{node}", endpoint)
        env = ", ".join(f"{name} = {json.dumps(value)}" for name, value in self.variables.items())
        text = CONFIG.format(
            url=url, node=node, timeout=node_timeout, lease=LEASE, claude=json.dumps(real_claude()), env=env
        )
        self.daemon = DaemonProcess(make_home(folder / node, text))

    @property
    def transcripts(self) -> set[str]:
        """The sessions that its Claude Code has."""
        folder = Path(self.variables["CLAUDE_CONFIG_DIR"]) / "projects"
        return {path.stem for path in folder.glob("*/*.jsonl")}

    async def wire(self) -> Wire:
        """A connection."""
        return await Wire.open(self.daemon.socket_path)


class Place:
    """The server's namespace, the endpoint, and the parts of machines."""

    def __init__(self, folder: Path, url: str, endpoint: ScriptedEndpoint) -> None:
        self._folder = folder
        self._url = url
        self._endpoint = endpoint

    @contextmanager
    def machines(self, *nodes: str, node_timeout: float = NODE_TIMEOUT) -> Iterator[list[Machine]]:
        """Daemons that serve while the block runs."""
        made = [Machine(self._folder, self._url, node, self._endpoint.url, node_timeout) for node in nodes]
        with ExitStack() as stack:
            for machine in made:
                machine.daemon.spawn()
                stack.callback(machine.daemon.end, signal.SIGTERM)
            for machine in made:
                assert machine.daemon.wait_ready(), "a daemon ended before it was ready"
            yield made

    def heard(self, prompt: str) -> list[tuple[str, str]]:
        """The messages that the endpoint got with this prompt at their end."""
        found = [said(seen) for seen in self._endpoint.requests]
        return next(one for one in reversed(found) if one[-1][1].endswith(prompt))


def echo(seen: Seen) -> Answer:
    """Answers with its last prompt, and never ends if it was asked to take its time."""
    prompt = said(seen)[-1][1]
    return Answer(pieces=("You said: ", prompt, "."), stall_after=2 if prompt.endswith(SLOW) else None)


@pytest_asyncio.fixture
async def place(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint(script=echo) as endpoint:
        yield Place(tmp_path, f"{redis_server.url}?namespace={tmp_path.name}", endpoint)


async def ask(wire: Wire, prompt: str) -> Json:
    """A turn of the one conversation."""
    return await patiently(wire, "completion:request", prompt=prompt, session_id="trip")


async def patiently(wire: Wire, event: str, **data: Any) -> Json:
    """The answer when a machine is lost and Claude Code has begun."""
    async with asyncio.timeout(60):
        reply = await wire.post(event, data)
    answered: Json = reply["data"]
    return answered


def node_of(reply: Json) -> str | None:
    """The machine on which a request was answered."""
    node: str | None = reply["attempts"][-1].get("node")
    return node


async def test_a_dialogue_continues_on_its_machine_and_elsewhere_when_that_machine_is_gone(place: Place) -> None:
    with place.machines("a", "b") as (a, b):
        async with await b.wire() as there:
            async with await a.wire() as here:
                first = await ask(here, "one")
                old = first["provider_session_id"]
                second = await ask(there, "two")
                assert (second["provider_session_id"], node_of(second)) == (old, "a")
                assert place.heard("two")[:2] == [("user", "one"), ("assistant", "You said: one.")]
                assert (a.transcripts, b.transcripts) == ({old}, set())
            a.daemon.end(signal.SIGKILL)

            await there.ask("monitor:subscribe", patterns=["conversation:forked"])
            await there.ask("completion:async", prompt="three", session_id="trip", request_id="r3")
            waiting = await there.ask("completion:get", request_id="r3")
            assert (waiting["status"], waiting["node"]) == ("queued", "a")
            third = await patiently(there, "completion:wait", request_id="r3")
            new = third["provider_session_id"]
            assert (third["status"], node_of(third), b.transcripts) == ("completed", "b", {new})
            assert new != old
            told = place.heard("three")[-1][1]
            assert all(word in told for word in ("one", "You said: one.", "two", "You said: two."))
            forked = await there.pushed("conversation:forked", conversation_id="trip")
            assert (forked["kind"], forked["request_id"]) == ("node_lost", "r3")
            status = await there.ask("conversation:lock_status", conversation_id="trip")
            assert status["node"] == "b"
            (fork,) = status["forks"]
            assert (fork["kind"], fork["parent"], fork["child"]) == ("node_lost", old, new)

            a.daemon.start()
            async with await a.wire() as here:
                fourth = await ask(here, "four")
                assert (fourth["provider_session_id"], node_of(fourth)) == (new, "b")
                session = await here.ask("completion:session_status", session_id="trip")
                assert (session["node"], session["turns"], session["provider_session_id"]) == ("b", 4, new)


async def test_a_turn_that_was_cut_off_with_its_machine_runs_again_elsewhere(place: Place) -> None:
    with place.machines("a", "b") as (a, b):
        async with await b.wire() as there:
            async with await a.wire() as here:
                first = await ask(here, "one")
                await here.ask("completion:async", prompt=SLOW, session_id="trip", request_id="cut")
                await in_state(there, "cut", "running")
            a.daemon.end(signal.SIGKILL)
            await in_state(there, "cut", "queued")
            again = await in_state(there, "cut", "running")
            assert [attempt["outcome"] for attempt in again["attempts"]] == ["interrupted"]
            await until(lambda: asyncio.to_thread(lambda: b.transcripts))
            await there.ask("completion:cancel", request_id="cut")
            reply = await ask(there, "two")
            assert reply["provider_session_id"] != first["provider_session_id"]
            assert node_of(reply) == "b"


async def test_a_machine_that_restarts_in_time_keeps_its_dialogues(place: Place) -> None:
    with place.machines("a", "b", node_timeout=60.0) as (a, b):
        async with await b.wire() as there:
            async with await a.wire() as here:
                first = await ask(here, "one")
            assert a.daemon.end(signal.SIGTERM) == 0
            await there.ask("completion:async", prompt="two", session_id="trip", request_id="r2")
            health = await there.ask("system:health")
            assert health["node"] == "b"
            assert [(node["node"], node["lost"]) for node in health["nodes"]] == [("a", False), ("b", False)]
            a.daemon.start()
            second = await patiently(there, "completion:wait", request_id="r2")
            assert (second["provider_session_id"], node_of(second)) == (first["provider_session_id"], "a")
            status = await there.ask("conversation:lock_status", conversation_id="trip")
            assert status["forks"] == []


async def test_a_machine_that_was_frozen_finds_its_dialogue_gone_on_elsewhere(place: Place) -> None:
    with place.machines("a", "b") as (a, b):
        async with await b.wire() as there, await a.wire() as here:
            await ask(here, "one")
            os.kill(a.daemon.pid, signal.SIGSTOP)
            try:
                second = await ask(there, "two")
                assert node_of(second) == "b"
                health = await there.ask("system:health")
                assert [(node["node"], node["lost"]) for node in health["nodes"]] == [("a", True), ("b", False)]
            finally:
                os.kill(a.daemon.pid, signal.SIGCONT)
            third = await ask(here, "three")
            assert (third["provider_session_id"], node_of(third)) == (second["provider_session_id"], "b")
            await until(lambda: _is_back(there, "a"))


async def _is_back(wire: Wire, name: str) -> bool:
    health = await wire.ask("system:health")
    return any(node["node"] == name and not node["lost"] for node in health["nodes"])


async def test_processes_are_limited_on_each_machine_and_other_calls_over_all(place: Place) -> None:
    with place.machines("a", "b") as (a, b):
        async with await b.wire() as there, await a.wire() as here:
            for wire, name in ((here, "a1"), (there, "b1")):
                await wire.ask("completion:async", prompt=SLOW, request_id=f"claude-{name}")
                await in_state(wire, f"claude-{name}", "running")
                await wire.ask("completion:async", prompt="hello", model="stub/echo", request_id=f"stub-{name}")
            await here.ask("completion:async", prompt=SLOW, request_id="claude-a2")
            await in_state(here, "stub-a1", "running")
            states = {
                name: (await here.ask("completion:get", request_id=name))["status"] for name in ("stub-b1", "claude-a2")
            }
            assert states == {"stub-b1": "queued", "claude-a2": "queued"}
            for name in ("claude-a1", "claude-b1", "claude-a2", "stub-a1", "stub-b1"):
                await here.ask("completion:cancel", request_id=name)
