"""One HTTP endpoint of a model: its session, its calls, and each fault on the way turned into a ProviderError."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from enum import StrEnum
from types import SimpleNamespace
from typing import Any, Protocol

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from ksi.clock import Clock, microseconds
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Chunk, Completion, Frame, Piece, ToolPiece, piece_of
from ksi.providers.faults import LONGEST_ERROR, ReportedError, refusal, reported
from ksi.providers.http.access import Access, Credential, Timeouts, check_headers, keepalive_socket, secrets
from ksi.providers.http.network_faults import broken_way, idle
from ksi.providers.http.sse import SseEvent, SseParser, SseTooLong
from ksi.providers.json_text import is_json
from ksi.providers.masking import masked

MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of an answer, at most."""
_LARGE_BODY = 512 * 1024
"""Request bodies over this are handed to the socket in pieces, so that one prompt does not hold the loop."""
_DRAIN = 0.25
"""Seconds that an endpoint gets to close its stream properly after the last event, so that the connection can be used
again; one that keeps it open loses the connection, and nothing else."""
_ERROR_BODY = 5.0
"""Seconds that an error body may take; after that the status alone has to do."""
_MOST_BLANKS = 64 * 1024
"""Blank bytes before a body's beginning after which its form is judged without it."""
_STALE = 5.0
"""Seconds within which a reused connection that the endpoint had closed shows it. An endpoint that breaks off later has
perhaps worked on the call."""
_LOGIN_CHECK = 10.0
"""Seconds that the check of a login may take."""
_LONGEST_HEADER = 64 * 1024
"""Bytes of one header of an answer; gateways add policies, traces and cookies."""
_MOST_HEADERS = 1_000
_LONGEST_MESSAGE = 600
"""Characters of an endpoint's own words that an error message repeats."""
_EVENTS = re.compile(rb"(?:data|event|id|retry)?:")
"""How a stream of events begins."""

_TOLD = (ProviderError, ReportedError)
"""Errors reported by the endpoint, or in its answer; all others concern the path to it."""


class Streaming(StrEnum):
    """When the answer is fetched in pieces."""

    ASKED = "asked"
    """True if a client reads the pieces; other calls use the faster way of one JSON body."""
    ALWAYS = "always"
    """In every call: silence then always means a fault, and endpoints that only stream can be used."""
    NEVER = "never"
    """In none, for endpoints that cannot."""

    def wanted(self, asked: bool) -> bool:
        """Return True if a call is sent as a streaming one."""
        return self is Streaming.ALWAYS or (asked and self is Streaming.ASKED)


class Continuation(msgspec.Struct, frozen=True):
    """The answer is incomplete: it continues in another call with this body. `text` is this part of it."""

    body: Mapping[str, Any]
    text: str


class Reply(Protocol):
    """An answer that arrives in pieces, being put together. Raises ProviderError or ReportedError if it is none."""

    done: bool
    """True once the last event was seen."""
    ended: bool
    """True once the answer has ended, so that only counts can still come."""

    def feed(self, event: SseEvent) -> Sequence[Piece] | None:
        """Take an event in, give the pieces that it brought; None for an event that is no part of the answer."""
        ...

    def rest(self) -> Sequence[Piece]:
        """The pieces that were held back, when no more events come."""
        ...

    def finish(self) -> Completion | Continuation:
        """The whole, when no more events come."""
        ...


class Dialect(Protocol):
    """How one API writes the answers of one call. Raises ProviderError or ReportedError if it is no answer."""

    def whole(self, body: bytes) -> Completion | Continuation:
        """An answer in one piece."""
        ...

    def reply(self) -> Reply:
        """Begin an answer in pieces."""
        ...


class Endpoint:
    """A base URL with one session for all calls to it.

    A call is one POST: no redirects, no cookies, no second try. There are two exceptions: an answer that continues in
    another call, and a kept connection that turns out to be closed, so that the call never arrived. No message holds
    the API key or the value of a header.
    """

    def __init__(
        self,
        provider: str,
        base: URL,
        *,
        clock: Clock,
        credential: Credential | None = None,
        timeouts: Timeouts | None = None,
        access: Access | None = None,
    ) -> None:
        """`provider` names it in errors; `base` is a base URL as `ksi.providers.http.access.base_url` gives it.

        Raises:
            ConfigError: a header cannot be used.
        """
        self.provider = provider
        self._base = base
        self._clock = clock
        self._credential = credential or Credential()
        check_headers(provider, self._credential.headers)
        self._headers: CIMultiDict[str] = CIMultiDict({"Content-Type": "application/json"})
        self._headers.update(self._credential.own_headers)
        self._headers.update(self._credential.headers)
        self._timeouts = timeouts or Timeouts()
        self._access = access or Access()
        self._secrets = secrets(self._credential, self._base, self._access.proxy)
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._last_problem: str | None = None
        limits = self._timeouts
        self._whole_timeout = aiohttp.ClientTimeout(total=limits.total, connect=limits.connect)
        self._stream_timeout = aiohttp.ClientTimeout(total=limits.total, connect=limits.connect, sock_read=limits.idle)

    async def start(self) -> None:
        """Make the session. How many calls run at once is the queue's decision, so the pool has no limit."""
        self._session = self._new_session(keep=True)
        self._fresh = self._new_session(keep=False)

    def _new_session(self, *, keep: bool) -> aiohttp.ClientSession:
        """`keep`: with connections that are kept for the next call."""
        noting = aiohttp.TraceConfig()
        noting.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                ttl_dns_cache=60,
                force_close=not keep,
                ssl=self._access.tls,
                socket_factory=keepalive_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=self._whole_timeout,
            proxy=self._access.proxy,
            trace_configs=[noting],
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
            max_headers=_MOST_HEADERS,
        )

    async def stop(self) -> None:
        """Close all connections; calls still running end with `network_error`."""
        sessions, self._session, self._fresh = (self._session, self._fresh), None, None
        for session in sessions:
            if session is not None:
                await session.close()

    def problem(self) -> str | None:
        """The last problem, until a call succeeds: a missing key, an unusable environment, or the endpoint's last word
        about the account."""
        return self._credential.problem or self._access.problem or self._last_problem

    @property
    def host(self) -> str | None:
        """The base URL's host."""
        return self._base.host

    @property
    def path(self) -> str:
        """The base URL's own path, without a slash at its end."""
        return self._base.path.rstrip("/")

    def url(self, path: str) -> URL:
        """The base URL with `path` behind its own path; its query is kept."""
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._base.joinpath(*path.split("/")).with_query(self._base.query)
        return url

    # -- calls --------------------------------------------------------------------------------------------------------

    async def complete(
        self,
        url: URL,
        body: Mapping[str, Any],
        dialect: Dialect,
        *,
        pieces: bool,
        frames: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Piece | Frame | Completion, None]:
        """One call: pieces while an answer comes in pieces, then the Completion.

        With `pieces`, an answer that came whole is a Chunk too. With `frames`, each event comes as it was, before its
        pieces. `headers` are the call's own. Closing the iterator closes the connection.

        Raises:
            ProviderError: with its class.
        """
        following: Mapping[str, Any] | None = body
        while following is not None:
            exchange = self._exchange(url, following, dialect, pieces=pieces, frames=frames, headers=headers)
            async with aclosing(exchange) as items:
                following = None
                async for item in items:
                    if isinstance(item, Continuation):
                        following = item.body
                    else:
                        yield item

    async def _exchange(
        self,
        url: URL,
        body: Mapping[str, Any],
        dialect: Dialect,
        *,
        pieces: bool,
        frames: bool,
        headers: Mapping[str, str] | None,
    ) -> AsyncGenerator[Piece | Frame | Completion | Continuation, None]:
        """One POST and its answer."""
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._post(url, body, headers)
            arrivals = _Arrivals(response.content)
            if not 200 <= response.status < 300:
                raise await self._refused(response, arrivals, body)
            asked = bool(body.get("stream"))
            if is_stream(await self._opening(arrivals, asked=asked), response.content_type, asked=asked):
                reply = dialect.reply()
                async with aclosing(self._pieces(arrivals, reply, frames=frames)) as items:
                    async for item in items:
                        yield item
                ended = reply.finish()
                await _drain(response, at_end=reply.done)
            else:
                ended = await self._whole(arrivals, dialect.whole)
                if pieces and not frames:
                    for piece in _whole_pieces(ended):
                        yield piece
            self._last_problem = None
            yield ended
        except ReportedError as report:
            headers = response.headers if response is not None else {}
            model = str(body.get("model", ""))
            raise self._told(reported(report.body, headers, now=self._clock.now().unix, model=model)) from None
        except ProviderError as error:
            raise self._told(error) from None
        except (aiohttp.ClientError, OSError, SseTooLong) as fault:
            raise self._told(broken_way(fault, url, self._timeouts)) from None
        finally:
            if response is not None:
                response.close()

    async def login_works(self, path: str) -> bool | None:
        """Return True if the endpoint takes the key, by a GET of `path`, which costs nothing; None if it does not
        tell."""
        if self._session is None or self._access.problem is not None:
            return None
        if self._credential.problem is not None:
            return False
        try:
            async with self._session.get(
                self.url(path),
                timeout=aiohttp.ClientTimeout(total=_LOGIN_CHECK),
                allow_redirects=False,
                trace_request_ctx=_Use(),
            ) as response:
                status = response.status
        except (aiohttp.ClientError, OSError):
            return None
        if status == 200:
            self._last_problem = None
            return True
        return False if status in (401, 403) else None

    # -- sending ------------------------------------------------------------------------------------------------------

    async def _post(
        self, url: URL, body: Mapping[str, Any], headers: Mapping[str, str] | None
    ) -> aiohttp.ClientResponse:
        """Send a call. On a kept connection that the endpoint had closed meanwhile it goes out once more, on a new one:
        nothing of an answer came, so it did not arrive."""
        if self._credential.problem is not None:
            raise ProviderError(FailureClass.AUTHENTICATION, self._credential.problem)
        if self._access.problem is not None:
            raise ProviderError(FailureClass.INVALID_REQUEST, self._access.problem)
        if self._session is None or self._fresh is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "it was not started, or is stopped already")
        try:
            data = msgspec.json.encode(body)
        except (TypeError, ValueError) as fault:
            raise ProviderError(
                FailureClass.INVALID_REQUEST, f"the request cannot be written as JSON: {fault}"
            ) from None
        timeout = self._stream_timeout if body.get("stream") else self._whole_timeout
        use = _Use()
        began = self._clock.now().mono
        try:
            return await _send(self._session, url, data, timeout, use, headers)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as fault:
            late = self._clock.now().mono - began > microseconds(_STALE)
            if late or not use.reused or not _came_to_nothing(fault):
                raise
        return await _send(self._fresh, url, data, timeout, use, headers)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def _opening(self, arrivals: _Arrivals, *, asked: bool) -> bytes:
        """The first bytes of a body that are more than blanks; nothing is taken from it."""
        limit = asyncio.timeout(self._timeouts.idle if asked else None)
        try:
            async with limit:
                return await arrivals.opening()
        except TimeoutError:
            if not limit.expired():
                raise
            raise idle(self._timeouts) from None

    async def _pieces(self, arrivals: _Arrivals, reply: Reply, *, frames: bool) -> AsyncGenerator[Piece | Frame, None]:
        """A stream's pieces as they come, up to its last event, its end, or its fault.

        Behind the end of the answer the stream gets a moment for its counts. A fault then takes nothing away, and an
        error takes away no text.
        """
        parser, size, more = SseParser(MAX_ANSWER), 0, True
        while more and not reply.done:
            items: list[Piece | Frame] = []
            limit = asyncio.timeout(self._timeouts.end if reply.ended else self._timeouts.idle)
            try:
                async with limit:
                    error, more = await _progress(arrivals, parser, reply, items, frames=frames)
            except TimeoutError as fault:
                # Either this limit or that of the whole call, which aiohttp keeps.
                more = False
                error = idle(self._timeouts) if limit.expired() and not reply.ended else fault
            if not more:
                items += reply.rest()
            for item in items:
                if not isinstance(item, Frame):
                    self._allow(size := size + _size(item))
                yield item
            if error is not None and not (reply.ended and (size or not isinstance(error, _TOLD))):
                raise error

    async def _whole(
        self, arrivals: _Arrivals, read: Callable[[bytes], Completion | Continuation]
    ) -> Completion | Continuation:
        """An answer in one piece. One that is whole stands, even if its framing promised more."""
        body, fault = await self._read(arrivals, MAX_ANSWER + 1)
        self._allow(len(body))
        if fault is not None and not is_json(body):
            raise fault
        return read(body)

    async def _read(self, arrivals: _Arrivals, most: int) -> tuple[bytes, Exception | None]:
        """A body without blanks before it, and the fault that it broke with; no more than the piece that goes over
        `most` bytes. Blanks are sent by the megabyte to keep a connection awake, and take long to read over.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            part, fault = await arrivals.next()
            if parts or not part.isspace():
                parts.append(part)
            size += len(part)
            if fault is not None or not part or size >= most:
                return b"".join(parts), fault

    def _allow(self, size: int) -> None:
        if size > MAX_ANSWER:
            raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is larger than {MAX_ANSWER} bytes")

    async def _refused(
        self, response: aiohttp.ClientResponse, arrivals: _Arrivals, asked: Mapping[str, Any]
    ) -> ProviderError:
        body = b""
        try:
            async with asyncio.timeout(_ERROR_BODY):
                body, _ = await self._read(arrivals, LONGEST_ERROR)
        except TimeoutError:
            pass  # the status speaks
        return refusal(
            response.status,
            response.reason,
            response.headers,
            body,
            now=self._clock.now().unix,
            model=str(asked.get("model", "")),
        )

    def _told(self, error: ProviderError) -> ProviderError:
        """The error with the provider's name, without its secrets, and noted if only its owner can mend it."""
        message = masked(" ".join(error.message.split()), self._secrets)
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        if error.failure in (FailureClass.AUTHENTICATION, FailureClass.BILLING):
            self._last_problem = message
        return ProviderError(
            error.failure,
            f"{self.provider}: {message}",
            retry_after=error.retry_after,
            status=error.facts.get("status"),
            provider=self.provider,
            limited_models=error.limited_models,
            limit_window=error.limit_window,
            unserved=error.unserved,
        )


class _Use:
    """The outcome of one sending."""

    reused = False
    """True if it went out on a connection that had carried calls before."""


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
    context.trace_request_ctx.reused = True


async def _send(
    session: aiohttp.ClientSession,
    url: URL,
    data: bytes,
    timeout: aiohttp.ClientTimeout,
    use: _Use,
    headers: Mapping[str, str] | None,
) -> aiohttp.ClientResponse:
    return await session.post(
        url,
        data=data if len(data) <= _LARGE_BODY else io.BytesIO(data),
        headers=headers,
        timeout=timeout,
        allow_redirects=False,
        trace_request_ctx=use,
    )


def _came_to_nothing(fault: aiohttp.ServerDisconnectedError | aiohttp.ClientOSError) -> bool:
    """Return True if not a byte of an answer came: then the fault holds no part of a head."""
    return not isinstance(fault, aiohttp.ServerDisconnectedError) or isinstance(fault.message, str)


class _Arrivals:
    """A body's bytes as they come."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._seen: tuple[bytes, Exception | None] | None = None

    async def next(self) -> tuple[bytes, Exception | None]:
        """The next bytes, empty at the end, and the fault that the body broke with behind them."""
        if self._seen is not None:
            seen, self._seen = self._seen, None
            return seen
        return await _arriving(self._content)

    async def opening(self) -> bytes:
        """The first bytes that are more than blanks, or many blanks; they stay to be taken."""
        parts: list[bytes] = []
        size, fault, more = 0, None, True
        while more:
            part, fault = await _arriving(self._content)
            parts.append(part)
            size += len(part)
            more = bool(part) and fault is None and size < _MOST_BLANKS and not part.strip()
        data = b"".join(parts)
        self._seen = (data, fault)
        return data


async def _arriving(content: aiohttp.StreamReader) -> tuple[bytes, Exception | None]:
    """The next bytes, empty at the end, and the fault with which the body broke after them."""
    try:
        return await content.readany(), None
    except (aiohttp.ClientError, OSError) as fault:
        # A reader that has a fault gives nothing but the fault, whatever came before it: so it is well for a moment.
        content.set_exception(None)  # type: ignore[arg-type]  # as a reader has it that is well
        rest = content.read_nowait()
        content.set_exception(fault)
        return rest, fault


async def _progress(
    arrivals: _Arrivals, parser: SseParser, reply: Reply, into: list[Piece | Frame], *, frames: bool
) -> tuple[Exception | None, bool]:
    """Read until something of the answer comes: the error behind it, and whether there can be more.

    Comments and pings are no progress, however many come.
    """
    while True:
        data, fault = await arrivals.next()
        error, moved = _take(reply, parser.feed(data), into, frames=frames)
        more = bool(data) and fault is None
        if moved or error is not None or not more:
            return error or fault, more and error is None


def _take(
    reply: Reply, events: Sequence[SseEvent], into: list[Piece | Frame], *, frames: bool
) -> tuple[Exception | None, bool]:
    """Take events in: the error behind them, and whether they were a part of the answer.

    Neighbouring pieces of text become one.
    """
    moved = False
    for event in events:
        try:
            pieces = reply.feed(event)
        except _TOLD as error:
            return error, True
        if pieces is not None:
            moved = True
            if frames:
                into.append(Frame(event.event, event.data))
            for piece in pieces:
                last = into[-1] if into else None
                if isinstance(piece, Chunk) and isinstance(last, Chunk):
                    into[-1] = Chunk(last.text + piece.text)
                elif not isinstance(piece, Chunk) or piece.text:
                    into.append(piece)
        if reply.done:
            break
    return None, moved


def _whole_pieces(ended: Completion | Continuation) -> list[Piece]:
    """An answer that came whole, as pieces."""
    if isinstance(ended, Continuation) or not ended.content:
        return [Chunk(ended.text)] if ended.text else []
    return [piece for piece in map(piece_of, ended.content) if piece is not None]


def _size(piece: Piece) -> int:
    return len(piece.json) if isinstance(piece, ToolPiece) else len(piece.text)


async def _drain(response: aiohttp.ClientResponse, *, at_end: bool) -> None:
    """Read to the end of a stream whose last event was seen. A failure here takes nothing from the answer."""
    if response.content.at_eof() or not at_end:
        return
    try:
        async with asyncio.timeout(_DRAIN):
            while await response.content.readany():
                pass
    except (aiohttp.ClientError, OSError):
        response.close()


def is_stream(opening: bytes, content_type: str, *, asked: bool) -> bool:
    """Return True if a body holds events. Its first bytes say so, whatever its type is called. The type decides if they
    leave it open: events were asked for, and it says nothing else."""
    start = opening.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"{", b"[", b"<")):
        return False
    if _EVENTS.match(start):
        return True
    asked = asked and bool(start)
    return content_type == "text/event-stream" or (asked and content_type not in ("application/json", "text/html"))
