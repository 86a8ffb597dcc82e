"""`ksi ask` and `ksi wait`: one question, its answer as it comes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksi.cli.answer import (
    Loss,
    OutputFailed,
    ReaderGone,
    connected,
    lost_output,
    print_answer,
    print_end,
    stop_writing,
)
from ksi.cli.completing import complete_agent, complete_model, complete_request, complete_session
from ksi.cli.ids import whole_id
from ksi.cli.last import last_session, remember
from ksi.cli.prompt import attachments, read_prompt, utf8
from ksi.cli.render import note
from ksi.cli.schema import check_json, response_format
from ksi.cli.settings import Exit, Settings, json_option, pass_settings

if TYPE_CHECKING:
    from ksi.client import Client, Handle

PRIORITIES = ("critical", "high", "normal", "low", "background")
LONGEST_SPAN = 200
"""Characters of the variable TRACEPARENT from which it is none."""

CANCEL_WAIT = 5.0
"""Seconds that Ctrl-C gives the daemon to confirm."""

EPILOG = """\b
Examples:
  ksi ask "Name three colours"
  ksi ask --session trip "Where should I go in May?"
  ksi ask --continue "And by train?"
  cat report.txt | ksi ask "Summarise this"
  ksi ask --attach main.py --attach error.log "Why does it fail?"
  ksi ask --model claude-cli/haiku --priority high "..."
  ksi ask --json "..." | jq .usage
"""


def start_option(command: Any) -> Any:
    """`--no-start`."""
    return click.option("--no-start", is_flag=True, help="Do not start the daemon if none runs.")(command)


@click.command(epilog=EPILOG)
@click.argument("prompt", nargs=-1)
@click.option(
    "-s",
    "--session",
    "session_id",
    metavar="NAME",
    shell_complete=complete_session,
    help="The conversation to continue or to begin.",
)
@click.option("-c", "--continue", "go_on", is_flag=True, help="Continue the conversation of the last `ksi ask` here.")
@click.option("--fork", is_flag=True, help="Leave that conversation unchanged, and continue in a copy of it.")
@click.option(
    "-m",
    "--model",
    metavar="PROVIDER/MODEL",
    shell_complete=complete_model,
    help="The model that answers; the default is configured.",
)
@click.option("-p", "--priority", type=click.Choice(PRIORITIES, case_sensitive=False), help="The default is normal.")
@click.option("-a", "--agent", "agent_id", metavar="NAME", shell_complete=complete_agent, help="The asking agent.")
@click.option("--system", metavar="TEXT", help="Instructions above the conversation.")
@click.option(
    "--attach",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A text file (quoted in the prompt), an image or a PDF; can be repeated.",
)
@click.option("--schema", metavar="FILE", type=click.Path(path_type=Path), help="The JSON Schema of the answer.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="The maximum length of the answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="The randomness of the answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="A text at which the answer ends; can be repeated.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="The time limit of one attempt."
)
@click.option(
    "--on-busy", type=click.Choice(("enqueue", "reject", "interrupt")), help="If the conversation is taken: wait, ..."
)
@click.option(
    "--id", "request_id", metavar="ID", help="The request's id; a known one prints the existing answer again."
)
@click.option("--no-stdin", is_flag=True, help="Do not read stdin.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@start_option
@json_option
@pass_settings
@click.pass_context
def ask(
    ctx: click.Context,
    settings: Settings,
    /,
    prompt: tuple[str, ...],
    go_on: bool,
    files: tuple[Path, ...],
    schema: Path | None,
    no_stdin: bool,
    no_stream: bool,
    no_start: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a model and print its answer as it comes.

    The prompt consists of the words of the command line, the attached files and stdin, in this order. The daemon is
    started if none runs. Ctrl-C cancels the request, and so does a closed pipe, as with `| head`.

    Stderr says why the request waits, and if the answer was cut at a limit (exit code 7). If the answer starts over in
    mid-text because a provider failed and another took over, a line on stderr says so, and only the text after it
    counts; --no-stream and --json print only that text.
    """
    if ctx.meta.get("ksi.no_stdout"):
        raise click.UsageError("stdout is closed, so the answer would be lost; give it a file, such as /dev/null")
    fields = _fields(options)
    if go_on:
        if "session_id" in fields:
            raise click.UsageError("--session or --continue, not both")
        fields["session_id"] = last_session(settings.home, fields.get("agent_id"))
    if fields.get("fork") and "session_id" not in fields:
        raise click.UsageError("--fork needs the conversation to fork: --session NAME or --continue")
    fields["stream"] = not (no_stream or as_json)
    blocks, quoted = attachments(files)
    text = read_prompt(" ".join(prompt), quoted, stdin=not no_stdin)
    if blocks:
        fields["messages"] = [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]
    if schema is not None:
        fields["response_format"] = response_format(schema)
    said = None if blocks else text
    ctx.exit(asyncio.run(_ask(settings, said, fields, start=not no_start, as_json=as_json)))


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's fields for the given options; texts must be UTF-8."""
    # A given temperature of 0 is not the same as none.
    said = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    return {name: _value(name, value) for name, value in said.items()}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_value(name, each) for each in value]
    return utf8(value, f"--{name.removesuffix('_id')}") if isinstance(value, str) else value


async def _ask(settings: Settings, prompt: str | None, fields: dict[str, Any], *, start: bool, as_json: bool) -> Exit:
    from ksi.clock import Chance, SystemClock

    # The id is made here, so that Ctrl-C can cancel a request whose submission was not answered yet.
    fields.setdefault("request_id", Chance().identifier("req", SystemClock().now()))
    request_id, stream = fields["request_id"], fields["stream"]
    if 0 < len(span := os.environ.get("TRACEPARENT", "")) <= LONGEST_SPAN:
        fields["traceparent"] = span
    loss = Loss()
    async with await connected(settings, loss, start=start) as client:
        loss.request_id = request_id
        try:
            handle = await client.submit(prompt, **fields)
            loss.accepted = True
            remember(settings.home, fields.get("agent_id"), handle.session_id)
            reply = await print_answer(client, handle, stream=stream)
            code = print_end(reply, stream=stream, as_json=as_json)
        except asyncio.CancelledError:
            await _cancel(client, request_id)
            raise
        except ReaderGone:
            stop_writing()
            return await _cancel(client, request_id)
        except OutputFailed as error:
            return lost_output(request_id, error)
    return check_json(reply.result or "", request_id) if "response_format" in fields and code is Exit.DONE else code


async def _cancel(client: Client, request_id: str) -> Exit:
    """Cancel a request that its caller has given up, and report the result."""
    from ksi.errors import KsiError

    try:
        reply = await client.send_event("completion:cancel", {"request_id": request_id}, timeout=CANCEL_WAIT)
    except KsiError as error:
        note(f"ksi: {request_id} could not be cancelled: {error.message}")
        return Exit.CANCELLED
    state = reply.get("state", "cancelled")
    if state == "completed":
        return Exit.DONE  # the reader closed stdout after a complete answer
    note(f"ksi: {request_id} {state}")
    return Exit.CANCELLED


@click.command(
    epilog="""\b
Examples:
  ksi wait req_0197...
  ksi wait req_0197... --timeout 60 || ksi cancel req_0197...
"""
)
@click.argument("request_id", metavar="REQUEST", shell_complete=complete_request)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="The limit of the wait; exit code 6 says that it passed.",
)
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@start_option
@json_option
@pass_settings
@click.pass_context
def wait(
    ctx: click.Context,
    settings: Settings,
    request_id: str,
    timeout: float | None,
    no_stream: bool,
    no_start: bool,
    as_json: bool,
) -> None:
    """Wait for an earlier REQUEST of any client, and print its answer as `ksi ask` does.

    Ctrl-C only ends the wait: the request continues.
    """
    stream = not (no_stream or as_json)
    ctx.exit(asyncio.run(_wait(settings, request_id, timeout, stream=stream, start=not no_start, as_json=as_json)))


async def _wait(
    settings: Settings, word: str, timeout: float | None, *, stream: bool, start: bool, as_json: bool
) -> Exit:
    from ksi.errors import WaitTimeout

    loss = Loss()
    async with await connected(settings, loss, start=start) as client:
        handle = await _attached(client, word, stream=stream)
        loss.request_id, loss.accepted = handle.request_id, True
        try:
            async with asyncio.timeout(timeout):
                reply = await print_answer(client, handle, stream=stream)
            return print_end(reply, stream=stream, as_json=as_json)
        except TimeoutError:
            raise WaitTimeout(
                f"{handle.request_id} is not done after {timeout:g} s; it continues, wait again"
            ) from None
        except ReaderGone:
            stop_writing()
            return Exit.DONE
        except OutputFailed as error:
            return lost_output(handle.request_id, error)


async def _attached(client: Client, word: str, *, stream: bool) -> Handle:
    from ksi.errors import RemoteError

    try:
        known = await client.get(word)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        known = await client.get(await whole_id(client, word))
    return client.attach(known.request_id, stream=stream)
