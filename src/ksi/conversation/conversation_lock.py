"""Answers the events about conversations' locks, for holders outside KSI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ksi.clock import Clock, microseconds, to_seconds
from ksi.conversation.lock_events import LockEvents
from ksi.errors import InvalidData
from ksi.events.bus import EventBus, Listener
from ksi.events.conversations import AcquireLockData, LockHolderData, LockReply, LockStatusData, ReleaseReply
from ksi.events.reports import ForkRow, LockRow, LockStatusReply, WaiterRow
from ksi.events.specs import check_depth, conversation_name, parse_priority
from ksi.request import HeadStarts
from ksi.store.base import Store
from ksi.store.values import Fork, LockView, NewLock


class ConversationLocks:
    """Acquire, release, renew, status; and dropping the waiters of a connection that is gone."""

    def __init__(
        self,
        store: Store,
        events: LockEvents,
        bus: EventBus,
        head_starts: HeadStarts,
        clock: Clock,
        on_due: Callable[[], None],
        wait_timeout: float,
    ) -> None:
        """`wait_timeout` is how long a waiter waits that does not say, in seconds."""
        self._store = store
        self._events = events
        self._bus = bus
        self._head_starts = head_starts
        self._clock = clock
        self._on_due = on_due
        self._wait_timeout = wait_timeout
        self._bound: dict[Listener, set[str]] = {}

    async def acquire(self, data: AcquireLockData, listener: Listener) -> LockReply:
        """Take a lock or join its line; the grant of one that waits is pushed as `conversation:locked`."""
        conversation = conversation_name(data.session_id, data.conversation_id)
        if conversation is None:
            raise InvalidData("conversation_id: which conversation?", path="conversation_id")
        check_depth("metadata", data.metadata)
        now, priority = self._clock.now(), parse_priority(data.priority)
        timeout = data.timeout or (None if data.while_connected else self._wait_timeout)
        deadline = now.mono + microseconds(timeout) if timeout is not None else None
        # Followed before it is asked for, so that no grant can come in between.
        first = self._bus.follow(listener, data.request_id)
        lock = NewLock(
            request_id=data.request_id,
            conversation=conversation,
            rank=self._head_starts.rank(priority, now.wall),
            priority=priority,
            wait=data.wait,
            deadline=deadline,
            metadata=msgspec.json.encode(data.metadata) if data.metadata is not None else None,
        )
        try:
            acquired = await self._store.acquire(lock, now)
        except BaseException:
            if first:
                self._bus.unfollow(listener, data.request_id)
            raise
        if acquired.queued:
            self._on_due()
            self._events.queued(conversation, data.request_id, acquired.position, acquired.holder, external=True)
            if deadline is None and self._bus.follows(listener, data.request_id):
                self._bound.setdefault(listener, set()).add(data.request_id)
            elif deadline is None:
                # Its connection closed before the answer: remove it from the queue, because nothing else would.
                await self._withdraw(data.request_id)
            reply = self._reply(data, conversation, "queued", position=acquired.position + 1, holder=acquired.holder)
            reply.timeout = timeout
            return reply
        self._bus.unfollow(listener, data.request_id)
        if acquired.grant is None:
            return self._reply(data, conversation, "busy", position=acquired.position + 1, holder=acquired.holder)
        self._on_due()
        if not acquired.renewed:
            self._events.granted(acquired.grant)
        return LockReply(
            acquired=True,
            request_id=data.request_id,
            conversation_id=conversation,
            state="locked",
            fence=acquired.grant.fence,
            expires_at=to_seconds(acquired.grant.expires_at),
            renewed=acquired.renewed,
        )

    def _reply(
        self, data: AcquireLockData, conversation: str, state: Any, *, position: int, holder: str | None
    ) -> LockReply:
        return LockReply(
            acquired=False,
            request_id=data.request_id,
            conversation_id=conversation,
            state=state,
            position=position,
            holder=holder,
        )

    async def release(self, data: LockHolderData, listener: Listener) -> ReleaseReply:
        """Give a lock back."""
        passing = await self._store.release(data.request_id, self._clock.now(), data.fence)
        self._bound.get(listener, set()).discard(data.request_id)
        self._events.passed(passing)
        return ReleaseReply(
            released=True,
            conversation_id=passing.conversation,
            request_id=data.request_id,
            next_request=passing.next_request,
        )

    async def renew(self, data: LockHolderData) -> LockReply:
        """Extend a lock's expiry."""
        grant = await self._store.renew_lock(data.request_id, self._clock.now(), data.fence)
        self._on_due()
        return LockReply(
            acquired=True,
            request_id=grant.request_id,
            conversation_id=grant.conversation,
            state="locked",
            fence=grant.fence,
            expires_at=to_seconds(grant.expires_at),
            renewed=True,
        )

    async def status(self, data: LockStatusData) -> LockStatusReply:
        """One conversation's lock, line and forks; or totals, a page of locks, and forks."""
        conversation = conversation_name(data.session_id, data.conversation_id)
        if conversation is None:
            return await self._all(data)
        # An unused conversation is free.
        view = await self._store.lock(conversation, data.limit) or LockView(conversation=conversation)
        forks = await self._store.forks(data.limit, None, conversation)
        return LockStatusReply(**_lock_fields(view), queue=_line(view), forks=[fork_reply(f) for f in forks.items])

    async def _all(self, data: LockStatusData) -> LockStatusReply:
        totals = await self._store.totals()
        page = await self._store.locks(data.limit, data.cursor)
        forks = await self._store.forks(data.limit)
        return LockStatusReply(
            locked_conversations=totals.locks,
            external_locks=totals.external_locks,
            external_waiters=totals.external_waiters,
            locks=[LockRow(**_lock_fields(view)) for view in page.items],
            forks=[fork_reply(f) for f in forks.items],
            cursor=page.cursor,
        )

    async def forget(self, listener: Listener) -> None:
        """A connection is gone: the waiters that wait as long as it lasts go with it; holders stay.

        Raises:
            StoreError: some waiters are still in their lines; call this again.
        """
        left = self._bound.pop(listener, set())
        try:
            for request_id in list(left):
                await self._withdraw(request_id)
                left.discard(request_id)
        finally:
            if left:
                self._bound[listener] = left

    async def _withdraw(self, request_id: str) -> None:
        """Take a waiter out of its line, unless it waits on another connection too. A holder stays."""
        if any(request_id in others for others in self._bound.values()):
            return
        passing = await self._store.withdraw(request_id, self._clock.now())
        if passing is not None:
            self._events.passed(passing)


def _lock_fields(view: LockView) -> dict[str, Any]:
    return {
        "conversation_id": view.conversation,
        "locked": view.holder is not None,
        "state": "free" if view.state is None else ("locked" if view.external else view.state.value),
        "holder": view.holder,
        "holder_kind": None if view.holder is None else ("external" if view.external else "request"),
        "since": to_seconds(view.since),
        "expires_at": to_seconds(view.expires_at),
        "fence": view.fence,
        "metadata": None if view.metadata is None else msgspec.json.decode(view.metadata),
        "waiting": view.waiting,
        "node": view.node,
    }


def _line(view: LockView) -> list[WaiterRow]:
    return [
        WaiterRow(
            request_id=entry.request_id,
            position=position,
            priority=entry.priority.word,
            kind="external" if entry.external else "request",
            enqueued_at=to_seconds(entry.enqueued_at),
        )
        for position, entry in enumerate(view.line)
    ]


def fork_reply(fork: Fork) -> ForkRow:
    """Return one fork as it goes over the wire."""
    return ForkRow(
        parent=fork.parent,
        child=fork.child,
        request_id=fork.request_id,
        at=to_seconds(fork.at),
        kind=fork.kind,
    )
