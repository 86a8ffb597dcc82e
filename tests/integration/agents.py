"""Agents for tests: the real Claude Code under KSI, whose model is a script that uses tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.claude import House, said
from tests.endpoint import Answer, ScriptedEndpoint, Seen
from tests.integration.serving import daemon_and_wire
from tests.integration.test_claude_tools import uses
from tests.integration.wire import Json, Wire

Think = Callable[[str, list[Any]], Answer | str]
"""The model of all agents: takes the turn's prompt and the results of its tools so far; a text is the answer."""


def call(tool: str, number: int = 1, **arguments: Any) -> Answer:
    """The model uses a tool of KSI's; `number` tells apart the calls of one turn."""
    return uses_numbered(f"mcp__ksi__{tool}", number, **arguments)


def uses_numbered(tool: str, number: int = 1, **arguments: Any) -> Answer:
    """The model uses a tool, for the so-manyth time in its turn."""
    answer = uses(tool, words=f"Step {number}.", **arguments)
    body = (answer.body or b"").replace(b"toolu_", b"toolu_%d_" % number).replace(b"msg_", b"msg_%d_" % number)
    return Answer(body=body, content_type=answer.content_type)


def uses_all(tool: str, *inputs: Mapping[str, Any]) -> Answer:
    """The model uses one tool several times in one message."""
    usage = {"input_tokens": 7, "output_tokens": 3}
    message = {"id": "msg_all", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
    for index, given in enumerate(inputs):
        block = {"type": "tool_use", "id": f"toolu_all_{index}", "name": tool, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(given)}
        events += [
            {"type": "content_block_start", "index": index, "content_block": block},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    events += [
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": usage},
        {"type": "message_stop"},
    ]
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return Answer(body=body.encode(), content_type="text/event-stream")


def results_of(seen: Seen) -> list[Any]:
    """The results of the present turn's tools, decoded if they are JSON."""
    found: list[Any] = []
    for message in seen.json["messages"]:
        content = message["content"] if isinstance(message["content"], list) else []
        results = [block for block in content if block.get("type") == "tool_result"]
        if message["role"] == "user" and not results:
            found.clear()
        found += [_plain(block["content"]) for block in results]
    return found


def _plain(content: Any) -> Any:
    text = content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
    try:
        return json.loads(text)
    except ValueError:
        return text


def prompt_of(seen: Seen) -> str:
    """The prompt of the present turn."""
    return next(text for role, text in reversed(said(seen)) if role == "user" and not text.startswith("["))


class Agents:
    """A home whose Claude Code thinks as the script says."""

    def __init__(self, folder: Path, url: str) -> None:
        self.house = House(folder, url)

    @asynccontextmanager
    async def served(
        self, *, slots: int = 4, sections: dict[str, Mapping[str, Any]] | None = None, **options: Any
    ) -> AsyncIterator[Wire]:
        """A daemon whose agents have KSI's tools, and a connection to it; `sections` are more of its configuration."""
        claude = {
            "kind": "claude-cli",
            "max_concurrency": slots,
            "idle_timeout": 30.0,
            **self.house.options(**{"ksi_tools": True, **options}),
        }
        settings: dict[str, Any] = (sections or {}) | {
            "providers": {"claude-cli": claude, "stub": {"kind": "stub", "models": ["stub/*"]}},
            "retry": {"initial_delay": 0.001, "max_delay": 0.002},
        }
        async with daemon_and_wire(self.house.home, **settings) as (_, wire):
            yield wire


@asynccontextmanager
async def agents(folder: Path, think: Think) -> AsyncIterator[Agents]:
    """Agents that think so."""

    def script(seen: Seen) -> Answer:
        thought = think(prompt_of(seen), results_of(seen))
        return thought if isinstance(thought, Answer) else Answer(pieces=(thought,))

    async with ScriptedEndpoint(script=script) as endpoint:
        yield Agents(folder, endpoint.url)


async def ask(wire: Wire, prompt: str, **fields: Any) -> Json:
    """Ask an agent, and wait for its answer."""
    return await wire.ask("completion:request", **{"model": "claude-cli/haiku", "prompt": prompt, **fields})
