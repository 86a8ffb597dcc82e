"""Callers by HTTP that cost little: a process of its own (`python -m benchmarks.http_load`).

It reads a job as one line of JSON on stdin and prints what it measured as one line on stdout. Each connection sends its
next call when the last one is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import msgspec

from benchmarks.figures import Times
from ksi.errors import InternalError

PATIENCE = 60.0
"""Seconds without an answer after which the run is given up."""


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """Call for so long, over so many connections."""

    port: int
    path: str
    token: str
    body: str
    connections: int
    warm_up: float
    """Seconds, not counted."""
    seconds: float


class Called(msgspec.Struct, frozen=True, kw_only=True):
    """What the calls took, from sending to the first byte of the body, and to the last."""

    first: Times
    whole: Times
    per_second: float
    calls: int
    """All of them, those of the warm-up included."""


async def call(job: Calls) -> Called:
    """Do the job.

    Raises:
        InternalError: an answer was no 200, or none came.
    """
    request = (
        f"POST {job.path} HTTP/1.1\r\nHost: 127.0.0.1:{job.port}\r\nAuthorization: Bearer {job.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(job.body.encode())}\r\n\r\n{job.body}"
    ).encode()
    begins = time.monotonic_ns() + round(job.warm_up * 1e9)
    ends = begins + round(job.seconds * 1e9)
    firsts: list[int] = []
    wholes: list[int] = []
    calls = 0

    async def connection() -> None:
        nonlocal calls
        reader, writer = await asyncio.open_connection("127.0.0.1", job.port)
        with contextlib.closing(writer):
            while (sent := time.monotonic_ns()) < ends or not wholes:  # one at least, however slow it is
                writer.write(request)
                first, last = await asyncio.wait_for(_answer(reader), PATIENCE)
                calls += 1
                if sent >= begins:
                    firsts.append(first - sent)
                    wholes.append(last - sent)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(job.connections):
            tasks.create_task(connection())
    took = (time.monotonic_ns() - begins) / 1e9
    return Called(first=Times.of(firsts), whole=Times.of(wholes), per_second=len(wholes) / took, calls=calls)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, int]:
    """When the first and the last byte of a body came."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise InternalError(f"a call was answered by {head.splitlines()[0].decode('latin-1')}")
    at = head.find(b"content-length:")
    if at >= 0:
        await reader.readexactly(int(head[at + 15 :].partition(b"\r\n")[0]))
        now = time.monotonic_ns()
        return now, now
    first = 0
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
        first = first or time.monotonic_ns()
    await reader.readexactly(2)
    return first, time.monotonic_ns()


if __name__ == "__main__":
    given = msgspec.json.decode(sys.stdin.buffer.readline(), type=Calls)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(call(given))) + b"\n")
