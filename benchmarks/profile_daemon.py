"""Run `ksi bench`'s first row with the daemon under a profiler, and print what costs.

    python benchmarks/profile_daemon.py [--seconds 5] [--durability full] [--window 256] [--lines 40] [--sort tottime]
        [--keep FILE]

The profiler makes every Python call dearer, so the shares are to be read, not the rate; the run without it, printed
first, is the figure. With --keep the profile stays in FILE, for `python -m pstats FILE` or a viewer.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
from pathlib import Path

from ksi.benchmarking.daemon_under_test import DaemonUnderTest, Home, generate
from ksi.benchmarking.figures import Rate
from ksi.benchmarking.load import Flow, Target
from ksi.benchmarking.processes import few_cores


def main() -> None:
    """Measure plain, then profiled, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--durability", choices=("full", "normal"), default="full")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--sort", default="tottime")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    parent = Path(__file__).parent.parent / "var"
    parent.mkdir(exist_ok=True)
    with few_cores(), tempfile.TemporaryDirectory(prefix="profile-", dir=parent) as folder:
        profile = options.keep or Path(folder) / "profile"
        here = [sys.executable, str(Path(__file__).absolute()), "serve", str(profile.absolute())]
        for name, command in (("plain", (sys.executable, "-m", "ksi.cli")), ("profiled", here)):
            rate = run(Path(folder) / name, command, options)
            print(
                f"{name:9} {rate.per_second:8,.0f} completions/s; CPU for each: {rate.daemon_us or 0:.0f} µs of the "
                f"daemon's, {rate.load_us:.0f} µs of the load's"
            )
        pstats.Stats(str(profile)).sort_stats(options.sort).print_stats(options.lines)


def run(home: Path, command: tuple[str, ...] | list[str], options: argparse.Namespace) -> Rate:
    """One run on a new home."""
    with DaemonUnderTest(Home(home, {"store": {"durability": options.durability}}), command=command) as daemon:
        target = Target(
            socket=str(daemon.socket),
            pid=daemon.pid,
            model="stub/echo",
            mark="profile",
            sessions="talk",
            conversations=1_000,
        )
        flow = Flow(target=target, window=options.window, warm_up=2.5, seconds=options.seconds)
        return generate(flow, Rate)


def serve(profile: str, home: str) -> int:
    """The daemon, in this process, profiled until it has stopped."""
    from ksi.config import load
    from ksi.daemon import run as run_daemon

    profiler = cProfile.Profile()
    code = profiler.runcall(run_daemon, load(Path(home)), say=lambda line: print(line, flush=True))
    profiler.dump_stats(profile)
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2], sys.argv[4]))
    main()
