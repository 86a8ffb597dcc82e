"""`POST /v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from ksi.content.features import Native
from ksi.events.completions import CompletionData
from ksi.http import chat_wire as wire
from ksi.http.ask import Answer, Done, asking
from ksi.http.doors import Doors, completion, keeps, read_object, text_field
from ksi.http.errors import Refusal
from ksi.http.streams import SIGN_OF_LIFE, opened, write_answer


class ChatDoor:
    """Whole and streamed chat completions."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [web.post("/v1/chat/completions", self.create)]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """One chat completion."""
        body = await read_object(request)
        stream = bool(body.get("stream"))
        request_id = request.headers.get("Idempotency-Key")
        data = completion(
            request,
            Native(dialect="chat", body=body),
            request_id=request_id or self._doors.chance.identifier("http", self._doors.clock.now()),
            model=self._doors.model(text_field(body, "model"), "chat"),
            agent=None,
            stream=stream,
        )
        async with asking(self._doors.completions, self._doors.announcer, data, keep=keeps(request)) as answer:
            if stream:
                return await self._stream(request, data, answer, body)
            return self._whole(await answer.end(), data)

    def _created(self) -> int:
        return int(self._doors.clock.unix())

    def _whole(self, done: Done, data: CompletionData) -> web.Response:
        raw = done.attempt.raw if done.attempt is not None else None
        if raw is not None and not _is_completion(raw):
            raw = None
        written = raw or msgspec.json.encode(wire.completion(done.reply, data.model or "", self._created()))
        return web.Response(
            body=written, content_type="application/json", headers={"x-request-id": done.reply.request_id}
        )

    async def _stream(
        self, request: web.Request, data: CompletionData, answer: Answer, body: dict[str, Any]
    ) -> web.StreamResponse:
        first = await answer.next(SIGN_OF_LIFE)
        if isinstance(first, Refusal):
            raise first
        response = await opened(request, {"x-request-id": answer.request_id})
        options = body.get("stream_options")
        counts = isinstance(options, dict) and bool(options.get("include_usage"))
        writer = wire.ChatStream(answer.request_id, data.model or "", self._created(), counts=counts)
        await write_answer(response, answer, first, writer)
        return response


class _Kind(msgspec.Struct):
    choices: list[Any]


def _is_completion(raw: bytes) -> bool:
    """True if a provider's answer is a chat completion."""
    try:
        msgspec.json.decode(raw, type=_Kind)
    except msgspec.MsgspecError:
        return False
    return True
