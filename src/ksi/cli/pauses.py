"""`ksi pause`, `ksi resume` and `ksi drain`: hold the queue back, and let it continue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime, time, timedelta
from typing import Any, TypeVar

import click

from ksi.cli.completing import complete_agent, complete_provider, complete_session
from ksi.cli.render import json_line, say
from ksi.cli.service import STOP_TIMEOUT, stop_and_tell
from ksi.cli.settings import Exit, Settings, json_option, own_name, pass_settings
from ksi.cli.status import ask_one
from ksi.request import PRIORITY_WORDS

Json = Mapping[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])


def thing_options(command: Command) -> Command:
    """The options that name the scope of a pause."""
    for option in (
        click.option("--priority", type=click.Choice(list(PRIORITY_WORDS)), help="Requests of this priority."),
        click.option("--session", "session_id", metavar="NAME", shell_complete=complete_session, help="This session."),
        click.option(
            "--agent", "agent_id", metavar="NAME", shell_complete=complete_agent, help="Requests of this agent."
        ),
        click.option("--provider", metavar="NAME", shell_complete=complete_provider, help="This provider."),
    ):
        command = option(command)
    return command


def time_meant(text: str, now: datetime) -> datetime:
    """The next occurrence of a time of day, or a date with or without a time; in the zone of `now` unless it names one.

    Raises:
        ValueError: it is no time.
    """
    if len(text) <= len("10:04:00"):
        at = datetime.combine(now.date(), time.fromisoformat(text), now.tzinfo)
        return at if at > now else at + timedelta(days=1)
    at = datetime.fromisoformat(text)
    return at if at.tzinfo is not None else at.replace(tzinfo=now.tzinfo)


class Until(click.ParamType[datetime]):
    """A time in the future."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The named time."""
        now = datetime.now().astimezone()
        try:
            until = time_meant(value, now)
        except ValueError:
            self.fail(f"{value!r} is no time; write 18:00, 2026-11-30, or 2026-11-30T18:00", param, ctx)
        if until <= now:
            self.fail(f"{value} is over", param, ctx)
        return until


@click.command(
    epilog="""\b
Examples:
  ksi pause --why "the bill"
  ksi pause --agent nightly --for 3600
  ksi pause --agent nightly --until 07:30
  ksi pause --priority background
  ksi pause --list
"""
)
@thing_options
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End the pause after this time.",
)
@click.option(
    "--until", type=Until(), metavar="TIME", help="End the pause at this time: 18:00, 2026-11-30, or 2026-11-30T18:00."
)
@click.option("--why", default="", help="The reason, for other operators.")
@click.option("--list", "only_list", is_flag=True, help="Only show what is paused.")
@json_option
@pass_settings
def pause(
    settings: Settings,
    provider: str | None,
    agent_id: str | None,
    session_id: str | None,
    priority: str | None,
    seconds: float | None,
    until: datetime | None,
    why: str,
    only_list: bool,
    as_json: bool,
) -> None:
    """Hold requests back: all, or those of one provider, agent, session or priority.

    Running requests continue, waiting ones keep their places, and new ones are accepted and wait. A pause holds for all
    daemons of the store and across restarts, until `ksi resume`.
    """
    if only_list:
        _show(asyncio.run(ask_one(settings, "queue:pauses")), as_json=as_json)
        return
    if until is not None:
        if seconds is not None:
            raise click.UsageError("--for and --until both set the end; give one of them")
        seconds = (until - datetime.now().astimezone()).total_seconds()
    thing = _thing(provider, agent_id, session_id, priority)
    more = {"seconds": seconds, "why": why, "by": own_name()}
    data = thing | {key: value for key, value in more.items() if value}
    _show(asyncio.run(ask_one(settings, "queue:pause", data)), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  ksi resume
  ksi resume --agent nightly
"""
)
@thing_options
@json_option
@pass_settings
def resume(
    settings: Settings,
    provider: str | None,
    agent_id: str | None,
    session_id: str | None,
    priority: str | None,
    as_json: bool,
) -> None:
    """End a pause: that of everything, or the named one. Each pause is ended by its own name."""
    thing = _thing(provider, agent_id, session_id, priority)
    _show(asyncio.run(ask_one(settings, "queue:resume", thing)), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  ksi drain --stop
  ksi drain --timeout 600
  ksi drain --cancel
"""
)
@click.option("--cancel", is_flag=True, help="Accept work again.")
@click.option("--stop", is_flag=True, help="Stop the daemon when no request runs.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Return after this time in any case.",
)
@json_option
@pass_settings
@click.pass_context
def drain(
    ctx: click.Context, settings: Settings, cancel: bool, stop: bool, timeout: float | None, as_json: bool
) -> None:
    """Let this daemon accept no new work, and return when no request runs there any more.

    Waiting requests stay in the queue: another daemon of the store takes them, or this one after `ksi drain --cancel`
    or its next start. Exit code 6 means that requests still run after `--timeout`; the drain continues.
    """
    if cancel and (stop or timeout is not None):
        raise click.UsageError("--cancel ends a drain; it cannot be combined with another option")
    if cancel:
        _show(asyncio.run(ask_one(settings, "queue:undrain")), as_json=as_json)
        return
    data = {} if timeout is None else {"timeout": timeout}
    reply = asyncio.run(ask_one(settings, "queue:drain", data))
    _show(reply, as_json=as_json)
    if reply.get("running") or not reply.get("draining"):
        # A request still runs, or another client cancelled the drain meanwhile.
        ctx.exit(Exit.LATER)
    if stop:
        stop_and_tell(settings, STOP_TIMEOUT)


def _thing(
    provider: str | None, agent_id: str | None, session_id: str | None, priority: str | None
) -> dict[str, object]:
    named = {"provider": provider, "agent_id": agent_id, "session_id": session_id, "priority": priority}
    return {key: value for key, value in named.items() if value is not None}


def _show(reply: Json, *, as_json: bool) -> None:
    if as_json:
        json_line(reply)
        return
    for one in reply.get("paused") or ():
        say(one["sentence"])
    if not reply.get("paused"):
        say("nothing is paused")
    if reply.get("draining"):
        say("the daemon drains: it accepts no new work")
    running, waiting = reply.get("running", 0), reply.get("waiting", 0)
    say(f"{running} {'runs' if running == 1 else 'run'}, {waiting} {'waits' if waiting == 1 else 'wait'}")
