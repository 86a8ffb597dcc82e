"""The tests' own chance and effort: one seed replays a run, and a long run leaves nothing out."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import effort

ROOT = Path(__file__).parents[2]

PROBE = """
import json, sys
from hypothesis import given, settings, strategies as st
drawn = []

def test_draws(dice):
    @settings(max_examples=5, database=None)
    @given(st.integers())
    def draw(value):
        drawn.append(value)
    draw()
    print("DRAWN", json.dumps([dice.random(), drawn]))
"""


def drawn(folder: Path, seed: int, environ: dict[str, str]) -> str:
    """The chance of a test in a run of its own with this seed."""
    (folder / "test_probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--rootdir", str(ROOT), "-p", "tests.conftest", str(folder / "test_probe.py")],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "CI"} | environ | {effort.SEED: str(seed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "DRAWN" in line)
    return line


@pytest.mark.parametrize("environ", [{}, {"CI": "true"}], ids=["here", "CI"])
def test_a_seed_replays_the_draws_of_a_test_and_of_hypothesis(tmp_path: Path, environ: dict[str, str]) -> None:
    first = drawn(tmp_path, 7, environ)
    assert drawn(tmp_path, 7, environ) == first
    other = drawn(tmp_path, 8, environ)
    assert other.partition(",")[0] != first.partition(",")[0], "a test's own dice"
    assert other.partition(",")[2] != first.partition(",")[2], "Hypothesis"


def test_a_long_run_does_more_and_takes_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(range(20))
    monkeypatch.delenv(effort.LONG, raising=False)
    assert effort.effort(2, 9) == 2
    some = effort.sample(cases, 4)
    assert len(some) == 4
    assert some == sorted(some)
    assert effort.sample(cases, 4) == some
    monkeypatch.setenv(effort.LONG, "1")
    assert effort.effort(2, 9) == 9
    assert effort.sample(cases, 4) == cases


def test_other_seeds_take_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(effort.LONG, raising=False)
    taken = set()
    for seed in range(50):
        monkeypatch.setenv(effort.SEED, str(seed))
        taken |= set(effort.sample(range(20), 4))
    assert taken == set(range(20))


def test_a_test_s_chance_does_not_depend_on_its_neighbours() -> None:
    assert effort.dice("one").random() == effort.dice("one").random() != effort.dice("other").random()
    assert isinstance(effort.dice("one"), random.Random)
