"""`ksi token`: access by HTTP."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import click

from ksi.cli.render import clock_time, json_line, note, say, table
from ksi.cli.settings import Settings, json_option, pass_settings
from ksi.cli.status import ask_one
from ksi.request import PRIORITY_WORDS

_LIMIT = re.compile(r"(\d+(?:\.\d+)?) ?(usd|tokens|requests)/(hour|day|week|month)")


class Limit(click.ParamType[dict[str, Any]]):
    """A limit in a period, as `5usd/day`; what an event takes as a budget."""

    name = "limit"

    def convert(
        self, value: str | dict[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """See `click.ParamType`."""
        if not isinstance(value, str):
            return value
        found = _LIMIT.fullmatch(value)
        if found is None or ("." in found[1] and found[2] != "usd"):
            self.fail(f"{value!r} is no limit; write 5usd/day, 200000tokens/hour or 100requests/month", param, ctx)
        return {found[2]: float(found[1]) if found[2] == "usd" else int(found[1]), "per": found[3]}


@click.group(
    epilog="""\b
Examples:
  ksi token create nightly --priority background
  ksi token create intern --budget 5usd/day
  ksi token list
  ksi token revoke nightly
  ksi token renew
"""
)
def token() -> None:
    """Make, list and revoke tokens for HTTP.

    The daemon stores hashes only: a secret is printed once, when it is made. The owner's token is in var/run/token.
    """


@token.command()
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice(["submit", "read", "operate"]),
    default="submit",
    show_default=True,
    help="submit: send requests, and look at its own; read: look at everything, too; operate: change everything, too.",
)
@click.option(
    "--priority", type=click.Choice(list(PRIORITY_WORDS)), help="The priority of its requests that name none."
)
@click.option(
    "--budget",
    type=Limit(),
    metavar="LIMIT/PERIOD",
    help="The limit of all its requests together, as 5usd/day, 200000tokens/hour or 100requests/month.",
)
@json_option
@pass_settings
def create(
    settings: Settings, name: str, scope: str, priority: str | None, budget: dict[str, Any] | None, as_json: bool
) -> None:
    """Make a token and print its secret, which is not shown again."""
    wishes = {"name": name, "scope": scope, "priority": priority, "budget": budget}
    data = {key: value for key, value in wishes.items() if value is not None}
    reply = _ask(settings, "token:create", data)
    if as_json:
        json_line(reply)
        return
    note(f"ksi: token {name} with the scope {scope}; its secret is not shown again:")
    say(f"{reply['token']}")


@token.command("list")
@json_option
@pass_settings
def list_tokens(settings: Settings, as_json: bool) -> None:
    """List the tokens except the owner's."""
    _show(_ask(settings, "token:list"), as_json=as_json)


@token.command()
@click.argument("name")
@json_option
@pass_settings
def revoke(settings: Settings, name: str, as_json: bool) -> None:
    """Revoke a token at once, and close its open connections."""
    reply = _ask(settings, "token:revoke", {"name": name})
    if as_json:
        json_line(reply)
    else:
        say(f"{name} is revoked")


@token.command()
@json_option
@pass_settings
def renew(settings: Settings, as_json: bool) -> None:
    """Replace the owner's token; the old one is revoked at once."""
    reply = _ask(settings, "token:renew")
    if as_json:
        json_line(reply)
    else:
        say(f"the owner's new token is in {reply['path']}")


def _ask(settings: Settings, event: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    return asyncio.run(ask_one(settings, event, data))


def _show(reply: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        for one in reply["tokens"]:
            json_line(one)
        return
    rows = [
        (one["name"], one["scope"], one.get("priority") or "", clock_time(one["created_at"]) or "")
        for one in reply["tokens"]
    ]
    table(("name", "scope", "priority", "made"), rows)
