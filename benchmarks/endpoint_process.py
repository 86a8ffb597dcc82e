"""A model's endpoint in a process of its own, as its user sees it.

`python -m MODULE ARGUMENTS` serves on loopback, prints its port, hears lines on stdin, and ends with its stdin.
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

from benchmarks.processes import finds_benchmarks
from ksi.errors import InternalError


class EndpointProcess:
    """Starts the endpoint, and ends it whatever happens."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = (sys.executable, "-m", module, *arguments)
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=finds_benchmarks()
        )
        port = self.hear()
        if not port:
            self._process.communicate()
            raise InternalError("the endpoint under test did not start; stderr has what it said")
        self.port = int(port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.communicate()

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def tell(self, line: str) -> None:
        """Say a line to it."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """The next line that it says; empty at its end."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
