"""The load generator: a process of its own that costs as little as it can (`python -m benchmarks.load`).

It reads a job as one line of JSON on stdin and prints what it measured as one line on stdout. Requests are lines from
a template; replies are counted, not parsed: an event's name stands at the start of its line, and no text that a
completion carries here has one in it. Whoever started it asks the daemon afterwards whether anything failed.
"""

from __future__ import annotations

import itertools
import resource
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.disk import Probe
from benchmarks.figures import Latency, Rate, Times
from benchmarks.processes import cpu_seconds

RESULT = b'{"event":"completion:result"'
ERROR = b'"error":{'
SUBSCRIBE = b'{"event":"monitor:subscribe","data":{"patterns":["*"]}}\n'
RESUME = b'{"event":"queue:resume","data":{}}\n'
PAUSE = b'{"event":"queue:pause","data":{}}\n'
PATIENCE = 60
"""Seconds without any answer after which the run is given up."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the load is for, and what its requests look like."""

    socket: str
    pid: int
    model: str
    mark: str
    """Makes the requests' ids differ from those of all other runs."""
    sessions: str
    """What the conversations' names begin with."""
    conversations: int | None
    """In play at any moment; None: each request has one of its own."""
    agents: int = 10
    turns: int | None = 50
    """How many a conversation gets before another takes its place, so that histories stay as long; None: no end."""


class Flow(msgspec.Struct, frozen=True, kw_only=True, tag="flow"):
    """Keep `window` requests outstanding, and count what comes back."""

    target: Target
    window: int
    warm_up: float
    seconds: float
    connections: int = 4
    follow_all: bool = False
    """One connection submits, is the subscriber, and sends a request for each result of anybody's: a queue that was
    filled before, and is paused before and after, stays as long as it is."""


class Loop(msgspec.Struct, frozen=True, kw_only=True, tag="loop"):
    """One request at a time, each when the last is done; between them, in turns, the disk alone."""

    target: Target
    warm_up: float
    seconds: float
    probe: str
    """A folder on the disk that the daemon uses."""
    durability: Literal["full", "normal"]
    round: int = 50
    """Requests, then commits, then syncs in a row."""


Job = Flow | Loop


class LoadError(Exception):
    """The daemon answered what it should not, or not at all."""


class Requests:
    """The lines of a run, one after another."""

    def __init__(self, target: Target, event: str) -> None:
        self._target = target
        self._template = (
            f'{{"event":"{event}","data":{{"request_id":"{target.mark}-%012d","session_id":"{target.sessions}-%s",'
            f'"agent_id":"agent-%d","model":"{target.model}","prompt":"Say in one sentence what number %d is for, '
            'and name one thing that it is often taken for."}}\n'
        )
        self._numbers = itertools.count()

    def line(self) -> bytes:
        """The next one."""
        number = next(self._numbers)
        return (self._template % (number, self._conversation(number), number % self._target.agents, number)).encode()

    def lines(self, count: int) -> bytes:
        """The next so many, to be sent in one piece."""
        return b"".join([self.line() for _ in range(count)])

    def _conversation(self, number: int) -> str:
        target = self._target
        if target.conversations is None:
            return f"{target.mark}-{number}"
        turn, place = divmod(number, target.conversations)
        if target.turns is None:
            return str(place)
        # Their ages differ, so that in each moment as many begin.
        return f"{place}-{target.mark}-{(turn + place % target.turns) // target.turns}"


class ResultCounter:
    """Counts the results in a stream of lines, wherever it was cut into pieces."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, piece: bytes | bytearray) -> int:
        """How many results this piece brought.

        Raises:
            LoadError: it has an error.
        """
        data = self._tail + piece
        if ERROR in data:
            at = data.index(ERROR)
            raise LoadError(f"the daemon refused: {data[max(0, at - 100) : at + 300].decode('utf-8', 'replace')}")
        # What may be the beginning of a word is looked at again with what follows; a whole word is longer.
        self._tail = data[-(len(RESULT) - 1) :]
        return data.count(RESULT)


class Pipe:
    """One connection: sends lines, counts results."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # In the kernel: a timeout of Python's would cost a system call more for each piece.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        self.socket.connect(path)
        self._buffer = bytearray(1 << 20)
        self._counter = ResultCounter()

    def send(self, data: bytes) -> None:
        """Send lines; the daemon reads on while its answers are read, so this never waits for long."""
        self.socket.sendall(data)

    def results(self) -> int:
        """Read what is there; how many results it held.

        Raises:
            LoadError: the daemon went away, or answered with an error.
        """
        size = self.socket.recv_into(self._buffer)
        if not size:
            raise LoadError("the daemon closed the connection")
        return self._counter.feed(self._buffer[:size])


class _Counts(msgspec.Struct):
    """What a flow has seen so far."""

    done: int = 0
    submitted: int = 0
    seen: int = 0
    at: float = 0.0
    daemon_cpu: float | None = None
    own_cpu: float = 0.0

    def snapshot(self, pid: int) -> _Counts:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return _Counts(
            self.done, self.submitted, self.seen, time.monotonic(), cpu_seconds(pid), usage.ru_utime + usage.ru_stime
        )


def flow(job: Flow) -> Rate:
    """See `Flow`."""
    requests = Requests(job.target, "completion:async")
    subscriber = Pipe(job.target.socket)
    subscriber.send(SUBSCRIBE)
    submitters = [subscriber] if job.follow_all else [Pipe(job.target.socket) for _ in range(job.connections)]
    counts = _Counts()
    for pipe in submitters:
        pipe.send(requests.lines(job.window // len(submitters)))
    if job.follow_all:
        subscriber.send(RESUME)
    _pump(subscriber, submitters, requests, counts, job.warm_up)
    before = counts.snapshot(job.target.pid)
    _pump(subscriber, submitters, requests, counts, job.seconds)
    after = counts.snapshot(job.target.pid)
    if job.follow_all:
        _pause(job.target.socket)
    known = before.daemon_cpu is not None and after.daemon_cpu is not None
    return Rate(
        completions=after.done - before.done,
        submitted=after.submitted - before.submitted,
        seen=after.seen - before.seen,
        seconds=after.at - before.at,
        daemon_cpu=(after.daemon_cpu or 0.0) - (before.daemon_cpu or 0.0) if known else None,
        load_cpu=after.own_cpu - before.own_cpu,
    )


def _pause(path: str) -> None:
    """Pause the queue, by a connection with nothing unread: the lines of one that does not read wait."""
    pipe = Pipe(path)
    pipe.send(PAUSE)
    pipe.results()


def _pump(subscriber: Pipe, submitters: Sequence[Pipe], requests: Requests, counts: _Counts, seconds: float) -> None:
    """Send a request for each result, for so long and until there was one."""
    until, least = time.monotonic() + seconds, counts.done + 1
    with selectors.DefaultSelector() as selector:
        for one in {subscriber, *submitters}:
            selector.register(one.socket, selectors.EVENT_READ, one)
        while time.monotonic() < until or counts.done < least:
            ready = selector.select(PATIENCE)
            if not ready:
                raise LoadError(f"no answer for {PATIENCE} s")
            for key, _ in ready:
                pipe: Pipe = key.data
                count = pipe.results()
                if pipe is subscriber:
                    counts.seen += count
                if count and pipe in submitters:
                    counts.done += count
                    counts.submitted += count
                    pipe.send(requests.lines(count))


def loop(job: Loop) -> Latency:
    """See `Loop`."""
    requests = Requests(job.target, "completion:request")
    pipe = Pipe(job.target.socket)
    subscriber = Pipe(job.target.socket)
    subscriber.send(SUBSCRIBE)
    probe = Probe(Path(job.probe), job.durability)
    loops: list[int] = []
    commits: list[int] = []
    syncs: list[int] = []
    cpu: float | None = 0.0
    try:
        for measured in _until(job.warm_up, job.seconds):
            before = cpu_seconds(job.target.pid)
            turns = [_turn(pipe, requests.line()) for _ in range(job.round)]
            after = cpu_seconds(job.target.pid)
            subscriber.results()
            commit, sync = probe.commits(job.round), probe.syncs(job.round)
            if measured:
                loops += turns
                commits += commit
                syncs += sync
                cpu = None if cpu is None or before is None or after is None else cpu + after - before
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
        said = reply[:400].decode("utf-8", "replace")
        raise LoadError(f"not completed: {said or 'the daemon closed the connection'}")
    return taken


def _until(warm_up: float, seconds: float) -> Iterator[bool]:
    """False while it is warming up, then True until the time is over, once at least."""
    begin = time.monotonic() + warm_up
    while time.monotonic() < begin:
        yield False
    yield True
    while time.monotonic() < begin + seconds:
        yield True


def main() -> int:
    """Do one job."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        measured: Rate | Latency = flow(job) if isinstance(job, Flow) else loop(job)
    except BlockingIOError:
        sys.stderr.write(f"no answer for {PATIENCE} s\n")
        return 1
    except (LoadError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(measured) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
