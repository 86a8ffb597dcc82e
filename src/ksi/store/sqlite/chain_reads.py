"""The store's reads of chains and deliveries in SQL, over whichever connection they are given."""

from __future__ import annotations

from typing import Any

import apsw

from ksi.store.chains import ChainView, InjectionView, MemberRow, Trail
from ksi.store.sqlite.chain_rows import (
    INJECTION_CODES,
    ChainRow,
    Link,
    is_dead,
    read_child,
    read_hop,
    read_injection,
    read_member,
    whole_child,
    whole_text,
)
from ksi.store.sqlite.rows import Row, read_cursor, write_cursor
from ksi.store.sqlite.statements import load_statements
from ksi.store.values import Page

_LAST = 2**63 - 1


class ChainReads:
    """Answers from the tables; changes nothing."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._sql = load_statements("chains.sql")
        self._cursor = connection.cursor()

    def _one(self, name: str, *values: Any) -> Row | None:
        rows = self._all(name, *values)
        return rows[0] if rows else None

    def _all(self, name: str, *values: Any) -> list[Row]:
        # Fetch all rows: an unfinished statement pins its snapshot and blocks the reset of the log.
        rows: list[Row] = self._cursor.execute(self._sql[name], values).fetchall()
        return rows

    def unrouted(self, limit: int) -> tuple[str, ...]:
        """See `Store.unrouted`."""
        return tuple(request_id for (request_id,) in self._all("unrouted", limit))

    def injection(self, injection_id: str) -> InjectionView | None:
        """See `Store.injection`."""
        row = self._one("injection", injection_id)
        if row is None:
            return None
        *shown, text, child, place, child_place, passage = row
        dead = whole_child(read_child(child), child_place, passage) if is_dead(row[7]) else None
        return read_injection(tuple(shown), whole_text(text, place, passage), dead)

    def injections(self, limit: int, cursor: str | None, state: str | None) -> Page[InjectionView]:
        """See `Store.injections`."""
        name = "injections" if state is None else f"injections {state}"
        (before,) = read_cursor(name, cursor, (_LAST,))
        if state is None:
            rows = self._all("injections", before, limit + 1)
        else:
            rows = self._all("injections_in", before, limit + 1, INJECTION_CODES.get(state, -1))
        shown, more = rows[:limit], len(rows) > limit
        return Page(tuple(map(read_injection, shown)), write_cursor(name, shown[-1][0]) if more else None)

    def trail(self, request_id: str, limit: int) -> Trail | None:
        """See `Store.trail`."""
        found = self._one("chain_of", request_id)
        if found is None:
            return None
        chain, key = found
        figures, link = self._figures(chain), self._link(key)
        if figures is None or link is None:
            return None
        hops = self._all("trail", key, figures.reset_key, limit)
        return Trail(view=figures.view(link.limits, link.depth), hops=tuple(map(read_hop, hops)))

    def chain(self, name: str) -> ChainView | None:
        """See `Store.chain`."""
        whole = self._one("chain_named", name)
        if whole is not None:
            figures = self._figures(whole[0])
            return None if figures is None else figures.view()
        trail = self.trail(name, 0)
        return None if trail is None else trail.view

    def _figures(self, chain: int) -> ChainRow | None:
        row = self._one("chain_figures", chain)
        return None if row is None else ChainRow(*row)

    def _link(self, key: int) -> Link | None:
        row = self._one("member", key)
        return None if row is None else Link(*row)

    def chains(self, limit: int, cursor: str | None) -> Page[ChainView]:
        """See `Store.chains`."""
        (before,) = read_cursor("chains", cursor, (_LAST,))
        rows = [ChainRow(*row) for row in self._all("chains", before, limit + 1)]
        shown, more = rows[:limit], len(rows) > limit
        return Page(tuple(row.view() for row in shown), write_cursor("chains", shown[-1].id) if more else None)

    def members(self, chain: str, limit: int, cursor: str | None) -> Page[MemberRow]:
        """See `Store.members`."""
        (after,) = read_cursor("members", cursor, (0,))
        found = self._one("chain_named", chain) or self._one("chain_of", chain)
        rows = [] if found is None else self._all("members", found[0], after, limit + 1)
        shown, more = rows[:limit], len(rows) > limit
        items = tuple(read_member(row[1:]) for row in shown)
        return Page(items, write_cursor("members", shown[-1][0]) if more else None)
