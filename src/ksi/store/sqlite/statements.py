"""Reads named SQL statements from the package's `sql/` folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

_MARK = "-- name: "


def load_statements(*files: str) -> Mapping[str, str]:
    """The statements of some files by their names; a name's text goes up to the next one."""
    statements: dict[str, str] = {}
    for part in (part for file in files for part in read_sql(file).split(_MARK)[1:]):
        name, _, text = part.partition("\n")
        lines = (line for line in text.splitlines() if not line.startswith("--"))
        # In one line: the connection finds a prepared statement by its text, so each character is read each time.
        statements[name.strip()] = " ".join(" ".join(lines).split()).rstrip(";")
    return statements


def read_sql(file: str) -> str:
    """A file's text."""
    return (resources.files("ksi.store.sqlite") / "sql" / file).read_text("utf-8")
