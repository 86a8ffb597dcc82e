"""The load generator: a process of its own that costs as little as it can (`python -m ksi.benchmarking.load`).

It reads a job as one line of JSON on stdin and prints what it measured as one line on stdout. Requests are lines from a
template, replies are counted and not parsed: an event's name stands at the start of its line, and no text that a
completion carries here holds one. Whoever started it compares the counts with the daemon's own afterwards.
"""

from __future__ import annotations

import itertools
import resource
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from ksi.benchmarking.disk import Probe
from ksi.benchmarking.figures import Latency, Rate, Times
from ksi.benchmarking.processes import cpu_seconds

RESULT = b'{"event":"completion:result"'
ERROR = b'"error":{'
SUBSCRIBE = b'{"event":"monitor:subscribe","data":{"patterns":["*"]}}\n'
TURNS = 20
"""Turns that a conversation lives for; then another takes its place, so that histories are as long in any second."""
PATIENCE = 60.0
"""Seconds without any answer after which the run is given up."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the load is for, and what its requests look like."""

    socket: str
    pid: int
    model: str
    conversations: int
    """In play at any moment."""
    mark: str
    """Makes the ids of this run differ from all others'."""
    fresh: bool = False
    """Every request in a conversation of its own, `conversations` or not."""


class Flow(msgspec.Struct, frozen=True, kw_only=True, tag="flow"):
    """Keep `window` requests outstanding, and count what comes back."""

    target: Target
    connections: int
    window: int
    warm_up: float
    seconds: float
    follow_all: bool = False
    """One connection submits, is the subscriber, and sends one request for each result of anybody's: the depth of a
    queue that was filled before stays as it is."""


class Loop(msgspec.Struct, frozen=True, kw_only=True, tag="loop"):
    """One request at a time, each when the last is done; between them, in turns, the disk alone."""

    target: Target
    warm_up: float
    seconds: float
    probe: Path
    durability: Literal["full", "normal"]
    turns: int = 50
    """Requests, commits and syncs in one round."""


Job = Flow | Loop


class LoadError(Exception):
    """The daemon answered what it should not, or not at all."""


class Requests:
    """The lines of a run, one after another."""

    def __init__(self, target: Target, event: str) -> None:
        head = '{"event":"%s","data":{"request_id":"%s-' % (event, target.mark)  # noqa: UP031
        tail = (
            '","agent_id":"agent-%d","model":"' + target.model + '","prompt":"Say in one sentence what number %d is for,'
            ' and name one thing that it is often taken for."}}\n'
        )
        self._template = head + '%012d","session_id":"' + target.mark.split("-")[0] + '-%s' + tail
        self._conversations = target.conversations
        self._fresh = target.fresh
        self._mark = target.mark
        self._numbers = itertools.count()

    def line(self) -> bytes:
        """The next one."""
        number = next(self._numbers)
        if self._fresh:
            name = f"{self._mark}-{number}"
        else:
            life, place = divmod(number, self._conversations)
            name = f"{self._mark}-{place}-{life // TURNS}"
        return (self._template % (number, name, number % 10, number)).encode()

    def lines(self, count: int) -> bytes:
        """The next so many, to be sent in one piece."""
        return b"".join([self.line() for _ in range(count)])


class Pipe:
    """One connection: sends lines, counts results."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self._buffer = bytearray(1 << 20)
        self._tail = b""

    def send(self, data: bytes) -> None:
        """Send lines; the daemon always reads on, so this never waits for long."""
        self.socket.sendall(data)

    def results(self) -> int:
        """Read what is there; how many results it held.

        Raises:
            LoadError: the daemon went away, or answered with an error.
        """
        size = self.socket.recv_into(self._buffer)
        if not size:
            raise LoadError("the daemon closed the connection")
        data = self._tail + self._buffer[:size]
        if ERROR in data:
            at = data.index(ERROR)
            raise LoadError(f"the daemon refused: {data[max(0, at - 100):at + 300].decode('utf-8', 'replace')}")
        # What may be the beginning of a word is looked at again with what follows.
        self._tail = data[-(len(RESULT) - 1) :]
        return data.count(RESULT)


def flow(job: Flow) -> Rate:
    """See `Flow`."""
    requests = Requests(job.target, "completion:async")
    subscriber = Pipe(job.target.socket)
    subscriber.send(SUBSCRIBE)
    submitters = [subscriber] if job.follow_all else [Pipe(job.target.socket) for _ in range(job.connections)]
    submitted = 0
    for pipe in submitters:
        share = job.window // len(submitters)
        pipe.send(requests.lines(share))
        submitted += share
    done = seen = 0
    begun_at = time.monotonic() + job.warm_up
    ends_at = begun_at + job.seconds
    before: tuple[int, int, int, float, float | None, float] | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in {subscriber, *submitters}:
            selector.register(pipe.socket, selectors.EVENT_READ, pipe)
        while True:
            ready = selector.select(PATIENCE)
            if not ready:
                raise LoadError(f"no answer for {PATIENCE:g} s")
            for key, _ in ready:
                pipe = key.data
                count = pipe.results()
                if pipe is subscriber:
                    seen += count
                if pipe is not subscriber or job.follow_all:
                    done += count
                    submitted += count
                    pipe.send(requests.lines(count))
            now = time.monotonic()
            if before is None and now >= begun_at:
                before = (done, submitted, seen, now, cpu_seconds(job.target.pid), _own_cpu())
            if before is not None and now >= ends_at:
                break
    daemon_cpu = cpu_seconds(job.target.pid)
    return Rate(
        completions=done - before[0],
        submitted=submitted - before[1],
        seen=seen - before[2],
        seconds=now - before[3],
        daemon_cpu=None if daemon_cpu is None or before[4] is None else daemon_cpu - before[4],
        load_cpu=_own_cpu() - before[5],
    )


def loop(job: Loop) -> Latency:
    """See `Loop`."""
    requests = Requests(job.target, "completion:request")
    pipe = Pipe(job.target.socket)
    subscriber = Pipe(job.target.socket)
    subscriber.send(SUBSCRIBE)
    probe = Probe(job.probe, job.durability)
    loops: list[int] = []
    commits: list[int] = []
    syncs: list[int] = []
    cpu: float | None = 0.0
    try:
        for measured in _until(job.warm_up, job.seconds):
            used = cpu_seconds(job.target.pid)
            turns = [_turn(pipe, requests.line()) for _ in range(job.turns)]
            used_after = cpu_seconds(job.target.pid)
            subscriber.results()
            commit, sync = probe.commits(job.turns), probe.syncs(job.turns)
            if measured:
                loops += turns
                commits += commit
                syncs += sync
                cpu = None if cpu is None or used is None or used_after is None else cpu + used_after - used
    finally:
        probe.close()
    return Latency(
        loop=Times.of(loops),
        commit=Times.of(commits),
        sync=Times.of(syncs),
        daemon_us=None if cpu is None else cpu / len(loops) * 1e6,
    )


def _turn(pipe: Pipe, line: bytes) -> int:
    """Nanoseconds from sending a request to having its whole reply."""
    begun = time.perf_counter_ns()
    pipe.socket.sendall(line)
    reply = pipe.socket.recv(1 << 20)
    while reply and not reply.endswith(b"\n"):
        reply += pipe.socket.recv(1 << 20)
    taken = time.perf_counter_ns() - begun
    if b'"status":"completed"' not in reply:
        raise LoadError(f"not completed: {reply[:400].decode('utf-8', 'replace') or 'the daemon closed the connection'}")
    return taken


def _until(warm_up: float, seconds: float) -> Iterator[bool]:
    """False while it is warming up, then True until the time is over, once at least."""
    begin = time.monotonic() + warm_up
    while time.monotonic() < begin:
        yield False
    yield True
    while time.monotonic() < begin + seconds:
        yield True


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Do one job."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        measured: Rate | Latency = flow(job) if isinstance(job, Flow) else loop(job)
    except (LoadError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(measured) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
