"""KSI's tools by the Model Context Protocol: the official SDK and the real Claude Code as clients."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.claude import environment, real_claude, until
from tests.daemon_process import clean_environ
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.http_door import Door, door

if TYPE_CHECKING:
    from mcp import ClientSession

TOOLS = ["ask", "submit", "result", "cancel", "status", "lock", "unlock", "usage", "budgets", "approvals", "approve"]
NEW = {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}}
TASKS: dict[str, Any] = {
    "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/tasks": {}}}
}


def bridge(home: Path) -> tuple[str, list[str]]:
    """The command that clients start."""
    return sys.executable, ["-m", "ksi.cli", "--home", str(home), "mcp"]


@asynccontextmanager
async def by_stdio(here: Door) -> AsyncIterator[ClientSession]:
    """The SDK's session with `ksi mcp`."""
    from mcp import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    command, arguments = bridge(here.daemon.config.home)
    server = StdioServerParameters(command=command, args=arguments, env=clean_environ())
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


@asynccontextmanager
async def by_http(here: Door) -> AsyncIterator[ClientSession]:
    """The SDK's session with `/mcp`."""
    import httpx2
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    headers = {"Authorization": f"Bearer {here.token}"}
    async with (
        httpx2.AsyncClient(headers=headers) as client,
        streamable_http_client(f"{here.url}/mcp", http_client=client) as (read, write, *_),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield session


@pytest.mark.promise("M1")
@pytest.mark.parametrize("way", [by_stdio, by_http])
async def test_the_sdk_lists_and_calls_the_tools(way: Any) -> None:
    budgets = {"daily": {"scope": "all", "requests": 10}}
    async with door(budgets=budgets) as here, way(here) as session:
        listed = (await session.list_tools()).tools
        assert [tool.name for tool in listed] == TOOLS
        assert all(tool.output_schema for tool in listed)
        asked = await session.call_tool("ask", {"prompt": "Hi.", "session_id": "talk"})
        assert (asked.is_error, asked.structured_content["text"]) == (False, "echo: Hi.")
        submitted = await session.call_tool("submit", {"prompt": "Later."})
        request_id = submitted.structured_content["request_id"]
        result = await session.call_tool("result", {"request_id": request_id, "timeout": 10})
        assert result.structured_content["text"] == "echo: Later."
        locked = await session.call_tool("lock", {"session_id": "talk"})
        released = await session.call_tool("unlock", {"lock_id": locked.structured_content["lock_id"]})
        assert released.structured_content["released"]
        assert (await session.call_tool("status", {})).structured_content["problems"] == []
        (budget,) = (await session.call_tool("budgets", {})).structured_content["budgets"]
        assert (budget["scope"], budget["unit"], budget["used"], budget["left"]) == ("all", "requests", 2, 8)
        used = await session.call_tool("usage", {})
        assert used.structured_content["requests"] == 2


@pytest.mark.promise("M1")
async def test_an_impossible_action_is_explained_to_the_model_in_words_that_it_can_act_on() -> None:
    async with door() as here, by_stdio(here) as session:
        wrong: list[tuple[str, dict[str, Any], str]] = [
            ("ask", {}, "prompt"),
            ("ask", {"prompt": "x", "model": "nobody/x"}, "no provider serves"),
            ("result", {"request_id": "none"}, "no request"),
            ("cancel", {"request_id": "none"}, "no request"),
            ("unlock", {"lock_id": "none"}, "none"),
        ]
        for name, arguments, words in wrong:
            told = await session.call_tool(name, arguments)
            assert told.is_error, name
            assert words in getattr(told.content[0], "text", ""), name


async def rpc(here: Door, method: str, params: dict[str, Any], **headers: str) -> Any:
    """One message of the protocol without a handshake."""
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return (await here.post("/mcp", message, **headers)).json


@pytest.mark.promise("M1")
async def test_a_client_without_a_handshake_discovers_the_server() -> None:
    async with door() as here:
        found = (await rpc(here, "server/discover", NEW))["result"]
        assert (found["supportedVersions"], found["capabilities"]) == (["2026-07-28"], {"tools": {}})
        first, second = [(await rpc(here, "tools/list", NEW))["result"] for _ in range(2)]
        assert first == second
        assert first["resultType"] == "complete"
        old = await rpc(here, "initialize", {"protocolVersion": "2024-11-05"})
        assert old["result"]["protocolVersion"] == "2024-11-05"


@pytest.mark.promise("M1")
@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"jsonrpc": "1.0"}, -32600),
        ([], -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "nothing/like/it"}, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "none"}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"taskId": "none"}}, -32602),
    ],
)
async def test_a_message_that_is_none_gets_the_protocols_error(message: Any, code: int) -> None:
    async with door() as here:
        assert (await here.post("/mcp", message)).json["error"]["code"] == code


@pytest.mark.promise("M1")
async def test_progress_is_reported_while_a_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksi.http.mcp.tools.TELL", 0.05)
    async with ScriptedEndpoint(Answer(delay=0.4)) as endpoint, door(endpoint) as here:
        params = {"name": "ask", "arguments": {"prompt": "x", "model": "anthropic/m"}, "_meta": {"progressToken": 7}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        reply = await here.post("/mcp", message, Accept="application/json, text/event-stream")
        told = [data for _, data in reply.events]
        assert {one["params"]["progressToken"] for one in told[:-1]} == {7}
        assert told[-1]["result"]["structuredContent"]["text"] == "Hello there."


@pytest.mark.promise("M1")
async def test_a_call_that_announces_tasks_is_answered_with_one_that_is_ksis_own_request() -> None:
    async with ScriptedEndpoint(Answer(delay=0.3)) as endpoint, door(endpoint) as here:
        params = {"name": "ask", "arguments": {"prompt": "x", "model": "anthropic/m"}, "_meta": TASKS}
        task = (await rpc(here, "tools/call", params))["result"]
        assert (task["resultType"], task["status"]) == ("task", "working")

        await here.get(f"/v1/requests/{task['taskId']}/stream")  # ends with the request
        ended = (await rpc(here, "tasks/get", {"taskId": task["taskId"]}))["result"]
        assert ended["result"]["structuredContent"]["text"] == "Hello there."
        assert await here.daemon.store.get(task["taskId"]) is not None


@pytest.mark.promise("M1")
async def test_a_client_that_does_not_wait_any_more_has_cancelled_its_call() -> None:
    async with ScriptedEndpoint(Answer(silent=True)) as endpoint, door(endpoint) as here, by_stdio(here) as session:
        asking = asyncio.create_task(session.call_tool("ask", {"prompt": "x", "model": "anthropic/m"}))
        await endpoint.wait_for_requests(1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(endpoint.requests[0].gone.wait(), 10)
        await until(lambda: not here.daemon.queue.runs)


@pytest.mark.promise("M1", "H1")
async def test_a_token_has_the_same_permissions_by_mcp_as_otherwise() -> None:
    async with door() as here:
        made = await here.post("/v1/events", {"event": "token:create", "data": {"name": "bob", "scope": "submit"}})
        bob = {"Authorization": f"Bearer {made.json['data']['token']}"}
        mine = await here.post("/v1/events", {"event": "completion:request", "data": {"prompt": "mine"}})
        asked = await rpc(here, "tools/call", {"name": "ask", "arguments": {"prompt": "his"}}, **bob)
        assert asked["result"]["structuredContent"]["text"] == "echo: his"
        other = {"name": "result", "arguments": {"request_id": mine.json["data"]["request_id"]}}
        assert (await rpc(here, "tools/call", other, **bob))["result"]["isError"]
        view = await here.daemon.store.get(asked["result"]["structuredContent"]["request_id"])
        assert view is not None
        assert (view.agent_id or "").startswith("bob")


@pytest.mark.promise("M1")
async def test_the_bridge_says_that_no_daemon_serves(tmp_path: Path) -> None:
    (tmp_path / "ksi.toml").write_text("")
    command, arguments = bridge(tmp_path)
    process = await asyncio.create_subprocess_exec(
        command,
        *arguments,
        env=clean_environ(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await asyncio.wait_for(
        process.communicate(b'{"jsonrpc":"2.0","id":3,"method":"ping"}\n{bad\n'), timeout=30
    )
    told = json.loads(said)
    assert (told["id"], "ksi start" in told["error"]["message"]) == (3, True)
    assert process.returncode == 0


@pytest.mark.promise("M1")
async def test_claude_code_asks_another_model_by_the_tools(tmp_path: Path) -> None:
    def script(seen: Seen) -> Answer:
        said = json.dumps(seen.json["messages"])
        if "asked by a tool" in said and not seen.json.get("tools"):
            return Answer(pieces=("the other's answer",))
        if "toolu_1" in said:
            return Answer(pieces=("It said: " + ("the other's answer" if "other's answer" in said else said[-300:]),))
        names = [tool["name"] for tool in seen.json.get("tools", ())]
        if "mcp__ksi__ask" not in names:
            return Answer(pieces=(f"no tool: {names}",))
        given = json.dumps({"prompt": "asked by a tool", "model": "anthropic/other"})
        block = {"type": "tool_use", "id": "toolu_1", "name": "mcp__ksi__ask", "input": {}}
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": {"id": "m", "role": "assistant", "content": [], "usage": {}}},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": given}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
        ]
        events[0]["message"] |= {"type": "message", "model": "m", "usage": {"input_tokens": 1, "output_tokens": 1}}
        return Answer(parts=tuple(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events))

    async with ScriptedEndpoint(script=script) as endpoint, door(endpoint) as here:
        command, arguments = bridge(here.daemon.config.home)
        server = {"type": "stdio", "command": command, "args": arguments, "alwaysLoad": True}
        (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"ksi": server}}))
        user = tmp_path / "user"
        user.mkdir()
        process = await asyncio.create_subprocess_exec(
            real_claude(),
            *("-p", "Ask the other.", "--model", "haiku", "--output-format", "json", "--strict-mcp-config"),
            *("--mcp-config", str(tmp_path / "mcp.json"), "--allowedTools", "mcp__ksi__*"),
            env={**environment(user, endpoint.url), **{k: v for k, v in clean_environ().items() if k == "PYTHONPATH"}},
            cwd=user,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 90)
        assert json.loads(out)["result"] == "It said: the other's answer"
