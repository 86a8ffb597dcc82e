"""Moves the write-ahead log into the database from a thread of its own, so that no commit has to.

A commit that writes over an old part of the log costs less than half of one that makes the file longer, whose new size
has to be synced too. So the file has a good length from the start, and restarts before it grows for ever.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import apsw
import structlog

PASSIVE_PAGES = 2_000
"""New pages in the log after which it is copied into the database (8 MiB)."""

RESET_PAGES = 16_000
"""Pages in the log above which the writer copies the last of them itself, so that the log restarts (64 MiB).

A shorter log costs more: pages that many commits rewrite are copied once for each restart."""

LOG_BYTES = 20 * 1024 * 1024
"""The log's length on disk from the start. It grows to its full length once, under load."""


def lengthen_log(path: str, to: int) -> None:
    """Give an open database's log a length of so many bytes. SQLite takes zeros for the log's end.

    Without space for that it keeps its length, and grows on demand.
    """
    with Path(f"{path}-wal").open("r+b", buffering=0) as log:
        length = log.seek(0, os.SEEK_END)
        try:
            if length < to and log.write(bytes(to - length)) < to - length:
                log.truncate(length)
        except OSError:
            log.truncate(length)


def sync_fully(connection: apsw.Connection, *, commits: bool) -> None:
    """Have macOS write synced data to the disk and not only into the disk's cache; other systems do so anyhow.

    Without `commits` a loss of power may take the last commits, and still leaves the database whole.
    """
    connection.pragma("fullfsync", commits)
    connection.pragma("checkpoint_fullfsync", True)


class Checkpointer:
    """Watches the log's length; the writer tells it after each commit."""

    def __init__(self, writer: apsw.Connection, path: str) -> None:
        self._path = path
        self._wanted = threading.Event()
        self._copying = threading.Event()
        self._closing = False
        self._pages = 0
        self._asked = 0
        """The log's length when a copy was last asked for."""
        self._log = structlog.get_logger("ksi.store")
        self._writer = writer
        writer.set_wal_hook(self._on_commit)
        self._thread = threading.Thread(target=self._work, name="ksi-checkpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._writer.set_wal_hook(None)
        self._closing = True
        self._wanted.set()
        self._thread.join()

    def ask(self) -> None:
        """Copy the contents of the log, whatever its length."""
        self._wanted.set()

    def is_long(self) -> bool:
        """True if the log is so long that it must restart, and the thread does not copy it just now."""
        return self._pages > RESET_PAGES and not self._copying.is_set()

    def reset(self) -> None:
        """Between two transactions: copy the pages written since the thread copied most of them.

        The log restarts only when all of it is in the database, and under load the thread alone never gets there.
        """
        try:
            self._writer.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            self._log.warning("checkpoint failed", error=str(error))
        # Asked again after as many more, whatever came of it.
        self._pages = 0

    def _on_commit(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        if pages < self._pages:
            self._asked = 0
        self._pages = pages
        if pages - self._asked > PASSIVE_PAGES:
            self._asked = pages
            self._wanted.set()
        return 0

    def _work(self) -> None:
        connection: apsw.Connection | None = None
        try:
            while True:
                self._wanted.wait()
                self._wanted.clear()
                if self._closing:
                    return
                self._copying.set()
                try:
                    connection = connection or self._open()
                    connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
                except apsw.Error as error:
                    # The log keeps the pages that were not copied; the next commit asks again.
                    self._log.warning("checkpoint failed", error=str(error))
                finally:
                    self._copying.clear()
        finally:
            if connection is not None:
                connection.close()

    def _open(self) -> apsw.Connection:
        """A connection that has read something: one that has not does not know of the log, and copies nothing."""
        connection = apsw.Connection(self._path)
        try:
            sync_fully(connection, commits=False)
            connection.pragma("user_version")
        except apsw.Error:
            connection.close()
            raise
        return connection
