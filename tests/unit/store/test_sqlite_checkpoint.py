"""The log's length: what it is from the start, and how it stays within it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import apsw
import pytest

from ksi.store.sqlite import checkpoint as sqlite_checkpoint
from ksi.store.sqlite.checkpoint import AHEAD_PAGES, LEFT_FREE, LOG_BYTES, RESET_PAGES, Checkpointer, lengthen_log
from tests.integration.wire import until


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


def test_a_lengthened_log_holds_the_writes_from_before_and_after(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    connection.execute("INSERT INTO t VALUES (1, 'before')")
    lengthen_log(path, LOG_BYTES)
    assert log_size(path) == LOG_BYTES
    connection.execute("INSERT INTO t VALUES (2, 'after')")
    assert log_size(path) == LOG_BYTES
    other = apsw.Connection(path)
    assert other.execute("SELECT b FROM t ORDER BY a").fetchall() == [("before",), ("after",)]


@pytest.mark.promise("Q3")
def test_a_crash_with_a_lengthened_log_loses_nothing(database: tuple[apsw.Connection, str], tmp_path: Path) -> None:
    connection, path = database
    lengthen_log(path, LOG_BYTES)
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
    assert lengthen_log(path, LOG_BYTES) == log_size(path) == before


@pytest.mark.promise("O11", "Q3")
def test_the_log_has_room_on_the_disk_ahead_of_what_is_written(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    checkpointer = Checkpointer(connection, path, ahead=20)
    checkpointer.tend()
    for number in range(100):
        before = log_size(path)
        connection.execute("INSERT INTO t VALUES (?, zeroblob(40000))", (number,))
        assert log_size(path) == before, "a commit that makes the file longer fails on a full disk"
        if checkpointer.due():
            checkpointer.tend()
    assert log_size(path) > 100 * 40_000
    checkpointer.close()


@pytest.mark.promise("O11", "Q3")
@pytest.mark.parametrize("free", [0, LEFT_FREE + 25 * 4_120 - 1], ids=["a full disk", "a small disk"])
def test_a_log_that_the_disk_has_no_room_for_restarts(
    database: tuple[apsw.Connection, str], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    connection, path = database
    lengthen_log(path, 200 * 4_120)
    checkpointer = Checkpointer(connection, path, ahead=100)
    tries: list[Path] = []

    def look(folder: Path) -> int:
        tries.append(folder)
        return free

    monkeypatch.setattr(sqlite_checkpoint, "free_bytes", look)
    for number in range(100):
        connection.execute("INSERT INTO t VALUES (?, zeroblob(40000))", (number,))
        if checkpointer.due():
            checkpointer.tend()
            assert not checkpointer.due(), "it is not asked again at once"
    assert log_size(path) == 200 * 4_120
    assert 5 < len(tries) < 20
    checkpointer.close()


async def test_under_load_the_log_restarts_within_its_length(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    lengthen_log(path, LOG_BYTES)
    connection.pragma("synchronous", "normal")
    checkpointer = Checkpointer(connection, path)

    async def due() -> bool:
        return checkpointer.due()

    restarts = before = 0
    for number in range(RESET_PAGES):
        connection.execute("INSERT INTO t VALUES (?, zeroblob(9000))", (number,))
        pages, _ = connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_NOOP)
        if pages < before:
            restarts += 1
        before = pages
        if pages > RESET_PAGES:
            # How long the thread copies is up to the machine, and so is how far the log would grow meanwhile.
            await until(due)
        if checkpointer.due():
            checkpointer.tend()
    checkpointer.close()
    # Three times as much was written.
    assert restarts >= 2
    assert log_size(path) <= (RESET_PAGES + 2 * AHEAD_PAGES) * 4_120


@pytest.mark.promise("O11")
async def test_the_thread_copies_the_log_without_the_writer(database: tuple[apsw.Connection, str]) -> None:
    connection, path = database
    checkpointer = Checkpointer(connection, path)
    try:
        connection.execute("INSERT INTO t VALUES (1, zeroblob(1000000))")
        assert Path(path).stat().st_size < 1_000_000
        checkpointer.ask()

        async def copied() -> bool:
            return Path(path).stat().st_size > 1_000_000

        await until(copied)
    finally:
        checkpointer.close()
