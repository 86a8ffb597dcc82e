"""The response log: a line per answer in `var/logs/responses/<session>.jsonl`, as V1 wrote it (R3).

It follows the store: what was committed is read from a stored watermark on, appended in a thread, and then the
watermark moves. After a crash between the two, a session's file is asked which answers it has already. The store is
the truth; these files are for people and their tools.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.errors import StoreError
from ksi.store.base import LoggedTurn, Store

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")
_BATCH = 5_000
"""Answers that are held in memory at once; those of one session share its file's opening."""
_PAUSE = 1.0
"""Seconds between looks."""
_TAIL = 1024 * 1024


def log_name(session: str) -> str:
    """The file name of a session: its own where it is plain, else its hash (S3)."""
    if _PLAIN.match(session) and not session.startswith("."):
        return f"{session}.jsonl"
    return f"{hashlib.sha256(session.encode()).hexdigest()}.jsonl"


class ResponseLog:
    """Writes behind the store's back."""

    def __init__(self, store: Store, folder: Path, clock: Clock, *, enabled: bool) -> None:
        self._store = store
        self._folder = folder
        self._clock = clock
        self._enabled = enabled
        self._watermark = 0
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.responses")

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Begin where the last daemon stopped; answers that it wrote without saying so are not written again."""
        self._watermark = await self._store.log_watermark()
        if self._enabled:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while await self._write_some(look_first=True):
            pass
        self._task = asyncio.create_task(self._follow(), name="ksi-responses")

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while await self._write_some(look_first=False):
            pass

    async def _follow(self) -> None:
        while True:
            await self._clock.sleep(_PAUSE)
            try:
                while await self._write_some(look_first=False):
                    pass
            except (OSError, StoreError) as error:
                # The watermark stands still, so nothing is lost: the next look tries again.
                self._log.error("response log not written", error=str(error))

    async def _write_some(self, *, look_first: bool) -> bool:
        """One batch; whether there may be more."""
        turns = await self._store.log_after(self._watermark, _BATCH)
        if not turns:
            return False
        if self._enabled:
            await asyncio.to_thread(self._write, turns, look_first)
        self._watermark = turns[-1].id
        await self._store.set_log_watermark(self._watermark)
        return len(turns) == _BATCH

    def _write(self, turns: Sequence[LoggedTurn], look_first: bool) -> None:
        files: dict[str, list[LoggedTurn]] = defaultdict(list)
        for turn in turns:
            files[log_name(turn.conversation)].append(turn)
        for name, its_turns in files.items():
            path = self._folder / name
            known = _known_requests(path) if look_first else frozenset()
            data = b"".join(_line(turn) for turn in its_turns if turn.request_id not in known)
            if data:
                _append(path, data)


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def _known_requests(path: Path) -> frozenset[str]:
    """The requests in the last lines of a file; a line that a crash cut off is taken away."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                cut = len(tail) - (tail.rfind(b"\n") + 1)
                file.truncate(size - cut)
                tail = tail[: len(tail) - cut]
    except FileNotFoundError:
        return frozenset()
    known = set()
    for line in tail.splitlines():
        try:
            entry = msgspec.json.decode(line, type=_Entry)
        except msgspec.MsgspecError:
            continue
        known.add(entry.ksi.request_id)
    return frozenset(known)


class _Ksi(msgspec.Struct):
    request_id: str


class _Entry(msgspec.Struct):
    ksi: _Ksi


def _line(turn: LoggedTurn) -> bytes:
    attempt = turn.attempt
    ksi: dict[str, Any] = {
        "provider": attempt.provider,
        "request_id": turn.request_id,
        "session_id": turn.conversation,
        "client_id": turn.agent_id,
        "timestamp": attempt.finished_at / MICROSECONDS,
        "duration_ms": (attempt.finished_at - attempt.started_at) / 1000,
    }
    return msgspec.json.encode({"ksi": ksi, "response": _response(turn)}) + b"\n"


def _response(turn: LoggedTurn) -> Any:
    """What the provider sent, untouched where it came in one piece."""
    attempt = turn.attempt
    if attempt.raw is not None:
        return msgspec.Raw(attempt.raw)
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
