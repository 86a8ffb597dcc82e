"""The cost of MCP servers' tools with the real Claude Code: reported as its endpoint counted it, and not guessed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ksi.request import Usage
from tests.claude import House, number_messages
from tests.daemon_process import clean_environ
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import daemon_and_wire
from tests.integration.wire import Json, Wire, in_state

SERVER = """
import json, sys
WORDS = {
    "lookup": "Looks a word up in the house's own dictionary and gives its meanings with their sources.",
    "convert": "Converts an amount from one currency to another, at the rate of a day that may lie in the past.",
    "remind": "Notes something that is to be remembered until a day, for one person or for the whole team.",
}
TEXT = {"type": "string", "description": "What it is about, in plain words; no markup, no more than a sentence."}
SCHEMA = {"type": "object", "properties": {"what": TEXT, "when": TEXT, "who": TEXT}, "required": ["what"]}
ANSWERS = {
    "initialize": {"capabilities": {"tools": {}}, "serverInfo": {"name": "house", "version": "1"}},
    "tools/list": {"tools": [{"name": n, "description": d, "inputSchema": SCHEMA} for n, d in WORDS.items()]},
}
for line in sys.stdin:
    asked = json.loads(line)
    if "id" in asked:
        result = dict(ANSWERS.get(asked["method"], {}))
        if asked["method"] == "initialize":
            result["protocolVersion"] = asked["params"]["protocolVersion"]
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""
"""An MCP server with three tools."""
TOOLS = ["mcp__house__convert", "mcp__house__lookup", "mcp__house__remind"]


def count(part: Any) -> int:
    """How many tokens the endpoint takes a part of a request for."""
    return len(json.dumps(part)) // 4


def counting(seen: Seen) -> Answer:
    """An endpoint that counts its input: the system prompt as read from its cache, the rest as input."""
    asked = seen.json
    cached = count(asked["system"]) + count(asked.get("tools", []))
    usage = Usage(input_tokens=count(asked["messages"]), output_tokens=3, cache_read_tokens=cached)
    return Answer(pieces=("I know ", "that."), usage=usage)


class Place:
    """A home with Claude Code in it, an MCP server's configuration, and the endpoint that counts."""

    def __init__(self, house: House, endpoint: ScriptedEndpoint, folder: Path) -> None:
        self.house = house
        self.endpoint = endpoint
        self.folder = folder
        program = folder / "server.py"
        program.write_text(SERVER)
        self.servers: Json = {"house": {"command": sys.executable, "args": ["-I", str(program)]}}
        self.file = folder / "servers.json"
        self.file.write_text(json.dumps({"mcpServers": self.servers}))

    @asynccontextmanager
    async def served(self, **more: Json) -> AsyncIterator[Wire]:
        """A daemon with Claude Code."""
        providers = {"claude-cli": {"kind": "claude-cli", "priority": 1, **self.house.options()}, **more}
        async with daemon_and_wire(self.house.home, providers=providers) as (_, wire):
            yield wire

    def ways(self) -> list[Json | str]:
        """The ways in which a request may bring the server."""
        return [self.servers, {"mcpServers": self.servers}, str(self.file)]

    def sent(self) -> list[tuple[list[str], int]]:
        """The endpoint's input: the tools' names, and all of it in its own tokens."""
        return [
            (
                sorted(tool["name"] for tool in asked.get("tools", [])),
                count(asked["messages"]) + count(asked["system"]) + count(asked.get("tools", [])),
            )
            for asked in (seen.json for seen in self.endpoint.requests)
        ]


@pytest_asyncio.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    number_messages(monkeypatch)
    async with ScriptedEndpoint(script=counting) as endpoint:
        yield Place(House(tmp_path, endpoint.url), endpoint, tmp_path)


async def ask(wire: Wire, prompt: str, **fields: Any) -> Json:
    reply = await wire.ask("completion:request", model="haiku", prompt=prompt, **fields)
    assert reply["status"] == "completed", reply
    return reply


@pytest.mark.promise("T2")
async def test_the_cost_of_the_definitions_is_the_difference_that_the_endpoint_counted(place: Place) -> None:
    async with place.served() as wire:
        for number, servers in enumerate(place.ways()):
            with_them = await ask(wire, f"What is {number}?", session_id=f"with {number}", mcp_config=servers)
            without = await ask(wire, f"What is {number}?", session_id=f"without {number}")
            assert with_them["usage"]["input_tokens"] == without["usage"]["input_tokens"]
        await ask(wire, "A later turn has a history, and is not compared.", session_id="without 0")
        mcp = (await wire.ask("completion:token_usage"))["mcp"]
        shown = await asyncio.to_thread(ksi, place.house.home, "usage", "--by", "model")
    counted = place.sent()
    having = [tokens for tools, tokens in counted if tools == TOOLS]
    lacking = [tokens for tools, tokens in counted if tools == []]
    assert (len(having), len(lacking)) == (3, 4)
    each = having[0] - lacking[0]
    assert each > 200
    assert [a - b for a, b in zip(having, lacking[:3], strict=True)] == [each] * 3

    (told,) = mcp["definitions"]
    assert (told["provider"], told["model"], told["attempts"]) == ("claude-cli", "claude-cli/haiku", 3)
    assert (told["tokens_per_request"], told["tokens"]) == (each, 3 * each)
    assert told["with_mcp"] == {"turns": 3, "input_tokens": having[0]}
    assert told["without_mcp"] == {"turns": 3, "input_tokens": lacking[0]}
    assert mcp["totals"]["requests"] == 3
    assert mcp["totals"]["input_tokens"] + mcp["totals"]["cache_read_tokens"] == sum(having)
    assert f"{each:,}" in shown.split("the cost of the tools' definitions")[1]


@pytest.mark.promise("T2")
async def test_only_the_servers_of_the_request_are_there_whatever_the_user_has(place: Place) -> None:
    others = {"mcpServers": {"theirs": place.servers["house"]}}
    (place.house.work).mkdir(parents=True)
    (place.house.work / ".mcp.json").write_text(json.dumps(others))
    configured = Path(place.house.variables["CLAUDE_CONFIG_DIR"])
    configured.mkdir(parents=True)
    (configured / ".claude.json").write_text(json.dumps({**others, "enableAllProjectMcpServers": True}))
    async with place.served() as wire:
        await ask(wire, "Without any?")
        for servers in place.ways():
            await ask(wire, "With mine?", mcp_config=servers)
    assert [tools for tools, _ in place.sent()] == [[], TOOLS, TOOLS, TOOLS]


@pytest.mark.promise("F4")
async def test_a_provider_without_mcp_is_not_chosen_for_a_request_with_servers(place: Place) -> None:
    plain: Json = {"kind": "stub", "models": ["claude-cli/*"], "priority": 0}
    async with place.served(plain=plain) as wire:
        assert (await ask(wire, "Without any?"))["provider"] == "plain"
        assert (await ask(wire, "With mine?", mcp_config=place.servers))["provider"] == "claude-cli"
        await wire.ask("provider:disable", provider="claude-cli")
        waits = await wire.ask("completion:async", model="haiku", prompt="And now?", mcp_config=place.servers)
        await in_state(wire, waits["request_id"], "queued")
        await wire.ask("provider:enable", provider="claude-cli")
        reply = await wire.ask("completion:wait", request_id=waits["request_id"])
        assert (reply["status"], reply["provider"]) == ("completed", "claude-cli")
    assert [tools for tools, _ in place.sent()] == [TOOLS, TOOLS]


@pytest.mark.promise("F1", "F3")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{nope", "no configuration of MCP servers"),
        ("{}", "missing required field `mcpServers`"),
        ('{"mcpServers": {"house": 5}}', "Expected `object`, got `int`"),
        ("x" * 2**20 + "x", "is larger than"),
    ],
    ids=["none", "no JSON", "no servers", "no server", "too large"],
)
async def test_servers_that_cannot_be_read_are_the_request_s_fault(
    place: Place, content: str | None, says: str
) -> None:
    place.file.unlink()
    if content is not None:
        place.file.write_text(content)
    async with place.served() as wire:
        for _ in range(6):  # more than it takes to be left alone
            reply = await wire.ask("completion:request", model="haiku", prompt="With mine?", mcp_config=str(place.file))
            assert (reply["status"], reply["error"]["code"]) == ("failed", "invalid_request")
            assert says in reply["error"]["message"]
            assert len(reply["attempts"]) == 1
        status = await wire.ask("completion:provider_status")
        assert status["providers"]["claude-cli"]["breaker"] == "closed"
    assert place.sent() == []


async def test_a_file_of_servers_counts_as_it_stands_at_each_turn(place: Place) -> None:
    async with place.served() as wire:
        await ask(wire, "With mine?", session_id="talk", mcp_config=str(place.file))
        place.file.write_text('{"mcpServers": {}}')
        await ask(wire, "And now?", session_id="talk", mcp_config=str(place.file))
    assert [tools for tools, _ in place.sent()] == [TOOLS, []]


async def test_the_configuration_s_own_servers_that_cannot_be_read_are_the_provider_s_fault(place: Place) -> None:
    spare: Json = {"kind": "stub", "models": ["claude-cli/*"], "priority": 2}
    claude: Json = {"kind": "claude-cli", "priority": 1, **place.house.options(mcp_config="no/such.json")}
    async with place.served(**{"claude-cli": claude, "spare": spare}) as wire:
        reply = await ask(wire, "Without mine?")
    assert [entry.get("error") for entry in reply["attempts"]] == ["provider_error", None]
    assert "no/such.json cannot be read" in reply["attempts"][0]["message"]
    assert reply["provider"] == "spare"


def ksi(home: Path, *args: str) -> str:
    command = [sys.executable, "-m", "ksi.cli", "--home", str(home), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environ(), check=True)
    return done.stdout
