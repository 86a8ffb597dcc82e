"""`/v1/events`: the socket's features by HTTP, with one event per request, and pushes as server-sent events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog
from aiohttp import web

from ksi.clock import Chance, Clock
from ksi.errors import InvalidData, InvalidEnvelope, KsiError, SlowConsumer
from ksi.events.bus import MOST_PATTERNS, RESULT, TODAY, EventBus, News
from ksi.events.completions import RequestReply, WaitData
from ksi.events.specs import SPECS
from ksi.http.doors import body_of
from ksi.http.errors import Refusal, status_of
from ksi.http.event_stream import EventStream, EventStreams, lost, position, sse
from ksi.http.guard import require
from ksi.http.own import Ownership
from ksi.http.schema import asyncapi, json_schema
from ksi.http.streams import SIGN_OF_LIFE, opened
from ksi.http.tokens import Identity, Scope, Tokens
from ksi.protocol import Envelope, decode_envelope, encode_error, encode_reply
from ksi.transports.dispatch import LATER, Connection, Exchange, Handler, PlainForm, call

STREAM = "x-ksi-stream"
"""Names the stream that a client reads: later pushes for an event go there, as over a socket's connection."""

LONGEST_PATTERN = 200

SHORTEST, LONGEST = 0.1, 60.0
"""Seconds between two digests."""

_OF_A_STREAM = {
    "monitor:subscribe": "`GET /v1/events?pattern=...` is a stream of matching events",
    "monitor:unsubscribe": "a stream ends with its connection",
}
_ALIVE = b": \n\n"


class _Posted(Exchange):
    """An event that came by itself: its answer goes back with the same request."""

    def __init__(self, connection: Connection, clock: Clock, form: PlainForm, envelope: Envelope) -> None:
        super().__init__(connection, clock, form, envelope.event, envelope.correlation_id)
        self._status = 200
        self.answered: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

    def refuse(self, error: Exception) -> None:
        """See `Exchange`."""
        self._status = status_of(error.code) if isinstance(error, KsiError) else 500
        super().refuse(error)

    def _send(self, line: bytes) -> None:
        if not self.answered.done():  # its client has gone
            self.answered.set_result((self._status, line))


class _Nowhere:
    """The receiver of unwanted pushes: the client reads no stream."""

    def push(self, line: bytes) -> None:
        """See `Listener`."""

    def news(self, news: News) -> None:
        """See `Listener`."""

    def answer(self, line: bytes) -> None:
        """See `Connection`. The answer goes back with the request itself."""


class EventsDoor:
    """Events in, events out, a request's pieces, and the schemas of all of them."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        wait: Callable[..., Any],
        bus: EventBus,
        own: Ownership,
        tokens: Tokens,
        streams: EventStreams,
        clock: Clock,
        chance: Chance,
    ) -> None:
        """`wait` is `completion:wait`'s service."""
        self._form = PlainForm(handlers, SPECS)
        self._wait = wait
        self._bus = bus
        self._own = own
        self._tokens = tokens
        self.streams = streams
        self._clock = clock
        self._chance = chance
        self._log = structlog.get_logger("ksi.http")

    def routes(self) -> list[web.RouteDef]:
        """The paths that this door serves."""
        return [
            web.post("/v1/events", self.post),
            web.get("/v1/events", self.read),
            web.get("/v1/requests/{request_id}/stream", self.pieces),
            web.get("/v1/schema", self.schema),
            web.get("/v1/schema/asyncapi", self.asyncapi),
        ]

    # -- events in ----------------------------------------------------------------------------------------------------

    async def post(self, request: web.Request) -> web.Response:
        """One event, answered as by the socket."""
        identity = require(request, Scope.SUBMIT)
        envelope = decode_envelope(await body_of(request))
        stream = self._stream_of(request, identity)
        connection: Connection = _Nowhere() if stream is None else stream
        exchange = _Posted(connection, self._clock, self._form, envelope)
        try:
            allowed = await self._own.check_event(envelope, identity)
            _check_possible(envelope, stream)
            reply = await call(self._form, allowed, exchange)
            if reply is not LATER:
                exchange.answer(reply)
        except KsiError as error:
            exchange.refuse(error)
        except Exception as error:  # noqa: BLE001 - a defect: the client hears of it, the log has it
            self._log.exception("handler failed", event_name=envelope.event)
            exchange.refuse(error)
        try:
            status, line = await exchange.answered
        finally:
            if stream is None:
                self._bus.forget(connection)
        return web.Response(status=status, body=line, content_type="application/json")

    def _stream_of(self, request: web.Request, identity: Identity) -> EventStream | None:
        name = request.headers.get(STREAM)
        if name is None:
            return None
        stream = self.streams.find(name, identity)
        if stream is None:
            raise Refusal(
                404, "not_found", f"{STREAM}: there is no stream {name[:100]!r}; `GET /v1/events` opens a stream"
            )
        return stream

    # -- events out ---------------------------------------------------------------------------------------------------

    async def read(self, request: web.Request) -> web.StreamResponse:
        """The pushes: events that match the patterns, and those that follow events sent for this stream."""
        patterns = _patterns(request)
        identity = require(request, Scope.READ if patterns else Scope.SUBMIT)
        every = _interval(request)
        if every is not None:
            return await self._read_digest(request, patterns or ["*"], every)
        last = position(request.headers.get("Last-Event-ID", ""))
        stream = self.streams.find(last[0], identity) if last is not None else None
        known = stream is not None
        if stream is None:
            stream = self.streams.make(self._chance.identifier("stream", self._clock.now()), identity)
            self._bus.speak(stream, TODAY)
        if patterns:
            self._bus.unsubscribe(stream, None)
            self._bus.subscribe(stream, patterns)
        try:
            async with self._reading(stream, last[1] if known and last is not None else None) as missed:
                response = await opened(request, {STREAM: stream.name})
                if missed or (not known and "Last-Event-ID" in request.headers):
                    await response.write(lost(missed or None, self._clock.unix()))
                await response.write(stream.mark())
                while (data := await stream.next(SIGN_OF_LIFE)) is not None:
                    await response.write(data or _ALIVE)
                await response.write_eof()
                return response
        finally:
            if not self._tokens.valid(identity):
                self.streams.end(stream)

    async def _read_digest(self, request: web.Request, patterns: list[str], every: float) -> web.StreamResponse:
        """The number of events instead of the events: at most one each `every` seconds."""
        with self.streams.digest() as digest:
            self._bus.subscribe(digest, patterns)
            try:
                response = await opened(request, {})
                await response.write(_ALIVE)
                while (line := await digest.next(SIGN_OF_LIFE)) is not None:
                    await response.write(sse(line) if line else _ALIVE)
                    if line:
                        await digest.rest(every)
                await response.write_eof()
                return response
            finally:
                self._bus.forget(digest)

    @asynccontextmanager
    async def _reading(self, stream: EventStream, after: int | None) -> AsyncIterator[int]:
        """Read a stream until it ends, the reader is disconnected, or another replaces it."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:

            def let_go() -> None:
                limit.reschedule(loop.time())

            missed = stream.attach(let_go, after)
            try:
                yield missed
            finally:
                stream.detach(let_go)

    async def pieces(self, request: web.Request) -> web.StreamResponse:
        """A request's pieces from the first one of the running attempt on, and its end."""
        identity = require(request, Scope.SUBMIT)
        request_id = request.match_info["request_id"]
        await self._own.check_request(request_id, identity)
        listener = _Pieces(request_id, _seen(request.headers.get("Last-Event-ID", "")), self._clock)
        self._bus.speak(listener, TODAY)
        try:
            done = await self._wait(
                WaitData(request_id=request_id, stream=True, after_seq=-1), listener, listener.ended, listener.refused
            )
            if done is not None:
                listener.ended(done)
            response = await opened(request, {"x-request-id": request_id})
            await response.write(_ALIVE)
            while (data := await listener.next(SIGN_OF_LIFE)) is not None:
                await response.write(data or _ALIVE)
            await response.write_eof()
            return response
        finally:
            self._bus.forget(listener)

    # -- schemas ------------------------------------------------------------------------------------------------------

    async def schema(self, request: web.Request) -> web.Response:
        """The JSON Schema of every event."""
        require(request, Scope.SUBMIT)
        return web.Response(body=msgspec.json.encode(json_schema()), content_type="application/schema+json")

    async def asyncapi(self, request: web.Request) -> web.Response:
        """The same as an AsyncAPI document."""
        require(request, Scope.SUBMIT)
        return web.Response(body=msgspec.json.encode(asyncapi()), content_type="application/json")


class _Pieces:
    """Follows one request for a client."""

    MOST = 64 * 1024 * 1024
    """Bytes that a client may leave unread."""

    def __init__(self, request_id: str, seen: tuple[int, int], clock: Clock) -> None:
        self._request_id = request_id
        self._seen = seen
        self._clock = clock
        self._out: list[bytes] = []
        self._size = 0
        self._over = False
        self._news = asyncio.Event()

    def push(self, line: bytes) -> None:
        """See `Listener`: a piece, unless the client has it."""
        try:
            piece = _piece_decoder.decode(line).data
        except msgspec.MsgspecError:
            return  # no piece
        if piece.request_id == self._request_id and (piece.attempt, piece.seq) > self._seen:
            self._put(sse(line, f"{piece.attempt}.{piece.seq}"))

    def news(self, news: News) -> None:
        """See `Listener`."""
        self.push(news.line())

    def ended(self, reply: RequestReply) -> None:
        """The end."""
        self._put(sse(encode_reply(RESULT, reply, None, self._clock.unix())))
        self._over = True

    def refused(self, error: Exception) -> None:
        """The daemon stops before the end."""
        if isinstance(error, KsiError):
            self._put(sse(encode_error(RESULT, error, None, self._clock.unix())))
        self._over = True
        self._news.set()

    def _put(self, data: bytes) -> None:
        if self._over:
            return
        self._size += len(data)
        if self._size > self.MOST:
            self._out.clear()
            words = f"more than {self.MOST} bytes were not read; the result can be fetched with completion:get"
            self._out.append(sse(encode_error(RESULT, SlowConsumer(words), None, self._clock.unix())))
            self._over = True
        else:
            self._out.append(data)
        self._news.set()

    async def next(self, seconds: float) -> bytes | None:
        """The events; empty if there were none for that long, None after the end."""
        if not self._out:
            if self._over:
                return None
            self._news.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                return b""
        out, self._out, self._size = self._out, [], 0
        return b"".join(out)


class _Piece(msgspec.Struct):
    request_id: str
    attempt: int
    seq: int


class _PieceLine(msgspec.Struct):
    data: _Piece


_piece_decoder = msgspec.json.Decoder(_PieceLine)


def _seen(given: str) -> tuple[int, int]:
    """The attempt and number of the last piece that a client has."""
    attempt, _, seq = given.partition(".")
    known = attempt.isascii() and attempt.isdigit() and seq.isascii() and seq.isdigit() and len(given) < 40
    return (int(attempt), int(seq)) if known else (0, -1)


def _interval(request: web.Request) -> float | None:
    """The seconds between two digests; None if the events themselves are wanted."""
    given = request.query.get("every")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not SHORTEST <= seconds <= LONGEST:
        raise InvalidData(f"every: {given[:50]!r} is no number of seconds from {SHORTEST} to {LONGEST:g}", path="every")
    return seconds


def _patterns(request: web.Request) -> list[str]:
    patterns = [one for given in request.query.getall("pattern", []) for one in given.split(",") if one]
    if len(patterns) > MOST_PATTERNS or any(len(one) > LONGEST_PATTERN for one in patterns):
        raise InvalidData(
            f"pattern: at most {MOST_PATTERNS} patterns of at most {LONGEST_PATTERN} characters", path="pattern"
        )
    return patterns


def _check_possible(envelope: Envelope, stream: EventStream | None) -> None:
    """Refuse features that need a lasting connection, if there is none.

    Raises:
        KsiError: it cannot be done by HTTP.
    """
    if envelope.replies == "v1":
        raise InvalidEnvelope("replies: HTTP answers in form v2 only", path="replies")
    if stream is not None:
        return
    if envelope.event in _OF_A_STREAM:
        raise InvalidEnvelope(f"{envelope.event} is about a connection that lasts: {_OF_A_STREAM[envelope.event]}")
    if envelope.event == "conversation:acquire_lock" and envelope.data.get("while_connected"):
        raise InvalidData(
            f"while_connected: a request by HTTP is no connection that lasts; give a `timeout`, or name the stream "
            f"of a `GET /v1/events` in the header {STREAM}",
            path="while_connected",
        )
    if envelope.event == "completion:wait" and envelope.data.get("stream"):
        raise InvalidData("stream: `GET /v1/requests/ID/stream` gives a request's pieces", path="stream")
