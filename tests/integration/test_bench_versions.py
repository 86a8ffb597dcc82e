"""The output of `ksi bench --versions`, from a very small run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.versions import KINDS, VersionsPlan, measure_versions, version_lines


def test_both_versions_are_measured_and_compared(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure_versions(VersionsPlan(seconds=0.2, warm_up=0.05, runs=2), tmp_path, said.append)
    assert list(report.runs) == list(KINDS)
    assert all(len(runs) == 2 and run.loop.samples >= 50 for runs in report.runs.values() for run in runs)
    assert len(said) == 2 * len(KINDS)
    added = [line for line in version_lines(report) if line.target is not None]
    assert [line.met is not None for line in added] == [True, True]
    assert list(tmp_path.iterdir()) == []
