"""Asks the daemon for reports over its Unix socket without the client: a command that shows them starts sooner."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from ksi.host.platforms import find_socket

PATIENCE = 10.0
"""Seconds without a word from the daemon after which the client is to try."""


def ask(path: Path, *events: str) -> list[dict[str, Any]] | None:
    """The replies to events that change nothing, in order; None if it did not work.

    The client then asks again: it knows the other ways to the daemon, and the message without one.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(find_socket(path)))
            lines = [json.dumps({"event": event, "data": {}, "correlation_id": n}) for n, event in enumerate(events)]
            connection.sendall(("\n".join(lines) + "\n").encode())
            found: dict[Any, Any] = {}
            with connection.makefile("rb") as answers:
                while len(found) < len(events):
                    answer = json.loads(answers.readline())
                    found[answer["correlation_id"]] = answer["data"]
            return [found[number] for number in range(len(events))]
    except (OSError, ValueError, KeyError):
        return None
