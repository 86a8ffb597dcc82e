"""The real Claude Code for tests, a scripted one in its place, and a conversation led as the daemon leads it."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from ksi.clock import Clock, SystemClock
from ksi.content.blocks import Content, Message
from ksi.providers.base import Call, Chunk, Completion, Setting, Thought, ToolUsed
from ksi.providers.claude_cli import ClaudeProvider, Options, build
from tests import endpoint

NAMED_BY = "KSI_TEST_CLAUDE"
"""The variable that names another Claude Code than the one of the test environment."""
WHEEL = "claude_agent_sdk"
SCRIPTED = Path(__file__).with_name("scripted_claude.py")


def real_claude() -> str:
    """The program. That there is none is a fault of the test environment, not a reason to test less.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    named = os.environ.get(NAMED_BY) or shutil.which("claude")
    spec = importlib.util.find_spec(WHEEL)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    bundled = [str(Path(folder) / "_bundled" / "claude") for folder in folders]
    found = next((path for path in (*bundled, named) if path and Path(path).is_file()), None)
    found = os.environ.get(NAMED_BY) or found
    if found is None:
        raise FileNotFoundError(
            "no Claude Code to test with: pip install --no-deps claude-agent-sdk, or npm install -g "
            f"@anthropic-ai/claude-code, or name one by {NAMED_BY}"
        )
    return found


def environment(home: Path, url: str) -> dict[str, str]:
    """Variables for a Claude Code that has a home of its own and asks only this endpoint."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / "claude"),
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "any",
    }


def scripted(*answers: str) -> list[str]:
    """The command of a scripted Claude Code; see `scripted_claude.py` for the words."""
    return [sys.executable, "-I", str(SCRIPTED), *answers]


class House:
    """A home with Claude Code in it; makes providers, and ends them at the end."""

    def __init__(self, folder: Path, url: str = "http://127.0.0.1:9", clock: Clock | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.work = self.home / "var" / "claude" / "work"
        """The folder in which providers here run Claude Code."""
        self.variables = environment(folder / "user", url)
        self.clock = clock or SystemClock()
        self.providers: list[ClaudeProvider] = []

    def options(self, **options: Any) -> dict[str, Any]:
        """The configuration keys of a provider here."""
        return {"command": [real_claude()], "env": self.variables, **options}

    async def provider(
        self, *, idle_timeout: float = 60.0, environ: Mapping[str, str] | None = None, **options: Any
    ) -> ClaudeProvider:
        """A provider that is started; `environ` are the daemon's variables."""
        setting = Setting(
            name="claude-cli",
            clock=self.clock,
            home=self.home,
            log_dir=self.home / "var" / "logs",
            environ=environ or {},
            idle_timeout=idle_timeout,
        )
        provider = build(setting, msgspec.convert(self.options(**options), Options))
        await provider.start()
        self.providers.append(provider)
        return provider

    async def close(self) -> None:
        """Stop the providers."""
        for provider in self.providers:
            await provider.stop()

    @property
    def projects(self) -> Path:
        """The folder of the transcripts."""
        return Path(self.variables["CLAUDE_CONFIG_DIR"]) / "projects"

    def transcript(self, session: str | None) -> Path:
        """A session's transcript."""
        (path,) = self.projects.glob(f"*/{session}.jsonl")
        return path

    async def run(self, *arguments: str, prompt: str, model: str = "haiku", folder: Path | None = None) -> Any:
        """Claude Code as its user runs it, with nothing of KSI; its result."""
        process = await asyncio.create_subprocess_exec(
            real_claude(),
            "-p",
            "--output-format=json",
            f"--model={model}",
            "--tools",
            "",
            "--system-prompt=You help.",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self.variables, "DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
            cwd=folder or self.folder,
        )
        try:
            async with asyncio.timeout(60):
                printed, _ = await process.communicate(prompt.encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return json.loads(printed)


class Talk:
    """A conversation: the facts kept of each turn are given to the next one."""

    def __init__(self, provider: ClaudeProvider, session: str | None = None, last_message: str | None = None) -> None:
        self.provider = provider
        self.session = session
        self.last_message = last_message
        self.history: list[Message] = []
        self.requests = 0
        self.pieces: list[str] = []
        """The text of the last call, as it came before its end."""
        self.thoughts: list[str] = []
        """The model's thinking in the last call."""
        self.tools: list[str] = []
        """The tools with effects that the last call reported before its end."""

    def call(self, prompt: Content, **fields: Any) -> Call:
        """The next call."""
        self.requests += 1
        given: dict[str, Any] = {
            "request_id": f"r{self.requests}",
            "attempt": 1,
            "conversation": "talk",
            "model": "haiku",
            "messages": [*self.history, Message("user", prompt)],
            "history": len(self.history),
            "provider_session": self.session,
            "last_message": self.last_message,
            "stream": True,
        }
        return Call(**{**given, **fields})

    async def say(self, prompt: Content, **fields: Any) -> Completion:
        """A turn, kept if it was good."""
        completion = await self.attempt(self.call(prompt, **fields))
        self.session, self.last_message = completion.provider_session, completion.last_message
        self.history += [Message("user", prompt), Message("assistant", completion.text)]
        return completion

    async def attempt(self, call: Call) -> Completion:
        """A call's completion, not kept."""
        self.pieces, self.thoughts, self.tools = [], [], []
        completion: Completion | None = None
        async with aclosing(self.provider.complete(call)) as answer:
            async for item in answer:
                match item:
                    case Chunk(text):
                        self.pieces.append(text)
                    case Thought(text):
                        self.thoughts.append(text)
                    case ToolUsed(name):
                        self.tools.append(name)
                    case _:
                        completion = item
        assert completion is not None
        return completion

    async def begin(self, call: Call) -> Any:
        """A call's iterator, after its first piece came; the caller closes it."""
        answer = self.provider.complete(call)
        async with asyncio.timeout(30):
            assert isinstance(await anext(answer), Chunk)
        return answer


def number_messages(patch: pytest.MonkeyPatch) -> None:
    """Give each answer of a scripted endpoint an id of its own: Claude Code takes two of one id for one message."""
    numbers = itertools.count(1)
    plain = endpoint.message_answer

    def numbered(answer: endpoint.Answer, model: str) -> dict[str, Any]:
        return {**plain(answer, model), "id": f"msg_{next(numbers)}"}

    patch.setattr(endpoint, "message_answer", numbered)


def session_of(request: Any) -> str:
    """The session that Claude Code names to its endpoint."""
    return str(json.loads(request.json["metadata"]["user_id"])["session_id"])


_REMINDERS = re.compile(r"(<system-reminder>.*?</system-reminder>\s*)+", re.DOTALL)


def said(request: Any) -> list[tuple[str, str]]:
    """The messages that an endpoint got, in pairs of role and text, without Claude Code's notes on its surroundings."""
    messages = [(m["role"], _text(m["content"])) for m in request.json["messages"] if m["role"] != "system"]
    plain = [(role, text if role == "assistant" else _REMINDERS.sub("", text, count=1)) for role, text in messages]
    return [(role, text) for role, text in plain if text]


def system_of(request: Any) -> str:
    """The system prompt that an endpoint got, without Claude Code's constant beginning."""
    blocks = [block["text"] for block in request.json["system"]]
    return str(blocks[-1])


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(str(block.get("text", "")) for block in content)


def living(pids: Sequence[int]) -> list[int]:
    """Those that run, zombies aside."""
    alive: list[int] = []
    for pid in pids:
        try:
            state = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            continue
        if state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            alive.append(pid)
    return alive


async def until(look: Callable[[], Any], *, patience: float = 15.0) -> Any:
    """Look again and again until there is something; returns it."""
    async with asyncio.timeout(patience):
        while not (found := look()):  # noqa: ASYNC110 - what ends or appears outside tells nobody
            await asyncio.sleep(0.01)
    return found
