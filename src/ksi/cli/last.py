"""The conversation of the last `ksi ask`, for `--continue`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from ksi.host.private_files import make_folder

FILE = "var/last_ask.json"
MOST = 1000
"""Maximum number of remembered agents, the latest ones."""


def last_session(home: Path, agent: str | None) -> str:
    """The conversation of this agent's last `ksi ask` in this home.

    Raises:
        click.UsageError: there was none.
    """
    session = _read(home).get(agent or "")
    if session is None:
        whose = f" of agent {agent}" if agent else ""
        raise click.UsageError(f"--continue: nothing was asked{whose} in {home} yet; name one with --session")
    return session


def remember(home: Path, agent: str | None, session: str | None) -> None:
    """Remember the conversation for the next `--continue`; a read-only home remembers nothing."""
    import msgspec

    if session is None:
        return
    known = _read(home)
    known.pop(agent or "", None)
    kept = dict([*known.items(), (agent or "", session)][-MOST:])
    path = home / FILE
    made = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        make_folder(path.parent)
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(kept))
        made.replace(path)


def _read(home: Path) -> dict[str, str]:
    import msgspec

    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}
