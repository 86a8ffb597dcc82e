"""What this disk needs for one commit, measured the way SQLite commits and the way a plain file does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import apsw

_BLOCK = b"x" * 8192
_WRAP = 2048
"""Blocks after which the file is written over from its start, as SQLite does with its log."""


class Probe:
    """A database and a file of its own in a folder. Nothing of it is kept."""

    def __init__(self, folder: Path, durability: Literal["full", "normal"]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._connection = apsw.Connection(str(folder / "probe.db"))
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", durability)
        self._connection.pragma("wal_autocheckpoint", 0)
        self._connection.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, data BLOB NOT NULL)")
        self._file = os.open(folder / "probe.dat", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._blocks = 0
        self._synced = durability == "full"
        # The first commits make the log grow, which costs a disk more than writing it over.
        self.commits(200)

    def close(self) -> None:
        """Let go of both."""
        self._connection.close()
        os.close(self._file)

    def commits(self, count: int) -> list[int]:
        """Nanoseconds of each of so many transactions of one small row."""
        self._connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_RESTART)
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
        sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter only
        taken: list[int] = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            os.pwrite(self._file, _BLOCK, self._blocks % _WRAP * len(_BLOCK))
            if self._synced:
                sync(self._file)
            taken.append(time.perf_counter_ns() - begun)
            self._blocks += 1
        return taken
