"""Processor time of another process, and the processors that all share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).resolve().parents[1]

CORES = 2
"""Processors for daemon and load together: what the targets are stated for."""


def finds_benchmarks() -> dict[str, str]:
    """This process's variables, and the place where a child finds the modules of the benchmarks."""
    paths = (str(CHECKOUT), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process so far; None if the system does not tell."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return times.user + times.system


def cores_here() -> int:
    """How many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    else:
        return os.cpu_count() or 1


@contextmanager
def few_cores(count: int = CORES) -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on so many processors, where the system can."""
    if sys.platform == "linux":
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(before)[:count])
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
    else:
        yield
