"""How long a daemon takes to serve with a long queue and after kill -9, and how long its commands take."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.daemon_under_test import CONCURRENCY, DaemonUnderTest, Home
from benchmarks.load import Flow, Target
from benchmarks.processes import cpu_seconds, finds_benchmarks
from ksi.errors import InternalError

UNDER_LOAD = 1.5
"""Seconds of load before the daemon is killed."""


class Span(msgspec.Struct, frozen=True):
    """How long something took, in seconds."""

    wall: float
    cpu: float
    """Processor time of its process: another process on the machine hardly moves it."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """Each run's times."""

    start: list[Span]
    """From the process's start until it serves, with the long queue waiting."""
    recovery: list[Span]
    """The same after kill -9 under load."""
    help: list[Span]
    """`ksi --help`."""
    status: list[Span]
    """`ksi status`."""


def measure_life(filled: Home, folder: Path, runs: int, say: Callable[[str], None]) -> Life:
    """Measure all of it; `filled` has the long queue.

    Raises:
        InternalError: a daemon or a command failed.
    """
    starts: list[Span] = []
    for run in range(1, runs + 1):
        say(f"a start with a long queue: run {run} of {runs}")
        with DaemonUnderTest(filled) as daemon:
            starts.append(_until_it_serves(daemon))
    killed = Home(folder / "killed")
    recoveries: list[Span] = []
    for run in range(1, runs + 1):
        say(f"a start after kill -9 under load: run {run} of {runs}")
        _kill_under_load(killed)
        with DaemonUnderTest(killed) as daemon:
            recoveries.append(_until_it_serves(daemon))
    say("commands")
    with DaemonUnderTest(killed):
        status = _command(runs, "--home", str(killed.folder), "status")
    return Life(start=starts, recovery=recoveries, help=_command(runs, "--help"), status=status)


def _until_it_serves(daemon: DaemonUnderTest) -> Span:
    return Span(daemon.seconds_to_serve, cpu_seconds(daemon.pid) or 0.0)


def _kill_under_load(home: Home) -> None:
    with DaemonUnderTest(home) as daemon:
        target = Target(
            socket=str(daemon.socket),
            pid=daemon.pid,
            model="stub/echo",
            mark=f"kill-{daemon.pid}",
            sessions="talk",
            conversations=1_000,
        )
        job = Flow(target=target, window=CONCURRENCY, warm_up=UNDER_LOAD, seconds=60.0)
        load = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=finds_benchmarks(),
        )
        assert load.stdin is not None
        load.stdin.write(msgspec.json.encode(job) + b"\n")
        load.stdin.close()
        until = time.monotonic() + UNDER_LOAD
        while time.monotonic() < until or not daemon.ask("completion:status")["active"]:
            if load.poll() is not None:
                raise InternalError("the load ended before the daemon was killed")
            time.sleep(0.02)
        os.kill(daemon.pid, signal.SIGKILL)
        load.wait()


def _command(runs: int, *arguments: str) -> list[Span]:
    """The times of a command, run once more before, so that its files are in memory."""
    program = Path(sys.executable).with_name("ksi")
    taken: list[Span] = []
    for _ in range(runs + 1):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([program, *arguments], capture_output=True, check=False)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
        taken.append(Span(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        if done.returncode != 0:
            raise InternalError(f"ksi {' '.join(arguments)} failed: {done.stderr.decode('utf-8', 'replace')[-500:]}")
    return taken[1:]
