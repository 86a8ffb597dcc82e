"""Saving the contents of an SQLite store: one moment of it, read on a connection and thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import apsw

from ksi.clock import Moment
from ksi.request import Priority, State
from ksi.store.passages import Passage
from ksi.store.questions import read_question
from ksi.store.snapshot.records import (
    Figures,
    Record,
    SavedAttempt,
    SavedConversation,
    SavedFork,
    SavedLock,
    SavedPassage,
    SavedRecord,
    SavedRequest,
    SavedSpare,
    pack,
    stopped,
)
from ksi.store.sqlite.chain_rows import read_reminders, read_saved_chain, read_saved_injection, read_saved_member
from ksi.store.sqlite.commit import as_ksi_error
from ksi.store.sqlite.rows import HOLDS, STATES, Row, read_attempt
from ksi.store.sqlite.statements import load_statements

PIECE = 100
"""Records that are read at a time: so short that the loop gets its turns in between."""

_CACHE_KIB = 8 * 1024


async def save(connect: Callable[[], apsw.Connection], now: Moment) -> AsyncGenerator[list[Record], None]:
    """See `Store.export`. The write-ahead log cannot restart before all is read."""
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="ksi-save")
    reading = _Reading(connect, now)
    try:
        while piece := await loop.run_in_executor(thread, reading.piece):
            yield piece
    except apsw.Error as error:
        raise as_ksi_error(error) from None
    finally:
        # In its own thread, behind a read that may still be under way.
        thread.submit(reading.close)
        thread.shutdown(wait=False)


class _Reading:
    """One snapshot being read, piece by piece."""

    def __init__(self, connect: Callable[[], apsw.Connection], now: Moment) -> None:
        self._connect = connect
        self._now = now
        self._sql = load_statements("snapshot.sql")
        self._connection: apsw.Connection | None = None
        self._records: Iterator[Record] = iter(())

    def piece(self) -> list[Record]:
        """The next records; none at the end."""
        if self._connection is None:
            self._connection = self._connect()
            self._connection.pragma("cache_size", -_CACHE_KIB)
            self._connection.execute("BEGIN")
            self._records = self._read(self._connection)
        return list(islice(self._records, PIECE))

    def close(self) -> None:
        """Let the moment go."""
        if self._connection is not None:
            self._connection.close(force=True)

    def _read(self, connection: apsw.Connection) -> Iterator[Record]:
        self._one = connection.cursor()
        yield self._figures()
        for identity, data in connection.cursor().execute(self._sql["passages"]):
            yield SavedPassage(id=identity, text=Passage.kept(data).text)
        # Each list has a cursor of its own: others are asked while it is read.
        for row in connection.cursor().execute(self._sql["conversations"]):
            yield self._conversation(row)
        for conversation, parent, child, request_id, at, kind in connection.cursor().execute(self._sql["forks"]):
            yield SavedFork(
                conversation=conversation, parent=parent, child=child, request_id=request_id, at=at, kind=kind
            )
        for row in connection.cursor().execute(self._sql["saved_chains"]):
            yield read_saved_chain(row)
        self._coming = int(self._all("last_attempt")[0][0])
        for row in connection.cursor().execute(self._sql["members"]):
            yield self._lock(row) if row[0] else self._request(row)
        for row in connection.cursor().execute(self._sql["spare"]):
            key, conversation, agent, body, reminders, passage, place, told, identity, previous, *attempt = row
            yield SavedSpare(
                key=key,
                conversation=conversation,
                agent_id=agent,
                body=None if body is None else pack(body),
                saved=SavedAttempt.of(identity, read_attempt(tuple(attempt)), previous),
                reminders=read_reminders(reminders),
                passage=passage,
                place=place,
                reminded_place=told,
            )
        for row in connection.cursor().execute(self._sql["saved_injections"]):
            yield read_saved_injection(row)
        for name, value in connection.cursor().execute(self._sql["saved_records"]):
            yield SavedRecord(name=name, value=pack(value))

    def _all(self, name: str, *values: Any) -> list[Row]:
        rows: list[Row] = self._one.execute(self._sql[name], values).fetchall()
        return rows

    def _figures(self) -> Figures:
        totals: dict[str, int] = dict(self._all("figures"))
        ended = {state.value: totals.get(state.value, 0) for state in State if state.final}
        ended[State.CANCELLED.value] += self._all("cancelling")[0][0]
        return Figures(
            ended=ended,
            fence=totals.get("fence", 0),
            logged=totals.get("log_watermark", 0),
            routes=tuple(name for (name,) in self._all("routes")),
        )

    def _conversation(self, row: Row) -> SavedConversation:
        identity, name, created_at, active_at, turns, head, forked_from = row
        return SavedConversation(
            name=name,
            created_at=created_at,
            active_at=active_at,
            turns=turns,
            head=head,
            forked_from=forked_from,
            agents=tuple(agent for (agent,) in self._all("agents", identity)),
            aliases=tuple(alias for (alias,) in self._all("aliases", identity)),
        )

    def _request(self, row: Row) -> SavedRequest:
        (
            _, key, request_id, conversation, state, place, priority, rank, route, hold, enqueued_at, due, expires,
            begun, interruptions, interrupted_by, fence, since, _, provider, started_at, finished_at, error, message,
            cancelling, last_attempt, chain, reminders, model, agent, requeued_from, body,
            passage, cut_out, reminded_place, question,
        ) = row  # fmt: skip
        saved = SavedRequest(
            key=key,
            request_id=request_id,
            conversation=conversation,
            state=STATES[state],
            holds=place == HOLDS,
            priority=Priority(priority),
            rank=rank,
            route=route,
            model=model or "",
            agent_id=agent,
            hold_on_retry=bool(hold),
            requeued_from=requeued_from,
            enqueued_at=enqueued_at,
            due=due,
            expires=expires,
            begun=begun,
            interruptions=interruptions,
            interrupted_by=interrupted_by,
            fence=fence or 0,
            since=since if place == HOLDS else None,
            provider=provider,
            started_at=started_at,
            finished_at=finished_at,
            error=error,
            message=message,
            question=read_question(question),
            body=pack(body),
            attempts=self._attempts(last_attempt),
            member=None if chain is None else read_saved_member(self._all("saved_member", key)[0]),
            reminders=read_reminders(reminders),
            passage=passage,
            place=cut_out,
            reminded_place=reminded_place,
        )
        if saved.state is not State.RUNNING:
            return saved
        self._coming += 1
        return stopped(saved, self._coming, self._now, cancelling=bool(cancelling))

    def _attempts(self, last: int | None) -> tuple[SavedAttempt, ...]:
        attempts: list[SavedAttempt] = []
        while last is not None:
            rows = self._all("attempt", last)
            if not rows:
                break
            last, identity, previous, *attempt = rows[0]
            attempts.append(SavedAttempt.of(identity, read_attempt(tuple(attempt)), previous))
        return tuple(reversed(attempts))

    def _lock(self, row: Row) -> SavedLock:
        (
            _, key, request_id, conversation, _, place, priority, rank, _, _, enqueued_at, _, _, _, _, _, fence, since,
            term, *_, metadata, _, _, _, _,
        ) = row  # fmt: skip
        return SavedLock(
            key=key,
            request_id=request_id,
            conversation=conversation,
            holds=place == HOLDS,
            priority=Priority(priority),
            rank=rank,
            enqueued_at=enqueued_at,
            fence=fence or 0,
            since=since if place == HOLDS else None,
            patience=term,
            metadata=pack(metadata) if metadata else None,
        )
