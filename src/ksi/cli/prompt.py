"""The prompt of `ksi ask`: words of the command line, attached files, and stdin."""

from __future__ import annotations

import base64
import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ksi.cli.render import note

SILENT = 2.0
"""Seconds after which a remark says that stdin is silent."""


_IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
"""The first bytes of image files."""


def attachments(files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Images and PDF files as blocks, other files as quoted text.

    Raises:
        click.UsageError: one cannot be read, or is none of these.
    """
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for path in files:
        data = _read(path)
        kind = media_type(data)
        if kind is None:
            texts.append(quoted(path, data))
            continue
        source = {"type": "base64", "media_type": kind, "data": base64.b64encode(data).decode()}
        if kind.startswith("image/"):
            blocks.append({"type": "image", "source": source})
        else:
            blocks.append({"type": "document", "source": source, "title": utf8(path.name, "a file name")})
    return blocks, texts


def media_type(data: bytes) -> str | None:
    """The type of a file that is no text, by its first bytes; None if they do not tell."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith(b"%PDF-"):
        return "application/pdf"
    return next((kind for start, kind in _IMAGES.items() if data.startswith(start)), None)


def read_prompt(words: str, attached: Sequence[str], *, stdin: bool) -> str:
    """The whole prompt, its parts separated by an empty line; `attached` are the texts of files.

    Raises:
        click.UsageError: there is no prompt, or it is no text.
    """
    text = utf8(words, "the prompt")
    parts = [text, *attached, _piped(waits=bool(text.strip() or attached)) if stdin else ""]
    said = [part for part in parts if part.strip()]
    if not said:
        raise click.UsageError('give a prompt: ksi ask "Name three colours"')
    return "\n\n".join(said)


def utf8(text: str, what: str) -> str:
    """A text of the command line, whose bytes must be UTF-8 in any locale.

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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise click.UsageError(f"--attach: {path} cannot be read: {error.strerror}") from None


def quoted(path: Path, data: bytes) -> str:
    """A file's name and text, between fences longer than any in it.

    Raises:
        click.UsageError: it is no text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(
            f"--attach: {path} is neither UTF-8 text nor an image (PNG, JPEG, GIF, WebP) nor a PDF"
        ) from None
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{utf8(path.name, 'a file name')}:\n{fence}\n{text.rstrip()}\n{fence}"


def _piped(*, waits: bool) -> str:
    """The text on stdin, unless it is a terminal; `waits`: there already is a prompt."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    if waits and not _speaks(SILENT):
        note("ksi: reading stdin until it ends; --no-stdin does not wait for it")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8 text: {error}") from None


def _speaks(seconds: float) -> bool:
    """True if stdin has data, or its end, within these seconds."""
    try:
        return bool(select.select([sys.stdin.fileno()], [], [], seconds)[0])
    except (OSError, ValueError):  # no descriptor that can be waited for
        return True
