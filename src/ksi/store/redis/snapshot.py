"""Saving and loading a namespace on Redis: by one daemon that has it for itself meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence

from ksi.clock import Moment
from ksi.errors import StoreInUse, StoreNotEmpty, StoreUnavailable
from ksi.store.image import load, save
from ksi.store.image.data import Image
from ksi.store.redis.calls import Calls
from ksi.store.redis.load import Writing, pages
from ksi.store.redis.save import Reading
from ksi.store.redis.values import Answer
from ksi.store.snapshot.records import Loaded, Record
from ksi.store.values import StoreRules

PIECE = 500
"""Records that an export gives at once."""

_STAYS = ("meta", "count", "lives", "dead", "daemons", "heard", "lost", "seen", "woken", "stop", "providers")
"""A namespace's records of its daemons and of providers; a load does not change them."""

_KEEP = 15.0
"""Seconds after which the server is told again that a load is in progress."""

_STAYS_TOO = ("life:", "ops:")


class RedisSnapshots:
    """The verbs that take or give everything. Both need the store for one daemon: others are refused meanwhile."""

    def __init__(self, calls: Calls, rules: StoreRules, *, hand: bool) -> None:
        self._calls = calls
        self._rules = rules
        self._hand = hand

    async def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """See the protocol; but all verbs of this daemon wait while the namespace is read.

        Raises:
            StoreInUse: another daemon has the namespace too.
            StoreUnavailable: the server was away meanwhile.
        """
        async with self._calls.alone():
            await self._stop_others(now, loading=False)
            try:
                data = await Reading(self._calls.plain, self._calls.namespace, self._keep).all()
            finally:
                whole, _ = await self._calls.urgent("go_on", now, Answer)
            if whole.error is not None:
                raise StoreUnavailable("the server was away while the store was read; try again")
        records = await asyncio.to_thread(save.save, data, now)
        for at in range(0, len(records), PIECE):
            yield records[at : at + PIECE]

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """See the protocol; until everything is written the namespace cannot be opened, and a failed load is removed.

        Raises:
            StoreInUse: another daemon has the namespace too.
            StoreNotEmpty: it holds something.
            CheckpointInvalid: the records do not fit together.
            StoreUnavailable: the server was away for long.
        """
        async with self._calls.alone():
            fence = await self._stop_others(now, loading=True)
            try:
                data = Image()
                data.count_on({"fence": fence})
                # The records of providers may exist already, and keep their versions.
                await Reading(self._calls.plain, self._calls.namespace, self._keep, data).records()
                loaded = await self._read_in(data, records, now)
                await self.wipe()
                await self._write(data, now)
            except BaseException:
                await self.wipe()
                await self._calls.urgent("go_on", now, Answer)
                raise
        self._calls.tell(Answer(work=True))
        return loaded

    async def _read_in(self, data: Image, records: Iterable[Record], now: Moment) -> Loaded:
        """Check the records in a thread, while the server is told that a load is in progress."""
        reading = asyncio.create_task(asyncio.to_thread(load.load, data, self._rules, records, now))
        while not (await asyncio.wait({reading}, timeout=_KEEP))[0]:
            await self._keep()
        return reading.result()

    async def _write(self, data: Image, now: Moment) -> None:
        writing = Writing(data, self._calls.daemon, self._calls.life, await self._shift(now))
        for page in pages(writing.commands()):
            parts = [part for command in page for part in command]
            answer, _ = await self._calls.urgent("write", now, Answer, parts, sizes=[len(command) for command in page])
            _check_ours(answer)
        done, _ = await self._calls.urgent("go_on", now, Answer, (writing.figures(),))
        _check_ours(done)

    async def _stop_others(self, now: Moment, *, loading: bool) -> int:
        answer, _ = await self._calls.urgent("stop_others", now, Answer, loading=loading)
        match answer.error:
            case "in_use":
                raise StoreInUse("other daemons have this store open; stop them first, `ksi drain --stop` does it")
            case "not_empty":
                raise StoreNotEmpty(
                    "a checkpoint is only loaded into an empty store: take another namespace, or empty this one first",
                    conversations=answer.found,
                )
        return answer.found

    async def _keep(self) -> None:
        """Say that this daemon still needs the store for itself."""
        await self._calls.plain("PEXPIRE", f"{self._calls.namespace}:stop", "60000")

    async def _shift(self, now: Moment) -> int:
        """The offset from this process's monotonic time to the one by which the server expires locks."""
        if self._hand:
            return 0
        seconds, rest = await self._calls.plain("TIME")
        return int(seconds) * 1_000_000 + int(rest) - now.mono

    async def wipe(self) -> None:
        """Delete everything except the namespace's records of its daemons."""
        # Again until nothing is found: with a connection lost on the way, a cluster's other node may have answered.
        while await self._wipe_once():
            pass

    async def _wipe_once(self) -> int:
        prefix = f"{self._calls.namespace}:"
        pattern = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in prefix) + "*"
        cursor, removed = b"", 0
        while cursor != b"0":
            # It names a key, as SCAN does not: so the next command goes to the node that has the namespace.
            await self._keep()
            cursor, keys = await self._calls.plain("SCAN", cursor or b"0", "MATCH", pattern, "COUNT", "1000")
            names = [(key, key[len(prefix.encode()) :].decode()) for key in keys]
            gone = [key for key, name in names if name not in _STAYS and not name.startswith(_STAYS_TOO)]
            if gone:
                await self._calls.plain("UNLINK", *gone)
            removed += len(gone)
        return removed


def _check_ours(answer: Answer) -> None:
    if answer.error is not None:
        raise StoreUnavailable("the server was away for too long while the store was loaded; load it again")
