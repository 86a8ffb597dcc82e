"""The starter of a migrated home's daemon: the checkout's control script, or one put into the old project's tree."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import ksi

NAME = "daemon_control.sh"
_MARK = "KSI_HOME"
"""Every control script of ours has this word; the old project's has not."""

_SCRIPT = """\
#!/bin/sh
# Starts KSI in this home; written by `ksi migrate`. The former file is {name}.disabled.
set -eu
here=$(CDPATH='' cd -P -- "$(dirname -- "$0")" && pwd)
KSI_HOME=$here
export KSI_HOME
exec {command} "$@"
"""


def checkout() -> Path | None:
    """The checkout that this code belongs to; None for an installed package."""
    root = Path(ksi.__file__).resolve().parents[2]
    return root if (root / NAME).is_file() and (root / "ksi").is_file() else None


def is_ours(script: Path) -> bool:
    """True if a control script starts KSI."""
    return script.is_file() and _MARK in script.read_text("utf-8", "replace")


def script() -> str:
    """A control script for a home that is no checkout."""
    root = checkout()
    command = shlex.quote(str(root / NAME)) if root is not None else f"{shlex.quote(sys.executable)} -m ksi.cli"
    return _SCRIPT.format(name=NAME, command=command)


def start_command(home: Path) -> str:
    """The command that starts the daemon of a home."""
    if is_ours(home / NAME):
        return f"{shlex.quote(str(home))}/{NAME} start"
    root = checkout()
    return f"{shlex.quote(str(root / 'ksi')) if root is not None else 'ksi'} --home {shlex.quote(str(home))} start"
