"""`ksi log`: the prompts and answers of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click

from ksi.cli.completing import complete_session
from ksi.cli.ids import send_named
from ksi.cli.render import clock_time, json_line, note, painter, say
from ksi.cli.requests import in_lines, said_in
from ksi.cli.settings import Settings, json_option, pass_settings

Json = Mapping[str, Any]
PAGE = 200
"""Turns in one page."""


@click.command(
    epilog="""\b
Examples:
  ksi log trip
  ksi log trip --limit 3
  ksi log trip --all --json | jq -r .result
"""
)
@click.argument("session", shell_complete=complete_session)
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="Turns from the end.")
@click.option("--all", "everything", is_flag=True, help="All turns.")
@json_option
@pass_settings
def log(settings: Settings, session: str, limit: int, everything: bool, as_json: bool) -> None:
    """Show the prompts and answers of the conversation SESSION, the oldest turn first.

    Only completed turns are shown: requests that failed or still run are not part of a conversation; see `ksi queue`.
    """
    turns, more = asyncio.run(turns_of(settings, session, None if everything else limit))
    for turn in reversed(turns):
        if as_json:
            json_line(turn)
        else:
            _print(turn)
    if more:
        note("there are earlier turns; see them with --all")


async def turns_of(settings: Settings, session: str, limit: int | None) -> tuple[list[Json], bool]:
    """The last turns, the newest first, and True if there are earlier ones."""
    turns: list[Json] = []
    data: dict[str, Any] = {"session_id": session}
    async with settings.client() as client:
        while True:
            wanted = PAGE if limit is None else min(PAGE, limit - len(turns))
            wish = {**data, "limit": wanted}
            reply = await send_named(client, "completion:history", wish, "session_id", "conversation")
            turns += reply.get("turns", [])
            cursor = reply.get("cursor")
            if cursor is None or (limit is not None and len(turns) >= limit):
                return turns, cursor is not None
            data = {"session_id": reply["session_id"], "cursor": cursor}


def _print(turn: Json) -> None:
    paint = painter()
    who = turn.get("agent_id")
    words = [str(clock_time(turn.get("finished_at"))), str(turn.get("provider"))]
    if who:
        words.append(f"asked by {who}")
    say("── " + ", ".join(words), style=paint.dim)
    for text in turn.get("reminders", ()):
        _say("delivered before it", text)
    for speaker, text in said_in(turn.get("content") or {}).items():
        _say(speaker, text)
    _say("answer", in_lines(turn.get("blocks")) or turn.get("result"))
    say()


def _say(speaker: str, text: object) -> None:
    say(f"{speaker}:", style=painter().bold)
    say(text, keep="\n\t")
