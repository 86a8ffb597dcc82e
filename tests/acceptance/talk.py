"""A line to a daemon, with nothing but the standard library: for checks that are also run by hand."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Json = dict[str, Any]

PATIENCE = 300.0
"""Seconds that anything gets: a model without a graphics card is slow."""


class Refused(Exception):
    """The daemon answered with an error."""

    def __init__(self, error: Json) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: str = error["code"]


def find_socket(checkout: Path) -> Path:
    """The daemon's socket: that of KSI_HOME, of the nearest folder upward with a ksi.toml, or of the checkout."""
    here = Path.cwd()
    folders = (folder for folder in (here, *here.parents) if (folder / "ksi.toml").is_file())
    home = Path(os.environ.get("KSI_HOME") or next(folders, checkout))
    try:
        settings = tomllib.loads((home / "ksi.toml").read_text("utf-8"))
    except FileNotFoundError:
        settings = {}
    return Path(home, settings.get("socket", {}).get("path", "var/run/daemon.sock"))


class Talk:
    """One connection. Replies are found by their correlation id; pushes are kept until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self._numbers = itertools.count(1)
        self._kept: list[Json] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def again(self) -> Talk:
        """Another connection to the same daemon."""
        return Talk(self.path)

    def ask(self, event: str, **data: Any) -> Json:
        """The data of an event's reply.

        Raises:
            Refused: it was an error.
        """
        number = next(self._numbers)
        line = json.dumps({"event": event, "data": data, "correlation_id": number, "replies": "v2"})
        self._socket.sendall(line.encode() + b"\n")
        reply = self._next(lambda message: message.get("correlation_id") == number)
        if "error" in reply:
            raise Refused(reply["error"])
        found: Json = reply["data"]
        return found

    def refused(self, event: str, **data: Any) -> str:
        """The code of the error that must come."""
        try:
            reply = self.ask(event, **data)
        except Refused as refused:
            return refused.code
        raise AssertionError(f"{event} was answered with {reply}")

    def pushed(self, event: str, **fields: Any) -> Json:
        """The data of the next pushed event of this name with these fields."""
        message = self._next(
            lambda message: (
                message["event"] == event
                and "correlation_id" not in message
                and fields.items() <= {k: v for k, v in message.get("data", {}).items() if k in fields}.items()
            )
        )
        found: Json = message["data"]
        return found

    def _next(self, fits: Callable[[Json], bool]) -> Json:
        for place, message in enumerate(self._kept):
            if fits(message):
                return self._kept.pop(place)
        while line := self._lines.readline():
            message = json.loads(line)
            if fits(message):
                found: Json = message
                return found
            self._kept.append(message)
        raise AssertionError("the daemon closed the connection")


def once(path: Path, line: str) -> list[Json]:
    """The output of `echo LINE | nc -U SOCKET`: a client that sends one line, closes its side and reads to the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        connection.sendall(line.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as lines:
            return [json.loads(answer) for answer in lines]


def until(look: Callable[[], Any], what: str) -> Any:
    """Look again and again until there is something."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(0.02)
    return found
