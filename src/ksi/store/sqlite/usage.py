"""The report on usage in SQL: on a connection and in a thread of its own, in steps that keep no snapshot for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import apsw

from ksi.errors import StoreUnavailable
from ksi.store.sqlite.rows import Row
from ksi.store.sqlite.statements import load_statements
from ksi.store.usage import (
    PRICE_SLICE,
    FirstTurns,
    McpUse,
    Pricing,
    UsageBy,
    UsageGroups,
    UsageQuery,
    UsageReport,
    UsageRow,
    UsageSums,
)

STEP = 20_000
"""Attempts that are read in one statement, so that the database's log can restart in between."""

SLACK = 3_600 * 1_000_000
"""Ids grow with the commits, times of ending nearly so: a settle can be late, a clock can be set. The walk back in time
ends at a whole step of attempts that ended so long before the window, in microseconds."""

_CACHE_KIB = 16 * 1024
_UNLIMITED = 2**62
_MILLION = 1e6

_TOLD_APART_BY = {
    UsageBy.AGENT: "p.agent",
    UsageBy.MODEL: "p.model",
    UsageBy.PROVIDER: "p.provider",
    UsageBy.SESSION: "p.conversation",
}
_CALLED = _TOLD_APART_BY | {UsageBy.SESSION: "(SELECT c.name FROM conversation c WHERE c.id = p.conversation)"}


class UsageReader:
    """Makes one report at a time; further callers wait, in a thread too."""

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._sql = load_statements("usage.sql")
        self._busy = threading.Lock()
        self._connection: apsw.Connection | None = None
        self._closed = False

    def close(self) -> None:
        """Break off a report that is being made, and let the connection go."""
        self._closed = True
        if self._connection is not None:
            self._connection.interrupt()
        with self._busy:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def report(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See `Store.usage`.

        Raises:
            StoreUnavailable: the store was closed meanwhile.
        """
        with self._busy:
            self._check_open()
            if self._connection is None:
                self._connection = self._connect()
                # The summed attempts need not fit in memory.
                self._connection.pragma("temp_store", "file")
                self._connection.pragma("cache_size", -_CACHE_KIB)
            return _Report(self._connection, self._sql, self._check_open).make(query, pricing)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")


class _Report:
    """One report being made."""

    def __init__(self, connection: apsw.Connection, sql: Mapping[str, str], check_open: Callable[[], None]) -> None:
        self._cursor = connection.cursor()
        self._sql = sql
        self._check_open = check_open

    def make(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """Read the attempts of the window, then sum them."""
        try:
            self._run("make_rates")
            self._run("make_part")
            self._take(query, pricing)
            total = self._sums("true")
            if total.fenced_attempts:
                self._run("take_place_of_interruptions")
                total = self._sums("true")
            mcp = self._sums("p.mcp")
            return UsageReport(
                total=total,
                fenced=self._sums("p.fenced") if total.fenced_attempts else UsageSums(),
                mcp=mcp,
                mcp_uses=self._mcp_uses(query.limit) if mcp.attempts else (),
                first_turns=self._first_turns() if mcp.attempts else (),
                groups={by: self._groups(by, query) for by in query.groups},
                buckets=self._buckets() if query.bucket is not None else {},
            )
        finally:
            self._run("drop_part")
            self._run("drop_rates")

    def _run(self, name: str, *values: Any) -> list[Row]:
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    # -- take -----------------------------------------------------------------------------------------------------

    def _take(self, query: UsageQuery, pricing: Pricing) -> None:
        """Walk back over the attempts, step by step, until the window is behind."""
        conversation = None
        if query.conversation is not None:
            conversation = self._run("conversation", query.conversation)[0][0]
        chain = None if query.chain is None else self._run("chain", query.chain)[0][0]
        filters = (query.agent_id, query.asked, query.answered, query.provider, conversation, chain)
        (first, end) = self._run("ends")[0]
        while end >= first > 0:
            self._check_open()
            begin = max(end - STEP, first - 1)
            newest = self._run("newest_of", begin, end)[0][0]
            if newest is not None and newest <= query.since - SLACK:
                return
            window = (begin, end, query.since, query.until, PRICE_SLICE)
            for provider, model, asked, piece in self._run("kinds", *window):
                self._add_rates(provider, model, asked, piece, pricing)
            self._run("take_part", *window, query.bucket, *filters)
            end = begin

    def _add_rates(self, provider: str, model: str | None, asked: str | None, piece: int, pricing: Pricing) -> None:
        tariff = pricing(provider, model, asked, piece * PRICE_SLICE)
        limits = [*(rates.above for rates in tariff[1:]), _UNLIMITED]
        for rates, upto in zip(tariff, limits, strict=False):
            per_token = (rates.input, rates.output, rates.cache_read, rates.cache_write, rates.reasoning)
            self._run(
                "add_rate", provider, model or "", asked or "", piece, rates.above, upto,
                *(price / _MILLION for price in per_token), rates.call,
            )  # fmt: skip

    # -- sum ------------------------------------------------------------------------------------------------------

    def _summing(self, key: str = "NULL", by: str = "1", where: str = "true") -> str:
        return self._sql["sums"].format(key=key, by=by, where=where)

    def _sums(self, where: str) -> UsageSums:
        rows: list[Row] = self._cursor.execute(self._summing(where=where)).fetchall()
        return _read_sums(rows[0]) if rows else UsageSums()

    def _groups(self, by: UsageBy, query: UsageQuery) -> UsageGroups:
        mark = query.after
        statement = self._sql["largest"].format(sums=self._summing(_CALLED[by], _TOLD_APART_BY[by]))
        behind = (None, None) if mark is None else (mark.total_tokens, mark.key)
        rows: list[Row] = self._cursor.execute(statement, (*behind, query.limit + 1)).fetchall()
        return UsageGroups(
            rows=tuple(UsageRow(key=row[0], sums=_read_sums(row)) for row in rows[: query.limit]),
            more=len(rows) > query.limit,
        )

    def _buckets(self) -> dict[int, UsageSums]:
        rows: list[Row] = self._cursor.execute(self._summing("p.bucket", "p.bucket")).fetchall()
        return {row[0]: _read_sums(row) for row in rows}

    def _mcp_uses(self, limit: int) -> tuple[McpUse, ...]:
        return tuple(
            McpUse(provider=provider, model=model, attempts=attempts, reports=reports)
            for provider, model, attempts, reports in self._run("mcp_uses", limit)
        )

    def _first_turns(self) -> tuple[FirstTurns, ...]:
        return tuple(
            FirstTurns(provider=provider, model=model, mcp=bool(mcp), turns=turns, input_tokens=median)
            for provider, model, mcp, turns, median in self._run("first_turns")
        )


def _read_sums(row: Row) -> UsageSums:
    """The columns of `sums` behind the key; a sum of money that nothing was added to is zero or unknown."""
    _, attempts, requests, unknown, fenced, unpriced, given, made, read, written, reasoning, cost, saved, _ = row
    return UsageSums(
        attempts=attempts,
        requests=requests,
        unknown_attempts=unknown,
        fenced_attempts=fenced,
        unpriced_attempts=unpriced,
        input_tokens=given,
        output_tokens=made,
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=reasoning,
        cost_usd=cost,
        cache_saved_usd=saved,
    )
