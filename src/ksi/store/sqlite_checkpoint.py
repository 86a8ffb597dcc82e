"""Moves the write-ahead log into the database from a thread of its own, so that no commit has to."""

from __future__ import annotations

import threading

import apsw
import structlog

PASSIVE_PAGES = 4_000
"""Pages in the log above which it is copied into the database (16 MiB)."""

RESET_PAGES = 16_000
"""Pages in the log above which the writer copies the last of them itself, so that the log begins anew (64 MiB)."""


class Checkpointer:
    """Watches the log's length; the writer tells it after each commit."""

    def __init__(self, writer: apsw.Connection, path: str) -> None:
        self._path = path
        self._wanted = threading.Event()
        self._copying = threading.Event()
        self._closing = False
        self._pages = 0
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

    def reset_if_long(self) -> None:
        """Between two transactions: copy what came since the thread copied the most.

        The log begins anew only when all of it is in the database, and under load the thread alone never gets there.
        """
        if self._pages <= RESET_PAGES or self._copying.is_set():
            return
        try:
            self._writer.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            self._log.warning("checkpoint failed", error=str(error))
        # Asked again after as many more, whatever came of it.
        self._pages = 0

    def _on_commit(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._pages = pages
        if pages > PASSIVE_PAGES:
            self._wanted.set()
        return 0

    def _work(self) -> None:
        connection = apsw.Connection(self._path)
        try:
            while True:
                self._wanted.wait()
                self._wanted.clear()
                if self._closing:
                    return
                self._copying.set()
                try:
                    connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
                except apsw.Error as error:
                    # The log keeps what was not copied; the next commit asks again.
                    self._log.warning("checkpoint failed", error=str(error))
                finally:
                    self._copying.clear()
        finally:
            connection.close()
