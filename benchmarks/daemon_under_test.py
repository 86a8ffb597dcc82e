"""A real daemon process on a home of its own, and the load generator's process beside it."""

from __future__ import annotations

import json
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from benchmarks.processes import finds_benchmarks
from ksi.config.reader import load
from ksi.config.schema import CONFIG_FILE, Config
from ksi.errors import InternalError
from ksi.host.private_files import make_folder

START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0
ANSWER_TIMEOUT = 30.0

T = TypeVar("T", bound=msgspec.Struct)
Tables = Mapping[str, Mapping[str, Any]]

CONCURRENCY = 256
"""Requests that the stub provider takes at once."""

SETTINGS: Tables = {
    "service": {"default_model": "stub/echo", "shutdown_grace": 0.2},
    # So short that in each second as much goes as comes: what a daemon that runs for months does.
    "retention": {"finished": 1.0, "sessions": 2.0, "clean_every": 0.25},
    "queue": {"max_queued": 10_000_000},
    "providers.stub": {"kind": "stub", "max_concurrency": CONCURRENCY},
}
"""A daemon under test: what is not here has its default; response log, usage and history are on."""


class Home:
    """A folder with a ksi.toml: `SETTINGS`, and `settings` on top of them."""

    def __init__(self, folder: Path, settings: Tables | None = None) -> None:
        own = settings or {}
        self.folder = folder
        self._tables = {name: {**SETTINGS.get(name, {}), **own.get(name, {})} for name in {**SETTINGS, **own}}

    def configure(self, socket_path: Path | None = None) -> Config:
        """Write the file, and read it as the daemon will."""
        tables = self._tables if socket_path is None else {**self._tables, "socket": {"path": str(socket_path)}}
        text = "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            for name, keys in tables.items()
        )
        make_folder(self.folder)
        (self.folder / CONFIG_FILE).write_text(text, "utf-8")
        return load(self.folder, {})


class DaemonUnderTest:
    """Starts a daemon on a home, and ends it whatever happens."""

    def __init__(self, home: Home, *, command: Sequence[str] = (sys.executable, "-m", "ksi.cli")) -> None:
        """`command` gets `--home DIR start --foreground` as its arguments."""
        self._home = home
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        # A socket's path is short by law, a home's need not be.
        self._run_dir = Path(tempfile.mkdtemp(prefix="ksi-bench-"))
        self.socket = self._run_dir / "daemon.sock"
        self.seconds_to_serve = 0.0
        """From the process's start until it served."""

    def __enter__(self) -> DaemonUnderTest:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def ask(self, event: str) -> Any:
        """The data of an event's reply."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            connection.connect(str(self.socket))
            connection.sendall(msgspec.json.encode({"event": event, "data": {}}) + b"\n")
            with connection.makefile("rb") as lines:
                return msgspec.json.decode(lines.readline())["data"]

    def _start(self) -> None:
        self._home.configure(self.socket)
        folder = self._home.folder
        environ = {name: value for name, value in finds_benchmarks().items() if not name.startswith("KSI_")}
        begun = time.perf_counter()
        with (folder / "stderr.log").open("ab") as stderr:
            self._process = subprocess.Popen(
                [*self._command, "--home", str(folder), "start", "--foreground"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environ,
                cwd=folder,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT)
        if not readable or not self._process.stdout.readline().strip():
            said = (folder / "stderr.log").read_text("utf-8", "replace")[-2000:].strip()
            raise InternalError(f"the daemon under test did not start: {said or f'see {folder}/var/logs'}")
        self.seconds_to_serve = time.perf_counter() - begun

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)


def generate(job: msgspec.Struct, result: type[T], module: str = "benchmarks.load") -> T:
    """Do a job in a process of its own, which is this module.

    Raises:
        InternalError: it did not come to an end; the message has what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=msgspec.json.encode(job) + b"\n",
        capture_output=True,
        check=False,
        env=finds_benchmarks(),
    )
    if done.returncode != 0:
        raise InternalError(f"the load generator failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return msgspec.json.decode(done.stdout, type=result)


class BareCoreUnderTest:
    """The yardstick's process, on a database of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run_dir = Path(tempfile.mkdtemp(prefix="ksi-bench-"))
        self.socket = self._run_dir / "bare.sock"

    def __enter__(self) -> BareCoreUnderTest:
        make_folder(self._folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_core", str(self._folder / "bare.db"), str(self.socket)],
            stdout=subprocess.PIPE,
            env=finds_benchmarks(),
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline().strip():
            self.__exit__(None, None, None)
            raise InternalError("the bare core did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid
