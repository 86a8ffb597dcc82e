"""Several daemons on one server: started, killed, stopped and let go on; and what holds whatever happened to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Json, Wire

LEASE = 2.5
"""Seconds; short, so that a takeover need not be waited for long."""

CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 1.0

[store]
url = "{url}"
node_id = "node-{number}"

[queue]
lease = {lease}
max_interruptions = 1000

[retry]
initial_delay = 0.05
max_delay = 0.1

[providers.stub]
kind = "stub"
max_concurrency = 12
record = "../record.tsv"

[providers.slow]
kind = "stub"
delay = 600
"""


class Team:
    """The daemons, and the record that their providers share."""

    def __init__(self, folder: Path, url: str, count: int) -> None:
        self.folder = folder
        self.record = folder / "record.tsv"
        self.daemons = [
            DaemonProcess(make_home(folder / f"h{number}", CONFIG.format(url=url, number=number, lease=LEASE)))
            for number in range(count)
        ]

    def path(self, number: int) -> Path:
        """The socket of a daemon."""
        return self.daemons[number].socket_path

    def kill(self, number: int) -> None:
        """kill -9."""
        self.daemons[number].end(signal.SIGKILL)

    async def stop(self, number: int, seconds: float) -> None:
        """SIGSTOP, and SIGCONT when its lease is over."""
        pid = self.daemons[number].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def team(folder: Path, url: str, count: int) -> Iterator[Team]:
    """Daemons that serve while the block runs."""
    made = Team(folder, url, count)
    with ExitStack() as stack:
        for daemon in made.daemons:
            daemon.spawn()
            stack.callback(daemon.end, signal.SIGTERM)
        for daemon in made.daemons:
            assert daemon.wait_ready(), "a daemon ended before it was ready"
        yield made


async def submit_anywhere(team: Team, data: Json, first: int) -> Json:
    """Ask the daemons in turns until one has acknowledged a request."""
    number = first
    while True:
        with contextlib.suppress(ConnectionError, FileNotFoundError, TimeoutError):
            async with await Wire.open(team.path(number)) as wire, asyncio.timeout(3 * LEASE):
                return await wire.ask("completion:async", **data)
        number = (number + 1) % len(team.daemons)
        await asyncio.sleep(0.05)


def check_runs(record: Path, answers: dict[str, Json]) -> int:
    """Each request completed once, and no two runs of one conversation overlap, but for such that a daemon began which
    was taken for dead: the trail says that it was interrupted. Returns how many were."""
    interrupted = 0
    for name, reply in answers.items():
        outcomes = Counter(attempt["outcome"] for attempt in reply["attempts"])
        assert reply["status"] == "completed", (name, reply)
        assert outcomes["completed"] == 1, (name, reply)
        interrupted += outcomes["interrupted"]
    running: dict[str, set[tuple[str, int]]] = {}
    for line in record.read_text().splitlines():
        word, _, conversation, request, attempt = line.split("\t")
        run = (request, int(attempt))
        here = running.setdefault(conversation, set())
        if word == "begin":
            for other in here:
                assert _was_interrupted(answers, run) or _was_interrupted(answers, other), (run, other)
            here.add(run)
        else:
            here.discard(run)
    return interrupted


def _was_interrupted(answers: dict[str, Json], run: tuple[str, int]) -> bool:
    request, number = run
    return any(
        attempt["attempt"] == number and attempt["outcome"] == "interrupted" for attempt in answers[request]["attempts"]
    )
