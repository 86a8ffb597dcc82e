"""Anthropic's messages as one scripted model speaks them, for Claude Code; it tells how long each answer took itself.

`python -m benchmarks.claude_endpoint PIECES PAUSE` serves on loopback and prints its port. An answer is a stream
of so many pieces with a pause before each. A line on stdin is answered with the times of the answers since the last
such line, from a whole request to the answer's last byte: a JSON list of nanoseconds. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from itertools import count
from typing import Any

from benchmarks.endpoint_process import EndpointProcess

MESSAGES = "/v1/messages"


class ClaudeEndpoint(EndpointProcess):
    """The endpoint as its user sees it."""

    def __init__(self, pieces: int, pause: float) -> None:
        """`pause` in seconds."""
        super().__init__("benchmarks.claude_endpoint", str(pieces), str(pause))

    def took(self) -> list[int]:
        """The answers since the last time it was asked, each in nanoseconds."""
        self.tell("")
        times: list[int] = json.loads(self.hear())
        return times


class _Server:
    """The endpoint itself."""

    def __init__(self, pieces: int, pause: float) -> None:
        self._pieces = pieces
        self._pause = pause
        self._numbers = count(1)
        self._times: list[int] = []

    async def run(self) -> None:
        """Serve until stdin ends."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._say(server.sockets[0].getsockname()[1])
        words = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
        while await words.readline():
            self._say(self._times)
            self._times = []

    def _say(self, value: object) -> None:
        sys.stdout.write(f"{json.dumps(value)}\n")
        sys.stdout.flush()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while path := await self._read_request(reader):
                if path.partition("?")[0] == MESSAGES:
                    await self._answer(writer)
                else:  # Claude Code asks for more than it needs
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the caller left
        finally:
            writer.close()

    async def _read_request(self, reader: asyncio.StreamReader) -> str | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        for line in head.lower().split("\r\n"):
            if line.startswith("content-length:"):
                await reader.readexactly(int(line.partition(":")[2]))
        return head.split(" ", 2)[1]

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        begun = time.monotonic_ns()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        message: dict[str, Any] = {
            "id": f"msg_{next(self._numbers)}",
            "type": "message",
            "role": "assistant",
            "model": "claude-haiku-4-5",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 20, "output_tokens": 1},
        }
        self._send(writer, "message_start", message=message)
        self._send(writer, "content_block_start", index=0, content_block={"type": "text", "text": ""})
        for number in range(self._pieces):
            await asyncio.sleep(self._pause)
            self._send(writer, "content_block_delta", index=0, delta={"type": "text_delta", "text": f"word {number}, "})
        self._send(writer, "content_block_stop", index=0)
        self._send(
            writer,
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": 3 * self._pieces},
        )
        self._send(writer, "message_stop")
        writer.write(b"0\r\n\r\n")
        self._times.append(time.monotonic_ns() - begun)
        await writer.drain()

    def _send(self, writer: asyncio.StreamWriter, kind: str, **data: Any) -> None:
        event = f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))


if __name__ == "__main__":
    asyncio.run(_Server(int(sys.argv[1]), float(sys.argv[2])).run())
