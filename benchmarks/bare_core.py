"""The yardstick: the core of a queue and nothing else (`python -m benchmarks.bare_core DATABASE SOCKET`).

It takes requests on a Unix socket, keeps them in SQLite with the durability `full`, lets one request of a conversation
run at a time and in order, answers with an echo, tells subscribers of each end, and commits once for all that came in
one turn of the loop. It has no history, usage, log, limits, retries, chains, leases or clean-up. What it does in a
second is what this machine, its disk and this interpreter allow.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

import apsw
import msgspec
import uvloop

from ksi.store.sqlite.checkpoint import sync_fully

_TABLES = """
CREATE TABLE request (
    key INTEGER PRIMARY KEY, id TEXT UNIQUE, conversation TEXT NOT NULL, state INTEGER NOT NULL, prompt TEXT,
    answer TEXT
);
CREATE INDEX line ON request (conversation, key) WHERE state = 0;
CREATE TABLE conversation (name TEXT PRIMARY KEY, holder INTEGER) WITHOUT ROWID;
"""
_WAITS, _RUNS = 0, 1

_ADD = "INSERT INTO request (key, id, conversation, state, prompt) VALUES (?, ?, ?, ?, ?)"
_END = "UPDATE request SET state = 2, answer = ? WHERE key = ?"
_NEXT = "SELECT key, id, prompt FROM request WHERE conversation = ? AND state = 0 ORDER BY key LIMIT 1"
_RUN = "UPDATE request SET state = 1 WHERE key = ?"
_HOLDER = "SELECT holder FROM conversation WHERE name = ?"
_BEGIN = "INSERT INTO conversation (name, holder) VALUES (?, ?)"
_HOLD = "UPDATE conversation SET holder = ? WHERE name = ?"


class Ask(msgspec.Struct):
    """What a request says."""

    prompt: str
    session_id: str
    request_id: str | None = None


class Line(msgspec.Struct):
    """One line."""

    event: str
    data: msgspec.Raw
    correlation_id: str | int | None = None


class Run(msgspec.Struct):
    """A request that runs."""

    key: int
    id: str
    conversation: str
    prompt: str


class BareCore:
    """The queue. Everything of one turn of the loop is one transaction."""

    def __init__(self, database: Path) -> None:
        self._loop = asyncio.get_running_loop()
        connection = apsw.Connection(str(database))
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        sync_fully(connection, commits=True)
        connection.execute(_TABLES)
        self._cursor = connection.cursor()
        self._arrived: list[tuple[Client, Line]] = []
        self._answered: list[tuple[Run, str]] = []
        self._clients: dict[int, tuple[Client, str | int | None]] = {}
        self._subscribers: list[Client] = []
        self._keys = 0
        self._due = False
        self._lines = msgspec.json.Decoder(Line)
        self._asks = msgspec.json.Decoder(Ask)

    def arrive(self, client: Client, line: bytes) -> None:
        """A line came."""
        self._arrived.append((client, self._lines.decode(line)))
        self._turn_soon()

    def _answer(self, run: Run) -> None:
        self._answered.append((run, f"echo: {run.prompt}"))
        self._turn_soon()

    def _turn_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._due = False
        arrived, self._arrived = self._arrived, []
        answered, self._answered = self._answered, []
        runs: list[Run] = []
        self._cursor.execute("BEGIN IMMEDIATE")
        for run, text in answered:
            runs += self._end(run, text)
        for client, line in arrived:
            if line.event in ("completion:async", "completion:request"):
                runs += self._enter(client, line)
            else:
                self._subscribers.append(client)
        self._cursor.execute("COMMIT")
        for client, line in arrived:
            if line.event != "completion:request":
                client.send(written(line.event, {"status": "queued"}, line.correlation_id))
        for run, text in answered:
            client, correlation_id = self._clients.pop(run.key)
            result = written("completion:result", {"status": "completed", "result": text}, correlation_id)
            for listener in (client, *self._subscribers):
                listener.send(result)
        for run in runs:
            self._loop.call_soon(self._answer, run)

    def _enter(self, client: Client, line: Line) -> list[Run]:
        ask = self._asks.decode(line.data)
        self._keys += 1
        key, name, conversation = self._keys, ask.request_id or f"r{self._keys}", ask.session_id
        self._clients[key] = (client, line.correlation_id)
        held = self._cursor.execute(_HOLDER, (conversation,)).fetchall()
        waits = bool(held) and held[0][0] is not None
        self._cursor.execute(_ADD, (key, name, conversation, _WAITS if waits else _RUNS, ask.prompt))
        if waits:
            return []
        if held:
            self._cursor.execute(_HOLD, (key, conversation))
        else:
            self._cursor.execute(_BEGIN, (conversation, key))
        return [Run(key, name, conversation, ask.prompt)]

    def _end(self, run: Run, text: str) -> list[Run]:
        self._cursor.execute(_END, (text, run.key))
        following = self._cursor.execute(_NEXT, (run.conversation,)).fetchall()
        self._cursor.execute(_HOLD, (following[0][0] if following else None, run.conversation))
        if not following:
            return []
        key, name, prompt = following[0]
        self._cursor.execute(_RUN, (key,))
        return [Run(cast(int, key), str(name), run.conversation, str(prompt))]


def written(event: str, data: object, correlation_id: str | int | None) -> bytes:
    """A line."""
    return msgspec.json.encode({"event": event, "data": data, "correlation_id": correlation_id}) + b"\n"


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, core: BareCore) -> None:
        self._core = core
        self._tail = b""
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to write."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take each whole line."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            self._core.arrive(self, line)

    def send(self, line: bytes) -> None:
        """Send a line, with all others of this turn."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(line)

    def _flush(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()


async def serve(database: Path, socket: Path) -> None:
    """Serve until the process ends."""
    core = BareCore(database)
    server = await asyncio.get_running_loop().create_unix_server(lambda: Client(core), str(socket))
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
