"""The way to the daemon of a home whose configuration cannot be used."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksi.config.schema import CONFIG_FILE, Config, Socket


def salvage(home: Path, environ: Mapping[str, str] | None = None) -> Config:
    """The settings for reaching the daemon of a home with an unusable configuration: its socket, and defaults.

    The socket's path is read from the variable, or from the part of the file that still can be read.
    """
    environ = os.environ if environ is None else environ
    tree = _readable_parts(home / CONFIG_FILE)
    section = tree.get("socket")
    in_file = section.get("path") if isinstance(section, dict) else None
    path = environ.get("KSI_SOCKET__PATH") or in_file
    return Config(home=home, socket=Socket(path=path) if isinstance(path, str) and path else Socket())


def _readable_parts(path: Path) -> dict[str, Any]:
    """The tables of a file that can be parsed separately; of two with one name, the last."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return {}
    tree: dict[str, Any] = {}
    for part in re.split(r"^(?=\s*\[)", text, flags=re.MULTILINE):
        try:
            tree |= tomllib.loads(part)
        except tomllib.TOMLDecodeError:
            tree |= _readable_lines(part)
    return tree


def _readable_lines(part: str) -> dict[str, Any]:
    """The keys of a table of which some lines cannot be read."""
    head, *lines = part.strip().splitlines() or [""]
    try:
        table = tomllib.loads(head)
    except tomllib.TOMLDecodeError:
        return {}
    keys: dict[str, Any] = {}
    for line in lines:
        try:
            keys |= tomllib.loads(line)
        except tomllib.TOMLDecodeError:
            continue
    return {name: keys for name, value in table.items() if value == {}}
