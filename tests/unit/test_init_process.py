"""What PID 1 of a container must do. The kernel gives orphans to a subreaper as it does to PID 1."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAD = """
import ctypes, os, signal, subprocess, sys
from ksi.host.init_process import run_as_init

def adopt_orphans():
    PR_SET_CHILD_SUBREAPER = 36
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
"""


class Script:
    """A program that runs its `serve` under `run_as_init`."""

    def __init__(self, body: str) -> None:
        text = f"{HEAD}\n{body}\nsys.exit(run_as_init(serve))"
        self.process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def scripts() -> Iterator[list[Script]]:
    started: list[Script] = []
    yield started
    for script in started:
        script.process.kill()
        script.process.wait()
        assert script.process.stdout is not None
        script.process.stdout.close()


def children(pid: int) -> dict[int, str]:
    """A process's children, and the state of each."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found[int(entry.name)] = fields[0].decode()
    return found


@pytest.mark.promise("O5")
def test_orphans_are_reaped_and_the_daemon_gets_the_exit_codes_of_its_own_processes(scripts: list[Script]) -> None:
    script = Script("""
adopt_orphans()
def serve():
    for _ in range(10):
        # A shell that leaves a process behind, which ends a moment later.
        done = subprocess.run(["sh", "-c", "setsid sleep 0.2 & exit 7"])
        assert done.returncode == 7, done
    print(os.getpid(), flush=True)
    signal.pause()
""")
    scripts.append(script)
    daemon = int(script.says())
    until = time.monotonic() + 20
    while (left := children(script.process.pid)).keys() != {daemon}:
        assert time.monotonic() < until, left
    script.process.terminate()
    assert script.end() == 128 + signal.SIGTERM


@pytest.mark.promise("O5")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_goes_to_the_daemon_which_ends_as_it_likes(scripts: list[Script], number: signal.Signals) -> None:
    script = Script(f"""
def serve():
    got = []
    signal.signal({number}, lambda number, _: got.append(number))
    print("ready", flush=True)
    while not got:
        signal.sigtimedwait([], 0.05) if hasattr(signal, "sigtimedwait") else signal.pause()
    return 3
""")
    scripts.append(script)
    assert script.says() == "ready"
    script.process.send_signal(number)
    assert script.end() == 3


@pytest.mark.promise("O5")
def test_the_exit_code_tells_that_a_daemon_was_killed(scripts: list[Script]) -> None:
    script = Script("""
def serve():
    os.kill(os.getpid(), signal.SIGKILL)
""")
    scripts.append(script)
    assert script.end() == 128 + signal.SIGKILL
