"""Foreign text reaches no terminal as a command: every `ksi` command is run at a terminal and shows it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ksi.cli import COMMANDS
from tests.daemon_process import CONFIG, DaemonProcess, clean_environ, make_home
from tests.endpoint import Answer, ScriptedEndpoint
from tests.integration.test_cli import command
from tests.integration.wire import Wire

EVIL = (
    "A\x1b]52;c;ZXZpbA==\x07B\x1b[2JC\x9b31mD\x9d52;c;eA\x9cE\u202eF\rG\x08H\x7fI\u200bJ[red]K[/red]"
    "M\u2066N\u00adO\x85P\u2028Q\x00R\x1b"
)
"""A clipboard write, a cleared screen, the same in C1, marks that turn and hide text, and an escape at the end."""
WORD = EVIL.replace("\x00", "")
"""As an argument, which ends at a NUL."""
OURS = re.compile(r"\x1b\[[0-9;]*m|\r\x1b\[K|\r(?=\n)")
"""Colours, the line of progress, and a terminal's line ends."""
PATIENCE = 100.0
"""Seconds that a command may take on a loaded machine."""
SPELT = "]52;c;"
"""A part of it that stays as it is, behind an escape that is spelt out."""
SHOW_NOTHING = ("config", "env", "open", "token")
"""Commands that show nothing of others."""
ELSEWHERE = {
    "bench": "measures the machine, and shows nothing of others",
    "fetch-model": "loads a package, and shows nothing of others",
    "start": "is tried with the name of its home",
    "stop": "is tried with the name of its home",
    "restart": "is tried with the name of its home",
    "watch": "is tried while something happens",
    "mcp": "speaks to programs alone, in JSON",
    "run": "hands its terminal to another program, and shows nothing itself",
    "store": "moves a store while no daemon runs, and shows its address and figures",
}


def on_terminal(home: Path, *args: str, until: str | None = None, stdin: str | None = None) -> str:
    """All that a command writes to its terminal. One that continues by itself gets Ctrl-C once it wrote `until`."""
    master, slave = pty.openpty()
    environ = {**clean_environ(), "COLUMNS": "300", "TERM": "xterm-256color"}
    process = subprocess.Popen(command(home, *args), stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environ)
    os.close(slave)
    shown = b""
    # One that hangs is killed: a thread that waited for it for ever would hold up the whole run.
    last = threading.Timer(PATIENCE, process.kill)
    last.start()
    try:
        while piece := os.read(master, 65_536):
            shown += piece
            if until is not None and until.encode() in shown:
                process.send_signal(signal.SIGINT)
                until = None
    except OSError:
        pass  # the end, as terminals say it
    finally:
        last.cancel()
        os.close(master)
        process.wait(60)
    return shown.decode()


def raw(shown: str) -> list[str]:
    """The characters that a terminal could obey, our own apart."""
    return sorted({char for char in OURS.sub("", shown) if not char.isprintable() and char != "\n"})


class Scene:
    """A daemon with texts of a malicious client, agent, model and endpoint."""

    def __init__(self, home: Path, wire: Wire) -> None:
        self.home = home
        self.wire = wire

    async def fill(self) -> None:
        """Say it."""
        ask = self.wire.ask
        names = {"session_id": f"s{WORD}", "agent_id": f"a{WORD}"}
        injection = {"target_sessions": [f"t{WORD}"]}
        await ask(
            "completion:request",
            prompt=EVIL,
            request_id=f"r{WORD}",
            metadata={EVIL: EVIL},
            injection_config=injection,
            **names,
        )
        await ask("completion:request", prompt=EVIL, request_id=f"f{WORD}", model="wrong/m", **names)
        await ask("completion:request", prompt=EVIL, request_id=f"fork{WORD}", fork=True, **names)
        slow = {"model": f"slow/m{WORD}", "session_id": f"held{WORD}", "agent_id": f"a{WORD}"}
        await ask("completion:async", prompt=EVIL, request_id=f"slow{WORD}", **slow)
        await ask("completion:async", prompt=EVIL, request_id=f"line{WORD}", **slow)
        await ask("completion:async", prompt=EVIL, request_id=f"later{WORD}", delay=1000)
        await ask("completion:async", prompt=EVIL, request_id=f"hold{WORD}", hold=True, agent_id=f"a{WORD}")
        await ask("completion:async", prompt=EVIL, request_id=f"away{WORD}", model="gone/m")
        await ask("conversation:acquire_lock", request_id=f"L{WORD}", conversation_id=f"c{WORD}", metadata={"x": EVIL})


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    refused = Answer(status=400, error_message=f"no: {EVIL}")
    away = Answer(status=503, error_message=f"not now: {EVIL}")
    async with ScriptedEndpoint(refused) as wrong, ScriptedEndpoint(away) as gone:
        config = CONFIG + "".join(
            f'[providers.{name}]\nkind = "openai"\nbase_url = "{url}"\n'
            for name, url in (("wrong", wrong.url), ("gone", gone.url))
        )
        home = make_home(tmp_path / "home", config)
        with DaemonProcess(home, {"OPENAI_API_KEY": "x"}) as daemon:
            async with await Wire.open(daemon.socket_path) as wire:
                made = Scene(home, wire)
                await made.fill()
                yield made


def cases(folder: Path) -> dict[str, list[list[str]]]:
    """Each command with its arguments, in all of its ways of showing something."""
    w = WORD
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": EVIL, "custom_id": w}) + "\n" + json.dumps({"prompt": EVIL, "model": w}))
    lists = ("active", "ready", "waiting", "delayed", "failed", "finished")
    plain: dict[str, list[list[str]]] = {
        "ask": [
            ["--no-stdin", w],
            ["--no-stdin", "--no-stream", w],
            ["--no-stdin", "-m", "wrong/m", w],
            ["--no-stdin", "--id", f"r{w}", "other"],
            ["--no-stdin", "--on-busy", "reject", "-s", f"held{w}", w],
            ["--no-stdin", "-m", w, "x"],
            ["--no-stdin", "--attach", w, "x"],
            ["--no-stdin", "--schema", w, "x"],
        ],
        "wait": [[f"r{w}"], [f"f{w}"], [f"no{w}"], [f"slow{w}", "--timeout", "1.5"]],
        "batch": [[str(questions), str(folder / f"answers{w}")], [w, str(folder / "none")]],
        "status": [[]],
        "health": [[]],
        "logs": [[]],
        "send": [
            ["completion:get", json.dumps({"request_id": f"r{w}"})],
            [w],
            ["completion:get", json.dumps({w: w})],
            ["completion:async", json.dumps({"prompt": EVIL, "stream": True}), "--follow"],
        ],
        "queue": [[], *(["--list", name] for name in lists)],
        "locks": [[], [f"c{w}"], [f"held{w}"], [f"no{w}"]],
        "sessions": [[], [f"s{w}"], ["--agent", f"a{w}"], [f"no{w}"]],
        "top": [[], ["--once"]],
        "search": [["b"], [w]],
        "export": [[f"s{w}"], [f"no{w}"], [f"s{w}", "-o", str(folder / f"export{w}")]],
        "log": [[f"s{w}"], [f"t{w}"], [f"no{w}"]],
        "chain": [[], [f"r{w}"], [f"r{w}", "--cancel"], [f"no{w}"]],
        "injections": [[], [f"r{w}/1"], [f"r{w}/1", "--retry"], [f"no{w}"]],
        "usage": [[], ["--by", "agent"], ["--by", "model"], ["--by", "session"], ["--chain", f"r{w}"], ["--chain", w]],
        "show": [[f"r{w}"], [f"f{w}"], [f"away{w}"], [f"slow{w}"], [f"no{w}"]],
        "cancel": [[f"line{w}"], [f"r{w}"], [f"no{w}"]],
        "requeue": [[f"f{w}"], [f"no{w}"]],
        "retries": [[]],
        "providers": [[], ["disable", "broken", "--why", w], ["disable", w], ["reset", w], []],
        "pause": [["--agent", f"p{w}", "--why", w], ["--session", f"p{w}"], ["--list"]],
        "budgets": [
            ["set", f"b{w}", "--scope", f"agent:{w}", "--requests", "9"],
            [],
            ["raise", f"b{w}", "1", "--why", w],
        ],
        "resume": [["--agent", f"p{w}"], ["--session", f"no{w}"], []],
        "approvals": [[]],
        "approve": [[f"no{w}"], [f"r{w}", "--why", w]],
        "reject": [[f"no{w}"], [f"r{w}"]],
        "release": [[f"no{w}"], [f"hold{w}", "--why", w]],
        "drain": [["--timeout", "0.1"], ["--cancel"]],
        "checkpoint": [["save", str(folder / f"saved{w}")], ["restore", w], ["restore", str(questions)]],
        "migrate": [["--dry-run"], ["--root", w]],
        "events": [[w], ["completion:async"]],
        "config": [[], ["--daemon"]],
        "env": [[], ["--token", f"t{w}"]],
        "open": [["--print"]],
        "token": [["create", f"t{w}"], ["list"], ["revoke", w]],
        "completion": [["zsh"], [w]],
        # Last, as they change names.
        "rename": [[f"s{w}", f"new{w}"], [f"no{w}", "new"], [f"held{w}", f"new{w}"]],
        "delete": [[f"held{w}", "--yes"], [f"no{w}", "--yes"], [f"new{w}", "--yes"]],
    }
    without = {
        "ask",
        "batch",
        "budgets",
        "checkpoint",
        "completion",
        "drain",
        "logs",
        "migrate",
        "providers",
        "send",
        "wait",
    }
    more = {
        "ask": [["--no-stdin", "--json", w]],
        "wait": [[f"r{w}", "--json"]],
        "providers": [["--json"]],
        "budgets": [["--json"]],
    }
    return {
        name: [*runs, *more.get(name, ()), *([*run, "--json"] for run in runs if name not in without)]
        for name, runs in plain.items()
    }


@pytest.mark.promise("S3")
@pytest.mark.timeout(400)  # each command is a process, and there are over a hundred
async def test_no_command_lets_a_terminal_obey_others(scene: Scene, tmp_path: Path) -> None:
    asked = cases(tmp_path)
    assert {*asked, *ELSEWHERE} == set(COMMANDS)
    obeyed: dict[str, list[str]] = {}
    spelt_out = set()

    async def look(name: str, args: list[str]) -> None:
        shown = await asyncio.to_thread(on_terminal, scene.home, name, *args)
        assert "Traceback" not in shown, shown
        if signs := raw(shown):
            obeyed[f"{name} {args}"] = signs
        if SPELT in shown:
            spelt_out.add(name)

    for name, runs in asked.items():
        for at in range(0, len(runs), 2):
            await asyncio.gather(*(look(name, args) for args in runs[at : at + 2]))
    assert obeyed == {}
    assert set(asked) - spelt_out == set(SHOW_NOTHING)


@pytest.mark.promise("S3")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", [[], ["--json"]], ids=["for people", "for programs"])
async def test_no_event_lets_a_watching_terminal_obey_others(scene: Scene, way: list[str]) -> None:
    watching = asyncio.create_task(asyncio.to_thread(on_terminal, scene.home, "watch", *way, until=SPELT))
    async with asyncio.timeout(PATIENCE):
        while not watching.done():
            # It may not be subscribed yet: say something until it was heard.
            await scene.wire.ask("completion:request", prompt=EVIL, session_id=f"w{WORD}", stream=True)
    shown = await watching
    assert SPELT in shown
    assert raw(shown) == []


@pytest.mark.promise("S3")
def test_the_name_of_a_home_is_obeyed_by_no_terminal(tmp_path: Path) -> None:
    home = make_home(tmp_path / "h\x1b[2J\x9b31m\u202e")
    try:
        for args in (["start"], ["start"], ["config"], ["config", "--daemon"], ["logs"], ["restart"], ["stop"]):
            shown = on_terminal(home, *args)
            assert "Traceback" not in shown
            assert raw(shown) == []
            assert "[2J" in shown
        assert "no daemon listens at" in on_terminal(home, "status")
    finally:
        on_terminal(home, "stop")
