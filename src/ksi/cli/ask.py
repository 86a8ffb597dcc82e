"""`ksi ask`: one question, its answer as it comes."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.render import json_line, note, visible
from ksi.cli.settings import PATIENCE, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.client import Client, Handle
    from ksi.event_types import RequestReply

PRIORITIES = ("critical", "high", "normal", "low", "background")
CANCEL_WAIT = 5.0
"""Seconds that Ctrl-C gives the daemon to confirm."""

EPILOG = """\b
Examples:
  ksi ask "Name three colours"
  ksi ask --session trip "Where should I go in May?"
  ksi ask --session trip "And by train?"
  cat report.txt | ksi ask "Summarise this"
  ksi ask --model claude-cli/haiku --priority high "..."
  ksi ask --json "..." | jq .usage
"""


@click.command(epilog=EPILOG)
@click.argument("prompt", nargs=-1)
@click.option("-s", "--session", metavar="NAME", help="The conversation to go on with, or to begin.")
@click.option("-m", "--model", metavar="PROVIDER/MODEL", help="Who answers; else the configured default.")
@click.option("-p", "--priority", type=click.Choice(PRIORITIES, case_sensitive=False), help="Else normal.")
@click.option("--system", metavar="TEXT", help="Instructions that stand above the conversation.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="The longest answer.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is whole.")
@click.option("--no-start", is_flag=True, help="Do not start the daemon where none runs.")
@json_option
@pass_settings
def ask(
    settings: Settings,
    /,
    prompt: tuple[str, ...],
    no_stream: bool,
    no_start: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a model and print its answer as it comes.

    The prompt is what stands on the command line, what comes on stdin, or both, one after the other. The daemon is
    started where none runs. Ctrl-C cancels the request.

    Should the answer begin anew in mid-text (a provider failed and another took over), a line on stderr says so, and
    the text that counts is what follows; --no-stream and --json print that alone.
    """
    fields = {name: value for name, value in options.items() if value is not None}
    if "session" in fields:
        fields["session_id"] = fields.pop("session")
    fields["stream"] = not (no_stream or as_json)
    text = _prompt(" ".join(prompt))
    reply = asyncio.run(_ask(settings, text, fields, start=not no_start))
    if as_json:
        json_line(reply)
    elif no_stream:
        print(_shown(reply.result or ""))


def _prompt(words: str) -> str:
    """What to ask: the command line's words, then stdin."""
    piped = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"stdin is not UTF-8 text: {error}") from None
    parts = [part for part in (words, piped) if part.strip()]
    if not parts:
        raise click.UsageError('say what to ask: ksi ask "Name three colours"')
    return "\n\n".join(parts)


async def _ask(settings: Settings, prompt: str, fields: dict[str, Any], *, start: bool) -> RequestReply:
    from ksi.clock import Chance, SystemClock

    # Made here, so that Ctrl-C can cancel a request whose submission was not answered yet.
    request_id = Chance().identifier("req", SystemClock().now())
    client = await _connected(settings, start=start)
    async with client:
        try:
            handle = await client.submit(prompt, **{**fields, "request_id": request_id})
            _tell_waiting(handle)
            if fields["stream"]:
                await _print_stream(handle)
            return await handle.result()
        except asyncio.CancelledError:
            await _cancel(client, request_id)
            raise


async def _connected(settings: Settings, *, start: bool) -> Client:
    from ksi.errors import ConnectionFailed

    client = settings.client(patience=PATIENCE)
    try:
        await client.open()
    except ConnectionFailed:
        if not start:
            raise
        from ksi.cli.background import start_daemon

        note("starting the daemon...")
        await asyncio.to_thread(start_daemon, settings.config)
        await client.open()
    return client


def _tell_waiting(handle: Handle) -> None:
    if handle.submitted.get("status") != "queued" or not sys.stderr.isatty():
        return
    before, holder = handle.submitted.get("position"), handle.submitted.get("holder")
    words = "waiting for its turn"
    if before:
        words += f", {before} before it"
    if holder:
        words += f"; {holder} has the conversation"
    note(f"{words} (Ctrl-C cancels)")


async def _print_stream(handle: Handle) -> None:
    written = ""
    try:
        async for chunk in handle.chunks():
            if chunk.restarted:
                sys.stdout.write("\n")
                sys.stdout.flush()
                note("ksi: the answer begins anew; what stands above does not count")
            text = _shown(chunk.text)
            written = text or written
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        if written and not written.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()


def _shown(text: str) -> str:
    """A model's text: as it is for a program, without terminal commands for a person."""
    return visible(text, keep="\n\t") if sys.stdout.isatty() else text


async def _cancel(client: Client, request_id: str) -> None:
    from ksi.errors import KsiError

    try:
        reply = await client.send_event("completion:cancel", {"request_id": request_id}, timeout=CANCEL_WAIT)
    except KsiError as error:
        note(f"ksi: {request_id} could not be cancelled: {error.message}")
    else:
        note(f"ksi: {request_id} {reply.get('state', 'cancelled')}")
