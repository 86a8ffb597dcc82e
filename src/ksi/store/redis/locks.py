"""The verbs of external locks of the store on Redis; `ksi.store.base.Store` documents each."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.store.redis.calls import Calls
from ksi.store.redis.values import AcquireMap, Answer, GrantMap, PassingMap, rank20
from ksi.store.rules import refusals
from ksi.store.values import Acquired, LockGrant, NewLock, Passing, StoreRules


class _Withdrawn(Answer, frozen=True, kw_only=True):
    passing: Passing | None = None


class RedisLocks:
    """A conversation's lock for work outside KSI."""

    def __init__(self, calls: Calls, rules: StoreRules) -> None:
        self._calls = calls
        self._rules = rules

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See the protocol."""
        answer, _ = await self._calls.change(
            "acquire",
            now,
            AcquireMap,
            request_id=lock.request_id,
            conversation=lock.conversation,
            rank=rank20(lock.rank),
            priority=int(lock.priority),
            wait=lock.wait,
            patience=None if lock.deadline is None else str(max(0, lock.deadline - now.mono)),
            metadata=None if lock.metadata is None else lock.metadata.decode("latin-1"),
        )
        match answer.error:
            case "request_id":
                raise refusals.lock_names_a_request(lock.request_id)
            case "other_lock":
                raise refusals.lock_of_another(lock.request_id)
            case "waiters_full":
                raise refusals.waiters_full(self._rules.max_queued)
        self._calls.tell(answer)
        return Acquired(
            grant=answer.grant,
            queued=answer.queued,
            position=answer.position,
            holder=answer.holder,
            renewed=answer.renewed,
        )

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """See the protocol."""
        answer, _ = await self._calls.change("renew_lock", now, GrantMap, request_id=request_id, fence=fence)
        _check_holder(answer, request_id, fence)
        return LockGrant(
            request_id=answer.request_id,
            conversation=answer.conversation,
            fence=answer.fence,
            expires_at=answer.expires_at,
        )

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """See the protocol."""
        answer, _ = await self._calls.change("release", now, PassingMap, request_id=request_id, fence=fence)
        _check_holder(answer, request_id, fence)
        self._calls.tell(answer)
        return Passing(
            conversation=answer.conversation,
            released_by=answer.released_by,
            next_request=answer.next_request,
            granted=answer.granted,
        )

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See the protocol."""
        answer, _ = await self._calls.change("withdraw", now, _Withdrawn, request_id=request_id)
        self._calls.tell(answer)
        return answer.passing


def _check_holder(answer: Answer, request_id: str, fence: int | None) -> None:
    """Raise the error of a refused renewal or release."""
    match answer.error:
        case "request_id":
            raise refusals.not_a_lock(request_id)
        case "no_lock":
            raise refusals.holds_no_lock(request_id)
        case "other_fence":
            raise refusals.wrong_fence(request_id, fence)
