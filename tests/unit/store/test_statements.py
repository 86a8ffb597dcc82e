"""Named statements, and that each of them is one that SQLite takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from ksi.store.sqlite import statements as module
from ksi.store.sqlite.statements import load_statements, read_sql
from ksi.store.values import Listing

SOURCE = Path(module.__file__).parent
FILES = sorted(path.name for path in (SOURCE / "sql").glob("*.sql") if path.name != "schema.sql")


@pytest.fixture
def database() -> Iterator[apsw.Connection]:
    connection = apsw.Connection(":memory:")
    connection.execute(read_sql("schema.sql"))
    yield connection
    connection.close()


def test_a_file_s_statements_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "-- What this file is.\n\n-- name: one\nSELECT 1;\n-- why\n-- name:  two \nSELECT\n    2;\n\n-- name: none\n"
    monkeypatch.setattr(module, "read_sql", lambda _: text)
    assert load_statements("any.sql") == {"one": "SELECT 1", "two": "SELECT 2", "none": ""}


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        read_sql("nothing.sql")


@pytest.mark.parametrize("file", FILES)
def test_every_statement_is_one_that_sqlite_takes(database: apsw.Connection, file: str) -> None:
    statements = load_statements(file)
    assert statements
    for name, text in statements.items():
        assert re.fullmatch(r"[a-z_]+", name), name
        if text.startswith("CREATE"):
            database.execute(text)  # those behind it use it
            continue
        if "{" in text:
            continue  # the code puts others into it
        cursor = database.execute(f"EXPLAIN {text}", bindings(text))
        assert cursor.fetchall(), name


def bindings(text: str) -> tuple[None, ...]:
    """Enough nothings for a statement's places."""
    numbered = [int(number) for number in re.findall(r"\?(\d+)", text)]
    return (None,) * (max(numbered) if numbered else text.count("?"))


def test_every_list_has_its_statement() -> None:
    rows = {name for name in load_statements("statements.sql") if name.startswith("rows_")}
    assert rows == {f"rows_{listing}" for listing in Listing}


def test_every_name_is_given_once() -> None:
    for file in FILES:
        names = re.findall(r"^-- name: *(\S+)", read_sql(file), re.MULTILINE)
        assert sorted(set(names)) == sorted(names)


def test_every_statement_is_used_and_every_used_one_is_there() -> None:
    code = "".join(path.read_text("utf-8") for path in sorted(SOURCE.glob("*.py")))
    for file in FILES:
        unused = [name for name in load_statements(file) if f'"{name}"' not in code and not name.startswith("rows_")]
        assert unused == [], file


def test_every_folder_of_statements_is_in_the_package() -> None:
    assert {"schema.sql", "statements.sql"} <= {*FILES, "schema.sql"}
