"""The places where clients of the Model Context Protocol keep their servers, and KSI's own entry there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ksi.cli.mcp_bridge import config_of
from ksi.host.private_files import make_folder, write_whole


class Client:
    """A program that reads its servers from a file of JSON."""

    def __init__(self, name: str, title: str, *places: str, key: str = "mcpServers") -> None:
        """`places` are the possible paths of the file: with `~/` in the user's folder, otherwise in the present one. A
        new file is made at the last one."""
        self.name = name
        self.title = title
        self.key = key
        self._places = places

    def file(self, user: Path, folder: Path) -> Path:
        """Its file: the one that is there, else the one to make."""
        found = [user / place[2:] if place.startswith("~/") else folder / place for place in self._places]
        return next((path for path in found if path.exists()), found[-1])


CLIENTS: Mapping[str, Client] = {
    client.name: client
    for client in (
        Client("claude-code", "Claude Code, in this folder", ".mcp.json"),
        Client(
            "claude-desktop",
            "Claude Desktop",
            "~/Library/Application Support/Claude/claude_desktop_config.json",
            "~/.config/Claude/claude_desktop_config.json",
        ),
        Client("cursor", "Cursor", "~/.cursor/mcp.json"),
        Client("gemini", "Gemini CLI", "~/.gemini/settings.json"),
        Client("vscode", "VS Code, in this folder", ".vscode/mcp.json", key="servers"),
        Client("windsurf", "Windsurf", "~/.codeium/windsurf/mcp_config.json"),
    )
}


def install(client: Client, command: list[str], user: Path, folder: Path) -> tuple[Path, bool]:
    """Add KSI's entry to a client's file and keep the rest; returns the file, and True if it was changed.

    Raises:
        ClickException: the file cannot be read or written, or is not plain JSON. It stays as it is.
    """
    path = client.file(user, folder)
    entry = config_of(command)["mcpServers"]["ksi"]
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        kept: Any = json.loads(text) if text.strip() else {}
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path} is left alone: it cannot be read as JSON ({error}). {_by_hand()}") from None
    servers = kept.setdefault(client.key, {}) if isinstance(kept, dict) else None
    if not isinstance(servers, dict):
        raise click.ClickException(f"{path} is left alone: it has no object {client.key!r}. {_by_hand()}")
    if servers.get("ksi") == entry:
        return path, False
    servers["ksi"] = entry
    try:
        make_folder(path.parent)
        write_whole(path.resolve(), json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
    return path, True


def _by_hand() -> str:
    return "`ksi mcp --config` prints the entry to put there by hand"
