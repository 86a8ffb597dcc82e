"""The store's reads in SQL, over whichever connection they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import apsw
import msgspec

from ksi.budgets.account import Place
from ksi.budgets.rules import UNUSED, Use
from ksi.request import Attempt, Priority, Turn, answer_chars
from ksi.store.questions import read_question
from ksi.store.rules.fairness import Flow, next_flows
from ksi.store.sqlite.chain_rows import read_block, read_reminders
from ksi.store.sqlite.rows import (
    HOLDS,
    IN_LINE,
    STATES,
    Row,
    read_attempt,
    read_content,
    read_cursor,
    read_fork,
    read_lock,
    read_request_row,
    read_session,
    read_use,
    write_cursor,
)
from ksi.store.sqlite.statements import load_statements
from ksi.store.values import (
    BudgetUse,
    BudgetWait,
    Fork,
    LineEntry,
    Listing,
    LockView,
    LoggedTurn,
    Named,
    Page,
    RequestRow,
    RequestView,
    SessionView,
    StoreRules,
)

_LAST = 2**63 - 1
_FIRST = -(2**63)

# The beginning of each listing: the values after which its three keys start, in the order of its statement's ?1, ?2,
# ?3.
_STARTS: Mapping[Listing, tuple[int | str, int | str, int]] = {
    Listing.ACTIVE: (0, 0, 0),
    Listing.READY: (_FIRST, "", 0),
    Listing.WAITING: (_FIRST, 0, 0),
    Listing.DELAYED: (_FIRST, 0, 0),
    Listing.ASKING: (0, 0, 0),
    Listing.FAILED: (_LAST, 0, _LAST),
    Listing.FINISHED: (_LAST, 0, _LAST),
}


_NAMED = {"request": "requests_named", "conversation": "conversations_named"}
"""The statement that finds names of a kind by their beginning."""


class Reads:
    """Answers from the tables; changes nothing."""

    def __init__(self, connection: apsw.Connection, rules: StoreRules) -> None:
        self._sql = load_statements("statements.sql", "chains.sql", "budgets.sql")
        self._connection = connection
        self._cursor = connection.cursor()
        self._rules = rules

    def _one(self, name: str, *values: Any) -> Row | None:
        # Fetch all rows: an unfinished statement pins its snapshot and blocks the reset of the log.
        rows = self._cursor.execute(self._sql[name], values).fetchall()
        return rows[0] if rows else None

    def _all(self, name: str, *values: Any) -> list[Row]:
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    def budget_uses(self, budget: str, since: int, newer: Mapping[Place, Use]) -> list[BudgetUse]:
        """See `Store.budget_uses`. `newer` are figures that are not in their rows yet."""
        rows = self._all("budget_uses", budget, since)
        found = {(budget, row[0], row[1]): read_use(row[2:]) for row in rows}
        found.update(newer)
        return [BudgetUse(subject=at[1], start=at[2], use=use) for at, use in sorted(found.items()) if use != UNUSED]

    def budget_waits(self, limit: int) -> list[BudgetWait]:
        """See `Store.budget_waits`."""
        rows = self._all("waiting_for_budgets", limit)
        return [BudgetWait(budget=name, requests=requests, until=until) for name, requests, until in rows]

    def next_flows(self, limit: int) -> list[Flow]:
        """See `Store.next_flows`."""
        found = [
            row
            for (route,) in self._all("routes")
            for priority in range(len(Priority))
            for row in self._all("next_flows", route, priority, 10 * limit)
        ]
        return next_flows([(p, tag, rank, flow or "", name) for p, tag, rank, flow, name in found], limit)

    def get(self, request_id: str) -> RequestView | None:
        """See `Store.get`."""
        row = self._one("view", request_id)
        if row is None:
            return None
        (
            key, request_id, conversation, name, state, priority, route, enqueued_at, due, expires, started_at,
            finished_at, provider, error, message, interruptions, interrupted_by, cancelling, last_attempt, place, rank,
            model, agent, requeued_from, data, chain, question, budget,
        ) = row  # fmt: skip
        in_chain = None if chain is None else self._one("chain_view", key)
        chain_name, parent, depth, carries, block = (None,) * 5 if in_chain is None else in_chain
        position, holder = None, None
        if place == IN_LINE:
            position = self._count("line_before", conversation, rank, key, self._rules.position_limit)
        if place != HOLDS and not STATES[state].final:
            held = self._one("holder", conversation)
            holder = held[1] if held is not None else None
        return RequestView(
            request_id=request_id,
            conversation=name,
            state=STATES[state],
            priority=Priority(priority),
            model=model or "",
            route=route,
            body=data,
            agent_id=agent,
            enqueued_at=enqueued_at,
            due=due,
            expires=expires,
            started_at=started_at,
            finished_at=finished_at,
            attempts=self.attempts(last_attempt),
            provider=provider,
            error=error,
            message=message,
            interruptions=interruptions,
            interrupted_by=interrupted_by,
            cancelling=bool(cancelling),
            requeued_from=requeued_from,
            position=position,
            holder=holder,
            chain=chain_name,
            parent=parent,
            depth=depth,
            block=read_block(block),
            injection=request_id if carries else None,
            budget=budget,
            question=read_question(question),
        )

    def attempts(self, last: int | None) -> tuple[Attempt, ...]:
        """A request's ended attempts, in order; `last` is the last one's id."""
        attempts: list[Attempt] = []
        while last is not None:
            row = self._one("attempt", last)
            if row is None:
                break
            attempts.append(read_attempt(row[1:]))
            last = row[0]
        return tuple(reversed(attempts))

    def _count(self, name: str, *values: Any) -> int:
        row = self._one(name, *values)
        return 0 if row is None else int(row[0])

    def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See `Store.find`."""
        # Names are compared by their bytes, which no character's begin with 0xF8.
        end = beginning.encode() + b"\xf8"
        rows = self._cursor.execute(self._sql[_NAMED[kind]], (beginning, end, limit)).fetchall()
        return tuple(str(name) for (name,) in rows)

    def history(self, head: int, max_chars: int) -> list[Turn]:
        """See `Store.history`."""
        turns: list[Turn] = []
        following: int | None = head
        size = 0
        while following is not None:
            row = self._one("turn", following)
            if row is None:
                break
            *told, reminders, content = row
            turn = msgspec.structs.replace(
                Turn(*told), reminders=read_reminders(reminders), content=read_content(content)
            )
            following = turn.previous
            size += turn.chars
            if turns and size > max_chars:
                break
            turns.append(turn)
        return turns

    def session(self, conversation: str) -> SessionView | None:
        """See `Store.session`."""
        row = self._one("session", conversation)
        return None if row is None else self._session(row)

    def _session(self, row: Row) -> SessionView:
        return read_session(row[1:], tuple(agent for (agent,) in self._all("agents", row[0])))

    def sessions(self, limit: int, cursor: str | None, agent_id: str | None) -> Page[SessionView]:
        """See `Store.sessions`."""
        (before,) = read_cursor("sessions", cursor, (_LAST,))
        if agent_id is None:
            rows = self._all("sessions", before, limit + 1)
        else:
            rows = self._all("sessions_of_agent", before, limit + 1, agent_id)
        shown, more = rows[:limit], len(rows) > limit
        items = tuple(self._session(row) for row in shown)
        return Page(items, write_cursor("sessions", shown[-1][0]) if more else None)

    def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See `Store.lock`."""
        row = self._one("lock", conversation)
        if row is None:
            return None
        line = tuple(
            LineEntry(request_id=name, priority=Priority(priority), external=bool(external), enqueued_at=at)
            for name, priority, external, at in self._all("line", row[0], line_limit)
        )
        return read_lock(row[1], row[2:], self._line_length(row[0]), line)

    def _line_length(self, conversation: int) -> int:
        return self._count("line_length", conversation, self._rules.position_limit)

    def locks(self, limit: int, cursor: str | None) -> Page[LockView]:
        """See `Store.locks`."""
        (after,) = read_cursor("locks", cursor, (0,))
        rows = self._all("locks", after, limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        items = tuple(read_lock(row[1], row[2:], self._line_length(row[0])) for row in shown)
        return Page(items, write_cursor("locks", shown[-1][0]) if more else None)

    def forks(self, limit: int, cursor: str | None, conversation: str | None) -> Page[Fork]:
        """See `Store.forks`."""
        (after,) = read_cursor("forks", cursor, (0,))
        if conversation is None:
            rows = self._all("forks", after, limit + 1)
        else:
            rows = self._all("fork_tree", after, limit + 1, conversation)
        shown, more = rows[:limit], len(rows) > limit
        return Page(tuple(read_fork(row[1:]) for row in shown), write_cursor("forks", shown[-1][0]) if more else None)

    def requests(self, listing: Listing, limit: int, cursor: str | None) -> Page[RequestRow]:
        """See `Store.requests`."""
        first, second, key = read_cursor(listing, cursor, _STARTS[listing])
        rows = self._all(f"rows_{listing.value}", first, second, key, limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        # The last column is the request's key; the listing is ordered by the first two.
        end = write_cursor(listing, shown[-1][0], shown[-1][1], shown[-1][-1]) if more else None
        return Page(tuple(read_request_row(row[2:]) for row in shown), end)

    def waiting_by_route(self) -> Mapping[str, int]:
        """See `Store.waiting_by_route`."""
        routes = [route for (route,) in self._all("routes")]
        return {route: self._count("ready_count", route, self._rules.position_limit) for route in routes}

    def waiting_by_priority(self) -> Mapping[Priority, int]:
        """See `Store.waiting_by_priority`."""
        return {Priority(priority): count for priority, count in self._all("waiting_by_priority")}

    def log_after(self, watermark: int, limit: int, max_chars: int) -> list[LoggedTurn]:
        """See `Store.log_after`."""
        turns: list[LoggedTurn] = []
        # A cursor of its own, closed at the end: a half-read one keeps the log from restarting.
        cursor = self._connection.cursor()
        try:
            for row in cursor.execute(self._sql["logged"], (watermark, limit)):
                identity, request_id, conversation, agent, *values = row
                attempt = read_attempt(tuple(values))
                turns.append(
                    LoggedTurn(
                        id=identity, request_id=request_id, conversation=conversation, agent_id=agent, attempt=attempt
                    )
                )
                max_chars -= answer_chars(attempt)
                if max_chars <= 0:
                    break
        finally:
            cursor.close()
        return turns
