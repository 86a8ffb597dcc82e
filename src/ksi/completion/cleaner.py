"""Clean-up on a clock: takes away, step by step, what is past its retention (R7)."""

from __future__ import annotations

import asyncio

import structlog

from ksi.clock import MICROSECONDS, SystemClock
from ksi.config import Retention
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.store.base import Store

STEP = 50
"""Rows in one step; between two steps others have their turn."""


class Cleaner:
    """One long-lived task. Every round stands in the log with what it found.

    Locks and waits end at their own moment, not on this clock; a round only tells how many did since the last one.
    """

    def __init__(self, store: Store, locks: LockEvents, retention: Retention, clock: SystemClock) -> None:
        self._store = store
        self._locks = locks
        self._retention = retention
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.cleaner")

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._clean_forever(), name="ksi-cleaner")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _clean_forever(self) -> None:
        lapses = self._locks.lapses
        while True:
            await self._clock.sleep(self._retention.clean_every)
            begun = self._clock.now().mono
            try:
                requests, conversations = await self.clean()
            except StoreError as error:
                self._log.error("not cleaned", error=error.message)
                continue
            except Exception:  # noqa: BLE001 - the top of a long-lived loop: a defect in one round must not end all
                self._log.exception("not cleaned")
                continue
            before, lapses = lapses, self._locks.lapses
            self._log.info(
                "cleaned",
                requests=requests,
                conversations=conversations,
                locks=lapses - before,
                seconds=round((self._clock.now().mono - begun) / MICROSECONDS, 3),
            )

    async def clean(self) -> tuple[int, int]:
        """Everything that is past its time now; how many requests and conversations that was."""
        requests = conversations = 0
        more = True
        while more:
            pruned = await self._store.prune(self._clock.aged(), STEP)
            requests += pruned.requests
            conversations += pruned.conversations
            more = pruned.more
        return requests, conversations
