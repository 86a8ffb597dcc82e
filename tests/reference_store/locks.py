"""External locks of the memory store (L5): acquire, renew, release."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.store.image.data import Conversation, ExternalLock, Member, Request
from ksi.store.rules import refusals
from ksi.store.values import Acquired, LockGrant, NewLock, Passing, StoreRules
from tests.reference_store.conversations import Conversations
from tests.reference_store.data import MemoryData, name_of
from tests.reference_store.lines import Lines


class Locks:
    """External holders and waiters are in the same queues as requests."""

    def __init__(self, rules: StoreRules, data: MemoryData, lines: Lines, conversations: Conversations) -> None:
        self._rules = rules
        self._data = data
        self._lines = lines
        self._conversations = conversations

    def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See `Store.acquire`."""
        known = self._data.ids.get(lock.request_id)
        if known is not None:
            return self._acquire_again(lock, known, now)
        conversation = self._data.find(lock.conversation)
        holder = None if conversation is None else conversation.holder
        head = None if conversation is None else self._data.head_of_line(conversation)
        free = holder is None and (head is None or lock.rank < head.rank)
        if conversation is not None and not free and not lock.wait:
            return Acquired(position=self._position(conversation, lock.rank), holder=name_of(holder))
        if not free and len(self._data.waiters) >= self._rules.max_queued:
            limit = self._rules.max_queued
            raise refusals.waiters_full(limit)

        conversation = self._conversations.enter(lock.conversation, now)
        conversation.active_at = now.wall
        waiter = ExternalLock(
            key=self._data.number("member"),
            request_id=lock.request_id,
            conversation=conversation,
            rank=lock.rank,
            priority=lock.priority,
            enqueued_at=now.wall,
            metadata=lock.metadata,
            deadline=lock.deadline,
            patience=None if lock.deadline is None else lock.deadline - now.mono,
        )
        self._data.add(waiter)
        grant = self._lines.refresh(conversation, now)
        if grant is not None:
            return Acquired(grant=grant)
        return Acquired(
            queued=True, position=self._position(conversation, waiter.rank, waiter.key), holder=name_of(holder)
        )

    def renew(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """See `Store.renew_lock`."""
        lock = self._held_lock(request_id, fence)
        lock.conversation.active_at = now.wall
        return self._lines.renew(lock, now)

    def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """See `Store.release`."""
        lock = self._held_lock(request_id, fence)
        return self._lines.release(lock, now)

    def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See `Store.withdraw`."""
        waiter = self._data.ids.get(request_id)
        if not isinstance(waiter, ExternalLock) or waiter.holds:
            return None
        return self._lines.take_away(waiter, now)

    def _acquire_again(self, lock: NewLock, known: Member, now: Moment) -> Acquired:
        if not isinstance(known, ExternalLock):
            raise refusals.lock_names_a_request(lock.request_id)
        conversation = known.conversation
        if self._data.find(lock.conversation) is not conversation:
            raise refusals.lock_of_another(lock.request_id)
        if known.holds:
            conversation.active_at = now.wall
            return Acquired(grant=self._lines.renew(known, now), renewed=True)
        return Acquired(
            queued=True,
            position=self._position(conversation, known.rank, known.key),
            holder=name_of(conversation.holder),
        )

    def _position(self, conversation: Conversation, rank: int, key: int | None = None) -> int:
        return self._data.before(conversation, rank, key, self._rules.position_limit)

    def _held_lock(self, request_id: str, fence: int | None) -> ExternalLock:
        member = self._data.ids.get(request_id)
        if isinstance(member, Request):
            raise refusals.not_a_lock(request_id)
        if not isinstance(member, ExternalLock) or not member.holds:
            raise refusals.holds_no_lock(request_id)
        if fence is not None and fence != member.fence:
            raise refusals.wrong_fence(request_id, fence)
        return member
