"""What it costs the daemon that somebody looks at its page: the share of one processor that it takes more with an open
page in a real Chromium.

The load is a steady one that leaves processors free. At full load the browser would take its own time from the daemon
on the same machine, and that would be measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from benchmarks.daemon_under_test import DaemonUnderTest, Home, Tables, generate
from benchmarks.figures import Rate, median
from benchmarks.load import Flow, Target
from benchmarks.machine import Machine, this_machine
from benchmarks.processes import few_cores
from benchmarks.report import Line
from ksi.errors import InternalError
from ksi.host.private_files import make_folder

TARGET = 0.03
"""The share of one processor that an open page may take. The daemon's work is one thread, so it is the share of its
throughput, too."""

WINDOW, DELAY = 32, 0.05
"""Requests outstanding, and the seconds that each takes at its provider: together the rate."""


class PagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    seconds: float = 3.0
    """Of each run, its warm-up not counted."""
    warm_up: float = 1.5
    runs: int = 7
    """Of each kind, in turns; the median of the differences counts."""


QUICK = PagePlan(seconds=1.0, warm_up=1.0, runs=3)


class PageRun(msgspec.Struct, frozen=True):
    """The same load without and with an open page."""

    alone: Rate
    watched: Rate

    @property
    def added(self) -> float:
        """The share of one processor that the page takes."""
        return _share(self.watched) - _share(self.alone)


class PageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured."""

    machine: Machine
    plan: PagePlan
    runs: list[PageRun]


def measure_page(plan: PagePlan, parent: Path, say: Callable[[str], None]) -> PageReport:
    """Measure in a new folder in `parent`, which is removed afterwards; `say` hears what is going on.

    Raises:
        InternalError: the daemon did not start, or a request failed.
    """
    make_folder(parent)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        tables: Tables = {
            "http": {"listen": "127.0.0.1:0"},
            "providers.stub": {"kind": "stub", "delay": DELAY, "max_concurrency": WINDOW},
        }
        with few_cores(), DaemonUnderTest(Home(folder / "home", tables)) as daemon:
            runs = asyncio.run(_runs(plan, daemon, say))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return PageReport(machine=this_machine(), plan=plan, runs=runs)


async def _runs(plan: PagePlan, daemon: DaemonUnderTest, say: Callable[[str], None]) -> list[PageRun]:
    numbers = itertools.count()

    async def load() -> Rate:
        number = next(numbers)
        target = Target(
            socket=str(daemon.socket),
            pid=daemon.pid,
            model="stub/echo",
            mark=f"page-{number}",
            sessions=f"page-{number}",
            conversations=1_000,
        )
        job = Flow(target=target, window=WINDOW, warm_up=plan.warm_up, seconds=plan.seconds)
        return await asyncio.to_thread(generate, job, Rate)

    runs: list[PageRun] = []
    for number in range(1, plan.runs + 1):
        say(f"an open page: run {number} of {plan.runs}")
        alone = await load()
        async with _open_page(daemon):
            runs.append(PageRun(alone, await load()))
    return runs


@asynccontextmanager
async def _open_page(daemon: DaemonUnderTest) -> AsyncIterator[None]:
    """The overview in a browser, from when it follows the daemon."""
    from playwright.async_api import expect

    from tests.browser import page_of, running_browser

    run = daemon.socket.parent
    url = json.loads((run / "http.json").read_text("utf-8"))["url"]
    token = (run / "token").read_text("utf-8").strip()
    asked = urllib.request.Request(f"{url}/page/codes", b"{}", {"Authorization": f"Bearer {token}"}, method="POST")
    with await asyncio.to_thread(urllib.request.urlopen, asked) as answer:
        code = json.load(answer)["code"]
    async with running_browser() as browser, page_of(browser, url) as watched:
        await watched.page.goto(f"{url}/#code={code}")
        await expect(watched.page.locator("#link")).to_have_text("Live")
        yield


def page_lines(report: PageReport) -> Iterator[Line]:
    """The table: medians over the runs."""
    runs = report.runs
    for what, values, target in (
        ("the daemon's share of one processor", [_share(run.alone) for run in runs], None),
        ("  added by an open page", [run.added for run in runs], TARGET),
    ):
        value = median(values)
        yield Line(
            row="page",
            what=what,
            figure=f"{value:.1%}",
            value=value,
            unit="1",
            target=None if target is None else f"<= {target:.0%}",
            met=None if target is None else value <= target,
        )


def _share(rate: Rate) -> float:
    if rate.daemon_cpu is None:
        raise InternalError("this system does not tell a process's time")
    return rate.daemon_cpu / rate.seconds
