"""The files of one database: taken by one daemon, and checked before each transaction while it has them.

Two locks keep other daemons away. The one on the lock file next to the database also works between two stores of one
process. The one on the database file itself belongs to its inode, so it holds even when the lock file is removed.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from ksi.errors import StoreInUse, StoreUnavailable
from ksi.host.pid_file import holder_of, lock_pid_file
from ksi.host.private_files import is_still, make_folder

DAEMON_BYTE = 0x40000000 + 1024
"""The byte of the database file that a daemon locks, behind those that SQLite locks (its PENDING_BYTE and 511 more)."""

SHM_WRITER, SHM_OPEN = 120, 128
"""Bytes of the shared memory file that SQLite locks: the writer holds one, each process that uses the log the other."""


class DatabaseFiles:
    """The files of one database on the disk: `ksi.db`, its log, its shared memory and its lock file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock: int | None = None
        self._database: int | None = None
        self._known: list[tuple[str, int, int]] = []
        """A file that must stay in place while the database is open: a path, and its device and inode."""

    def take(self) -> None:
        """Lock them until `release`. The kernel releases the locks when the process dies.

        Raises:
            StoreInUse: another daemon has them.
            StoreUnavailable: they cannot be written or locked.
        """
        try:
            make_folder(self._path.parent)
            self._lock = lock_pid_file(self._lock_path)
            # SQLite gives its log and its memory the database's own mode: prompts are for this user only.
            self._database = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            free = _lock_byte(self._database)
        except OSError as error:
            self.release()
            raise StoreUnavailable(
                f"{self._path.parent} cannot be used: {error.strerror}; make it writable or set another store.url",
                path=str(self._path),
            ) from None
        if self._lock is None or not free:
            holder = self._holder()
            self.release()
            raise StoreInUse(
                f"{self._path} belongs to a running daemon (pid {holder or 'unknown'}); stop it first, or use another "
                "home",
                holder=holder,
            )

    def release(self) -> None:
        """Let go. Only when no connection is open: closing the file would take SQLite's own locks away."""
        for descriptor in (self._database, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._database = self._lock = None

    def opened(self) -> None:
        """SQLite has made its files: remember which ones they are."""
        assert self._database is not None
        database = os.fstat(self._database)
        self._known = [(str(self._path), database.st_dev, database.st_ino)]
        for suffix in ("-wal", "-shm"):
            path = f"{self._path}{suffix}"
            status = os.stat(path)  # noqa: PTH116 - as below
            self._known.append((path, status.st_dev, status.st_ino))

    def lost(self) -> str | None:
        """Name the problem if a file was removed or replaced: later writes would be lost for all other readers."""
        for path, device, inode in self._known:
            try:
                status = os.stat(path)  # noqa: PTH116 - before each transaction
            except OSError as error:
                return f"{path} is gone ({error.strerror}). Put it back, or restart the daemon"
            if status.st_ino != inode or status.st_dev != device:
                return f"{path} was replaced by another file. Put the old one back, or restart the daemon"
            if path == str(self._path) and not status.st_size:
                return f"{path} was emptied. Stop the daemon and restore a backup or a checkpoint"
        return self._lock_lost()

    def _lock_lost(self) -> str | None:
        if self._lock is not None and is_still(self._lock_path, self._lock):
            return None
        try:
            lock = lock_pid_file(self._lock_path)
        except OSError as error:
            return f"{self._lock_path} is gone and cannot be made again: {error.strerror}"
        if lock is None:
            return f"another daemon (pid {self._holder() or 'unknown'}) has taken {self._path}. This one must stop"
        if self._lock is not None:
            os.close(self._lock)
        self._lock = lock
        return None

    @property
    def database_is_ours(self) -> bool:
        """True if the database's path still leads to the opened file."""
        return self._database is not None and is_still(self._path, self._database)

    def sizes(self) -> dict[str, int]:
        """Bytes of the database and of its log."""
        return {"database_bytes": _size(self._path), "log_bytes": _size(Path(f"{self._path}-wal"))}

    def writers(self) -> list[int]:
        """Processes other than this one that hold the database's write lock, if the kernel tells."""
        return list(_lock_holders(Path(f"{self._path}-shm"), SHM_WRITER))

    def _holder(self) -> str | None:
        """The pid of the daemon that has the database, if it can be found out."""
        written = holder_of(self._lock_path)
        if written is not None and written != str(os.getpid()):
            return written
        return next((str(pid) for pid in _lock_holders(Path(f"{self._path}-shm"), SHM_OPEN)), None)


def _lock_byte(database: int) -> bool:
    """Lock the daemon's byte of an open database; False if another daemon has it.

    The lock belongs to the open file, not to the process: SQLite unlocks all bytes of the process when it closes a
    database. A system without such locks has the lock file alone.
    """
    kind = getattr(fcntl, "F_OFD_SETLK", None)
    if kind is None:
        return True
    if sys.platform == "darwin":
        lock = struct.pack("qqihh", DAEMON_BYTE, 1, 0, fcntl.F_WRLCK, os.SEEK_SET)
    else:
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, DAEMON_BYTE, 1, 0)
    try:
        fcntl.fcntl(database, kind, lock)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _lock_holders(path: Path, byte: int) -> Iterator[int]:
    """Processes other than this one that lock this byte of a file, if the kernel lists them (Linux)."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text("ascii", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        # "3: POSIX  ADVISORY  WRITE 4711 fe:00:131 120 120"; a process that waits for a lock has one word more.
        words = line.split()
        if len(words) != 8 or not words[4].isdigit():
            continue
        pid, where, first, last = int(words[4]), words[5], words[6], words[7]
        if where.rpartition(":")[2] != str(inode) or pid in (0, os.getpid()):
            continue
        if int(first) <= byte and (last == "EOF" or byte <= int(last)):
            yield pid


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
