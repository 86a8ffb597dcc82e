"""`POST /mcp`: the Model Context Protocol over HTTP."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import msgspec
from aiohttp import web

from ksi.http.doors import Doors, agent_of
from ksi.http.errors import Refusal
from ksi.http.guard import require
from ksi.http.mcp.protocol import Session
from ksi.http.mcp.tools import INSTRUCTIONS, Caller, Tools
from ksi.http.own import Ownership
from ksi.http.tokens import Scope

Json = dict[str, Any]

MOST_SESSIONS = 1_000
"""Named clients that are remembered."""

_SESSION = "x-ksi-mcp-session"


class McpDoor:
    """Receives messages, and sends each one's answer: as JSON, or as events if progress comes before it."""

    def __init__(self, doors: Doors, own: Ownership) -> None:
        self._doors = doors
        self._own = own
        self._sessions: OrderedDict[tuple[Caller, str], Session] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [web.post("/mcp", self.post), web.get("/mcp", self.get)]

    async def get(self, request: web.Request) -> web.Response:
        """Refused by name: the server sends nothing except answers."""
        require(request, Scope.SUBMIT)
        raise Refusal(405, "method_not_allowed", "this server sends no messages unasked; POST a message")

    async def post(self, request: web.Request) -> web.StreamResponse:
        """One message."""
        identity = require(request, Scope.SUBMIT)
        caller = Caller(identity=identity, agent_id=agent_of(identity, request.headers.get("x-ksi-agent")))
        session = self._session(caller, request.headers.get(_SESSION))
        try:
            message = msgspec.json.decode(await request.read())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
        news: asyncio.Queue[Json] = asyncio.Queue()
        answering = asyncio.ensure_future(session.answer(message, news.put_nowait))
        try:
            if "text/event-stream" not in request.headers.get("Accept", ""):
                return _whole(await answering)
            return await self._either(request, answering, news)
        finally:
            answering.cancel()

    def _session(self, caller: Caller, name: str | None) -> Session:
        """A client's messages. One that gives no name has each of them alone: their ids may be another's, too."""
        if name is None:
            return self._new(caller)
        found = self._sessions.get((caller, name))
        if found is None:
            found = self._sessions[caller, name] = self._new(caller)
        self._sessions.move_to_end((caller, name))
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return found

    def _new(self, caller: Caller) -> Session:
        return Session(Tools(self._doors, self._own, caller), self._doors.version, INSTRUCTIONS)

    async def _either(
        self, request: web.Request, answering: asyncio.Future[Json | None], news: asyncio.Queue[Json]
    ) -> web.StreamResponse:
        """Events from the first word of progress on; without one, JSON."""
        response: web.StreamResponse | None = None
        while True:
            told: asyncio.Future[Json] = asyncio.ensure_future(news.get())
            either: set[asyncio.Future[Any]] = {told, answering}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                response = response or await _opened(request)
                await response.write(_event(told.result()))
                continue
            told.cancel()
            answer = await answering
            if response is None:
                return _whole(answer)
            await response.write(_event(answer or {}))
            return response


async def _opened(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    return response


def _event(message: Json) -> bytes:
    return b"event: message\ndata: " + msgspec.json.encode(message) + b"\n\n"


def _whole(answer: Json | None) -> web.Response:
    if answer is None:
        return web.Response(status=202)
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")
