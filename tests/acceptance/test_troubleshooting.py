"""Each trouble of the guide is produced and mended with the guide's own commands, against a real daemon."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.talk import until
from tests.daemon_process import DaemonProcess, clean_environ, make_home

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "troubleshooting.md"
CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 0.1

[providers.stub]
kind = "stub"
"""

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Runs a command of the guide against a daemon of its own; returns its output."""
    home = make_home(tmp_path / "home", CONFIG)
    with DaemonProcess(home):

        def ksi(line: str) -> str:
            words = shlex.split(line.replace("PROVIDER", "stub").replace("REQUEST", "stuck"))
            assert words[0] == "./ksi", line
            done = subprocess.run(
                [sys.executable, "-m", "ksi.cli", "--home", str(home), *words[1:]],
                capture_output=True,
                text=True,
                timeout=60,
                env=clean_environ(),
            )
            assert done.returncode == 0, (line, done.stderr)
            return done.stdout

        yield ksi


def commands(section: str) -> list[str]:
    """The `ksi` lines of the guide's code under a heading, in order."""
    text = GUIDE.read_text("utf-8")
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```sh\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    return [line.partition(" | ")[0] for block in blocks for line in block.splitlines()]


def ended(run: Run, request_id: str) -> str:
    """A request's end, once it has come."""

    def look() -> str | None:
        shown = run(f"./ksi show {request_id}")
        found = re.search(r"^status +(\w+)", shown, re.MULTILINE)
        assert found is not None
        return shown if found[1] not in ("queued", "running") else None

    return str(until(look, request_id))


@pytest.mark.promise("L5", "L6")
def test_completions_that_are_not_processed_are_found_and_set_free(run: Run) -> None:
    show, lock, ask, release, *provider = commands("Completions are not processed")
    run(lock)
    reply = json.loads(run(ask))
    assert (reply["status"], reply["conversation_locked"], reply["holder"]) == ("queued", True, "editor")
    assert re.search(r"^holder +editor$", run(show), re.MULTILINE)
    locks = run("./ksi locks plan")
    assert re.search(r"^holder_kind +external$", locks, re.MULTILINE)
    assert re.search(r"^expires_at +\d", locks, re.MULTILINE)
    run(release)
    assert "completed" in ended(run, "stuck")
    disable, wait, look, enable = provider
    run(disable)
    assert "disabled" in run("./ksi providers")
    run(wait)
    shown = run(look)
    assert re.search(r"^status +queued$", shown, re.MULTILINE)
    assert "holder" not in shown
    run(enable)
    assert "completed" in ended(run, "waits")


@pytest.mark.promise("L5", "F8")
def test_a_lock_is_taken_away_from_a_holder_that_is_gone(run: Run) -> None:
    _, lock, ask, *_ = commands("Completions are not processed")
    run(lock)
    run(ask)
    run("./ksi cancel editor")
    assert "completed" in ended(run, "stuck")


@pytest.mark.promise("L6", "L7")
def test_a_fork_is_reported_and_is_part_of_the_tree(run: Run) -> None:
    first, fork, locks = commands("Fork warnings")
    run(first)
    reply = json.loads(run(fork))
    assert reply["session_id"] != "plan"
    shown = run(locks)
    assert f"└─ {reply['session_id']}  asked for by {reply['request_id']}" in shown


@pytest.mark.promise("C5", "C8")
def test_a_blocked_request_has_a_reason_and_can_be_set_free(run: Run) -> None:
    first, second, third, logs = commands("A breaker blocks")
    run(first)
    run(second)
    reply = json.loads(run(third))
    assert reply["status"] == "blocked"
    assert reply["reason"] == {"code": "max_depth", "message": "depth 2 is over the chain's max_depth 1"}
    assert reply["chain"]["ideation_depth"] == 2
    assert "third  blocked" in run("./ksi chain third")
    assert "stopped by max_depth: depth 2 is over the chain's max_depth 1" in run("./ksi chain third")
    logged = [json.loads(line) for line in run(logs).splitlines()]
    assert [entry["code"] for entry in logged if entry["event"] == "blocked"] == ["max_depth"]
    run("./ksi chain third --reset")
    assert "resets" in run("./ksi chain third")
    wider = {"prompt": "Once more", "circuit_breaker_config": {"max_depth": 3, "token_budget": 50000}}
    assert json.loads(run(f"./ksi send completion:request '{json.dumps(wider)}'"))["status"] == "completed"
