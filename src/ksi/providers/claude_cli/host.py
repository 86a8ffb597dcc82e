"""Answers of Claude Code's host to it: KSI's own tools, over the pipe between the process and this daemon."""

from __future__ import annotations

from typing import Any

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import ToolServer
from ksi.providers.claude_cli.stream import Asks

SERVER = "ksi"
"""The name of KSI's own MCP server."""
ALLOWED = f"mcp__{SERVER}__*"
"""Its tools, as `--allowed-tools` names them: they need no permission."""
OWN_SERVER = {"type": "sdk", "name": SERVER, "alwaysLoad": True}
"""How the server is named to the program: its messages come to the host, and its tools are in each request."""

_ACCEPTED = {"jsonrpc": "2.0", "id": 0, "result": {}}
"""The answer to a message that wants none: the program waits for one all the same."""


class HostError(Exception):
    """The host does not answer; the message says why."""


class Host:
    """Answers the messages of one turn's program for the run that the turn belongs to."""

    def __init__(self, tools: ToolServer) -> None:
        self._tools = tools

    async def answer(self, asks: Asks) -> dict[str, Any]:
        """The response to a message for a server.

        Raises:
            HostError: it is none.
        """
        if asks.subtype != "mcp_message" or asks.request.get("server_name") != SERVER:
            raise HostError(f"this host answers messages to the server {SERVER!r} alone")
        return {"mcp_response": await self._tools(asks.request.get("message")) or _ACCEPTED}


def with_own_server(servers: dict[str, Any]) -> dict[str, Any]:
    """The MCP servers of a turn, including KSI's own.

    Raises:
        ProviderError: another one has its name.
    """
    if SERVER in servers:
        raise ProviderError(
            FailureClass.INVALID_REQUEST, f"mcp_config: {SERVER!r} is the name of KSI's own server with ksi_tools"
        )
    return {**servers, SERVER: OWN_SERVER}
