"""Imports V1's turns into version 2's database: a new one is made next to it, checked, and put in its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from ksi.clock import MICROSECONDS, Clock, Moment, microseconds
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.errors import MigrationError
from ksi.host.platforms import sync_folder
from ksi.migration.house import House
from ksi.migration.records import Merge
from ksi.migration.v1_data import V1Data
from ksi.store.base import Store
from ksi.store.snapshot.file import CheckpointReader, CheckpointWriter
from ksi.store.snapshot.records import Record
from ksi.store.usage import UsageQuery

CHECKPOINT = "store.ksi"
"""The old database's records, in the backup."""
_FAR = 100 * 366 * 86_400 * MICROSECONDS
_SIDE_FILES = ("-wal", "-shm", ".lock")


def beside(database: Path) -> Path:
    """The path of the new database."""
    return database.with_name(database.name + ".migrating")


def remove(database: Path) -> None:
    """Remove a database with its side files."""
    for path in (database, *(database.with_name(database.name + end) for end in _SIDE_FILES)):
        path.unlink(missing_ok=True)


def settle_log(house: House, database: Path, clock: Clock) -> None:
    """Let the response log have all turns of a database, as its daemon's next start would.

    Nothing of it is under way afterwards, so that the log holds for whatever database comes next.
    """

    async def follow() -> None:
        async with _open(house, database, clock) as store:
            log = ResponseLog(store, house.logs, clock, enabled=house.config.log.responses)
            await log.start()
            await log.stop()
            await log.forget()

    asyncio.run(follow())


def save(house: House, database: Path, file: Path, clock: Clock, ksi: str) -> int:
    """Write all of a database to a checkpoint; how many attempts its account has."""

    async def collect() -> int:
        async with _open(house, database, clock) as store:
            now = clock.now()
            writer = CheckpointWriter(file)
            try:
                async with aclosing(store.export(now)) as pieces:
                    async for piece in pieces:
                        writer.add(piece)
                writer.finish(now.unix, ksi)
            finally:
                writer.discard()
            return await _accounted(store, now)

    return asyncio.run(collect())


def records_of(file: Path | None) -> Iterable[Record]:
    """A checkpoint's records; none without one."""
    if file is None:
        return ()
    return _read(file)


def _read(file: Path) -> Iterator[Record]:
    reader = CheckpointReader(file)
    try:
        reader.check()
        yield from reader.records()
    finally:
        reader.close()


def merge(house: House, data: V1Data, checkpoint: Path | None, now: Moment) -> Merge:
    """V1's turns among a checkpoint's records."""
    providers = house.config.providers

    def stateful(name: str) -> bool:
        kind = providers[name].kind if name in providers else name
        return kind == "claude-cli"

    keep = microseconds(house.config.retention.finished)
    return Merge(lambda: records_of(checkpoint), data, now, keep_finished=keep, stateful=stateful)


def make(house: House, merged: Merge, database: Path, clock: Clock, accounted: int) -> None:
    """Write a new database with all records, and look whether it has them; `accounted` attempts were there before.

    Raises:
        MigrationError: it has not.
    """

    async def load() -> None:
        async with _open(house, database, clock) as store:
            await store.load(merged.records(), clock.now())
            await _verify(store, merged, accounted, clock.now())

    remove(database)
    asyncio.run(load())
    for end in ("-wal", "-shm"):
        side = database.with_name(database.name + end)
        if side.exists() and side.stat().st_size:
            raise MigrationError(f"{side} was left behind by SQLite; nothing was put in its place")
    remove_side_files(database)


def remove_side_files(database: Path) -> None:
    """Remove the side files of a closed database."""
    for end in _SIDE_FILES:
        database.with_name(database.name + end).unlink(missing_ok=True)


def put(new: Path, database: Path) -> None:
    """Give a new database its place."""
    new.rename(database)
    sync_folder(database.parent)


async def _verify(store: Store, merged: Merge, accounted: int, now: Moment) -> None:
    """Every conversation that got turns has them, to be read back, and no attempt is missing in the account."""
    for name, turns in merged.expected().items():
        view = await store.session(name)
        if view is None or view.turns != turns or view.head is None:
            raise MigrationError(f"conversation {name!r} was not imported completely")
        if not await store.history(view.head, 0):
            raise MigrationError(f"the last turn of conversation {name!r} cannot be read")
    found, wanted = await _accounted(store, now), accounted + merged.added
    if found != wanted:
        raise MigrationError(f"the account has {found} attempts of {wanted}")


async def _accounted(store: Store, now: Moment) -> int:
    """All attempts in the account of usage, including those with a future time."""
    report = await store.usage(UsageQuery(since=0, until=now.wall + _FAR), lambda *_: ())
    return report.total.attempts


@asynccontextmanager
async def _open(house: House, database: Path, clock: Clock) -> AsyncIterator[Store]:
    store = house.store(database)
    await store.open(clock.now(), lambda: None)
    try:
        yield store
    finally:
        await store.close()


def look_into(house: House, database: Path, clock: Clock) -> None:
    """Open a database as a daemon would, and close it again."""

    async def look() -> None:
        async with _open(house, database, clock) as store:
            await store.totals()

    asyncio.run(look())
