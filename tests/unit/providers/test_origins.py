"""Which of a registry's processes a program descends from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksi.cli.mcp_bridge import Unreachable, door_of
from ksi.client.ways import told_way
from ksi.host.marks import MARK
from ksi.providers.process import ProcessRegistry, StrayError

STARTS = """
import os, subprocess, sys
environment = dict(os.environ)
if "bare" in sys.argv:
    del environment["KSI_PROCESS"]
child = subprocess.Popen(["cat"], env=environment, start_new_session="apart" in sys.argv)
print(child.pid, flush=True)
child.wait()
"""
"""A leader that starts a program; `apart`: in a session of its own, `bare`: without the mark."""


@contextmanager
def started(mark: str, *how: str) -> Iterator[tuple[int, int]]:
    """The pids of a leader and of a program that it has started."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, *how],
        env={**os.environ, MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as leader:
        assert leader.stdout is not None
        yield leader.pid, int(leader.stdout.readline())


@pytest.mark.promise("M2")
@pytest.mark.parametrize("how", [(), ("apart",), ("bare",), ("apart", "bare")])
def test_a_program_is_known_by_its_session_its_mark_or_its_ancestors(tmp_path: Path, how: tuple[str, ...]) -> None:
    registry = ProcessRegistry(tmp_path)
    mark = str(registry.new_path())
    with started(mark, *how) as (leader, program):
        assert registry.leader_of(program, {leader: mark}) == leader
        assert registry.leader_of(leader, {leader: mark}) == leader


@pytest.mark.promise("M2")
def test_a_program_whose_process_is_not_known_any_more_belongs_to_nobody(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    with started(str(registry.new_path())) as (_, program), pytest.raises(StrayError):
        registry.leader_of(program, {})


@pytest.mark.promise("M2")
def test_programs_of_others_and_of_another_home_are_none_of_the_registrys(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path / "ours")
    with started(str(tmp_path / "theirs" / "1-1")) as (_, program):
        assert registry.leader_of(program, {2**22: str(tmp_path / "ours" / "1-1")}) is None
    assert registry.leader_of(os.getpid(), {2**22: "mark"}) is None
    assert registry.leader_of(0, {2**22: "mark"}) is None  # one outside of a container


@pytest.mark.promise("M2")
def test_a_program_that_has_ended_already_may_be_any_agents_as_long_as_there_is_one(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    assert registry.leader_of(gone.pid, {}) is None
    with pytest.raises(StrayError):
        registry.leader_of(gone.pid, {2**22: "mark"})


@pytest.mark.promise("M2")
def test_an_agents_program_does_not_take_the_owners_token_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "var" / "run"
    run.mkdir(parents=True)
    (run / "http.json").write_text('{"url": "http://127.0.0.1:1"}')
    (run / "token").write_text("ksi_owner")
    elsewhere = {MARK: str(tmp_path / "other" / "var" / "run" / "claude-cli" / "processes" / "1-1")}
    assert door_of(tmp_path, elsewhere) == ("http://127.0.0.1:1", "ksi_owner")
    mark = str(run / "claude-cli" / "processes" / "1-1")
    assert door_of(tmp_path, {MARK: mark, "KSI_TOKEN": "its own"}) == ("http://127.0.0.1:1", "its own")
    with pytest.raises(Unreachable, match="ksi_tools"):
        door_of(tmp_path, {MARK: mark})
    monkeypatch.delenv(MARK, raising=False)
    assert told_way(run) is not None
    monkeypatch.setenv(MARK, mark)
    assert told_way(run) is None
