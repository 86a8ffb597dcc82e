"""The database's layout: an older one is brought up to date when it is opened, and nothing of it is lost."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import pytest

from ksi.clock import Chance, Moment
from ksi.errors import StoreVersion
from ksi.request import State
from ksi.store.chains import ChainLimits, Membership
from ksi.store.sqlite.statements import read_sql
from ksi.store.sqlite.store import APPLICATION, LAYOUT, SqliteStore
from ksi.store.values import NewRequest, Offer, StoreRules

HERE = Path(__file__).parent
NOW = Moment(1_800_000_000_000_000, 5_000_000)
OFFER = Offer("stub", "stub", 10)
ROWS = """
INSERT INTO total (name, value) VALUES ('queued', 1), ('completed', 1), ('conversations', 1), ('fence', 7);
INSERT INTO route (name) VALUES ('stub');
INSERT INTO conversation (id, name, created_at, active_at, turns, head) VALUES (1, 'talk', 10, 20, 1, 1);
INSERT INTO request (
    key, request_id, conversation, state, place, ready, external, priority, rank, hold, route, provider, attempt,
    interruptions, fence, token, enqueued_at, started_at, finished_at, last_attempt, cancelling
) VALUES
    (1, 'done', 1, 5, NULL, 0, 0, 2, 5, 1, 'stub', 'stub', 1, 0, 7, 9, 10, 11, 1799999999000000, 1, 0),
    (2, 'waits', 1, 1, 0, 1, 0, 2, 6, 1, 'stub', NULL, 0, 0, NULL, NULL, 12, NULL, NULL, NULL, 0);
INSERT INTO body (request, model, data)
VALUES (1, 'stub/echo', '{"prompt":"one"}'), (2, 'stub/echo', '{"prompt":"two"}');
INSERT INTO attempt (
    id, request, conversation, number, provider, outcome, started_at, finished_at, mcp, input_tokens, output_tokens,
    cache_read, cache_write, reasoning, text
) VALUES (1, 1, 1, 1, 'stub', 'completed', 11, 1799999999000000, 0, 30, 12, 0, 0, 0, 'answer');
"""


def old_database(path: Path, layout: int = 1) -> None:
    """A database as the first layout had it, with a life in it."""
    connection = apsw.Connection(str(path))
    connection.execute((HERE / "layout_1.sql").read_text("utf-8"))
    connection.execute(ROWS)
    connection.pragma("user_version", layout)
    connection.pragma("application_id", APPLICATION)
    connection.close()


def store_at(path: Path) -> SqliteStore:
    return SqliteStore(path, StoreRules(), Chance(random.Random(1)))


def layout_of(connection: apsw.Connection) -> dict[str, object]:
    """Tables with their columns, in whatever order, and indexes, triggers and views as they were written."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    columns = {table: sorted(row[1:] for row in connection.execute(f"PRAGMA table_info({table})")) for table in tables}
    indexes = "SELECT name, tbl_name, sql FROM sqlite_schema WHERE type IN ('index', 'trigger', 'view') ORDER BY name"
    return {"tables": columns, "indexes": connection.execute(indexes).fetchall()}


async def test_an_old_database_has_the_new_layout_when_it_is_opened(tmp_path: Path) -> None:
    old_database(tmp_path / "ksi.db")
    store = store_at(tmp_path / "ksi.db")
    await store.open(NOW, lambda: None)
    await store.close()
    upgraded, fresh = apsw.Connection(str(tmp_path / "ksi.db")), apsw.Connection(":memory:")
    fresh.execute(read_sql("schema.sql"))
    assert layout_of(upgraded) == layout_of(fresh)
    assert upgraded.pragma("user_version") == LAYOUT
    assert upgraded.pragma("integrity_check") == "ok"
    upgraded.close()
    fresh.close()


@pytest.mark.promise("C5")
async def test_the_contents_of_an_old_database_stay_valid(tmp_path: Path) -> None:
    old_database(tmp_path / "ksi.db")
    store = store_at(tmp_path / "ksi.db")
    await store.open(NOW, lambda: None)
    view = await store.get("done")
    assert view is not None
    assert (view.state, view.answer and view.answer.text, view.chain) == (State.COMPLETED, "answer", None)
    (turn,) = await store.history(1, 1_000)
    assert (turn.text, turn.content, turn.reminders) == ("answer", (), ())
    (claim,) = (await store.claim((OFFER,), 5, NOW)).started
    assert (claim.request_id, claim.fence, claim.chain, claim.reminders) == ("waits", 8, None, ())
    limits = ChainLimits(max_depth=3, token_budget=1_000, time_window=10**18)
    new = NewRequest(
        request_id="child",
        conversation="other",
        body=b"{}",
        route="stub",
        rank=7,
        chain=Membership(limits=limits, parent="done"),
    )
    await store.enqueue(new, (), NOW)
    chain = await store.chain("done")
    assert chain is not None
    assert (chain.members, chain.spending.used) == (2, 42)
    await store.close()
    again = store_at(tmp_path / "ksi.db")
    await again.open(NOW, lambda: None)
    assert await again.chain("done") == chain
    await again.close()


async def test_a_newer_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    old_database(tmp_path / "ksi.db", LAYOUT + 1)
    with pytest.raises(StoreVersion):
        await store_at(tmp_path / "ksi.db").open(NOW, lambda: None)
    connection = apsw.Connection(str(tmp_path / "ksi.db"))
    assert connection.pragma("user_version") == LAYOUT + 1
    connection.close()
