"""docs/promises.md has every feature that the two documents name, with its promise and a test that is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.acceptance.documents import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"
NAMED = (
    "completion:request",
    "completion:async",
    "completion:queue_status",
    "conversation:acquire_lock",
    "conversation:release_lock",
    "conversation:lock_status",
    "system:startup",
    "context",
    "ready",
    "system:shutdown",
    "completion:cancel",
    "completion:status",
    "completion:session_status",
    "completion:retry_status",
    "completion:failed",
    "completion:provider_status",
    "completion:token_usage",
)
"""Every event of the two documents."""
WORDS = (
    "five priorities",
    "fork detection",
    "lock expiration",
    "injection routing",
    "depth limiting",
    "token budgets",
    "time windows",
    "pattern detection",
    "version 1",
    "migration tool",
    "rollback",
    "daemon_control.sh",
    "monitoring",
    "not processing",
    "fork warnings",
    "circuit breaker blocks",
    "overhead over version 1",
    "distributed queue",
    "locks in redis",
    "advanced breaker patterns",
    "persistence over restarts",
    "per-session queues",
    "active completions",
    "recovery data",
    "response files",
    "checkpoint",
    "token usage log",
    "graceful shutdown",
    "breaker for each provider",
    "performance metrics",
    "failover",
    "lock expiry tracking",
    "session life cycle",
    "agents and their sessions",
    "usage per agent and per model",
    "mcp overhead",
    "usage trends",
    "periodic cleanup",
    "error recovery",
    "modular",
)
"""The other names."""


class Feature(NamedTuple):
    """One row."""

    name: str
    source: str
    promises: str
    test: str


def features() -> list[Feature]:
    """The table's rows."""
    section = PAGE.read_text("utf-8").partition("## The names of the two documents")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "::" in line]
    return [Feature(*row) for row in cells]


@cache
def functions(path: Path) -> frozenset[str]:
    """The names of a file's functions."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_feature_has_a_test_that_is_there() -> None:
    missing = []
    for feature in features():
        path, _, name = feature.test.strip("`").partition("::")
        known = functions(ROOT / path) if (ROOT / path).is_file() else frozenset()
        if path.endswith("documents.py"):
            known &= CHECKS.keys()
        if name not in known:
            missing.append(feature)
    assert missing == []


def test_every_feature_names_promises_of_the_table() -> None:
    known = set(re.findall(r"^\| ([A-Z]\d+) \|", PAGE.read_text("utf-8"), re.MULTILINE))
    assert len(known) > 50
    for feature in features():
        assert set(feature.promises.split(", ")) <= known, feature
        assert set(feature.source.split(", ")) <= {"guide", "service"}, feature


def test_nothing_of_the_two_documents_is_left_over() -> None:
    names = " | ".join(feature.name for feature in features()).lower()
    assert [name for name in NAMED if f"`{name}`" not in names] == []
    assert [words for words in WORDS if words not in names] == []
