"""The benchmark's harness, run for a moment with real daemons."""

from __future__ import annotations

from pathlib import Path

from ksi.benchmarking.report import lines
from ksi.benchmarking.rows import Plan
from ksi.benchmarking.session import measure

MOMENT = Plan(seconds=0.1, warm_up=0.1, runs=1, depth=40_000, window=16)
ROWS = ("latency", "depth", "memory")
"""Together they do all that the others do."""


def test_rows_are_measured(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure(MOMENT, tmp_path, ROWS, keep=True, say=said.append)
    found = lines(report)
    assert tuple(dict.fromkeys(line.row for line in found)) == ROWS
    assert all(line.value > 0 for line in found if line.unit in {"1/s", "ms", "bytes"})
    kept = Path(said[-1].removeprefix("kept: "))
    assert list((kept / "plain-full" / "var" / "logs" / "responses").iterdir())


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    said: list[str] = []
    measure(MOMENT, tmp_path / "var", [], keep=False, say=said.append)
    assert list((tmp_path / "var").iterdir()) == []
