"""`ksi env` and `ksi run`: variables with which a program reaches models through the daemon by HTTP."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.render import json_line, note, say
from ksi.cli.settings import Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.client.ways import HttpWay

PATIENT: Mapping[str, str] = {
    "API_TIMEOUT_MS": "3600000",
    "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
}
"""With these, Claude Code waits half an hour for the first byte, instead of five minutes."""

UNSET = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")
"""These would be sent instead of the token, and show a vendor's secret to the listening process."""

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

NOT_FOUND, NOT_EXECUTABLE = 127, 126


def variables(url: str, token: str) -> dict[str, str | None]:
    """Variables to set in a program's environment; those with None are removed."""
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": token,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": token,
        "KSI_URL": url,
        "KSI_TOKEN": token,
        **PATIENT,
        **dict.fromkeys(UNSET),
    }


def door_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables of `ksi env` that are set: a daemon started with them must not call itself."""
    url, token = environ.get("KSI_URL"), environ.get("KSI_TOKEN")
    if not url or not token:
        return []
    return [name for name, value in variables(url, token).items() if value is not None and environ.get(name) == value]


token_option = click.option(
    "--token",
    "name",
    metavar="NAME",
    help="Make a token of this name, which can send requests and look at its own, instead of using the owner's.",
)


@click.command(
    epilog="""\b
Examples:
  eval "$(ksi env)"
  ksi env --token nightly > nightly.env
  ksi env --json | jq -r .KSI_URL
"""
)
@token_option
@json_option
@pass_settings
def env(settings: Settings, name: str | None, as_json: bool) -> None:
    """Print the variables with which programs reach models through the daemon.

    It is for Claude Code, for SDKs of Anthropic and OpenAI, and for KSI's own clients.

    The lines are for sh and hold a secret. A token made by --token is valid until `ksi token revoke NAME`; its secret
    is printed only now.
    """
    found = _variables(daemon_way(settings), name, settings)
    if as_json:
        json_line(found)
        return
    for key, value in found.items():
        say(f"unset {key}" if value is None else f"export {key}={shlex.quote(value)}")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  ksi run -- claude -p "Name three colours"
  ksi run --token nightly -- python agent.py
""",
)
@token_option
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_settings
@click.pass_context
def run(ctx: click.Context, settings: Settings, name: str | None, program: tuple[str, ...]) -> None:
    """Run PROGRAM with variables that lead it to the daemon, which is started if none runs.

    This command exits with the program's status. With --token the program gets a token of its own, which is revoked at
    its end: its requests are accounted to NAME, and it can see no others.
    """
    way = daemon_way(settings, start=True)
    environ = _applied(_variables(way, name, settings))
    if name is None:
        sys.stdout.flush()
        try:
            os.execvpe(program[0], program, environ)
        except OSError as error:
            ctx.exit(_not_started(program[0], error))
    try:
        code = _run(program, environ)
    except OSError as error:
        code = _not_started(program[0], error)
    finally:
        _ask(settings, "token:revoke", {"name": name})
    ctx.exit(code)


def daemon_way(settings: Settings, *, start: bool = False) -> HttpWay:
    """The way to the daemon by HTTP.

    Raises:
        ConnectionFailed: no daemon runs, or it serves no HTTP.
    """
    from ksi.cli.background import running_pid, start_daemon
    from ksi.client.ways import URL
    from ksi.errors import ConnectionFailed

    way = settings.http_way()
    if way is not None and way.source == URL:
        return way
    if running_pid(settings.places) is None:
        if not start:
            raise ConnectionFailed(f"no daemon runs in {settings.home}; start it with `ksi start`")
        note(f"starting the daemon (home {settings.home})...")
        start_daemon(settings.config)
        way = settings.http_way()
    if way is None:
        raise ConnectionFailed(
            f"the daemon of {settings.home} serves no HTTP; give [http] listen in ksi.toml an address, and restart it"
        )
    return way


def _variables(way: HttpWay, name: str | None, settings: Settings) -> dict[str, str | None]:
    if name is not None:
        return variables(way.url, str(_ask(settings, "token:create", {"name": name})["token"]))
    given = os.environ.get("KSI_TOKEN")
    known = os.environ.get("KSI_URL") in (None, way.url)
    return variables(way.url, given if given and known else way.token)


def _ask(settings: Settings, event: str, data: dict[str, Any]) -> dict[str, Any]:
    from ksi.cli.status import ask_one

    return asyncio.run(ask_one(settings, event, data))


def _applied(changes: Mapping[str, str | None]) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if changes.get(name, "") is not None}
    return environ | {name: value for name, value in changes.items() if value is not None}


def _run(program: tuple[str, ...], environ: Mapping[str, str]) -> int:
    """Run a program to its end and forward signals to it; returns its exit status as a shell would."""
    with _signals_handed_on() as hand_to:
        process = subprocess.Popen(program, env=environ)
        hand_to(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _signals_handed_on() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Forward signals to a program, also those that came before it started. A terminal's signals reach it anyway."""
    by_terminal = sys.stdin is not None and sys.stdin.isatty()
    handled = (*FORWARDED, signal.SIGINT, signal.SIGQUIT)
    running: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        if by_terminal and number in (signal.SIGINT, signal.SIGQUIT):
            return
        if running:
            running[0].send_signal(number)
        else:
            early.append(number)

    def hand_to(process: subprocess.Popen[bytes]) -> None:
        running.append(process)
        for number in early:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in handled}
    try:
        yield hand_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_started(program: str, error: OSError) -> int:
    note(f"ksi: {program} cannot be run: {error.strerror}")
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
