"""`ksi mcp`: KSI as a server of tools for agents, on stdin and stdout."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from ksi.cli.render import say, table
from ksi.cli.settings import Settings


@click.command(
    epilog="""\b
Examples:
  claude mcp add ksi -- ksi mcp
  ksi mcp --install                  # the clients that keep a file, and where
  ksi mcp --install cursor
  ksi mcp --config > mcp.json && claude --mcp-config mcp.json
"""
)
@click.option("--config", "show", is_flag=True, help="Print the entry for a client's file of MCP servers, and end.")
@click.option(
    "--install",
    "client",
    is_flag=False,
    flag_value="",
    metavar="[CLIENT]",
    help="Put the entry into a client's file, and end; without CLIENT, list the clients and their files.",
)
@click.pass_obj
def mcp(settings: Settings, *, show: bool, client: str | None) -> None:
    """Serve the Model Context Protocol on stdin and stdout: tools to ask, wait, look and lock."""
    from ksi.cli import mcp_bridge as bridge

    command = [shutil.which("ksi") or sys.argv[0], "--home", str(settings.home), "mcp"]
    if show:
        say(json.dumps(bridge.config_of(command), indent=2), keep="\n")
    elif client is not None:
        _install(client, command)
    else:
        bridge.main(settings.home)


def _install(name: str, command: list[str]) -> None:
    from ksi.cli.mcp_install import CLIENTS, install

    user, folder = Path.home(), Path.cwd()
    if not name:
        rows = [(one.name, one.title, str(one.file(user, folder))) for one in CLIENTS.values()]
        table(("client", "program", "file"), rows)
        return
    client = CLIENTS.get(name)
    if client is None:
        raise click.UsageError(f"--install: no client {name!r}; there are {', '.join(CLIENTS)}")
    path, changed = install(client, command, user, folder)
    say(f"{path} {'has the server ksi now; restart the client' if changed else 'has the server ksi already'}")
