"""Moves the write-ahead log into the database from a thread of its own, so that no commit has to."""

from __future__ import annotations

import threading

import apsw
import structlog

PASSIVE_PAGES = 4_000
"""Pages in the log above which it is copied into the database (16 MiB)."""

RESET_PAGES = 32_000
"""Pages in the log above which the writer stands still for the moment that beginning it anew takes (128 MiB)."""


class Checkpointer:
    """Watches the log's length; the writer tells it after each commit."""

    def __init__(self, writer: apsw.Connection, path: str) -> None:
        self._path = path
        self._wanted = threading.Event()
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
        """Between two transactions: begin the log anew where readers and commits never let the thread do so."""
        if self._pages > RESET_PAGES:
            self._writer.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_RESTART)
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
                try:
                    connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
                except apsw.Error as error:
                    # The log keeps what was not copied; the next commit asks again.
                    self._log.warning("checkpoint failed", error=str(error))
        finally:
            connection.close()
