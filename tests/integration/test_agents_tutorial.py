"""The tutorial of two agents and a person, run as it stands: its configuration, its commands, the real Claude Code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.claude import environment, number_messages, real_claude
from tests.daemon_process import clean_environ
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.agents import call, prompt_of, results_of, uses_numbered

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial" / "agents-that-ask-each-other.md").read_text("utf-8")
CONFIG = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
STEPS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
DRAFT = "Photo Sorter 2.0 sorts by face. It forgets nothing."
PATIENCE = 60.0


def model(seen: Seen) -> Answer:
    """The writer has its draft criticised, then saves it; the critic criticises."""
    prompt, given = prompt_of(seen), results_of(seen)
    if not prompt.startswith("Write a release note"):
        return Answer(pieces=("Good, but say what for.",))
    if not given:
        return call("ask", prompt=f"Criticise this: {DRAFT}", model="claude-cli/haiku")
    if len(given) == 1:
        assert given[0]["text"] == "Good, but say what for."
        return uses_numbered("Write", 2, file_path="NOTE.md", content=f"{DRAFT}\n")
    return Answer(pieces=("The note is saved.",))


class Terminal:
    """Runs the tutorial's commands in its folder."""

    def __init__(self, home: Path, variables: dict[str, str]) -> None:
        self.home = home
        self._environ = {**clean_environ(), **variables, "KSI_HOME": str(home)}
        command = home / "ksi"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ksi.cli "$@"\n')
        command.chmod(0o755)

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["sh", "-e", "-c", commands],
            cwd=self.home,
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, (commands, done.stdout, done.stderr)
        return done.stdout

    async def until_asked(self, kind: str) -> Any:
        """Wait, as the reader does, until a person is asked."""
        async with asyncio.timeout(PATIENCE):
            while not (found := await asyncio.to_thread(self.run, f"./ksi approvals --kind {kind} --json")):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return json.loads(found)


@pytest.mark.promise("M2", "M3", "B3")
async def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number_messages(monkeypatch)
    begin, send, asked, look, approve, permission, finish, chain, show = STEPS
    programs, home = tmp_path / "bin", tmp_path / "home"
    for folder in (programs, home):
        folder.mkdir()
    (programs / "claude").symlink_to(real_claude())
    (home / "ksi.toml").write_text("\n".join(CONFIG))
    async with ScriptedEndpoint(script=model) as endpoint:
        user = environment(tmp_path / "user", endpoint.url)
        terminal = Terminal(home, {**user, "PATH": f"{programs}{os.pathsep}{user['PATH']}"})

        async def run(commands: str) -> str:
            return await asyncio.to_thread(terminal.run, commands)

        await run(begin)
        try:
            await run(send)
            await terminal.until_asked("approval")
            assert "approval" in await run(asked)
            assert f"Criticise this: {DRAFT}" in await run(look)
            assert len(endpoint.requests) == 1
            assert "yes" in await run(approve)
            await terminal.until_asked("permission")
            assert "NOTE.md" in await run(permission)
            assert not (home / "notes" / "NOTE.md").exists()
            finished = await run(finish)
            assert "The note is saved." in finished
            assert DRAFT in finished
            drawn = await run(chain)
            assert drawn.count("completed") >= 2
            assert "permission" in await run(show)
        finally:
            await run("./ksi stop")
