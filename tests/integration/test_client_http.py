"""The client and the command by HTTP, if there is no socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksi
from ksi.cli.env import door_variables, variables
from ksi.cli.settings import Exit
from tests.daemon_process import CONFIG, DaemonProcess, clean_environ, make_home
from tests.http_door import door


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(make_home(tmp_path, CONFIG)) as process:
        yield process


def run(home: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ksi.cli", *(["--home", str(home)] if home.name else []), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**clean_environ(), **environ},
        cwd=home.anchor or "/",
        timeout=60,
    )


@pytest.mark.promise("H4")
async def test_the_client_does_the_same_by_http_as_by_the_socket() -> None:
    async with door() as here, ksi.Client(url=here.url, token=here.token) as client:
        assert (await client.complete("hi")).result == "echo: hi"
        handle = await client.submit("one two", stream=True)
        assert "".join([text async for text in handle.stream()]) == "echo: one two"
        async with client.subscribe("conversation:*") as events:

            async def second() -> int | None:
                async with client.lock("c") as lock:
                    return lock.fence

            async with client.lock("c") as first:
                waits = asyncio.create_task(second())
                async for event in events:
                    if event.event == "conversation:queued":
                        break
            fence = await waits
            assert fence is not None
            assert first.fence is not None
            assert fence > first.fence
        with pytest.raises(ksi.RemoteError) as error:
            await client.get("nix")
        assert error.value.code == "not_found"


@pytest.mark.promise("H4")
async def test_a_revoked_token_and_a_scope_are_reported_to_the_client() -> None:
    async with door() as here:
        token = await here.new_token("ann")
        async with ksi.Client(url=here.url, token=token, patience=0.2) as client:
            assert (await client.complete("hi")).agent_id == "ann"
            with pytest.raises(ksi.RemoteError) as error:
                await client.send_event("completion:status")
            assert error.value.code == "forbidden"
            handle = await client.submit("x")
            assert (await handle.result()).result == "echo: x"
            await here.told("token:revoke", name="ann")
            with pytest.raises(ksi.ConnectionFailed, match="revoked"):
                await client.complete("more")
        with pytest.raises(ksi.ConnectionFailed, match="revoked"):
            async with ksi.Client(url=here.url, token=token):
                pass


@pytest.mark.promise("H4")
def test_the_blocking_client_goes_by_http_and_again_to_a_daemon_that_was_restarted(daemon: DaemonProcess) -> None:
    port = int(told(daemon.home).rpartition(":")[2])
    (daemon.home / "ksi.toml").write_text(CONFIG.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    token = (daemon.home / "var/run/token").read_text().strip()
    with ksi.BlockingClient(url=f"http://127.0.0.1:{port}/", token=token) as client:
        handle = client.submit("x", model="slow/x")
        daemon.end(signal.SIGTERM)
        daemon.start()
        assert handle.cancel().status == "cancelled"
        assert client.complete("again").result == "echo: again"


@pytest.mark.promise("H4")
def test_the_command_uses_http_if_the_socket_is_gone_and_explains_if_neither_works(daemon: DaemonProcess) -> None:
    socket = daemon.socket_path
    environ = {"KSI_SOCKET__PATH": str(socket.with_name("none.sock"))}
    assert run(daemon.home, "ask", "hi", **environ).stdout == "echo: hi\n"
    url, token = told(daemon.home), (daemon.home / "var/run/token").read_text().strip()
    daemon.end(signal.SIGKILL)
    dead = run(daemon.home, "status")
    assert dead.returncode == Exit.UNREACHABLE
    assert f"no daemon listens at {socket}" in dead.stderr
    assert f"by HTTP: no process listens at {url}" in dead.stderr
    assert "Connection refused" in dead.stderr
    (daemon.home / "var/run/http.json").unlink()
    daemon.start()
    url = told(daemon.home)
    sandbox = {"KSI_HOME": str(daemon.home / "nothing-here"), "KSI_URL": url}
    no_home = Path()
    known = run(no_home, "ask", "far", **sandbox, KSI_TOKEN=token)
    assert known.stdout == "echo: far\n", known.stderr
    assert "there is no token" in run(no_home, "status", **sandbox).stderr
    wrong = run(no_home, "ask", "x", **sandbox, KSI_TOKEN="ksi_wrong")
    assert (wrong.returncode, "not known" in wrong.stderr) == (Exit.UNREACHABLE, True)
    assert not (daemon.home / "nothing-here/var/run").exists(), "a daemon was started where another was named"
    # A client that names a home means its daemon, and not the one of the environment.
    other = make_home(daemon.home / "other", CONFIG)
    named = run(other, "status", KSI_URL=url, KSI_TOKEN=token)
    assert named.returncode == Exit.UNREACHABLE


@pytest.mark.promise("H1")
def test_env_prints_variables_for_a_shell_and_a_program(daemon: DaemonProcess) -> None:
    printed = run(daemon.home, "env").stdout
    shown = subprocess.run(
        ["sh", "-c", f"{printed}\nenv"], env={"PATH": os.environ["PATH"], "ANTHROPIC_API_KEY": "x"}, capture_output=True
    ).stdout.decode()
    set_there = dict(line.partition("=")[::2] for line in shown.splitlines())
    url, token = told(daemon.home), (daemon.home / "var/run/token").read_text().strip()
    assert set_there["ANTHROPIC_BASE_URL"] == set_there["KSI_URL"] == url
    assert set_there["OPENAI_BASE_URL"] == f"{url}/v1"
    assert {set_there[name] for name in ("ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY", "KSI_TOKEN")} == {token}
    assert "ANTHROPIC_API_KEY" not in set_there
    assert set_there["CLAUDE_STREAM_IDLE_TIMEOUT_MS"] == "1800000"
    assert json.loads(run(daemon.home, "env", "--json").stdout) == variables(url, token)
    own = json.loads(run(daemon.home, "env", "--json", "--token", "ann").stdout)
    listed = json.loads(run(daemon.home, "token", "list", "--json").stdout)
    assert (listed["name"], listed["scope"]) == ("ann", "submit")
    assert own["KSI_TOKEN"] not in (token, None)
    again = run(daemon.home, "env", "--token", "ann")
    assert (again.returncode, again.stdout) == (Exit.FAILED, "") or again.returncode == Exit.USAGE
    daemon.end(signal.SIGTERM)
    assert run(daemon.home, "env").returncode == Exit.UNREACHABLE


@pytest.mark.promise("H1")
def test_a_program_runs_with_its_token_signals_and_exit_status(daemon: DaemonProcess) -> None:
    asks = 'import ksi\nwith ksi.BlockingClient() as client: print(client.complete("hi").agent_id)'
    done = run(daemon.home, "run", "--token", "ann", "--", sys.executable, "-c", asks, KSI_HOME="/nothing-here")
    assert done.stdout == "ann\n", done.stderr
    assert run(daemon.home, "token", "list", "--json").stdout == "", "the token outlived the program"
    assert run(daemon.home, "run", "--", "sh", "-c", "exit 7").returncode == 7
    assert run(daemon.home, "run", "--token", "ann", "sh", "-c", "kill -TERM $$").returncode == 143
    assert run(daemon.home, "run", "--token", "ann", "--", "/nothing-here").returncode == 127
    assert run(daemon.home, "run", "--", "/etc").returncode == 126
    process = subprocess.Popen(
        [sys.executable, "-m", "ksi.cli", "--home", str(daemon.home), "run", "--token", "bob", "--", "sh", "-c",
         "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.05; done"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=clean_environ(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.read() == "told\n"
    assert process.wait(30) == 9
    process.stdout.close()


EARLY = """
import os, signal, subprocess, sys
from ksi.cli import env

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        signal.raise_signal(signal.SIGTERM)

subprocess.Popen = Popen
sys.exit(env._run(("sleep", "60"), dict(os.environ)))
"""


@pytest.mark.promise("H1")
def test_a_signal_that_comes_while_the_program_starts_reaches_it() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], check=False, env=clean_environ(), timeout=60)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.promise("H1")
def test_a_daemon_that_is_started_with_these_variables_does_not_ask_itself(tmp_path: Path) -> None:
    found = {name: value for name, value in variables("http://127.0.0.1:1", "ksi_x").items() if value is not None}
    environ = {**found, "ANTHROPIC_BASE_URL": "https://proxy.example"}
    assert set(door_variables(environ)) == set(found) - {"ANTHROPIC_BASE_URL"}
    assert door_variables({"OPENAI_API_KEY": "sk-1"}) == []
    home = make_home(tmp_path, '[http]\nlisten = "127.0.0.1:0"\n')
    with DaemonProcess(home, {**found, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}) as process:
        health = json.loads(run(process.home, "health", "--json").stdout)
    assert "openai" not in health["providers"]


def told(home: Path) -> str:
    return str(json.loads((home / "var/run/http.json").read_text())["url"])
