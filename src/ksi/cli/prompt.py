"""The prompt of `ksi ask`: words of the command line, attached files, and stdin."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ksi.cli.render import note

SILENT = 2.0
"""Seconds after which a stdin that says nothing is mentioned."""


def read_prompt(words: str, files: Sequence[Path], *, stdin: bool) -> str:
    """All that is asked, its parts with an empty line between.

    Raises:
        click.UsageError: there is nothing to ask, or it is no text.
    """
    text = utf8(words, "the prompt")
    parts = [text, *map(quoted, files), _piped(waits=bool(text.strip() or files)) if stdin else ""]
    said = [part for part in parts if part.strip()]
    if not said:
        raise click.UsageError('say what to ask: ksi ask "Name three colours"')
    return "\n\n".join(said)


def utf8(text: str, what: str) -> str:
    """A text of the command line, whose bytes must be UTF-8, whatever the locale says of them.

    Raises:
        click.UsageError: they are not.
    """
    if not any("\udc80" <= char <= "\udcff" for char in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise click.UsageError(f"{what} is not UTF-8 text: byte 0x{byte:02x} at {error.start}") from None


def quoted(path: Path) -> str:
    """A file's name and text, between fences that are longer than any in it.

    Raises:
        click.UsageError: it cannot be read as text.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise click.UsageError(f"--attach: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(
            f"--attach: {path} is not UTF-8 text; only text files can be attached, no images or documents"
        ) from None
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{utf8(path.name, 'a file name')}:\n{fence}\n{text.rstrip()}\n{fence}"


def _piped(*, waits: bool) -> str:
    """What comes on stdin, unless it is a terminal; `waits`: there is something to ask already."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    if waits and not _speaks(SILENT):
        note("ksi: reading stdin until it ends; --no-stdin does not wait for it")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8 text: {error}") from None


def _speaks(seconds: float) -> bool:
    """Whether stdin has something, or its end, within so many seconds."""
    try:
        return bool(select.select([sys.stdin.fileno()], [], [], seconds)[0])
    except (OSError, ValueError):  # no descriptor that can be waited for
        return True
