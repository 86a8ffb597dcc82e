"""`ksi start`, `ksi stop`, `ksi restart`: the daemon's start and stop."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import click

from ksi.cli.render import note, say
from ksi.cli.settings import Exit, F, Settings, pass_settings

if TYPE_CHECKING:
    from ksi.config.schema import Config

STOP_TIMEOUT = 60.0


def timeout_option(command: F) -> F:
    """`--timeout`."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=STOP_TIMEOUT,
        show_default=True,
        help="Seconds to wait for its exit.",
    )(command)


@click.command(
    epilog="""\b
Examples:
  ksi start
  ksi --home /srv/ksi start --foreground     for systemd (Type=notify) and containers
"""
)
@click.option("--foreground", is_flag=True, help="Serve in this process until SIGTERM or Ctrl-C.")
@pass_settings
@click.pass_context
def start(ctx: click.Context, settings: Settings, foreground: bool) -> None:
    """Start the daemon, by default in the background, and print a line when it is ready.

    A daemon that runs already is not touched. If the daemon cannot start, its output is shown.
    """
    if foreground:
        _leave_doors()
        # What is loaded stays: to look for garbage meanwhile takes a tenth of the start. Its end looks again.
        gc.disable()
        from ksi.daemon.main_process import EXIT_CONFIG, EXIT_OK, run

        code = run(settings.config, say=say)
        ctx.exit({EXIT_OK: Exit.DONE, EXIT_CONFIG: Exit.USAGE}.get(code, Exit.FAILED))
    from ksi.cli.background import start_daemon

    say(start_daemon(settings.config))
    _tell_problems(settings)


@click.command(
    epilog="""\b
Examples:
  ksi stop
  ksi stop --timeout 5 || ksi logs
"""
)
@timeout_option
@pass_settings
def stop(settings: Settings, timeout: float) -> None:
    """Stop the daemon and wait until it is gone. Running requests get a grace period; waiting ones are kept.

    It is no error if none runs.
    """
    stop_and_tell(settings, timeout)


@click.command(
    epilog="""\b
Examples:
  ksi restart
"""
)
@timeout_option
@pass_settings
def restart(settings: Settings, timeout: float) -> None:
    """Stop the daemon, if one runs, and start it again in the background.

    Everything that a start checks is checked first, including the server of a shared store, so that a mistake in the
    configuration does not stop the daemon.
    """
    from ksi.cli.background import start_daemon

    config = settings.checked
    _reach_store(config)
    stop_and_tell(settings, timeout)
    say(start_daemon(config))
    _tell_problems(settings)


def _leave_doors() -> None:
    """Remove the variables of `ksi env` from the environment: a daemon that took itself for a vendor would call itself
    for ever."""
    import os

    from ksi.cli.env import door_variables

    for name in door_variables(os.environ):
        del os.environ[name]


def _tell_problems(settings: Settings) -> None:
    """Print the known problems of a running daemon on stderr: later requests will meet them."""
    import asyncio

    from ksi.cli.status import ask_one

    for problem in asyncio.run(ask_one(settings, "system:health"))["problems"]:
        note(f"ksi: {problem}")


def _reach_store(config: Config) -> None:
    """Raise StoreUnavailable if the server of a shared store cannot be reached now."""
    import asyncio

    from ksi.daemon.preflight import reach_store

    asyncio.run(reach_store(config))


def stop_and_tell(settings: Settings, timeout: float) -> None:
    """Stop the daemon of the home, and report it."""
    from ksi.cli.background import stop_daemon

    home = settings.home
    pid = stop_daemon(settings.places, timeout)
    say(f"ksi has stopped (pid {pid}, home {home})" if pid is not None else f"ksi did not run (home {home})")
