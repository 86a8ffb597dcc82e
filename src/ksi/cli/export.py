"""`ksi export`: a conversation as a file that can be read without KSI."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ksi.cli.completing import complete_session
from ksi.cli.dialogue import turns_of
from ksi.cli.render import note, write_file
from ksi.cli.requests import in_lines
from ksi.cli.settings import Exit, Settings, json_option, pass_settings
from ksi.cli.status import ask_named

Json = Mapping[str, Any]

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r"^(#{1,6} )")


@click.command(
    epilog="""\b
Examples:
  ksi export trip > trip.md
  ksi export trip -o trip.md
  ksi export trip --json -o trip.json
"""
)
@click.argument("session", shell_complete=complete_session)
@click.option(
    "-o",
    "--output",
    default="-",
    metavar="FILE",
    help="A new file that only you can read. The default, also written as -, is stdout.",
)
@json_option
@pass_settings
def export(settings: Settings, session: str, output: str, as_json: bool) -> None:
    """Write the conversation SESSION as Markdown to read, or with --json completely: every block of every turn.

    The file has the completed turns, the oldest first, including those of the conversation that it was forked from.
    """
    about, turns = asyncio.run(_whole(settings, session))
    text = _as_json(about, turns) if as_json else _as_markdown(about, turns)
    try:
        write_file(output, text)
    except OSError as error:
        note(f"ksi: {output} cannot be written: {error.strerror}")
        raise SystemExit(Exit.FAILED) from None


async def _whole(settings: Settings, session: str) -> tuple[Json, list[Json]]:
    about = await ask_named(
        settings, "completion:session_status", {"session_id": session}, "session_id", "conversation"
    )
    turns, _ = await turns_of(settings, about["session_id"], None)
    return about, turns[::-1]


def _as_json(about: Json, turns: Sequence[Json]) -> Iterator[str]:
    """One object: the known facts of the conversation, and its turns."""
    head = {name: value for name, value in about.items() if name not in ("turns", "warnings", "locked")}
    yield json.dumps({**head, "turns": list(turns)}, ensure_ascii=False, indent=2) + "\n"


def _as_markdown(about: Json, turns: Sequence[Json]) -> Iterator[str]:
    yield f"# {about['session_id']}\n"
    if about.get("forked_from"):
        yield f"\nForked from {about['forked_from']}.\n"
    for number, turn in enumerate(turns, 1):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(turn["finished_at"]))
        who = f", asked by {turn['agent_id']}" if turn.get("agent_id") else ""
        yield f"\n## {number}. {when}, {turn['provider']}{who}\n"
        for reminder in turn.get("reminders", ()):
            yield _part("Delivered before it", reminder)
        yield from _asked(turn.get("content") or {})
        yield _part("Answer", in_lines(turn.get("blocks")) or turn.get("result"))


def _asked(content: Json) -> Iterator[str]:
    native = content.get("native") or {}
    if native:
        yield _part("Request", "```json\n" + json.dumps(native.get("body"), ensure_ascii=False, indent=2) + "\n```")
        return
    if content.get("system") is not None:
        yield _part("System", in_lines(content["system"]))
    if content.get("prompt") is not None:
        yield _part("Prompt", content["prompt"])
    for message in content.get("messages") or ():
        yield _part(str(message.get("role")).capitalize(), in_lines(message.get("content")))


def _part(title: str, text: object) -> str:
    return f"\n### {title}\n\n{_quiet(str(text or ''))}\n"


def _quiet(text: str) -> str:
    """A text whose own headings are not taken for those of this file, and whose last code ends with it.

    Within code nothing is changed. An answer that was cut in the middle of its code would take in all that follows.
    """
    fence = ""
    lines: list[str] = []
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if fence:
            # Only a line of the same sign, as long and with nothing behind it, ends code.
            if found is not None and found[1].startswith(fence) and not line[found.end() :].strip():
                fence = ""
        elif found is not None:
            fence = found[1]
        else:
            lines.append(_HEADING.sub(r"\\\1", line))
            continue
        lines.append(line)
    return "\n".join([*lines, *([fence] if fence else [])])
