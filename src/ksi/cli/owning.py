"""`ksi search`, `ksi rename` and `ksi delete`: users manage their conversations."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import click

from ksi.cli.completing import complete_session
from ksi.cli.ids import send_named
from ksi.cli.render import clock_time, json_line, note, painter, progress, say
from ksi.cli.settings import Exit, Settings, json_option, pass_settings

Json = Mapping[str, Any]


@click.command(
    epilog="""\b
Examples:
  ksi search orleans
  ksi search '"half an hour" train'
  ksi search 'migrat*' --all --json | jq -r .session_id | sort -u
"""
)
@click.argument("query", nargs=-1, required=True)
@click.option(
    "-n", "--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="The number of turns to show."
)
@click.option("--all", "everything", is_flag=True, help="All turns.")
@json_option
@pass_settings
def search(settings: Settings, query: tuple[str, ...], limit: int, everything: bool, as_json: bool) -> None:
    """Find turns whose prompt or answer has all words of QUERY, the newest first.

    "Words in quotes" must follow each other, and word* matches any word with this beginning. Case and accents do not
    matter. The first search builds an index next to the database, which takes a while if there is much.
    """
    found = asyncio.run(_search(settings, " ".join(query), limit, everything, as_json=as_json))
    if not found and not as_json:
        note("nothing was found")
    if not found:
        raise SystemExit(Exit.NOT_FOUND)


async def _search(settings: Settings, query: str, limit: int, everything: bool, *, as_json: bool) -> int:
    found = 0
    cursor: str | None = None
    async with settings.client() as client:
        reply = await client.send_event("conversation:search", {"query": query, "limit": limit})
        at_terminal = sys.stderr.isatty()
        while behind := reply.get("behind", 0):
            if at_terminal:
                progress(f"indexing: about {behind} turns to go")
            reply = await client.send_event("conversation:search", {"query": query, "limit": limit})
        if at_terminal:
            progress("")
        while True:
            for match in reply["matches"]:
                found += 1
                _print(match, as_json=as_json)
            cursor = reply.get("cursor")
            if cursor is None:
                return found
            if not everything:
                note("there are more; see them with --all")
                return found
            reply = await client.send_event("conversation:search", {"query": query, "limit": 100, "cursor": cursor})


def _print(match: Json, *, as_json: bool) -> None:
    if as_json:
        json_line(match)
        return
    paint = painter()
    words = [str(match["session_id"]), str(clock_time(match["finished_at"]))]
    if match.get("agent_id"):
        words.append(f"asked by {match['agent_id']}")
    say(", ".join(words), style=paint.bold)
    text, start, end = match["excerpt"], match["start"], match["end"]
    say(f"  {text[:start]}{text[start:end]}{text[end:]}")


@click.command(
    epilog="""\b
Example:
  ksi rename conv_01kc trip-to-orleans
"""
)
@click.argument("session", shell_complete=complete_session)
@click.argument("name")
@json_option
@pass_settings
def rename(settings: Settings, session: str, name: str, as_json: bool) -> None:
    """Give the conversation SESSION the name NAME. The old name stays an alias of it."""
    reply = asyncio.run(_send(settings, "conversation:rename", {"session_id": session, "name": name}))
    if as_json:
        json_line(reply)
    elif reply["before"] == reply["session_id"]:
        say(f"{reply['session_id']} has this name already")
    else:
        say(f"{reply['before']} is now {reply['session_id']}; the old name stays an alias of it")


@click.command(
    epilog="""\b
Examples:
  ksi delete trip
  ksi delete trip --yes
"""
)
@click.argument("session", shell_complete=complete_session)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_settings
def delete(settings: Settings, session: str, yes: bool, as_json: bool) -> None:
    """Delete the conversation SESSION for good: prompts, answers, files of answers, and its traces in chains.

    Its tokens and cost stay in the account, without its name. Traces that KSI cannot reach are listed, with the way to
    remove them. Nothing is deleted while a request of it has not ended, or while forks of it are kept.
    """
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("a deletion cannot be undone: without a terminal for the question, give --yes")
    if not yes and not click.confirm(f"delete {session} for good?", default=False, err=True):
        raise SystemExit(Exit.CANCELLED)
    reply = asyncio.run(_send(settings, "conversation:delete", {"session_id": session}))
    if as_json:
        json_line(reply)
        return
    turns, requests = reply.get("turns", 0), reply.get("requests", 0)
    say(f"deleted {reply['session_id']}: {_count(turns, 'turn')}, {_count(requests, 'request')}")
    remains = reply.get("remains", ())
    if remains:
        say("Traces that KSI cannot reach:")
    for left in remains:
        say(f"- {left['what']}: {left['where']}")
        say(f"  {left['how']}", style=painter().dim)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


async def _send(settings: Settings, event: str, data: Json) -> dict[str, Any]:
    async with settings.client() as client:
        return await send_named(client, event, data, "session_id", "conversation", changes=True)
