"""A daemon in this process whose providers are scripted endpoints on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ksi.clock import SystemClock
from ksi.daemon.daemon import Daemon
from ksi.store.base import Store
from ksi.testing import SimulatedClock, running_daemon
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.wire import Json, Wire, in_state, until

APIS = ("openai", "anthropic")
ENVIRON = {"ANTHROPIC_API_KEY": "sk-test-0123456789"}

GOOD = Answer()
FAILS = Answer(status=500)
QUICK: Mapping[str, float] = {"initial_delay": 0.01, "max_delay": 0.02}
"""Retries that a test need not wait for."""


def provider(api: str, endpoint: ScriptedEndpoint, **keys: Any) -> Json:
    """The configuration of a provider that asks this endpoint; it serves `team/*`."""
    url = endpoint.openai_url if api == "openai" else endpoint.url
    return {"kind": api, "base_url": url, "models": ["team/*"], "max_concurrency": 8, **keys}


class House:
    """The daemon, a connection to it, and the clock if it is moved by hand."""

    def __init__(self, daemon: Daemon, wire: Wire, clock: SystemClock | None) -> None:
        self.daemon = daemon
        self.wire = wire
        self._clock = clock

    @property
    def clock(self) -> SimulatedClock:
        """The clock that is moved by hand."""
        assert isinstance(self._clock, SimulatedClock)
        return self._clock

    def ask(self, prompt: str = "Hi", **data: Any) -> asyncio.Future[Json]:
        """Send a completion request; the whole reply comes at its end."""
        return self.wire.post("completion:request", {"prompt": prompt, "model": "team/small", **data})

    async def asked(self, prompt: str = "Hi", **data: Any) -> Json:
        """A completion request as it stands at its end."""
        return await self.wire.ask("completion:request", prompt=prompt, **{"model": "team/small", **data})

    async def begin(self, request_id: str, *states: str, **data: Any) -> Json:
        """Submit a request and wait until it is in one of these states."""
        given = {"prompt": "Hi", "model": "team/small", "request_id": request_id, **data}
        await self.wire.ask("completion:async", **given)
        return await in_state(self.wire, request_id, *(states or ("completed",)))

    async def status(self, name: str) -> Json:
        """One provider's record."""
        status = await self.wire.ask("completion:provider_status")
        found: Json = status["providers"][name]
        return found

    async def changes(self, count: int) -> list[tuple[str, str, str]]:
        """The next so many changes of providers: name, before, after."""
        pushed = [await self.wire.pushed("provider:state_changed") for _ in range(count)]
        return [(push["provider"], push["before"], push["after"]) for push in pushed]

    async def advance_to(self, request_id: str, *states: str, step: float = 0.25) -> Json:
        """Let time pass until a request is in one of these states."""

        async def look() -> Json | None:
            reply = await self.wire.ask("completion:get", request_id=request_id)
            if reply["status"] in states:
                return reply
            await self.clock.advance(step)
            return None

        reply = await until(look)
        assert reply is not None
        return reply


@asynccontextmanager
async def serving(
    providers: Mapping[str, Json],
    *,
    clock: SystemClock | None = None,
    home: Path | None = None,
    store: Store | None = None,
    **sections: Mapping[str, Any],
) -> AsyncIterator[House]:
    """A house with these providers; `sections` as in ksi.toml. Running requests are stopped at once at its end."""
    settings: dict[str, Mapping[str, Any]] = {
        "service": {"shutdown_grace": 0.0},
        "retry": QUICK if clock is None else {},
        **sections,
        "providers": providers,
    }
    async with (
        running_daemon(home, settings=settings, clock=clock, store=store, environ=ENVIRON) as daemon,
        await Wire.open(daemon.config.socket_path) as wire,
    ):
        await wire.ask("monitor:subscribe", patterns=["provider:*"])
        yield House(daemon, wire, clock)


def trail(reply: Json) -> list[tuple[str, str, str | None]]:
    """A request's attempts in short: provider, outcome, error."""
    return [(entry["provider"], entry["outcome"], entry.get("error")) for entry in reply["attempts"]]
