"""From what was measured to lines that can be read: medians, targets, and whether each is met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from benchmarks.claude import ClaudePlan, ClaudeRun, ClaudeTurns
from benchmarks.faults import FaultPlan, FaultRun
from benchmarks.figures import Latency, Rate, Times, median
from benchmarks.life import Life
from benchmarks.machine import Machine
from benchmarks.rows import SHALLOW, BarePair, BudgetPair, FairPair, Memory, Pair, Plan, RoutePair

TARGETED = "full"
"""The durability that the targets are stated for."""
RATE_TARGET = 5_000
"""Completions per second on two processors."""
P50_MARGIN = 0.3
"""Milliseconds above two commits."""
P99_MARGIN = 3.0
"""Milliseconds above two of the commit's p99."""
WARM_TARGET = 60
"""Milliseconds over its endpoint's own time, for a turn in a warm process."""
DEPTH_TARGET = 0.75
"""Of the rate at a short queue, at a long one."""
BUDGETS_TARGET = 0.9
"""Of the rate without budgets, with ten on each request."""
FAIR_TARGET = 0.95
"""Of the rate in the order of arrival, with a thousand agents that take turns."""
BARE_TARGET = 0.5
"""Of the bare core's rate."""
RECOVERY_TARGET = 1_000
"""Milliseconds, as are the next two."""
HELP_TARGET = 120
STATUS_TARGET = 150

T = TypeVar("T")


class Report(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Everything that was measured, run by run."""

    machine: Machine
    plan: Plan
    throughput: dict[str, list[Rate]] | None = None
    yardstick: list[BarePair] | None = None
    latency: dict[str, list[Latency]] | None = None
    depth: dict[str, list[Pair]] | None = None
    routes: list[RoutePair] | None = None
    budgets: list[BudgetPair] | None = None
    fairness: list[FairPair] | None = None
    memory: Memory | None = None
    life: Life | None = None
    fault_plan: FaultPlan | None = None
    faults: list[FaultRun] | None = None
    claude_plan: ClaudePlan | None = None
    claude: ClaudeRun | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: medians over the runs."""

    row: str
    what: str
    figure: str
    value: float
    unit: str
    target: str | None = None
    met: bool | None = None


def lines(report: Report) -> list[Line]:
    """The table."""
    found: list[Line] = []
    for durability, rates in (report.throughput or {}).items():
        found += _throughput(durability, rates)
    if report.yardstick is not None:
        found += _yardstick(report.yardstick)
    for durability, latencies in (report.latency or {}).items():
        found += _latency(durability, latencies)
    for name, pairs in (report.depth or {}).items():
        found += _depth(name, pairs, report.plan)
    if report.routes is not None:
        found += _routes(report.routes, report.plan)
    if report.budgets is not None:
        found += _budgets(report.budgets)
    if report.fairness is not None:
        found += _fairness(report.fairness)
    if report.memory is not None:
        found += _memory(report.memory, report.plan)
    if report.life is not None:
        found += _life(report.life, report.plan)
    if report.faults is not None and report.fault_plan is not None:
        for run in report.faults:
            found += _faults(run, report.fault_plan)
    if report.claude is not None:
        found += _claude(report.claude)
    return found


def _throughput(durability: str, rates: Sequence[Rate]) -> Iterator[Line]:
    rate = _middle(rates, lambda r: r.per_second)
    counts = durability == TARGETED
    yield Line(
        row="throughput",
        what=f"completions, {SHALLOW:,} conversations, durability {durability}",
        figure=f"{rate:,.0f}/s",
        value=rate,
        unit="1/s",
        target=f">= {RATE_TARGET:,}/s" if counts else None,
        met=rate >= RATE_TARGET if counts else None,
    )
    yield from _cpu("throughput", f"the daemon's CPU for each, durability {durability}", [r.daemon_us for r in rates])


def _yardstick(pairs: Sequence[BarePair]) -> Iterator[Line]:
    yield _rate("yardstick", "the bare core", _middle(pairs, lambda p: p.bare.per_second))
    yield _rate("yardstick", "the daemon with everything on", _middle(pairs, lambda p: p.daemon.per_second))
    ratios = [p.daemon.per_second / p.bare.per_second for p in pairs]
    yield _ratio("yardstick", "daemon : bare core", ratios, BARE_TARGET)
    yield from _cpu("yardstick", "the bare core's CPU for each", [p.bare.daemon_us for p in pairs])
    yield from _cpu("yardstick", "the daemon's CPU for each", [p.daemon.daemon_us for p in pairs])
    bare = median([p.bare_latency.loop.p50 for p in pairs])
    daemon = median([p.daemon_latency.loop.p50 for p in pairs])
    yield _time("yardstick", "one at a time, the bare core, p50", bare)
    yield _time("yardstick", "one at a time, the daemon, p50", daemon, f"<= {bare:.2f} ms", daemon <= bare)


def _life(life: Life, plan: Plan) -> Iterator[Line]:
    for what, spans, most in (
        (f"a start until it serves, {plan.depth:,} waiting", life.start, None),
        ("a start until it serves, after kill -9 under load", life.recovery, RECOVERY_TARGET),
        ("`ksi --help`", life.help, HELP_TARGET),
        ("`ksi status`", life.status, STATUS_TARGET),
    ):
        value, cpu = 1e3 * _middle(spans, lambda s: s.wall), 1e3 * _middle(spans, lambda s: s.cpu)
        yield Line(
            row="life",
            what=what,
            figure=f"{value:,.0f} ms ({cpu:,.0f} ms of CPU)",
            value=value,
            unit="ms",
            target=None if most is None else f"<= {most:,} ms",
            met=None if most is None else value <= most,
        )


def _latency(durability: str, runs: Sequence[Latency]) -> Iterator[Line]:
    write = "plain write and sync" if durability == "full" else "plain write"
    for name, margin, read in (("p50", P50_MARGIN, _p50), ("p99", P99_MARGIN, _p99)):
        loop, commit, sync = (median([read(times) for times in part]) for part in _parts(runs))
        bound = 2 * commit + margin
        what = f"one at a time, durability {durability}, {name}"
        if durability == TARGETED:
            yield _time("latency", what, loop, f"<= {bound:.2f} ms", loop <= bound)
        else:
            yield _time("latency", what, loop)
        yield _time("latency", f"  one commit here, {name}", commit)
        yield _time("latency", f"  one {write} here, {name}", sync)
    yield from _cpu("latency", f"the daemon's CPU for each, durability {durability}", [r.daemon_us for r in runs])


def _parts(runs: Sequence[Latency]) -> tuple[list[Times], list[Times], list[Times]]:
    return [r.loop for r in runs], [r.commit for r in runs], [r.sync for r in runs]


def _depth(name: str, pairs: Sequence[Pair], plan: Plan) -> Iterator[Line]:
    where = f"in {SHALLOW:,} conversations" if name == "few" else "each in its own conversation"
    yield _rate("depth", f"{SHALLOW:,} waiting, {where}", _middle(pairs, lambda p: p.shallow.per_second))
    yield _rate("depth", f"{plan.depth:,} waiting, {where}", _middle(pairs, lambda p: p.deep.per_second))
    ratio = _middle(pairs, lambda p: p.deep.per_second / p.shallow.per_second)
    yield Line(
        row="depth",
        what=f"{plan.depth:,} : {SHALLOW:,}, {where}",
        figure=f"{ratio:.0%}",
        value=ratio,
        unit="",
        target=f">= {DEPTH_TARGET:.0%}",
        met=ratio >= DEPTH_TARGET,
    )
    yield from _cpu("depth", f"the daemon's CPU for each, {SHALLOW:,} waiting", [p.shallow.daemon_us for p in pairs])
    yield from _cpu("depth", f"the daemon's CPU for each, {plan.depth:,} waiting", [p.deep.daemon_us for p in pairs])


def _routes(pairs: Sequence[RoutePair], plan: Plan) -> Iterator[Line]:
    beside = f"beside {plan.depth:,} that wait for another route"
    yield _rate("routes", "a free route alone", _middle(pairs, lambda p: p.alone.per_second))
    yield _rate("routes", f"the same {beside}", _middle(pairs, lambda p: p.beside.per_second))
    ratio = _middle(pairs, lambda p: p.beside.per_second / p.alone.per_second)
    yield Line(row="routes", what="beside : alone", figure=f"{ratio:.0%}", value=ratio, unit="")
    for name, read in (("p50", _p50), ("p99", _p99)):
        yield _time("routes", f"one at a time alone, {name}", median([read(p.alone_latency.loop) for p in pairs]))
        yield _time("routes", f"the same {beside}, {name}", median([read(p.beside_latency.loop) for p in pairs]))
    yield from _cpu("routes", "the daemon's CPU for each alone", [p.alone.daemon_us for p in pairs])
    yield from _cpu("routes", f"the daemon's CPU for each {beside}", [p.beside.daemon_us for p in pairs])


def _budgets(pairs: Sequence[BudgetPair]) -> Iterator[Line]:
    yield _rate("budgets", "without budgets", _middle(pairs, lambda p: p.none.per_second))
    yield _rate("budgets", "ten budgets on each request", _middle(pairs, lambda p: p.ten.per_second))
    yield _ratio("budgets", "ten : none", [p.ten.per_second / p.none.per_second for p in pairs], BUDGETS_TARGET)
    yield from _cpu("budgets", "the daemon's CPU for each without", [p.none.daemon_us for p in pairs])
    yield from _cpu("budgets", "the daemon's CPU for each with ten", [p.ten.daemon_us for p in pairs])
    yield _time("budgets", "one at a time without, p50", median([p.none_latency.loop.p50 for p in pairs]))
    yield _time("budgets", "one at a time with ten, p50", median([p.ten_latency.loop.p50 for p in pairs]))


def _fairness(pairs: Sequence[FairPair]) -> Iterator[Line]:
    yield _rate(
        "fairness", "1,000 agents wait, in the order of arrival", _middle(pairs, lambda p: p.arrival.per_second)
    )
    yield _rate("fairness", "the same, each in its turn", _middle(pairs, lambda p: p.turns.per_second))
    ratios = [p.turns.per_second / p.arrival.per_second for p in pairs]
    yield _ratio("fairness", "turns : arrival", ratios, FAIR_TARGET)
    yield from _cpu("fairness", "the daemon's CPU for each by arrival", [p.arrival.daemon_us for p in pairs])
    yield from _cpu("fairness", "the daemon's CPU for each in turns", [p.turns.daemon_us for p in pairs])


def _ratio(row: str, what: str, ratios: Sequence[float], target: float) -> Line:
    value = median(ratios)
    return Line(
        row=row,
        what=what,
        figure=f"{value:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        value=value,
        unit="",
        target=f">= {target:.2f}",
        met=value >= target,
    )


def _memory(memory: Memory, plan: Plan) -> Iterator[Line]:
    for what, size in (
        ("just started", memory.idle),
        ("after a run under load", memory.loaded),
        (f"just started with {plan.depth:,} waiting", memory.filled),
        (f"after a run under load with {plan.depth:,} waiting", memory.filled_loaded),
    ):
        yield Line(row="memory", what=f"memory, {what}", figure=f"{size / 1e6:,.0f} MB", value=size, unit="bytes")
    each = max(0, memory.filled - memory.idle) / plan.depth
    yield Line(row="memory", what="  for each that waits", figure=f"{each:,.1f} bytes", value=each, unit="bytes")


def _faults(run: FaultRun, plan: FaultPlan) -> Iterator[Line]:
    what = f"a provider that {run.way}"
    for phase, times in (
        ("before", run.before),
        ("while it is dead", run.dead),
        ("  those that met it", run.met),
        ("used again", run.after),
    ):
        yield Line(
            row="faults",
            what=f"{what}: {phase}",
            figure=f"p50 {times.p50:,.0f} ms, p99 {times.p99:,.0f} ms, {times.samples:,} requests",
            value=times.p99,
            unit="ms",
        )
    yield Line(
        row="faults",
        what=f"{what}: calls in vain until it is left alone",
        figure=f"{run.calls_in_vain} in {run.left_alone_after:.2f} s, then {run.probes_in_vain} probes",
        value=run.calls_in_vain,
        unit="calls",
        target=f"<= {plan.bound}",
        met=run.calls_in_vain <= plan.bound,
    )
    yield Line(
        row="faults",
        what=f"{what}: used again after its recovery",
        figure=f"{run.used_again_after:.2f} s",
        value=run.used_again_after,
        unit="s",
    )
    yield Line(
        row="faults",
        what=f"{what}: requests without an answer",
        figure=f"{run.not_completed} ({run.spare_share:.1%} served by the other one meanwhile)",
        value=run.not_completed,
        unit="requests",
        target="0",
        met=run.not_completed == 0,
    )


def _claude(run: ClaudeRun) -> Iterator[Line]:
    def turns(what: str, of: Sequence[ClaudeTurns]) -> Line:
        value = _middle(of, lambda one: one.over.p50)
        figure = f"{value:,.0f} ms (p99 {_middle(of, lambda one: one.over.p99):,.0f} ms)"
        return Line(row="claude", what=what, figure=figure, value=value, unit="ms")

    warm = turns(f"Claude Code {run.version}: a turn in a warm process, over its endpoint's time", run.warm)
    yield msgspec.structs.replace(warm, target=f"<= {WARM_TARGET} ms", met=warm.value <= WARM_TARGET)
    yield turns("  in a new process", run.cold)
    yield turns("  by bare `claude -p --resume`", run.bare)
    yield _time("claude", "  its endpoint's own time", _middle(run.warm, lambda one: one.own.p50))
    pool = run.pool
    yield Line(
        row="claude",
        what=f"processes at most, over {pool.conversations} conversations",
        figure=f"{pool.most}, {pool.warm} of them kept",
        value=pool.most,
        unit="processes",
        target=f"<= {pool.limit + 1}",
        met=pool.most <= pool.limit + 1,
    )
    yield Line(
        row="claude",
        what=f"memory of the {pool.warm} that are kept",
        figure=f"{pool.memory / 1e6:,.0f} MB, the greatest {pool.memory_of_one / 1e6:,.0f} MB",
        value=pool.memory,
        unit="bytes",
    )


def _rate(row: str, what: str, value: float) -> Line:
    return Line(row=row, what=what, figure=f"{value:,.0f}/s", value=value, unit="1/s")


def _time(row: str, what: str, value: float, target: str | None = None, met: bool | None = None) -> Line:
    return Line(row=row, what=what, figure=f"{value:.2f} ms", value=value, unit="ms", target=target, met=met)


def _cpu(row: str, what: str, values: Sequence[float | None]) -> Iterator[Line]:
    known = [value for value in values if value is not None]
    if known:
        value = median(known)
        yield Line(row=row, what=f"  {what}", figure=f"{value:.0f} µs", value=value, unit="us")


def _middle(runs: Sequence[T], read: Callable[[T], float]) -> float:
    return median([read(run) for run in runs])


def _p50(times: Times) -> float:
    return times.p50


def _p99(times: Times) -> float:
    return times.p99
