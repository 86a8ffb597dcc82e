"""The output of `ksi bench --page`, from a very small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import PagePlan, measure_page, page_lines

PLAN = PagePlan(seconds=0.3, warm_up=0.3, runs=1)


@pytest.mark.promise("V1")
def test_an_open_page_is_measured_by_the_daemon_s_own_time(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure_page(PLAN, tmp_path, said.append)
    (run,) = report.runs
    assert len(said) == 1
    assert min(run.alone.completions, run.watched.completions) > 0
    *_, added = page_lines(report)
    assert (added.value, added.met is None) == (run.added, False)
    assert list(tmp_path.iterdir()) == []
