"""`POST /v1/messages`: Anthropic's Messages API, as Claude Code and the SDKs speak it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from ksi.content.anthropic import read_request
from ksi.content.blocks import size_of
from ksi.content.features import Native
from ksi.errors import InvalidData, RequestIdConflict
from ksi.events.completions import CompletionData
from ksi.http import messages_wire as wire
from ksi.http.ask import Answer, Done, asking
from ksi.http.clients import Client, client_of
from ksi.http.doors import Doors, chain_of, completion, keeps, read_object, text_field
from ksi.http.errors import Refusal
from ksi.http.fleets import Fleets
from ksi.http.guard import require
from ksi.http.retries import Retries, key_of
from ksi.http.streams import opened, write_answer
from ksi.http.tokens import Scope
from ksi.tokens import BYTES_PER_TOKEN

BEGIN_HOLDING = 10.0
"""Seconds after which a stream begins although nothing of the answer is there: until then a refusal has its status."""

HELPER_TIMEOUT = 60.0
"""Claude Code's own checks of its tools give up after so long, and then block the tool."""

_HEADERS = ("anthropic-beta", "anthropic-version")


class MessagesDoor:
    """Whole and streamed messages, and the count of their tokens."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._retries = Retries(doors.completions, doors.clock)
        self._fleets = Fleets()

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [
            web.post("/v1/messages", self.create),
            web.post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """One message."""
        body = await read_object(request)
        sender = client_of(request.headers)
        if not body.get("stream") and (refusal := self._retries.refusal(sender, body)) is not None:
            raise refusal
        given = request.headers.get("Idempotency-Key")
        if given or sender.session is None:
            request_id = given or self._doors.chance.identifier("http", self._doors.clock.now())
            return await self._answer(request, self._data(request, request_id, sender, body), sender, body, None)
        key = key_of(sender, body)
        while True:
            data = self._data(request, await self._retries.request_id(key), sender, body)
            try:
                return await self._answer(request, data, sender, body, key)
            except RequestIdConflict:
                self._retries.over(key)  # the same words with other limits, or in another chain

    def _data(self, request: web.Request, request_id: str, sender: Client, body: dict[str, Any]) -> CompletionData:
        headers = {name: request.headers[name] for name in _HEADERS if name in request.headers}
        told = {"session": sender.session, "agent": sender.agent}
        return completion(
            request,
            Native(dialect="anthropic", body=body, headers=headers),
            request_id=request_id,
            model=self._doors.model(text_field(body, "model"), "anthropic"),
            agent=sender.account,
            stream=bool(body.get("stream")),
            priority="critical" if _is_check(sender, body) else None,
            chain=chain_of(request, self._doors.config, self._fleets.parent(sender)),
            metadata={name: value for name, value in told.items() if value},
        )

    async def _answer(
        self,
        request: web.Request,
        data: CompletionData,
        sender: Client,
        body: Mapping[str, Any],
        key: str | None,
    ) -> web.StreamResponse:
        """Ask, and write the answer. The same call with this `key` is a new one when its client has the answer."""
        async with asking(self._doors.completions, self._doors.announcer, data, keep=keeps(request)) as answer:
            self._fleets.asked(sender, answer.request_id)
            if data.stream:
                response, refusal = await self._stream(request, data, answer, sender)
            else:
                response, refusal = self._whole(await answer.end(), data), None
        if refusal is not None:
            self._retries.refused(sender, body, refusal)
        elif key is not None:
            self._retries.over(key)
        return response

    def _whole(self, done: Done, data: CompletionData) -> web.Response:
        raw = done.attempt.raw if done.attempt is not None else None
        if raw is not None and not _is_message(raw):
            raw = None
        written = raw or msgspec.json.encode(wire.message(done.reply, data.model or ""))
        return web.Response(
            body=written, content_type="application/json", headers={"request-id": done.reply.request_id}
        )

    async def _stream(
        self, request: web.Request, data: CompletionData, answer: Answer, sender: Client
    ) -> tuple[web.StreamResponse, Refusal | None]:
        first = await answer.next(BEGIN_HOLDING)
        if isinstance(first, Refusal):
            raise first
        response = await opened(request, {"request-id": answer.request_id})
        writer = wire.MessageStream(answer.request_id, data.model or "", held_by_text=sender.claude_code)
        return response, await write_answer(response, answer, first, writer)

    async def count_tokens(self, request: web.Request) -> web.Response:
        """About how many tokens a message would have."""
        require(request, Scope.SUBMIT)
        body = await read_object(request)
        try:
            asked = read_request(body)
        except InvalidData as error:
            raise Refusal(400, error.code, error.message) from None
        chars = sum(size_of(m.content) for m in asked.messages) + size_of(asked.system or "")
        chars += len(msgspec.json.encode(body.get("tools") or []))
        return web.json_response({"input_tokens": int(chars / BYTES_PER_TOKEN) + 1})


def _is_check(sender: Client, body: Mapping[str, Any]) -> bool:
    """True for one of Claude Code's own checks, on which a tool waits that is blocked if the check is late."""
    return sender.claude_code and not body.get("tools") and sender.timeout == HELPER_TIMEOUT


def _is_message(raw: bytes) -> bool:
    """True if a provider's answer is a message of this API."""
    try:
        return msgspec.json.decode(raw, type=_Kind).type == "message"
    except msgspec.MsgspecError:
        return False


class _Kind(msgspec.Struct):
    type: str
