"""Says who runs here, so that no second daemon begins."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from ksi.errors import ConfigError, StoreInUse

_LOOK_AGAIN = 0.005
"""Seconds between two tries at a lock that somebody shares for a moment."""


class PidFile:
    """Says who runs here, and is locked while it does: the kernel lets go of it even after a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Write this process into it.

        Raises:
            StoreInUse: another daemon runs here.
            ConfigError: the file cannot be written.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}", place=str(self._path)) from None
        if not _lock(descriptor):
            pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreInUse(f"a daemon runs here already (pid {pid or 'unknown'})", holder=pid or None)
        if not self._is_still(descriptor):
            # The one who had it took it away in between: this lock is on a file that nobody sees.
            os.close(descriptor)
            self.take()
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def _is_still(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Take it away."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> bool:
    """Lock a file for this process alone; False where another has it for itself.

    Who only looks whether a daemon runs shares the lock for a moment: that is waited for.
    """
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        if not _try_lock(descriptor, fcntl.LOCK_SH):
            return False
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(_LOOK_AGAIN)
    return True


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
