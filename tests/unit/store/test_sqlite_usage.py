"""The walk over the attempts: in steps, as far as the window reaches, and off the loop."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import pytest_asyncio

from ksi.clock import Chance, Moment
from ksi.errors import StoreUnavailable
from ksi.store.sqlite import usage as sqlite_usage
from ksi.store.sqlite.store import SqliteStore
from ksi.store.sqlite.usage import SLACK
from ksi.store.usage import Tariff, UsageQuery, UsageReport, UsageSums
from ksi.store.values import StoreRules

NOW = 2_000_000_000_000_000
SECOND = 1_000_000


def no_prices(*_: object) -> Tariff:
    return ()


def fill(path: Path, rows: dict[int, int]) -> None:
    """Attempts by their ids, each with one token, ended so long before now."""
    connection = apsw.Connection(str(path))
    with connection:
        connection.executemany(
            "INSERT INTO attempt (id, request, conversation, number, provider, outcome, started_at, finished_at, mcp,"
            " input_tokens, output_tokens, cache_read, cache_write, reasoning)"
            " VALUES (?1, ?1, 1, 1, 'stub', 'completed', ?2, ?2, 0, 1, 0, 0, 0, 0)",
            [(number, NOW - age) for number, age in rows.items()],
        )
    connection.close()


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    """An open store."""
    made = SqliteStore(tmp_path / "ksi.db", StoreRules(), Chance(random.Random(1)), durability="normal")
    await made.open(Moment(NOW, NOW), lambda: None)
    yield made
    await made.close()


async def total(store: SqliteStore, since: int) -> UsageSums:
    query = UsageQuery(since=NOW - since, until=NOW)
    return (await store.usage(query, no_prices)).total


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten attempts in a step."""
    monkeypatch.setattr(sqlite_usage, "STEP", 10)


@pytest.mark.promise("T2")
@pytest.mark.usefixtures("short_steps")
async def test_many_steps_and_gaps_between_ids_lose_nothing(tmp_path: Path, store: SqliteStore) -> None:
    ids = [*range(3, 38), *range(400, 405), 1_000]
    fill(tmp_path / "ksi.db", {number: (2_000 - number) * SECOND for number in ids})
    assert (await total(store, 3_600 * SECOND)).input_tokens == len(ids)
    assert (await total(store, 1_601 * SECOND)).input_tokens == 6


@pytest.mark.promise("T2")
@pytest.mark.usefixtures("short_steps")
async def test_an_attempt_that_was_settled_late_is_found(tmp_path: Path, store: SqliteStore) -> None:
    ages = dict.fromkeys(range(1, 11), 10 * SECOND)
    # Thirty that waited an hour for their settle came in between.
    ages |= dict.fromkeys(range(11, 41), SLACK)
    fill(tmp_path / "ksi.db", ages)
    assert (await total(store, 60 * SECOND)).input_tokens == 10


@pytest.mark.usefixtures("short_steps")
async def test_the_walk_ends_behind_the_window(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "ksi.db", {number: (101 - number) * 3_600 * SECOND for number in range(1, 101)})
    looks: list[str] = []
    run = sqlite_usage._Report._run

    def counted(report: sqlite_usage._Report, name: str, *values: Any) -> Any:
        looks.append(name)
        return run(report, name, *values)

    monkeypatch.setattr(sqlite_usage._Report, "_run", counted)
    assert (await total(store, 5 * 3_600 * SECOND)).input_tokens == 4
    assert looks.count("take_part") == 1
    assert looks.count("newest_of") == 2


async def test_a_report_leaves_the_loop_alone_and_ends_with_its_store(tmp_path: Path, store: SqliteStore) -> None:
    fill(tmp_path / "ksi.db", dict.fromkeys(range(1, 5), SECOND))
    asked, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> Tariff:
        asked.set()
        go_on.wait(10)
        return ()

    report = asyncio.create_task(store.usage(UsageQuery(since=0, until=NOW), slow))
    await asyncio.to_thread(asked.wait, 10)
    assert await store.get("unknown") is None
    go_on.set()
    await store.close()
    (outcome,) = await asyncio.gather(report, return_exceptions=True)
    assert isinstance(outcome, UsageReport | StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        await store.usage(UsageQuery(since=0, until=NOW), no_prices)


async def test_no_temporary_table_is_left(tmp_path: Path, store: SqliteStore) -> None:
    fill(tmp_path / "ksi.db", {1: SECOND})

    def broken(*_: object) -> Tariff:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await store.usage(UsageQuery(since=0, until=NOW), broken)
    assert (await total(store, 60 * SECOND)).input_tokens == 1
