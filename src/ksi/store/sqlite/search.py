"""Full text of turns: an index in a file beside the database, which searches alone bring up to date.

The database knows nothing of it, so that nobody pays for it who does not search. It has the words of each turn and no
other text. Where it does not fit the database any more it is removed, and the next search makes it anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw

from ksi.host.private_files import open_to_append
from ksi.request import decode_body, said_in
from ksi.store.rules.terms import Phrase, composed, words
from ksi.store.sqlite.rows import Row, read_cursor, write_cursor
from ksi.store.sqlite.statements import load_statements
from ksi.store.values import Found, SearchPage

STEP = 200
"""Turns that are taken into the index in one transaction."""

MOST_CHARS = 8 * 1024 * 1024
"""Characters of turns, about, that one search takes in."""

LAYOUT = 1

_LAST = 2**63 - 1


class TextIndex:
    """The index of one database. Its methods run in threads, one at a time."""

    def __init__(self, path: Path, connect: Callable[[], apsw.Connection], *, most_chars: int = MOST_CHARS) -> None:
        """`path` is the database's, `connect` gives connections to it."""
        self._path = path.with_name(f"{path.name}.search")
        self._connect = connect
        self._most_chars = most_chars
        self._sql = load_statements("search.sql")
        self._busy = threading.Lock()
        self._open: tuple[apsw.Connection, apsw.Connection] | None = None

    def close(self) -> None:
        """Let the files go."""
        with self._busy:
            self._close()

    def remove(self) -> None:
        """Take the index away, with all words that it has."""
        with self._busy:
            self._remove()

    def check(self) -> None:
        """Take it away if conversations were deleted from the database that it may still have words of."""
        with self._busy:
            if self._path.exists():
                self._files()

    def search(self, asked: Sequence[Phrase], limit: int, cursor: str | None) -> SearchPage:
        """See `Store.search`."""
        (before,) = read_cursor("search", cursor, (_LAST,))
        with self._busy:
            try:
                return self._search(asked, limit, before)
            except (apsw.CorruptError, apsw.NotADBError):
                self._remove()
                return self._search(asked, limit, before)

    def _search(self, asked: Sequence[Phrase], limit: int, before: int) -> SearchPage:
        index, database = self._files()
        behind = self._take_in(index, database)
        hits = [turn for (turn,) in self._all(index, "search", _expression(asked), before, limit + 1)]
        rows = {turn: self._all(database, "turn_found", turn) for turn in hits[:limit]}
        with index:
            # Turns whose time was over: nothing else tells the index of them.
            for turn in [turn for turn, row in rows.items() if not row]:
                self._all(index, "drop_words", turn)
        items = tuple(_found(turn, row[0]) for turn, row in rows.items() if row)
        end = write_cursor("search", hits[limit - 1]) if len(hits) > limit else None
        return SearchPage(items=items, cursor=end, behind=behind)

    def _take_in(self, index: apsw.Connection, database: apsw.Connection) -> int:
        """Bring the index up to date, or a piece nearer to it; returns about how many turns it lacks."""
        reached = int(self._all(index, "known")[0][1])
        chars = 0
        while chars < self._most_chars:
            rows = self._all(database, "turns_behind", reached, STEP)
            if not rows:
                return 0
            with index:
                for turn, body, text in rows:
                    said = f"{said_in(decode_body(body))}\n{text or ''}"
                    self._all(index, "add_words", turn, " ".join(place.word for place in words(composed(said))))
                    chars += len(said)
                reached = rows[-1][0]
                self._all(index, "set_reached", reached)
        return max(0, int(self._all(database, "last_turn")[0][0]) - reached)

    def _all(self, connection: apsw.Connection, name: str, *values: Any) -> list[Row]:
        rows: list[Row] = connection.execute(self._sql[name], values).fetchall()
        return rows

    # -- files --------------------------------------------------------------------------------------------------------

    def _files(self) -> tuple[apsw.Connection, apsw.Connection]:
        """The index and the database; a missing or outdated index is made."""
        if self._open is None:
            database = self._connect()
            self._open = self._made(database) or self._make(database), database
        index, database = self._open
        if self._all(index, "known")[0][2] != self._all(database, "deletions")[0][0]:
            self._remove()
            return self._files()
        return self._open

    def _made(self, database: apsw.Connection) -> apsw.Connection | None:
        """The existing index; None if there is none that can be used."""
        if not self._path.exists():
            return None
        index = apsw.Connection(str(self._path))
        try:
            layout, reached, _ = self._all(index, "known")[0]
            fits = layout == LAYOUT and reached <= self._all(database, "last_turn")[0][0]
        except (apsw.SQLError, apsw.CorruptError, apsw.NotADBError, IndexError):
            fits = False
        if fits:
            return index
        index.close()
        return None

    def _make(self, database: apsw.Connection) -> apsw.Connection:
        self._unlink()
        os.close(open_to_append(self._path))
        index = apsw.Connection(str(self._path))
        try:
            deletions = self._all(database, "deletions")[0][0]
            with index:
                self._all(index, "make_known")
                self._all(index, "make_words")
                self._all(index, "begin", LAYOUT, deletions)
        except BaseException:
            index.close()
            raise
        return index

    def _close(self) -> None:
        for connection in self._open or ():
            connection.close()
        self._open = None

    def _remove(self) -> None:
        self._close()
        self._unlink()

    def _unlink(self) -> None:
        for name in (self._path.name, f"{self._path.name}-journal"):
            self._path.with_name(name).unlink(missing_ok=True)


def _found(turn: int, row: Row) -> Found:
    conversation, body, text, provider, finished_at = row
    return Found(
        turn=turn,
        conversation=conversation,
        body=body,
        text=text or "",
        provider=provider,
        finished_at=finished_at,
    )


def _expression(asked: Sequence[Phrase]) -> str:
    """The query in the language of SQLite's full text search. Words have no quotes in them."""
    return " AND ".join(f'"{" ".join(phrase.words)}"{"*" if phrase.beginning else ""}' for phrase in asked)
