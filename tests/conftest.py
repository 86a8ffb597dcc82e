"""Common parts of tests of every kind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import pytest

from tests.effort import LONG, SEED, dice, effort, seed
from tests.redis_server import RedisServer, running
from tests.tally import PROPERTY, summed


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give Hypothesis the seed and the effort of this run. Workers that run tests in parallel inherit both."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(seed())
    # If the variable CI is set, Hypothesis starts from settings that take no seed.
    hypothesis.settings.register_profile(
        "ksi",
        max_examples=effort(100, 1_000),
        derandomize=False,
        deadline=None,
        print_blob=True,
        # How fast examples are made and run depends on what else the machine does.
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("ksi")


def pytest_xdist_auto_num_workers() -> int:
    """Two workers for each core: half of the tests wait for processes, disks and clocks."""
    return 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2 * (os.cpu_count() or 1)


def pytest_report_header() -> str:
    """How this run is repeated."""
    return f"{SEED}={seed()}" + (f" {LONG}=1" if effort(0, 1) else "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the counts of the crash tests, and after a failure the seed that replays the random tests: the header may
    be far above."""
    reports = [report for word in ("passed", "failed") for report in terminalreporter.getreports(word)]
    counts = [dict(report.user_properties)[PROPERTY] for report in reports if PROPERTY in dict(report.user_properties)]
    if counts:
        terminalreporter.write_line(f"killed daemons: {summed(counts)}")
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"{pytest_report_header()} replays the random tests")


@pytest.fixture(name="dice")
def dice_of_this_test(request: pytest.FixtureRequest) -> random.Random:
    """Chance that the run's seed and the test's name decide."""
    return dice(request.node.name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests that do not harm it; each uses a namespace of its own."""
    with running() as server:
        yield server
