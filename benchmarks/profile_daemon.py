"""Run a row of `ksi bench` with the daemon under a profiler, and print what costs.

    python -m benchmarks.profile_daemon [--row throughput|latency|queue] [--seconds 5] [--durability full]
        [--budgets] [--window 256] [--lines 60] [--keep FILE]

The row `queue` is `depth` with its short queue alone: each request waits in line and is claimed. For each function: its
own time, its time with what it calls, and how often it is called, all for one completion. The profiler makes every
Python call dearer, so the shares are to be read, not the sums; the run without it, printed first, has the figures.
With --keep the profile stays in FILE, for `python -m pstats FILE` or a viewer.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.daemon_under_test import CONCURRENCY, DaemonUnderTest, Home, generate
from benchmarks.figures import Latency, Rate
from benchmarks.load import Flow, Loop, Target
from benchmarks.processes import few_cores
from benchmarks.rows import SHALLOW, TEN_SCOPES

KSI = (sys.executable, "-m", "ksi.cli")
ONCE = ("sqlite/ends.py", "settle")
"""What happens once for each completion."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=("throughput", "latency", "queue"), default="throughput")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--durability", choices=("full", "normal"), default="full")
    parser.add_argument("--budgets", action="store_true", help="ten that bind each request")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lines", type=int, default=60)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    parent = Path(__file__).parent.parent / "var"
    parent.mkdir(exist_ok=True)
    with few_cores(), tempfile.TemporaryDirectory(prefix="profile-", dir=parent) as folder:
        profile = (options.keep or Path(folder) / "profile").absolute()
        print(f"plain:    {run(Path(folder) / 'plain', KSI, options)}")
        profiled = (sys.executable, "-m", "benchmarks.profile_daemon", "serve", str(profile))
        print(f"profiled: {run(Path(folder) / 'profiled', profiled, options)}\n")
        show(profile, options.lines)


def run(folder: Path, command: Sequence[str], options: argparse.Namespace) -> str:
    """One run on a new home, in a line."""
    home = Home(folder, {"store": {"durability": options.durability}, **(TEN_SCOPES if options.budgets else {})})
    with DaemonUnderTest(home, command=command) as daemon:
        target = Target(
            socket=str(daemon.socket),
            pid=daemon.pid,
            model="stub/echo",
            mark="profile",
            sessions="talk",
            conversations=SHALLOW,
        )
        if options.row != "latency":
            through = options.row == "queue"
            window = SHALLOW + CONCURRENCY if through else options.window
            flow = Flow(target=target, window=window, warm_up=2.5, seconds=options.seconds, follow_all=through)
            rate = generate(flow, Rate)
            return f"{rate.per_second:,.0f} completions/s, {rate.daemon_us or 0:.0f} µs of the daemon's CPU for each"
        probe = str(folder / "probe")
        loop = Loop(target=target, warm_up=0.5, seconds=options.seconds, probe=probe, durability=options.durability)
        latency = generate(loop, Latency)
        return (
            f"p50 {latency.loop.p50:.2f} ms, p99 {latency.loop.p99:.2f} ms (one commit {latency.commit.p50:.2f} and "
            f"{latency.commit.p99:.2f} ms), {latency.daemon_us or 0:.0f} µs of the daemon's CPU for each"
        )


def show(profile: Path, lines: int) -> None:
    """The dearest functions by their own time, per completion."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    file, name = ONCE
    completions = next(calls for key, (_, calls, *_rest) in stats.items() if key[0].endswith(file) and key[2] == name)
    total = sum(calls for _, calls, *_rest in stats.values())
    print(f"{completions:,} completions, {total / completions:,.0f} calls for each; µs own, µs in all, calls for each:")
    for (path, line, what), (_, calls, own, in_all, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:lines]:
        where = f"{'/'.join(Path(path).parts[-2:])}:{line} " if line else ""
        per = 1e6 / completions
        print(f"{own * per:8.1f} {in_all * per:8.1f} {calls / completions:7.1f}  {where}{what}")


def serve(profile: str, home: str) -> int:
    """The daemon, in this process, profiled until it has stopped."""
    from ksi.config.reader import load
    from ksi.daemon.main_process import run as run_daemon

    profiler = cProfile.Profile()
    code = profiler.runcall(run_daemon, load(Path(home)), say=lambda line: print(line, flush=True))
    profiler.dump_stats(profile)
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2], sys.argv[4]))
    main()
