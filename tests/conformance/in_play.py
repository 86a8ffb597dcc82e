"""Checks that the SQLite store's knowledge of live rows agrees with its database."""

from __future__ import annotations

from ksi.store.base import Store
from ksi.store.sqlite.store import SqliteStore


def check_in_play(store: Store) -> None:
    """Compare everything that it knows with the rows."""
    if not isinstance(store, SqliteStore):
        return
    ledger = store._ledger
    for free in ledger.in_play.known_free():
        *row, reminders = ledger.all("arrival", free.name)[0]
        assert row == [free.id, free.head, None, None, free.name]
        assert not reminders
    for key, run in ledger.in_play.known_runs():
        assert ledger.one("to_settle", key) == tuple(run)
