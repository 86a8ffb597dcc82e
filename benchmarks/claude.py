"""What a turn of Claude Code costs over its endpoint's own time: in a warm process, in a new one, and without KSI.

The real program asks a scripted endpoint on loopback, which says how long each of its answers took. The rest of a turn,
from sending the prompt to having the answer, is what is shown.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.claude_endpoint import ClaudeEndpoint
from benchmarks.daemon_under_test import DaemonUnderTest, Home, Tables
from benchmarks.figures import Times
from ksi.client.blocking import BlockingClient
from ksi.errors import ConfigError, InternalError
from ksi.host.private_files import make_folder

WHEEL = "claude_agent_sdk"
"""A package that has the program in it, where no other is installed."""
MODEL = "haiku"
PROMPT = "What is number {} for?"
_PATIENCE = 60.0
"""Seconds for one turn, or for a process's end."""
_LOOK = 0.02


class ClaudePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    runs: int = 3
    """Conversations of each kind."""
    warm_turns: int = 20
    """In each, behind the first one."""
    cold_turns: int = 5
    pieces: int = 10
    """Of each answer."""
    pause: float = 0.02
    """Seconds before each piece."""
    pool: int = 8
    """Processes that are kept between turns."""
    beyond: int = 4
    """Conversations more than that, for the pool's bound."""


QUICK = ClaudePlan(runs=1, warm_turns=5, cold_turns=2, pool=2, beyond=1)


class ClaudeTurns(msgspec.Struct, frozen=True, kw_only=True):
    """The turns of one conversation."""

    over: Times
    """Their times without their endpoint's."""
    own: Times
    """Their endpoint's."""


class ClaudePool(msgspec.Struct, frozen=True, kw_only=True):
    """The processes after one turn in each of some conversations."""

    conversations: int
    limit: int
    most: int
    """Processes at any one time that was looked at, those at work too."""
    warm: int
    memory: int
    """Bytes of all that are left, the pages that they share counted for each."""
    memory_of_one: int
    """The same of the greatest."""


class ClaudeRun(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    version: str
    warm: list[ClaudeTurns]
    cold: list[ClaudeTurns]
    bare: list[ClaudeTurns]
    pool: ClaudePool


def measure_claude(plan: ClaudePlan, command: Sequence[str], folder: Path, say: Callable[[str], None]) -> ClaudeRun:
    """Measure with homes below `folder`, Claude Code's own too; `say` hears what is going on.

    Raises:
        ConfigError: the program is not there.
        InternalError: a daemon did not start, or a turn failed.
    """
    program = find_claude(command)
    with ClaudeEndpoint(plan.pieces, plan.pause) as endpoint:
        bench = _Bench(plan, program, endpoint, folder)
        say("turns of bare `claude -p --resume`")
        bare = [bench.bare(run) for run in range(plan.runs)]
        say("turns in a new process each")
        with bench.daemon("claude-cold", warm=0) as daemon:
            cold = [bench.led(daemon, plan.cold_turns, between=bench.all_ended) for _ in range(plan.runs)]
        say("turns in a warm process")
        with bench.daemon("claude-warm", warm=plan.pool) as daemon:
            warm = [bench.led(daemon, plan.warm_turns) for _ in range(plan.runs)]
        say(f"{plan.pool + plan.beyond} conversations")
        with bench.daemon("claude-pool", warm=plan.pool) as daemon:
            pool = bench.pool(daemon)
            version = str(_claude(daemon)["version"])
    return ClaudeRun(version=version, warm=warm, cold=cold, bare=bare, pool=pool)


def find_claude(command: Sequence[str]) -> list[str]:
    """The command with its program's path; where that is `claude` and not there, the one of an installed package.

    Raises:
        ConfigError: there is none.
    """
    name, *rest = command
    path = shutil.which(name)
    if path is None and name == "claude":
        spec = importlib.util.find_spec(WHEEL)
        folders = (spec.submodule_search_locations if spec is not None else None) or ()
        bundled = (Path(folder) / "_bundled" / "claude" for folder in folders)
        path = next((str(found) for found in bundled if found.is_file()), None)
    if path is None:
        raise ConfigError(
            f"there is no program {name!r} to measure; install Claude Code, for instance with "
            "`npm install -g @anthropic-ai/claude-code`, or set `command` of the provider in ksi.toml",
            place="providers.claude-cli.command",
        )
    return [path, *rest]


class _Bench:
    """The parts that all measurements share."""

    def __init__(self, plan: ClaudePlan, program: Sequence[str], endpoint: ClaudeEndpoint, folder: Path) -> None:
        self._plan = plan
        self._program = list(program)
        self._endpoint = endpoint
        self._folder = folder

    def _variables(self, name: str) -> dict[str, str]:
        """A user of its own for Claude Code, so that nobody's login, settings and sessions are touched."""
        user = self._folder / f"{name}-user"
        make_folder(user)
        return {
            "HOME": str(user),
            "CLAUDE_CONFIG_DIR": str(user / "claude"),
            "ANTHROPIC_BASE_URL": self._endpoint.url,
            "ANTHROPIC_API_KEY": "any",
        }

    def daemon(self, name: str, *, warm: int) -> DaemonUnderTest:
        """A daemon that leads its conversations in Claude Code."""
        provider = {"kind": "claude-cli", "command": self._program, "warm": warm, "models": ["claude-cli/*"]}
        tables: Tables = {
            "service": {"default_model": f"claude-cli/{MODEL}"},
            "retention": {"finished": 600.0, "sessions": 600.0},
            "providers.claude-cli": provider,
            "providers.claude-cli.env": self._variables(name),
        }
        return DaemonUnderTest(Home(self._folder / name, tables))

    def led(
        self, daemon: DaemonUnderTest, turns: int, between: Callable[[DaemonUnderTest], object] = lambda _: None
    ) -> ClaudeTurns:
        """A conversation over the daemon's socket. Its first turn is not counted."""
        with BlockingClient(daemon.socket) as client:
            session = f"led-{uuid.uuid4()}"

            def turn(number: int) -> None:
                client.complete(PROMPT.format(number), session_id=session)

            return self._turns(turn, turns, lambda: between(daemon))

    def bare(self, run: int) -> ClaudeTurns:
        """A conversation by one `claude -p` for each turn, as a script without KSI has it."""
        variables = {
            **os.environ,
            **self._variables("bare"),
            "DISABLE_TELEMETRY": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        session = str(uuid.uuid4())
        plain = ["--output-format=json", f"--model={MODEL}", "--tools", "", "--setting-sources", ""]
        work = self._folder / f"bare-{run}"
        make_folder(work)

        def turn(number: int) -> None:
            place = f"--session-id={session}" if number == 0 else f"--resume={session}"
            done = subprocess.run(
                [*self._program, "-p", *plain, place],
                input=PROMPT.format(number),
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                env=variables,
                cwd=work,
                check=False,
            )
            if done.returncode != 0 or json.loads(done.stdout)["is_error"]:
                raise InternalError(f"claude -p failed: {done.stderr.strip() or done.stdout.strip()}")

        return self._turns(turn, self._plan.cold_turns)

    def _turns(
        self, turn: Callable[[int], None], count: int, between: Callable[[], object] = lambda: None
    ) -> ClaudeTurns:
        turn(0)
        self._endpoint.took()
        over, own = [], []
        for number in range(1, count + 1):
            between()
            begun = time.monotonic_ns()
            turn(number)
            took = time.monotonic_ns() - begun
            own.append(sum(self._endpoint.took()))
            over.append(took - own[-1])
        return ClaudeTurns(over=Times.of(over), own=Times.of(own))

    def all_ended(self, daemon: DaemonUnderTest) -> None:
        """Wait until no process is left of the turn before, so that it is not counted to the next one."""
        registry = self._folder / "claude-cold" / "var" / "run" / "claude-cli" / "processes"
        deadline = time.monotonic() + _PATIENCE
        while any(registry.iterdir()):
            if time.monotonic() > deadline:
                raise InternalError(f"a process of Claude Code does not end; see {registry}")
            time.sleep(_LOOK)

    def pool(self, daemon: DaemonUnderTest) -> ClaudePool:
        """One turn in each of more conversations than processes are kept for."""
        count = self._plan.pool + self._plan.beyond
        most = 0
        with BlockingClient(daemon.socket) as client:
            for number in range(count):
                client.complete(PROMPT.format(number), session_id=f"pool-{number}")
                most = max(most, len(_claude(daemon)["processes"]))
        told = _claude(daemon)
        return ClaudePool(
            conversations=count,
            limit=self._plan.pool,
            most=most,
            warm=told["warm"],
            memory=told["memory_bytes"],
            memory_of_one=max(row["memory_bytes"] or 0 for row in told["processes"]),
        )


def _claude(daemon: DaemonUnderTest) -> Mapping[str, Any]:
    """What the provider tells of its processes."""
    found: Mapping[str, Any] = daemon.ask("completion:provider_status")["providers"]["claude-cli"]["own"]
    return found
