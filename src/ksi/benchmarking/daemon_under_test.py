"""A real daemon process on a home of its own, and the load generator's process beside it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from ksi.benchmarking.load import Job
from ksi.benchmarking.processes import resident_bytes
from ksi.config import CONFIG_FILE, Config, load
from ksi.errors import InternalError

READY_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0

T = TypeVar("T", bound=msgspec.Struct)

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "service": {"default_model": "stub/echo", "shutdown_grace": 0.2},
    # So short that in each second as much goes as comes: what a daemon that runs for weeks does.
    "retention": {"finished": 1.0, "sessions": 2.0, "clean_every": 0.25},
    "queue": {"max_queued": 10_000_000},
    "providers.stub": {"kind": "stub", "max_concurrency": 256},
}
"""What a daemon under test is configured with; all else has its default, response log, usage and history included."""


class DaemonUnderTest:
    """Starts a daemon, and ends it whatever happens."""

    def __init__(
        self,
        home: Path,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        command: Sequence[str] = (sys.executable, "-m", "ksi.cli"),
    ) -> None:
        """`settings` are tables of keys that come on top of `SETTINGS`; `command` gets `--home` and what follows."""
        self._home = home
        self._settings = {name: {**SETTINGS.get(name, {}), **(settings or {}).get(name, {})}
                          for name in {**SETTINGS, **(settings or {})}}
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._run_dir: Path | None = None

    def __enter__(self) -> DaemonUnderTest:
        # A socket's path is short by law, a home's need not be.
        self._run_dir = Path(tempfile.mkdtemp(prefix="ksi-bench-"))
        try:
            self._start(self._run_dir / "daemon.sock")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._stop(self._process)
            self._process = None
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    @property
    def socket(self) -> Path:
        """Where it listens."""
        assert self._run_dir is not None
        return self._run_dir / "daemon.sock"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def memory(self) -> int | None:
        """Bytes that it has in use."""
        return resident_bytes(self.pid)

    def write_config(self) -> Config:
        """Write the home's ksi.toml, and read it as the daemon will."""
        self._home.mkdir(parents=True, exist_ok=True)
        tables = (
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            for name, keys in self._settings.items()
        )
        (self._home / CONFIG_FILE).write_text("\n".join(tables), "utf-8")
        return load(self._home, {})

    def _start(self, socket: Path) -> None:
        self._settings["socket"] = {"path": str(socket)}
        self.write_config()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KSI_")}
        with (self._home / "stderr.log").open("ab") as stderr:
            self._process = subprocess.Popen(
                [*self._command, "--home", str(self._home), "start", "--foreground"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environ,
                cwd=self._home,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], READY_TIMEOUT)
        if not readable or not self._process.stdout.readline().strip():
            said = (self._home / "stderr.log").read_text("utf-8", "replace")[-2000:]
            raise InternalError(f"the daemon did not start: {said.strip() or f'see {self._home}/var/logs'}")

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def generate(job: Job, result: type[T]) -> T:
    """Do a job in a process of its own.

    Raises:
        InternalError: it did not come to an end; the message has what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ksi.benchmarking.load"],
        input=msgspec.json.encode(job) + b"\n",
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"the load generator failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return msgspec.json.decode(done.stdout, type=result)
