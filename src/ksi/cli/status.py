"""`ksi status` and `ksi health`: the daemon's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from ksi.cli.ids import Kind, send_named
from ksi.cli.quick import ask
from ksi.cli.render import clock_time, duration, figures, json_line, note, say, table
from ksi.cli.settings import Exit, Settings, exit_code, json_option, pass_settings


@click.command(
    epilog="""\b
Examples:
  ksi status
  ksi status --json | jq .queued
"""
)
@json_option
@pass_settings
def status(settings: Settings, as_json: bool) -> None:
    """Show the daemon's state: the service's figures, the running requests, and the problems."""
    reply = _status(settings)
    if as_json:
        json_line(reply)
        return
    running = reply.pop("running", [])
    more = reply.pop("more", False)
    reply.pop("paused", None)  # the problem is reported, and the way to continue
    reply["problems"] = "\n".join(reply["problems"]) or "none"
    figures(_readable(reply))
    if running:
        say()
        columns = ("request", "conversation", "model", "provider", "attempt", "priority", "agent", "since")
        table(
            columns,
            [
                (
                    row.get("request_id"),
                    row.get("session_id"),
                    row.get("model"),
                    row.get("provider"),
                    row.get("attempt"),
                    row.get("priority"),
                    row.get("agent_id"),
                    clock_time(row.get("started_at")),
                )
                for row in running
            ],
            title="running",
        )
    if more:
        say("more run: ksi queue --list active --all")


@click.command(
    epilog="""\b
Examples:
  ksi health
  ksi health --json >/dev/null && echo healthy
"""
)
@json_option
@pass_settings
@click.pass_context
def health(ctx: click.Context, settings: Settings, as_json: bool) -> None:
    """Show the health of the daemon, its store and its providers. Exit code 0 means healthy, 1 degraded, 3 no
    daemon."""
    (reply,) = _reports(settings, "system:health")
    well = reply.get("status") == "healthy"
    if as_json:
        json_line(reply)
    else:
        problems = reply.pop("problems", [])
        if "nodes" in reply:
            reply["nodes"] = "\n".join(map(_node_line, reply["nodes"]))
        figures({**_readable(reply), "problems": "\n".join(map(str, problems)) or "none"})
    ctx.exit(Exit.DONE if well else Exit.FAILED)


def _status(settings: Settings) -> dict[str, Any]:
    reply, health = _reports(settings, "completion:status", "system:health")
    return {**reply, **_sizes(health), "problems": health["problems"]}


def _reports(settings: Settings, *events: str) -> list[dict[str, Any]]:
    """The replies to events that need no data: over the socket if that works at once, otherwise by the client."""
    replies = ask(settings.places.socket_path, *events)
    if replies is not None:
        return replies
    import asyncio

    async def by_client() -> list[dict[str, Any]]:
        async with settings.client() as client:
            return [await client.send_event(event, {}) for event in events]

    return asyncio.run(by_client())


def _sizes(health: dict[str, Any]) -> dict[str, Any]:
    """The space used by the store and the response files, and the free space, as far as they are known."""
    store = health.get("store", {})
    known = {
        "database_bytes": store.get("database_bytes"),
        "log_bytes": store.get("log_bytes"),
        "responses_bytes": health.get("responses", {}).get("bytes"),
        "free_bytes": health.get("disk", {}).get("free_bytes"),
    }
    return {name: size for name, size in known.items() if size is not None}


async def ask_one(settings: Settings, event: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """One event's reply."""
    async with settings.client() as client:
        return await client.send_event(event, data)


async def ask_named(
    settings: Settings, event: str, data: dict[str, Any], field: str, kind: Kind = "request", *, changes: bool = False
) -> dict[str, Any]:
    """The reply of an event with a name in `field`, which may be shortened."""
    async with settings.client() as client:
        return await send_named(client, event, data, field, kind, changes=changes)


async def ask_each(
    settings: Settings,
    event: str,
    request_ids: Sequence[str],
    show: Callable[[str, dict[str, Any]], None],
    *,
    as_json: bool,
    more: Mapping[str, Any] | None = None,
) -> Exit:
    """One event for each request, with `more` in its data.

    A refusal is reported, and the others are sent all the same; returns its exit code.
    """
    from ksi.errors import AmbiguousId, NotFound, RemoteError
    from ksi.protocol import error_body

    code = Exit.DONE
    async with settings.client() as client:
        for request_id in request_ids:
            try:
                data = {**(more or {}), "request_id": request_id}
                show(request_id, await send_named(client, event, data, "request_id", changes=True))
            except (RemoteError, AmbiguousId, NotFound) as error:
                code = exit_code(error)
                if as_json:
                    json_line({"request_id": request_id, "error": error_body(error)})
                else:
                    note(f"ksi: {error.message}")
    return code


def _node_line(node: dict[str, Any]) -> str:
    heard = f"heard of {clock_time(node['heard_at'])}"
    return f"{node['node']}: {'lost, ' if node['lost'] else ''}{heard}"


def _readable(reply: dict[str, Any]) -> dict[str, object]:
    """Figures with their units; tables within as `name.key`."""
    shown: dict[str, object] = {}
    for name, value in reply.items():
        if name.endswith("_seconds"):
            shown[name.removesuffix("_seconds")] = duration(value)
        elif name.endswith("_bytes"):
            shown[name.removesuffix("_bytes")] = f"{value / 2**20:,.1f} MiB"
        elif isinstance(value, dict):
            shown.update({f"{name}.{key}": inner for key, inner in _readable(value).items()})
        elif isinstance(value, int | float | str | bool | list):
            shown[name] = value
    return shown
