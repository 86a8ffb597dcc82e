"""The benchmark's harness, run for a moment with real daemons."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import lines
from benchmarks.rows import Plan
from benchmarks.session import measure

MOMENT = Plan(seconds=0.1, warm_up=0.1, runs=1, depth=30_000, window=16)
ROWS = ("latency", "depth", "memory")
"""Together they do all that the others but the next two do."""


def test_rows_are_measured(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure(MOMENT, tmp_path, ROWS, keep=True, say=said.append)
    found = lines(report)
    assert tuple(dict.fromkeys(line.row for line in found)) == ROWS
    assert all(line.value > 0 for line in found if line.unit in {"1/s", "ms", "bytes"})
    kept = Path(said[-1].removeprefix("kept: "))
    # The daemons keep a response log. Its files go when their sessions do, two seconds after their last turn.
    assert (kept / "plain-full" / "var" / "logs" / "responses").is_dir()


def test_the_bare_core_and_a_daemon_s_life_are_measured(tmp_path: Path) -> None:
    report = measure(
        Plan(seconds=0.1, warm_up=0.1, runs=1, depth=1_000, window=16),
        tmp_path,
        ["yardstick", "life"],
        keep=False,
        say=lambda _: None,
    )
    found = lines(report)
    assert tuple(dict.fromkeys(line.row for line in found)) == ("yardstick", "life")
    # A processor's time is counted in hundredths of a second: the bare core may use none in a moment.
    assert all(line.value > 0 for line in found if line.unit != "us")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    there: list[int] = []
    measure(
        MOMENT, tmp_path / "var", ["latency"], keep=False, say=lambda _: there.append(len(list(tmp_path.rglob("*"))))
    )
    assert max(there) > 5, "it was all in this folder"
    assert list((tmp_path / "var").iterdir()) == []
