"""`ksi logs`: the end of the daemon's log file, and further lines as they are written."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import click

from ksi.cli.render import note, print_data
from ksi.cli.settings import Exit, Settings, pass_settings

LOG_FILE = "daemon.log"
BLOCK = 64 * 1024
LOOK_EVERY = 0.2
"""Seconds between two polls of a followed log."""


@click.command(
    epilog="""\b
Examples:
  ksi logs -n 100
  ksi logs -f | grep error
"""
)
@click.option("-f", "--follow", is_flag=True, help="Print further lines as they are written, until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="The number of lines from the end."
)
@pass_settings
@click.pass_context
def logs(ctx: click.Context, settings: Settings, follow: bool, lines: int) -> None:
    """Show the end of the daemon's log; with -f also further lines."""
    path = settings.places.log_dir / LOG_FILE
    try:
        log = path.open("rb")
    except FileNotFoundError:
        note(f"ksi: there is no log at {path} yet; the daemon writes it when it starts")
        ctx.exit(Exit.NOT_FOUND)
    with log:
        print_data(last_lines(log, lines, path))
        if follow:
            _follow(path, log)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, as text; empty without a log."""
    try:
        with path.open("rb") as log:
            return last_lines(log, lines, path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_lines(log: BinaryIO, lines: int, path: Path) -> bytes:
    """The last lines of an open log and, if it has fewer, of rotated ones before it. The position is then its end."""
    parts = [_end_of(log, lines)]
    number = 0
    while (missing := lines - sum(part.count(b"\n") for part in parts)) > 0:
        number += 1
        try:
            with path.with_name(f"{path.name}.{number}").open("rb") as older:
                parts.append(_end_of(older, missing))
        except FileNotFoundError:
            break
    return b"".join(reversed(parts))


def _end_of(log: BinaryIO, lines: int) -> bytes:
    """The last lines of one file, read from its end."""
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
    """Print further lines, also those of a file that replaced this one."""
    with ExitStack() as opened:
        while True:
            added = log.read(BLOCK)
            if added:
                print_data(added)
            elif _replaced(path, log):
                opened.close()
                log = opened.enter_context(path.open("rb"))
            else:
                time.sleep(LOOK_EVERY)


def _replaced(path: Path, log: BinaryIO) -> bool:
    """True if the log was moved away or emptied, and another one exists."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(log.fileno())
    return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino) or there.st_size < log.tell()
