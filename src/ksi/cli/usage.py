"""`ksi usage`: tokens and cost of completions, in tables and over time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click

from ksi.cli.budgets import shown
from ksi.cli.completing import complete_agent, complete_model, complete_provider, complete_request, complete_session
from ksi.cli.ids import Kind, whole_id
from ksi.cli.render import clock_time, figures, json_line, note, say, table
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.errors import RemoteError

Json = Mapping[str, Any]
GROUPINGS = {"agent": "agent_id", "model": "model", "provider": "provider", "session": "session_id"}
COLUMNS = ("requests", "attempts", "in", "out", "cache read", "cache write", "cost", "unknown")

BAR = 40
"""Maximum length of a bar in characters."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def _number(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN: every comparison with it is false, so no range check does."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number of hours")
    return value


@click.command(
    epilog="""\b
Examples:
  ksi usage
  ksi usage --hours 168 --by agent
  ksi usage --model claude-cli/haiku --by session --bucket 15
  ksi usage --hours 720 --json | jq .totals.cost_usd

\b
Attempts without a report are unknown, and models without a price have no cost: both are counted, but in no sum.
"""
)
@click.option(
    "--hours",
    type=click.FloatRange(0, 100_000, min_open=True),
    callback=_number,
    default=24.0,
    show_default=True,
    help="The number of hours to look back.",
)
@click.option("--by", type=click.Choice(list(GROUPINGS)), help="A single table, grouped by this.")
@click.option(
    "--bucket", type=click.IntRange(1), metavar="MINUTES", help="Minutes of a bar; the default fits the window."
)
@click.option("--agent", metavar="NAME", shell_complete=complete_agent, help="Only requests of this agent.")
@click.option(
    "--model",
    metavar="NAME",
    shell_complete=complete_model,
    help="Only this model, by the name in the request or in the answer.",
)
@click.option("--provider", metavar="NAME", shell_complete=complete_provider, help="Only attempts at this provider.")
@click.option("--session", metavar="NAME", shell_complete=complete_session, help="Only requests of this conversation.")
@click.option("--chain", metavar="ID", shell_complete=complete_request, help="Only this chain's requests.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Rows in a table.")
@json_option
@pass_settings
def usage(
    settings: Settings,
    hours: float,
    by: str | None,
    bucket: int | None,
    agent: str | None,
    model: str | None,
    provider: str | None,
    session: str | None,
    chain: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show tokens and dollars: in total, by agent, model, provider and conversation, over time, and the share of
    MCP."""
    wishes = {
        "hours": hours,
        "group_by": by,
        "bucket_minutes": bucket,
        "agent_id": agent,
        "model": model,
        "provider": provider,
        "session_id": session,
        "chain_id": chain,
        "limit": limit,
    }
    data = {name: value for name, value in wishes.items() if value is not None}
    reply = asyncio.run(_report(settings, data))
    if as_json:
        json_line(reply)
        return
    _totals(reply)
    for name in GROUPINGS if by is None else (by,):
        _group(name, reply)
    _trend(reply)
    _mcp(reply["mcp"])
    _budgets(reply.get("budgets", ()))


async def _report(settings: Settings, data: dict[str, Any]) -> dict[str, Any]:
    async with settings.client() as client:
        for field, kind in (("chain_id", "request"), ("session_id", "conversation")):
            if field in data:
                data[field] = await whole_id(client, data[field], cast(Kind, kind))
        reply = await client.send_event("completion:token_usage", data)
        # A daemon of before has no budgets.
        with contextlib.suppress(RemoteError):
            reply["budgets"] = (await client.send_event("budget:status", {"limit": 3}))["budgets"]
        return reply


def _budgets(found: Sequence[Json]) -> None:
    if not found:
        return
    say()
    rows = [
        (
            budget["budget"],
            one["scope"],
            shown(budget["unit"], one["used"]),
            shown(budget["unit"], one["limit"]),
            clock_time(budget["resets_at"]),
        )
        for budget in found
        for one in budget["subjects"]
    ]
    table(("budget", "for", "used", "limit", "begins anew"), rows, title="budgets (see `ksi budgets`)")


def _totals(reply: Json) -> None:
    totals, fenced = reply["totals"], reply["fenced"]
    figures(
        {
            "since": clock_time(reply["since"]),
            "requests": f"{totals['requests']:,}",
            "attempts": f"{totals['attempts']:,}",
            "of them unknown": _count(totals["unknown_attempts"]),
            "of them without a price": _count(totals["unpriced_attempts"]),
            "input tokens": f"{totals['input_tokens']:,}",
            "output tokens": f"{totals['output_tokens']:,}",
            "read from cache": _count(totals["cache_read_tokens"]),
            "written to cache": _count(totals["cache_write_tokens"]),
            "reasoning": _count(totals["reasoning_tokens"]),
            "cost": _cost(totals),
            "saved by caches": _dollars(totals["cache_saved_usd"] or None),
            "answers that came too late": _late(fenced) if fenced["attempts"] else None,
        }
    )
    if reply["complete_since"] > reply["since"]:
        note(f"only attempts are kept that ended since {clock_time(reply['complete_since'])} (see retention.sessions)")


def _late(fenced: Json) -> str:
    return f"{fenced['attempts']:,} ({fenced['total_tokens']:,} tokens, {_cost(fenced)}), in the sums too"


def _group(name: str, reply: Json) -> None:
    rows = reply.get(f"by_{name}", [])
    if not rows:
        return
    say()
    table((name, *COLUMNS), [(row[GROUPINGS[name]], *_columns(row)) for row in rows], title=f"by {name}")
    if name in reply["more"]:
        note(f"there are more; see them with --by {name} --limit 1000")


def _columns(row: Json) -> Sequence[object]:
    return (
        f"{row['requests']:,}",
        f"{row['attempts']:,}",
        f"{row['input_tokens']:,}",
        f"{row['output_tokens']:,}",
        f"{row['cache_read_tokens']:,}",
        f"{row['cache_write_tokens']:,}",
        _cost(row),
        _count(row["unknown_attempts"]),
    )


# -- over time ----------------------------------------------------------------------------------------------------


def _trend(reply: Json) -> None:
    buckets = reply["trend"]
    most = max((bucket["total_tokens"] for bucket in buckets), default=0)
    if not most:
        return
    say()
    minutes = reply["bucket_minutes"]
    table(
        ("from", "tokens", "cost", "requests", ""),
        [
            (
                _bucket_time(bucket["start"], minutes),
                f"{bucket['total_tokens']:,}",
                _cost(bucket) if bucket["attempts"] else None,
                _count(bucket["requests"]),
                bar(bucket["total_tokens"] / most),
            )
            for bucket in buckets
        ],
        title=f"tokens every {_span(minutes)}",
    )


def bar(share: float) -> str:
    """A bar for a share of the whole length: in eighths of a character for a person, plain elsewhere."""
    if not sys.stdout.isatty():
        return "#" * round(share * BAR)
    full, rest = divmod(round(share * BAR * 8), 8)
    return _EIGHTHS[8] * full + (_EIGHTHS[rest] if rest else "")


def _bucket_time(start: float, minutes: int) -> str:
    form = "%Y-%m-%d" if minutes % 1_440 == 0 else "%m-%d %H:%M"
    return time.strftime(form, time.localtime(start))


def _span(minutes: int) -> str:
    for length, unit in ((10_080, "week"), (1_440, "day"), (60, "hour")):
        if minutes % length == 0:
            return unit if minutes == length else f"{minutes // length} {unit}s"
    return f"{minutes} minutes" if minutes > 1 else "minute"


# -- MCP ----------------------------------------------------------------------------------------------------------


def _mcp(mcp: Json) -> None:
    totals = mcp["totals"]
    if not totals["attempts"]:
        return
    say()
    figures(
        {
            "requests": f"{totals['requests']:,}",
            "tokens": f"{totals['total_tokens']:,}",
            "read from cache": f"{totals['cache_read_tokens']:,}",
            "saved by caches": _dollars(totals["cache_saved_usd"]),
            "cost": _cost(totals),
        },
        title="with MCP servers",
    )
    say()
    columns = ("provider", "model", "attempts", "tokens a request", "tokens in all", "turns with", "turns without")
    table(columns, map(_definitions, mcp["definitions"]), title="the cost of the tools' definitions")


def _definitions(row: Json) -> Sequence[object]:
    return (
        row["provider"],
        row["model"],
        f"{row['attempts']:,}",
        _measured(row["tokens_per_request"]),
        _measured(row["tokens"]),
        _sample(row["with_mcp"]),
        _sample(row["without_mcp"]),
    )


def _measured(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}"


def _sample(sample: Json) -> str:
    if sample["input_tokens"] is None:
        return "none"
    return f"{sample['turns']:,} (median {sample['input_tokens']:,.0f})"


# -- words --------------------------------------------------------------------------------------------------------


def _count(value: int) -> str | None:
    return f"{value:,}" if value else None


def _dollars(value: float | None) -> str | None:
    if value is None:
        return None
    return f"${value:,.2f}" if value >= 100 else f"${value:.4f}"


def _cost(row: Json) -> str:
    """The known cost; a plus says that a part is unknown."""
    if row["cost_usd"] is None:
        return "unknown"
    more = "+" if row["unpriced_attempts"] or row["unknown_attempts"] else ""
    return f"{_dollars(row['cost_usd'])}{more}"
