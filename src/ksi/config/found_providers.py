"""The providers that exist without configuration: installed programs, and vendors with a key in the environment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Environ = Mapping[str, str]

CLAUDE_PLACES = (".local/bin/claude", ".claude/local/claude")
"""The places of Claude Code's own installers below the user's home, which services often do not have in their PATH."""

KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""The variable that holds the key, by kind of provider."""

BUILT_IN = "built in"
CONFIGURED = "ksi.toml"


def find_program(name: str, environ: Environ) -> str | None:
    """The path of a program: on the PATH, and for Claude Code also at its installers' places."""
    path = shutil.which(name, path=environ.get("PATH", ""))
    if path is None and name == "claude" and environ.get("HOME"):
        places = (Path(environ["HOME"]) / place for place in CLAUDE_PLACES)
        path = next((str(place) for place in places if place.is_file()), None)
    return path


def found(environ: Environ) -> dict[str, tuple[dict[str, Any], str]]:
    """The providers' tables as ksi.toml would have them, and how each was found, by name."""
    tables: dict[str, tuple[dict[str, Any], str]] = {
        "local": ({"kind": "local", "models": ["local/smollm2"], "max_concurrency": 2}, BUILT_IN)
    }
    claude = find_program("claude", environ)
    if claude is not None:
        tables["claude-cli"] = ({"kind": "claude-cli"}, f"found at {claude}")
    for kind, variable in KEYS.items():
        if environ.get(variable):
            tables[kind] = ({"kind": kind, "max_concurrency": 16}, f"{variable} is in the environment")
    return tables


def missing(kind: str, environ: Environ) -> str | None:
    """Advice for getting the models of a kind that no provider serves; None for a kind that is never found
    automatically."""
    if kind == "claude-cli":
        if find_program("claude", environ) is not None:
            return (
                f'Claude Code is installed but not configured: add [providers.{kind}] with kind = "{kind}" to ksi.toml'
            )
        return (
            "Claude Code is not installed: install it with `npm install -g @anthropic-ai/claude-code`, log in with "
            "`claude`, and start the daemon again"
        )
    if kind not in KEYS:
        return None
    if environ.get(KEYS[kind]):
        return f'it is not configured: add [providers.{kind}] with kind = "{kind}" to ksi.toml'
    return f"there is no {KEYS[kind]} in the daemon's environment: set it and start the daemon again"
