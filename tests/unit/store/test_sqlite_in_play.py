"""What the SQLite store knows without asking its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest
import pytest_asyncio

from ksi.errors import QueueFull
from ksi.request import State
from ksi.store.sqlite import in_play
from ksi.store.sqlite.in_play import _FORGETS, FreeConversation, InPlay, KnownRun
from ksi.store.sqlite.statements import load_statements
from ksi.store.sqlite.store import SqliteStore
from ksi.store.values import StoreRules
from tests.conformance.world import OFFER, SqliteHome, World


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(SqliteHome(tmp_path), StoreRules())
    await world.open()
    yield world
    await world.store.close()


class Trace:
    """The statements of a store's writer."""

    def __init__(self, world: World) -> None:
        assert isinstance(world.store, SqliteStore)
        self.statements: list[str] = []
        world.store._writer.exec_trace = self._note

    def _note(self, _cursor: apsw.Cursor, statement: str, _values: object) -> bool:
        self.statements.append(statement)
        return True

    def take(self) -> list[str]:
        """Those since the last look, the transactions' own left out."""
        own = ("BEGIN", "COMMIT", "PRAGMA", "INSERT INTO total")
        taken = [statement for statement in self.statements if not statement.startswith(own)]
        self.statements.clear()
        return taken


@pytest.mark.promise("Q8")
async def test_a_turn_of_a_known_conversation_takes_five_statements(world: World) -> None:
    await world.complete(await world.run("first"))
    trace = Trace(world)
    await world.complete(await world.run("second"))
    taken = trace.take()
    assert len(taken) == 5, taken
    assert not any(statement.startswith("SELECT") for statement in taken)


@pytest.mark.promise("Q4")
async def test_a_known_id_is_found_by_the_insert_that_fails(world: World) -> None:
    await world.complete(await world.run("first"))
    again = await world.enqueue("first", offers=[OFFER])
    assert again.existing is not None
    assert again.existing.state is State.COMPLETED
    settled = await world.complete(await world.run("second"))
    assert settled.state is State.COMPLETED


async def test_a_rolled_back_change_is_not_known(world: World) -> None:
    await world.complete(await world.run("first"))
    store = world.store
    assert isinstance(store, SqliteStore)

    def fails() -> None:
        raise RuntimeError("a defect")

    claim = await world.run("second")
    with pytest.raises(RuntimeError):
        await store._committer.submit(fails)
    assert not store._ledger.in_play.known_runs()
    settled = await world.complete(claim)
    assert settled.turn is not None


def test_every_statement_with_an_entry_is_there() -> None:
    files = Path(in_play.__file__).parent.joinpath("sql").glob("*.sql")
    assert set(_FORGETS) <= set(load_statements(*(file.name for file in files if file.name != "schema.sql")))


def test_after_a_statement_without_an_entry_nothing_is_known() -> None:
    known = InPlay()
    known.is_free(FreeConversation(1, "a", None))
    known.runs(7, KnownRun("r", 2, 1, 1, 2, 1, "stub", 0, None, None))
    known.changed("something_new", ())
    assert known.free("a") is None
    assert known.run(7) is None


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_play, "KNOWN_CONVERSATIONS", 3)
    monkeypatch.setattr(in_play, "KNOWN_RUNS", 3)
    known = InPlay()
    for number in range(10):
        known.is_free(FreeConversation(number, f"c{number}", None))
        known.runs(number, KnownRun("r", 2, 1, 1, number, 1, "stub", 0, None, None))
    assert [free.name for free in known.known_free()] == ["c7", "c8", "c9"]
    assert [key for key, _ in known.known_runs()] == [7, 8, 9]


@pytest.mark.promise("Q4")
async def test_a_known_id_among_others_in_one_transaction_takes_none_of_them_along(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.complete(await world.run(name, name))
    names = ["a2", "b", "c2"]
    found = await asyncio.gather(*(world.enqueue(name, name[0], [OFFER]) for name in names))
    assert [one.claim is not None for one in found] == [True, False, True]
    assert found[1].existing is not None
    assert found[1].existing.state is State.COMPLETED
    for one in found:
        if one.claim is not None:
            assert (await world.complete(one.claim)).state is State.COMPLETED


@pytest.mark.promise("Q4", "Q5")
async def test_a_known_id_is_answered_while_the_queue_is_full(tmp_path: Path) -> None:
    world = World(SqliteHome(tmp_path), StoreRules(max_queued=1))
    await world.open()
    await world.complete(await world.run("first"))
    await world.enqueue("waits", "elsewhere")
    again = await world.enqueue("first")
    assert again.existing is not None
    with pytest.raises(QueueFull):
        await world.enqueue("second")
    await world.store.close()
