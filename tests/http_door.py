"""A daemon whose HTTP door is open, before scripted endpoints, and a client for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ksi.daemon.daemon import Daemon
from ksi.testing import STUB, running_daemon
from tests.endpoint import ScriptedEndpoint

Json = dict[str, Any]

PATIENCE = 60.0
"""Seconds that anything gets before the test gives up on it."""


class Reply(msgspec.Struct):
    """An answer by HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream, with their names; data that is no JSON as text."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
            data = "\n".join(value for name, _, value in lines if name == "data")
            if data:
                name = next((value for field, _, value in lines if field == "event"), "")
                found.append((name, json.loads(data) if data.startswith("{") else data))
        return found


class EventReader:
    """Server-sent events as they come."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.status = answer.status
        self.name = answer.headers.get("x-ksi-stream", "")
        self.answer = answer
        self.last_id = ""

    async def next(self) -> Any:
        """The data of the next event; None at the stream's end."""
        async with asyncio.timeout(PATIENCE):
            while line := await self.answer.content.readline():
                if line.startswith(b"id: "):
                    self.last_id = line[4:].decode().strip()
                if line.startswith(b"data: "):
                    return json.loads(line[6:])
        return None

    async def until(self, event: str) -> Any:
        """The next event of this name."""
        while (found := await self.next()) is not None and found["event"] != event:
            pass
        assert found is not None, f"no {event} came"
        return found


class Door:
    """The door of a daemon in this process."""

    def __init__(self, daemon: Daemon, session: aiohttp.ClientSession) -> None:
        assert daemon.http is not None
        assert daemon.http.url is not None
        self.daemon = daemon
        self.url = daemon.http.url
        self.token = (daemon.config.run_dir / "token").read_text().strip()
        self.session = session

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        known = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(f"{self.url}{path}", data=data, headers={**known, **given}) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **headers: str) -> Reply:
        """Look."""
        known = {"Authorization": f"Bearer {self.token}"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.get(f"{self.url}{path}", headers={**known, **given}) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def delete(self, path: str, **headers: str) -> Reply:
        """Delete."""
        async with self.session.delete(f"{self.url}{path}", headers=headers) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def event(self, event: str, *, token: str | None = None, via: str | None = None, **data: Any) -> Reply:
        """`POST /v1/events`; `via` names a stream that is read."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers |= {} if via is None else {"x-ksi-stream": via}
        return await self.post("/v1/events", {"event": event, "data": data}, **headers)

    async def told(self, event: str, *, token: str | None = None, **data: Any) -> Any:
        """The data of an event's reply."""
        reply = await self.event(event, token=token, **data)
        assert reply.status == 200, reply.body
        return reply.json["data"]

    async def new_token(self, name: str, scope: str = "submit", **more: Any) -> str:
        """A token of this name."""
        return str((await self.told("token:create", name=name, scope=scope, **more))["token"])

    @asynccontextmanager
    async def stream(self, path: str, *, token: str | None = None, **headers: str) -> AsyncIterator[EventReader]:
        """Read server-sent events."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        known = {"Authorization": f"Bearer {token or self.token}"}
        async with self.session.get(f"{self.url}{path}", headers={**known, **given}) as answer:
            yield EventReader(answer)

    async def message(self, text: str = "Hi.", *, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        """`POST /v1/messages`."""
        body = {"model": "claude-x", "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}
        return await self.post("/v1/messages", body, **(headers or {}))

    async def chat(self, text: str = "Hi.", *, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        """`POST /v1/chat/completions`."""
        body = {"model": "gpt-x", "messages": [{"role": "user", "content": text}], **fields}
        return await self.post("/v1/chat/completions", body, **(headers or {}))


@asynccontextmanager
async def door(
    anthropic: ScriptedEndpoint | None = None,
    openai: ScriptedEndpoint | None = None,
    *,
    home: Path | None = None,
    **sections: Mapping[str, Any],
) -> AsyncIterator[Door]:
    """The HTTP interface of a daemon that has these endpoints as its providers, in addition to the stub."""
    providers: dict[str, Any] = {"stub": dict(STUB), "local": {"kind": "local", "enabled": False}}
    if anthropic is not None:
        providers["anthropic"] = {"kind": "anthropic", "base_url": anthropic.url}
    if openai is not None:
        providers["openai"] = {"kind": "openai", "base_url": openai.openai_url, "api_key_env": "OPENAI_API_KEY"}
    settings: dict[str, Any] = {"http": {"listen": "127.0.0.1:0"}, "providers": providers, **sections}
    settings["http"] = {"listen": "127.0.0.1:0", **settings["http"]}
    environ = {"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k"}
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        daemon = await stack.enter_async_context(running_daemon(home, settings=settings, environ=environ))
        yield Door(daemon, session)
