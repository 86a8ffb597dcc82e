"""`/v1/responses` and `/v1/conversations`: OpenAI's Responses API, on KSI's own requests and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web

from ksi.clock import to_seconds
from ksi.content.blocks import Content, Message
from ksi.content.features import Features
from ksi.content.responses import read_request, write_items
from ksi.errors import ConversationBusy, NotFound
from ksi.events.completions import (
    CancelData,
    CompletionData,
    GetData,
    MessageData,
    Reasoning,
    RequestReply,
    ResponseFormat,
    ToolChoice,
)
from ksi.events.owned import DeleteData
from ksi.http import responses_wire as wire
from ksi.http.ask import Answer, asking, following
from ksi.http.doors import Doors, agent_of, chain_of, keeps, number_header, read_object, traceparent_of
from ksi.http.errors import Refusal
from ksi.http.guard import require
from ksi.http.own import Ownership
from ksi.http.streams import SIGN_OF_LIFE, opened, write_answer
from ksi.http.tokens import Identity, Scope
from ksi.request import RequestBody, decode_body

KEPT_FIELDS = (
    "instructions",
    "metadata",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "tool_choice",
    "tools",
    "background",
    "max_output_tokens",
    "previous_response_id",
    "conversation",
    "reasoning",
    "text",
)
"""Fields of a request that its response tells too."""

LONGEST_LINE = 1_000
"""Number of consecutive responses that can be continued, if another continued from one of them first."""

Json = dict[str, Any]


class ResponsesDoor:
    """Responses: whole, streamed, in the background, and looked at again."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._own = Ownership(doors.store, doors.completions)

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [
            web.post("/v1/responses", self.create),
            web.get("/v1/responses/{id}", self.retrieve),
            web.delete("/v1/responses/{id}", self.delete),
            web.post("/v1/responses/{id}/cancel", self.cancel),
            web.get("/v1/responses/{id}/input_items", self.input_items),
            web.post("/v1/conversations", self.create_conversation),
            web.get("/v1/conversations/{id}", self.conversation),
            web.delete("/v1/conversations/{id}", self.delete_conversation),
            web.get("/v1/conversations/{id}/items", self.conversation_items),
        ]

    # -- asking -------------------------------------------------------------------------------------------------------

    async def create(self, request: web.Request) -> web.StreamResponse:
        """One response."""
        body = await read_object(request)
        given = request.headers.get("Idempotency-Key")
        request_id = given or self._doors.chance.identifier("http", self._doors.clock.now())
        data = await self._data(request, request_id, body)
        previous = body.get("previous_response_id")
        if previous and data.session_id is None:
            return await self._answer(request, await self._apart(data, previous), body)
        try:
            return await self._answer(request, data, body)
        except ConversationBusy:
            if not previous:
                raise
            # Another client continues from the same response at this moment: both may.
            return await self._answer(request, await self._apart(data, previous), body)

    async def _answer(self, request: web.Request, data: CompletionData, body: Json) -> web.StreamResponse:
        request_id = data.request_id or ""
        told = self._told(request_id, body, data.model or "", self._doors.clock.unix())
        if body.get("background"):
            if body.get("store") is False:
                raise Refusal(400, "invalid_data", "background: a response that is not stored cannot be made aside")
            await self._doors.completions.submit(data, Answer(request_id))
            if body.get("stream"):
                return await self._follow(request, request_id, told, after=-1)
            return web.json_response(wire.of_reply(told, await self._view(request_id)), dumps=_dumps)
        async with asking(self._doors.completions, self._doors.announcer, data, keep=keeps(request)) as answer:
            if not body.get("stream"):
                return web.json_response(wire.of_reply(told, (await answer.end()).reply), dumps=_dumps)
            return await self._stream(request, answer, told, after=-1)

    async def _data(self, request: web.Request, request_id: str, body: Json) -> CompletionData:
        """The request to the queue.

        Raises:
            Refusal: it cannot be read, or continues an unknown response.
        """
        identity = require(request, Scope.SUBMIT)
        asked = read_request(body)
        if asked.unmapped:
            raise Refusal(400, "unsupported", f"this API does not support here: {', '.join(asked.unmapped[:10])}")
        return CompletionData(
            messages=[_data_of(message) for message in asked.messages],
            system=_plain(asked.system),
            model=self._doors.model(asked.model or "", "chat"),
            request_id=request_id,
            agent_id=agent_of(identity, request.headers.get("x-ksi-agent")),
            session_id=await self._session(body, identity),
            on_busy="reject" if body.get("previous_response_id") else "enqueue",
            priority=request.headers.get("x-ksi-priority") or identity.priority,
            ttl=number_header(request, "x-ksi-ttl"),
            timeout=number_header(request, "x-ksi-timeout"),
            drop_unsupported=request.headers.get("x-ksi-drop-unsupported") == "1",
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            circuit_breaker_config=chain_of(request, self._doors.config, None),
            stream=asked.stream,
            traceparent=traceparent_of(request),
            metadata={
                "door": "responses",
                "token": identity.name,
                "response": {name: body[name] for name in KEPT_FIELDS if body.get(name) is not None},
            },
            **_features(asked.features),
        )

    async def _session(self, body: Json, identity: Identity) -> str | None:
        """The conversation that a request continues: the named one, or that of the previous response."""
        named, previous = body.get("conversation"), body.get("previous_response_id")
        if named is not None and previous is not None:
            raise Refusal(400, "invalid_data", "give conversation or previous_response_id, not both")
        if named is not None:
            name = named.get("id") if isinstance(named, dict) else named
            if not isinstance(name, str) or not name:
                raise Refusal(400, "invalid_data", "conversation: expected an id")
            await self._own.check_session(name, identity)
            return name
        if previous is None:
            return None
        await self._own.check_request(wire.request_id(str(previous)), identity)
        view = await self._view(wire.request_id(str(previous)))
        if view.status != "completed":
            raise Refusal(400, "invalid_data", f"previous_response_id: {previous!r} is {view.status}")
        return view.session_id if await self._is_head(view) else None

    async def _is_head(self, view: RequestReply) -> bool:
        """True if a response is the last turn of its conversation."""
        store = self._doors.store
        session = await store.session(view.session_id)
        if session is None or session.head is None:
            return False
        last = await store.log_after(session.head - 1, 1, 1)
        return bool(last) and last[0].id == session.head and last[0].request_id == view.request_id

    async def _apart(self, data: CompletionData, previous: str) -> CompletionData:
        """The same request in a conversation of its own, with all that was said before it."""
        said: list[Message] = []
        at: str | None = previous
        for _ in range(LONGEST_LINE):
            if at is None:
                break
            view = await self._doors.store.get(wire.request_id(at))
            if view is None or view.answer is None:
                raise NotFound(f"no response {at!r}, or it is not kept any more")
            asked = decode_body(view.body)
            answer: Content = view.answer.content or view.answer.text or ""
            said = [*asked.dialogue(), Message("assistant", answer), *said]
            at = _kept(asked).get("previous_response_id")
        messages = [_data_of(message) for message in said]
        return msgspec.structs.replace(
            data, session_id=None, on_busy="enqueue", messages=[*messages, *(data.messages or ())]
        )

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self, request: web.Request, request_id: str, told: wire.Told, after: int) -> web.StreamResponse:
        async with following(self._doors.completions, self._doors.announcer, request_id) as answer:
            return await self._stream(request, answer, told, after)

    async def _stream(self, request: web.Request, answer: Answer, told: wire.Told, after: int) -> web.StreamResponse:
        writer = wire.ResponseStream(told, answer.request_id, after)
        first = await answer.next(SIGN_OF_LIFE)
        if isinstance(first, Refusal) and after < 0 and not told.asked.get("background"):
            raise first
        response = await opened(request, {"x-request-id": answer.request_id})
        await response.write(b"".join(writer.begin("queued" if told.asked.get("background") else "in_progress")))
        await write_answer(response, answer, first, writer)
        return response

    # -- looking again ------------------------------------------------------------------------------------------------

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """A response as it stands, or its events."""
        require(request, Scope.SUBMIT)
        request_id = wire.request_id(request.match_info["id"])
        told = await self._kept_told(request_id)
        if request.query.get("stream") == "true":
            after = request.query.get("starting_after", "-1")
            if not after.lstrip("-").isdecimal():
                raise Refusal(400, "invalid_data", "starting_after: expected a whole number")
            return await self._follow(request, request_id, told, int(after))
        return web.json_response(wire.of_reply(told, await self._view(request_id)), dumps=_dumps)

    async def cancel(self, request: web.Request) -> web.Response:
        """End a response that is under way."""
        require(request, Scope.SUBMIT)
        request_id = wire.request_id(request.match_info["id"])
        told = await self._kept_told(request_id)
        await self._doors.completions.cancel(CancelData(request_id=request_id))
        return web.json_response(wire.of_reply(told, await self._view(request_id)), dumps=_dumps)

    async def delete(self, request: web.Request) -> web.Response:
        """Delete a response with the conversation that it is alone in. One of several turns is refused: the later ones
        were said on its ground."""
        require(request, Scope.SUBMIT)
        view = await self._view(wire.request_id(request.match_info["id"]))
        session = await self._doors.store.session(view.session_id)
        if session is not None and session.turns > 0 and not (session.turns == 1 and await self._is_head(view)):
            raise Refusal(
                409,
                "unsupported",
                f"the response is one of {session.turns} turns of the conversation {view.session_id!r} and cannot be "
                f"deleted alone; DELETE /v1/conversations/{quote(view.session_id, safe='')} deletes them together",
            )
        await self._doors.conversations.delete(DeleteData(session_id=view.session_id))
        gone = {"id": wire.response_id(view.request_id), "object": "response", "deleted": True}
        return web.json_response(gone)

    async def input_items(self, request: web.Request) -> web.Response:
        """The items that a response was asked with."""
        require(request, Scope.SUBMIT)
        body = await self._body(wire.request_id(request.match_info["id"]))
        return web.json_response(_list(write_items(body.dialogue())), dumps=_dumps)

    async def _view(self, request_id: str) -> RequestReply:
        return await self._doors.completions.get(GetData(request_id=request_id))

    async def _body(self, request_id: str) -> RequestBody:
        view = await self._doors.store.get(request_id)
        if view is None:
            raise NotFound(f"no response {wire.response_id(request_id)!r}, or it is not kept any more")
        return decode_body(view.body)

    async def _kept_told(self, request_id: str) -> wire.Told:
        view = await self._doors.store.get(request_id)
        if view is None:
            raise NotFound(f"no response {wire.response_id(request_id)!r}, or it is not kept any more")
        asked = _kept(decode_body(view.body))
        return self._told(request_id, asked, view.model, to_seconds(view.enqueued_at) or 0.0)

    def _told(self, request_id: str, asked: Mapping[str, Any], model: str, at: float) -> wire.Told:
        return wire.Told(wire.response_id(request_id), model, float(int(at)), asked)

    # -- conversations ------------------------------------------------------------------------------------------------

    async def create_conversation(self, request: web.Request) -> web.Response:
        """A name for a conversation. It begins with the first response in it."""
        require(request, Scope.SUBMIT)
        body = await read_object(request) if request.can_read_body else {}
        if body.get("items"):
            raise Refusal(
                501, "unsupported", "items: a conversation begins with its first response; send the items as its input"
            )
        name = self._doors.chance.identifier("conv", self._doors.clock.now())
        return web.json_response(self._conversation(name, body.get("metadata")))

    async def conversation(self, request: web.Request) -> web.Response:
        """A conversation, also one in which nothing was said yet."""
        require(request, Scope.SUBMIT)
        return web.json_response(self._conversation(request.match_info["id"], None))

    async def delete_conversation(self, request: web.Request) -> web.Response:
        """Delete a conversation with all of its turns, whoever asked them: so an operator's token is needed."""
        require(request, Scope.OPERATE)
        name = request.match_info["id"]
        await self._doors.conversations.delete(DeleteData(session_id=name))
        return web.json_response({"id": name, "object": "conversation.deleted", "deleted": True})

    def _conversation(self, name: str, metadata: Any) -> Json:
        return {
            "id": name,
            "object": "conversation",
            "created_at": int(self._doors.clock.unix()),
            "metadata": metadata or {},
        }

    async def conversation_items(self, request: web.Request) -> web.Response:
        """The turns of a conversation, the newest first."""
        require(request, Scope.SUBMIT)
        session = await self._doors.store.session(request.match_info["id"])
        items: list[Json] = []
        if session is not None and session.head is not None:
            for turn in await self._doors.store.history(session.head, 1_000_000):
                said = [*decode_body(turn.body).dialogue(), Message("assistant", turn.content or turn.text)]
                items += [{"id": f"item_{turn.id}_{n}", **item} for n, item in enumerate(write_items(said))][::-1]
        return web.json_response(_list(items), dumps=_dumps)


def _list(items: list[Json]) -> Json:
    marked = [{"id": f"item_{place}", **item} for place, item in enumerate(items)]
    first, last = (marked[0]["id"], marked[-1]["id"]) if marked else (None, None)
    return {"object": "list", "data": marked, "first_id": first, "last_id": last, "has_more": False}


def _kept(body: RequestBody) -> Json:
    """The fields of a response's request."""
    kept = (body.metadata or {}).get("response")
    return kept if isinstance(kept, dict) else {}


def _data_of(message: Message) -> MessageData:
    content = message.content
    return MessageData(role=message.role, content=content if isinstance(content, str) else list(content))  # type: ignore[arg-type]


def _features(features: Features) -> Json:
    """The features as fields of an event."""
    asked = {name: getattr(features, name) for name in Features.__struct_fields__}
    asked["tools"] = list(features.tools) or None
    if features.tool_choice is not None:
        asked["tool_choice"] = msgspec.convert(features.tool_choice, ToolChoice)
    if features.response_format is not None:
        asked["response_format"] = msgspec.convert(features.response_format, ResponseFormat)
    if features.reasoning is not None:
        asked["reasoning"] = msgspec.convert(features.reasoning, Reasoning)
    return asked


def _plain(content: Content | None) -> str | list[Json] | None:
    return list(content) if isinstance(content, tuple) else content


def _dumps(value: Any) -> str:
    return msgspec.json.encode(value).decode()
