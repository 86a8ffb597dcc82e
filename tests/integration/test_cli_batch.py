"""`ksi batch` against real daemons: order, failures aside, and going on after kills of either side."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ksi.cli.settings import Exit
from tests.daemon_process import DaemonProcess, clean_environ, make_home
from tests.integration.test_cli import command, ksi, rows

CONFIG = """\
[service]
default_model = "stub/x"
shutdown_grace = 0.0
[retry]
initial_delay = 0.01
max_delay = 0.01
[providers.stub]
kind = "stub"
max_concurrency = 4
delay = 0.05
record = "calls"
[providers.broken]
kind = "stub"
fail = "invalid_request"
[providers.hung]
kind = "stub"
delay = 600
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield make_home(tmp_path, CONFIG)
    ksi(tmp_path, "stop")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def calls(home: Path) -> Counter[str]:
    """How often each request was asked of the stub."""
    text = (home / "calls").read_text()
    return Counter(line.split("\t")[3] for line in text.splitlines() if line.startswith("begin"))


@pytest.mark.promise("U3")
def test_answers_come_in_the_order_of_the_lines_with_failures_aside(home: Path) -> None:
    slow_first = [{"prompt": f"q {n}", "provider_options": {"delay": 0.3 - n / 100}} for n in range(20)]
    bad = {"prompt": "bad", "model": "broken/x", "custom_id": "b"}
    source = write(home / "in.jsonl", *slow_first, "plain", bad, {"prompt": "none", "model": "nobody/x"})
    out = home / "out.jsonl"
    done = ksi(home, "batch", str(source), str(out), "--agent", "ann", "--json")
    assert done.returncode == Exit.FAILED, done.stderr
    assert "21 of 23 answered, 2 failed, $0.0000 so far" in done.stderr
    summary = json.loads(done.stdout)
    assert {name: summary[name] for name in ("lines", "answered", "failed", "left", "cut")} == {
        "lines": 23,
        "answered": 21,
        "failed": 2,
        "left": 0,
        "cut": 0,
    }
    answers = read(out)
    assert [entry["line"] for entry in answers] == list(range(1, 22))
    assert [entry["result"] for entry in answers] == [*(f"echo: q {n}" for n in range(20)), "echo: plain"]
    broken, refused = read(home / "out.jsonl.failed")
    assert (broken["line"], broken["custom_id"], broken["error"]["code"]) == (22, "b", "invalid_request")
    assert (refused["line"], refused["status"], refused["error"]["code"]) == (23, "refused", "unknown_model")
    (asked,) = rows(ksi(home, "show", answers[0]["request_id"], "--json"))
    assert (asked["agent_id"], asked["priority"]) == ("ann", "background")


@pytest.mark.promise("U3")
def test_run_again_it_asks_failed_and_new_lines_and_nothing_else(home: Path) -> None:
    source = write(home / "in.jsonl", "one", "two", {"prompt": "three", "model": "broken/x"})
    out = home / "out.jsonl"
    assert ksi(home, "batch", str(source), str(out)).returncode == Exit.FAILED
    before = calls(home)
    make_home(home, CONFIG.replace('fail = "invalid_request"', 'record = "calls"'))
    ksi(home, "restart")
    write(source, "new", "one", "two", {"prompt": "three", "model": "broken/x"})
    again = ksi(home, "batch", str(source), str(out))
    assert again.returncode == 0, again.stderr
    assert "2 of 4 are answered already" in again.stderr
    assert [entry["result"] for entry in read(out)] == ["echo: new", "echo: one", "echo: two", "echo: three"]
    assert [entry["line"] for entry in read(out)] == [1, 2, 3, 4]
    assert not (home / "out.jsonl.failed").exists()
    assert calls(home) - before == Counter({entry["request_id"]: 1 for entry in read(out) if entry["line"] in (1, 4)})
    idle = ksi(home, "batch", str(source), str(out))
    assert (idle.returncode, sum(calls(home).values())) == (0, 4)
    other = ksi(home, "batch", str(source), str(home / "other.jsonl"), "--run", "once more")
    assert (other.returncode, sum(calls(home).values())) == (0, 8)


@pytest.mark.promise("U3", "Q4")
def test_after_kills_of_the_command_each_line_was_asked_once(home: Path) -> None:
    source = write(home / "in.jsonl", *(f"q {n}" for n in range(120)))
    out = home / "out.jsonl"
    words = command(home, "batch", str(source), str(out), "--concurrency", "8")
    with DaemonProcess(home):
        for kill in (20, 60):
            process = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=clean_environ())
            while not out.exists() or out.read_bytes().count(b"\n") < kill:
                assert process.poll() is None
            process.kill()
            process.wait(60)
        done = subprocess.run(words, capture_output=True, timeout=120, env=clean_environ())
        assert done.returncode == 0, done.stderr
    assert [entry["result"] for entry in read(out)] == [f"echo: q {n}" for n in range(120)]
    assert set(calls(home).values()) == {1}
    assert len(calls(home)) == 120


@pytest.mark.promise("U3", "Q3")
def test_a_batch_outlives_its_daemon(home: Path) -> None:
    source = write(home / "in.jsonl", *(f"q {n}" for n in range(60)))
    out = home / "out.jsonl"
    daemon = DaemonProcess(home)
    daemon.start()
    process = subprocess.Popen(
        command(home, "batch", str(source), str(out), "--concurrency", "8"), stderr=subprocess.PIPE, env=clean_environ()
    )
    while not out.exists() or out.read_bytes().count(b"\n") < 15:
        assert process.poll() is None
    daemon.end(signal.SIGKILL)
    with daemon:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert b"the daemon is gone; sent requests are kept" in said
    assert [entry["result"] for entry in read(out)] == [f"echo: q {n}" for n in range(60)]


@pytest.mark.promise("U3")
def test_ctrl_c_leaves_answered_lines_and_reports_the_rest(home: Path) -> None:
    source = write(home / "in.jsonl", "one", {"prompt": "endless", "model": "hung/x"}, "three")
    out = home / "out.jsonl"
    with DaemonProcess(home):
        process = subprocess.Popen(
            command(home, "batch", str(source), str(out)), stderr=subprocess.PIPE, env=clean_environ()
        )
        while not out.exists() or out.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == Exit.INTERRUPTED
        assert b"1 have no answer yet; the same command continues" in said
        assert [entry["line"] for entry in read(out)] == [1, 3]
        (running,) = rows(ksi(home, "queue", "--list", "active", "--json"))
        assert ksi(home, "cancel", running["request_id"][:12]).returncode == 0
        cancelled = ksi(home, "batch", str(source), str(out))
        assert cancelled.returncode == Exit.FAILED
        assert read(home / "out.jsonl.failed")[0]["error"]["code"] == "cancelled"


@pytest.mark.promise("U3")
def test_nothing_is_asked_if_a_line_is_wrong(home: Path) -> None:
    source = write(home / "in.jsonl", "fine", {"promt": "x"})
    done = ksi(home, "batch", str(source), str(home / "out.jsonl"))
    assert done.returncode == Exit.USAGE
    assert "line 2: unknown field 'promt'; did you mean 'prompt'?" in done.stderr
    assert not (home / "out.jsonl").exists()
    assert not (home / "calls").exists()
    assert ksi(home, "batch", str(source), str(source)).returncode == Exit.USAGE
