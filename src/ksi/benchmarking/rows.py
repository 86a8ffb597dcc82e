"""The rows of the benchmark: which daemons run, what load they get, in which order."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import msgspec

from ksi.benchmarking.daemon_under_test import CONCURRENCY, DaemonUnderTest, Home, Tables, generate
from ksi.benchmarking.figures import Latency, Rate
from ksi.benchmarking.load import Flow, Target

Durability = Literal["full", "normal"]
DURABILITIES: tuple[Durability, ...] = ("full", "normal")
SHALLOW = 1_000
"""Waiting requests that a deep queue is compared with, and conversations in play."""

# In the rows with a filled queue conversations must not go while they wait, and their histories are kept as short
# with a long queue as with a short one.
_FILLED: Tables = {"retention": {"finished": 1.0, "sessions": 86_400.0}, "session": {"history_tokens": 300}}
_FOREVER = 86_400.0
_TWO_ROUTES: Tables = {
    **_FILLED,
    "providers.stub": {"kind": "stub", "max_concurrency": 1, "delay": _FOREVER},
    "providers.free": {"kind": "stub", "max_concurrency": CONCURRENCY},
    "limits": {"timeout": _FOREVER, "idle_timeout": _FOREVER},
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    seconds: float = 3.0
    """Of each run, its warm-up not counted."""
    warm_up: float = 2.5
    """Until as much is pruned as comes in."""
    runs: int = 3
    """Of each kind, in turns; their medians count."""
    depth: int = 1_000_000
    """Of the long queue."""
    window: int = CONCURRENCY
    """Requests outstanding under load."""


QUICK = Plan(seconds=1.0, warm_up=1.5, runs=2, depth=20_000)


class Pair(msgspec.Struct, frozen=True):
    """Two runs side by side: a short queue, then a long one."""

    shallow: Rate
    deep: Rate


class RoutePair(msgspec.Struct, frozen=True):
    """A free route without, then with another one's backlog."""

    alone: Rate
    alone_latency: Latency
    beside: Rate
    beside_latency: Latency


class Memory(msgspec.Struct, frozen=True):
    """Bytes that a daemon has in use."""

    idle: int
    loaded: int
    """After a run under load."""
    filled: int
    """Just started with the long queue."""
    filled_loaded: int
    """After a run under load with the long queue."""


class Rows:
    """Measures row by row in a folder of its own; `say` hears what is going on."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._folder = folder
        self._say = say
        self._marks = (f"r{number}" for number in itertools.count())

    # -- rows -----------------------------------------------------------------------------------------------------

    def throughput(self) -> dict[Durability, list[Rate]]:
        """Completions per second with a thousand conversations in play, for each durability in turns."""
        found: dict[Durability, list[Rate]] = {name: [] for name in DURABILITIES}
        with ExitStack() as stack:
            daemons = {name: stack.enter_context(self._daemon(name)) for name in DURABILITIES}
            for run, name in self._turns("completions/s", DURABILITIES):
                found[name].append(self._flow(daemons[name], run))
        return found

    def latency(self) -> dict[Durability, list[Latency]]:
        """A closed loop beside this disk's own commits, for each durability in turns."""
        found: dict[Durability, list[Latency]] = {name: [] for name in DURABILITIES}
        with ExitStack() as stack:
            daemons = {name: stack.enter_context(self._daemon(name)) for name in DURABILITIES}
            for run, name in self._turns("latency", DURABILITIES):
                found[name].append(self._loop(daemons[name], run, name))
        return found

    def depth(self) -> dict[str, list[Pair]]:
        """A short queue and a long one in turns: in a thousand conversations, and each request in one of its own."""
        found: dict[str, list[Pair]] = {}
        for name, conversations in (("few", SHALLOW), ("own", None)):
            pairs = found[name] = []
            for run, _ in self._turns(f"queue depth ({name} conversations)", ("both",)):
                pairs.append(Pair(self._shallow(run, conversations), self._deep(run, conversations)))
            if conversations is not None:
                shutil.rmtree(self._deep_home(conversations).folder)
        return found

    def routes(self) -> list[RoutePair]:
        """A free route beside one with a long backlog, and without it, in turns."""
        busy = Home(self._deep_home(None).folder, _TWO_ROUTES)
        self._fill(busy, None)
        found: list[RoutePair] = []
        with ExitStack() as stack:
            alone = stack.enter_context(DaemonUnderTest(Home(self._folder / "alone", _TWO_ROUTES)))
            beside = stack.enter_context(DaemonUnderTest(busy))
            for run, _ in self._turns("two routes", ("both",)):
                found.append(
                    RoutePair(
                        self._flow(alone, run, model="free/echo"),
                        self._loop(alone, run, "full", model="free/echo"),
                        self._flow(beside, run, model="free/echo"),
                        self._loop(beside, run, "full", model="free/echo"),
                    )
                )
        return found

    def memory(self) -> Memory:
        """Resident memory, from idle to a long queue under load."""
        self._say("memory")
        with self._daemon("full", "memory") as daemon:
            idle = _memory(daemon)
            self._flow(daemon, 0)
            loaded = _memory(daemon)
        home = self._deep_home(None)
        self._fill(home, None)
        with DaemonUnderTest(home) as daemon:
            filled = _memory(daemon)
            self._flow_through(daemon, 0, None, CONCURRENCY)
            return Memory(idle, loaded, filled, _memory(daemon))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _turns(self, what: str, kinds: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
        for run in range(self._plan.runs):
            for kind in kinds:
                self._say(f"{what}: run {run + 1} of {self._plan.runs}" + (f", {kind}" if len(kinds) > 1 else ""))
                yield run, kind

    def _daemon(self, durability: Durability, name: str = "plain") -> DaemonUnderTest:
        return DaemonUnderTest(Home(self._folder / f"{name}-{durability}", {"store": {"durability": durability}}))

    def _target(self, daemon: DaemonUnderTest, model: str = "stub/echo", **other: Any) -> Target:
        mark = next(self._marks)
        fields = {"sessions": "talk", "conversations": SHALLOW, **other}
        return Target(socket=str(daemon.socket), pid=daemon.pid, model=model, mark=f"{mark}-{daemon.pid}", **fields)

    def _flow(self, daemon: DaemonUnderTest, run: int, model: str = "stub/echo") -> Rate:
        """As many requests outstanding as the plan says."""
        # Only the first run begins with nothing to prune.
        warm_up = self._plan.warm_up if run == 0 else self._plan.warm_up
        job = Flow(
            target=self._target(daemon, model), window=self._plan.window, warm_up=warm_up, seconds=self._plan.seconds
        )
        return self._checked(daemon, generate(job, Rate))
