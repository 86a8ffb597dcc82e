"""Says who runs here, so that no second daemon begins."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from ksi.errors import ConfigError, StoreInUse
from ksi.host.private_files import close_to_others, is_still, make_folder

_LOOK_AGAIN = 0.005
"""Seconds between two tries at a lock that another process shares for a moment."""


def claim_run_dir(folder: Path, home: Path) -> None:
    """Make the folder of socket and pid file, for this user only."""
    try:
        make_folder(folder)
        # A folder that others share stays as it is: the socket's own mode and the peer's user are checked anyhow.
        close_to_others(folder, home)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror}; make it writable or choose another home", place=str(folder)
        ) from None


class PidFile:
    """The pid file, which is locked while its process runs: the kernel releases the lock even after a kill."""

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
            self._descriptor = lock_pid_file(self._path)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}", place=str(self._path)) from None
        if self._descriptor is None:
            pid = holder_of(self._path)
            raise StoreInUse(f"a daemon runs here already (pid {pid or 'unknown'})", holder=pid)

    def keep(self) -> bool:
        """Write it again, with its folder, if it was removed or replaced; False if another daemon has it now.

        Raises:
            OSError: it cannot be written.
        """
        if self._descriptor is not None and is_still(self._path, self._descriptor):
            return True
        make_folder(self._path.parent)
        descriptor = lock_pid_file(self._path)
        if descriptor is None:
            return False
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Take it away, unless another file lies there now."""
        if self._descriptor is not None:
            if is_still(self._path, self._descriptor):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def lock_pid_file(path: Path) -> int | None:
    """Lock the file at this path, and write this process into it; None if another process has it locked.

    Raises:
        OSError: it cannot be opened or written.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            if is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        # It was removed in between: this lock is on a file that no other process can find.
        os.close(descriptor)


def holder_of(path: Path) -> str | None:
    """The pid that is written in a pid file."""
    try:
        return path.read_bytes()[:32].decode("ascii", "replace").strip() or None
    except OSError:
        return None


def _lock(descriptor: int) -> bool:
    """Lock a file for this process alone; False if another process has locked it.

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
