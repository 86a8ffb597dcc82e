"""Claude Code with tools, files, commands and servers, if the configuration or a request asks for them."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from ksi.errors import ProviderError
from tests.claude import House, Talk, living, number_messages, said, system_of, until
from tests.endpoint import Answer, ScriptedEndpoint, Seen

SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    if asked["method"] == "initialize":
        result = {
            "protocolVersion": asked["params"]["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "calc", "version": "1"},
        }
    elif asked["method"] == "tools/list":
        schema = {"type": "object", "properties": {"a": {"type": "number"}}}
        result = {"tools": [{"name": "double", "description": "Doubles a number.", "inputSchema": schema}]}
    elif asked["method"] == "tools/call":
        result = {"content": [{"type": "text", "text": str(asked["params"]["arguments"]["a"] * 2)}]}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""
"""An MCP server with one tool."""


def uses(tool: str, words: str = "I will see.", **arguments: Any) -> Answer:
    """An answer that says something and then wants a tool."""
    usage = {"input_tokens": 7, "output_tokens": 3}
    block = {"type": "tool_use", "id": f"toolu_{tool}", "name": tool, "input": {}}
    events: list[dict[str, Any]] = [
        {
            "type": "message_start",
            "message": {
                "id": f"msg_{tool}",
                "type": "message",
                "role": "assistant",
                "model": "claude-scripted",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            },
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": words}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": block},
        {
            "type": "content_block_delta",
            "index": 1,
            "delta": {"type": "input_json_delta", "partial_json": json.dumps(arguments)},
        },
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return Answer(body=body.encode(), content_type="text/event-stream")


def results(seen: Seen) -> list[Any]:
    """The results of tools in an endpoint's last request."""
    content = seen.json["messages"][-1]["content"]
    return [b["content"] for b in content if b["type"] == "tool_result"] if isinstance(content, list) else []


def tool_results(seen: Seen) -> list[Any]:
    """The results of tools in all that an endpoint was sent."""
    blocks = [b for m in seen.json["messages"] if isinstance(m["content"], list) for b in m["content"]]
    return [block["content"] for block in blocks if block["type"] == "tool_result"]


def tools(seen: Seen) -> list[str]:
    """The tools that an endpoint was offered."""
    return [tool["name"] for tool in seen.json.get("tools", [])]


class Scene:
    """A house, its endpoint, and the endpoint's answers."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint) -> None:
        self.house = house
        self.endpoint = endpoint

    async def talk(self, **options: Any) -> Talk:
        return Talk(await self.house.provider(**options))

    def answer(self, *answers: Answer) -> None:
        self.endpoint.answers.clear()
        self.endpoint.answers.extend(answers)


@pytest_asyncio.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint() as endpoint:
        house = House(tmp_path, endpoint.url)
        yield Scene(house, endpoint)
        await house.close()


@pytest.mark.promise("T1", "L7")
async def test_a_tool_works_in_the_folder_and_its_turn_is_one_turn_of_ours(scene: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    talk = await scene.talk(tools=["Bash"], allowed_tools=["Bash"], cwd=str(folder))
    scene.answer(uses("Bash", command="pwd > where", description="Where"), Answer(pieces=("It is ", "done.")))
    first = await talk.say("Where are you?")
    assert (folder / "where").read_text().strip() == str(folder)
    assert first.text == "It is done."
    assert "".join(talk.pieces) == "I will see.\n\nIt is done."
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.output_tokens) == (17, 8), "both calls, each once"
    assert tools(scene.endpoint.requests[0]) == ["Bash"]
    second = await talk.say("And now?")
    assert (first.fork, second.fork) == (None, None)
    assert talk.provider.report()["warm"] == 1
    await talk.provider.stop()
    talk.provider = await scene.house.provider(tools=["Bash"], allowed_tools=["Bash"], cwd=str(folder))
    third = await talk.say("Still?")
    assert third.fork is None
    assert len(tool_results(scene.endpoint.requests[-1])) == 1


@pytest.mark.promise("F7", "F9")
async def test_a_tool_that_runs_ends_with_its_cancelled_turn(scene: Scene, tmp_path: Path) -> None:
    talk = await scene.talk(tools=["Bash"], allowed_tools=["Bash"])
    note = tmp_path / "pid"
    scene.answer(uses("Bash", command=f"echo $$ > {note}; exec sleep 600", description="Sleep"))
    answer = await talk.begin(talk.call("Sleep."))
    sleeper = int(await until(lambda: note.exists() and note.read_text()))
    assert living([sleeper]) == [sleeper]
    await answer.aclose()
    await until(lambda: not living([sleeper]), patience=5)


async def test_a_tool_that_is_not_allowed_is_not_run(scene: Scene, tmp_path: Path) -> None:
    talk = await scene.talk(tools=["Bash"])
    note = tmp_path / "note"
    scene.answer(uses("Bash", command=f"touch {note}", description="Touch"), Answer())
    await talk.say("Touch it.")
    assert not note.exists()
    assert len(tool_results(scene.endpoint.requests[-1])) == 1


@pytest.mark.parametrize("whole", [True, False])
async def test_a_request_brings_its_own_servers(scene: Scene, tmp_path: Path, whole: bool) -> None:
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    servers = {"calc": {"command": sys.executable, "args": ["-I", str(program)]}}
    talk = await scene.talk(allowed_tools=["mcp__calc__double"])
    scene.answer(uses("mcp__calc__double", a=21), Answer(pieces=("It is 42.",)))
    completion = await talk.say("Twice 21?", mcp_config={"mcpServers": servers} if whole else servers)
    assert completion.text == "It is 42."
    assert "mcp__calc__double" in tools(scene.endpoint.requests[0])
    assert "42" in json.dumps(tool_results(scene.endpoint.requests[-1]))
    await talk.say("Without it?")
    assert tools(scene.endpoint.requests[-1]) == []


async def test_a_server_that_does_not_start_is_in_the_log(scene: Scene) -> None:
    talk = await scene.talk()
    with capture_logs() as logs:
        completion = await talk.say("hi", mcp_config={"broken": {"command": "no-such-program"}})
    assert completion.text
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert (warning["servers"], warning["request_id"]) == (("broken",), "r1")


async def test_a_request_sets_its_own_options(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("one", options={"tools": ["Read", "Grep"], "system_prompt": "Be a pirate."})
    (request,) = scene.endpoint.requests
    assert sorted(tools(request)) == ["Grep", "Read"]
    assert system_of(request) == "Be a pirate."


async def test_claude_code_s_own_system_prompt_takes_a_request_s_behind_it(scene: Scene) -> None:
    talk = await scene.talk(system_prompt="claude-code")
    await talk.say("one", system="Speak like a pirate.")
    text = "".join(block["text"] for block in scene.endpoint.requests[0].json["system"])
    assert "Speak like a pirate." in text
    assert "You are a helpful assistant." not in text
    assert len(text) > 2000


@pytest.mark.promise("S3")
async def test_mentions_and_commands_work_only_if_they_are_allowed(scene: Scene, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("the secret word is xylophone")
    plain = await scene.talk()
    await plain.say(f"What does @{note} say?")
    assert b"xylophone" not in scene.endpoint.requests[-1].body
    open_ = await scene.talk(mentions=True, commands=True)
    await open_.say(f"What does @{note} say?")
    assert b"xylophone" in scene.endpoint.requests[-1].body
    with pytest.raises(ProviderError, match="asked no model"):
        await open_.attempt(open_.call("/cost"))


@pytest.mark.promise("S3")
async def test_no_setting_of_the_user_counts_unless_it_is_asked_for(scene: Scene) -> None:
    folder = scene.house.projects.parent
    folder.mkdir(parents=True)
    note = folder / "hooked"
    hook = {"hooks": [{"type": "command", "command": f"touch {note}"}]}
    (folder / "settings.json").write_text(json.dumps({"hooks": {"UserPromptSubmit": [hook]}}))
    (folder / "CLAUDE.md").write_text("Always mention the xylophone.")
    await (await scene.talk()).say("hi")
    assert not note.exists()
    assert b"xylophone" not in scene.endpoint.requests[-1].body
    await (await scene.talk(setting_sources=["user"])).say("hi")
    assert note.exists()


async def test_further_arguments_reach_the_program(scene: Scene) -> None:
    talk = await scene.talk(extra_args=["--append-system-prompt=And be brief."])
    await talk.say("hi")
    assert "And be brief." in system_of(scene.endpoint.requests[-1])


@pytest.mark.promise("S3")
async def test_a_process_gets_no_keys_but_its_own(scene: Scene) -> None:
    daemon_has = {
        "OPENAI_API_KEY": "sk-secret",
        "CLAUDECODE": "1",
        "ANTHROPIC_CUSTOM_HEADERS": "x-team: one",
        "LANG": "C",
        "PROJECT": "p",
    }
    talk = await scene.talk(environ=daemon_has, pass_env=["PROJECT"])
    await talk.say("hi")
    (row,) = talk.provider.report()["processes"]
    names = set(psutil.Process(row["pid"]).environ())
    assert {"HOME", "ANTHROPIC_API_KEY", "ANTHROPIC_CUSTOM_HEADERS", "LANG", "PROJECT"} <= names
    assert not {"OPENAI_API_KEY", "CLAUDECODE"} & names
    assert scene.endpoint.requests[-1].headers["x-team"] == "one"


async def test_private_arguments_are_in_files_that_go_with_the_process(scene: Scene) -> None:
    talk = await scene.talk()
    await talk.say("hi", system="my private words")
    (row,) = talk.provider.report()["processes"]
    assert "my private words" not in " ".join(psutil.Process(row["pid"]).cmdline())
    files = scene.house.home / "var" / "run" / "claude-cli" / "files"
    (folder,) = files.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    await talk.provider.stop()
    assert list(files.iterdir()) == []
    assert said(scene.endpoint.requests[0]) == [("user", "hi")]
