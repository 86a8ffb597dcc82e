"""`ksi bench`: hands over to the benchmarks of the checkout that KSI runs from. The package does not have them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

CHECKOUT = Path(__file__).resolve().parents[3]


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\b\nExample:\n  ksi bench",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def missing(options: tuple[str, ...]) -> NoReturn:
    """Measure KSI on this machine. An installed package has no benchmarks: they are in the checkout of the source."""
    raise click.UsageError(
        "this KSI was installed as a package, and the benchmarks are only in its source code. Check it out, and run "
        "`./ksi bench` there."
    )


def load(checkout: Path) -> click.Command:
    """The command that measures; without a checkout, one that explains where to find it."""
    if not (checkout / "benchmarks" / "command.py").is_file():
        return missing
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from benchmarks.command import command

    return command


command = load(CHECKOUT)
