"""`ksi chain` and `ksi injections`: trees of requests with their tokens, and deliveries of results."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from ksi.cli.completing import complete_request
from ksi.cli.ids import send_named
from ksi.cli.lists import page_options, print_list
from ksi.cli.render import clock_time, duration, figures, json_line, note, say
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_named

Json = Mapping[str, Any]
STATES = ("queued", "taken", "delivered", "blocked", "failed", "retried")
PAGE = 1000
"""Requests of a chain in one page."""


@click.command(
    epilog="""\b
Examples:
  ksi chain
  ksi chain req_0197...
  ksi chain req_0197... --reset
  ksi chain req_0197... --cancel
"""
)
@click.argument("name", metavar="[ID]", required=False, shell_complete=complete_request)
@click.option(
    "--reset",
    is_flag=True,
    help="Let it continue: its budget and time start from zero, the findings against it are forgotten.",
)
@click.option("--cancel", is_flag=True, help="Cancel all of its requests, and accept no more.")
@page_options
@json_option
@pass_settings
def chain(
    settings: Settings, name: str | None, reset: bool, cancel: bool, limit: int, everything: bool, as_json: bool
) -> None:
    """Draw the chain that ID belongs to: each request's state and tokens, and the reason if it was stopped. Without ID,
    list chains.

    ID is the chain's id (its first request's), or any of its requests.
    """
    if reset and cancel:
        raise click.UsageError("--reset or --cancel, not both")
    if name is None:
        if reset or cancel:
            raise click.UsageError("which chain? ksi chain ID --reset")
        _list(settings, limit, everything, as_json)
    elif reset:
        reply = asyncio.run(
            ask_named(settings, "circuit_breaker:reset", {"request_id": name}, "request_id", changes=True)
        )
        if as_json:
            json_line(reply)
        else:
            figures(_figures(reply))
    elif cancel:
        asyncio.run(_cancel(settings, name, as_json))
    else:
        asyncio.run(_draw(settings, name, as_json))


def _list(settings: Settings, limit: int, everything: bool, as_json: bool) -> None:
    columns = ("chain", "state", "requests", "unfinished", "depth", "tokens", "budget", "age", "reason")
    asyncio.run(
        print_list(
            settings,
            "circuit_breaker:status",
            {},
            "chains",
            columns,
            _chain_row,
            limit=limit,
            everything=everything,
            as_json=as_json,
        )
    )


def _chain_row(item: Json) -> Sequence[object]:
    return (
        item.get("chain_id"),
        item.get("state"),
        item.get("members"),
        item.get("unfinished"),
        item.get("ideation_depth"),
        item.get("tokens_used"),
        item.get("token_budget"),
        duration(item.get("age")),
        item.get("reason", {}).get("code"),
    )


async def _cancel(settings: Settings, name: str, as_json: bool) -> None:
    async with settings.client() as client:
        data = {"request_id": name}
        status = await send_named(client, "circuit_breaker:status", data, "request_id", changes=True)
        reply = await client.send_event("completion:cancel", {"chain_id": status["chain"]["chain_id"]})
    if as_json:
        json_line(reply)
    else:
        figures({reply.get("chain_id", name): f"closed, {reply.get('cancelled', 0)} requests stopped"})


async def _draw(settings: Settings, name: str, as_json: bool) -> None:
    async with settings.client() as client:
        wish = {"request_id": name, "members": True, "limit": PAGE}
        reply = await send_named(client, "circuit_breaker:status", wish, "request_id")
        wish = {**wish, "request_id": reply["chain"]["chain_id"]}
        members: list[Json] = list(reply.get("requests", []))
        while reply.get("cursor") is not None:
            reply = await client.send_event("circuit_breaker:status", {**wish, "cursor": reply["cursor"]})
            members += reply.get("requests", [])
    if as_json:
        json_line({"chain": reply["chain"], "requests": members})
        return
    figures(_figures(reply["chain"]))
    say()
    for line in tree(members):
        say(line)


def _figures(item: Json) -> dict[str, object]:
    reason = item.get("reason")
    return {
        "chain": item.get("chain_id"),
        "state": item.get("state"),
        "stopped by": f"{reason['code']}: {reason['message']}" if reason else None,
        "risk": reason.get("risk_score") if reason else None,
        "evidence": reason.get("evidence") if reason else None,
        "requests": f"{item.get('members')}, {item.get('unfinished')} not ended",
        "depth": _depth(item),
        "tokens": _tokens(item),
        "age": f"{duration(item.get('age'))} of {duration(item.get('time_window'))}",
        "resets": item.get("resets") or None,
    }


def _depth(item: Json) -> str:
    """The depth that the chain reached; a request that was blocked for its depth did not reach its own."""
    depth, most = item.get("ideation_depth", 0), item.get("max_depth", 0)
    return f"{most} of {most}, and a request at depth {depth} was blocked" if depth > most else f"{depth} of {most}"


def _tokens(item: Json) -> str:
    words = [f"{item.get('tokens_used', 0):,} of {item.get('token_budget', 0):,}"]
    if item.get("tokens_estimated"):
        words.append(f"{item['tokens_estimated']:,} of them estimated")
    if item.get("tokens_reserved"):
        words.append(f"{item['tokens_reserved']:,} set aside")
    return ", ".join(words)


def tree(members: Sequence[Json]) -> list[str]:
    """A chain as a tree, one request per line; a request whose parent is not kept any more is a root."""
    known = {member["request_id"] for member in members}
    children: dict[str | None, list[Json]] = {}
    for member in members:
        parent = member.get("parent_request_id")
        children.setdefault(parent if parent in known else None, []).append(member)
    return [line for root in children.get(None, []) for line in _branch(root, children)]


def _branch(root: Json, children: Mapping[str | None, Sequence[Json]]) -> Iterator[str]:
    """A request's line and those below it. It uses a stack, not recursion: a chain may be as deep as its limits."""
    stack = [(root, "", "", "")]
    while stack:
        member, before, joint, below = stack.pop()
        yield f"{before}{joint}{_line(member)}"
        mine = children.get(member["request_id"], ())
        for place, child in reversed(list(enumerate(mine))):
            last = place == len(mine) - 1
            stack.append((child, before + below, "└─ " if last else "├─ ", "   " if last else "│  "))


def _line(member: Json) -> str:
    words = [str(member["request_id"]), str(member.get("status"))]
    if member.get("tokens"):
        words.append(f"{'about ' if member.get('estimated') else ''}{member['tokens']:,} tokens")
    who = member.get("agent_id")
    words.append(f"in {member.get('session_id')}{f' by {who}' if who else ''}")
    reason = member.get("reason")
    if reason:
        words.append(f"stopped by {reason['code']}: {reason['message']}")
    return "  ".join(words)


@click.command(
    epilog="""\b
Examples:
  ksi injections
  ksi injections --state failed
  ksi injections req_0197.../1
  ksi injections req_0197.../1 --retry
"""
)
@click.argument("injection", metavar="[ID]", required=False)
@click.option(
    "--state",
    type=click.Choice(STATES),
    help="Only deliveries in this state; blocked and failed ones are dead letters.",
)
@click.option("--retry", is_flag=True, help="Send a dead letter again.")
@page_options
@json_option
@pass_settings
def injections(
    settings: Settings,
    injection: str | None,
    state: str | None,
    retry: bool,
    limit: int,
    everything: bool,
    as_json: bool,
) -> None:
    """Show deliveries of results into conversations, the newest first, or one with its text."""
    if injection is None:
        if retry:
            raise click.UsageError("which delivery? ksi injections ID --retry")
        columns = ("delivery", "state", "target", "mode", "trigger", "chain", "made", "ended", "reason")
        asyncio.run(
            print_list(
                settings,
                "injection:status",
                {"state": state} if state is not None else {},
                "injections",
                columns,
                _injection_row,
                limit=limit,
                everything=everything,
                as_json=as_json,
            )
        )
        return
    if retry:
        reply = asyncio.run(
            ask_named(settings, "injection:retry", {"injection_id": injection}, "injection_id", changes=True)
        )
        if not as_json:
            note(f"sent again as {reply['injection']['injection_id']}")
    else:
        reply = asyncio.run(ask_named(settings, "injection:status", {"injection_id": injection}, "injection_id"))
    if as_json:
        json_line(reply)
        return
    figures(_injection_figures(reply["injection"]))


def _injection_figures(item: Json) -> dict[str, object]:
    reason = item.get("reason")
    return {
        "delivery": item.get("injection_id"),
        "state": item.get("state"),
        "reason": f"{reason['code']}: {reason['message']}" if reason else None,
        "from": item.get("parent_request_id"),
        "chain": item.get("chain_id"),
        "target": item.get("target"),
        "mode": item.get("mode"),
        "trigger": item.get("trigger_type"),
        "carried by": item.get("request_id"),
        "made": clock_time(item.get("created_at")),
        "ended": clock_time(item.get("finished_at")),
        "text": item.get("text"),
    }


def _injection_row(item: Json) -> Sequence[object]:
    return (
        item.get("injection_id"),
        item.get("state"),
        item.get("target"),
        item.get("mode"),
        item.get("trigger_type"),
        item.get("chain_id"),
        clock_time(item.get("created_at")),
        clock_time(item.get("finished_at")),
        item.get("reason", {}).get("code"),
    )
