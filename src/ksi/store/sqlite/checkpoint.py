"""Moves the write-ahead log into the database from a thread of its own, so that no commit has to.

A commit that writes over an old part of the log costs less than half of one that makes the file longer, whose new size
has to be synced too. So the file has a good length from the start, and restarts before it grows for ever.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import apsw
import structlog

from ksi.host.private_files import free_bytes

PASSIVE_PAGES = 2_000
"""New pages in the log after which it is copied into the database (8 MiB)."""

RESET_PAGES = 16_000
"""Pages in the log above which the writer copies the last of them itself, so that the log restarts (64 MiB).

A shorter log costs more: pages that many commits rewrite are copied once for each restart."""

LOG_BYTES = 20 * 1024 * 1024
"""The log's length on disk from the start. It grows to its full length once, under load."""

AHEAD_PAGES = 1_000
"""Pages that the log has on the disk ahead of what is written (4 MiB). On a disk that another program fills, what runs
can still write its end. It grows by a quarter of this, as the next commit waits for its new pages to be written."""

TRY_AGAIN_PAGES = 50
"""Pages written since the disk had no room for that, after which it is asked again."""

LEFT_FREE = 16 * 1024 * 1024
"""Free bytes below which the log is not made longer: it keeps its length, and on a small disk nothing else would have
room again."""

_FRAME = 4_096 + 24
"""Bytes of a page in the log."""


def lengthen_log(path: str, to: int) -> int:
    """Give an open database's log a length of so many bytes, and return its length. SQLite takes zeros for the log's
    end.

    Without space for that it keeps its length, and grows on demand. Nothing may be committed meanwhile.
    """
    with Path(f"{path}-wal").open("r+b", buffering=0) as log:
        length = log.seek(0, os.SEEK_END)
        if length >= to:
            return length
        try:
            if log.write(bytes(to - length)) == to - length:
                return to
        except OSError:
            pass
        log.truncate(length)
        return length


def sync_fully(connection: apsw.Connection, *, commits: bool) -> None:
    """Have macOS write synced data to the disk and not only into the disk's cache; other systems do so anyhow.

    Without `commits` a loss of power may take the last commits, and still leaves the database whole.
    """
    connection.pragma("fullfsync", commits)
    connection.pragma("checkpoint_fullfsync", True)


class Checkpointer:
    """Watches the log's length; the writer tells it after each commit."""

    def __init__(self, writer: apsw.Connection, path: str, *, ahead: int = AHEAD_PAGES) -> None:
        """`ahead`: pages that the log has on the disk ahead of what is written."""
        self._path = path
        self._ahead = ahead
        self._log_path = Path(f"{path}-wal")
        self._room = self._measured()
        """Pages that the log's present length holds."""
        self._refused_at: int | None = None
        """The log's pages when the disk had no room for more; None if it had."""
        self._end = 0
        """The log's pages at the last commit."""
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

    def due(self) -> bool:
        """True if the log is to be tended between two transactions."""
        return self._is_short or (self._pages > RESET_PAGES and not self._copying.is_set())

    @property
    def _is_short(self) -> bool:
        if self._ahead == 0 or self._end + self._ahead <= self._room:
            return False
        return self._refused_at is None or self._end > self._refused_at + TRY_AGAIN_PAGES

    def tend(self) -> None:
        """Between two transactions: lengthen a log that comes to its end on the disk, and let one that is long, or
        that the disk has no room for, restart."""
        if self._is_short and self._lengthen():
            return
        self._reset()

    def _lengthen(self) -> bool:
        """Give the log its pages ahead; returns True if the disk has room for them."""
        to = (self._end + self._ahead + self._ahead // 4) * _FRAME
        free = free_bytes(self._log_path.parent)
        if free is None or free >= LEFT_FREE + to - self._room * _FRAME:
            with suppress(OSError):  # another program has removed it, which the store notices
                self._room = lengthen_log(self._path, to) // _FRAME
        enough = self._end + self._ahead <= self._room
        self._refused_at = None if enough else self._end
        return enough

    def _reset(self) -> None:
        """Copy the pages written since the thread copied most of them.

        The log restarts only when all of it is in the database, and under load the thread alone never gets there.
        """
        try:
            self._writer.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            self._log.warning("checkpoint failed", error=str(error))
        # Asked again after as many more, whatever came of it.
        self._pages = 0

    def _measured(self) -> int:
        """Pages that the log's file holds."""
        try:
            return self._log_path.stat().st_size // _FRAME
        except OSError:
            return 0

    def _on_commit(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        if pages < self._pages:
            self._asked = 0
        if pages < self._end:
            # It has restarted, and may have been cut.
            self._refused_at, self._room = None, self._measured()
        self._end = pages
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
