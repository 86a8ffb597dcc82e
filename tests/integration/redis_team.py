"""Several daemons on one server: started, killed, stopped and continued; and the invariants after any of that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.daemon_process import DaemonProcess, make_home
from tests.integration.wire import Json
from tests.tally import Tally

LEASE = 2.5
"""Seconds; short, so that a takeover need not be waited for long."""

CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 1.0

[http]
listen = "127.0.0.1:0"

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
record = "{record}"

[providers.slow]
kind = "stub"
delay = 600
"""


class Team:
    """The daemons, each with its way to the server, and the record that their providers share."""

    def __init__(self, folder: Path, urls: Sequence[str], config: str, environs: Sequence[Mapping[str, str]]) -> None:
        self.record = folder / "record.tsv"
        both = {"lease": LEASE, "record": self.record}
        self.daemons = [
            DaemonProcess(make_home(folder / f"h{number}", config.format(url=url, number=number, **both)), environ)
            for number, (url, environ) in enumerate(zip(urls, environs, strict=True))
        ]

    def path(self, number: int) -> Path:
        """The socket of a daemon."""
        return self.daemons[number].socket_path

    @property
    def logs(self) -> list[Path]:
        """The folders of their response logs."""
        return [daemon.home / "var" / "logs" / "responses" for daemon in self.daemons]

    def end(self) -> None:
        """Stop all in order."""
        for daemon in self.daemons:
            daemon.end(signal.SIGTERM)

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
def team(
    folder: Path,
    url: str | Sequence[str],
    count: int,
    config: str = CONFIG,
    environs: Sequence[Mapping[str, str]] | None = None,
) -> Iterator[Team]:
    """Daemons that serve while the block runs; `url` is the same for all, or each one's own.

    `environs` has additional variables for each.
    """
    urls = [url] * count if isinstance(url, str) else url
    made = Team(folder, urls, config, environs or [{}] * count)
    with ExitStack() as stack:
        for daemon in made.daemons:
            daemon.spawn()
            stack.callback(daemon.end, signal.SIGTERM)
        for daemon in made.daemons:
            assert daemon.wait_ready(), "a daemon ended before it was ready"
        yield made


def check_runs(record: Path, answers: dict[str, Json]) -> int:
    """Each request completed once, and `check_record` holds. Returns how many runs were interrupted."""
    interrupted = 0
    for name, reply in answers.items():
        outcomes = Counter(attempt["outcome"] for attempt in reply["attempts"])
        assert reply["status"] == "completed", (name, reply)
        assert outcomes["completed"] == 1, (name, reply)
        interrupted += outcomes["interrupted"]
    tally = Tally()
    check_record(record, answers, tally)
    assert tally.overlapping == []
    return interrupted


def check_record(record: Path, answers: dict[str, Json], tally: Tally) -> dict[str, set[int]]:
    """No two runs of one conversation overlap, but for those of daemons that were taken for dead: the requests' trails
    say so. Returns the attempts of each request that reached the provider."""
    begun: defaultdict[str, set[int]] = defaultdict(set)
    running: dict[str, set[tuple[str, int]]] = {}
    for line in record.read_text().splitlines():
        word, _, conversation, request, attempt = line.split("\t")
        run = (request, int(attempt))
        begun[request].add(int(attempt))
        here = running.setdefault(conversation, set())
        if word == "begin":
            for other in here:
                if not _was_interrupted(answers, run) and not _was_interrupted(answers, other):
                    tally.overlapping.append(f"{run} in {conversation} while {other}")
            here.add(run)
        else:
            here.discard(run)
    return begun


def _was_interrupted(answers: dict[str, Json], run: tuple[str, int]) -> bool:
    request, number = run
    return any(
        attempt["attempt"] == number and attempt["outcome"] == "interrupted" for attempt in answers[request]["attempts"]
    )
