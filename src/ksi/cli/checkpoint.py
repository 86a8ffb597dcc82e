"""`ksi checkpoint save` and `ksi checkpoint restore`: everything in a file, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ksi.cli.render import clock_time, figures, json_line, note
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_one


@click.group(
    epilog="""\b
Examples:
  ksi checkpoint save
  ksi checkpoint save /backup/ksi-monday.ksi
  ksi --home /srv/other checkpoint restore /backup/ksi-monday.ksi
"""
)
def checkpoint() -> None:
    """Save all requests and conversations to a file while the daemon works, or load one into an empty daemon."""


@checkpoint.command()
@click.argument("file", required=False)
@json_option
@pass_settings
def save(settings: Settings, file: str | None, as_json: bool) -> None:
    """Save the state of this moment to a new FILE; the default is a generated name in var/checkpoints.

    Running requests are saved as queued and interrupted. Only this user can read the file, because it contains all
    prompts and answers.
    """
    path = str(Path(file).absolute()) if file is not None else None
    reply = asyncio.run(ask_one(settings, "checkpoint:collect", {"path": path} if path is not None else {}))
    _print(reply, as_json)


@checkpoint.command()
@click.argument("file")
@json_option
@pass_settings
def restore(settings: Settings, file: str, as_json: bool) -> None:
    """Load FILE into the running daemon, which must have no requests and no conversations, and continue from it.

    If the saved daemon continues as well, requests that had not ended run in both, and are paid for twice.
    """
    reply = asyncio.run(ask_one(settings, "checkpoint:restore", {"path": str(Path(file).absolute())}))
    _print(reply, as_json)


def _print(reply: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        json_line(reply)
        return
    figures(
        {
            "checkpoint": reply.get("path"),
            "saved": clock_time(reply.get("created_at")),
            "size": f"{reply.get('bytes', 0) / 2**20:,.1f} MiB",
            "requests": reply.get("requests"),
            "conversations": reply.get("conversations"),
            "outside locks": reply.get("locks") or None,
            "interrupted": reply.get("interrupted") or None,
            "failed instead": reply.get("failed") or None,
        }
    )
    if reply.get("notice"):
        note(f"note: {reply['notice']}")
