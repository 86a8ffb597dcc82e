"""The database's size on the disk: pages freed by pruning are returned to it, in small steps."""

from __future__ import annotations

from pathlib import Path

import apsw
import structlog

from ksi.host.private_files import free_bytes

PAGE = 4096
"""Bytes of a page, SQLite's default."""

SPARE_PAGES = 1_024
"""Free pages that stay in the database (4 MiB): the next requests fill them."""

SPARE_SHARE = 8
"""One page in so many may be free as well."""

MOST_REWRITTEN = 1024 * 1024 * 1024
"""Bytes of content above which a database is not rewritten at a start: it would take minutes."""

LONGEST_LOG = 80 * 1024 * 1024
"""Bytes above which the log is cut when it restarts. It gets longer only by one large change, or by a reader that takes
long; under load it goes up to `RESET_PAGES` each time."""

_INCREMENTAL = 2


def allow_shrinking(connection: apsw.Connection) -> None:
    """Before anything is in a new database: free pages can be given back one by one."""
    connection.pragma("auto_vacuum", "incremental")


def rewrite_once(connection: apsw.Connection, path: Path) -> None:
    """Give a database that was made without it the layout that can shrink.

    It is rewritten once, if its content is small enough and the disk has room for it twice. Elsewhere it stays as it
    is: its free pages are used again and never given back.
    """
    if connection.pragma("auto_vacuum") == _INCREMENTAL:
        return
    log = structlog.get_logger("ksi.store")
    content = _number(connection, "page_count") - _number(connection, "freelist_count")
    free = free_bytes(path.parent)
    if content * PAGE > MOST_REWRITTEN or (free is not None and free < 2 * content * PAGE):
        log.warning("the database cannot shrink: it is large, or the disk is full", bytes=content * PAGE, free=free)
        return
    try:
        # Its copy is a file: in memory it could be as large as the database.
        connection.pragma("temp_store", "file")
        allow_shrinking(connection)
        connection.execute("VACUUM")
        connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
    except (apsw.BusyError, apsw.FullError, apsw.IOError, apsw.CantOpenError) as error:
        log.warning("the database was not rewritten, and cannot shrink", error=str(error))
    else:
        log.info("the database was rewritten, and can shrink from now on", bytes=content * PAGE)
    finally:
        connection.pragma("temp_store", "memory")


def give_back(connection: apsw.Connection, limit: int) -> int:
    """In a transaction: take up to `limit` free pages out of the database; how many that were.

    The file is cut when the log is copied into it.
    """
    spare = max(SPARE_PAGES, _number(connection, "page_count") // SPARE_SHARE)
    before = _number(connection, "freelist_count")
    pages = min(limit, before - spare)
    if pages <= 0:
        return 0
    # It frees a page with each row that is read of it.
    connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    return before - _number(connection, "freelist_count")


def _number(connection: apsw.Connection, pragma: str) -> int:
    return int(str(connection.pragma(pragma)))
