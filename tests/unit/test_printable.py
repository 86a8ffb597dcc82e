"""What may reach a terminal, and that nothing goes past the rule."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi import cli
from ksi.host.printable import escaped, visible

ANY = st.text(st.characters(exclude_categories=()))
MODULES = sorted(Path(cli.__file__).parent.glob("*.py"))
PRINTERS = {"print", "echo", "secho", "write", "writelines"}


@pytest.mark.promise("S3")
@given(ANY)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert visible(text).isprintable()
    assert escaped(json.dumps(text, ensure_ascii=False)).isprintable()
    assert escaped(json.dumps(text, ensure_ascii=False), ascii_only=True).isascii()


@given(ANY)
def test_escaped_json_means_the_same(text: str) -> None:
    whole = json.dumps({text: [text]}, ensure_ascii=False)
    for ascii_only in (False, True):
        assert json.loads(escaped(whole, ascii_only=ascii_only)) == {text: [text]}


@given(st.text(st.characters(categories=("L", "N", "P", "S"), codec="utf-8")))
def test_readable_text_is_unchanged(text: str) -> None:
    assert visible(text) == escaped(text) == text


@pytest.mark.promise("S3")
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_one_module_prints_for_the_command(module: Path) -> None:
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    found = called & PRINTERS
    if module.stem == "render":
        assert found == {"print", "write"}
    else:
        # What a batch writes goes to its file, and what the bridge writes to an agent: programs read them.
        assert found <= ({"write"} if module.stem in ("batch_files", "last", "mcp_bridge") else set())
