"""The `ksi` command: its parts are loaded when they are used, so that it starts at once."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click

from ksi.cli.settings import Exit, Settings, report


class Lazy(NamedTuple):
    """Where a command lives, and its line in the list."""

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
    "status": Lazy("ksi.cli.status", "status", "Show what the daemon is doing."),
    "health": Lazy("ksi.cli.status", "health", "Show how the daemon, its store and its providers are."),
    "logs": Lazy("ksi.cli.logs", "logs", "Show the daemon's log."),
    "send": Lazy("ksi.cli.wire", "send", "Send one event and print its reply."),
    "queue": Lazy("ksi.cli.lists", "queue", "Show the queue's figures and lists."),
    "locks": Lazy("ksi.cli.lists", "locks", "Show who holds and who waits for conversations."),
    "sessions": Lazy("ksi.cli.lists", "sessions", "Show conversations and their lives."),
    "log": Lazy("ksi.cli.dialogue", "log", "Show the prompts and answers of a conversation."),
    "chain": Lazy("ksi.cli.chains", "chain", "Draw a chain of requests, reset or cancel it; or list chains."),
    "injections": Lazy("ksi.cli.chains", "injections", "Show deliveries of results, and send dead letters again."),
    "usage": Lazy("ksi.cli.usage", "usage", "Show what completions used and cost, and when."),
    "show": Lazy("ksi.cli.requests", "show", "Show all that is known of a request."),
    "cancel": Lazy("ksi.cli.requests", "cancel", "Stop requests."),
    "requeue": Lazy("ksi.cli.providers", "requeue", "Ask again for requests that failed for good."),
    "retries": Lazy("ksi.cli.providers", "retries", "Show what waits to be tried again."),
    "providers": Lazy("ksi.cli.providers", "providers", "Show how providers are doing; disable, enable or reset one."),
    "checkpoint": Lazy(
        "ksi.cli.checkpoint", "checkpoint", "Save everything to a file, or load it into an empty daemon."
    ),
    "store": Lazy("ksi.cli.store", "store", "Move all to a store of another kind."),
    "migrate": Lazy("ksi.cli.migrate", "migrate", "Go from service version 1 to version 2, and back."),
    "watch": Lazy("ksi.cli.wire", "watch", "Print events as they happen."),
    "events": Lazy("ksi.cli.reference", "events", "Describe the events and their fields."),
    "fetch-model": Lazy("ksi.cli.model", "fetch", "Fetch the small local model, where KSI was installed as a package."),
    "config": Lazy("ksi.cli.configuration", "config", "Show the configuration and where each value comes from."),
    "completion": Lazy("ksi.cli.completing", "completion", "Print what makes a shell complete ksi's words."),
    "bench": Lazy("ksi.cli.bench", "command", "Measure this machine's completions per second and latency."),
}

HOME_HELP = (
    "KSI's home. Without it: KSI_HOME, the nearest folder upward with a ksi.toml, the checkout that the command "
    "belongs to, or the user's data folder."
)

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Why a write to stdout fails where nothing is wrong with KSI."""

EPILOG = """\b
Exit codes:
  0    done
  1    the request failed, or the daemon is not well
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
        """All commands, in the order of the list; an installation may lack the benchmark."""
        return [name for name in COMMANDS if name != "bench" or find_spec(COMMANDS[name].module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        lazy = COMMANDS[cmd_name]
        command = getattr(import_module(lazy.module), lazy.name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without loading any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; of a misspelt one, name the nearest."""
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
        """Run the command; what KSI says no with becomes a sentence and an exit code."""
        from ksi.errors import KsiError

        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KsiError as error:
            ctx.exit(report(error, as_json=bool(ctx.meta.get("ksi.json"))))
        except click.ClickException as error:
            from ksi.cli.render import visible

            words = visible(error.format_message(), keep="\n")
            if isinstance(error, click.UsageError):
                raise click.UsageError(words, error.ctx) from None
            raise click.ClickException(words) from None
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(Exit.INTERRUPTED)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            from ksi.cli.answer import stop_writing

            stop_writing()
            print(f"ksi: the output could not be written: {error.strerror}", file=sys.stderr)
            ctx.exit(Exit.FAILED)
        return result


def prepare_streams(ctx: click.Context) -> None:
    """Let stdout and stderr take any character, and let a closed stdout be one that keeps nothing."""
    if sys.stdout is None:
        ctx.meta["ksi.no_stdout"] = True
        sys.stdout = ctx.with_resource(Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = ctx.with_resource(Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the terminal's character set does not have is spelt out; an answer is never lost over an emoji.
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
