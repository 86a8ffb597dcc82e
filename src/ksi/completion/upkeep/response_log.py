"""The response log: a line per answer in `var/logs/responses/<session>.jsonl`, as V1 wrote it.

It follows the store: committed answers are read from a stored watermark on and appended in a thread, when an answer
waits to be published or some time has passed. The watermark moves now and then. Before a file is appended to, a journal
notes how long it was at the watermark; a daemon that finds such a journal cuts the files back to these lengths and
writes the answers after the watermark again. So no line is lost, none is there twice, and none is half. A journal that
a loss of power damaged is made up for by looking into the files. The store is the truth; these files are for people and
their tools, and end when the store no longer keeps their session.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, iso_time, microseconds
from ksi.errors import ConfigError, StoreError
from ksi.host.platforms import folds_case
from ksi.host.private_files import append, make_folder, open_to_append, write_whole
from ksi.host.supervise import Periodic
from ksi.request import answer_chars
from ksi.store.base import Store
from ksi.store.values import LoggedTurn

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")
_BATCH = 5_000
"""Answers that are held in memory at once; those of one session share its file's opening."""
_BATCH_CHARS = 8 * 1024 * 1024
"""Characters of answers in one batch, about."""

_MOST_NOTED = 1_000
"""Files in the journal at which the watermark moves before its time."""

_PAUSE = 2.0
"""Seconds between unrequested looks, and between moves of the watermark."""

_LONGEST_PAUSE = 10.0
"""Seconds between looks while nothing can be written."""

_BLOCK = 64 * 1024
"""Bytes that are read at a time from a file's end."""


def log_name(session: str, *, folded: bool = False) -> str:
    """The file name of a session: its own if it is plain, else its hash.

    On a disk that folds case (`folded`) a name with capitals is not plain: it would be another session's as well.
    """
    if _PLAIN.match(session) and not session.startswith(".") and not (folded and session != session.lower()):
        return f"{session}.jsonl"
    return f"{hashlib.sha256(session.encode()).hexdigest()}.jsonl"


class ResponseLog:
    """Writes behind the store's back."""

    def __init__(self, store: Store, folder: Path, clock: Clock, *, enabled: bool, iso: bool = False) -> None:
        """`iso`: times are written as version 1 wrote them."""
        self._store = store
        self._files = _Files(folder, iso=iso)
        self._clock = clock
        self._enabled = enabled
        self._watermark = 0
        """As it is stored."""
        self._written = 0
        """The last answer that is in its file."""
        self._known = False
        """True if the watermark was read."""
        self._writing = asyncio.Lock()
        self._askers: asyncio.Future[None] | None = None
        self._settle_at = 0
        """Monotonic time from which the watermark is to move."""
        self.task = Periodic("ksi-responses", self._write_all, _PAUSE, clock, longest_pause=_LONGEST_PAUSE)
        self._log = structlog.get_logger("ksi.responses")

    @property
    def size(self) -> tuple[int, int] | None:
        """The number of files and their bytes at the last count; None before the first."""
        return self._files.counted

    async def start(self) -> None:
        """Continue after the last daemon's position.

        Raises:
            ConfigError: the folder cannot be made.
        """
        if self._enabled:
            self._files.make_folder()
        self._known = False
        await self._write_what_can_be()
        self.task.start()

    async def stop(self) -> None:
        """Write the rest."""
        # Not in the middle of a batch: its thread would continue concurrently with these writes.
        async with self._writing:
            await self.task.stop()
        await self._write_what_can_be()

    async def sweep(self, keep: float) -> int:
        """Remove the files of sessions that the store no longer keeps; returns how many.

        Only files that nothing was added to for `keep` seconds are asked about.
        """
        if not self._known:
            return 0
        old = await asyncio.to_thread(self._files.untouched_since, self._clock.unix() - keep)
        removed = 0
        for name, session in old:
            # Nothing is appended meanwhile, so a session that comes back begins a new file.
            async with self._writing:
                if await self._store.session(session) is None:
                    await self._settle()
                    removed += await asyncio.to_thread(self._files.remove, name, self._watermark)
        return removed

    async def erase(self, session: str) -> bool:
        """Remove the file of a deleted session; returns True if there was one."""
        async with self._writing:
            await self._settle()
            return await asyncio.to_thread(self._files.erase, session, self._watermark)

    async def move(self, session: str, name: str) -> None:
        """A session has another name: so has its file, unless there is one of that name."""
        async with self._writing:
            await self._settle()
            await asyncio.to_thread(self._files.move, session, name, self._watermark)

    async def forget(self) -> None:
        """Another store's answers follow from here on: the contents of the files stay. Not while it follows."""
        await asyncio.to_thread(self._files.forget)

    def saved(self) -> asyncio.Future[None] | None:
        """Done when everything that was committed before is in its file, or could not be written.

        None if there is nothing to wait for, because no log is kept.
        """
        if not self._enabled or not self.task.alive or self.task.problem is not None:
            return None
        if self._askers is None:
            self._askers = asyncio.get_running_loop().create_future()
            self.task.hurry()
        return self._askers

    async def _write_what_can_be(self) -> None:
        """At the start and the end. Answers that cannot be written stay after the watermark for the next time."""
        self._settle_at = 0
        try:
            await self._write_all()
        except (OSError, StoreError) as error:
            self._log.error("response log not written", error=str(error))

    async def _write_all(self) -> None:
        """Everything that is there now.

        Raises:
            OSError, StoreError: the rest stays behind the watermark for the next time.
        """
        askers, self._askers = self._askers, None
        try:
            async with self._writing:
                if not self._known:
                    self._watermark = self._written = await self._store.log_watermark()
                    self._known = True
                while await self._write_some():
                    pass
                _answer(askers)
                if self._clock.now().mono >= self._settle_at or self._files.noted > _MOST_NOTED:
                    await self._settle()
        except Exception:
            self._written = self._watermark
            self._files.doubt()
            raise
        finally:
            _answer(askers)

    async def _write_some(self) -> bool:
        """One batch; returns True if there may be more."""
        turns = await self._store.log_after(self._written, _BATCH, _BATCH_CHARS)
        if not turns:
            return False
        if self._enabled:
            await asyncio.to_thread(self._files.write, turns, self._watermark)
        self._written = turns[-1].id
        return len(turns) == _BATCH or sum(answer_chars(turn.attempt) for turn in turns) >= _BATCH_CHARS

    async def _settle(self) -> None:
        """Move the watermark after the written answers."""
        self._settle_at = self._clock.now().mono + microseconds(_PAUSE)
        if self._written > self._watermark:
            await self._store.set_log_watermark(self._written)
            self._watermark = self._written


def _answer(askers: asyncio.Future[None] | None) -> None:
    if askers is not None and not askers.done():
        askers.set_result(None)


class _Journal(msgspec.Struct):
    """The lengths at a watermark of those files that were appended to since; in the journal, a line of them."""

    behind: int
    sizes: dict[str, int]


class _Files:
    """The folder of session files, and its journal."""

    def __init__(self, folder: Path, *, iso: bool) -> None:
        self.counted: tuple[int, int] | None = None
        self._iso = iso
        self._folder = folder
        self._noted: _Journal | None = None
        """The present journal; None if it must be read."""
        self._sizes: dict[str, int] = {}
        """How long the files in it are now."""
        self._unsure: int | None = None
        """The watermark at which the journal was damaged, so that the files themselves must be searched."""
        self._journal = folder.with_name(f"{folder.name}.journal")
        self._log = structlog.get_logger("ksi.responses")

    def make_folder(self) -> None:
        """See to it that it is there.

        Raises:
            ConfigError: it cannot be.
        """
        try:
            make_folder(self._folder)
        except OSError as error:
            raise ConfigError(
                f"{self._folder} cannot be used: {error.strerror}; move it away or set log.responses to false",
                place=str(self._folder),
            ) from None

    def write(self, turns: Sequence[LoggedTurn], watermark: int) -> None:
        """Append a batch, whole."""
        make_folder(self._folder)
        lines: dict[str, list[bytes]] = defaultdict(list)
        folded = folds_case(self._folder)
        for turn in turns:
            lines[log_name(turn.conversation, folded=folded)].append(log_line(turn, iso=self._iso))
        self._note(watermark, lines)
        folder = str(self._folder)
        for name, its_lines in lines.items():
            data = b"".join(its_lines)
            self._count(not self._sizes[name], len(data))
            self._sizes[name] += len(data)
            append(f"{folder}/{name}", data, private=True)

    def _note(self, watermark: int, lines: Mapping[str, Sequence[bytes]]) -> None:
        """Record the lengths of these lines' files in the journal, unless it has them since the watermark."""
        if self._noted is None:
            self._cut_back(watermark)
        if self._noted is None or self._noted.behind != watermark:
            self._noted = _Journal(watermark, {})
            self._sizes = {}
        new = [name for name in lines if name not in self._noted.sizes]
        if self._unsure == watermark:
            for name in new:
                self._cut_before(name, lines[name][0])
        if new:
            sizes = {name: self._private_size(name) for name in new}
            self._sizes.update(sizes)
            line = msgspec.json.encode(_Journal(watermark, sizes)) + b"\n"
            if self._noted.sizes:
                append(self._journal, line, private=True)
            else:
                write_whole(self._journal, line)
            self._noted.sizes.update(sizes)

    @property
    def noted(self) -> int:
        """Files in the journal."""
        return 0 if self._noted is None else len(self._noted.sizes)

    def doubt(self) -> None:
        """Writing failed: the answers since the watermark are cut off before they are written again."""
        self._noted = None

    def _cut_back(self, watermark: int) -> bool:
        """Undo the lines after the watermark. What another store, now gone, had came behind another one.

        False if the journal is damaged and nothing could be undone.
        """
        try:
            journal = _read_journal(self._journal.read_bytes())
        except FileNotFoundError:
            return True
        except msgspec.MsgspecError as error:
            if self._unsure != watermark:
                self._log.warning(
                    "the response log's journal is damaged; it is rebuilt from the store and the files",
                    path=str(self._journal),
                    error=str(error),
                )
            self._unsure = watermark
            return False
        if journal.behind == watermark:
            for name, size in journal.sizes.items():
                if self._size(name) > size:
                    os.truncate(self._folder / name, size)
        return True

    def _cut_before(self, name: str, line: bytes) -> None:
        """Cut a file before a line, if it has it, and after its last complete line otherwise."""
        with suppress(FileNotFoundError), (self._folder / name).open("r+b") as file:
            start = 0
            for found in file:
                if found == line:
                    break
                start += len(found)
            else:
                start = _end_of_lines(file)
            file.truncate(start)

    def untouched_since(self, before: float) -> list[tuple[str, str]]:
        """Each session's file that was last written before then, and its session. All files are counted on the way."""
        old: list[tuple[str, str]] = []
        files = size = 0
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    files, size = files + 1, size + status.st_size
                    if status.st_mtime < before and (session := _session_of(self._folder / entry.name)) is not None:
                        old.append((entry.name, session))
        self.counted = (files, size)
        return old

    def remove(self, name: str, watermark: int) -> bool:
        """Remove a session's file, if all of its lines are known to be before the watermark."""
        if self._noted is None and not self._cut_back(watermark):
            return False
        self.forget()
        self._count(-1, -self._size(name))
        (self._folder / name).unlink(missing_ok=True)
        return True

    def erase(self, session: str, watermark: int) -> bool:
        """Remove a session's file, whatever the journal's state; returns True if there was one."""
        path = self._folder / log_name(session, folded=folds_case(self._folder))
        if not path.is_file():
            return False
        if not self.remove(path.name, watermark):
            # The journal is damaged, and the other files are corrected from their contents.
            path.unlink()
        return True

    def move(self, session: str, name: str, watermark: int) -> None:
        """Let a session's file be called by another name."""
        folded = folds_case(self._folder)
        before, after = (self._folder / log_name(one, folded=folded) for one in (session, name))
        if not before.is_file() or after.exists() or (self._noted is None and not self._cut_back(watermark)):
            return
        self.forget()
        before.rename(after)

    def _count(self, files: int, size: int) -> None:
        if self.counted is not None:
            self.counted = (self.counted[0] + files, self.counted[1] + size)

    def forget(self) -> None:
        """Drop the note: all lines that it announced are written."""
        self._noted = None
        self._journal.unlink(missing_ok=True)

    def _size(self, name: str) -> int:
        try:
            return os.stat(f"{self._folder}/{name}").st_size  # noqa: PTH116 - once for each file of a batch
        except FileNotFoundError:
            return 0

    def _private_size(self, name: str) -> int:
        """The length of a file that is to be appended to. One that others could read until now is closed to them."""
        size = self._size(name)
        if size:
            os.close(open_to_append(self._folder / name))
        return size


def _read_journal(data: bytes) -> _Journal:
    """All lines of a journal together. A half-written last line is left out: its files were not appended to yet.

    Raises:
        msgspec.MsgspecError: it is damaged.
    """
    first, *more = data.split(b"\n")
    journal = msgspec.json.decode(first, type=_Journal)
    for line in more[:-1]:
        journal.sizes.update(msgspec.json.decode(line, type=_Journal).sizes)
    return journal


def _end_of_lines(file: BinaryIO) -> int:
    """Return the end of a file's last whole line."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - _BLOCK)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


class _Head(msgspec.Struct):
    session_id: str | None = None


class _Line(msgspec.Struct):
    ksi: _Head


def _session_of(path: Path) -> str | None:
    """The session of a file, by its first line; None if it is no file of this log."""
    try:
        with path.open("rb") as file:
            session = msgspec.json.decode(file.readline(), type=_Line).ksi.session_id
    except (OSError, msgspec.MsgspecError):
        return None
    # Older lines do not name the session: the file does.
    session = session or path.name.removesuffix(".jsonl")
    return session if path.name in (log_name(session), log_name(session, folded=True)) else None


def log_line(turn: LoggedTurn, *, iso: bool = False, **more: Any) -> bytes:
    """A turn's line; `more` is added to KSI's own fields. `iso`: its time is text in ISO 8601."""
    attempt = turn.attempt
    at = attempt.finished_at / MICROSECONDS
    ksi: dict[str, Any] = {
        "provider": attempt.provider,
        "request_id": turn.request_id,
        "session_id": turn.conversation,
        "client_id": turn.agent_id,
        "timestamp": iso_time(at) if iso else at,
        "duration_ms": (attempt.finished_at - attempt.started_at) / 1000,
        **more,
    }
    return msgspec.json.encode({"ksi": ksi, "response": _response(turn)}) + b"\n"


def _response(turn: LoggedTurn) -> Any:
    """Return the provider's response, untouched if it came in one piece."""
    attempt = turn.attempt
    if attempt.raw is not None:
        return msgspec.Raw(msgspec.json.format(attempt.raw, indent=-1))
    usage = None
    if attempt.usage is not None:
        usage = {k: v for k, v in msgspec.structs.asdict(attempt.usage).items() if k != "cost_usd"}
    return {
        "result": attempt.text,
        **({"blocks": attempt.content} if attempt.content else {}),
        "session_id": attempt.provider_session or turn.conversation,
        "model": attempt.model,
        "stop_reason": attempt.stop_reason,
        "usage": usage,
    }
