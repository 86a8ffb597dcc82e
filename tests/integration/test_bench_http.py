"""The output of `ksi bench --http`, from a very small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.http import HttpPlan, http_lines, measure_http

PLAN = HttpPlan(seconds=0.2, warm_up=0.05, runs=2, connections=5, held=20)


@pytest.mark.promise("H5")
def test_calls_by_http_are_measured_together_with_their_endpoint(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure_http(PLAN, tmp_path, said.append)
    assert len(said) == PLAN.runs + 1
    for run in report.runs:
        for bare, door in (
            (run.bare, run.door),
            (run.bare_streams, run.door_streams),
            (run.bare_crowd, run.door_crowd),
        ):
            assert min(bare.calls, door.calls) > 0
            assert 0 < bare.whole.p50 < door.whole.p50
            assert door.first.p50 <= door.whole.p50
    assert [line.met is not None for line in http_lines(report) if line.target is not None] == [True] * 4
    assert list(tmp_path.iterdir()) == []
