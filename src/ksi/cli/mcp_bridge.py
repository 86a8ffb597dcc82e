"""`ksi mcp`: carries messages between a client on stdin and stdout and the daemon's HTTP interface.

Every session of an agent starts a bridge, so it needs the standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ksi.host.marks import runs_under

URL, TOKEN = "KSI_URL", "KSI_TOKEN"
"""The variables that name the daemon's HTTP address and a token; the defaults are the home's own."""

MOST_AT_ONCE = 64
"""Maximum number of concurrent calls."""

UNREACHABLE = -32000


class Unreachable(Exception):
    """No daemon can be reached; the message says how to start one."""


def door_of(home: Path, environ: Mapping[str, str]) -> tuple[str, str]:
    """The URL of the daemon's HTTP interface, and a token for it.

    Raises:
        Unreachable: no daemon serves HTTP from this home, or its owner's token is not for this program.
    """
    run = home / "var" / "run"
    if TOKEN not in environ and runs_under(run, environ):
        raise Unreachable(
            "an agent that KSI runs has started this program, which would act for the owner: `ksi_tools = true` under "
            f"the agent's provider gives it KSI's tools within its limits, and {TOKEN} names a token made for it"
        )
    try:
        url = environ.get(URL) or json.loads((run / "http.json").read_text())["url"]
        token = environ.get(TOKEN) or (run / "token").read_text().strip()
    except (OSError, ValueError, KeyError):
        raise Unreachable(
            f"no daemon of {home} serves HTTP: `ksi start` starts one, and [http] listen in ksi.toml turns HTTP on"
        ) from None
    return url, token


class Bridge:
    """Forwards messages, each call in a thread of its own."""

    def __init__(self, home: Path, environ: Mapping[str, str], out: BinaryIO) -> None:
        self._home = home
        self._environ = environ
        self._out = out
        self._writing = threading.Lock()
        self._session = uuid.uuid4().hex
        self._agent = environ.get("CLAUDE_CODE_SESSION_ID")

    def run(self, lines: BinaryIO) -> None:
        """Forward all lines until the input ends."""
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            for line in lines:
                if line.strip():
                    pool.submit(self._carry, line)

    def _carry(self, line: bytes) -> None:
        try:
            for message in self._post(line):
                self._write(message)
        except (OSError, http.client.HTTPException, Unreachable) as error:
            self._fail(line, str(error) or type(error).__name__)

    def _write(self, message: bytes) -> None:
        with self._writing:
            self._out.write(message.replace(b"\n", b" ") + b"\n")
            self._out.flush()

    def _post(self, line: bytes) -> Iterator[bytes]:
        """The daemon's answers to one message."""
        url, token = door_of(self._home, self._environ)
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port)
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "x-ksi-mcp-session": self._session,
            **({"x-ksi-agent": self._agent} if self._agent else {}),
        }
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/mcp", line, headers)
            answer = connection.getresponse()
            if answer.status == http.client.ACCEPTED:
                return
            if answer.status != http.client.OK:
                raise Unreachable(_said(answer.read()))
            if answer.headers.get_content_type() == "text/event-stream":
                for told in answer:
                    if told.startswith(b"data: "):
                        yield told.removeprefix(b"data: ").strip()
            else:
                yield answer.read()
        finally:
            connection.close()

    def _fail(self, line: bytes, why: str) -> None:
        try:
            identity = json.loads(line).get("id")
        except (ValueError, AttributeError):
            identity = None
        if identity is not None:
            error = {"code": UNREACHABLE, "message": f"KSI cannot be reached: {why}"}
            self._write(json.dumps({"jsonrpc": "2.0", "id": identity, "error": error}).encode())


def _said(body: bytes) -> str:
    """The text of an error."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def config_of(command: list[str]) -> dict[str, Any]:
    """The entry for this server in a client's file of servers."""
    return {"mcpServers": {"ksi": {"type": "stdio", "command": command[0], "args": command[1:], "alwaysLoad": True}}}


def main(home: Path) -> None:
    """Serve stdin until it ends, or until the client sends a signal."""
    try:
        Bridge(home, os.environ, sys.stdout.buffer).run(sys.stdin.buffer)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(0)  # the client is gone, so nobody reads the answers of the remaining threads
