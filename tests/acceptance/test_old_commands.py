"""The commands that users of version 1 know, in a checkout whose .venv is this one: control script, migration tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.v1_home import make_v1_home
from tests.daemon_process import clean_environ

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "requirements/runtime.txt", "requirements/test.txt")
COMMANDS = ("daemon_control.sh", "tools/migrate_to_completion_v2.py", "ksi", "requirements/make_venv.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is the home of a version 1; its `ksi` is the one under test."""
    for name in (*SOURCES, *COMMANDS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, words in (("ksi", "-m ksi.cli"), ("python", "")):
        (bin_ / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (bin_ / name).chmod(0o755)
    sums = subprocess.run(["cksum", *SOURCES], cwd=tmp_path, check=True, capture_output=True).stdout
    (tmp_path / ".venv" / "runtime.stamp").write_bytes(os.fsencode((tmp_path / ".venv").resolve()) + b"\n" + sums)
    return make_v1_home(tmp_path)


def run(checkout: Path, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**clean_environ(), "PYTHONPATH": str(ROOT / "src")}
    environ.pop("KSI_HOME", None)
    return subprocess.run(
        words,
        cwd=folder or checkout,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environ,
        timeout=100,
    )


def control(checkout: Path, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(checkout, str(checkout / "daemon_control.sh"), *words, folder=folder)


def tool(checkout: Path, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The tool, started by a Python that knows nothing of KSI."""
    script = str(checkout / "tools" / "migrate_to_completion_v2.py")
    return run(checkout, sys.executable, "-I", "-S", script, *words, folder=folder)


def test_the_guides_way_forward_and_back(checkout: Path) -> None:
    elsewhere = Path("/")
    assert "ksi is ready" in control(checkout, "start", folder=elsewhere).stdout
    try:
        refused = tool(checkout)
        assert (refused.returncode, "stop it first: ./daemon_control.sh stop" in refused.stderr) == (1, True)
        assert "service_version" not in control(checkout, "status").stdout
        assert control(checkout, "stop").returncode == 0
        migrated = tool(checkout, folder=elsewhere)
        assert (migrated.returncode, migrated.stderr) == (0, "")
        assert "imported: 5 turns of 3 conversations" in migrated.stdout
        assert "ksi is ready" in control(checkout, "start").stdout
        assert "queued" in control(checkout, "status").stdout
        health = control(checkout, "health", folder=elsewhere)
        assert (health.returncode, "healthy" in health.stdout) == (0, True)
        assert '"event": "ready"' in control(checkout, "logs", "-n", "5").stdout.replace('"event":"', '"event": "')
        assert "ksi is ready" in control(checkout, "restart").stdout
        assert control(checkout, "stop").returncode == 0
        back = tool(checkout, "--rollback")
        assert (back.returncode, back.stderr) == (0, "")
        assert control(checkout, "health").returncode == 3
    finally:
        control(checkout, "stop")


def test_the_tool_takes_another_home(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_v1_home(tmp_path_factory.mktemp("other"))
    done = tool(checkout, "--dry-run", "--root", str(other))
    assert done.returncode == 0
    assert f"home: {other}" in done.stdout
    assert "nothing was changed" in done.stdout


@pytest.mark.parametrize("words", [(), ("dance",), ("ask", "x")])
def test_the_control_script_knows_its_six_words(checkout: Path, words: tuple[str, ...]) -> None:
    done = control(checkout, *words)
    assert done.returncode == 2
    assert "start|stop|restart|status|health|logs" in done.stderr


def test_the_control_script_works_through_a_symbolic_link(checkout: Path) -> None:
    link = checkout / "bin-link"
    link.symlink_to("daemon_control.sh")
    assert "did not run" in run(checkout, str(link), "stop").stdout
