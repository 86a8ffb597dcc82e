"""Clean-up on a clock: takes away, step by step, what is past its retention (R7)."""

from __future__ import annotations

import asyncio

import structlog

from ksi.clock import Clock
from ksi.config import Retention
from ksi.errors import StoreError
from ksi.store.base import Store

STEP = 50
"""Rows in one step; between two steps others have their turn."""


class Cleaner:
    """One long-lived task."""

    def __init__(self, store: Store, retention: Retention, clock: Clock) -> None:
        self._store = store
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
        while True:
            await self._clock.sleep(self._retention.clean_every)
            try:
                requests, conversations = await self.clean()
            except StoreError as error:
                self._log.error("not cleaned", error=error.message)
                continue
            except Exception:  # noqa: BLE001 - the top of a long-lived loop: a defect in one round must not end all
                self._log.exception("not cleaned")
                continue
            if requests or conversations:
                self._log.info("cleaned", requests=requests, conversations=conversations)

    async def clean(self) -> tuple[int, int]:
        """Everything that is past its time now; how many requests and conversations that was."""
        requests = conversations = 0
        more = True
        while more:
            pruned = await self._store.prune(self._clock.now(), STEP)
            requests += pruned.requests
            conversations += pruned.conversations
            more = pruned.more
        return requests, conversations
