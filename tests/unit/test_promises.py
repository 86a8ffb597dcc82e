"""docs/promises.md and the tests agree: what is done is proved, and what is named exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "promises.md"
SOURCES = {"guide", "service", "beyond"}
STATES = {"done", "planned"}


class Promise(NamedTuple):
    """One row of the table."""

    id: str
    text: str
    source: str
    place: str
    state: str


def promises() -> list[Promise]:
    """The table's rows."""
    rows = []
    for line in TABLE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(r"[A-Z]\d+", cells[0]):
            rows.append(Promise(*cells))
    return rows


def marked(tree: ast.AST) -> Iterator[object]:
    """Every id in a `pytest.mark.promise(...)`, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
            for argument in node.args:
                yield argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument)


def proofs() -> dict[object, set[str]]:
    """The files of the tests that name each id."""
    found: dict[object, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in marked(ast.parse(path.read_text("utf-8"))):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_the_table_names_each_promise_once() -> None:
    ids = [promise.id for promise in promises()]
    assert len(ids) > 50
    assert sorted(set(ids)) == sorted(ids)


def test_every_row_has_its_origin_and_its_state() -> None:
    for promise in promises():
        assert promise.text.endswith("."), promise
        assert set(promise.source.split(", ")) <= SOURCES, promise
        assert promise.state in STATES, promise


def test_the_code_of_a_kept_promise_exists() -> None:
    for promise in promises():
        places = re.findall(r"`([^`]+)`", promise.place)
        assert places, promise
        if promise.state == "done":
            assert [place for place in places if not (ROOT / "src" / "ksi" / place).exists()] == [], promise


def test_every_promise_that_is_done_has_a_test() -> None:
    proved = proofs()
    assert [promise.id for promise in promises() if promise.state == "done" and promise.id not in proved] == []


def test_tests_name_only_promises_of_the_table() -> None:
    known = {promise.id for promise in promises()}
    assert {name: files for name, files in proofs().items() if name not in known} == {}


def test_the_code_speaks_only_of_promises_of_the_table() -> None:
    known = {promise.id for promise in promises()}
    unknown = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "src").rglob("*.py")
        for group in re.findall(r"\((?:promises? )?([A-Z]\d+(?:, [A-Z]\d+)*)\)", path.read_text("utf-8"))
        for name in group.split(", ")
        if name not in known
    }
    assert unknown == set()


def test_the_source_says_rules_in_words_and_not_by_their_ids() -> None:
    known = {promise.id for promise in promises()}
    files = [path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".lua", ".sql")]
    assert len(files) > 300
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in re.findall(r"[(, ](?:promise )?([A-Z]\d{1,2})[),:]", path.read_text("utf-8"))
        if name in known
    }
    assert found == set()
