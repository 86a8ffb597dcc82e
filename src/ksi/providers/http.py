"""One HTTP endpoint of a model: its session, its time limits, and each fault on the way turned into a ProviderError."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import Any, Protocol

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Chunk, Completion
from ksi.providers.faults import refusal
from ksi.providers.http_checks import Credential, base_url, check_headers, proxy_url, secrets
from ksi.providers.sse import SseEvent, SseParser, SseTooLong

_LARGE_BODY = 512 * 1024
"""Request bodies over this are handed to the socket in pieces, so that one prompt does not hold the loop."""
_DRAIN = 0.25
"""Seconds that an endpoint gets to close its stream properly after the last event, so that the connection can be used
again; one that keeps it open loses the connection, and nothing else."""
_ERROR_BODY = 5.0
"""Seconds that an error body may take; after that the status alone has to do."""
_MOST_TOKENS = 2**53
_LONGEST_MESSAGE = 600
"""Characters of an endpoint's own words that an error message repeats."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits of a call, in seconds (F7).

    `connect` until the connection stands, `idle` between two pieces of a streamed answer and before its first, `total`
    for the whole call. An answer in one piece is silent until it is whole, so only `connect` and `total` bind it.
    """

    total: float = 600.0
    idle: float = 120.0
    connect: float = 10.0


class Streaming(StrEnum):
    """When the answer is fetched in pieces."""

    ASKED = "asked"
    """Where somebody reads the pieces; other calls take the faster way of one JSON body."""
    ALWAYS = "always"
    """In every call: silence then always means a fault, and endpoints that only stream can be used."""
    NEVER = "never"
    """In none, for endpoints that cannot."""

    def wanted(self, asked: bool) -> bool:
        """Whether a call is sent as a streaming one."""
        return self is Streaming.ALWAYS or (asked and self is Streaming.ASKED)


class Reply(Protocol):
    """An answer that arrives in pieces, being put together. Raises ProviderError for what is no answer."""

    done: bool
    """Whether the last event was seen."""

    def feed(self, event: SseEvent) -> str:
        """Take an event in, give the text that it brought."""
        ...

    def finish(self) -> Completion:
        """The whole, when no more events come."""
        ...


class Dialect(Protocol):
    """How one API writes its answers. Raises ProviderError for what is no answer."""

    def whole(self, body: bytes) -> Completion:
        """An answer in one piece."""
        ...

    def reply(self) -> Reply:
        """Begin an answer in pieces."""
        ...


class Endpoint:
    """A base URL with one session for all calls to it.

    A call is one POST: no redirects, no cookies, no second try (F2). No message of it contains the API key or the value
    of a header (S3).
    """

    def __init__(
        self,
        provider: str,
        url: str,
        *,
        clock: Clock,
        credential: Credential | None = None,
        own_headers: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        proxy: str | None = None,
        body_limit: int = 64 * 1024 * 1024,
    ) -> None:
        """`provider` names it in errors. `own_headers` are the API's; `headers` are the user's, win over the API's, and
        are secrets as the key is. `body_limit` is the largest answer, in bytes.

        Raises:
            ConfigError: the URL, the proxy or a header cannot be used.
        """
        self.provider = provider
        self._base = base_url(provider, url)
        self._clock = clock
        self._credential = credential or Credential()
        check_headers(provider, headers or {})
        self._headers: CIMultiDict[str] = CIMultiDict({"Content-Type": "application/json"})
        self._headers.update(own_headers or {})
        self._headers.update(headers or {})
        self._timeouts = timeouts or Timeouts()
        self._proxy = proxy_url(provider, proxy)
        self._body_limit = body_limit
        self._secrets = secrets(self._credential, (headers or {}).values(), self._base, self._proxy)
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._account_problem: str | None = None
        limits = self._timeouts
        self._whole_timeout = aiohttp.ClientTimeout(total=limits.total, connect=limits.connect)
        self._stream_timeout = aiohttp.ClientTimeout(total=limits.total, connect=limits.connect, sock_read=limits.idle)

    async def start(self) -> None:
        """Make the session. How many calls run at once is the queue's decision, so the pool has no limit."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=self._whole_timeout,
            proxy=self._proxy,
        )

    async def stop(self) -> None:
        """Close all connections; calls still running end with `network_error`."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def problem(self) -> str | None:
        """A missing key, or what the endpoint last said about the account, until a call succeeds."""
        return self._credential.problem or self._account_problem

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

    async def complete(
        self, url: URL, body: Mapping[str, Any], dialect: Dialect, *, pieces: bool
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """One call: Chunks while an answer comes in pieces, then the Completion.

        `pieces`: whether an answer that came whole is to be a Chunk too. Closing the iterator closes the connection.

        Raises:
            ProviderError: with its class.
        """
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._post(url, body)
            if response.status != 200:
                raise await self._refused(response)
            if _is_stream(response, asked=bool(body.get("stream"))):
                reply = dialect.reply()
                async with aclosing(self._chunks(response.content, reply)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                completion = reply.finish()
                await _drain(response)
            else:
                completion = dialect.whole(await self._read(response))
                if pieces and completion.text:
                    yield Chunk(completion.text)
            self._account_problem = None
            yield completion
        except ProviderError as error:
            raise self._told(error) from None
        except (aiohttp.ClientError, OSError, SseTooLong) as fault:
            raise self._told(self._fault(fault, url)) from None
        finally:
            if response is not None:
                response.close()

    async def _chunks(self, content: aiohttp.StreamReader, reply: Reply) -> AsyncGenerator[Chunk, None]:
        """A stream's text as it comes, up to its last event, its end, or its fault."""
        parser, size = SseParser(self._body_limit), 0
        while not reply.done:
            data, fault = await _arriving(content)
            text, error = _take(reply, parser.feed(data))
            if text:
                self._allow(size := size + len(text))
                yield Chunk(text)
            if error is not None:
                raise error
            if fault is not None and not reply.done:
                raise fault
            if not data:
                return

    async def _post(self, url: URL, body: Mapping[str, Any]) -> aiohttp.ClientResponse:
        if self._credential.problem is not None:
            raise ProviderError(FailureClass.AUTHENTICATION, self._credential.problem)
        if self._session is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "it was not started, or is stopped already")
        try:
            data = msgspec.json.encode(body)
        except (TypeError, ValueError) as fault:
            raise ProviderError(
                FailureClass.INVALID_REQUEST, f"the request cannot be written as JSON: {fault}"
            ) from None
        return await self._session.post(
            url,
            data=data if len(data) <= _LARGE_BODY else io.BytesIO(data),
            timeout=self._stream_timeout if body.get("stream") else self._whole_timeout,
            allow_redirects=False,
        )

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body, untouched."""
        parts: list[bytes] = []
        size = 0
        while part := await response.content.readany():
            parts.append(part)
            self._allow(size := size + len(part))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _allow(self, size: int) -> None:
        if size > self._body_limit:
            raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is larger than {self._body_limit} bytes")

    async def _refused(self, response: aiohttp.ClientResponse) -> ProviderError:
        try:
            async with asyncio.timeout(_ERROR_BODY):
                body = await self._read(response)
        except (aiohttp.ClientError, OSError):
            body = b""
        now = self._clock.now().unix
        return refusal(response.status, response.reason, response.headers, body, now=now)

    def _fault(self, fault: Exception, url: URL) -> ProviderError:
        """What went wrong on the way, as F1 sees it."""
        limits = self._timeouts
        place = f"{url.scheme}://{url.host}:{url.port}"
        match fault:
            case aiohttp.ConnectionTimeoutError():
                return _timeout(f"no connection to {place} within {limits.connect:g} s")
            case aiohttp.SocketTimeoutError():
                return _timeout(f"nothing came for {limits.idle:g} s; the endpoint or the way to it hangs")
            case TimeoutError():
                return _timeout(f"the answer was not whole after {limits.total:g} s")
            case aiohttp.ClientHttpProxyError():
                return _network(f"the proxy refused: {fault.status} {fault.message}")
            case aiohttp.ClientResponseError() | SseTooLong():
                said = fault.message if isinstance(fault, aiohttp.ClientResponseError) else str(fault)
                return ProviderError(FailureClass.PROVIDER_ERROR, f"what {place} answered cannot be read: {said}")
            case aiohttp.ClientPayloadError():
                return _network("the connection broke in the middle of the answer")
            case aiohttp.ClientConnectorCertificateError():
                return _network(f"the certificate of {place} is not trusted: {fault.certificate_error}")
            case aiohttp.ClientConnectorError():
                return _network(f"no connection to {place}: {fault.os_error.strerror or fault.os_error}")
            case aiohttp.ServerDisconnectedError():
                return _network(f"{place} closed the connection before it answered")
            case _:
                return _network(f"the connection to {place} broke: {fault}")

    def _told(self, error: ProviderError) -> ProviderError:
        """The error with the provider's name, without its secrets, and noted where it concerns the account."""
        message = " ".join(error.message.split())
        for secret in self._secrets:
            message = message.replace(secret, "***")
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        if error.failure is FailureClass.AUTHENTICATION or "(insufficient_quota)" in message:
            self._account_problem = message
        return ProviderError(
            error.failure,
            f"{self.provider}: {message}",
            retry_after=error.retry_after,
            status=getattr(error, "status", None),
            provider=self.provider,
        )


async def _arriving(content: aiohttp.StreamReader) -> tuple[bytes, Exception | None]:
    """What comes next, empty at the end, and the fault that the body broke with behind it."""
    try:
        return await content.readany(), None
    except (aiohttp.ClientError, OSError) as fault:
        # A reader that has a fault gives nothing but the fault, whatever came before it: so it is well for a moment.
        content.set_exception(None)  # type: ignore[arg-type]  # as a reader has it that is well
        rest = content.read_nowait()
        content.set_exception(fault)
        return rest, fault


def _take(reply: Reply, events: Sequence[SseEvent]) -> tuple[str, ProviderError | None]:
    """The text that events brought, and the error behind it."""
    texts: list[str] = []
    for event in events:
        try:
            texts.append(reply.feed(event))
        except ProviderError as error:
            return "".join(texts), error
        if reply.done:
            break
    return "".join(texts), None


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read to the end of a stream whose last event was seen. What fails here takes nothing from the answer."""
    if response.content.at_eof():
        return
    try:
        async with asyncio.timeout(_DRAIN):
            while await response.content.readany():
                pass
    except (aiohttp.ClientError, OSError):
        response.close()


def _is_stream(response: aiohttp.ClientResponse, asked: bool) -> bool:
    """Whether the answer comes as events: it says so, or events were asked for and it says nothing else."""
    kind = response.content_type
    return kind == "text/event-stream" or (asked and kind not in ("application/json", "text/html"))


def _timeout(message: str) -> ProviderError:
    return ProviderError(FailureClass.TIMEOUT, message)


def _network(message: str) -> ProviderError:
    return ProviderError(FailureClass.NETWORK_ERROR, message)


def counts(*tokens: int) -> bool:
    """Whether all of these can be numbers of tokens; a usage report that fails this is none (T1)."""
    return all(0 <= number < _MOST_TOKENS for number in tokens)
