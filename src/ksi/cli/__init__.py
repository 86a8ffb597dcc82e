"""The `ksi` command: each part is loaded when it is first used, so that the command starts quickly."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

from ksi.cli.settings import Exit, Settings, report


class Lazy(NamedTuple):
    """The module of a command, and its line in the list."""

    module: str
    name: str
    help: str


COMMANDS: Mapping[str, Lazy] = {
    "ask": Lazy("ksi.cli.ask", "ask", "Ask a model and print its answer."),
    "wait": Lazy("ksi.cli.ask", "wait", "Wait for a request that was sent before, and print its answer."),
    "batch": Lazy("ksi.cli.batch", "batch", "Ask a file of prompts, and write a file of answers."),
    "start": Lazy("ksi.cli.service", "start", "Start the daemon."),
    "stop": Lazy("ksi.cli.service", "stop", "Stop the daemon; nothing that waits is lost."),
    "restart": Lazy("ksi.cli.service", "restart", "Stop the daemon and start it again."),
    "status": Lazy("ksi.cli.status", "status", "Show the daemon's figures and running requests."),
    "top": Lazy("ksi.cli.top", "top", "Show running, waiting and failed requests live; cancel and pause by keys."),
    "health": Lazy("ksi.cli.status", "health", "Show the health of the daemon, its store and its providers."),
    "logs": Lazy("ksi.cli.logs", "logs", "Show the daemon's log."),
    "send": Lazy("ksi.cli.wire", "send", "Send one event and print its reply."),
    "queue": Lazy("ksi.cli.lists", "queue", "Show the queue's figures and lists."),
    "locks": Lazy("ksi.cli.lists", "locks", "Show the holders and waiters of conversations."),
    "sessions": Lazy("ksi.cli.lists", "sessions", "Show conversations and their state."),
    "log": Lazy("ksi.cli.dialogue", "log", "Show the prompts and answers of a conversation."),
    "search": Lazy("ksi.cli.owning", "search", "Find prompts and answers by their words."),
    "export": Lazy("ksi.cli.export", "export", "Write a conversation to a file, as Markdown or JSON."),
    "rename": Lazy("ksi.cli.owning", "rename", "Give a conversation another name."),
    "delete": Lazy("ksi.cli.owning", "delete", "Delete a conversation for good."),
    "chain": Lazy("ksi.cli.chains", "chain", "Draw a chain of requests, reset or cancel it; or list chains."),
    "injections": Lazy("ksi.cli.chains", "injections", "Show deliveries of results, and send dead letters again."),
    "usage": Lazy("ksi.cli.usage", "usage", "Show tokens and cost of completions, also over time."),
    "show": Lazy("ksi.cli.requests", "show", "Show everything known about a request."),
    "cancel": Lazy("ksi.cli.requests", "cancel", "Stop requests."),
    "requeue": Lazy("ksi.cli.providers", "requeue", "Ask again for requests that failed for good."),
    "retries": Lazy("ksi.cli.providers", "retries", "Show requests that wait for a retry."),
    "providers": Lazy("ksi.cli.providers", "providers", "Show the state of providers; disable, enable or reset one."),
    "budgets": Lazy("ksi.cli.budgets", "budgets", "Show how far budgets are; set, drop or raise one."),
    "pause": Lazy(
        "ksi.cli.pauses", "pause", "Hold requests back: all, or those of a provider, agent, session or priority."
    ),
    "resume": Lazy("ksi.cli.pauses", "resume", "End a pause."),
    "drain": Lazy("ksi.cli.pauses", "drain", "Accept no new work, and wait until nothing runs."),
    "approvals": Lazy("ksi.cli.approvals", "approvals", "Show requests that wait for a person's answer."),
    "approve": Lazy("ksi.cli.approvals", "approve", "Answer the questions of requests with yes."),
    "reject": Lazy("ksi.cli.approvals", "reject", "Answer the questions of requests with no."),
    "release": Lazy("ksi.cli.approvals", "release", "Queue requests that their senders held back."),
    "open": Lazy("ksi.cli.page", "open_page", "Open the daemon's page in the browser."),
    "env": Lazy("ksi.cli.env", "env", "Print the variables with which programs reach models through the daemon."),
    "run": Lazy("ksi.cli.env", "run", "Run a program that reaches models through the daemon by HTTP."),
    "token": Lazy("ksi.cli.token", "token", "Make, list and revoke tokens for HTTP."),
    "checkpoint": Lazy(
        "ksi.cli.checkpoint", "checkpoint", "Save everything to a file, or load it into an empty daemon."
    ),
    "store": Lazy("ksi.cli.store", "store", "Move everything to a store of another kind."),
    "migrate": Lazy("ksi.cli.migrate", "migrate", "Upgrade from service version 1 to version 2, or roll back."),
    "mcp": Lazy("ksi.cli.mcp", "mcp", "Serve tools for agents on stdin and stdout (MCP)."),
    "watch": Lazy("ksi.cli.wire", "watch", "Print events as they happen."),
    "events": Lazy("ksi.cli.reference", "events", "Describe the events and their fields."),
    "fetch-model": Lazy("ksi.cli.model", "fetch", "Download the small local model, if KSI was installed as a package."),
    "config": Lazy("ksi.cli.configuration", "config", "Show the configuration and the origin of each value."),
    "completion": Lazy("ksi.cli.completing", "completion", "Print the completion script for a shell."),
    "bench": Lazy("ksi.cli.bench", "command", "Measure this machine's completions per second and latency."),
}

HOME_HELP = (
    "KSI's home. Without it: KSI_HOME, the nearest folder upward with a ksi.toml, the checkout that the command "
    "belongs to, or the user's data folder."
)

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a write to stdout that are no defect of KSI."""

EPILOG = """\b
Exit codes:
  0    done
  1    the request failed, or the daemon is unhealthy
  2    wrong usage, data or configuration
  3    no daemon could be reached
  4    no such request, conversation or event
  5    the request was cancelled
  6    not now: the same command can work later (queue full, conversation busy...)
  7    the answer came, but was cut at a limit
  130  stopped by Ctrl-C
"""


class LazyGroup(click.Group):
    """A group that knows its commands by name and loads one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the list."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The named command, loaded."""
        if cmd_name not in COMMANDS:
            return None
        lazy = COMMANDS[cmd_name]
        command = getattr(import_module(lazy.module), lazy.name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for a misspelt one, name the nearest."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            nearest = get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.6)
            if nearest and not ctx.resilient_parsing:
                words = f"{error.message.rstrip('.')}; did you mean {nearest[0]!r}?"
                raise click.UsageError(words, ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors of KSI become a sentence and an exit code."""
        from ksi.errors import KsiError

        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KsiError as error:
            ctx.exit(report(error, as_json=bool(ctx.meta.get("ksi.json"))))
        except click.ClickException as error:
            raise _made_visible(error) from None
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(Exit.INTERRUPTED)
        return result

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the options before the command."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.ClickException as error:
            raise _made_visible(error) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; a full disk behind stdout becomes a sentence and an exit code."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            from ksi.cli.answer import stop_writing
            from ksi.cli.render import note

            stop_writing()
            note(f"ksi: the output could not be written: {error.strerror}")
            sys.exit(Exit.FAILED)


def _made_visible(error: click.ClickException) -> click.ClickException:
    """The error with control characters made visible: click repeats words of the command line."""
    from ksi.host.printable import visible

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    words = visible(error.format_message(), keep="\n")
    return click.UsageError(words, error.ctx) if isinstance(error, click.UsageError) else click.ClickException(words)


def prepare_streams(ctx: click.Context) -> None:
    """Let stdout and stderr accept any character, and replace a closed stdout by one that discards everything."""
    if sys.stdout is None:
        ctx.meta["ksi.no_stdout"] = True
        sys.stdout = ctx.with_resource(Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = ctx.with_resource(Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters outside the terminal's character set are spelt out; an answer is never lost because of an
            # emoji.
            stream.reconfigure(errors="backslashreplace")


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--home", metavar="DIR", help=HOME_HELP)
@click.version_option(package_name="ksi", message="ksi %(version)s")
@click.pass_context
def main(ctx: click.Context, home: str | None) -> None:
    """KSI, the daemon between agents and models.

    \b
    Examples:
      ksi ask "Name three colours"
      git diff | ksi ask "Write a commit message for this"
      ksi status
    """
    prepare_streams(ctx)
    ctx.obj = Settings(home)


if __name__ == "__main__":
    sys.exit(main())
