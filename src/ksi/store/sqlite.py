"""The store on one SQLite database: the default, for one daemon."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import apsw

from ksi.clock import Chance, Moment
from ksi.errors import StoreInUse, StoreUnavailable, StoreVersion
from ksi.request import Attempt, Turn
from ksi.store.chains import (
    Aftermath,
    ChainView,
    ClosedChain,
    Delivered,
    FollowUp,
    InjectionView,
    MemberRow,
    Trail,
)
from ksi.store.provider_records import KeptRecord, KeptRecords, PutRecord
from ksi.store.snapshot import Loaded, Record
from ksi.store.sqlite_chain_reads import ChainReads
from ksi.store.sqlite_chains import Chains
from ksi.store.sqlite_checkpoint import Checkpointer, lengthen_log, sync_fully
from ksi.store.sqlite_commit import Committer, as_ksi_error
from ksi.store.sqlite_ends import Ends
from ksi.store.sqlite_injections import Injections
from ksi.store.sqlite_ledger import Ledger
from ksi.store.sqlite_load import Load
from ksi.store.sqlite_locks import Locks
from ksi.store.sqlite_reads import Reads
from ksi.store.sqlite_requests import Requests
from ksi.store.sqlite_save import save
from ksi.store.sqlite_upkeep import Upkeep
from ksi.store.sqlite_usage import UsageReader
from ksi.store.statements import read_sql
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    Acquired,
    Cancelled,
    Claimed,
    Claims,
    Enqueued,
    Expiry,
    Fork,
    Listing,
    LockGrant,
    LockView,
    LoggedTurn,
    Named,
    NewLock,
    NewRequest,
    Offer,
    Page,
    Passing,
    Pruned,
    Recovery,
    RequestRow,
    RequestView,
    SessionView,
    Settled,
    StoreRules,
    Totals,
    Verdict,
)

LAYOUT = 4
"""The layout's version, kept in `user_version`."""

APPLICATION = 0x4B534931
"""Whose database it is, kept in `application_id`: "KSI1"."""

_CACHE_KIB = 64 * 1024


class SqliteStore:
    """See `ksi.store.base.Store` for every verb.

    Verbs go through a `Committer` on the writing connection; reads use a second one, which sees what is committed.
    """

    def __init__(
        self,
        path: Path,
        rules: StoreRules,
        chance: Chance,
        *,
        durability: Literal["full", "normal"] = "full",
    ) -> None:
        self._path = path
        self._rules = rules
        self._chance = chance
        self._durability = durability

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """See `Store.open`."""
        self._on_work = on_work
        async with AsyncExitStack() as undo:
            undo.callback(os.close, _take_file(self._path))
            try:
                recovery = await self._open(now, undo)
            except apsw.Error as error:
                raise StoreUnavailable(f"{self._path} cannot be used: {error}", path=str(self._path)) from None
            self._parts = undo.pop_all()
        on_work()
        return recovery

    async def _open(self, now: Moment, undo: AsyncExitStack) -> Recovery:
        """Make each part after what it stands on; `undo` takes them down in reverse."""
        writer, reader, log_reader = (self._connect() for _ in range(3))
        for connection in (writer, reader, log_reader):
            undo.callback(connection.close)
        _prepare(writer, self._path)
        lengthen_log(str(self._path))
        self._writer = writer
        self._ledger = Ledger(writer, self._rules, self._chance)
        reads = Reads(writer, self._rules)
        self._chains = Chains(self._ledger, reads)
        self._injections = Injections(self._ledger, self._chains)
        self._requests = Requests(self._ledger, reads, self._chains)
        self._ends = Ends(self._ledger, self._chains, self._injections)
        self._locks = Locks(self._ledger)
        self._upkeep = Upkeep(self._ledger, self._chains)
        self._reads = Reads(reader, self._rules)
        self._chain_reads = ChainReads(reader)
        self._log_reads = Reads(log_reader, self._rules)
        self._usage = UsageReader(self._connect)
        undo.callback(self._usage.close)
        checkpointer = Checkpointer(writer, str(self._path))
        undo.callback(checkpointer.close)
        durable = self._durability == "full"
        self._committer = Committer(writer, self._ledger, between=checkpointer.reset_if_long, durable=durable)
        undo.push_async_callback(self._committer.close)
        return await self._committer.submit(lambda: self._upkeep.recover(now))

    async def close(self) -> None:
        """See `Store.close`."""
        await self._parts.aclose()

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), statementcachesize=200)
        connection.set_busy_timeout(5_000)
        # Without it each new value bound to a range makes SQLite plan the statement anew.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full" if self._durability == "full" else "normal")
        sync_fully(connection, commits=self._durability == "full")
        connection.pragma("cache_size", -_CACHE_KIB)
        connection.pragma("temp_store", "memory")
        return connection

    # -- verbs ----------------------------------------------------------------------------------------------------

    async def enqueue(
        self, new: NewRequest, offers: Sequence[Offer], now: Moment, *, awaited: bool = False
    ) -> Enqueued:
        """See `Store.enqueue`."""
        enqueued = await self._committer.submit(lambda: self._enqueue(new, offers, now), lasting=not awaited)
        if enqueued.claim is None and enqueued.existing is None:
            self._on_work()
        return enqueued

    def _enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Enqueued:
        enqueued = self._requests.enqueue(new, offers, now)
        if enqueued.claim is None and enqueued.existing is None:
            self._ledger.must_last = True
        return enqueued

    async def claim(self, offers: Sequence[Offer], limit: int, now: Moment) -> Claims:
        """See `Store.claim`."""
        return await self._committer.submit(lambda: self._requests.claim(offers, limit, now))

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """See `Store.renew`. The file's lock is this daemon's lease: nobody else can take its runs."""
        return ()

    async def settle(
        self, claim: Claimed, attempt: Attempt, verdict: Verdict, now: Moment, aftermath: Aftermath | None = None
    ) -> Settled:
        """See `Store.settle`."""
        future = self._committer.submit(lambda: self._ends.settle(claim, attempt, verdict, now, aftermath))
        if self._ledger.totals.get("queued") or (aftermath is not None and aftermath.follow_ups):
            # Told already now: a claim that is submitted in this turn of the loop shares the transaction.
            self._on_work()
        return await future

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See `Store.deliver`."""
        delivered = await self._committer.submit(lambda: self._injections.deliver(request_id, aftermath, now))
        self._on_work()
        return delivered

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See `Store.redeliver`."""
        delivered = await self._committer.submit(lambda: self._injections.redeliver(injection_id, again, now))
        self._on_work()
        return delivered

    async def close_chain(self, name: str, now: Moment, limit: int = 200) -> ClosedChain:
        """See `Store.close_chain`."""
        return await self._committer.submit(lambda: self._chains.close(name, limit))

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """See `Store.reset_chain`."""
        return await self._committer.submit(lambda: self._chains.reset(name, now))

    async def provider_records(self, now: Moment) -> KeptRecords:
        """See `Store.provider_records`."""
        return KeptRecords(now.wall, await self._committer.submit(self._provider_records))

    def _provider_records(self) -> dict[str, KeptRecord]:
        rows = self._ledger.all("provider_records")
        return {name: KeptRecord(version, value) for name, version, value in rows}

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """See `Store.put_provider_record`. Nobody else writes here, so there is nobody to tell."""
        written, kept = await self._committer.submit(lambda: self._put_provider_record(name, version, value))
        return PutRecord(now.wall, written, kept)

    def _put_provider_record(self, name: str, version: int, value: bytes) -> tuple[bool, KeptRecord]:
        kept = self._provider_records().get(name, KeptRecord())
        if kept.version != version:
            return False, kept
        self._ledger.run("put_provider_record", name, version + 1, value)
        return True, KeptRecord(version + 1, value)

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """See `Store.cancel`."""
        cancelled = await self._committer.submit(lambda: self._ends.cancel(request_id, now, by))
        self._on_work()
        return cancelled

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See `Store.acquire`."""
        return await self._committer.submit(lambda: self._locks.acquire(lock, now))

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """See `Store.renew_lock`."""
        return await self._committer.submit(lambda: self._locks.renew_lock(request_id, now, fence))

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """See `Store.release`."""
        passing = await self._committer.submit(lambda: self._locks.release(request_id, now, fence))
        self._on_work()
        return passing

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See `Store.withdraw`."""
        passing = await self._committer.submit(lambda: self._locks.withdraw(request_id, now))
        self._on_work()
        return passing

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """See `Store.expire`."""
        expiry = await self._committer.submit(lambda: self._upkeep.expire(now, limit))
        if expiry.woken or expiry.ended or expiry.lapsed:
            self._on_work()
        return expiry

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """See `Store.unpark`."""
        return await self._committer.submit(lambda: self._upkeep.unpark(route, now, limit))

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See `Store.prune`."""
        return await self._committer.submit(lambda: self._upkeep.prune(now, limit))

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """See `Store.load`. Other verbs wait until it is done; reads see the empty store meanwhile."""
        loaded = await self._committer.submit_alone(lambda: Load(self._writer, self._ledger, now).load(records))
        self._on_work()
        return loaded

    async def set_log_watermark(self, watermark: int) -> None:
        """See `Store.set_log_watermark`."""
        await self._committer.submit(lambda: self._ledger.totals.__setitem__("log_watermark", watermark))

    # -- reads ----------------------------------------------------------------------------------------------------

    async def get(self, request_id: str) -> RequestView | None:
        """See `Store.get`. What was sent before the question is seen, though its commit may still be under way."""
        view = self._reads.get(request_id)
        if view is None and self._committer.busy:
            await self._committer.submit(lambda: None)
            view = self._reads.get(request_id)
        return view

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See `Store.find`."""
        return self._reads.find(kind, beginning, limit)

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        """See `Store.history`."""
        return self._reads.history(head, max_chars)

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See `Store.unrouted`."""
        return self._chain_reads.unrouted(limit)

    async def injection(self, injection_id: str) -> InjectionView | None:
        """See `Store.injection`."""
        return self._chain_reads.injection(injection_id)

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See `Store.injections`."""
        return self._chain_reads.injections(limit, cursor, state)

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """See `Store.trail`."""
        return self._chain_reads.trail(request_id, limit)

    async def chain(self, name: str) -> ChainView | None:
        """See `Store.chain`."""
        return self._chain_reads.chain(name)

    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """See `Store.chains`."""
        return self._chain_reads.chains(limit, cursor)

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See `Store.members`."""
        return self._chain_reads.members(chain, limit, cursor)

    async def session(self, conversation: str) -> SessionView | None:
        """See `Store.session`."""
        return self._reads.session(conversation)

    async def sessions(self, limit: int, cursor: str | None = None, agent_id: str | None = None) -> Page[SessionView]:
        """See `Store.sessions`."""
        return self._reads.sessions(limit, cursor, agent_id)

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See `Store.lock`."""
        return self._reads.lock(conversation, line_limit)

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """See `Store.locks`."""
        return self._reads.locks(limit, cursor)

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """See `Store.forks`."""
        return self._reads.forks(limit, cursor, conversation)

    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """See `Store.requests`."""
        return self._reads.requests(listing, limit, cursor)

    async def totals(self) -> Totals:
        """See `Store.totals`."""
        known = Totals.__struct_fields__
        return Totals(**{name: value for name, value in self._ledger.committed_totals.items() if name in known})

    async def waiting_by_route(self) -> Mapping[str, int]:
        """See `Store.waiting_by_route`."""
        return self._reads.waiting_by_route()

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See `Store.usage`. On a connection and thread of its own, as `log_after`."""
        try:
            return await asyncio.to_thread(self._usage.report, query, pricing)
        except apsw.Error as error:
            raise as_ksi_error(error) from None

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """See `Store.log_after`. On a connection and thread of its own: nobody waits for it."""
        return await asyncio.to_thread(self._log_reads.log_after, watermark, limit, max_chars)

    def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """See `Store.export`."""
        return save(self._connect, now)

    async def log_watermark(self) -> int:
        """See `Store.log_watermark`."""
        return self._ledger.committed_totals.get("log_watermark", 0)


def _take_file(path: Path) -> int:
    """Lock the file beside the database; held until it is closed, by the kernel, even through a kill.

    Raises:
        StoreInUse: another daemon has it.
        StoreUnavailable: the folder or file cannot be written.
    """
    beside = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # SQLite gives its log and its memory the database's own mode: prompts are for this user only.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreUnavailable(
            f"{path.parent} cannot be written: {error.strerror}; make it writable or set another store.url",
            path=str(path),
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise StoreInUse(
            f"{path} belongs to a running daemon (pid {holder or 'unknown'}); stop it first, or use another home",
            holder=holder or None,
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _prepare(connection: apsw.Connection, path: Path) -> None:
    """Make the tables of a new database, or bring an old one's up to date."""
    found = int(str(connection.pragma("user_version")))
    if found > LAYOUT:
        raise StoreVersion(
            f"{path} was written by a newer KSI (layout {found}, known {LAYOUT}); upgrade KSI or use another home",
            found=found,
            known=LAYOUT,
        )
    if found == 0:
        if connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall():
            raise StoreUnavailable(f"{path} is no KSI database; use another store.url", path=str(path))
        with connection:
            connection.execute(read_sql("schema.sql"))
            connection.pragma("user_version", LAYOUT)
            connection.pragma("application_id", APPLICATION)
    elif int(str(connection.pragma("application_id"))) != APPLICATION:
        raise StoreUnavailable(f"{path} is no KSI database; use another store.url", path=str(path))
    for layout in range(found + 1, LAYOUT + 1) if found else ():
        with connection:
            connection.execute(read_sql(f"upgrades/{layout}.sql"))
            connection.pragma("user_version", layout)
    connection.pragma("wal_autocheckpoint", 0)
