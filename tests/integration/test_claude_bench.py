"""The output of `ksi bench` about Claude Code, from a very small run of the real program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.claude import ClaudePlan, ClaudePool, ClaudeRun, ClaudeTurns, find_claude
from benchmarks.figures import Times
from benchmarks.report import lines
from benchmarks.rows import Plan
from benchmarks.session import measure
from ksi.cli import main
from ksi.errors import ConfigError
from tests.claude import real_claude

PLAN = ClaudePlan(runs=1, warm_turns=2, cold_turns=1, pieces=2, pause=0.005, pool=1, beyond=1)


def test_turns_of_claude_code_are_measured_warm_cold_and_bare(tmp_path: Path) -> None:
    said: list[str] = []
    report = measure(Plan(), tmp_path, [], keep=False, say=said.append, claude=(PLAN, [real_claude()]))
    run = report.claude
    assert run is not None
    assert run.version[0].isdigit()
    for turns, count in ((run.warm, 2), (run.cold, 1), (run.bare, 1)):
        (talk,) = turns
        assert talk.over.samples == talk.own.samples == count
        assert talk.over.p50 > 0
        assert talk.own.p50 >= 10
    assert (run.pool.conversations, run.pool.limit, run.pool.warm) == (2, 1, 1)
    assert 0 < run.pool.memory_of_one <= run.pool.memory
    found = lines(report)
    assert [line.row for line in found] == ["claude"] * 6
    assert len(said) == 4
    assert list(tmp_path.iterdir()) == []


def test_the_flag_alone_measures_the_home_s_claude_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ksi.toml").write_text('[providers.mine]\nkind = "claude-cli"\ncommand = ["/opt/claude", "--x"]\n')
    asked: list[Any] = []

    def measure_claude(plan: ClaudePlan, command: list[str], folder: Path, say: Callable[[str], None]) -> ClaudeRun:
        asked.append((plan, command))
        turns = ClaudeTurns(over=Times(41.0, 54.0, 2), own=Times(200.0, 201.0, 2))
        pool = ClaudePool(conversations=2, limit=1, most=1, warm=1, memory=2, memory_of_one=2)
        return ClaudeRun(version="2.1.330", warm=[turns], cold=[turns], bare=[turns], pool=pool)

    monkeypatch.setattr("benchmarks.session.measure_claude", measure_claude)
    done = CliRunner().invoke(main, ["--home", str(tmp_path), "bench", "--claude", "--runs", "2"])
    assert done.exit_code == 0, done.output
    assert asked == [(ClaudePlan(runs=2), ["/opt/claude", "--x"])]
    assert "41 ms (p99 54 ms)" in done.output
    assert "completions" not in done.output


def test_a_missing_program_is_reported_with_advice() -> None:
    with pytest.raises(ConfigError, match="npm install"):
        find_claude(["no-such-claude"])
