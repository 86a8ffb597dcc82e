"""What the door for HTTP costs over an endpoint that answers at once: time, rate, and memory of calls that are held."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil

from benchmarks.daemon_under_test import DaemonUnderTest, Home, Tables, generate
from benchmarks.figures import median
from benchmarks.http_load import Called, Calls
from benchmarks.machine import Machine, this_machine
from benchmarks.null_endpoint import NullEndpoint
from benchmarks.processes import cpu_seconds, few_cores
from benchmarks.report import Line
from ksi.host.private_files import make_folder

ADDED_TARGET = 2.0
"""Milliseconds that a call takes longer, p50."""
FIRST_TARGET = 3.0
"""Milliseconds that a stream's first byte comes later, p50."""
RATE_TARGET = 1_000
"""Calls per second over 50 connections, on two processors."""
HELD_TARGET = 100_000_000
"""Bytes for the held calls."""
PATH = "/v1/chat/completions"


class HttpPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    seconds: float = 3.0
    """Of each run, its warm-up not counted."""
    warm_up: float = 1.0
    runs: int = 5
    """Of each kind, in turns; their medians count."""
    connections: int = 50
    held: int = 1_000
    """Calls that wait at once."""


QUICK = HttpPlan(seconds=1.0, warm_up=0.5, runs=3)


class HttpRun(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: the endpoint itself, and the same calls through the daemon."""

    bare: Called
    door: Called
    bare_streams: Called
    door_streams: Called
    bare_crowd: Called
    door_crowd: Called
    daemon_us: float
    """Microseconds of the daemon's processor time for each call of its crowd, warm-up included."""


class HttpReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured."""

    machine: Machine
    plan: HttpPlan
    runs: list[HttpRun]
    held_bytes: int
    """Resident memory that the held calls took."""


class _Way(msgspec.Struct, frozen=True):
    """Whom the calls go to."""

    port: int
    token: str
    model: str

    def body(self, *, stream: bool) -> str:
        """A call that Python's SDK could have sent."""
        messages = [{"role": "user", "content": "Name three colours, and say of each where it is found in nature."}]
        return json.dumps({"model": self.model, "messages": messages, "stream": stream})


def measure_http(plan: HttpPlan, parent: Path, say: Callable[[str], None]) -> HttpReport:
    """Measure in a new folder in `parent`, so on its disk, which is removed afterwards; `say` hears what is going on.

    Raises:
        InternalError: the daemon did not start, or a call was not answered.
    """
    make_folder(parent)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        with few_cores(), NullEndpoint() as endpoint:
            home = Home(folder / "home", _tables(endpoint.url, plan))
            with DaemonUnderTest(home) as daemon:
                bare, door = _Way(endpoint.port, "none", "null"), _door(daemon.socket.parent)
                runs = []
                for number in range(1, plan.runs + 1):
                    say(f"http: run {number} of {plan.runs}")
                    runs.append(_run(plan, bare, door, daemon.pid))
                say(f"http: {plan.held:,} calls that wait")
                held = _held(plan, door, daemon)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return HttpReport(machine=this_machine(), plan=plan, runs=runs, held_bytes=held)


def _tables(url: str, plan: HttpPlan) -> Tables:
    return {
        "http": {"listen": "127.0.0.1:0", "max_connections": plan.held + 100},
        "service": {"default_model": "null/null", "shutdown_grace": 0.2},
        "providers.null": {"kind": "openai", "base_url": f"{url}/v1", "max_concurrency": plan.connections},
    }


def _door(run: Path) -> _Way:
    url = json.loads((run / "http.json").read_text("utf-8"))["url"]
    return _Way(int(url.rpartition(":")[2]), (run / "token").read_text("utf-8").strip(), "null/null")


def _run(plan: HttpPlan, bare: _Way, door: _Way, pid: int) -> HttpRun:
    """The endpoint and the daemon in turns."""

    def calls(way: _Way, *, stream: bool = False, connections: int = 1) -> Called:
        job = Calls(
            port=way.port,
            path=PATH,
            token=way.token,
            body=way.body(stream=stream),
            connections=connections,
            warm_up=plan.warm_up,
            seconds=plan.seconds,
        )
        return generate(job, Called, "benchmarks.http_load")

    one, other = calls(bare), calls(door)
    streams, other_streams = calls(bare, stream=True), calls(door, stream=True)
    crowd = calls(bare, connections=plan.connections)
    before = cpu_seconds(pid) or 0.0
    other_crowd = calls(door, connections=plan.connections)
    return HttpRun(
        bare=one,
        door=other,
        bare_streams=streams,
        door_streams=other_streams,
        bare_crowd=crowd,
        door_crowd=other_crowd,
        daemon_us=((cpu_seconds(pid) or 0.0) - before) / other_crowd.calls * 1e6,
    )


def _held(plan: HttpPlan, door: _Way, daemon: DaemonUnderTest) -> int:
    """Have the daemon hold so many streams while its queue is paused; the memory that they take."""
    daemon.ask("queue:pause")
    process = psutil.Process(daemon.pid)
    before = process.memory_info().rss
    body = door.body(stream=True).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {door.token}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with ExitStack() as stack:
        for _ in range(plan.held):
            stack.enter_context(socket.create_connection(("127.0.0.1", door.port))).sendall(request)
        while daemon.ask("completion:status")["queued"] < plan.held:
            time.sleep(0.1)
        return process.memory_info().rss - before


def http_lines(report: HttpReport) -> Iterator[Line]:
    """The table: medians over the runs, differences and ratios by turns."""
    runs, crowd = report.runs, report.plan.connections
    yield _time("one call at a time, the endpoint itself, p50", [run.bare.whole.p50 for run in runs])
    added = [run.door.whole.p50 - run.bare.whole.p50 for run in runs]
    yield _time("  added by the daemon, p50", added, ADDED_TARGET)
    yield _time("  added by the daemon, p99", [run.door.whole.p99 - run.bare.whole.p99 for run in runs])
    yield _time("a stream's first byte, the endpoint itself, p50", [run.bare_streams.first.p50 for run in runs])
    late = [run.door_streams.first.p50 - run.bare_streams.first.p50 for run in runs]
    yield _time("  later through the daemon, p50", late, FIRST_TARGET)
    for what, rates, target in (
        (f"calls over {crowd} connections, the endpoint itself", [run.bare_crowd.per_second for run in runs], None),
        ("  through the daemon", [run.door_crowd.per_second for run in runs], RATE_TARGET),
    ):
        rate = median(rates)
        yield Line(
            row="http",
            what=what,
            figure=f"{rate:,.0f}/s",
            value=rate,
            unit="1/s",
            target=f">= {target:,}/s" if target else None,
            met=rate >= target if target else None,
        )
    used = median([run.daemon_us for run in runs])
    yield Line(row="http", what="  the daemon's CPU for each", figure=f"{used:.0f} µs", value=used, unit="us")
    yield Line(
        row="http",
        what=f"memory of {report.plan.held:,} calls that wait",
        figure=f"{report.held_bytes / 1e6:,.0f} MB",
        value=report.held_bytes,
        unit="bytes",
        target=f"<= {HELD_TARGET / 1e6:,.0f} MB",
        met=report.held_bytes <= HELD_TARGET,
    )


def _time(what: str, values: Sequence[float], target: float | None = None) -> Line:
    value = median(values)
    return Line(
        row="http",
        what=what,
        figure=f"{value:.2f} ms",
        value=value,
        unit="ms",
        target=None if target is None else f"<= {target:g} ms",
        met=None if target is None else value <= target,
    )
