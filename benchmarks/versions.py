"""What version 2 costs over version 1: the same requests, one at a time, at a daemon of each, in turns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks.daemon_under_test import DaemonUnderTest, Home, Tables, generate
from benchmarks.figures import Latency, median
from benchmarks.load import Loop, Target
from benchmarks.machine import Machine, this_machine
from benchmarks.processes import few_cores
from benchmarks.report import Line
from ksi.errors import ConfigError, InternalError
from ksi.host.private_files import make_folder

ADDED_TARGET = 0.5
"""Milliseconds that version 2 may add to the p50, its commits included."""

KINDS: dict[str, Tables] = {
    "version 1": {"service": {"version": 1}},
    "version 2, durability normal": {"store": {"durability": "normal"}},
    "version 2, durability full": {"store": {"durability": "full"}},
}


class VersionsPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    seconds: float = 3.0
    """Of each run, its warm-up not counted."""
    warm_up: float = 1.0
    runs: int = 5
    """Of each kind, in turns; their medians count."""


QUICK = VersionsPlan(seconds=1.0, warm_up=0.5, runs=3)


class VersionsReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every run, by the daemon's kind."""

    machine: Machine
    plan: VersionsPlan
    runs: dict[str, list[Latency]]


def measure_versions(plan: VersionsPlan, parent: Path, say: Callable[[str], None]) -> VersionsReport:
    """Measure in a new folder in `parent`, so on its disk, which is removed afterwards; `say` hears what is going on.

    Raises:
        ConfigError: no folder can be made there.
        InternalError: a daemon did not start, or a run is worth nothing.
    """
    runs: dict[str, list[Latency]] = {name: [] for name in KINDS}
    try:
        make_folder(parent)
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be used: {error.strerror}; make it writable or choose another home", place=str(parent)
        ) from None
    try:
        with few_cores(), ExitStack() as stack:
            daemons = {
                name: stack.enter_context(DaemonUnderTest(Home(folder / f"v{number}", tables)))
                for number, (name, tables) in enumerate(KINDS.items())
            }
            for run in range(1, plan.runs + 1):
                for name, daemon in daemons.items():
                    say(f"versions: run {run} of {plan.runs}, {name}")
                    runs[name].append(_loop(plan, daemon, folder / "probe", run))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return VersionsReport(machine=this_machine(), plan=plan, runs=runs)


def _loop(plan: VersionsPlan, daemon: DaemonUnderTest, probe: Path, run: int) -> Latency:
    target = Target(
        socket=str(daemon.socket),
        pid=daemon.pid,
        model="stub/echo",
        mark=f"v{run}-{daemon.pid}",
        sessions="talk",
        conversations=1_000,
    )
    job = Loop(
        target=target,
        warm_up=plan.warm_up,
        seconds=plan.seconds,
        probe=f"{probe}-{daemon.pid}-{run}",
        durability="full",
    )
    measured = generate(job, Latency)
    status = daemon.ask("completion:status")
    if status["failed"] or not status["completed"]:
        raise InternalError(f"the run is worth nothing: {status['completed']} completed, {status['failed']} failed")
    return measured


def version_lines(report: VersionsReport) -> list[Line]:
    """The table."""
    return list(_lines(report.runs))


def _lines(runs: dict[str, list[Latency]]) -> Iterator[Line]:
    base, *others = runs
    for name, found in runs.items():
        for percent, values in (("p50", [r.loop.p50 for r in found]), ("p99", [r.loop.p99 for r in found])):
            yield _time(f"one at a time, {name}, {percent}", median(values))
    for name in others:
        added = _added(runs[base], runs[name])
        yield _time(f"added by {name}, p50", added, f"<= {ADDED_TARGET} ms", added <= ADDED_TARGET)
    commit = median([run.commit.p50 for found in runs.values() for run in found])
    yield _time("  one commit here, durability full, p50, of which version 2 makes two", commit)
    yield _time("  added beside them, p50", _added(runs[base], runs[others[-1]]) - 2 * commit)
    for name, found in runs.items():
        cpu = [run.daemon_us for run in found if run.daemon_us is not None]
        if cpu:
            value = median(cpu)
            yield Line(
                row="versions", what=f"  the daemon's CPU for each, {name}", figure=f"{value:.0f} µs", value=value,
                unit="us",
            )  # fmt: skip


def _added(base: Sequence[Latency], other: Sequence[Latency]) -> float:
    """Round by round, so that what else happens on this machine meets both."""
    return median([two.loop.p50 - one.loop.p50 for one, two in zip(base, other, strict=True)])


def _time(what: str, value: float, target: str | None = None, met: bool | None = None) -> Line:
    return Line(row="versions", what=what, figure=f"{value:.2f} ms", value=value, unit="ms", target=target, met=met)
