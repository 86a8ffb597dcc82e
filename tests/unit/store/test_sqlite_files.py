"""Whose database it is, and whether its files are still there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from ksi.errors import StoreInUse, StoreUnavailable
from ksi.store.sqlite.files import DatabaseFiles


class Database:
    """An open one, as the store has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = DatabaseFiles(path)
        self.files.take()
        self.connection = apsw.Connection(str(path))
        self.connection.pragma("journal_mode", "wal")
        self.connection.execute("CREATE TABLE IF NOT EXISTS t (x); INSERT INTO t VALUES (1)")
        self.files.opened()

    def close(self) -> None:
        self.connection.close()
        self.files.release()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "db" / "ksi.db")
    yield database
    database.close()


def take_in_another_process(path: Path) -> str:
    """What another daemon is told that wants the database."""
    script = f"""
from pathlib import Path
from ksi.errors import StoreInUse
from ksi.store.sqlite.files import DatabaseFiles
try:
    DatabaseFiles(Path({str(path)!r})).take()
except StoreInUse as error:
    print(error.message)
else:
    print("taken")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.promise("O2")
def test_the_files_are_for_one_daemon_and_this_user_alone(database: Database) -> None:
    before = os.umask(0)
    try:
        assert f"belongs to a running daemon (pid {os.getpid()})" in take_in_another_process(database.path)
    finally:
        os.umask(before)
    with pytest.raises(StoreInUse):
        DatabaseFiles(database.path).take()
    modes = {path.name: path.stat().st_mode & 0o777 for path in database.path.parent.iterdir()}
    assert set(modes) == {"ksi.db", "ksi.db-wal", "ksi.db-shm", "ksi.db.lock"}
    assert set(modes.values()) == {0o600}
    assert database.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.promise("O2")
def test_without_the_lock_file_it_is_still_for_one_daemon(database: Database) -> None:
    """The lock on the file itself holds, whatever SQLite does with its own locks on it."""
    (database.path.parent / "ksi.db.lock").unlink()
    assert f"belongs to a running daemon (pid {os.getpid()})" in take_in_another_process(database.path)
    other = apsw.Connection(str(database.path))
    other.execute("SELECT * FROM t").fetchall()
    other.close()
    (database.path.parent / "ksi.db.lock").unlink()
    assert "belongs to a running daemon" in take_in_another_process(database.path)


def test_a_released_lock_can_be_taken_again(database: Database) -> None:
    database.close()
    assert take_in_another_process(database.path) == "taken"
    database.files.take()


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


LOSSES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "replaced": lambda path: (
        path.with_name("copy").write_bytes(path.read_bytes()),
        path.with_name("copy").replace(path),
    ),
    "with its folder": lambda path: path.parent.rename(path.parent.with_name("elsewhere")),
}


@pytest.mark.promise("O2")
@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("name", ["ksi.db", "ksi.db-wal", "ksi.db-shm"])
def test_a_file_that_is_gone_or_another_one_is_named(database: Database, name: str, how: str) -> None:
    assert database.files.lost() is None
    path = database.path.with_name(name)
    LOSSES[how](path)
    lost = database.files.lost()
    assert lost is not None
    assert str(path if how != "with its folder" else database.path) in lost
    assert "restart the daemon" in lost
    assert database.files.database_is_ours == (name != "ksi.db" and how != "with its folder")


@pytest.mark.promise("O2")
def test_a_restored_file_is_found_again(database: Database, tmp_path: Path) -> None:
    database.path.parent.rename(tmp_path / "elsewhere")
    assert database.files.lost() is not None
    (tmp_path / "elsewhere").rename(database.path.parent)
    assert database.files.lost() is None


@pytest.mark.promise("O2")
def test_a_lock_file_that_was_removed_is_made_again(database: Database) -> None:
    lock = database.path.parent / "ksi.db.lock"
    lock.unlink()
    assert database.files.lost() is None
    assert lock.read_text() == f"{os.getpid()}\n"
    assert "belongs to a running daemon" in take_in_another_process(database.path)


@pytest.mark.promise("O2")
def test_a_lock_file_that_another_daemon_took_ends_the_writing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is where the system has no lock that belongs to the file."""
    monkeypatch.setattr("ksi.store.sqlite.files._lock_byte", lambda _: True)
    (database.path.parent / "ksi.db.lock").unlink()
    other = DatabaseFiles(database.path)
    other.take()
    lost = database.files.lost()
    assert lost is not None
    assert "another daemon" in lost
    other.release()
    assert database.files.lost() is None


@pytest.mark.promise("O3")
def test_the_holder_of_the_write_lock_is_reported_by_its_pid(database: Database) -> None:
    script = f"""
import sqlite3, sys
held = sqlite3.connect({str(database.path)!r}, isolation_level=None)
held.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""
    assert database.files.writers() == []
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert database.files.writers() == [holder.pid]
    holder.communicate()
    assert database.files.writers() == []


def test_sizes_are_those_of_the_files(database: Database) -> None:
    log = database.path.with_name("ksi.db-wal")
    assert database.files.sizes() == {
        "database_bytes": database.path.stat().st_size,
        "log_bytes": log.stat().st_size,
    }
    database.path.parent.rename(database.path.parent.with_name("elsewhere"))
    assert database.files.sizes() == {"database_bytes": 0, "log_bytes": 0}


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        DatabaseFiles(tmp_path / "file" / "ksi.db").take()
