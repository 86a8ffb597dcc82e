"""A real daemon in a process of its own, for tests that kill it or look at it from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

CONFIG = """\
[service]
default_model = "stub/echo"
shutdown_grace = 1.0

[http]
listen = "127.0.0.1:0"

[providers.stub]
kind = "stub"
max_concurrency = 8

[providers.slow]
kind = "stub"
delay = 600

[providers.broken]
kind = "stub"
fail = "invalid_request"

[providers.drip]
kind = "stub"
pieces = 4
piece_delay = 0.05
"""


def clean_environ() -> dict[str, str]:
    """This process's variables without those that configure KSI, and with a place for compiled modules.

    Without that place each command compiles all its imports, if the environment forbids to write the results next to
    them. Where it does not, they are there from the start.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KSI_")}
    if kept.pop("PYTHONDONTWRITEBYTECODE", None):
        kept.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / f"ksi-tests-pycache-{os.getuid()}"))
    return kept


def make_home(folder: Path, config: str = CONFIG) -> Path:
    """A home with this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ksi.toml").write_text(config)
    return folder


class DaemonProcess:
    """`ksi start --foreground`, ready when it is entered and gone when it is left."""

    def __init__(self, home: Path, environ: Mapping[str, str] | None = None, *, files: int | None = None) -> None:
        """`environ` is added to this process's; `files` is how many it may have open."""
        self.home = home
        self._limit = [] if files is None else ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"]
        self.process: subprocess.Popen[bytes] | None = None
        self._environ = {**clean_environ(), **(environ or {})}

    @property
    def socket_path(self) -> Path:
        """The path of its socket."""
        return self.home / "var" / "run" / "daemon.sock"

    @property
    def pid(self) -> int:
        """The process's id, while there is one."""
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM)

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.spawn()
        assert self.wait_ready(), "the daemon ended before it was ready"

    def spawn(self) -> None:
        """Start it without waiting."""
        assert self.process is None
        self.process = subprocess.Popen(
            [*self._limit, *start_command(self.home)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self._environ,
        )

    def wait_ready(self) -> bool:
        """Wait for its message that it serves; False if it ends without one."""
        assert self.process is not None
        assert self.process.stdout is not None
        return b"ready" in self.process.stdout.readline()

    def wait(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        process, self.process = self.process, None
        assert process is not None
        assert process.stdout is not None
        with process.stdout:
            return process.wait(30)

    def end(self, by: signal.Signals) -> int | None:
        """Send it a signal and wait for its exit; returns its exit code, None if none ran."""
        if self.process is None:
            return None
        self.process.send_signal(by)
        return self.wait()


def start_command(home: Path) -> list[str]:
    """The command that starts a daemon in the foreground."""
    return [sys.executable, "-m", "ksi.cli", "--home", str(home), "start", "--foreground"]


def start_in_vain(home: Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Start a daemon that must end by itself; returns its output and its exit code."""
    return subprocess.run(
        start_command(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        env={**clean_environ(), **(environ or {})},
    )
