"""A dialogue with Claude Code over both versions and back: the real program against a scripted endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ksi.clock import SystemClock
from ksi.migration import forward
from ksi.migration.backward import Backward
from ksi.migration.forward import Forward
from tests.claude import House, number_messages, said
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import daemon_and_wire
from tests.integration.test_v1 import direct
from tests.integration.wire import Json, Wire

CONFIG = """\
[service]
version = 1

[providers.claude-cli]
kind = "claude-cli"

[providers.local]
kind = "local"
enabled = false
"""


def echo(seen: Seen) -> Answer:
    return Answer(pieces=("You said: ", said(seen)[-1][1], "."))


class Place:
    """A home of version 1 with Claude Code, and its endpoint."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.home = house.home
        self.providers = {"claude-cli": {"kind": "claude-cli", **house.options()}}
        self._endpoint = endpoint
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "ksi.toml").write_text(CONFIG)

    async def ask(self, wire: Wire, prompt: str, session: str) -> Json:
        reply = await wire.ask("completion:request", prompt=prompt, model="haiku", session_id=session)
        assert reply["result"] == f"You said: {prompt}.", reply
        return reply

    def heard(self, prompt: str) -> list[str]:
        """The users' messages at the time of a prompt."""
        found = (said(seen) for seen in reversed(self._endpoint.requests))
        return next([text for who, text in one if who == "user"] for one in found if one[-1][1] == prompt)


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    number_messages(monkeypatch)
    monkeypatch.setattr(forward, "check_parts", lambda: None)
    monkeypatch.setattr(forward, "self_test", lambda: None)
    async with ScriptedEndpoint(script=echo) as endpoint:
        yield Place(House(tmp_path, endpoint.url), endpoint)


@pytest.mark.promise("L9")
async def test_claude_remembers_all_over_both_versions_and_back(place: Place) -> None:
    async with direct(place.home, providers=place.providers) as (_, wire):
        first = await place.ask(wire, "one", "trip")
        second = await place.ask(wire, "two", "trip")
        assert first["provider_session_id"] == second["provider_session_id"]
    async with direct(place.home, providers=place.providers) as (_, wire):
        await place.ask(wire, "three", "trip")
    forwards = Forward(place.home, SystemClock(), "test", lambda _: None)
    assert await asyncio.to_thread(forwards.run, dry_run=False, agree=lambda: True)
    async with daemon_and_wire(place.home, service={"version": 2}, providers=place.providers) as (_, wire):
        fourth = await place.ask(wire, "four", "trip")
        assert fourth["provider_session_id"] == first["provider_session_id"]
        # By the name that Claude gave, too: it is the same conversation.
        assert (await place.ask(wire, "five", first["provider_session_id"]))["session_id"] == "trip"
    backwards = Backward(place.home, SystemClock(), "test", lambda _: None)
    await asyncio.to_thread(backwards.run, dry_run=False)
    async with direct(place.home, providers=place.providers) as (_, wire):
        await place.ask(wire, "six", "trip")
    assert place.heard("six") == ["one", "two", "three", "four", "five", "six"]
