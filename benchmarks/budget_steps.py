"""Measure what budgets cost in the SQLite store: the claim and the end of a request, without and with scopes.

    python -m benchmarks.budget_steps [--scopes 0 1 10] [--together 16] [--turns 20000] [--runs 5] [--profile]

One process, no daemon: requests of a thousand conversations run at once and are completed, `--together` of each in a
transaction. The kinds come in turns, and the medians of the processor's time for each request count. With --profile
the most scopes run once more under cProfile, which makes every Python call dearer.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.rows import SHALLOW
from ksi.budgets.rules import NANO, Ask, Budget, Caps, Kind, Spent, Unit, caps_at
from ksi.budgets.windows import Period
from ksi.clock import Chance, SystemClock
from ksi.request import Attempt, OnBusy, Outcome, Priority, State, Usage
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import Claimed, Finish, NewRequest, Offer, StoreRules

TEN: Sequence[tuple[Kind, str, Unit, Period]] = (
    ("all", "", Unit.USD, Period.HOUR),
    ("all", "", Unit.TOKENS, Period.DAY),
    ("all", "", Unit.USD, Period.MONTH),
    ("agent", "*", Unit.USD, Period.DAY),
    ("agent", "night*", Unit.TOKENS, Period.WEEK),
    ("token", "*", Unit.REQUESTS, Period.HOUR),
    ("model", "*", Unit.USD, Period.DAY),
    ("provider", "*", Unit.USD, Period.DAY),
    ("provider", "stub", Unit.TOKENS, Period.MONTH),
    ("session", "*", Unit.USD, Period.DAY),
)
"""Budgets that all bind each request."""

LIMITS = {Unit.USD: 1_000_000 * NANO, Unit.TOKENS: 10**12, Unit.REQUESTS: 10**9}
"""So high that nothing waits."""

OFFERS = (Offer("stub", "stub", 100_000),)
ASK = Ask("stub", "stub/echo", 300, 4_096, False, 3_000.0, 15_000.0, 0)
SPENT = Spent(tokens=500, nanos=4_000_000)


def budgets(count: int) -> list[Budget]:
    """The first of the ten."""
    return [
        Budget(name=f"{kind}-{number}", kind=kind, named=named, unit=unit, limit=LIMITS[unit], per=per, warn_at=(0.8,))
        for number, (kind, named, unit, per) in enumerate(TEN[:count])
    ]


class Steps:
    """A store on a database of its own, and the turns that it takes."""

    def __init__(self, store: SqliteStore, scopes: int, together: int) -> None:
        self._store = store
        self._clock = SystemClock()
        self._caps: Caps = caps_at(budgets(scopes), (), self._clock.now().wall)
        self._together = together
        self._number = 0

    async def turns(self, count: int) -> float:
        """Let as many requests run and end; microseconds of the processor for each."""
        begun = time.process_time()
        for _ in range(count // self._together):
            numbers = range(self._number, self._number + self._together)
            self._number += self._together
            runs = await asyncio.gather(*(self._begin(number) for number in numbers))
            await asyncio.gather(*(self._end(run) for run in runs))
        return (time.process_time() - begun) * 1e6 / count

    async def _begin(self, number: int) -> Claimed:
        new = NewRequest(
            request_id=f"request-{number}",
            conversation=f"talk-{number % SHALLOW}",
            priority=Priority.NORMAL,
            rank=number,
            on_busy=OnBusy.ENQUEUE,
            hold_on_retry=True,
            due=None,
            expires=None,
            route="stub",
            model="stub/echo",
            agent_id=f"nightly-{number % 20}",
            body=b'{"prompt": "Name three colours"}',
            demand=(ASK,) if self._caps else (),
        )
        entered = await self._store.enqueue(new, OFFERS, self._clock.now(), awaited=True, caps=self._caps)
        assert entered.claim is not None
        return entered.claim

    async def _end(self, run: Claimed) -> None:
        now = self._clock.now()
        attempt = Attempt(
            number=1,
            provider="stub",
            outcome=Outcome.COMPLETED,
            started_at=run.started_at,
            finished_at=now.wall,
            text="red, green, blue",
            usage=Usage(input_tokens=300, output_tokens=200),
        )
        spent = SPENT if self._caps else None
        await self._store.settle(run, attempt, Finish(state=State.COMPLETED), now, None, spent, self._caps)


async def measure(folder: Path, scopes: int, together: int, turns: int, profiler: cProfile.Profile | None) -> float:
    """One run on a new database, warmed up by its first tenth."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        store = SqliteStore(Path(home) / "ksi.db", StoreRules(), Chance(random.Random(0)), durability="normal")
        await store.open(SystemClock().now(), lambda: None)
        try:
            steps = Steps(store, scopes, together)
            await steps.turns(turns // 10)
            if profiler is not None:
                profiler.enable()
            found = await steps.turns(turns)
            if profiler is not None:
                profiler.disable()
        finally:
            await store.close()
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scopes", type=int, nargs="+", default=[0, 1, 10])
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--turns", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    parent = Path(__file__).parent.parent / "var"
    parent.mkdir(exist_ok=True)
    found: dict[int, list[float]] = {scopes: [] for scopes in options.scopes}
    for _ in range(options.runs):
        for scopes, times in found.items():
            times.append(uvloop.run(measure(parent, scopes, options.together, options.turns, None)))
    for scopes, times in found.items():
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"{scopes:2} scopes: {statistics.median(times):6.1f} µs for each request ({spread})")
    if options.profile:
        profiler = cProfile.Profile()
        uvloop.run(measure(parent, max(options.scopes), options.together, options.turns, profiler))
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
