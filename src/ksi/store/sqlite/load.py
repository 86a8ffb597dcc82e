"""Taking a snapshot into an empty SQLite store, in a transaction that the caller holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import apsw

from ksi.clock import Moment
from ksi.errors import StoreNotEmpty
from ksi.request import State
from ksi.store.chains import InjectionState
from ksi.store.passages import Passage
from ksi.store.questions import is_asking, write_question
from ksi.store.snapshot.records import (
    FENCE_LEAP,
    Figures,
    Loaded,
    Record,
    SavedAttempt,
    SavedChain,
    SavedConversation,
    SavedFork,
    SavedInjection,
    SavedLock,
    SavedMember,
    SavedPassage,
    SavedRecord,
    SavedRequest,
    SavedSpare,
    admitted,
    begin,
    contradiction,
    loaded,
    unpack,
)
from ksi.store.sqlite.chain_rows import INJECTION_CODES, limit_values, write_block, write_child, write_reminders
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import BESIDE, HOLDS, IN_LINE, STATE_CODES, Row, attempt_values
from ksi.store.sqlite.statements import load_statements


class Load:
    """A snapshot on its way into the tables."""

    def __init__(self, connection: apsw.Connection, ledger: Ledger, now: Moment) -> None:
        self._sql = load_statements("snapshot.sql")
        self._cursor = connection.cursor()
        self._ledger = ledger
        self._now = now
        self._latest: tuple[str, int] = ("", 0)
        self._interrupted: list[str] = []
        self._last_key = 0
        self._chains: dict[str, int] = {}
        self._carriers: dict[str, SavedRequest] = {}
        self._failed: list[str] = []
        self._passages: set[int] = set()

    def load(self, records: Iterable[Record]) -> Loaded:
        """See `Store.load`."""
        requests, conversations, attempts = self._all("anything")[0]
        if requests or conversations or attempts:
            raise StoreNotEmpty(
                "a checkpoint is only loaded into an empty store: take a new home, or move this one's away first",
                requests=requests,
                conversations=conversations,
            )
        figures, rest = begin(records)
        try:
            for record in rest:
                self._take(record)
        except apsw.ConstraintError as error:
            raise contradiction(f"two of its records cannot be together ({error})") from None
        self._finish(figures)
        return Loaded(interrupted=tuple(self._interrupted), failed=tuple(self._failed))

    def _run(self, name: str, *values: Any) -> None:
        self._cursor.execute(self._sql[name], values)

    def _all(self, name: str, *values: Any) -> list[Row]:
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    def _take(self, record: Record) -> None:
        if isinstance(record, SavedRequest | SavedLock | SavedSpare):
            self._last_key = max(self._last_key, record.key)
        elif isinstance(record, SavedInjection):
            self._last_key = max(self._last_key, record.parent_key)
        match record:
            case SavedPassage():
                self._passages.add(record.id)
                self._run("add_passage", record.id, Passage.of(record.text).data)
            case SavedConversation():
                self._take_conversation(record)
            case SavedFork():
                self._take_fork(record)
            case SavedRequest():
                self._take_request(record)
            case SavedLock():
                self._take_lock(record)
            case SavedSpare():
                self._take_spare(record)
            case SavedChain():
                self._take_chain(record)
            case SavedInjection():
                self._take_injection(record)
            case SavedRecord():
                self._run("load_record", record.name, unpack(record.value))
            case Figures():
                raise contradiction("its figures come twice")

    def _take_spare(self, record: SavedSpare) -> None:
        conversation = self._conversation(record.conversation)
        self._take_attempt(record.saved, record.key, conversation, record.agent_id, None)
        if record.body is not None:
            self._take_body(record, None, None)

    def _conversation(self, name: str) -> int:
        """A conversation's id; its records mostly come together."""
        if self._latest[0] != name or not self._latest[1]:
            rows = self._all("conversation", name)
            if not rows:
                raise contradiction(f"it names conversation {name!r} and does not have it")
            self._latest = (name, rows[0][0])
        return self._latest[1]

    def _take_conversation(self, record: SavedConversation) -> None:
        parent = None if record.forked_from is None else self._conversation(record.forked_from)
        times = (record.created_at, record.active_at)
        identity = self._all("add_conversation", record.name, *times, record.turns, record.head, parent)[0][0]
        for agent in record.agents:
            self._ledger.run("add_agent", agent, identity)
        for alias in record.aliases:
            self._ledger.run("add_alias", alias, identity)
        self._ledger.count("conversations", 1)

    def _take_fork(self, record: SavedFork) -> None:
        child = self._conversation(record.conversation)
        parent = self._conversation(record.parent) if record.kind == "requested" else child
        names = (record.parent, record.child)
        self._ledger.run("add_fork", parent, child, *names, record.request_id, record.at, record.kind)

    def _take_request(self, record: SavedRequest) -> None:
        rules = self._ledger.rules
        record = admitted(
            record, self._now, fail_interrupted=rules.fail_interrupted, max_interruptions=rules.max_interruptions
        )
        if record.interrupted:
            (self._failed if record.state.final else self._interrupted).append(record.request_id)
        if record.state is State.RUNNING:
            raise contradiction(f"request {record.request_id!r} is running")
        conversation = self._conversation(record.conversation)
        earlier: int | None = None
        for saved in record.attempts:
            self._take_attempt(saved, record.key, conversation, record.agent_id, earlier)
            earlier = saved.id
        ready = record.holds and record.state is State.QUEUED
        self._run(
            "add_member", 0, record.key, record.request_id, conversation, STATE_CODES[record.state], _place(record),
            ready, int(record.priority), record.rank, record.route, record.hold_on_retry, record.enqueued_at,
            record.due, record.expires, record.begun, record.interruptions, record.interrupted_by, record.fence or None,
            record.since, None, None, record.provider, record.started_at, record.finished_at, record.error,
            record.message, earlier, write_question(record.question), is_asking(record.state, record.question),
        )  # fmt: skip
        self._take_body(record, record.model, record.requeued_from)
        if record.member is not None:
            self._take_member(record, record.member)
        if record.finished_at is not None:
            self._run("was_active", conversation, record.finished_at)
        else:
            self._ledger.count(record.state.value, 1)
            self._ledger.count("locks", record.holds)

    def _take_attempt(
        self, saved: SavedAttempt, key: int, conversation: int, agent: str | None, earlier: int | None
    ) -> None:
        values = attempt_values(saved.whole)
        self._ledger.run("add_attempt", saved.id, key, earlier, saved.previous, conversation, agent, *values)

    def _take_lock(self, record: SavedLock) -> None:
        """A holder gets a full expiry; a waiter without a timeout was tied to a connection that is gone."""
        conversation = self._conversation(record.conversation)
        if not record.holds and record.patience is None:
            self._run("was_active", conversation, self._now.wall)
            return
        end = self._now.after_us(self._ledger.rules.lock_expiry)
        deadline = end.mono if record.holds else self._now.mono + (record.patience or 0)
        state, place = (State.RUNNING, HOLDS) if record.holds else (State.QUEUED, IN_LINE)
        self._run(
            "add_member", 1, record.key, record.request_id, conversation, STATE_CODES[state], place, 0,
            int(record.priority), record.rank, "", 1, record.enqueued_at, end.wall if record.holds else None, None, 0,
            0, None, record.fence or None, record.since, deadline, record.patience, None, None, None, None, None, None,
            None, 0,
        )  # fmt: skip
        metadata = b"" if record.metadata is None else unpack(record.metadata)
        self._run("add_body", record.key, None, None, None, metadata, None, None, None, None)
        self._ledger.count("external_locks" if record.holds else "external_waiters", 1)
        self._ledger.count("locks", record.holds)

    def _take_body(self, record: SavedRequest | SavedSpare, model: str | None, requeued_from: str | None) -> None:
        self._run(
            "add_body", record.key, model, record.agent_id, requeued_from, unpack(record.body or ""),
            write_reminders(record.reminders), self._passage(record.passage), record.place, record.reminded_place,
        )  # fmt: skip

    def _passage(self, identity: int | None) -> int | None:
        if identity is not None and identity not in self._passages:
            raise contradiction(f"it names passage {identity} and does not have it")
        return identity

    def _take_chain(self, record: SavedChain) -> None:
        self._chains[record.name] = self._all(
            "load_chain", record.name, record.created_at, record.started_at, *limit_values(record.limits), record.used,
            record.estimated, record.closed, write_block(record.tripped), record.guard_messages, record.resets,
            record.reset_key, record.deepest,
        )[0][0]  # fmt: skip

    def _take_member(self, record: SavedRequest, member: SavedMember) -> None:
        chain = self._chains.get(member.chain)
        if chain is None:
            raise contradiction(f"it names chain {member.chain!r} and does not have it")
        if member.carries:
            self._carriers[record.request_id] = record
        self._run(
            "load_member", record.key, chain, member.parent, member.parent_key, member.depth,
            *limit_values(member.limits), member.estimate, member.output_cap, member.guard,
            int(member.routing(record.state)), member.carries, member.mark, member.result, write_block(member.block),
            member.tokens, member.estimated,
        )  # fmt: skip
        self._ledger.run("join_chain", record.key, chain)
        depth = 0 if member.guard else member.depth
        self._ledger.run("grow_chain", chain, not member.guard, not record.state.final, depth, 0)

    def _take_injection(self, record: SavedInjection) -> None:
        record = loaded(record, self._carriers.get(record.injection_id))
        waits = record.state == InjectionState.QUEUED and not record.direct
        conversation = self._conversation(record.target) if waits else None
        if conversation is not None:
            self._ledger.run("more_reminders_wait", conversation, 1)
        self._ledger.one(
            "add_injection", record.injection_id, record.chain, record.parent, record.parent_key, record.target,
            record.direct, record.trigger, INJECTION_CODES[record.state], record.created_at, record.finished_at,
            conversation, record.request_id, write_block(record.reason), record.text, write_child(record.child),
            self._passage(record.passage), record.place, record.child_place,
        )  # fmt: skip

    def _finish(self, figures: Figures) -> None:
        """All records are in: set the figures, and let the lines come forward."""
        ledger = self._ledger
        for state, count in figures.ended.items():
            ledger.totals[state] = ledger.totals.get(state, 0) + count
        ledger.count(State.FAILED.value, len(self._failed))
        ledger.totals["fence"] = max(ledger.totals.get("fence", 0), figures.fence) + FENCE_LEAP
        ledger.totals["log_watermark"] = figures.logged
        for route in figures.routes:
            ledger.know_route(route)
        ledger.number_anew(behind=self._last_key)
        self._run("drop_spare_passages")
        for (conversation,) in self._all("lines"):
            ledger.refresh_line(conversation, self._now)


def _place(record: SavedRequest) -> int | None:
    if record.state.final:
        return None
    if record.holds:
        return HOLDS
    return IN_LINE if record.state is State.QUEUED else BESIDE
