"""`ksi queue`, `ksi locks`, `ksi sessions`: the store's lists, page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.completing import complete_agent, complete_session
from ksi.cli.fork_tree import print_forks
from ksi.cli.ids import whole_id
from ksi.cli.render import clock_time, figures, json_line, note, say, table
from ksi.cli.settings import F, Settings, json_option, pass_settings
from ksi.cli.status import ask_named, ask_one

if TYPE_CHECKING:
    from ksi.client import Client

Json = Mapping[str, Any]
LISTINGS = ("active", "ready", "waiting", "delayed", "asking", "failed", "finished")


def page_options(command: F) -> F:
    """`--limit` and `--all`."""
    limit = click.option(
        "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="Rows in a page."
    )
    return limit(click.option("--all", "everything", is_flag=True, help="Follow the list to its end.")(command))


async def _pages(
    client: Client, event: str, data: Json, key: str, limit: int, everything: bool
) -> AsyncIterator[list[Json]]:
    """A list's rows, page by page."""
    cursor: str | None = None
    while True:
        reply = await client.send_event(event, {**data, "limit": limit, **({"cursor": cursor} if cursor else {})})
        yield reply.get(key, [])
        cursor = reply.get("cursor")
        if cursor is None:
            return
        if not everything:
            note("there are more; see them with --all")
            return


async def print_list(
    settings: Settings,
    event: str,
    data: Json,
    key: str,
    columns: Sequence[str],
    row: Callable[[Json], Sequence[object]],
    *,
    limit: int,
    everything: bool,
    as_json: bool,
) -> None:
    """A list under its columns, or with `--json` one item per line; `everything` follows it to its end."""
    async with settings.client() as client:
        first = True
        async for rows in _pages(client, event, data, key, limit, everything):
            if as_json:
                for item in rows:
                    json_line(item)
            elif rows or first:
                table(columns, map(row, rows))
            first = False


@click.command(
    epilog="""\b
Examples:
  ksi queue
  ksi queue --list waiting
  ksi queue --list failed --all --json | jq -r .request_id
"""
)
@click.option("--list", "listing", type=click.Choice(LISTINGS), help="A list instead of the figures.")
@page_options
@json_option
@pass_settings
def queue(settings: Settings, listing: str | None, limit: int, everything: bool, as_json: bool) -> None:
    """Show the queue's figures, or with --list one of its lists.

    \b
    active    running
    ready     the next to run, by route
    waiting   the wait queues, by conversation
    delayed   not due, retrying or parked, the soonest first
    asking    waiting for a person's answer: see ksi approvals
    failed    the newest first
    finished  all ended ones, the newest first
    """
    if listing is None:
        reply = asyncio.run(ask_one(settings, "completion:queue_status"))
        if as_json:
            json_line(reply)
            return
        routes = reply.pop("ready_by_route", {})
        figures({**reply, **{f"ready for {route}": number for route, number in routes.items()}})
        return
    columns = (
        "request",
        "status",
        "conversation",
        "priority",
        "model",
        "agent",
        "attempt",
        "enqueued",
        "due",
        "ended",
        "error",
    )
    asyncio.run(
        print_list(
            settings,
            "completion:queue_status",
            {"list": listing},
            "items",
            columns,
            _request_row,
            limit=limit,
            everything=everything,
            as_json=as_json,
        )
    )


def _request_row(item: Json) -> Sequence[object]:
    return (
        item.get("request_id"),
        item.get("status"),
        item.get("session_id"),
        item.get("priority"),
        item.get("model"),
        item.get("agent_id"),
        item.get("attempt"),
        clock_time(item.get("enqueued_at")),
        clock_time(item.get("due_at")),
        clock_time(item.get("finished_at")),
        item.get("error"),
    )


@click.command(
    epilog="""\b
Examples:
  ksi locks
  ksi locks research_001
  ksi locks --all --json
"""
)
@click.argument("conversation", required=False, shell_complete=complete_session)
@page_options
@json_option
@pass_settings
def locks(settings: Settings, conversation: str | None, limit: int, everything: bool, as_json: bool) -> None:
    """Show held conversations and their holders; for one CONVERSATION also its wait queue and the tree of its forks."""
    event = "conversation:lock_status"
    if conversation is None:
        columns = ("conversation", "holder", "kind", "state", "since", "expires", "fence", "waiting")
        asyncio.run(
            print_list(
                settings,
                event,
                {},
                "locks",
                columns,
                _lock_row,
                limit=limit,
                everything=everything,
                as_json=as_json,
            )
        )
        return
    reply = asyncio.run(_lock_of(settings, conversation, limit))
    if as_json:
        json_line(reply)
        return
    line, forks = reply.pop("queue", []), reply.pop("forks", [])
    figures(_with_times(reply))
    if line:
        say()
        table(
            ("position", "request", "kind", "priority", "enqueued"),
            [
                (
                    item.get("position"),
                    item.get("request_id"),
                    item.get("kind"),
                    item.get("priority"),
                    clock_time(item.get("enqueued_at")),
                )
                for item in line
            ],
            title="line",
        )
    print_forks(forks)


async def _lock_of(settings: Settings, conversation: str, limit: int) -> dict[str, Any]:
    """A conversation's lock. Every unused name is free, so a name may also be the prefix of another."""
    event, data = "conversation:lock_status", {"conversation_id": conversation, "limit": limit}
    async with settings.client() as client:
        reply = await client.send_event(event, data)
        if reply.get("locked"):
            return reply
        whole = await whole_id(client, conversation, "conversation")
        return reply if whole == conversation else await client.send_event(event, {**data, "conversation_id": whole})


async def forks_of(settings: Settings, conversation: str) -> Sequence[Json]:
    """The forks of a conversation's tree."""
    reply = await ask_one(settings, "conversation:lock_status", {"conversation_id": conversation})
    forks: Sequence[Json] = reply.get("forks", [])
    return forks


def _lock_row(item: Json) -> Sequence[object]:
    return (
        item.get("conversation_id"),
        item.get("holder"),
        item.get("holder_kind"),
        item.get("state"),
        clock_time(item.get("since")),
        clock_time(item.get("expires_at")),
        item.get("fence"),
        item.get("waiting"),
    )


@click.command(
    epilog="""\b
Examples:
  ksi sessions
  ksi sessions --agent planner
  ksi sessions research_001 --json
"""
)
@click.argument("session", required=False, shell_complete=complete_session)
@click.option("--agent", metavar="NAME", shell_complete=complete_agent, help="Only conversations of this agent.")
@page_options
@json_option
@pass_settings
def sessions(
    settings: Settings, session: str | None, agent: str | None, limit: int, everything: bool, as_json: bool
) -> None:
    """Show conversations, the newest first, or one SESSION: its state, turns, provider, agents, and tree of forks."""
    event = "completion:session_status"
    if session is not None:
        reply = asyncio.run(ask_named(settings, event, {"session_id": session}, "session_id", "conversation"))
        if as_json:
            json_line(reply)
        else:
            figures(_with_times(reply))
            print_forks(asyncio.run(forks_of(settings, reply["session_id"])))
        return
    columns = ("conversation", "state", "turns", "provider", "agents", "locked", "created", "active", "forked from")
    asyncio.run(
        print_list(
            settings,
            event,
            {"agent_id": agent} if agent is not None else {},
            "sessions",
            columns,
            _session_row,
            limit=limit,
            everything=everything,
            as_json=as_json,
        )
    )


def _session_row(item: Json) -> Sequence[object]:
    return (
        item.get("session_id"),
        item.get("state"),
        item.get("turns"),
        item.get("provider"),
        item.get("agents"),
        item.get("locked"),
        clock_time(item.get("created_at")),
        clock_time(item.get("active_at")),
        item.get("forked_from"),
    )


def _with_times(reply: Json) -> dict[str, object]:
    """Times of day instead of seconds since 1970."""
    return {
        name: clock_time(value) if (name.endswith("_at") or name == "since") and value is not None else value
        for name, value in reply.items()
    }
