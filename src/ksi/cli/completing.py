"""`ksi completion`, and the words it completes: ids, conversations, agents, models and providers of the daemon."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ksi.client import Client

PATIENCE = 1.0
"""Maximum time in seconds that a shell waits for the daemon."""
LISTS = ("active", "ready", "waiting", "delayed", "asking", "finished")

PLAIN = re.compile(r"[\w/][\w@%+=:,./-]*")
"""A word without special meaning to any shell."""
SHELLS = ("bash", "zsh", "fish")

Ask = Callable[["Client", str], Any]


@click.command(
    epilog="""\b
Examples:
  eval "$(ksi completion bash)"                              in ~/.bashrc
  eval "$(ksi completion zsh)"                               in ~/.zshrc, behind compinit
  ksi completion fish > ~/.config/fish/completions/ksi.fish
"""
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets a SHELL complete commands, options, and the ids, conversations and providers of the
    daemon.

    It works for `ksi` and for `./ksi` of a checkout. Without a running daemon, only commands and options are completed.
    """
    from click.shell_completion import get_completion_class

    from ksi.cli.render import say

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    root = ctx.find_root()
    say(kind(root.command, {}, "ksi", "_KSI_COMPLETE").source(), keep="\n\t")


def complete_request(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Ids of requests that run, wait or ended recently."""
    return _completed(ctx, _requests, incomplete)


def complete_asking(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Ids of requests that wait for a person's answer."""
    return _completed(ctx, _asking, incomplete)


def complete_session(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of conversations."""
    return _completed(ctx, _sessions, incomplete)


def complete_agent(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of agents of the newest conversations."""
    return _completed(ctx, _agents, incomplete)


def complete_provider(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of providers."""
    return _completed(ctx, _providers, incomplete)


def complete_model(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Full names of models; for a pattern, the part before its star."""
    return _completed(ctx, _models, incomplete)


def complete_event(_ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names of events. Works without a daemon."""
    from ksi.events.specs import SPECS

    return _fitting(SPECS, incomplete)


def _fitting(words: Iterable[str], incomplete: str) -> list[str]:
    """Completions of a word, without duplicates, restricted to words that are plain to every shell.

    Other clients choose names, and a shell puts them into the person's command line: `; rm -rf ~` is a name too.
    """
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete) and PLAIN.fullmatch(word)]


def _completed(ctx: click.Context, ask: Ask, incomplete: str) -> list[str]:
    """The daemon's answer; nothing if none runs. A shell's completion must never fail or wait long."""
    from ksi.cli.settings import Settings
    from ksi.errors import KsiError

    settings = Settings(ctx.find_root().params.get("home"))

    async def words() -> list[str]:
        async with asyncio.timeout(PATIENCE), settings.quiet_client() as client:
            return list(await ask(client, incomplete))

    try:
        return _fitting(asyncio.run(words()), incomplete)
    except (KsiError, OSError, TimeoutError):
        return []


async def _requests(client: Client, incomplete: str) -> list[str]:
    if incomplete:
        found = await client.send_event("completion:find", {"beginning": incomplete, "limit": 100})
        return list(found.get("names", ()))
    pages = [
        await client.send_event("completion:queue_status", {"list": name, "limit": 50 if name != "finished" else 20})
        for name in LISTS
    ]
    return [row["request_id"] for page in pages for row in page.get("items", ())]


async def _asking(client: Client, _: str) -> list[str]:
    return [one["request_id"] for one in (await client.send_event("completion:approvals")).get("approvals", ())]


async def _sessions(client: Client, incomplete: str) -> list[str]:
    if incomplete:
        wish = {"beginning": incomplete, "kind": "conversation", "limit": 100}
        return list((await client.send_event("completion:find", wish)).get("names", ()))
    page = await client.send_event("completion:session_status", {"limit": 50})
    return [row["session_id"] for row in page.get("sessions", ())]


async def _agents(client: Client, _: str) -> list[str]:
    page = await client.send_event("completion:session_status", {"limit": 200})
    return [agent for row in page.get("sessions", ()) for agent in row.get("agents", ())]


async def _providers(client: Client, _: str) -> list[str]:
    return list((await client.send_event("completion:provider_status")).get("providers", {}))


async def _models(client: Client, _: str) -> list[str]:
    reports = (await client.send_event("completion:provider_status")).get("providers", {})
    return [str(pattern).partition("*")[0] for report in reports.values() for pattern in report.get("models", ())]
