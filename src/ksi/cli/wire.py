"""`ksi send` and `ksi watch`: events of the wire, sent and shown directly."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.completing import complete_event
from ksi.cli.render import clock_time, json_line, note, say
from ksi.cli.settings import PATIENCE, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.client import Client, Event

SHOWN_TEXT = 60


@click.command(
    epilog="""\b
Examples:
  ksi send completion:status
  ksi send completion:async '{"prompt": "Research task", "priority": "high"}'
  ksi send completion:async '{"prompt": "Hello", "stream": true}' --follow
  ksi send completion:get - < request.json
  ksi events completion:async        the fields of its data
"""
)
@click.argument("event", shell_complete=complete_event)
@click.argument("data", metavar="[JSON|-]", default="{}")
@click.option("--follow", is_flag=True, help="Print pushed events afterwards; see above.")
@pass_settings
@click.pass_context
def send(ctx: click.Context, settings: Settings, event: str, data: str, follow: bool) -> None:
    """Send EVENT with the data JSON (- reads it from stdin) and print the reply's data, or the error, as JSON.

    With --follow, each event pushed to this connection is printed after it: until the request's result if EVENT is
    completion:async, otherwise until Ctrl-C.
    """
    ctx.meta["ksi.json"] = True  # an error is an answer here
    asyncio.run(_send(settings, event, _data(data), follow))


def _data(text: str) -> dict[str, Any]:
    import msgspec

    raw = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(f"the data must be a JSON object: {error}") from None


async def _send(settings: Settings, event: str, data: dict[str, Any], follow: bool) -> None:
    async with settings.client(patience=PATIENCE) as client:
        if not follow:
            json_line(await client.send_event(event, data))
            return
        async with client.pushes() as pushed:
            reply = await client.send_event(event, data)
            json_line(reply)
            last = reply.get("request_id") if event == "completion:async" else None
            async for push in pushed:
                json_line({"event": push.event, "data": push.data, "timestamp": push.timestamp})
                if last is not None and push.event == "completion:result" and push.data.get("request_id") == last:
                    return


@click.command(
    epilog="""\b
Examples:
  ksi watch
  ksi watch 'completion:*' conversation:forked
  ksi watch --json completion:result | jq .data.usage
"""
)
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@json_option
@pass_settings
def watch(settings: Settings, patterns: tuple[str, ...], as_json: bool) -> None:
    """Print events as they happen whose names match a PATTERN (* stands for anything), until Ctrl-C.

    A lost connection is made again; a line on stderr then says that events may be missing.
    """
    asyncio.run(_watch(settings.client(patience=math.inf), patterns, as_json))


async def _watch(client: Client, patterns: tuple[str, ...], as_json: bool) -> None:
    async with client, client.subscribe(*patterns) as events:
        gaps = 0
        async for event in events:
            if events.gaps != gaps:
                gaps = events.gaps
                note("ksi: the connection was lost for a time; events may be missing")
            if as_json:
                json_line({"event": event.event, "data": event.data, "timestamp": event.timestamp})
            else:
                say(_line(event))


def _line(event: Event) -> str:
    """An event on one line, with long texts cut."""
    words = [clock_time(event.timestamp) or "", event.event]
    for name, value in event.data.items():
        if value is None or value == [] or value == {}:
            continue
        words.append(f"{name}={_short(value)}")
    return "  ".join(words[:2]) + "  " + " ".join(words[2:])


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)}]"
    text = str(value.get("code", "...") if isinstance(value, dict) else value)
    return text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + "…"
