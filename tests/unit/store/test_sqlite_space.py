"""What a database takes of the disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from structlog.testing import capture_logs

from ksi.clock import Chance, Moment
from ksi.store.sqlite import space as sqlite_space
from ksi.store.sqlite import store as sqlite
from ksi.store.sqlite.space import PAGE, SPARE_PAGES, allow_shrinking, give_back, rewrite_once
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules

ROWS = 4_000
"""Rows of a page each."""


def fill(path: Path, *, shrinks: bool) -> apsw.Connection:
    """A database with many rows, of which all but a few are deleted again."""
    connection = apsw.Connection(str(path))
    if shrinks:
        allow_shrinking(connection)
    connection.pragma("journal_mode", "wal")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x BLOB)")
    with connection:
        connection.executemany("INSERT INTO t VALUES (?, zeroblob(4000))", ((number,) for number in range(ROWS)))
    with connection:
        connection.execute("DELETE FROM t WHERE id % 100")
    return connection


def size(connection: apsw.Connection, path: Path) -> int:
    """The file's length when the log is copied into it."""
    connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
    return path.stat().st_size


def kept(connection: apsw.Connection) -> list[int]:
    return [int(str(number)) for (number,) in connection.execute("SELECT id FROM t ORDER BY id")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ksi.db"


@pytest.fixture
def shrinking(path: Path) -> Iterator[apsw.Connection]:
    connection = fill(path, shrinks=True)
    yield connection
    connection.close()


@pytest.fixture
def old(path: Path) -> Iterator[apsw.Connection]:
    """A database as it was made before."""
    connection = fill(path, shrinks=False)
    yield connection
    connection.close()


@pytest.mark.promise("O11")
def test_free_pages_leave_the_file_step_by_step_and_some_stay(shrinking: apsw.Connection, path: Path) -> None:
    before = size(shrinking, path)
    steps = []
    while True:
        with shrinking:
            steps.append(give_back(shrinking, 100))
        if not steps[-1]:
            break
    assert set(steps[:-2]) == {100}
    assert shrinking.pragma("freelist_count") == SPARE_PAGES
    assert size(shrinking, path) <= before - sum(steps) * PAGE, "and the map of the pages that went"
    assert kept(shrinking) == list(range(0, ROWS, 100))
    assert shrinking.pragma("integrity_check") == "ok"


@pytest.mark.promise("O11")
def test_an_old_database_is_rewritten_once(old: apsw.Connection, path: Path) -> None:
    before = size(old, path)
    with capture_logs() as logs:
        rewrite_once(old, path)
        rewrite_once(old, path)
    assert [entry["log_level"] for entry in logs] == ["info"]
    assert size(old, path) < before / 10
    assert old.pragma("auto_vacuum") == 2
    assert kept(old) == list(range(0, ROWS, 100))


@pytest.mark.promise("O11")
@pytest.mark.parametrize("reason", ["no room", "large"])
def test_an_old_database_stays_as_it_is_without_room_or_where_it_is_large(
    old: apsw.Connection, path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "large":
        monkeypatch.setattr(sqlite_space, "MOST_REWRITTEN", PAGE)
    else:
        monkeypatch.setattr(sqlite_space, "free_bytes", lambda folder: 10 * PAGE)
    before = size(old, path)
    with capture_logs() as logs:
        rewrite_once(old, path)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert size(old, path) == before
    with old:
        assert give_back(old, 100) == 0


@pytest.mark.promise("O11")
def test_an_old_database_that_another_program_writes_to_stays_as_it_is(old: apsw.Connection, path: Path) -> None:
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    with capture_logs() as logs:
        rewrite_once(old, path)
    other.execute("ROLLBACK")
    other.close()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert kept(old) == list(range(0, ROWS, 100))


def store_at(path: Path) -> SqliteStore:
    return SqliteStore(path, StoreRules(), Chance(random.Random(1)), durability="normal")


NOW = Moment(mono=1, wall=1_800_000_000_000_000)


@pytest.mark.promise("O11")
async def test_a_store_can_shrink_from_its_first_day_on(path: Path) -> None:
    store = store_at(path)
    await store.open(NOW, lambda: None)
    assert store._writer.pragma("auto_vacuum") == 2
    assert await store.give_back() == 0
    await store.close()


@pytest.mark.promise("O11")
async def test_a_store_that_was_made_before_can_shrink_when_it_was_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        for name in ("allow_shrinking", "rewrite_once"):
            then.setattr(sqlite, name, lambda *_: None)
        before = store_at(path)
        await before.open(NOW, lambda: None)
        assert before._writer.pragma("auto_vacuum") == 0
        await before.close()
    store = store_at(path)
    with capture_logs() as logs:
        await store.open(NOW, lambda: None)
    assert [entry["log_level"] for entry in logs] == ["info"]
    assert store._writer.pragma("auto_vacuum") == 2
    await store.close()


@pytest.mark.promise("O11")
async def test_a_store_s_file_is_cut_when_the_last_page_was_given_back(path: Path) -> None:
    store = store_at(path)
    await store.open(NOW, lambda: None)
    with store._writer as writer:
        writer.execute("CREATE TABLE t (x)")
        writer.executemany("INSERT INTO t VALUES (zeroblob(4000))", ((),) * ROWS)
    with store._writer as writer:
        writer.execute("DROP TABLE t")
    given = 0
    while pages := await store.give_back(200):
        given += pages
    assert given >= ROWS - 2 * SPARE_PAGES
    await store.close()
    assert path.stat().st_size < (2 * SPARE_PAGES) * PAGE


@pytest.mark.promise("O2")
@pytest.mark.parametrize("harm", ["removed", "replaced", "emptied"])
async def test_an_idle_store_notices_that_its_database_is_not_there_any_more(path: Path, harm: str) -> None:
    store = store_at(path)
    await store.open(NOW, lambda: None)
    assert store.condition().problems == ()
    data = path.read_bytes()
    if harm == "emptied":
        with path.open("r+b") as file:
            file.truncate(0)
    else:
        path.rename(path.with_name("aside"))
        if harm == "replaced":
            path.write_bytes(data)
    with capture_logs() as logs:
        condition = store.condition()
    assert not condition.serving
    (problem,) = condition.problems
    assert str(path) in problem
    assert [entry["event"] for entry in logs] == ["the database takes no changes"]
    await store.close()
