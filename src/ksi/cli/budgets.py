"""`ksi budgets`: how far each budget is; set, drop and raise them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import click

from ksi.cli.pauses import Until
from ksi.cli.render import Painter, clock_time, json_line, painter, say
from ksi.cli.settings import Settings, json_option, own_name, pass_settings
from ksi.cli.status import ask_one

Json = Mapping[str, Any]

BAR = 24
"""Characters of a bar."""


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  ksi budgets
  ksi budgets set night --scope 'agent:*' --usd 5 --per day
  ksi budgets raise night 2.50 --agent nightly --until 07:30 --why "the release"
  ksi budgets drop night
""",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Lines of each budget.")
@json_option
@pass_settings
@click.pass_context
def budgets(ctx: click.Context, settings: Settings, limit: int, as_json: bool) -> None:
    """Show the state of each budget: a bar, the rest, the time of its reset, and a forecast from the last hours."""
    if ctx.invoked_subcommand is None:
        _show(asyncio.run(ask_one(settings, "budget:status", {"limit": limit})), as_json=as_json)


@budgets.command(
    "set",
    epilog="""\b
Examples:
  ksi budgets set all --usd 20 --per day --on-exceed refuse
  ksi budgets set helpers --scope 'agent:helper-*' --tokens 2000000 --per hour
""",
)
@click.argument("name")
@click.option(
    "--scope", default="all", show_default=True, metavar="WHO", help="all, agent:NAME, agent:*, model:NAME..."
)
@click.option("--usd", type=click.FloatRange(min=0, min_open=True), help="US dollars.")
@click.option("--tokens", type=click.IntRange(min=1), help="Input and output tokens.")
@click.option("--requests", type=click.IntRange(min=1), help="Calls of providers.")
@click.option("--per", type=click.Choice(["hour", "day", "week", "month"]), default="day", show_default=True)
@click.option(
    "--time-zone",
    default="",
    metavar="ZONE",
    help="The calendar's zone, as Europe/Berlin; the default is this machine's.",
)
@click.option("--on-exceed", type=click.Choice(["wait", "refuse"]), default="wait", show_default=True)
@click.option("--warn-at", multiple=True, type=click.FloatRange(0, 1, min_open=True), help="Shares to warn at.")
@click.option("--unpriced", type=click.FloatRange(min=0), help="US dollars for a million tokens without a price.")
@json_option
@pass_settings
def set_(settings: Settings, /, name: str, as_json: bool, **wishes: Any) -> None:
    """Make a budget, or change one that was set before. It holds at all daemons of the store and over restarts."""
    data = {key: value for key, value in wishes.items() if value not in (None, "", ())}
    reply = asyncio.run(ask_one(settings, "budget:set", {"budget": name, "by": own_name(), **data}))
    _show(reply, as_json=as_json)


@budgets.command()
@click.argument("name")
@json_option
@pass_settings
def drop(settings: Settings, name: str, as_json: bool) -> None:
    """Forget a budget that was set. One of the same name in ksi.toml holds again."""
    _show(asyncio.run(ask_one(settings, "budget:drop", {"budget": name})), as_json=as_json)


@budgets.command(
    "raise",
    epilog="""\b
Examples:
  ksi budgets raise night 5
  ksi budgets raise night 5 --agent nightly --until 07:30 --why "the release"
""",
)
@click.argument("name")
@click.argument("amount", type=click.FloatRange(min=0, min_open=True))
@click.option("--scope", metavar="WHO", help="The one whose limit is raised, as agent:nightly; the default is all.")
@click.option("--agent", metavar="NAME", help="The same as --scope agent:NAME.")
@click.option("--until", type=Until(), metavar="TIME", help="Until then: 18:00, 2026-11-30; else the window's end.")
@click.option("--why", default="", help="The reason, for other operators.")
@json_option
@pass_settings
def raise_(
    settings: Settings,
    name: str,
    amount: float,
    scope: str | None,
    agent: str | None,
    until: datetime | None,
    why: str,
    as_json: bool,
) -> None:
    """Let a budget have AMOUNT more, in its own unit, until its window ends or until a time."""
    if scope is not None and agent is not None:
        raise click.UsageError("--scope and --agent say the same; give one of them")
    who = scope if agent is None else f"agent:{agent}"
    seconds = None if until is None else (until - datetime.now().astimezone()).total_seconds()
    wishes = {"scope": who, "seconds": seconds, "why": why or None}
    data = {key: value for key, value in wishes.items() if value is not None}
    reply = asyncio.run(ask_one(settings, "budget:raise", {"budget": name, "amount": amount, "by": own_name(), **data}))
    _show(reply, as_json=as_json)


def _show(reply: Json, *, as_json: bool) -> None:
    if as_json:
        json_line(reply)
        return
    if not reply["budgets"]:
        say("no budgets: nothing is limited; `ksi budgets set --help` says how to make one")
    for line in lines(reply, painter()):
        say(line)


def lines(reply: Json, paint: Painter) -> Iterator[str]:
    """Each budget, with a bar for each whom it binds."""
    for budget in reply["budgets"]:
        unit = budget["unit"]
        what = f"{shown(unit, budget['limit'])} per {budget['per']}"
        yield f"{paint.bold(budget['budget'])}  {budget['scope']}, {what}, then {budget['on_exceed']}"
        yield f"  reset at {clock_time(budget['resets_at'])}"
        for one in budget["subjects"]:
            yield from _subject(unit, one)
        for one in budget.get("raises", ()):
            by = f" by {one['by']}" if one.get("by") else ""
            why = f": {one['why']}" if one.get("why") else ""
            who = f" for {one['scope']}" if one.get("scope") else ""
            yield f"  raised by {shown(unit, one['amount'])}{who} until {clock_time(one['until'])}{by}{why}"


def _subject(unit: str, one: Json) -> Iterator[str]:
    share = one["used"] / one["limit"] if one["limit"] else 1.0
    filled = min(BAR, round(BAR * min(1.0, share)))
    yield f"  {'█' * filled}{'·' * (BAR - filled)} {share:4.0%}  {one['scope']}"
    words = f"{shown(unit, one['used'])} of {shown(unit, one['limit'])}, {shown(unit, one['left'])} left"
    words += f", {shown(unit, one['reserved'])} set aside" if one.get("reserved") else ""
    words += f", {one['waiting']} waiting" if one.get("waiting") else ""
    yield f"    {words}"
    if one.get("exhausted_at") is not None:
        yield f"    as in the last hours: used up at {clock_time(one['exhausted_at'])}"
    elif one.get("forecast") is not None:
        yield f"    as in the last hours: {shown(unit, one['forecast'])} at the end"


def shown(unit: str, value: float) -> str:
    """An amount for people."""
    if unit != "usd":
        return f"{value:,.0f} {unit}"
    return f"${value:,.2f}" if value >= 1 or value == 0 else f"${value:.4f}"
