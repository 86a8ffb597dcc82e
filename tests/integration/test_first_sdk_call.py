"""The tutorial of a first call with an SDK: every program in it runs as it stands, with the variables of `ksi env`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, clean_environ, make_home

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial" / "first-sdk-call.md").read_text("utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
HOME = """
[http]
listen = "127.0.0.1:0"
[providers.local]
kind = "stub"
"""


@pytest.mark.promise("H2", "H3")
def test_the_tutorials_programs_run_and_are_on_the_account(tmp_path: Path) -> None:
    home = make_home(tmp_path, HOME)
    environ = {**clean_environ(), "KSI_HOME": str(home)}
    ksi = [sys.executable, "-m", "ksi.cli"]

    def run(*command: str, **variables: str) -> str:
        done = subprocess.run(
            command, env={**environ, **variables}, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with DaemonProcess(home):
        variables = {name: value for name, value in json.loads(run(*ksi, "env", "--json")).items() if value is not None}
        said = [run(sys.executable, "-c", program, **variables) for program in PROGRAMS]
        asked = ("colours", "animals", "trees")
        assert [text.strip() for text in said] == [f"echo: Name three {what}" for what in asked]
        usage = json.loads(run(*ksi, "usage", "--json"))
        finished = run(*ksi, "queue", "--list", "finished", "--json").splitlines()
    assert len(finished) == len(PROGRAMS) == 3
    assert usage["totals"]["requests"] == 3
