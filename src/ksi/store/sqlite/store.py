"""The store on one SQLite database: the default, for one daemon."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import apsw

from ksi.budgets.rules import NO_CAPS, Caps, Spent
from ksi.clock import Chance, Moment
from ksi.errors import StoreError, StoreUnavailable, StoreVersion
from ksi.request import Attempt, Priority, Turn, said_chars
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
from ksi.store.questions import Question
from ksi.store.rules.fairness import Flow
from ksi.store.rules.terms import Phrase
from ksi.store.snapshot.records import Loaded, Record
from ksi.store.sqlite.budgets import Budgets
from ksi.store.sqlite.chain_reads import ChainReads
from ksi.store.sqlite.chains import Chains
from ksi.store.sqlite.checkpoint import AHEAD_PAGES, LOG_BYTES, Checkpointer, lengthen_log, sync_fully
from ksi.store.sqlite.commit import Committer, as_ksi_error
from ksi.store.sqlite.conversations import Conversations, Finder, Holding
from ksi.store.sqlite.ends import Ends
from ksi.store.sqlite.files import DatabaseFiles
from ksi.store.sqlite.injections import Injections
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.load import Load
from ksi.store.sqlite.locks import Locks
from ksi.store.sqlite.reads import Reads
from ksi.store.sqlite.requests import Requests
from ksi.store.sqlite.save import save
from ksi.store.sqlite.search import TextIndex
from ksi.store.sqlite.space import LONGEST_LOG, allow_shrinking, give_back, rewrite_once
from ksi.store.sqlite.statements import read_sql
from ksi.store.sqlite.upkeep import Upkeep
from ksi.store.sqlite.usage import UsageReader
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    NO_PAUSE,
    Acquired,
    Answered,
    BudgetUse,
    BudgetWait,
    Cancelled,
    Claimed,
    Claims,
    Deleted,
    Enqueued,
    Expiry,
    Finish,
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
    Paused,
    Pruned,
    Recovery,
    RequestRow,
    RequestView,
    SearchPage,
    SessionView,
    Settled,
    StoreCondition,
    StoreRules,
    Totals,
    Verdict,
)

LAYOUT = 11
"""The layout's version, kept in `user_version`."""

LARGE = 256 * 1024
"""Characters of one step from which it is written off the loop, in a transaction of its own."""

APPLICATION = 0x4B534931
"""The database's owner, kept in `application_id`: "KSI1"."""

OPEN_PATIENCE = 5_000
"""Milliseconds that a connection waits for another program's lock, if the loop does not wait with it."""

READ_PATIENCE = 20
"""Milliseconds that a read on the loop waits while another program repairs the log's index."""

_CACHE_KIB = 64 * 1024

P = ParamSpec("P")
T = TypeVar("T")


def _reading(
    read: Callable[Concatenate[SqliteStore, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SqliteStore, P], Coroutine[Any, Any, T]]:
    """A read whose faults are raised in the terms of the error tree."""

    async def told(store: SqliteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await read(store, *args, **kwargs)
        except apsw.Error as error:
            raise store.note(error) from None

    functools.update_wrapper(told, read)
    return told


class SqliteStore:
    """See `ksi.store.base.Store` for every verb.

    Verbs go through a `Committer` on the writing connection; reads use a second one, which sees committed data.
    """

    def __init__(
        self,
        path: Path,
        rules: StoreRules,
        chance: Chance,
        *,
        durability: Literal["full", "normal"] = "full",
        log_bytes: int = LOG_BYTES,
    ) -> None:
        """`log_bytes` is the length of the write-ahead log from the start. A store that is soon closed needs none."""
        self._path = path
        self._rules = rules
        self._chance = chance
        self._durability = durability
        self._log_bytes = log_bytes
        self._files = DatabaseFiles(path)
        self._gave_back = False
        """True if the last step gave pages back."""

    @property
    def shared(self) -> None:
        """See `Store.shared`. The file's lock is this daemon's lease: no other can take its runs."""
        return None

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """See `Store.open`."""
        self._on_work = on_work
        async with AsyncExitStack() as undo:
            self._files.take()
            undo.callback(self._files.release)
            try:
                recovery = await self._open(now, undo)
            except apsw.Error as error:
                raise StoreUnavailable(f"{self._path} cannot be used: {error}", path=str(self._path)) from None
            self._parts = undo.pop_all()
        on_work()
        return recovery

    async def _open(self, now: Moment, undo: AsyncExitStack) -> Recovery:
        """Make each part after those it depends on; `undo` takes them down in reverse."""
        writer, reader, log_reader = (self._connect() for _ in range(3))
        for connection in (writer, reader, log_reader):
            undo.callback(connection.close)
        _prepare(writer, self._path)
        lengthen_log(str(self._path), self._log_bytes)
        self._files.opened()
        undo.callback(self._keep_what_is_not_ours, (writer, reader, log_reader))
        # Never wait for another program's lock on the loop: the committer tries again, and a read is over in a moment.
        writer.set_busy_timeout(0)
        reader.set_busy_timeout(READ_PATIENCE)
        self._writer = writer
        self._ledger = Ledger(writer, self._rules, self._chance)
        reads = Reads(writer, self._rules)
        self._chains = Chains(self._ledger, reads)
        self._budgets = Budgets(self._ledger)
        self._injections = Injections(self._ledger, self._chains, self._budgets)
        self._requests = Requests(self._ledger, reads, self._chains, self._budgets)
        self._ends = Ends(self._ledger, self._chains, self._injections, self._budgets)
        self._locks = Locks(self._ledger)
        self._upkeep = Upkeep(self._ledger, self._chains, self._budgets)
        self._reads = Reads(reader, self._rules)
        self._chain_reads = ChainReads(reader)
        self._log_reads = Reads(log_reader, self._rules)
        self._usage = UsageReader(self._connect)
        undo.callback(self._usage.close)
        self._conversations = Conversations(self._ledger, self._chains)
        self._text = TextIndex(self._path, self._connect)
        undo.callback(self._text.close)
        checkpointer = self._checkpointer = Checkpointer(
            writer, str(self._path), ahead=AHEAD_PAGES if self._log_bytes else 0
        )
        undo.callback(checkpointer.close)
        durable = self._durability == "full"
        self._committer = Committer(
            writer,
            self._ledger,
            due=checkpointer.due,
            between=checkpointer.tend,
            lost=self._files.lost,
            on_damage=self._on_work,
            durable=durable,
        )
        undo.push_async_callback(self._committer.close)
        # Left by a daemon that died between a deletion and this, or of another database.
        await asyncio.to_thread(self._text.check)
        return await self._committer.submit(lambda: self._upkeep.recover(now))

    async def close(self) -> None:
        """See `Store.close`."""
        await self._parts.aclose()

    def _keep_what_is_not_ours(self, connections: Sequence[apsw.Connection]) -> None:
        """The last connection that closes removes the log by its name, so not where that name leads to another file.

        What our log has goes into the database before, where that is still ours.
        """
        if self._files.lost() is None:
            return
        if self._files.database_is_ours:
            connections[0].wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        for connection in connections:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def condition(self) -> StoreCondition:
        """See `Store.condition`."""
        self._committer.look_at_files()
        trouble = self._committer.trouble
        problems = [] if trouble is None else [trouble.told(self._files.writers() if trouble.held else ())]
        if self._committer.damage is not None:
            problems.append(self._committer.damage)
        return StoreCondition(
            problems=tuple(problems),
            serving=not problems,
            commits=self._committer.commits,
            commit_seconds=self._committer.commit_seconds,
            **self._files.sizes(),
        )

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), statementcachesize=200)
        connection.set_busy_timeout(OPEN_PATIENCE)
        # Without it SQLite plans the statement again for each new value bound to a range.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        allow_shrinking(connection)
        connection.pragma("journal_mode", "wal")
        connection.pragma("journal_size_limit", LONGEST_LOG)
        connection.pragma("synchronous", "full" if self._durability == "full" else "normal")
        sync_fully(connection, commits=self._durability == "full")
        connection.pragma("cache_size", -_CACHE_KIB)
        connection.pragma("temp_store", "memory")
        return connection

    def note(self, error: apsw.Error) -> BaseException:
        """A read's fault in the terms of the error tree; a damaged database is reported in `condition` from then on."""
        self._committer.note_damage(error)
        return as_ksi_error(error)

    # -- verbs ----------------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        new: NewRequest,
        offers: Sequence[Offer],
        now: Moment,
        *,
        awaited: bool = False,
        paused: Paused = NO_PAUSE,
        caps: Caps = NO_CAPS,
    ) -> Enqueued:
        """See `Store.enqueue`."""
        self._committer.take_new_work()
        enqueued = await self._committer.submit(
            lambda: self._enqueue(new, offers, now, paused, caps), lasting=not awaited
        )
        if enqueued.claim is None and enqueued.existing is None:
            self._on_work()
        return enqueued

    def _enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment, paused: Paused, caps: Caps) -> Enqueued:
        enqueued = self._requests.enqueue(new, offers, now, paused, caps)
        if enqueued.claim is None and enqueued.existing is None:
            self._ledger.must_last = True
        return enqueued

    async def claim(
        self, offers: Sequence[Offer], limit: int, now: Moment, paused: Paused = NO_PAUSE, caps: Caps = NO_CAPS
    ) -> Claims:
        """See `Store.claim`."""
        self._committer.take_new_work()
        return await self._committer.submit(lambda: self._requests.claim(offers, limit, now, paused, caps))

    async def bring_back(self, paused: Paused, now: Moment, after: str | None = None, limit: int = 500) -> str | None:
        """See `Store.bring_back`."""
        return await self._committer.submit(lambda: self._upkeep.bring_back(paused, after, limit))

    async def settle(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None = None,
        spent: Spent | None = None,
        caps: Caps = NO_CAPS,
    ) -> Settled:
        """See `Store.settle`."""
        large = said_chars(attempt) + _size(aftermath) > LARGE
        submit = self._committer.submit_alone if large else self._committer.submit
        future = submit(lambda: self._ends.settle(claim, attempt, verdict, now, aftermath, spent, caps))
        if self._ledger.totals.get("queued") or (aftermath is not None and aftermath.follow_ups):
            # Signalled already now: a claim that is submitted in this turn of the loop shares the transaction.
            self._on_work()
        return await future

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See `Store.deliver`."""
        submit = self._committer.submit_alone if _size(aftermath) > LARGE else self._committer.submit
        delivered = await submit(lambda: self._injections.deliver(request_id, aftermath, now))
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
        """See `Store.put_provider_record`. There is no other writer, and so none to notify."""
        written, kept = await self._committer.submit(lambda: self._put_provider_record(name, version, value))
        return PutRecord(now.wall, written, kept)

    def _put_provider_record(self, name: str, version: int, value: bytes) -> tuple[bool, KeptRecord]:
        kept = self._provider_records().get(name, KeptRecord())
        if kept.version != version:
            return False, kept
        self._ledger.run("put_provider_record", name, version + 1, value)
        return True, KeptRecord(version + 1, value)

    async def reconsider(self, budget: str | None, now: Moment, limit: int = 500) -> bool:
        """See `Store.reconsider`."""
        brought_back = await self._committer.submit(lambda: self._budgets.reconsider(budget, limit))
        self._on_work()
        return brought_back >= limit

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """See `Store.cancel`."""
        cancelled = await self._committer.submit(lambda: self._ends.cancel(request_id, now, by))
        self._on_work()
        return cancelled

    async def answer(
        self,
        request_id: str,
        asked: Question,
        answered: Question,
        now: Moment,
        *,
        end: Finish | None = None,
        due: int | None = None,
        expires: int | None = None,
    ) -> Answered:
        """See `Store.answer`."""
        given = await self._committer.submit(
            lambda: self._ends.answer(request_id, asked, answered, now, end, due, expires)
        )
        self._on_work()
        return given

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See `Store.acquire`."""
        self._committer.take_new_work()
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

    async def rename(self, conversation: str, name: str, now: Moment) -> str:
        """See `Store.rename`."""
        return await self._committer.submit(lambda: self._conversations.rename(conversation, name))

    async def delete(self, conversation: str, now: Moment) -> Deleted:
        """See `Store.delete`. The pages that it leaves are overwritten."""
        holding = await self._holding(conversation)
        deleted = await self._committer.submit_alone(lambda: self._delete(conversation, holding, now))
        await asyncio.to_thread(self._text.remove)
        self._checkpointer.ask()
        return deleted

    def _delete(self, conversation: str, holding: Holding, now: Moment) -> Deleted:
        self._writer.pragma("secure_delete", "on")
        try:
            return self._conversations.delete(conversation, holding, now)
        finally:
            self._writer.pragma("secure_delete", "off")

    @_reading
    async def _holding(self, conversation: str) -> Holding:
        return await asyncio.to_thread(self._look_for_holding, conversation)

    def _look_for_holding(self, conversation: str) -> Holding:
        connection = self._connect()
        try:
            return Finder(connection).holding(conversation)
        finally:
            connection.close()

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See `Store.prune`."""
        # Rows that a loss of power brings back are pruned again.
        return await self._committer.submit(lambda: self._upkeep.prune(now, limit), lasting=False)

    async def give_back(self, limit: int = 32) -> int:
        """See `Store.give_back`."""
        pages = await self._committer.submit(lambda: give_back(self._writer, limit), lasting=False)
        if not pages and self._gave_back:
            # The database's file is cut when the last of it is copied.
            self._checkpointer.ask()
        self._gave_back = bool(pages)
        return pages

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """See `Store.load`. Other verbs wait until it is done; reads see the empty store meanwhile."""
        loaded = await self._committer.submit_alone(lambda: Load(self._writer, self._ledger, now).load(records))
        await asyncio.to_thread(self._text.remove)
        self._on_work()
        return loaded

    async def set_log_watermark(self, watermark: int) -> None:
        """See `Store.set_log_watermark`."""
        await self._committer.submit(lambda: self._ledger.totals.__setitem__("log_watermark", watermark))

    # -- reads ----------------------------------------------------------------------------------------------------

    @_reading
    async def get(self, request_id: str) -> RequestView | None:
        """See `Store.get`. Requests sent before the query are seen, even if their commits are still under way."""
        view = self._reads.get(request_id)
        if view is None and self._committer.busy:
            with suppress(StoreError):  # then nothing that was sent before is there either
                await self._committer.submit(lambda: None)
            view = self._reads.get(request_id)
        return view

    @_reading
    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See `Store.find`."""
        return self._reads.find(kind, beginning, limit)

    @_reading
    async def history(self, head: int, max_chars: int) -> list[Turn]:
        """See `Store.history`."""
        return self._reads.history(head, max_chars)

    @_reading
    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See `Store.unrouted`."""
        return self._chain_reads.unrouted(limit)

    @_reading
    async def injection(self, injection_id: str) -> InjectionView | None:
        """See `Store.injection`."""
        return self._chain_reads.injection(injection_id)

    @_reading
    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See `Store.injections`."""
        return self._chain_reads.injections(limit, cursor, state)

    @_reading
    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """See `Store.trail`."""
        return self._chain_reads.trail(request_id, limit)

    @_reading
    async def chain(self, name: str) -> ChainView | None:
        """See `Store.chain`."""
        return self._chain_reads.chain(name)

    @_reading
    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """See `Store.chains`."""
        return self._chain_reads.chains(limit, cursor)

    @_reading
    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See `Store.members`."""
        return self._chain_reads.members(chain, limit, cursor)

    @_reading
    async def session(self, conversation: str) -> SessionView | None:
        """See `Store.session`."""
        return self._reads.session(conversation)

    @_reading
    async def sessions(self, limit: int, cursor: str | None = None, agent_id: str | None = None) -> Page[SessionView]:
        """See `Store.sessions`."""
        return self._reads.sessions(limit, cursor, agent_id)

    @_reading
    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See `Store.lock`."""
        return self._reads.lock(conversation, line_limit)

    @_reading
    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """See `Store.locks`."""
        return self._reads.locks(limit, cursor)

    @_reading
    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """See `Store.forks`."""
        return self._reads.forks(limit, cursor, conversation)

    @_reading
    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """See `Store.requests`."""
        return self._reads.requests(listing, limit, cursor)

    @_reading
    async def totals(self) -> Totals:
        """See `Store.totals`."""
        known = Totals.__struct_fields__
        return Totals(**{name: value for name, value in self._ledger.committed_totals.items() if name in known})

    @_reading
    async def waiting_by_route(self) -> Mapping[str, int]:
        """See `Store.waiting_by_route`."""
        return self._reads.waiting_by_route()

    @_reading
    async def next_flows(self, limit: int = 3) -> Sequence[Flow]:
        """See `Store.next_flows`."""
        return self._reads.next_flows(limit)

    @_reading
    async def budget_uses(self, budget: str, since: int) -> Sequence[BudgetUse]:
        """See `Store.budget_uses`."""
        return self._reads.budget_uses(budget, since, dict(self._budgets.figures.known(budget, since)))

    @_reading
    async def budget_waits(self, limit: int = 1_000) -> Sequence[BudgetWait]:
        """See `Store.budget_waits`."""
        return self._reads.budget_waits(limit)

    @_reading
    async def waiting_by_priority(self) -> Mapping[Priority, int] | None:
        """See `Store.waiting_by_priority`. It reads each row, on a connection and thread of its own."""
        return await asyncio.to_thread(self._count_waiting)

    def _count_waiting(self) -> Mapping[Priority, int]:
        connection = self._connect()
        try:
            return Reads(connection, self._rules).waiting_by_priority()
        finally:
            connection.close()

    @_reading
    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See `Store.usage`. On a connection and thread of its own, as `log_after`."""
        return await asyncio.to_thread(self._usage.report, query, pricing)

    @_reading
    async def search(self, terms: Sequence[Phrase], limit: int, cursor: str | None = None) -> SearchPage:
        """See `Store.search`. The index is a file next to the database, and none of its work happens on the loop."""
        return await asyncio.to_thread(self._text.search, terms, limit, cursor)

    @_reading
    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """See `Store.log_after`. On a connection and thread of its own, so that it delays no other call."""
        return await asyncio.to_thread(self._log_reads.log_after, watermark, limit, max_chars)

    def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """See `Store.export`."""
        return save(self._connect, now)

    @_reading
    async def log_watermark(self) -> int:
        """See `Store.log_watermark`."""
        return self._ledger.committed_totals.get("log_watermark", 0)


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
    rewrite_once(connection, path)
    connection.pragma("wal_autocheckpoint", 0)


def _size(aftermath: Aftermath | None) -> int:
    """About how many characters an aftermath writes."""
    if aftermath is None:
        return 0
    kept = len(aftermath.passage)
    return kept + 3 * sum(abs(len(follow_up.text) - kept) for follow_up in aftermath.follow_ups)
