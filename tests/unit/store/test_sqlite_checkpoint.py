"""The log's length: what it is from the start, and how it stays within it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import apsw
import pytest

from ksi.store import sqlite_checkpoint
from ksi.store.sqlite_checkpoint import LOG_BYTES, RESET_PAGES, Checkpointer, lengthen_log


def log_size(path: str) -> int:
    return Path(path + "-wal").stat().st_size


@pytest.fixture
def database(tmp_path: Path) -> tuple[apsw.Connection, str]:
    path = str(tmp_path / "k.db")
    connection = apsw.Connection(path)
    connection.pragma("journal_mode", "wal")
    connection.pragma("wal_autocheckpoint", 0)
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b)")
    return connection, path


def test_a_lengthened_log_holds_what_was_written_before_and_after(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    connection.execute("INSERT INTO t VALUES (1, 'before')")
    lengthen_log(path)
    assert log_size(path) == LOG_BYTES
    connection.execute("INSERT INTO t VALUES (2, 'after')")
    assert log_size(path) == LOG_BYTES
    other = apsw.Connection(path)
    assert other.execute("SELECT b FROM t ORDER BY a").fetchall() == [("before",), ("after",)]


@pytest.mark.promise("Q3")
def test_a_crash_with_a_lengthened_log_loses_nothing(database: tuple[apsw.Connection, str], tmp_path: Path) -> None:
    connection, path = database
    lengthen_log(path)
    connection.execute("INSERT INTO t VALUES (1, 'kept')")
    for name in ("k.db", "k.db-wal"):
        (tmp_path / f"crashed-{name}").write_bytes((tmp_path / name).read_bytes())
    crashed = apsw.Connection(str(tmp_path / "crashed-k.db"))
    assert crashed.execute("SELECT b FROM t").fetchall() == [("kept",)]


def test_a_log_that_finds_no_room_takes_none(
    database: tuple[apsw.Connection, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = database
    before = log_size(path)

    class Full(bytes):
        def __new__(cls, *_: Any) -> Any:
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(sqlite_checkpoint, "bytes", Full, raising=False)
    lengthen_log(path)
    assert log_size(path) == before


def test_under_load_the_log_begins_anew_within_its_length(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    lengthen_log(path)
    checkpointer = Checkpointer(connection, path)
    for number in range(RESET_PAGES):
        connection.execute("INSERT INTO t VALUES (?, zeroblob(9000))", (number,))
        checkpointer.reset_if_long()
    checkpointer.close()
    assert log_size(path) <= 1.25 * RESET_PAGES * 4_120
