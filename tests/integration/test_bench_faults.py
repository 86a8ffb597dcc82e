"""What `ksi bench` says of a provider that dies under load, from a very small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksi.benchmarking.faults import FaultPlan, fault_lines, measure_faults

PLAN = FaultPlan(rate=40, before=0.5, dead=1.5, after=0.3, timeout=0.3, open_for=0.5, slots=8, delay=0.005)


@pytest.mark.promise("F3", "F4", "F7")
def test_a_provider_that_dies_under_load_is_left_and_used_again_and_no_request_is_lost(tmp_path: Path) -> None:
    said: list[str] = []
    runs = measure_faults(PLAN, tmp_path, said.append)
    assert [run.way for run in runs] == ["fails", "hangs"]
    assert len(said) == 2
    for run in runs:
        assert run.not_completed == 0
        assert run.spare_share > 0.9
        assert run.calls_in_vain > 0
        assert 0 < run.left_alone_after <= PLAN.dead
        assert 0 < run.used_again_after < 30
        assert all(times.samples > 5 for times in (run.before, run.dead, run.after))
    lines = list(fault_lines(runs))
    assert len(lines) == 12
    assert [line.met for line in lines if line.target is not None] == [True, True]
