"""Claude Code's tools: which have effects, and the sentence about those that were denied."""

from __future__ import annotations

from typing import Any

import pytest

from ksi.providers.claude_cli.stream import Denial, Tool
from ksi.providers.claude_cli.tools import has_effects, note_of


def denial(name: str, given: Any) -> Denial:
    return Denial(Tool(name, "t"), given)


@pytest.mark.promise("F13")
@pytest.mark.parametrize(
    ("name", "effects"),
    [
        ("Read", False),
        ("Task", False),
        ("WebSearch", False),
        ("StructuredOutput", False),
        ("Bash", True),
        ("Write", True),
        ("Skill", True),
        ("ToolOfNextYear", True),
        ("mcp__wiki__read", False),
        ("mcp__wiki__write", True),
        ("", True),
    ],
)
def test_a_tool_has_effects_unless_it_is_known_to_have_none(name: str, effects: bool) -> None:
    assert has_effects(name, frozenset({"mcp__wiki__read"})) is effects


@pytest.mark.promise("A4")
@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("Bash", {"command": "make-release-4711", "description": "Release"}, "Bash (make-release-4711)"),
        ("Write", {"content": "x" * 9000, "file_path": "/srv/a b.txt"}, "Write (/srv/a b.txt)"),
        ("Bash", {"command": "cat <<E\n  one\ttwo\nE"}, "Bash (cat <<E one two E)"),
        ("WebFetch", {"prompt": "p", "url": "http://x"}, "WebFetch (http://x)"),
        ("mcp__wiki__write", {"page": 7}, 'mcp__wiki__write ({"page":7})'),
        ("Bash", {"command": 7}, 'Bash ({"command":7})'),
        ("Bash", {"command": "y" * 101}, f"Bash ({'y' * 100}…)"),
        ("Bash", {"command": "cut \ud83d"}, "Bash (cut \ufffd)"),
        ("Bash", None, "Bash"),
        ("Bash", {}, "Bash"),
        ("", {}, "a tool"),
    ],
)
def test_a_denied_call_is_reported_by_its_tool_and_its_purpose(name: str, given: Any, told: str) -> None:
    assert note_of([denial(name, given)]) == f"Claude Code was denied the use of {told}."


@pytest.mark.promise("A4")
def test_many_denied_calls_make_one_short_sentence() -> None:
    assert note_of([]) is None
    same = [denial("Bash", {"command": "ls"})] * 3
    assert note_of(same) == "Claude Code was denied the use of Bash (ls)."
    many = [denial("Read", {"file_path": f"/{number}"}) for number in range(8)]
    assert note_of(many) == (
        "Claude Code was denied the use of Read (/0), Read (/1), Read (/2), Read (/3), Read (/4), and 3 more."
    )
