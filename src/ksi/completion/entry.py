"""The way of a new request into the store, and from there to work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from ksi.clock import MICROSECONDS, Clock, Moment
from ksi.completion.approval.news import ApprovalNews
from ksi.completion.budget.book import BudgetBook
from ksi.completion.completion_runner import Stop
from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.completion.replies import chain_reply
from ksi.completion.upkeep.disk_space import DiskSpace
from ksi.conversation.lock_events import LockEvents
from ksi.errors import BudgetExceeded, ConversationBusy, Draining, ShuttingDown
from ksi.request import State
from ksi.store.base import Store
from ksi.store.values import Enqueued, Fork, NewRequest

Attach = Callable[[Enqueued], None]


class Entry:
    """Enters requests, and tells of everything that an entry changed."""

    def __init__(
        self,
        store: Store,
        queue: QueueManager,
        providers: ProviderManager,
        announcer: Announcer,
        locks: LockEvents,
        injection_events: InjectionEvents,
        approvals: ApprovalNews,
        space: DiskSpace,
        budgets: BudgetBook,
        clock: Clock,
    ) -> None:
        self._store = store
        self._queue = queue
        self._providers = providers
        self._announcer = announcer
        self._locks = locks
        self._injection_events = injection_events
        self._approvals = approvals
        self._space = space
        self._budgets = budgets
        self._clock = clock
        self._telling: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("ksi.completions")

    async def enter(self, new: NewRequest, attach: Attach, *, awaited: bool = False) -> Enqueued:
        """Put a request into the store, and start it if it may run at once.

        `attach` is called between the two, so that no end is missed. `awaited` says that a client waits for the end.

        Raises:
            ShuttingDown: the daemon is stopping.
            Draining: the daemon takes no new work.
            ConversationBusy: the conversation is taken and the request does not wait for it.
            BudgetExceeded: a budget has no room for it and does not let it wait.
            ServiceError: the disk, the queue or the store has no room.
        """
        if not self._queue.claiming:
            raise ShuttingDown("the daemon is stopping; send the request again when it is back")
        if self._queue.draining:
            raise Draining("the daemon is being drained and takes no new work; `ksi drain --cancel` ends that")
        self._space.check()
        now = self._clock.now()
        try:
            offers, paused, caps = (
                self._providers.offers(now),
                self._providers.paused(now),
                self._budgets.caps(now.wall),
            )
            enqueued = await self._store.enqueue(new, offers, now, awaited=awaited, paused=paused, caps=caps)
        except ConversationBusy as busy:
            raise _with_age(busy, now) from None
        except BudgetExceeded as over:
            raise self._budgets.refused(over) from None
        attach(enqueued)
        if enqueued.existing is not None:
            return enqueued
        if enqueued.block is not None:
            self._injection_events.blocks[enqueued.block.code] += 1
            self._log.warning(
                "blocked", request_id=new.request_id, code=enqueued.block.code, reason=enqueued.block.message
            )
            chain = chain_reply(enqueued.chain, now.wall) if enqueued.chain is not None else None
            # In a task: the reply to who asked comes before the news of its end.
            telling = asyncio.create_task(self._announcer.ended(new.request_id, chain))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
            return enqueued
        if new.fork_of is not None:
            self._locks.forked(
                new.conversation,
                Fork(
                    parent=new.fork_of,
                    child=new.conversation,
                    request_id=new.request_id,
                    at=now.wall,
                    kind="requested",
                ),
            )
        if new.question is not None:
            await self._approvals.asked(new.request_id)
        if enqueued.claim is not None:
            self._queue.launch([enqueued.claim])
        else:
            await self._announce_waiting(enqueued, timed=new.due is not None or new.expires is not None)
        return enqueued

    async def _announce_waiting(self, enqueued: Enqueued, *, timed: bool) -> None:
        if timed:
            self._queue.on_due()
        if enqueued.passing is not None:
            self._locks.passed(enqueued.passing)
            self._injection_events.tell(enqueued.injections)
            await self._announcer.ended(enqueued.passing.released_by)
        if enqueued.stopping is not None:
            self._queue.stop_run(enqueued.stopping, Stop.CANCEL)
        if not enqueued.ready and enqueued.state is State.QUEUED:
            self._locks.queued(
                enqueued.conversation, enqueued.request_id, enqueued.position, enqueued.holder, external=False
            )


def _with_age(busy: ConversationBusy, now: Moment) -> ConversationBusy:
    """Return the refusal as the wire has it, with the time of the holder's start and its age in seconds."""
    facts = dict(busy.facts)
    since = facts.pop("since", None)
    if since is not None:
        facts |= {"since": since / MICROSECONDS, "age": (now.wall - since) / MICROSECONDS}
    return ConversationBusy(busy.message, **facts)
