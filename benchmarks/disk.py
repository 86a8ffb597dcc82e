"""What this disk needs for one commit, measured the way SQLite commits and the way a plain file does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import apsw

from ksi.host import platforms
from ksi.host.private_files import make_folder
from ksi.store.sqlite.checkpoint import sync_fully

_BLOCK = b"x" * 8192
_WRAP = 500
"""Blocks after which the file is written over from its start, as SQLite does with its log after 1,000 pages."""
_GROWING = 600
"""Commits until then."""


class Probe:
    """A database with SQLite's defaults, in WAL mode, and a file beside it, both made for this."""

    def __init__(self, folder: Path, durability: Literal["full", "normal"]) -> None:
        make_folder(folder)
        self._connection = apsw.Connection(str(folder / "probe.db"))
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", durability)
        sync_fully(self._connection, commits=durability == "full")
        self._connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
        self._file = os.open(folder / "probe.dat", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._blocks = 0
        self._synced = durability == "full"
        # The first commits make the log and the file grow, which costs a disk more than writing them over.
        self.commits(_GROWING)
        self.syncs(_WRAP)

    def close(self) -> None:
        """Let go of both."""
        self._connection.close()
        os.close(self._file)

    def commits(self, count: int) -> list[int]:
        """Nanoseconds of each of so many transactions of one small row."""
        cursor = self._connection.cursor()
        taken: list[int] = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            cursor.execute("BEGIN IMMEDIATE")
            cursor.execute("INSERT INTO row (data) VALUES (zeroblob(200))")
            cursor.execute("COMMIT")
            taken.append(time.perf_counter_ns() - begun)
        return taken

    def syncs(self, count: int) -> list[int]:
        """Nanoseconds of each of so many writes; with durability `full`, each with its sync."""
        sync = getattr(os, "fdatasync", platforms.sync)  # macOS has only the latter
        taken: list[int] = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            os.pwrite(self._file, _BLOCK, self._blocks % _WRAP * len(_BLOCK))
            if self._synced:
                sync(self._file)
            taken.append(time.perf_counter_ns() - begun)
            self._blocks += 1
        return taken
