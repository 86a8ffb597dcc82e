"""Holders and wait queues of the memory store's conversations, and the passing of locks."""

from __future__ import annotations

from collections.abc import Callable

from ksi.clock import Moment
from ksi.request import State
from ksi.store.chains import Block
from ksi.store.image.data import Conversation, ExternalLock, Member, Request
from ksi.store.values import Ended, LockGrant, Passing, StoreRules
from tests.reference_store.chains import Chains
from tests.reference_store.data import MemoryData, name_of


def no_work() -> None:
    """Stands for `on_work` while the store is not open."""


class Lines:
    """The one place where locks change hands."""

    def __init__(self, rules: StoreRules, data: MemoryData, chains: Chains) -> None:
        self._rules = rules
        self._data = data
        self._chains = chains
        self.on_work: Callable[[], None] = no_work
        """Called whenever a request may have become ready or a slot free."""

    def hold(self, member: Member, now: Moment) -> None:
        """Make `member` its conversation's holder, under a new fence; a present holder keeps `since`."""
        if not member.holds:
            member.conversation.holder = member
            member.conversation.since = now.wall
        member.fence = self._data.number("fence")

    def refresh(self, conversation: Conversation, now: Moment) -> LockGrant | None:
        """After any change of holder or line: let an external head in, and keep the ready index."""
        grant: LockGrant | None = None
        head = self._data.head_of_line(conversation)
        if conversation.holder is None:
            conversation.since = None
            if isinstance(head, ExternalLock):
                with self._data.changing(head):
                    self.hold(head, now)
                grant = self.renew(head, now)
        if self._data.reindex(conversation) is not None:
            self.on_work()
        return grant

    def take_turn(self, request: Request, flow: str) -> None:
        """Give a request that begins to wait its place among the others."""
        if self._rules.fair:
            request.flow = flow
            if request.state is State.QUEUED:
                request.tag = self._data.clocks.tag(request.priority, flow)

    def end(
        self,
        request: Request,
        state: State,
        now: Moment,
        error: str | None = None,
        message: str | None = None,
        *,
        block: Block | None = None,
        routed: bool = False,
    ) -> Ended:
        """Bring a request to a final state, and its lock or its place in the line to the next.

        `block` is why its chain has no place for it; `routed`: its aftermath came with its end.
        """
        held = request.holds
        request.conversation.active_at = now.wall
        with self._data.changing(request):
            request.state = state
            request.error, request.message = error, message
            request.finished_at = now.wall
            request.due = None
            if held:
                request.conversation.holder = None
            self._chains.leave(request, block, routed=routed)
        self._data.demands.pop(request.key, None)
        passing = self.pass_on(request, now) if held else self.step_out(request, now)
        return Ended(
            request_id=request.request_id,
            conversation=request.conversation.name,
            state=state,
            error=error,
            passing=passing,
            block=block,
            injections=self._chains.carried(request, now),
        )

    def pass_on(self, before: Member, now: Moment) -> Passing:
        """Pass on the lock that `before` released."""
        conversation = before.conversation
        granted = self.refresh(conversation, now)
        following = self._data.head_of_line(conversation) if granted is None else conversation.holder
        return Passing(
            conversation=conversation.name,
            released_by=before.request_id,
            next_request=name_of(following),
            granted=granted,
        )

    def step_out(self, before: Member, now: Moment) -> Passing | None:
        """After `before` left the line without having held the lock: an external waiter behind it may come in."""
        granted = self.refresh(before.conversation, now)
        if granted is None:
            return None
        return Passing(
            conversation=before.conversation.name,
            released_by=before.request_id,
            next_request=granted.request_id,
            granted=granted,
        )

    def renew(self, lock: ExternalLock, now: Moment) -> LockGrant:
        """Reset a held lock's expiry; only the monotonic clock ends it (L4)."""
        with self._data.changing(lock):
            lock.ends = now.mono + self._rules.lock_expiry
        lock.expires_at = now.wall + self._rules.lock_expiry
        return LockGrant(
            request_id=lock.request_id,
            conversation=lock.conversation.name,
            fence=lock.fence,
            expires_at=lock.expires_at,
        )

    def release(self, lock: Member, now: Moment) -> Passing:
        """Take an external holder away and pass its lock on."""
        lock.conversation.active_at = now.wall
        self._data.drop(lock)
        return self.pass_on(lock, now)

    def take_away(self, lock: Member, now: Moment) -> Passing | None:
        """Remove an external holder or waiter, for any caller."""
        if lock.holds:
            return self.release(lock, now)
        lock.conversation.active_at = now.wall
        self._data.drop(lock)
        return self.step_out(lock, now)

    def begin_patience_anew(self, waiter: ExternalLock, now: Moment) -> None:
        """At a restart: without a deadline no client would learn of a grant; with one, its time is reset."""
        if waiter.patience is None:
            self.take_away(waiter, now)
            return
        with self._data.changing(waiter):
            waiter.deadline = now.mono + waiter.patience
