"""The output of `ksi bench` about a provider that dies under load, from a very small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import FaultPlan
from benchmarks.report import lines
from benchmarks.rows import Plan
from benchmarks.session import measure

PLAN = FaultPlan(rate=40, warm_up=0.2, before=0.5, dead=1.5, after=0.3, timeout=0.3, open_for=0.5, slots=8, delay=0.005)


@pytest.mark.promise("F3", "F4", "F7")
def test_a_provider_that_dies_under_load_is_left_and_used_again_and_no_request_is_lost(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure(Plan(), tmp_path, [], keep=False, say=said.append, faults=PLAN)
    runs = report.faults or []
    assert [run.way for run in runs] == ["fails", "hangs"]
    assert len(said) == 2
    for run in runs:
        assert run.not_completed == 0
        assert run.spare_share > 0.9
        assert 0 < run.calls_in_vain <= PLAN.bound
        assert 0 < run.left_alone_after <= PLAN.dead
        assert 0 < run.used_again_after < 30
        assert all(times.samples > 5 for times in (run.before, run.dead, run.after))
        assert 0 < run.met.samples <= run.dead.samples
    found = lines(report)
    assert len(found) == 14
    assert [line.met for line in found if line.target is not None] == [True] * 4
