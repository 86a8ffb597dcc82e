"""What several daemons do together on one Redis or Valkey server: completions per second, round trips, latency."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
from redis import Redis

from benchmarks.daemon_under_test import CONCURRENCY, DaemonUnderTest, Home, generate
from benchmarks.figures import Latency, Rate, median
from benchmarks.load import Flow, Loop, Target
from benchmarks.machine import Machine, this_machine
from benchmarks.processes import few_cores
from benchmarks.report import Line
from benchmarks.rows import SHALLOW
from ksi.host.private_files import make_folder

TARGET = 2_500
"""Completions per second of one daemon on two processors that it shares with the server."""
TRIPS_TARGET = 3
"""Calls of the server for one completion."""


class SharedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    seconds: float = 3.0
    warm_up: float = 2.0
    runs: int = 3
    daemons: tuple[int, ...] = (1, 2, 3)


QUICK = SharedPlan(seconds=1.5, warm_up=1.0, runs=1)


class SharedRun(msgspec.Struct, frozen=True, kw_only=True):
    """So many daemons under load at once."""

    daemons: int
    rates: tuple[Rate, ...]
    calls: float
    """Functions that the server was called for, for each completion."""
    server_us: float
    """Microseconds of the server's processor time for one completion."""

    @property
    def per_second(self) -> float:
        """Completions per second of all together."""
        return sum(rate.per_second for rate in self.rates)


class SharedReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured."""

    machine: Machine
    runs: tuple[SharedRun, ...]
    latency: tuple[Latency, ...]


def measure_shared(url: str, plan: SharedPlan, parent: Path, say: Callable[[str], None]) -> SharedReport:
    """Measure on this server, in namespaces of their own. What is written there stays until it is deleted."""
    make_folder(parent)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    runs: list[SharedRun] = []
    latencies: list[Latency] = []
    try:
        with few_cores():
            for number in range(plan.runs):
                for count in plan.daemons:
                    say(f"{count} daemons: run {number + 1} of {plan.runs}")
                    runs.append(_run(url, plan, folder / f"{number}-{count}", count))
                say(f"latency: run {number + 1} of {plan.runs}")
                latencies.append(_latency(url, plan, folder / f"{number}-latency"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return SharedReport(machine=this_machine(), runs=tuple(runs), latency=tuple(latencies))


def shared_lines(report: SharedReport) -> list[Line]:
    """The table: medians over the runs."""
    found: list[Line] = []
    for count in sorted({run.daemons for run in report.runs}):
        runs = [run for run in report.runs if run.daemons == count]
        rate = median([run.per_second for run in runs])
        what = "one daemon" if count == 1 else f"{count} daemons together"
        target = TARGET if count == 1 else None
        found.append(
            Line(
                row="shared",
                what=f"completions, {what}",
                figure=f"{rate:,.0f}/s",
                value=rate,
                unit="1/s",
                target=f">= {target:,}/s" if target else None,
                met=rate >= target if target else None,
            )
        )
        server = median([run.server_us for run in runs])
        found.append(
            Line(
                row="shared",
                what=f"the server's CPU for each, {what}",
                figure=f"{server:.0f} us",
                value=server,
                unit="us",
            )
        )
    calls = median([run.calls for run in report.runs if run.daemons == 1])
    found.append(
        Line(
            row="shared",
            what="round trips for each, one daemon",
            figure=f"{calls:.2f}",
            value=calls,
            unit="1",
            target=f"<= {TRIPS_TARGET}",
            met=calls <= TRIPS_TARGET,
        )
    )
    for name, values in (
        ("p50", [latency.loop.p50 for latency in report.latency]),
        ("p99", [latency.loop.p99 for latency in report.latency]),
    ):
        value = median(values)
        found.append(
            Line(row="shared", what=f"one request at a time, {name}", figure=f"{value:.2f} ms", value=value, unit="ms")
        )
    return found


def _own(url: str) -> str:
    """The server's address with a namespace that nobody has."""
    return f"{url}{'&' if '?' in url else '?'}namespace=bench-{uuid.uuid4().hex[:12]}"


def _daemons(stack: ExitStack, url: str, folder: Path, count: int) -> list[DaemonUnderTest]:
    homes = [
        Home(folder / f"d{number}", {"store": {"url": url, "node_id": f"bench-{number}"}}) for number in range(count)
    ]
    return [stack.enter_context(DaemonUnderTest(home)) for home in homes]


def _target(daemon: DaemonUnderTest, mark: str) -> Target:
    return Target(
        socket=str(daemon.socket),
        pid=daemon.pid,
        model="stub/echo",
        mark=mark,
        sessions=f"talk-{mark}",
        conversations=SHALLOW,
    )


def _run(url: str, plan: SharedPlan, folder: Path, count: int) -> SharedRun:
    with ExitStack() as stack:
        daemons = _daemons(stack, _own(url), folder, count)
        server = stack.enter_context(Redis.from_url(url))
        jobs = [
            Flow(
                target=_target(daemon, f"m{number}"),
                window=CONCURRENCY // count,
                warm_up=plan.warm_up,
                seconds=plan.seconds,
            )
            for number, daemon in enumerate(daemons)
        ]
        before = _figures(server)
        with ThreadPoolExecutor(count) as threads:
            rates = tuple(threads.map(lambda job: generate(job, Rate), jobs))
        after = _figures(server)
        completed = sum(int(daemon.ask("completion:status")["completed"]) for daemon in daemons[:1])
    return SharedRun(
        daemons=count,
        rates=rates,
        calls=(after[0] - before[0]) / max(1, completed),
        server_us=(after[1] - before[1]) / max(1, completed) * 1e6,
    )


def _latency(url: str, plan: SharedPlan, folder: Path) -> Latency:
    with ExitStack() as stack:
        (daemon,) = _daemons(stack, _own(url), folder, 1)
        job = Loop(
            target=_target(daemon, "loop"),
            warm_up=plan.warm_up / 4,
            seconds=plan.seconds,
            probe=str(folder / "probe"),
            durability="normal",
        )
        return generate(job, Latency)


def _figures(server: Redis) -> tuple[float, float]:
    """Functions called so far, and seconds of processor time."""
    calls = server.info("commandstats").get("cmdstat_fcall", {}).get("calls", 0)
    used = server.info("cpu")
    return float(calls), float(used["used_cpu_user"]) + float(used["used_cpu_sys"])
