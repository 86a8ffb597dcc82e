"""Tools of Claude Code: which of them change something, and a sentence about those that were denied. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ksi.providers.claude_cli.stream import Denial
from ksi.providers.json_text import encode_clean, repaired

HARMLESS = frozenset(
    {
        "Agent",
        "AskUserQuestion",
        "BashOutput",
        "CronList",
        "EnterPlanMode",
        "ExitPlanMode",
        "Glob",
        "Grep",
        "LS",
        "LSP",
        "ListAgents",
        "ListMcpResources",
        "ListMcpResourcesTool",
        "NotebookRead",
        "Read",
        "ReadMcpResource",
        "ReadMcpResourceTool",
        "StructuredOutput",
        "Task",
        "TaskCreate",
        "TaskGet",
        "TaskList",
        "TaskOutput",
        "TaskUpdate",
        "TodoRead",
        "TodoWrite",
        "ToolSearch",
        "WebFetch",
        "WebSearch",
    }
)
"""Built-in tools that read, or change nothing but the turn itself. The tools of an `Agent` are looked at one by one."""

_LONGEST = 100
"""Maximum length of a denied call's command or path in messages, in characters."""
_MOST = 5
"""Maximum number of denied calls that are listed."""
_TELLING = ("command", "file_path", "notebook_path", "path", "url", "query", "pattern", "skill", "description")
"""Inputs of tools that best describe the denied action."""


def has_effects(name: str, harmless: frozenset[str]) -> bool:
    """Return True if a tool may change something outside the turn. `harmless` are MCP tools known to be read-only."""
    return name not in HARMLESS and name not in harmless


def note_of(denials: Sequence[Denial]) -> str | None:
    """A sentence that names the tool calls that were denied; None without any."""
    if not denials:
        return None
    calls = list(dict.fromkeys(_call(denial) for denial in denials))
    more = f", and {len(calls) - _MOST} more" if len(calls) > _MOST else ""
    return f"Claude Code was denied the use of {', '.join(calls[:_MOST])}{more}."


def _call(denial: Denial) -> str:
    return told_call(denial.tool.name, denial.input)


def told_call(tool: str, given: Any) -> str:
    """A tool's call in a few words: its name, and the most telling part of its input."""
    name, told = tool or "a tool", _told(given)
    if not told:
        return name
    return f"{name} ({told if len(told) <= _LONGEST else f'{told[:_LONGEST]}…'})"


def _told(given: Any) -> str:
    """The most telling part of a tool's input, in one line."""
    if isinstance(given, dict):
        given = next((given[key] for key in _TELLING if isinstance(given.get(key), str)), given)
    if given in (None, {}, ""):
        return ""
    text = given if isinstance(given, str) else encode_clean(given).decode()
    return " ".join(repaired(text).split())
