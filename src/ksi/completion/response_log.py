"""The response log: a line per answer in `var/logs/responses/<session>.jsonl`, as V1 wrote it (R3).

It follows the store: what was committed is read from a stored watermark on and appended in a thread, when an answer
waits to be told or some time has passed. The watermark moves now and then. Before a file is appended to, a journal
notes how long it was at the watermark; whoever finds such a journal cuts the files back to that and writes again what
is behind the watermark. So no line is lost, none is there twice, and none is half. The store is the truth; these files
are for people and their tools.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, iso_time
from ksi.errors import ConfigError, StoreError
from ksi.platforms import folds_case
from ksi.request import answer_chars
from ksi.store.base import Store
from ksi.store.values import LoggedTurn

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")
_BATCH = 5_000
"""Answers that are held in memory at once; those of one session share its file's opening."""
_BATCH_CHARS = 8 * 1024 * 1024
"""Characters of answers in one batch, about."""

_MOST_NOTED = 1_000
"""Files in the journal at which the watermark moves before its time: each new file writes the journal again."""

_PAUSE = 2.0
"""Seconds between looks that nobody asked for, and between moves of the watermark."""


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
        self._writing = asyncio.Lock()
        self._asked = asyncio.Event()
        self._askers: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.responses")

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Begin where the last daemon stopped.

        Raises:
            ConfigError: the folder cannot be made.
        """
        if self._enabled:
            self._files.make_folder()
        self._watermark = self._written = await self._store.log_watermark()
        await self._write_all()
        self._task = asyncio.create_task(self._follow(), name="ksi-responses")

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            # Not in the middle of a batch: its thread would go on beside what is written here.
            async with self._writing:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._write_all()
        self._answer_askers()

    async def forget(self) -> None:
        """Another store's answers follow from here on: what the files have stays as it is. Not while it follows."""
        await asyncio.to_thread(self._files.forget)

    def saved(self) -> asyncio.Future[None] | None:
        """Done when everything that was committed before is in its file, or could not be written.

        None where there is nothing to wait for, as no log is kept.
        """
        if not self._enabled or not self.alive:
            return None
        if self._askers is None:
            self._askers = asyncio.get_running_loop().create_future()
            self._asked.set()
        return self._askers

    async def _follow(self) -> None:
        """Write when somebody asks for it, and move the watermark after each pause."""
        pause = asyncio.create_task(self._clock.sleep(_PAUSE))
        asked = asyncio.create_task(self._asked.wait())
        try:
            while True:
                await asyncio.wait((pause, asked), return_when=asyncio.FIRST_COMPLETED)
                due = pause.done()
                if due:
                    pause = asyncio.create_task(self._clock.sleep(_PAUSE))
                if asked.done():
                    self._asked.clear()
                    asked = asyncio.create_task(self._asked.wait())
                try:
                    await self._write_all(settle=due)
                except Exception:  # noqa: BLE001 - the top of a long-lived loop: a defect in one look must not end all
                    self._log.exception("response log not written")
                    self._answer_askers()
        finally:
            pause.cancel()
            asked.cancel()

    async def _write_all(self, *, settle: bool = True) -> None:
        """Everything that is there now. What cannot be written stays behind the watermark for the next time.

        `settle` moves the watermark, too.
        """
        askers, self._askers = self._askers, None
        try:
            async with self._writing:
                while await self._write_some():
                    pass
                _answer(askers)
                if settle or self._files.noted > _MOST_NOTED:
                    await self._settle()
        except (OSError, StoreError) as error:
            self._written = self._watermark
            self._files.doubt()
            self._log.error("response log not written", error=str(error))
        finally:
            _answer(askers)

    async def _write_some(self) -> bool:
        """One batch; whether there may be more."""
        turns = await self._store.log_after(self._written, _BATCH, _BATCH_CHARS)
        if not turns:
            return False
        if self._enabled:
            await asyncio.to_thread(self._files.write, turns, self._watermark)
        self._written = turns[-1].id
        return len(turns) == _BATCH or sum(answer_chars(turn.attempt) for turn in turns) >= _BATCH_CHARS

    async def _settle(self) -> None:
        """Move the watermark behind what is written."""
        if self._written > self._watermark:
            await self._store.set_log_watermark(self._written)
            self._watermark = self._written

    def _answer_askers(self) -> None:
        askers, self._askers = self._askers, None
        _answer(askers)


def _answer(askers: asyncio.Future[None] | None) -> None:
    if askers is not None and not askers.done():
        askers.set_result(None)


class _Journal(msgspec.Struct):
    """How long the files were at a watermark that have been appended to since."""

    behind: int
    sizes: dict[str, int]


class _Files:
    """The folder of session files, and its journal."""

    def __init__(self, folder: Path, *, iso: bool) -> None:
        self._iso = iso
        self._folder = folder
        self._noted: _Journal | None = None
        """The journal as it stands; None where it must be read."""
        self._journal = folder.with_name(f"{folder.name}.journal")

    def make_folder(self) -> None:
        """See to it that it is there.

        Raises:
            ConfigError: it cannot be.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{self._folder} cannot be used: {error.strerror}; move away what is there or set log.responses false",
                place=str(self._folder),
            ) from None

    def write(self, turns: Sequence[LoggedTurn], watermark: int) -> None:
        """Append a batch, whole."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines: dict[str, list[bytes]] = defaultdict(list)
        folded = folds_case(self._folder)
        for turn in turns:
            lines[log_name(turn.conversation, folded=folded)].append(log_line(turn, iso=self._iso))
        self._note(watermark, lines)
        for name, its_lines in lines.items():
            _append(f"{self._folder}/{name}", b"".join(its_lines))

    def _note(self, watermark: int, names: Iterable[str]) -> None:
        """Have in the journal how long these files are, where they are not in it since the watermark."""
        if self._noted is None:
            self._cut_back(watermark)
        if self._noted is None or self._noted.behind != watermark:
            self._noted = _Journal(watermark, {})
        new = {name: self._size(name) for name in names if name not in self._noted.sizes}
        if new:
            self._noted = _Journal(watermark, {**self._noted.sizes, **new})
            _replace(self._journal, msgspec.json.encode(self._noted))

    @property
    def noted(self) -> int:
        """Files in the journal."""
        return 0 if self._noted is None else len(self._noted.sizes)

    def doubt(self) -> None:
        """Writing failed: what the files have since the watermark is cut off before they are written again."""
        self._noted = None

    def _cut_back(self, watermark: int) -> None:
        """Undo a batch whose watermark was not moved. That of another store, now gone, came behind another one."""
        try:
            journal = msgspec.json.decode(self._journal.read_bytes(), type=_Journal)
        except FileNotFoundError:
            return
        except msgspec.MsgspecError as error:
            raise OSError(f"{self._journal} is damaged ({error}); remove it to go on") from None
        if journal.behind == watermark:
            for name, size in journal.sizes.items():
                if self._size(name) > size:
                    os.truncate(self._folder / name, size)

    def forget(self) -> None:
        """What was written is whole."""
        self._noted = None
        self._journal.unlink(missing_ok=True)

    def _size(self, name: str) -> int:
        try:
            return os.stat(f"{self._folder}/{name}").st_size  # noqa: PTH116 - once for each file of a batch
        except FileNotFoundError:
            return 0


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    _append(str(beside), data)
    beside.replace(path)


def _append(path: str, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def log_line(turn: LoggedTurn, *, iso: bool = False, **more: Any) -> bytes:
    """A turn's line; `more` goes beside what KSI itself says in it. `iso`: its time is text in ISO 8601."""
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
    """What the provider sent, untouched where it came in one piece."""
    attempt = turn.attempt
    if attempt.raw is not None:
        return msgspec.Raw(msgspec.json.format(attempt.raw, indent=-1))
    usage = None
    if attempt.usage is not None:
        usage = {k: v for k, v in msgspec.structs.asdict(attempt.usage).items() if k != "cost_usd"}
    return {
        "result": attempt.text,
        "session_id": attempt.provider_session or turn.conversation,
        "model": attempt.model,
        "stop_reason": attempt.stop_reason,
        "usage": usage,
    }
