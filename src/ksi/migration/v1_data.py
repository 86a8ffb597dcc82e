"""V1's data: the turns in its session logs, the place of each, and the damaged lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ksi.direct.session_log import DamagedLine, V1Turn, read_line
from ksi.store.snapshot.records import Packed, pack

Digest = bytes
Identity = tuple[str, int, Digest]
"""Conversation, end, and the answer's digest: the identity of a turn."""


class Damaged(msgspec.Struct, frozen=True):
    """A line that is no turn, as it is kept aside."""

    file: str
    line: int
    reason: str
    content: Packed


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The place of a turn, and the facts that order it among others."""

    file: int
    offset: int
    length: int
    conversation: str
    """As line or file name it; a provider's session may mean another one."""
    finished_at: int
    good: bool
    digest: Digest
    request_id: str | None
    provider_session: str | None


class V1Data(msgspec.Struct, frozen=True, kw_only=True):
    """All session logs. `entries` are in the order of time."""

    root: Path
    files: tuple[Path, ...] = ()
    """All files of the folder, of whatever kind."""
    entries: tuple[Entry, ...] = ()
    damaged: tuple[Damaged, ...] = ()

    def turns(self, entries: Iterator[Entry]) -> Iterator[tuple[Entry, V1Turn]]:
        """Read turns again; those of one file together cost its opening once.

        Raises:
            DamagedLine: a file was changed meanwhile.
            OSError: it cannot be read any more.
        """
        opened: tuple[int, bytes] | None = None
        for entry in entries:
            if opened is None or opened[0] != entry.file:
                opened = (entry.file, self.files[entry.file].read_bytes())
            yield entry, read_line(opened[1][entry.offset : entry.offset + entry.length])


def digest(text: str) -> Digest:
    """An answer's digest."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def look(root: Path, folder: Path, *, also_from_v2: bool = True) -> V1Data:
    """Read all session logs below a folder; with or without lines that version 2 wrote.

    Raises:
        OSError: one cannot be read.
    """
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else ()
    entries: list[Entry] = []
    damaged: list[Damaged] = []
    for number, path in enumerate(files):
        if path.suffix != ".jsonl":
            continue
        for line, offset, data in _lines(path.read_bytes()):
            try:
                turn = read_line(data)
            except DamagedLine as error:
                damaged.append(Damaged(str(path.relative_to(root)), line, str(error), pack(data)))
                continue
            if not also_from_v2 and turn.session_id is not None and turn.body is None:
                continue
            entries.append(
                Entry(
                    file=number,
                    offset=offset,
                    length=len(data),
                    conversation=turn.session_id or path.stem,
                    finished_at=turn.finished_at,
                    good=turn.good,
                    digest=digest(turn.text),
                    request_id=turn.request_id,
                    provider_session=turn.provider_session,
                )
            )
    entries.sort(key=lambda entry: entry.finished_at)
    return V1Data(root=root, files=files, entries=tuple(entries), damaged=tuple(damaged))


def _lines(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The lines that hold something: number from 1, offset, bytes."""
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, offset, line
        offset += len(line) + 1
