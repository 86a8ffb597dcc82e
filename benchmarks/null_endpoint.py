"""An endpoint that answers chat completions at once, whole or as a stream, for as little as Python can.

`python -m benchmarks.null_endpoint` serves on loopback and prints its port. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys

from benchmarks.endpoint_process import EndpointProcess

_BODY = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"null","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Red, green and blue."},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":20,"completion_tokens":6,"total_tokens":26}}'
)
_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


def _frame(delta: bytes, reason: bytes) -> bytes:
    data = (
        b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"null","choices":[{"index":0,"delta":%b,'
        b'"finish_reason":%b}]}\n\n' % (delta, reason)
    )
    return b"%x\r\n%b\r\n" % (len(data), data)


_END = b"data: [DONE]\n\n"
_STREAM = b"".join(
    (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
        _frame(b'{"role":"assistant","content":"Red, "}', b"null"),
        _frame(b'{"content":"green and blue."}', b"null"),
        _frame(b"{}", b'"stop"'),
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(_END), _END),
    )
)


class NullEndpoint(EndpointProcess):
    """The endpoint as its user sees it."""

    def __init__(self) -> None:
        super().__init__("benchmarks.null_endpoint")


class _Connection(asyncio.Protocol):
    """One client's calls, one behind the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._said = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each call that is whole."""
        self._said += data
        while (end := self._said.find(b"\r\n\r\n")) >= 0:
            head = self._said[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
            body = self._said[end + 4 : end + 4 + size]
            if len(body) < size:
                return
            self._said = self._said[end + 4 + size :]
            assert self._transport is not None
            self._transport.write(_STREAM if b'"stream":true' in body.replace(b" ", b"") else _WHOLE)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    words = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    while await words.readline():
        pass


if __name__ == "__main__":
    asyncio.run(_serve())
