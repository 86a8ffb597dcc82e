"""A command in a real pseudo-terminal, and its screen as a person sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pyte

PATIENCE = 60.0


class Terminal:
    """Runs a command with a terminal of its own as stdin, stdout and stderr."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, columns: int = 80, lines: int = 24
    ) -> None:
        self._master, self._slave = pty.openpty()
        self._set_size(columns, lines)
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.bytes = b""
        self.before = self.settings
        environ = {**environ, "TERM": "xterm-256color"}
        environ.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command, stdin=self._slave, stdout=self._slave, stderr=self._slave, env=environ, start_new_session=True
        )

    @property
    def settings(self) -> list[Any]:
        """How the terminal is set now."""
        return termios.tcgetattr(self._slave)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._slave)
        os.close(self._master)

    def resize(self, columns: int, lines: int) -> None:
        """The person makes the window larger or smaller."""
        self._set_size(columns, lines)
        self.screen.resize(lines, columns)
        self.process.send_signal(signal.SIGWINCH)

    def press(self, keys: str) -> None:
        """The person types."""
        os.write(self._master, keys.encode())

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, *words: str, gone: Sequence[str] = ()) -> str:
        """Wait until all of these words stand on the screen and the others do not; the screen."""
        end = time.monotonic() + PATIENCE
        while not all(word in self.text for word in words) or any(word in self.text for word in gone):
            left = end - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(left, 0))
            assert ready, f"{words} (without {gone}) did not come:\n{self.text}"
            self._take()
        return self.text

    def _take(self) -> bool:
        try:
            piece = os.read(self._master, 65_536)
        except OSError:
            return False
        self.bytes += piece
        self._stream.feed(piece)
        return bool(piece)

    def end(self) -> int:
        """Wait for the command's end and read what it still wrote; its exit code."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
            ready, _, _ = select.select([self._master], [], [], 0.05)
            if ready:
                self._take()
        with contextlib.suppress(OSError):
            while select.select([self._master], [], [], 0)[0] and self._take():
                pass
        code: int = self.process.returncode
        return code
