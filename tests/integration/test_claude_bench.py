"""What `ksi bench` says of Claude Code, from a very small run of the real program."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksi.benchmarking.claude import ClaudePlan, find_claude
from ksi.benchmarking.report import lines
from ksi.benchmarking.rows import Plan
from ksi.benchmarking.session import measure
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


def test_a_program_that_is_not_there_is_said_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="npm install"):
        find_claude(["no-such-claude"])
