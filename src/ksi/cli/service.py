"""`ksi start`, `ksi stop`, `ksi restart`: the daemon's life."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ksi.cli.settings import Exit, F, Settings, pass_settings

if TYPE_CHECKING:
    from ksi.config import Config

STOP_TIMEOUT = 60.0


def timeout_option(command: F) -> F:
    """`--timeout`."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=STOP_TIMEOUT,
        show_default=True,
        help="Seconds to wait for its end.",
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
    """Start the daemon, in the background unless told otherwise, and say one line when it is ready to serve.

    A daemon that runs already is left alone. Where it cannot start, what it said is shown.
    """
    if foreground:
        from ksi.daemon import EXIT_CONFIG, EXIT_OK, run

        code = run(settings.config, say=_say)
        ctx.exit({EXIT_OK: Exit.DONE, EXIT_CONFIG: Exit.USAGE}.get(code, Exit.FAILED))
    from ksi.cli.background import start_daemon

    _say(start_daemon(settings.config))


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
    """Stop the daemon and wait until it is gone. Requests that run get their grace; what waits is kept.

    No daemon to stop is no error.
    """
    _stop(settings, timeout)


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

    Everything that a start checks is checked first, and a server that keeps the store is asked: a mistake in the
    configuration stops nothing.
    """
    from ksi.cli.background import start_daemon

    config = settings.checked
    _reach_store(config)
    _stop(settings, timeout)
    _say(start_daemon(config))


def _reach_store(config: Config) -> None:
    """Raise StoreUnavailable if the server of a shared store cannot be reached now."""
    import asyncio

    from ksi.preflight import reach_store

    asyncio.run(reach_store(config))


def _stop(settings: Settings, timeout: float) -> None:
    from ksi.cli.background import stop_daemon

    home = settings.home
    pid = stop_daemon(settings.places, timeout)
    _say(f"ksi has stopped (pid {pid}, home {home})" if pid is not None else f"ksi did not run (home {home})")


def _say(line: str) -> None:
    print(line, flush=True)
