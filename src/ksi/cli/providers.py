"""`ksi providers`, `ksi retries` and `ksi requeue`: the state of providers, the requests that wait for them, and
repeated requests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import click

from ksi.cli.completing import complete_provider, complete_request
from ksi.cli.lists import page_options, print_list
from ksi.cli.render import clock_time, duration, figures, json_line, note, table
from ksi.cli.settings import Settings, json_option, own_name, pass_settings
from ksi.cli.status import ask_each, ask_one

Json = Mapping[str, Any]
ACTIONS = ("disable", "enable", "reset")


@click.command(
    epilog="""\b
Examples:
  ksi providers
  ksi providers disable team --why "the bill"
  ksi providers reset claude-cli
  ksi providers --json | jq '.providers.team.latency_ms'
"""
)
@click.argument("action", type=click.Choice(ACTIONS), required=False)
@click.argument("name", required=False, shell_complete=complete_provider)
@click.option("--why", default="", help="The reason, for other operators.")
@json_option
@pass_settings
def providers(settings: Settings, action: str | None, name: str | None, why: str, as_json: bool) -> None:
    """Show the state of each provider, or change that of the one called NAME.

    \b
    disable  send it no new requests until it is enabled, across restarts too; running ones continue
    enable   send it requests again
    reset    forget its failures and its limits, and try it at once
    """
    if action is None:
        reply = asyncio.run(ask_one(settings, "completion:provider_status"))
        if as_json:
            json_line(reply)
        else:
            _print(reply.get("providers", {}))
        return
    if name is None:
        raise click.UsageError(f"which provider? ksi providers {action} NAME")
    data = {"provider": name}
    if action != "reset":
        data |= {key: value for key, value in {"by": own_name(), "why": why}.items() if value}
    report = asyncio.run(ask_one(settings, f"provider:{action}", data))
    if as_json:
        json_line(report)
    else:
        figures({name: _state(report)})


def _print(reports: Mapping[str, Json]) -> None:
    columns = ("provider", "kind", "state", "running", "calls", "success", "p50", "p95", "first text", "last error")
    table(columns, [_row(name, report) for name, report in reports.items()])
    for name, report in reports.items():
        if report.get("account") is not None:
            note(f"{name} ({report.get('source')}): {report['account']}")
        if report.get("disabled"):
            note(str(report["disabled"]))
        if report.get("problem"):
            note(f"{name}: {report['problem']}")
        for limit in report.get("limits") or ():
            note(f"{name}: {limit['sentence']}")
        own = report.get("own") or {}
        if "warm" in own:
            note(
                f"{name}: {own.get('working')} processes at work, {own['warm']} of at most {own.get('warm_limit')} "
                f"kept warm, {own.get('memory_bytes', 0) / 1e6:,.0f} MB in all"
            )


def _row(name: str, report: Json) -> Sequence[object]:
    rate = report.get("success_rate")
    latency = report.get("latency_ms") or {}
    first = report.get("time_to_first_token_ms") or {}
    error = report.get("last_error") or {}
    return (
        name,
        report.get("kind"),
        _state(report),
        f"{report.get('running')}/{report.get('max_concurrency')}",
        report.get("calls"),
        None if rate is None else f"{rate:.1%}",
        _milliseconds(latency.get("p50")),
        _milliseconds(latency.get("p95")),
        _milliseconds(first.get("p50")),
        f"{clock_time(error.get('at'))} {error.get('code')}" if error else None,
    )


def _state(report: Json) -> str:
    """The state in a word, and its end."""
    if not report.get("enabled"):
        return "disabled"
    if report.get("paused"):
        return "paused"
    if report.get("parked_until") is not None:
        return f"parked until {clock_time(report['parked_until'])}"
    if report.get("open_until") is not None:
        return f"circuit open until {clock_time(report['open_until'])}"
    return {"closed": "healthy", "half_open": "probed"}.get(str(report.get("breaker")), str(report.get("breaker")))


def _milliseconds(value: float | None) -> str | None:
    return None if value is None else duration(value / 1000)


@click.command(
    epilog="""\b
Examples:
  ksi retries
  ksi retries --all --json | jq -r 'select(.error == "overloaded") | .request_id'
"""
)
@page_options
@json_option
@pass_settings
def retries(settings: Settings, limit: int, everything: bool, as_json: bool) -> None:
    """Show the requests that wait for a retry or a quota, the soonest first: why, since when, and until when."""
    columns = ("request", "status", "conversation", "model", "attempt", "since", "until", "error", "message")
    asyncio.run(
        print_list(
            settings,
            "completion:retry_status",
            {},
            "waiting",
            columns,
            _retry_row,
            limit=limit,
            everything=everything,
            as_json=as_json,
        )
    )


def _retry_row(item: Json) -> Sequence[object]:
    return (
        item.get("request_id"),
        item.get("status"),
        item.get("session_id"),
        item.get("model"),
        item.get("attempt"),
        clock_time(item.get("failed_at")),
        clock_time(item.get("due_at")),
        item.get("error"),
        item.get("message"),
    )


@click.command(
    epilog="""\b
Examples:
  ksi requeue req_0197...
  ksi queue --list failed --all --json | jq -r .request_id | xargs ksi requeue
"""
)
@click.argument("request_ids", metavar="REQUEST...", nargs=-1, required=True, shell_complete=complete_request)
@json_option
@pass_settings
@click.pass_context
def requeue(ctx: click.Context, settings: Settings, request_ids: tuple[str, ...], as_json: bool) -> None:
    """Ask again for each REQUEST that ended without an answer, as a new request in the same conversation.

    Requests that have an answer, have not ended, or are unknown are reported; the others are asked again all the same.
    """

    def show(request_id: str, reply: Json) -> None:
        if as_json:
            json_line({"requeued_from": request_id, **reply})
        else:
            figures({request_id: reply.get("request_id")})

    ctx.exit(asyncio.run(ask_each(settings, "completion:requeue", request_ids, show, as_json=as_json)))
