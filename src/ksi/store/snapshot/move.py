"""Moving all that one store holds into another one of any kind, while no daemon runs."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from ksi.clock import Clock
from ksi.errors import StoreError
from ksi.store.base import Store
from ksi.store.snapshot.file import CheckpointReader, CheckpointWriter
from ksi.store.snapshot.records import Record, SavedAttempt, SavedLock, SavedRecord, SavedRequest, SavedSpare

Say = Callable[[str], None]

_LOCKS = str(SavedLock.__struct_config__.tag)
_RECORDS = str(SavedRecord.__struct_config__.tag)


class Here(msgspec.Struct, frozen=True):
    """This machine, and the providers that keep their sessions on it."""

    node: str
    providers: frozenset[str]


async def move(
    source: Store, target: Store, folder: Path, clock: Clock, version: str, say: Say, here: Here | None = None
) -> dict[str, int]:
    """Bring all records of `source` into the empty `target`; how many there are of each kind.

    They wait in a file in `folder` meanwhile, which only one move may use at a time. `source` keeps its contents: only
    requests that ran when its daemon died return to its queue, as at any opening. `here` is given if only this machine
    used `source`: then its provider sessions are on it.

    Raises:
        StoreInUse: a daemon has one of them.
        StoreNotEmpty: `target` holds something.
        StoreError: the contents of `target` differ from those that were copied; or an error of the stores.
    """
    sweep_moves(folder)
    with TemporaryDirectory(prefix=f"moving-{os.getpid()}-", dir=folder) as place:
        path = Path(place) / "records.ksi"
        async with _opened(source, clock):
            written = CheckpointWriter(path)
            try:
                async with aclosing(source.export(clock.now())) as pieces:
                    async for piece in pieces:
                        written.add(piece)
                header = written.finish(clock.unix(), version)
            finally:
                written.discard()
        say(f"read: {_told(header.records)}")
        async with _opened(target, clock):
            reader = CheckpointReader(path)
            try:
                reader.check()
                records = reader.records()
                if here is not None:
                    records = (at_home(record, here) for record in records)
                loaded = await target.load(records, clock.now())
            finally:
                reader.close()
            say(f"written: {len(loaded.interrupted)} that ran are queued again, {len(loaded.failed)} failed instead")
            found = await _counted(target, clock)
    # A waiter for a lock that was tied to a connection is not brought along. The empty store's own records of providers
    # stay, in addition to the loaded ones.
    differ = {kind for kind in found.keys() | header.records.keys() if found[kind] != header.records.get(kind, 0)}
    if differ - {_LOCKS, _RECORDS}:
        raise StoreError(f"{_told(header.records)} were read, and {_told(found)} are there; go on with the old store")
    say(f"verified: {_told(found)}")
    return header.records


def at_home(record: Record, here: Here) -> Record:
    """A record whose provider sessions are bound to this machine, if they are bound to one."""
    if isinstance(record, SavedRequest):
        return msgspec.structs.replace(record, attempts=tuple(_at_home(saved, here) for saved in record.attempts))
    if isinstance(record, SavedSpare):
        return msgspec.structs.replace(record, saved=_at_home(record.saved, here))
    return record


def _at_home(saved: SavedAttempt, here: Here) -> SavedAttempt:
    attempt = saved.attempt
    if attempt.provider_session is None or attempt.provider not in here.providers:
        return saved
    return msgspec.structs.replace(saved, attempt=msgspec.structs.replace(attempt, node=here.node))


def sweep_moves(folder: Path) -> list[Path]:
    """Remove the files of killed moves, which have all prompts, and return their paths.

    Raises:
        OSError: it cannot be taken away.
    """
    left = [path for path in folder.glob("moving-*") if not _is_at_work(path.name.split("-")[1])]
    for path in left:
        shutil.rmtree(path)
    return left


def _is_at_work(pid: str) -> bool:
    """True if another process of this number is alive."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@asynccontextmanager
async def _opened(store: Store, clock: Clock) -> AsyncIterator[None]:
    await store.open(clock.now(), lambda: None)
    try:
        yield
    finally:
        await store.close()


async def _counted(store: Store, clock: Clock) -> Counter[str]:
    counts: Counter[str] = Counter()
    async with aclosing(store.export(clock.now())) as pieces:
        async for piece in pieces:
            counts.update(str(type(record).__struct_config__.tag) for record in piece)
    return counts


def _told(records: dict[str, int]) -> str:
    kinds = {kind: number for kind, number in records.items() if kind != "figures"}
    return ", ".join(f"{number} {kind}s" for kind, number in kinds.items()) or "nothing"
