"""Saves the whole store to a file while the store works, and loads such a file into an empty store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from pathlib import Path

import structlog

from ksi.clock import Clock, Moment
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.errors import InvalidData, StoreUnavailable
from ksi.events.service import CheckpointReply, CollectData, RestoreData
from ksi.host.private_files import make_folder
from ksi.store.base import Store
from ksi.store.snapshot.file import CheckpointReader, CheckpointWriter, Header, sweep_unfinished
from ksi.store.snapshot.records import Loaded

TWICE = "if the saved daemon continues as well, requests that had not ended run in both, and are paid for twice"


class Checkpoints:
    """`checkpoint:collect` and `checkpoint:restore`."""

    def __init__(
        self,
        store: Store,
        responses: ResponseLog,
        folder: Path,
        clock: Clock,
        ksi: str,
        still: Callable[[], AbstractContextManager[None]],
        resume: Callable[[], Awaitable[None]],
    ) -> None:
        """`folder` is the base of relative paths, and `ksi` this version. Nothing that is loaded starts inside `still`,
        and `resume` is called in it when work was loaded."""
        self._store = store
        self._responses = responses
        self._folder = folder
        self._clock = clock
        self._ksi = ksi
        self._still = still
        self._resume = resume
        self._one_at_a_time = asyncio.Lock()
        self._log = structlog.get_logger("ksi.checkpoint")

    def sweep(self) -> list[Path]:
        """Remove a killed daemon's unfinished files from the folder of checkpoints, and return their paths.

        Raises:
            OSError: it cannot be taken away.
        """
        return sweep_unfinished(self._folder)

    def since(self, begin: float) -> list[Path]:
        """The files in the folder of checkpoints that were written at this Unix time or later."""
        try:
            paths = sorted(self._folder.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in paths if path.is_file() and path.stat().st_mtime >= begin]

    async def collect(self, data: CollectData) -> CheckpointReply:
        """`checkpoint:collect`: everything as of this moment, in a new file.

        Raises:
            InvalidData: no file can be made at `path`.
            StoreFull, StoreUnavailable: it could not be written.
        """
        now = self._clock.now()
        path = self._place(data.path or _name(now))
        writer = await asyncio.to_thread(self._begin, path)
        try:
            async with aclosing(self._store.export(now)) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(writer.add, piece)
            header = await asyncio.to_thread(writer.finish, now.unix, self._ksi)
        finally:
            await asyncio.to_thread(writer.discard)
        self._log.info("checkpoint saved", path=str(path), records=header.records, bytes=header.bytes)
        return _reply(path, header)

    async def restore(self, data: RestoreData) -> CheckpointReply:
        """`checkpoint:restore`: load a file into the empty store, and continue from it.

        Raises:
            NotFound: no such file.
            CheckpointInvalid: it is damaged, not KSI's, or of a newer version. Nothing was changed.
            StoreNotEmpty: there are requests or conversations already.
        """
        # Once begun it is brought to its end, whether its client stays or not.
        return await asyncio.shield(asyncio.create_task(self._restore(self._place(data.path))))

    async def _restore(self, path: Path) -> CheckpointReply:
        async with self._one_at_a_time:
            reader = await asyncio.to_thread(CheckpointReader, path)
            try:
                await asyncio.to_thread(reader.check)
                with self._still():
                    loaded = await self._load(reader)
                    await self._resume()
            finally:
                reader.close()
        reply = _reply(path, reader.header)
        reply.failed = len(loaded.failed)
        reply.notice = TWICE
        self._log.warning("checkpoint restored", path=str(path), records=reader.header.records, notice=TWICE)
        return reply

    async def _load(self, reader: CheckpointReader) -> Loaded:
        """Load, while the response log holds still: it continues at the position of the saved one."""
        await self._responses.stop()
        try:
            loaded = await self._store.load(reader.records(), self._clock.now())
            await self._responses.forget()
        finally:
            await self._responses.start()
        return loaded

    def _begin(self, path: Path) -> CheckpointWriter:
        if path.is_relative_to(self._folder):
            try:
                make_folder(self._folder)
            except OSError as error:
                raise StoreUnavailable(f"{self._folder} cannot be made: {error.strerror}") from None
        return CheckpointWriter(path)

    def _place(self, path: str) -> Path:
        """An absolute path as it is; any other below the folder of checkpoints."""
        given = Path(path)
        if "\0" in path or ".." in given.parts or not given.name:
            raise InvalidData("path: a file, absolute or below var/checkpoints, without `..`", path="path")
        return given if given.is_absolute() else self._folder / given


def _name(now: Moment) -> str:
    """A name that tells the moment, in UTC."""
    return time.strftime(f"checkpoint-%Y%m%dT%H%M%S.{now.wall % 10**6:06}Z.ksi", time.gmtime(now.unix))


def _reply(path: Path, header: Header) -> CheckpointReply:
    return CheckpointReply(
        path=str(path),
        created_at=header.created_at,
        version=header.ksi,
        bytes=header.bytes,
        sha256=header.sha256,
        conversations=header.records.get("conversation", 0),
        requests=header.records.get("request", 0),
        locks=header.records.get("lock", 0),
        interrupted=header.interrupted,
    )
