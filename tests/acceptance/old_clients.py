"""Version 1's clients, rewritten: its test script, its chat client, and two kinds of library.

Each reads only the keys that the old one read from a line, so that a missing or changed key is noticed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Json = dict[str, Any]

PATIENCE = 60.0


def one_shot(path: Path, event: str, data: Json) -> Json:
    """The script's way: connect, send a line, read up to the first newline, and take all of it for one answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.send(json.dumps({"event": event, "data": data}).encode() + b"\n")
        response = b""
        while b"\n" not in response:
            chunk = client.recv(4096)
            if not chunk:
                break
            response += chunk
    answer: Json = json.loads(response.decode().strip())
    return answer


def balanced(path: Path, event: str, data: Json) -> Json:
    """The small library's way: read until the braces are balanced; an `error` is raised, else `data` is the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(json.dumps({"event": event, "data": data}).encode() + b"\n")
        read = b""
        while not read or read.count(b"{") != read.count(b"}"):
            chunk = client.recv(4096)
            if not chunk:
                break
            read += chunk
    envelope = json.loads(read.decode())
    if "error" in envelope:
        raise RuntimeError(f"Daemon error: {envelope['error']}")
    answer: Json = envelope["data"]
    return answer


class ChatClient:
    """The chat's client: announces itself, asks asynchronously without a correlation id, and waits for the result."""

    def __init__(self, path: Path, client_id: str = "chat") -> None:
        self._path = path
        self._client_id = client_id
        self._waiting: dict[str, asyncio.Future[Json]] = {}
        self._results: dict[str, asyncio.Future[Json]] = {}
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        self._task = asyncio.create_task(self._listen())
        await self._emit("transport:connection", {"client_id": self._client_id, "action": "connect"})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._emit("transport:connection", {"client_id": self._client_id, "action": "disconnect"})
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        await self._writer.wait_closed()

    async def health(self) -> Json:
        """A correlated question; its answer is in `data`."""
        correlation = str(uuid.uuid4())
        future = self._waiting[correlation] = asyncio.get_running_loop().create_future()
        await self._emit("system:health", {}, correlation)
        return await asyncio.wait_for(future, PATIENCE)

    async def send_prompt(
        self, prompt: str, session_id: str | None, model: str = "claude_cli/sonnet"
    ) -> tuple[str, str]:
        """The answer's text and the session to continue in."""
        request_id = f"{self._client_id}_{next(self._numbers)}"
        data = {
            "prompt": prompt,
            "model": model,
            "client_id": self._client_id,
            "priority": "normal",
            "request_id": request_id,
        }
        if session_id:
            data["session_id"] = session_id
        future = self._results[request_id] = asyncio.get_running_loop().create_future()
        await self._emit("completion:async", data)
        result = await asyncio.wait_for(future, PATIENCE)
        if result.get("status") == "error":
            raise ValueError(result.get("error", "Completion failed"))
        return parse(result)

    async def _emit(self, event: str, data: Json, correlation: str | None = None) -> None:
        message: Json = {"event": event, "data": data, "client_id": self._client_id, "timestamp": 12.5}
        if correlation is not None:
            message["correlation_id"] = correlation
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            message = json.loads(line.decode().strip())
            waiting = self._waiting.pop(message.get("correlation_id", ""), None)
            if waiting is not None:
                waiting.set_result(message.get("data", {}))
            elif message.get("event") == "completion:result":
                data = message["data"]
                future = self._results.pop(data.get("request_id"), None)
                if future is not None:
                    future.set_result(data)


def parse(stored: Json) -> tuple[str, str]:
    """Text and session of a standardised response, by the rules of version 1's helpers."""
    if "ksi" not in stored or "response" not in stored:
        raise ValueError("Invalid completion response format")
    provider, response = stored["ksi"]["provider"], stored["response"]
    if provider == "openai":
        text, session = response["choices"][0]["message"]["content"], None
    elif provider == "anthropic-api":
        text, session = response["content"][0]["text"], None
    else:
        text, session = response.get("result", ""), response.get("session_id")
    if not session:
        raise ValueError("Completed but no session_id")
    return text, session


def summary(event_data: Json) -> Json:
    """A `completion:result` event as the modular service's readers take it."""
    if "error" in event_data:
        return {"status": "error", "error": event_data["error"], "request_id": event_data.get("request_id")}
    text, session = parse(event_data["result"])
    return {"status": "completed", "response": text, "session_id": session, "request_id": event_data["request_id"]}
