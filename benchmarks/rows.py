"""The rows of the benchmark: which daemons run, what load they get, in which order."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from benchmarks.daemon_under_test import CONCURRENCY, BareCoreUnderTest, DaemonUnderTest, Home, Tables, generate
from benchmarks.figures import Latency, Rate
from benchmarks.life import Life, measure_life
from benchmarks.load import Flow, Loop, Target
from benchmarks.preload import SESSIONS, fill, hold_back
from ksi.errors import InternalError

T = TypeVar("T")

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

AGENTS = 1_000
AGENTS_DEPTH = 20 * AGENTS
"""Waiting requests of these agents."""

_SCOPES = (
    ("all", "usd", "hour"),
    ("all", "tokens", "day"),
    ("all", "usd", "month"),
    ("agent:*", "usd", "day"),
    ("agent:*", "tokens", "week"),
    ("token:*", "requests", "hour"),
    ("model:*", "usd", "day"),
    ("provider:*", "usd", "day"),
    ("provider:stub", "tokens", "month"),
    ("session:*", "usd", "day"),
)
_PRICES: Tables = {'prices."stub/*"': {"input": 3.0, "output": 15.0}}
TEN_SCOPES: Tables = {
    **{
        f"budgets.b{number}": {"scope": scope, unit: 100_000_000, "per": per}
        for number, (scope, unit, per) in enumerate(_SCOPES)
    },
    **_PRICES,
}
"""Budgets that all bind each request, and are so high that nothing waits."""


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


class BarePair(msgspec.Struct, frozen=True):
    """The bare core, then the daemon, under the same load."""

    bare: Rate
    bare_latency: Latency
    daemon: Rate
    daemon_latency: Latency


class RoutePair(msgspec.Struct, frozen=True):
    """A free route without, then with another one's backlog."""

    alone: Rate
    alone_latency: Latency
    beside: Rate
    beside_latency: Latency


class BudgetPair(msgspec.Struct, frozen=True):
    """No budget, then ten on each request."""

    none: Rate
    none_latency: Latency
    ten: Rate
    ten_latency: Latency


class FairPair(msgspec.Struct, frozen=True):
    """A thousand agents with requests in the queue: in the order of arrival, then each in its turn."""

    arrival: Rate
    turns: Rate


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
            for name in self._turns("completions/s", DURABILITIES):
                found[name].append(self._flow(daemons[name]))
        return found

    def yardstick(self) -> list[BarePair]:
        """The bare core and the daemon in turns: completions per second, and one at a time."""
        found: list[BarePair] = []
        for number in self._turns("beside the bare core", range(1)):
            folder = self._folder / f"bare-{next(self._marks)}-{number}"
            with BareCoreUnderTest(folder) as bare:
                of_bare = generate(self._flow_job(bare), Rate), generate(self._loop_job(bare, "full"), Latency)
            shutil.rmtree(folder)
            with self._daemon("full", f"beside-{folder.name}") as daemon:
                found.append(BarePair(*of_bare, self._flow(daemon), self._loop(daemon, "full")))
        return found

    def life(self) -> Life:
        """Starts with a long queue and after kill -9, and commands."""
        home = Home(self._deep_folder(None), _FILLED)
        self._fill(home, None)
        return measure_life(home, self._folder, self._plan.runs, self._say)

    def latency(self) -> dict[Durability, list[Latency]]:
        """A closed loop beside this disk's own commits, for each durability in turns."""
        found: dict[Durability, list[Latency]] = {name: [] for name in DURABILITIES}
        with ExitStack() as stack:
            daemons = {name: stack.enter_context(self._daemon(name)) for name in DURABILITIES}
            for name in self._turns("latency", DURABILITIES):
                found[name].append(self._loop(daemons[name], name))
        return found

    def depth(self) -> dict[str, list[Pair]]:
        """A short queue and a long one in turns: in a thousand conversations, and each request in one of its own."""
        found: dict[str, list[Pair]] = {}
        for name, conversations in (("few", SHALLOW), ("own", None)):
            pairs = found[name] = []
            for _ in self._turns(f"queue depth, {name} conversations", ("",)):
                pairs.append(Pair(self._shallow(conversations), self._deep(conversations)))
            if conversations is not None:  # the other one serves the rows after this
                shutil.rmtree(self._deep_folder(conversations) / "var" / "db")
        return found

    def routes(self) -> list[RoutePair]:
        """A free route beside one with a long backlog, and without it, in turns."""
        busy = Home(self._deep_folder(None), _TWO_ROUTES)
        self._fill(busy, None)
        found: list[RoutePair] = []
        with ExitStack() as stack:
            alone = stack.enter_context(DaemonUnderTest(Home(self._folder / "alone", _TWO_ROUTES)))
            beside = stack.enter_context(DaemonUnderTest(busy))
            for _ in self._turns("two routes", ("",)):
                rates = [self._flow(daemon, "free/echo") for daemon in (alone, beside)]
                latencies = [self._loop(daemon, "full", "free/echo") for daemon in (alone, beside)]
                found.append(RoutePair(rates[0], latencies[0], rates[1], latencies[1]))
        return found

    def budgets(self) -> list[BudgetPair]:
        """No budget and ten that bind each request, in turns."""
        found: list[BudgetPair] = []
        with ExitStack() as stack:
            none = stack.enter_context(DaemonUnderTest(Home(self._folder / "no-budgets", _PRICES)))
            ten = stack.enter_context(DaemonUnderTest(Home(self._folder / "ten-budgets", TEN_SCOPES)))
            for _ in self._turns("budgets", ("",)):
                runs = [(self._flow(daemon), self._loop(daemon, "full")) for daemon in (none, ten)]
                found.append(BudgetPair(*runs[0], *runs[1]))
        return found

    def fairness(self) -> list[FairPair]:
        """A thousand agents wait, in the order of arrival and in turns, in turns."""
        found: list[FairPair] = []
        for _ in self._turns("a thousand agents", ("",)):
            found.append(FairPair(*[self._of_agents(fair) for fair in (False, True)]))
        return found

    def memory(self) -> Memory:
        """Resident memory, from idle to a long queue under load."""
        self._say("memory")
        with self._daemon("full", "memory") as daemon:
            idle = _memory(daemon)
            self._flow(daemon)
            loaded = _memory(daemon)
        home = Home(self._deep_folder(None), _FILLED)
        self._fill(home, None)
        with DaemonUnderTest(home) as daemon:
            filled = _memory(daemon)
            self._through_queue(daemon, CONCURRENCY, conversations=None)
            return Memory(idle, loaded, filled, _memory(daemon))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _turns(self, what: str, kinds: Sequence[T]) -> Iterator[T]:
        """All kinds again and again, so that what else happens on this machine meets each of them."""
        for run in range(1, self._plan.runs + 1):
            for kind in kinds:
                self._say(f"{what}: run {run} of {self._plan.runs}" + (f", {kind}" if kind else ""))
                yield kind

    def _daemon(self, durability: Durability, name: str = "plain") -> DaemonUnderTest:
        return DaemonUnderTest(Home(self._folder / f"{name}-{durability}", {"store": {"durability": durability}}))

    def _target(self, daemon: DaemonUnderTest | BareCoreUnderTest, model: str = "stub/echo", **other: Any) -> Target:
        mark = next(self._marks)
        fields = {"sessions": "talk", "conversations": SHALLOW, **other}
        return Target(socket=str(daemon.socket), pid=daemon.pid, model=model, mark=f"{mark}-{daemon.pid}", **fields)

    def _flow(self, daemon: DaemonUnderTest, model: str = "stub/echo") -> Rate:
        """Under load, each request in a conversation that is free."""
        return _checked(daemon, generate(self._flow_job(daemon, model), Rate))

    def _flow_job(self, daemon: DaemonUnderTest | BareCoreUnderTest, model: str = "stub/echo") -> Flow:
        return Flow(
            target=self._target(daemon, model),
            window=self._plan.window,
            warm_up=self._plan.warm_up,
            seconds=self._plan.seconds,
        )

    def _loop(self, daemon: DaemonUnderTest, durability: Durability, model: str = "stub/echo") -> Latency:
        """One request at a time."""
        return _checked(daemon, generate(self._loop_job(daemon, durability, model), Latency))

    def _loop_job(
        self, daemon: DaemonUnderTest | BareCoreUnderTest, durability: Durability, model: str = "stub/echo"
    ) -> Loop:
        return Loop(
            target=self._target(daemon, model),
            warm_up=self._plan.warm_up / 4,
            seconds=self._plan.seconds,
            probe=str(self._folder / f"probe-{next(self._marks)}"),
            durability=durability,
        )

    def _through_queue(self, daemon: DaemonUnderTest, window: int, **target: Any) -> Rate:
        """Under load, each request through a queue that stays as long as it is."""
        job = Flow(
            target=self._target(daemon, turns=None, **target),
            window=window,
            warm_up=self._plan.warm_up / 2,
            seconds=self._plan.seconds,
            follow_all=True,
        )
        return _checked(daemon, generate(job, Rate))

    def _shallow(self, conversations: int | None) -> Rate:
        with DaemonUnderTest(Home(self._folder / f"shallow-{conversations}", _FILLED)) as daemon:
            return self._through_queue(daemon, SHALLOW + CONCURRENCY, conversations=conversations)

    def _deep(self, conversations: int | None) -> Rate:
        home = Home(self._deep_folder(conversations), _FILLED)
        self._fill(home, conversations)
        hold_back(home.configure())
        with DaemonUnderTest(home) as daemon:
            rate = self._through_queue(daemon, CONCURRENCY, sessions=SESSIONS, conversations=conversations)
            waiting = daemon.ask("completion:status")["queued"]
        if waiting < self._plan.depth * 0.8:
            raise InternalError(f"the long queue did not stay long: {waiting:,} of {self._plan.depth:,} wait")
        return rate

    def _of_agents(self, fair: bool) -> Rate:
        home = Home(self._folder / f"agents-{next(self._marks)}", {**_FILLED, "queue": {"fair": fair}})
        self._fill(home, None, AGENTS_DEPTH, AGENTS)
        hold_back(home.configure())
        with DaemonUnderTest(home) as daemon:
            rate = self._through_queue(daemon, CONCURRENCY, conversations=None, agents=AGENTS)
        shutil.rmtree(home.folder)
        return rate

    def _deep_folder(self, conversations: int | None) -> Path:
        return self._folder / f"deep-{conversations}"

    def _fill(self, home: Home, conversations: int | None, depth: int | None = None, agents: int = 10) -> None:
        depth = depth or self._plan.depth
        self._say(f"filling the queue to {depth:,}")

        def filled(count: int) -> None:
            self._say(f"filled {count:,}")

        fill(home.configure(), depth, conversations, "stub/echo", filled, agents=agents)


def _memory(daemon: DaemonUnderTest) -> int:
    return int(daemon.ask("system:health")["memory_bytes"])


def _checked(daemon: DaemonUnderTest, measured: T) -> T:
    """What was measured, once the daemon agrees that nothing failed."""
    status = daemon.ask("completion:status")
    if status["failed"] or not status["completed"]:
        raise InternalError(f"the run is worth nothing: {status['completed']} completed, {status['failed']} failed")
    return measured
