"""KSI's entry in the files in which clients keep their MCP servers."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from ksi.cli.mcp_install import CLIENTS, install

COMMAND = ["/usr/bin/ksi", "--home", "/home/me/ksi", "mcp"]


@pytest.mark.promise("M1")
@pytest.mark.parametrize("client", CLIENTS.values(), ids=lambda client: client.name)
def test_a_missing_file_is_made_and_is_not_changed_the_second_time(client: object, tmp_path: Path) -> None:
    chosen = CLIENTS[client.name]  # type: ignore[attr-defined]
    path, changed = install(chosen, COMMAND, tmp_path, tmp_path)
    assert changed
    assert json.loads(path.read_text())[chosen.key]["ksi"]["args"] == COMMAND[1:]
    assert install(chosen, COMMAND, tmp_path, tmp_path) == (path, False)


@pytest.mark.promise("M1")
def test_all_that_a_file_has_stays(tmp_path: Path) -> None:
    path = tmp_path / ".cursor" / "mcp.json"
    path.parent.mkdir()
    path.write_text('{"theme": "dunkel", "mcpServers": {"other": {"url": "http://x"}, "ksi": {"command": "old"}}}')
    install(CLIENTS["cursor"], COMMAND, tmp_path, tmp_path)
    kept = json.loads(path.read_text())
    assert (kept["theme"], kept["mcpServers"]["other"]) == ("dunkel", {"url": "http://x"})
    assert kept["mcpServers"]["ksi"]["command"] == COMMAND[0]


@pytest.mark.promise("M1")
@pytest.mark.parametrize("text", ["{ // a comment\n}", "[]", '{"mcpServers": []}', "\x00"])
def test_a_file_that_is_no_plain_object_is_not_changed(text: str, tmp_path: Path) -> None:
    path = tmp_path / ".mcp.json"
    path.write_text(text)
    with pytest.raises(click.ClickException, match="left alone"):
        install(CLIENTS["claude-code"], COMMAND, tmp_path, tmp_path)
    assert path.read_text() == text


@pytest.mark.promise("M1")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.json"
    real.write_text("{}")
    (tmp_path / ".mcp.json").symlink_to(real)
    install(CLIENTS["claude-code"], COMMAND, tmp_path, tmp_path)
    assert (tmp_path / ".mcp.json").is_symlink()
    assert "ksi" in real.read_text()
