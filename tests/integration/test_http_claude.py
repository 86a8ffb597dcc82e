"""The real Claude Code behind the HTTP door, before a scripted endpoint."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ksi.store.values import Listing
from tests.claude import environment, real_claude
from tests.daemon_process import DaemonProcess, make_home
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.http_door import Door, door

PATIENCE = 90.0


HOME = """
[service]
default_model = "anthropic/claude-x"
[http]
listen = "127.0.0.1:0"
[providers.anthropic]
kind = "anthropic"
base_url = "{url}"
max_concurrency = 4
"""


async def claude(folder: Path, url: str, token: str, prompt: str, *options: str) -> dict[str, Any]:
    """Run `claude -p` with this endpoint; gives its result."""
    environ = environment(folder, url)
    del environ["ANTHROPIC_API_KEY"]
    environ["ANTHROPIC_AUTH_TOKEN"] = token
    process = await asyncio.create_subprocess_exec(
        real_claude(),
        *("-p", prompt, "--model", "haiku", "--output-format", "json", *options),
        env=environ,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    found: dict[str, Any] = json.loads(out)
    return found


def tool_call(name: str, given: Mapping[str, Any], number: int) -> Answer:
    """A streamed message that calls a tool."""
    block = {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {}}
    told = json.dumps(given)
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": told}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]
    events[0]["message"] |= {"model": "claude-x", "usage": {"input_tokens": 10, "output_tokens": 1}}
    parts = tuple(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)
    return Answer(parts=parts)


async def request_ids(here: Door) -> list[str]:
    """The ids of all requests that have ended."""
    page = await here.daemon.store.requests(Listing.FINISHED, 100)
    return [row.request_id for row in page.items]


@pytest.mark.promise("H2")
async def test_claude_code_works_through_the_door_with_its_tools_and_subagents(tmp_path: Path) -> None:
    def script(seen: Seen) -> Answer:
        said = json.dumps(seen.json["messages"])
        sub = "cc_is_subagent=true" in json.dumps(seen.json["system"])
        if not sub and "toolu_" not in said:
            agent = {"description": "d", "prompt": "say so", "subagent_type": "general-purpose"}
            return tool_call("Agent", agent, 1)
        if sub and "toolu_" not in said:
            return tool_call("Bash", {"command": "echo seen-by-a-tool", "description": "d"}, 2)
        return Answer(pieces=("seen-by-a-tool" if "seen-by-a-tool" in said else "Done.",))

    async with ScriptedEndpoint(script=script) as endpoint, door(endpoint) as here:
        (tmp_path / "user").mkdir()
        allowed = ("--allowedTools", "Bash,Agent,Task")
        result = await claude(tmp_path / "user", here.url, here.token, "Begin.", *allowed)
        assert not result["is_error"], result
        assert any("seen-by-a-tool" in seen.body.decode() for seen in endpoint.requests)
        session = result["session_id"]
        found = [await here.daemon.store.get(request_id) for request_id in await request_ids(here)]
        accounts = {(view.agent_id or "", view.depth) for view in found if view is not None}
        main = {depth for agent, depth in accounts if agent == session}
        [sub] = {(agent, depth) for agent, depth in accounts if agent != session}
        assert main <= {None, 0}
        assert sub[0].startswith(f"{session}/a")
        assert sub[1] == 1


@pytest.mark.promise("H2", "Q2")
async def test_claude_code_gets_its_answer_although_the_daemon_is_killed_under_it(tmp_path: Path) -> None:
    async with ScriptedEndpoint(Answer(delay=3.0), Answer()) as endpoint:
        home = make_home(tmp_path / "home", HOME.format(url=endpoint.url))
        user = tmp_path / "user"
        user.mkdir()
        environ = {"ANTHROPIC_API_KEY": "k"}
        first = DaemonProcess(home, environ=environ)
        first.start()
        url = json.loads((home / "var/run/http.json").read_text())["url"]
        token = (home / "var/run/token").read_text().strip()
        asking = asyncio.create_task(claude(user, url, token, "Hello."))
        await endpoint.wait_for_requests(1, timeout=30)
        first.end(signal.SIGKILL)
        config = home / "ksi.toml"
        config.write_text(config.read_text().replace("127.0.0.1:0", url.removeprefix("http://")))
        with DaemonProcess(home, environ=environ):
            result = await asking
        assert (result["is_error"], result["result"]) == (False, "Hello there.")


@pytest.mark.promise("H2")
async def test_claude_code_gets_advice_if_no_provider_has_its_model(tmp_path: Path) -> None:
    async with door() as here:
        result = await claude(tmp_path, here.url, here.token, "Begin.")
    assert result["is_error"]
    assert "[http.models]" in result["result"]


def chat_call(name: str, *arguments: str) -> Answer:
    """A call of a tool as chat completions stream it: the first piece of the input comes with the call's name."""
    head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments[0]}}
    calls: list[dict[str, Any]] = [head]
    calls += [{"index": 0, "function": {"arguments": piece}} for piece in arguments[1:]]
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": None}, None)]
    deltas += [({"tool_calls": [call]}, None) for call in calls]
    deltas += [({}, "tool_calls")]
    frames = [
        {
            "id": "c1",
            "object": "chat.completion.chunk",
            "model": "gpt-x",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }
        for delta, reason in deltas
    ]
    parts = [f"data: {json.dumps(frame)}\n\n".encode() for frame in frames]
    return Answer(parts=(*parts, b"data: [DONE]\n\n"))


@pytest.mark.promise("H2", "A6")
async def test_claude_code_uses_its_tools_over_an_endpoint_of_openais_kind(tmp_path: Path) -> None:
    def script(seen: Seen) -> Answer:
        said = json.dumps(seen.json["messages"])
        if "call_1" not in said:
            return chat_call("Bash", '{"command": "ec', 'ho seen-by-a-tool", ', '"description": "d"}')
        return Answer(pieces=("It said ", "seen-by-a-tool." if '"seen-by-a-tool' in said else "nothing."))

    models = {"models": {"claude-*": "openai/gpt-x", "haiku": "openai/gpt-x"}}
    async with ScriptedEndpoint(script=script) as endpoint, door(openai=endpoint, http=models) as here:
        result = await claude(tmp_path, here.url, here.token, "Begin.", "--allowedTools", "Bash")
    assert (result["is_error"], result["result"]) == (False, "It said seen-by-a-tool.")
