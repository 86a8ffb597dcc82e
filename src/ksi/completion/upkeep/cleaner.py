"""Clean-up on a clock: prunes in small steps everything that is past its retention."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from ksi.clock import MICROSECONDS, SystemClock, microseconds
from ksi.completion.upkeep.response_log import ResponseLog
from ksi.config.schema import Retention
from ksi.conversation.lock_events import LockEvents
from ksi.host.supervise import Periodic
from ksi.store.base import Store

T = TypeVar("T")

STEP = 50
"""Rows in one step; between two steps others have as long as it took."""

LONGEST_PAUSE = 10.0
"""Longest pause between two tries in seconds: when the disk has space again, expired records are deleted soon."""

SWEEP_EVERY = 3600.0
"""The longest pause in seconds between two looks at response files: looking goes through all of them."""


class Cleaner:
    """One long-lived task. Every round is logged with its counts.

    Locks and waits end at their own moment, not on this clock; a round only tells how many did since the last one.
    """

    def __init__(
        self, store: Store, locks: LockEvents, responses: ResponseLog, retention: Retention, clock: SystemClock
    ) -> None:
        self._store = store
        self._locks = locks
        self._responses = responses
        self._retention = retention
        self._clock = clock
        self._lapses = locks.lapses
        self._sweep_at = 0
        self.task = Periodic("ksi-cleaner", self._round, retention.clean_every, clock, longest_pause=LONGEST_PAUSE)
        self._log = structlog.get_logger("ksi.cleaner")

    async def _round(self) -> None:
        begun = self._clock.now().mono
        requests, conversations = await self.clean()
        pages = 0
        while given := await self._in_turn(self._store.give_back):
            pages += given
        response_files = 0
        if begun >= self._sweep_at:
            response_files = await self._responses.sweep(self._retention.sessions)
            self._sweep_at = begun + microseconds(min(self._retention.sessions / 4, SWEEP_EVERY))
        before, self._lapses = self._lapses, self._locks.lapses
        self._log.info(
            "cleaned",
            requests=requests,
            conversations=conversations,
            response_files=response_files,
            pages_given_back=pages,
            locks=self._lapses - before,
            seconds=round((self._clock.now().mono - begun) / MICROSECONDS, 3),
        )

    async def clean(self) -> tuple[int, int]:
        """Everything that is past its time now; how many requests and conversations that was."""
        requests = conversations = 0
        more = True
        while more:
            pruned = await self._in_turn(lambda: self._store.prune(self._clock.aged(), STEP))
            requests += pruned.requests
            conversations += pruned.conversations
            more = pruned.more
        return requests, conversations

    async def _in_turn(self, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step, and leave the store to others for as long: half of its time is theirs, however much is to do."""
        begun = self._clock.now().mono
        done = await step()
        await self._clock.sleep((self._clock.now().mono - begun) / MICROSECONDS)
        return done
