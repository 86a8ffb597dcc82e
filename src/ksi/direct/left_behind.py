"""Conversations of version 1 that version 2 does not know, because the version was changed without `ksi migrate`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ksi.clock import MICROSECONDS
from ksi.direct.session_log import DamagedLine, V1Turn, read_line
from ksi.store.base import Store

MOST_FILES = 10_000
"""Session logs that are looked at."""
_TAIL = 256 * 1024
"""Bytes from a log's end in which its last line is looked for."""


class _Edge(msgspec.Struct, frozen=True):
    """The first or last turn of a session log, made by version 1."""

    conversation: str
    finished_at: int
    first: bool


async def left_behind(folder: Path, store: Store, since: int) -> list[str]:
    """Conversations with turns that version 1 made after `since` and the store does not have.

    Only the first and the last line of each log are read. `since` is in microseconds of wall time.
    """
    edges = await asyncio.to_thread(lambda: list(_edges(folder, since)))
    missing: dict[str, None] = {}
    for edge in edges:
        view = await store.session(edge.conversation)
        if (
            view is None
            or (edge.first and view.created_at > edge.finished_at + MICROSECONDS)
            or view.active_at + MICROSECONDS < edge.finished_at
        ):
            missing[edge.conversation] = None
    return list(missing)


def _edges(folder: Path, since: int) -> Iterator[_Edge]:
    paths = sorted(folder.rglob("*.jsonl"))[:MOST_FILES] if folder.is_dir() else []
    for path in paths:
        try:
            lines = _first_and_last(path)
        except OSError:
            continue  # it was taken away meanwhile
        for line, first in lines:
            try:
                turn = read_line(line)
            except DamagedLine:
                continue
            if turn.good and turn.finished_at > since and _by_version_1(turn):
                yield _Edge(turn.session_id or path.stem, turn.finished_at, first)


def _first_and_last(path: Path) -> list[tuple[bytes, bool]]:
    with path.open("rb") as file:
        first = file.readline()
        file.seek(max(0, path.stat().st_size - _TAIL))
        rest = [line for line in file.read().split(b"\n") if line.strip()]
    return [(first, True), *([(rest[-1], False)] if rest else [])]


def _by_version_1(turn: V1Turn) -> bool:
    """Version 2 writes the session's name and no prompt; version 1 wrote a prompt, or neither."""
    return turn.session_id is None or turn.body is not None
