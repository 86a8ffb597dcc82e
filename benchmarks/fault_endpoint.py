"""A model's endpoint that can die: answers chat completions after a moment, until it is told otherwise.

`python -m benchmarks.fault_endpoint DELAY` serves on loopback and prints its port. Each line on stdin is how it
goes on: `well`, `fails` (HTTP 500 at once) or `hangs` (no word until the caller leaves). It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys

from benchmarks.endpoint_process import EndpointProcess

ANSWER = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"small","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"It is for this, and is often taken for that."},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":20,"completion_tokens":12,"total_tokens":32}}'
)
FAULT = b'{"error":{"message":"out of order","type":"server_error"}}'


class FaultEndpoint(EndpointProcess):
    """The endpoint as its user sees it."""

    def __init__(self, delay: float) -> None:
        """`delay` in seconds, before each answer."""
        super().__init__("benchmarks.fault_endpoint", str(delay))

    def be(self, way: str) -> None:
        """Go on in this way; calls under way stay as they are."""
        self.tell(way)


class _Server:
    """The endpoint itself."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._way = "well"

    async def run(self) -> None:
        """Serve until stdin ends."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=512)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        loop = asyncio.get_running_loop()
        words = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
        while word := await words.readline():
            self._way = word.decode().strip()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._read_request(reader):
                if self._way == "hangs":
                    await reader.read()  # nothing more comes but the end
                    break
                await self._answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the caller left
        finally:
            writer.close()

    async def _read_request(self, reader: asyncio.StreamReader) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.partition(b":")[2]))
        return True

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        status, body = b"500 Internal Server Error", FAULT
        if self._way == "well":
            await asyncio.sleep(self._delay)
            status, body = b"200 OK", ANSWER
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        writer.write(head + body)
        await writer.drain()


if __name__ == "__main__":
    asyncio.run(_Server(float(sys.argv[1])).run())
