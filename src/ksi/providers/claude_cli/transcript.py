"""Claude Code's transcripts, read from their end: they are found, and searched for messages of other writers.

A transcript is a file of JSON lines, `projects/<folder>/<session>.jsonl` below Claude Code's own folder. A turn begins
with a line of type `user` that has a `uuid`. Ours are made by a `Seal`, and the program keeps them, so that they are
recognised by any reader, and after a restart too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec

LOOK_LIMIT = 16 * 1024 * 1024
"""Bytes of a transcript's end that are read at most."""
_BLOCK = 64 * 1024
_USER = b'"type":"user"'
_ASSISTANT = b'"type":"assistant"'
_INTERRUPTED = "[Request interrupted by user"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Seal:
    """Makes uuids that only the owner of a key could have made: half of one is random, half follows from it."""

    def __init__(self, key: bytes, source: Callable[[], UUID] = uuid4) -> None:
        self._key = key
        self._source = source

    def new(self) -> str:
        """A uuid of ours."""
        return self._sealed(self._source())

    def is_ours(self, text: str) -> bool:
        """Return True if it was made with this key."""
        return is_uuid(text) and self._sealed(UUID(text)) == text

    def _sealed(self, uuid: UUID) -> str:
        chance = uuid.bytes[:8]
        proof = hashlib.blake2b(chance, key=self._key, digest_size=8).digest()
        return str(UUID(bytes=chance + bytes([0x80 | proof[0] & 0x3F]) + proof[1:]))


class TranscriptTail(msgspec.Struct, frozen=True):
    """The end of a transcript, as it was found."""

    found: bool
    """True if the last good message is there."""
    foreign: int
    """Prompts after it that are not ours."""
    size: int
    """The transcript's bytes up to which was looked."""


class _UserLine(msgspec.Struct, rename="camel"):
    """A line of type `user`, as far as it says whose it is."""

    type: str
    uuid: str = ""
    is_sidechain: bool | None = None
    is_meta: bool | None = None
    is_compact_summary: bool | None = None
    message: Mapping[str, Any] = msgspec.field(default_factory=dict)


class _AssistantLine(msgspec.Struct, rename="camel"):
    """A line of type `assistant`."""

    type: str
    uuid: str = ""
    is_sidechain: bool | None = None
    is_fault: bool | None = msgspec.field(default=None, name="isApiErrorMessage")
    message: Mapping[str, Any] = msgspec.field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """True if it ends a turn: it is no sub-agent's, reports no fault, and calls no tool."""
        aside = self.is_sidechain or self.is_fault or self.message.get("stop_reason") in (None, "tool_use")
        return self.type == "assistant" and bool(self.uuid) and not aside


_ASSISTANT_LINE = msgspec.json.Decoder(_AssistantLine)
_USER_LINE = msgspec.json.Decoder(_UserLine)


def is_uuid(text: str) -> bool:
    """Return True if a text is a uuid as Claude Code writes them, and so harmless in a path."""
    return _UUID.fullmatch(text) is not None


def projects_folder(environment: Mapping[str, str]) -> Path | None:
    """The folder in which Claude Code keeps its transcripts under these variables; None if they do not tell."""
    own = environment.get("CLAUDE_CONFIG_DIR")
    if own:
        return Path(own) / "projects"
    home = environment.get("HOME")
    return Path(home) / ".claude" / "projects" if home else None


def find(projects: Path | None, session: str) -> Path | None:
    """A session's transcript, in whichever folder it was begun; the newest if there are several."""
    if projects is None or not is_uuid(session):
        return None
    name = f"{session}.jsonl"
    try:
        with os.scandir(projects) as folders:
            paths = [Path(folder.path) / name for folder in folders if folder.is_dir()]
    except OSError:
        return None
    there = [path for path in paths if path.is_file()]
    return max(there, key=lambda path: path.stat().st_mtime_ns, default=None)


def mend(path: Path) -> None:
    """End a line that a killed process left unended, so that the next line does not become a part of it."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def point(path: Path, session: str, message: str) -> None:
    """Record in a session's transcript which of its branches is current: the one that ends in `message`.

    Claude Code writes such a line itself at the end of its turns, and resumes only within the branch that the last one
    names. It is needed if another writer's turn came between a prompt of ours and its answer.
    """
    line = {"type": "last-prompt", "leafUuid": message, "sessionId": session}
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def look_back(
    path: Path, last_message: str, is_ours: Callable[[str], bool], *, limit: int = LOOK_LIMIT
) -> TranscriptTail:
    """Search from the end back to our last good message, and count the prompts of other writers after it.

    If it is not within `limit` bytes of the end, it counts as found, and the bytes that were read as another writer's.
    """
    marker = re.compile(rb'"uuid":\s*"' + re.escape(last_message.encode()) + rb'"')
    size = path.stat().st_size
    length = min(size, _BLOCK)
    with path.open("rb") as file:
        while True:
            file.seek(size - length)
            data = file.read(length)
            found = marker.search(data)
            if found is not None:
                return TranscriptTail(True, _foreign(data[found.end() :], is_ours), size)
            if length == size:
                return TranscriptTail(False, _foreign(data, is_ours), size)
            if length >= limit:
                return TranscriptTail(True, max(1, _foreign(data, is_ours)), size)
            length = min(size, length * 4, limit)


def look_on(path: Path, start: int, last_message: str, is_ours: Callable[[str], bool]) -> TranscriptTail:
    """Read from byte `start` on: our turn, and the prompts of other writers among it."""
    size = path.stat().st_size
    if not 0 <= size - start <= LOOK_LIMIT:
        return look_back(path, last_message, is_ours)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size - start)
    return TranscriptTail(last_message.encode() in data, _foreign(data, is_ours), size)


def last_answer(path: Path) -> str | None:
    """The uuid of the last whole answer in a transcript's end. Later turns that were cut off or failed are left out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - LOOK_LIMIT))
        data = file.read()
    for line in reversed(data.split(b"\n")):
        if _ASSISTANT in line:
            with suppress(msgspec.DecodeError):
                answer = _ASSISTANT_LINE.decode(line)
                if answer.is_whole:
                    return answer.uuid
    return None


def _foreign(data: bytes, is_ours: Callable[[str], bool]) -> int:
    return sum(1 for uuid in _prompts(data) if not is_ours(uuid))


def _prompts(data: bytes) -> Iterator[str]:
    """The uuids of the prompts in a transcript's lines, without those of tools and of the program itself."""
    for line in data.split(b"\n"):
        if _USER not in line:
            continue
        try:
            prompt = _USER_LINE.decode(line)
        except msgspec.DecodeError:
            continue  # the end of a line that began before `data`, or one that is being written
        of_program = prompt.is_sidechain or prompt.is_meta or prompt.is_compact_summary
        if prompt.type == "user" and not of_program and _is_said(prompt.message.get("content")):
            yield prompt.uuid


def _is_said(content: Any) -> bool:
    """Return True if a message's content is a prompt: no tool's result, and not the note that a turn was
    interrupted."""
    if isinstance(content, str):
        return not content.startswith(_INTERRUPTED)
    if not isinstance(content, list):
        return False
    blocks = [block for block in content if isinstance(block, dict)]
    return any(
        block.get("type") != "tool_result" and not str(block.get("text", "")).startswith(_INTERRUPTED)
        for block in blocks
    )
