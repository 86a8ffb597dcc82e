"""`ksi top` in a real terminal of 80 columns: its view, its keys, a window that changes, a daemon that goes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess, clean_environ, make_home
from tests.integration.test_cli import command, ksi, rows
from tests.terminal import Terminal

pytestmark = pytest.mark.promise("V2")

CONFIG = """\
[service]
default_model = "hung/slow"
shutdown_grace = 0.0
[retry]
max_attempts = 1
[providers.hung]
kind = "stub"
delay = 600
max_concurrency = 2
[providers.broken]
kind = "stub"
fail = "invalid_request"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    home = make_home(tmp_path, CONFIG)
    with DaemonProcess(home) as process:
        for number, agent in enumerate(("anna", "ben", "anna", "carl"), 1):
            submit(home, f"task-{number}", agent)
        yield process


def submit(home: Path, request_id: str, agent: str, model: str = "hung/slow") -> None:
    """A request that runs or waits until it is stopped."""
    send(home, {"prompt": "p", "request_id": request_id, "agent_id": agent, "model": model})


def send(home: Path, data: dict[str, object]) -> None:
    """Submit a request."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(60)
        line.connect(str(home / "var/run/daemon.sock"))
        line.sendall(json.dumps({"event": "completion:async", "data": data}).encode() + b"\n")
        assert b'"request_id"' in line.recv(65_536)


def top(daemon: DaemonProcess) -> Terminal:
    # A shell's size of an earlier window is passed on, as readline does.
    return Terminal(command(daemon.home, "top", "--every", "0.2"), {**clean_environ(), "LINES": "24"})


def test_it_shows_running_and_waiting_requests_and_keys_choose(daemon: DaemonProcess) -> None:
    with top(daemon) as screen:
        shown = screen.until("1 running", "task-1", "task-2", "hung", "queued 2")
        assert "task-3" not in shown
        screen.press("2")
        screen.until("task-3", "task-4", gone=("task-1",))
        screen.press("/carl\r")
        screen.until("with 'carl'", "task-4", gone=("task-3",))
        screen.press("\x1b")
        screen.until("task-3")
        screen.press("?")
        screen.until("cancel the chosen one")
        screen.press("x1s")
        screen.until("task-1", "by priority")
        submit(daemon.home, "gone", "anna", "broken/x")
        screen.press("5")
        screen.until("gone", "invalid_")
        screen.press("q")
        assert screen.end() == 0
        assert b"\x1b[?1049l" in screen.bytes[-200:]
        assert b"\x1b[?25h" in screen.bytes[-200:]
        assert screen.settings == screen.before


def test_the_chosen_request_is_cancelled_after_a_question(daemon: DaemonProcess) -> None:
    with top(daemon) as screen:
        screen.until("task-1", "task-2")
        screen.press("c")
        screen.until("choose a request first")
        screen.press("\x1b[B\x1b[Bc")
        screen.until("cancel task-2? y or n")
        screen.press("n")
        screen.until("nothing was cancelled")
        screen.press("cy")
        screen.until("cancelled task-2", "task-3", gone=("cancel task-2?",))
        screen.press("q")
        assert screen.end() == 0
    (shown,) = rows(ksi(daemon.home, "show", "task-2", "--json"))
    assert shown["status"] == "cancelled"


def test_a_question_is_answered_by_a_key(daemon: DaemonProcess) -> None:
    data = {"prompt": "p", "request_id": "held", "model": "broken/x", "hold": True}
    send(daemon.home, data)
    with top(daemon) as screen:
        screen.until("task-1")
        screen.press("4")
        screen.until("held")
        screen.press("jy")
        screen.until("said yes to held", "nothing is asking")
        screen.press("q")
        assert screen.end() == 0


def test_an_agent_is_paused_and_resumed_by_keys(daemon: DaemonProcess) -> None:
    with top(daemon) as screen:
        screen.until("task-1")
        screen.press("2")
        screen.until("task-4")
        screen.press("j")
        screen.until("waits: provider hung")
        screen.press("p")
        screen.until("its agent")
        screen.press("a")
        screen.until("paused anna")
        (paused,) = rows(ksi(daemon.home, "pause", "--list", "--json"))
        assert [(one["scope"], one["name"]) for one in paused["paused"]] == [("agent", "anna")]
        screen.press("ra")
        screen.until("resumed anna")
        screen.press("q")
        assert screen.end() == 0
    (paused,) = rows(ksi(daemon.home, "pause", "--list", "--json"))
    assert paused["paused"] == []


def test_a_window_that_becomes_small_and_large_is_filled(daemon: DaemonProcess) -> None:
    with top(daemon) as screen:
        screen.until("task-1")
        screen.resize(40, 12)
        screen.until("task-1", "KSI")
        screen.resize(120, 40)
        screen.until("q leave", "anna")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.end() == 0
        assert screen.settings == screen.before


def test_a_lost_daemon_is_said_and_a_new_one_is_found(daemon: DaemonProcess) -> None:
    with top(daemon) as screen:
        screen.until("task-1")
        daemon.end(signal.SIGKILL)
        screen.until("the daemon is gone")
        daemon.start()
        screen.until("task-1", gone=("the daemon is gone",))
        screen.press("q")
        assert screen.end() == 0


def test_without_a_terminal_it_prints_one_view(daemon: DaemonProcess) -> None:
    done = subprocess.run(command(daemon.home, "top"), capture_output=True, text=True, timeout=60, env=clean_environ())
    assert done.returncode == 0, done.stderr
    assert "task-1" in done.stdout
    assert "\x1b" not in done.stdout


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    home = make_home(tmp_path, CONFIG)
    with Terminal(command(home, "top"), clean_environ()) as screen:
        assert screen.end() == 3
        assert "no daemon listens" in screen.text


def test_ask_shows_the_reason_of_its_wait_in_one_place_and_removes_it(daemon: DaemonProcess) -> None:
    with Terminal(command(daemon.home, "ask", "--no-stdin", "-m", "hung/slow", "hello"), clean_environ()) as screen:
        screen.until("waits: provider hung")
        submit(daemon.home, "other", "anna", "broken/x")
        lines = [line for line in screen.text.splitlines() if line]
        assert len(lines) == 1, "the line is written over"
        screen.process.send_signal(signal.SIGINT)
        assert screen.end() == 130
        assert "waits" not in screen.text


def test_ask_clears_its_line_before_the_answer(daemon: DaemonProcess) -> None:
    home = make_home(daemon.home / "quick", '[providers.stub]\nkind = "stub"\ndelay = 2\n')
    with (
        DaemonProcess(home),
        Terminal(command(home, "ask", "--no-stdin", "-m", "stub/x", "hello"), {**clean_environ()}) as screen,
    ):
        screen.until("runs at stub")
        assert screen.end() == 0
        assert [line for line in screen.text.splitlines() if line] == ["echo: hello"]


def test_batch_shows_a_bar(daemon: DaemonProcess, tmp_path: Path) -> None:
    home = make_home(tmp_path / "quick", '[providers.stub]\nkind = "stub"\ndelay = 0.05\nmax_concurrency = 1\n')
    questions = tmp_path / "in.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"p{n}", "model": "stub/x"}) + "\n" for n in range(12)))
    with (
        DaemonProcess(home),
        Terminal(command(home, "batch", str(questions), str(tmp_path / "out.jsonl")), clean_environ()) as screen,
    ):
        screen.until("█", "░", "of 12 answered")
        assert screen.end() == 0
        assert "12 of 12 answered" in screen.text
        assert "░" not in screen.text
