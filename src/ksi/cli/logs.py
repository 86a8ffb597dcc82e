"""`ksi logs`: the daemon's log file, its end, and what is added."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import click

from ksi.cli.render import note, print_out, visible
from ksi.cli.settings import Exit, Settings, pass_settings

LOG_FILE = "daemon.log"
BLOCK = 64 * 1024
LOOK_EVERY = 0.2
"""Seconds between two looks at a log that is followed."""


@click.command(
    epilog="""\b
Examples:
  ksi logs -n 100
  ksi logs -f | grep error
"""
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="Lines from the end.")
@pass_settings
@click.pass_context
def logs(ctx: click.Context, settings: Settings, follow: bool, lines: int) -> None:
    """Show the end of the daemon's log; with -f also what is added to it."""
    path = settings.places.log_dir / LOG_FILE
    try:
        log = path.open("rb")
    except FileNotFoundError:
        note(f"ksi: there is no log at {path} yet; the daemon writes it when it starts")
        ctx.exit(Exit.NOT_FOUND)
    with log:
        _put(last_lines(log, lines))
        if follow:
            _follow(path, log)


def tail(path: Path, lines: int) -> str:
    """The last lines of a file, as text; nothing where there is no file."""
    try:
        with path.open("rb") as log:
            return last_lines(log, lines).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_lines(log: BinaryIO, lines: int) -> bytes:
    """The last lines of an open file, read from its end; leaves it there."""
    position = log.seek(0, os.SEEK_END)
    data = b""
    while position > 0 and data.count(b"\n") <= lines:
        step = min(BLOCK, position)
        position -= step
        log.seek(position)
        data = log.read(step) + data
    log.seek(0, os.SEEK_END)
    return b"".join(data.splitlines(keepends=True)[-lines:]) if lines else b""


def _follow(path: Path, log: BinaryIO) -> None:
    """Print what is added, in the file that has taken this one's place too."""
    with ExitStack() as opened:
        while True:
            added = log.read(BLOCK)
            if added:
                _put(added)
            elif _replaced(path, log):
                opened.close()
                log = opened.enter_context(path.open("rb"))
            else:
                time.sleep(LOOK_EVERY)


def _replaced(path: Path, log: BinaryIO) -> bool:
    """Whether the log was moved away or emptied, and another one is there."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(log.fileno())
    return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino) or there.st_size < log.tell()


def _put(data: bytes) -> None:
    if sys.stdout.isatty():
        # A log holds what others said, and a terminal obeys some of it.
        print_out(visible(data.decode("utf-8", "replace"), keep="\n\t"))
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
