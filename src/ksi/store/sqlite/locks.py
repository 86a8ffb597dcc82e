"""External locks in SQL: acquire, renew, release, in a transaction that the caller holds."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.request import State
from ksi.store.rules import refusals
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import HOLDS, IN_LINE, STATE_CODES, Row
from ksi.store.values import Acquired, LockGrant, NewLock, Passing


class Locks:
    """External holders and waiters are in the same queues as requests."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See `Store.acquire`."""
        conversation = self._ledger.one("conversation", lock.conversation)
        identity = conversation[0] if conversation is not None else None
        known = self._ledger.one("named", lock.request_id)
        if known is not None:
            return self._acquire_again(lock, known, identity, now)
        holder = self._ledger.holder(identity) if identity is not None else None
        heads = self._ledger.all("line_heads", identity) if identity is not None else []
        coming = (lock.rank, self._ledger.coming_key)
        first = holder is None and (not heads or coming < (heads[0][4], heads[0][0]))
        if not first and not lock.wait and identity is not None:
            return Acquired(
                position=self._ledger.position(identity, *coming),
                holder=holder.request_id if holder is not None else None,
            )
        limit = self._ledger.rules.max_queued
        if not first and self._ledger.totals.get("external_waiters", 0) >= limit:
            raise refusals.waiters_full(limit)
        if identity is None:
            identity = self._ledger.add_conversation(lock.conversation, now, None, None)
        else:
            self._ledger.run("touch_conversation", identity, now.wall)
        key = self._join_line(lock, identity, now)
        if first:
            return Acquired(grant=self._ledger.refresh_line(identity, now))
        return Acquired(
            queued=True,
            position=self._ledger.position(identity, lock.rank, key),
            holder=holder.request_id if holder is not None else None,
        )

    def _join_line(self, lock: NewLock, conversation: int, now: Moment) -> int:
        key = self._ledger.next_key()
        term = lock.deadline - now.mono if lock.deadline is not None else None
        self._ledger.run(
            "add_request", key, lock.request_id, conversation, STATE_CODES[State.QUEUED], IN_LINE, 1,
            int(lock.priority), lock.rank, 1, "", None, 0, None, None, now.wall, None, None, lock.deadline, term, None,
        )  # fmt: skip
        self._ledger.run("add_body", key, None, None, None, lock.metadata or b"")
        self._ledger.count("external_waiters", 1)
        return key

    def _acquire_again(self, lock: NewLock, known: Row, conversation: int | None, now: Moment) -> Acquired:
        key, _, external, place_conversation, place, fence, rank, _ = known
        if not external or conversation != place_conversation:
            conflict = refusals.lock_of_another if external else refusals.lock_names_a_request
            raise conflict(lock.request_id)
        if place == HOLDS:
            return Acquired(grant=self._renewed(key, lock.request_id, place_conversation, fence, now), renewed=True)
        holder = self._ledger.holder(place_conversation)
        return Acquired(
            queued=True,
            position=self._ledger.position(place_conversation, rank, key),
            holder=holder.request_id if holder is not None else None,
        )

    def renew_lock(self, request_id: str, now: Moment, fence: int | None) -> LockGrant:
        """See `Store.renew_lock`."""
        key, conversation, held = self._held(request_id, fence)
        return self._renewed(key, request_id, conversation, held, now)

    def release(self, request_id: str, now: Moment, fence: int | None) -> Passing:
        """See `Store.release`."""
        key, conversation, _ = self._held(request_id, fence)
        passing = self._ledger.drop_external(key, request_id, conversation, HOLDS, now)
        assert passing is not None
        return passing

    def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See `Store.withdraw`."""
        row = self._ledger.one("named", request_id)
        if row is None or not row[2] or row[4] != IN_LINE:
            return None
        return self._ledger.drop_external(row[0], request_id, row[3], IN_LINE, now)

    def _held(self, request_id: str, fence: int | None) -> tuple[int, int, int]:
        """Key, conversation and fence of an external lock that this id holds."""
        row = self._ledger.one("named", request_id)
        if row is not None and not row[2]:
            raise refusals.not_a_lock(request_id)
        if row is None or row[4] != HOLDS:
            raise refusals.holds_no_lock(request_id)
        if fence is not None and fence != row[5]:
            raise refusals.wrong_fence(request_id, fence)
        return row[0], row[3], row[5]

    def _renewed(self, key: int, request_id: str, conversation: int, fence: int, now: Moment) -> LockGrant:
        self._ledger.run("touch_conversation", conversation, now.wall)
        return LockGrant(
            request_id=request_id,
            conversation=self._ledger.conversation_name(conversation),
            fence=fence,
            expires_at=self._ledger.renew_grant(key, now),
        )
