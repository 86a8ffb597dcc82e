"""The example of several agents in Claude Code, run as the guide says: the real program, a daemon, and the script."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.claude import environment, number_messages, real_claude, said
from tests.daemon_process import DaemonProcess, clean_environ
from tests.endpoint import Answer, ScriptedEndpoint, Seen

EXAMPLE = Path(__file__).parents[2] / "examples" / "claude_agents"


def answer(seen: Seen) -> Answer:
    """An endpoint that answers with the number of its messages."""
    return Answer(pieces=(f"I have read {len(said(seen))} messages, ", "and agree."))


def run(home: Path, *question: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "agents.py"), *question],
        env={**clean_environ(), "KSI_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.promise("L7")
async def test_three_agents_answer_remember_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number_messages(monkeypatch)
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    (home / "ksi.toml").write_text((EXAMPLE / "ksi.toml").read_text())
    (programs / "claude").symlink_to(real_claude())
    async with ScriptedEndpoint(script=answer) as endpoint:
        user = environment(tmp_path / "user", endpoint.url)

        def as_the_guide_says() -> list[subprocess.CompletedProcess[str]]:
            with DaemonProcess(home, {**user, "PATH": f"{programs}:{user['PATH']}"}):
                return [run(home, "Why", "photos?"), run(home)]

        first, second = await asyncio.to_thread(as_the_guide_says)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "accountant: I have read 1 messages, and agree." in first.stdout
    assert "editor: I have read 1 messages, and agree." in first.stdout
    assert "engineer, asked again: I have read 3 messages" in first.stdout
    assert "engineer: 20 tokens in, 10 out" in first.stdout
    assert first.stdout.count("is Claude Code's session") == 3
    assert "accountant: I have read 3 messages" in second.stdout
    assert "engineer, asked again: I have read 7 messages" in second.stdout


def test_without_a_daemon_it_gives_advice(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert "ksi start" in done.stderr
