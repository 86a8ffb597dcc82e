"""A connection to the daemon by HTTP: each line is sent as a request, and pushes come as a stream."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from ksi.client.link import Link
from ksi.errors import ConnectionFailed, PayloadTooLarge
from ksi.protocol import LineReader

CONNECT_TIMEOUT = 1.0
"""Seconds for a connection; the daemon is on this machine or near."""

ANSWER_TIMEOUT = 10.0
"""Seconds for the head of the first answer."""

SILENCE = 60.0
"""Seconds without a sign of life after which the stream counts as lost; the daemon gives one every 15."""

STREAM = "x-ksi-stream"
_DATA = b"data: "


class _Said(msgspec.Struct):
    """The fields of a sent line that are needed here."""

    correlation_id: str | int | None = None
    event: str | None = None


async def dial_http(url: str, token: str, source: str, make: Callable[[], Link]) -> Link:
    """Connect to a daemon by HTTP; `source` names the origin of its address.

    Raises:
        ConnectionFailed: no daemon answers there, or the token is refused.
    """
    place = f"{url} (from {source})" if source else url
    if not token:
        raise ConnectionFailed(f"there is no token for {place}; set KSI_TOKEN")
    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT, sock_read=None),
        read_bufsize=256 * 1024,
    )
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            stream = await session.get(
                f"{url.rstrip('/')}/v1/events",
                timeout=aiohttp.ClientTimeout(connect=CONNECT_TIMEOUT, sock_read=SILENCE),
            )
        name = stream.headers.get(STREAM)
        if stream.status != 200 or name is None:
            raise ConnectionFailed(f"{place}: {await _words(stream)}")
    except TimeoutError:
        await session.close()
        raise ConnectionFailed(f"{place} does not answer") from None
    except (aiohttp.ClientError, ValueError) as error:
        await session.close()
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ConnectionFailed(f"no process listens at {place}: {reason}") from None
    except BaseException:
        await session.close()
        raise
    link = make()
    link.connection_made(_HttpTransport(link, session, f"{url.rstrip('/')}/v1/events", stream, name))
    return link


async def _words(answer: aiohttp.ClientResponse) -> str:
    """The reason for an error answer."""
    try:
        told = msgspec.json.decode(await answer.read())
        return str(told["error"]["message"])
    except (msgspec.MsgspecError, aiohttp.ClientError, TypeError, KeyError):
        return f"this is no KSI daemon (status {answer.status})"


class _HttpTransport(asyncio.Transport):
    """The connection, as a link sees it."""

    def __init__(
        self, link: Link, session: aiohttp.ClientSession, url: str, stream: aiohttp.ClientResponse, name: str
    ) -> None:
        super().__init__()
        self._link = link
        self._session = session
        self._url = url
        self._stream = stream
        self._headers = {STREAM: name, "Content-Type": "application/json"}
        self._closing = False
        self._fault: OSError | None = None
        self._posts: set[asyncio.Task[None]] = set()
        self._reading = asyncio.get_running_loop().create_task(self._read(), name="ksi-client-stream")

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send lines, each by itself: they are answered in any order, as by the socket."""
        for line in bytes(data).splitlines():
            post = asyncio.get_running_loop().create_task(self._post(line), name="ksi-client-post")
            self._posts.add(post)
            post.add_done_callback(self._posts.discard)

    def is_closing(self) -> bool:
        """True if it is closing."""
        return self._closing

    def abort(self) -> None:
        """End it now."""
        if not self._closing:
            self._closing = True
            self._reading.cancel()

    async def _post(self, line: bytes) -> None:
        try:
            async with self._session.post(self._url, data=line, headers=self._headers) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._lose(error)
            return
        if not self._closing:
            self._link.data_received(_addressed(body, answer.status, line))

    async def _read(self) -> None:
        """Pass on pushes until the stream ends; the link then has ended too."""
        lines = LineReader(1 << 62)  # the link keeps the limit
        try:
            async for data in self._stream.content.iter_any():
                for line in lines.feed(data):
                    if not isinstance(line, PayloadTooLarge) and line.startswith(_DATA):
                        self._link.data_received(line.removeprefix(_DATA) + b"\n")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._fault = self._fault or ConnectionError(str(error) or "the stream was silent")
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._closing = True
            for post in self._posts:
                post.cancel()
            self._stream.close()
            await self._session.close()
            self._link.connection_lost(self._fault)

    def _lose(self, error: BaseException) -> None:
        self._fault = self._fault or ConnectionError(str(error) or "no connection")
        self.abort()


def _addressed(body: bytes, status: int, asked: bytes) -> bytes:
    """An answer as a line for its sender: one refused at the HTTP level names no event."""
    said = msgspec.json.decode(asked, type=_Said)
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError:
        answer = {"error": {"code": "internal_error", "message": f"no answer of a KSI daemon (status {status})"}}
    if answer.get("correlation_id") == said.correlation_id:
        return body if body.endswith(b"\n") else body + b"\n"
    return msgspec.json.encode({**answer, "event": said.event, "correlation_id": said.correlation_id}) + b"\n"
