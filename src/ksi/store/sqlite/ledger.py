"""The basis of all SQL verbs: statements, kept figures, and the moves of holders and wait queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw
import msgspec

from ksi.clock import Chance, Moment
from ksi.errors import InternalError
from ksi.request import Attempt, Priority, State, may_become
from ksi.store.questions import Question, write_question
from ksi.store.rules import refusals
from ksi.store.rules.fairness import Turns
from ksi.store.sqlite.in_play import InPlay
from ksi.store.sqlite.rows import HOLDS, IN_LINE, STATE_CODES, STATES, Row, attempt_values
from ksi.store.sqlite.statements import load_statements
from ksi.store.values import Finish, LockGrant, Passing, StoreRules

KNOWN_AGENTS = 10_000
"""Conversations of which is known who came last."""


class Holder(msgspec.Struct, frozen=True):
    """The holder of a conversation."""

    key: int
    request_id: str
    state: State
    external: bool
    priority: Priority
    since: int
    chain: int | None


class Ledger:
    """One connection's rows and figures. Its caller holds the transaction."""

    def __init__(self, connection: apsw.Connection, rules: StoreRules, chance: Chance) -> None:
        self.rules = rules
        self.totals: dict[str, int] = {}
        self._chance = chance
        self._sql = load_statements("statements.sql", "chains.sql", "conversations.sql", "budgets.sql")
        self._cursor = connection.cursor()
        self._written: dict[str, int] = {str(n): int(v) for n, v in self.all("totals")}
        self.in_play = InPlay()
        self.turns = Turns(rules.weights)
        self._loads: dict[str, int] = {}
        """How many requests run at each provider that was asked about."""
        self._routes: set[str] = set()
        self._agents: dict[int, str] = {}
        """The last agent of a conversation."""
        self._next_key = 0
        self._next_attempt = 0
        self.at_begin: list[Callable[[], None]] = []
        """Called when a transaction has begun."""
        self.at_write: list[Callable[[], None]] = []
        """Called before each commit: parts that gather their changes write them."""
        self.at_roll_back: list[Callable[[], None]] = []
        self.must_last = False
        """True if the transaction has a change that is reported to a client, whatever was assumed before."""
        self.rolled_back()

    # -- rows -----------------------------------------------------------------------------------------------------

    def run(self, name: str, *values: Any) -> None:
        """Execute a statement that gives no rows."""
        self.in_play.changed(name, values)
        self._cursor.execute(self._sql[name], values)

    def one(self, name: str, *values: Any) -> Row | None:
        """The first row, or None."""
        # Fetch all rows: an unfinished statement pins its snapshot and blocks the reset of the log.
        rows = self._cursor.execute(self._sql[name], values).fetchall()
        return rows[0] if rows else None

    def all(self, name: str, *values: Any) -> list[Row]:
        """All rows."""
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    def scalar(self, name: str, *values: Any) -> Any:
        """The first row's first column, or None."""
        row = self.one(name, *values)
        return None if row is None else row[0]

    # -- transactions ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A transaction begins."""
        self.must_last = False
        for begin in self.at_begin:
            begin()

    def touch(self) -> None:
        """Write something that changes nothing for anybody."""
        self.run("touch")

    def write_totals(self) -> None:
        """Write the changed figures in the same transaction as the counted rows."""
        for write in self.at_write:
            write()
        self.totals["last_key"] = self._next_key - 1
        changed = {name: value for name, value in self.totals.items() if self._written.get(name) != value}
        if changed:
            self.run("set_totals", msgspec.json.encode(changed).decode())

    def committed(self) -> None:
        """The transaction is in the database."""
        self._written = dict(self.totals)

    def rolled_back(self) -> None:
        """The transaction never was."""
        self.totals = dict(self._written)
        for forget in self.at_roll_back:
            forget()
        # Drop the caches first, in case the reads below fail.
        self._routes = set()
        self._agents.clear()
        self.number_anew()
        self._routes = {name for (name,) in self.all("routes")}

    def number_anew(self, behind: int = 0) -> None:
        """Continue above the highest numbers ever given; keys above `behind` too."""
        self.in_play.forget_all()
        self._loads = {}
        self._next_key = 1 + max(self.scalar("last_key"), behind)
        self._next_attempt = 1 + self.scalar("last_attempt")

    @property
    def committed_totals(self) -> dict[str, int]:
        """The figures as the last commit left them."""
        return self._written

    # -- figures --------------------------------------------------------------------------------------------------

    def count(self, name: str, change: int) -> None:
        """Change a kept figure."""
        self.totals[name] = self.totals.get(name, 0) + change

    def move(self, before: State, after: State) -> None:
        """Count a request from one state to another; the state table must have the step."""
        if not may_become(before, after):
            raise InternalError(f"no request goes from {before} to {after}")
        # `_value_`: the same as `.value`, without a call for each.
        self.count(before._value_, -1)
        self.count(after._value_, 1)

    @property
    def coming_key(self) -> int:
        """The key that the next request will get."""
        return self._next_key

    def next_key(self) -> int:
        """A new request's key."""
        key = self._next_key
        self._next_key += 1
        return key

    @property
    def coming_fence(self) -> int:
        """The fence that the next holder will get."""
        return self.totals.get("fence", 0) + 1

    def next_fence(self) -> int:
        """A new holder's fence."""
        self.count("fence", 1)
        return self.totals["fence"]

    def token(self) -> int:
        """A new holder's token."""
        return self._chance.token()

    def running_at(self, provider: str) -> int:
        """How many requests run at a provider, counted from the rows once."""
        if provider not in self._loads:
            self._loads[provider] = self.scalar("provider_load", provider) if self.totals.get("running") else 0
        return self._loads[provider]

    def load(self, provider: str, change: int) -> None:
        """A run began or ended; its row is written."""
        if provider in self._loads:
            self._loads[provider] += change

    @property
    def _any_waits(self) -> bool:
        """True if any wait queue has a waiter."""
        return bool(self.totals.get("queued") or self.totals.get("external_waiters"))

    # -- holders and lines ----------------------------------------------------------------------------------------

    def named(self, request_id: str) -> Row:
        """A request's or lock's row by its id.

        Raises:
            NotFound: no such id.
        """
        row = self.one("named", request_id)
        if row is None:
            raise refusals.unknown_request(request_id)
        return row

    def conversation_name(self, conversation: int) -> str:
        """A conversation's name."""
        return str(self.scalar("conversation_name", conversation))

    def holder(self, conversation: int) -> Holder | None:
        """The holder of a conversation."""
        row = self.one("holder", conversation)
        if row is None:
            return None
        key, request_id, state, external, priority, since, chain = row
        return Holder(key, request_id, STATES[state], bool(external), Priority(priority), since, chain)

    def know_route(self, route: str) -> None:
        """Write a route's name when it comes for the first time."""
        if route not in self._routes:
            self._routes.add(route)
            self.run("add_route", route)

    def know_agent(self, agent: str, conversation: int) -> None:
        """Write that an agent came to a conversation, unless it was the last one that came."""
        if self._agents.get(conversation) != agent:
            if len(self._agents) >= KNOWN_AGENTS:
                self._agents.clear()
            self._agents[conversation] = agent
            self.run("add_agent", agent, conversation)

    def forget_conversation(self, conversation: int) -> None:
        """A conversation is gone, its agents with it."""
        self._agents.pop(conversation, None)

    def add_conversation(self, name: str, now: Moment, head: int | None, forked_from: int | None) -> int:
        """Write a new conversation; returns its id."""
        self.count("conversations", 1)
        return int(self.scalar("add_conversation", name, now.wall, head, forked_from))

    def take_turn(self, key: int, priority: int, flow: str, *, waits: bool) -> None:
        """Note whom a new request counts for, and give it its place among the others if it waits for a slot."""
        self.run("take_turn", key, self.turns.tag(priority, flow) if waits else 0, flow)

    def position(self, conversation: int, rank: int, key: int) -> int:
        """How many in the line stand before (rank, key), counted up to the rules' limit."""
        return int(self.scalar("line_before", conversation, rank, key, self.rules.position_limit))

    def refresh_line(self, conversation: int, now: Moment) -> LockGrant | None:
        """Let the queue's head come forward if the conversation is free.

        A request becomes ready, and the one that was ready before it no longer is; an external waiter is granted the
        lock.
        """
        heads = self.all("line_heads", conversation)
        if not heads or self.one("holder", conversation) is not None:
            return None
        return self._come_forward(conversation, self.conversation_name(conversation), heads, now)

    def _come_forward(self, conversation: int, name: str, heads: list[Row], now: Moment) -> LockGrant | None:
        if len(heads) > 1 and heads[1][3]:
            self.run("set_ready", heads[1][0], 0)
        key, request_id, external, ready, _ = heads[0]
        if not external:
            if not ready:
                self.run("set_ready", key, 1)
            return None
        fence = self.next_fence()
        end = now.after_us(self.rules.lock_expiry)
        self.run("grant", key, fence, now.wall, end.mono, end.wall)
        self.count("external_waiters", -1)
        self.count("external_locks", 1)
        self.count("locks", 1)
        return LockGrant(request_id=request_id, conversation=name, fence=fence, expires_at=end.wall)

    def renew_grant(self, key: int, now: Moment) -> int:
        """Reset an external lock's expiry; returns its end in wall time."""
        end = now.after_us(self.rules.lock_expiry)
        self.run("renew_grant", key, end.mono, end.wall)
        return end.wall

    def release(self, conversation: int, name: str, by: str, now: Moment) -> Passing:
        """The holder's row holds no more: count its lock off and let the next one come."""
        self.count("locks", -1)
        heads = self.all("line_heads", conversation) if self._any_waits else []
        granted = self._come_forward(conversation, name, heads, now) if heads else None
        following = heads[0][1] if heads else None
        return Passing(conversation=name, released_by=by, next_request=following, granted=granted)

    # -- ends -----------------------------------------------------------------------------------------------------

    def add_attempt(
        self,
        key: int,
        conversation: int,
        agent: str | None,
        attempt: Attempt,
        earlier: int | None,
        previous: int | None,
    ) -> int:
        """Write an ended attempt; returns its id."""
        identity = self._next_attempt
        self._next_attempt += 1
        self.run("add_attempt", identity, key, earlier, previous, conversation, agent, *attempt_values(attempt))
        return identity

    def finish(
        self,
        key: int,
        before: State,
        verdict: Finish,
        now: Moment,
        last_attempt: int | None = None,
        provider: str | None = None,
    ) -> None:
        """Write a request's end."""
        self.move(before, verdict.state)
        self.run(
            "finish", key, STATE_CODES[verdict.state], now.wall, verdict.error, verdict.message, last_attempt, provider
        )
        if self.totals.get("demands") and self.one("drop_demand", key) is not None:
            self.count("demands", -1)

    def ask(self, key: int, question: Question) -> None:
        """Let a waiting request ask a person."""
        self.run("ask", key, write_question(question), question.text)

    def end_waiting(
        self,
        key: int,
        request_id: str,
        conversation: int,
        before: State,
        place: int | None,
        verdict: Finish,
        now: Moment,
    ) -> Passing | None:
        """End a request that does not run, and close the gap in the queue; reports if a lock moved."""
        self.finish(key, before, verdict, now)
        self.run("touch_conversation", conversation, now.wall)
        if place == HOLDS:
            return self.release(conversation, self.conversation_name(conversation), request_id, now)
        if place == IN_LINE:
            return self.leave_line(conversation, request_id, now)
        return None

    def drop_external(self, key: int, request_id: str, conversation: int, place: int, now: Moment) -> Passing | None:
        """Remove an external holder or waiter; reports if a lock moved."""
        self.run("drop_request", key)
        self.run("drop_body", key)
        self.run("touch_conversation", conversation, now.wall)
        if place == HOLDS:
            self.count("external_locks", -1)
            return self.release(conversation, self.conversation_name(conversation), request_id, now)
        self.count("external_waiters", -1)
        return self.leave_line(conversation, request_id, now)

    def leave_line(self, conversation: int, request_id: str, now: Moment) -> Passing | None:
        """A waiter left the queue: the next may come forward."""
        granted = self.refresh_line(conversation, now)
        if granted is None:
            return None
        return Passing(
            conversation=granted.conversation,
            released_by=request_id,
            next_request=granted.request_id,
            granted=granted,
        )
