"""The Model Context Protocol, as far as a server of tools needs it: old and new versions, one message at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ksi.errors import KsiError

Json = dict[str, Any]

NEWEST = "2026-07-28"
"""The version without a handshake."""
HANDSHAKES = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""The versions that begin with `initialize`, the newest first."""

TASKS = "io.modelcontextprotocol/tasks"
"""The extension by which a call is answered with a task, which the client then looks after."""
_CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"
_SERVER = "io.modelcontextprotocol/serverInfo"

INVALID_REQUEST, UNKNOWN_METHOD, INVALID_PARAMS, INTERNAL = -32600, -32601, -32602, -32603

TASK_TTL = 3_600_000
"""Milliseconds for which a client may look at a task after it was made."""
TASK_POLL = 1_000
"""Milliseconds between two looks of a client at a task."""


class RpcError(Exception):
    """A message that cannot be answered; `code` is JSON-RPC's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as clients see it."""

    name: str
    description: str
    takes: type[msgspec.Struct]
    gives: type[msgspec.Struct]
    read_only: bool = False
    """Clients may run several calls of it concurrently; calls of others run one after the other."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool, and its progress reports."""

    tool: Tool
    data: Any
    """The value of one of the tool's arguments."""
    meta: Mapping[str, Any]
    progress: Callable[[float, str], None]
    """Takes how far it is, from 0 to 1, and a sentence."""

    @property
    def takes_task(self) -> bool:
        """True if the client understands an answer that is a task."""
        told = self.meta.get(_CAPABILITIES)
        extensions = told.get("extensions") if isinstance(told, dict) else None
        return isinstance(extensions, dict) and TASKS in extensions


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A call that continues by itself."""

    task_id: str
    created_at: str
    """ISO 8601."""
    message: str
    result: msgspec.Struct | None = None
    """Its result, once it is done."""
    failed: str | None = None
    """Why it gave nothing."""


class Handler(Protocol):
    """The executor of the tools."""

    @property
    def tools(self) -> Sequence[Tool]:
        """All tools, always in the same order."""
        ...

    async def call(self, call: Call) -> msgspec.Struct | Task:
        """Call a tool.

        Raises:
            KsiError: it cannot be done; the message gives advice.
        """
        ...

    async def task(self, task_id: str) -> Task:
        """The present state of a call that continues by itself.

        Raises:
            KsiError: there is no such task.
        """
        ...

    async def cancel_task(self, task_id: str) -> None:
        """End a call that continues by itself."""
        ...


Notify = Callable[[Json], None]


class Session:
    """One client's messages. Calls of tools that run are known by their message's id, so that it can cancel them."""

    def __init__(self, handler: Handler, version: str, instructions: str) -> None:
        """`version` is KSI's own, `instructions` are for the model that uses the tools."""
        self._handler = handler
        self._version = version
        self._instructions = instructions
        self._tools = {tool.name: tool for tool in handler.tools}
        self._running: dict[str | int, asyncio.Task[Any]] = {}

    async def answer(self, message: Any, notify: Notify) -> Json | None:
        """The answer to one message; None for one that wants none. `notify` sends messages before the answer."""
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            return _failed(None, RpcError(INVALID_REQUEST, "a message is a JSON-RPC 2.0 object"))
        method, identity = message.get("method"), message.get("id")
        params = message.get("params") or {}
        if not isinstance(method, str) or not isinstance(params, dict):
            return _failed(identity, RpcError(INVALID_REQUEST, "method: expected a string, params: an object"))
        if identity is None:
            self._notified(method, params)
            return None
        try:
            result = await self._result(method, params, identity, notify)
        except RpcError as error:
            return _failed(identity, error)
        return {"jsonrpc": "2.0", "id": identity, "result": result}

    def _notified(self, method: str, params: Json) -> None:
        if method == "notifications/cancelled":
            running = self._running.get(params.get("requestId", ""))
            if running is not None:
                running.cancel()

    async def _result(self, method: str, params: Json, identity: str | int, notify: Notify) -> Json:
        match method:
            case "server/discover":
                return self._discovered()
            case "initialize":
                return self._initialized(params)
            case "ping":
                return {}
            case "tools/list":
                return _whole({"tools": [_shown(tool) for tool in self._tools.values()]}, cached=True)
            case "tools/call":
                return await self._called(params, identity, notify)
            case "tasks/get":
                return _whole(_task(await self._tell(self._handler.task(_text(params, "taskId")))))
            case "tasks/cancel":
                await self._tell(self._handler.cancel_task(_text(params, "taskId")))
                return _whole({})
        raise RpcError(UNKNOWN_METHOD, f"there is no method {method[:100]!r}")

    def _discovered(self) -> Json:
        found = {"supportedVersions": [NEWEST], "capabilities": {"tools": {}}, "instructions": self._instructions}
        about = {_SERVER: {"name": "ksi", "version": self._version}}
        return {**_whole(found, cached=True), "_meta": about}

    def _initialized(self, params: Json) -> Json:
        asked = params.get("protocolVersion")
        return {
            "protocolVersion": asked if asked in HANDSHAKES else HANDSHAKES[0],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "ksi", "version": self._version},
            "instructions": self._instructions,
        }

    async def _called(self, params: Json, identity: str | int, notify: Notify) -> Json:
        tool = self._tools.get(_text(params, "name"))
        if tool is None:
            raise RpcError(INVALID_PARAMS, f"there is no tool {str(params.get('name'))[:100]!r}")
        meta = params.get("_meta")
        meta = meta if isinstance(meta, dict) else {}
        try:
            data = msgspec.convert(params.get("arguments") or {}, tool.takes)
        except msgspec.ValidationError as error:
            return _refused(f"the arguments do not fit: {error}")
        call = Call(tool=tool, data=data, meta=meta, progress=_progress(meta.get("progressToken"), notify))
        running = asyncio.ensure_future(self._handler.call(call))
        self._running[identity] = running
        try:
            given = await running
        except KsiError as error:
            return _refused(error.message)
        finally:
            self._running.pop(identity, None)
            if not running.done():
                running.cancel()
        return {"resultType": "task", **_task(given)} if isinstance(given, Task) else _given(given)

    async def _tell(self, looked: Awaitable[Any]) -> Any:
        try:
            return await looked
        except KsiError as error:
            raise RpcError(INVALID_PARAMS, error.message) from None


def _text(params: Json, name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str):
        raise RpcError(INVALID_PARAMS, f"{name}: expected a string")
    return value


def _progress(token: Any, notify: Notify) -> Callable[[float, str], None]:
    def tell(share: float, message: str) -> None:
        if token is not None:
            told = {"progressToken": token, "progress": share, "total": 1.0, "message": message}
            notify({"jsonrpc": "2.0", "method": "notifications/progress", "params": told})

    return tell


def _failed(identity: Any, error: RpcError) -> Json:
    return {"jsonrpc": "2.0", "id": identity, "error": {"code": error.code, "message": error.message}}


def _whole(result: Json, *, cached: bool = False) -> Json:
    kept = {"ttlMs": 0, "cacheScope": "private"} if cached else {}
    return {"resultType": "complete", **result, **kept}


def _given(value: msgspec.Struct) -> Json:
    told = msgspec.to_builtins(value)
    content = [{"type": "text", "text": msgspec.json.encode(told).decode()}]
    return _whole({"content": content, "structuredContent": told, "isError": False})


def _refused(message: str) -> Json:
    """An error that the model can act on, and not its client."""
    return _whole({"content": [{"type": "text", "text": message}], "isError": True})


def _task(task: Task) -> Json:
    status = "working" if task.result is None and task.failed is None else "completed"
    told: Json = {
        "taskId": task.task_id,
        "status": status,
        "statusMessage": task.message,
        "ttlMs": TASK_TTL,
        "pollIntervalMs": TASK_POLL,
        "createdAt": task.created_at,
        "lastUpdatedAt": task.created_at,
    }
    if task.result is not None:
        told["result"] = _given(task.result)
    elif task.failed is not None:
        told["result"] = _refused(task.failed)
    return told


def _shown(tool: Tool) -> Json:
    return {
        "name": tool.name,
        "description": tool.description,
        "inputSchema": schema_of(tool.takes),
        "outputSchema": schema_of(tool.gives),
        "annotations": {"readOnlyHint": tool.read_only},
    }


def schema_of(kind: type[msgspec.Struct]) -> Json:
    """A type's JSON Schema, with the schemas that it refers to."""
    (schema,), parts = msgspec.json.schema_components((kind,), ref_template="#/$defs/{name}")
    found = dict(parts.pop(schema["$ref"].rpartition("/")[2]))
    return {**found, "$defs": parts} if parts else found
