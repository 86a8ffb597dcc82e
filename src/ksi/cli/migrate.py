"""`ksi migrate`: from service version 1 to version 2, and back."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ksi.cli.render import say
from ksi.cli.settings import Exit, Settings, pass_settings


@click.command(
    epilog="""\b
Examples:
  ksi migrate --dry-run
  ksi migrate
  ksi migrate --rollback
  ksi migrate --yes --root /srv/old-ksi
"""
)
@click.option("--dry-run", is_flag=True, help="Only list the steps.")
@click.option(
    "--yes", is_flag=True, help="Do not ask for confirmation. Without a terminal there is no question anyhow."
)
@click.option("--root", metavar="DIR", type=click.Path(file_okay=False, exists=True), help="Another home.")
@click.option("--rollback", is_flag=True, help="Go back to version 1, with the records that version 2 added.")
@pass_settings
@click.pass_context
def migrate(ctx: click.Context, settings: Settings, dry_run: bool, yes: bool, root: str | None, rollback: bool) -> None:
    """Upgrade this home from service version 1 to version 2: check, back up, import V1's data, switch, verify.

    The daemon must not run. Each step is undone when a later one fails. After an interruption, run it again, or undo it
    with --rollback. A migrated home is not changed.
    """
    home = Path(root).absolute() if root is not None else settings.home
    say(f"home: {home}")

    def agree() -> bool:
        return yes or not sys.stdin.isatty() or click.confirm("go on?", default=False)

    from importlib.metadata import version

    from ksi.clock import SystemClock
    from ksi.migration.backward import Backward
    from ksi.migration.forward import Forward

    with quiet_parts():
        if rollback:
            Backward(home, SystemClock(), version("ksi"), say).run(dry_run=dry_run)
            return
        done = Forward(home, SystemClock(), version("ksi"), say).run(dry_run=dry_run, agree=agree)
    ctx.exit(Exit.DONE if done else Exit.FAILED)


@contextmanager
def quiet_parts() -> Iterator[None]:
    """Silence the log of the daemon's parts during the checks, except for errors."""
    import structlog

    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)
