"""Tells who listens how conversations' locks move."""

from __future__ import annotations

import structlog

from ksi.clock import MICROSECONDS, to_seconds
from ksi.events.bus import LOCK_EXPIRED, LOCKED, EventBus
from ksi.events.conversations import ForkPush, LockPush
from ksi.store.values import Claimed, Fork, Lapsed, LockGrant, Passing


class LockEvents:
    """The `conversation:*` events; each is made only if a subscriber wants it."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self.lapses = 0
        """Locks and waits for one whose time ran out, since the daemon started."""
        self._log = structlog.get_logger("ksi.locks")

    def held(self, claim: Claimed) -> None:
        """A running request has its conversation."""
        if self._bus.wanted(LOCKED):
            self._bus.publish(
                LOCKED, LockPush(conversation_id=claim.conversation, request_id=claim.request_id, fence=claim.fence)
            )

    def queued(self, conversation: str, request_id: str, position: int, holder: str | None, *, external: bool) -> None:
        """A waiter joined a conversation's queue."""
        if self._bus.wanted("conversation:queued"):
            self._bus.publish(
                "conversation:queued",
                LockPush(
                    conversation_id=conversation,
                    request_id=request_id,
                    position=position,
                    holder=holder,
                    external=external,
                ),
            )

    def forked(self, conversation: str, fork: Fork) -> None:
        """A conversation went on in another place."""
        self._log.warning(
            "conversation forked", parent=fork.parent, child=fork.child, kind=fork.kind, request_id=fork.request_id
        )
        self._bus.publish(
            "conversation:forked",
            ForkPush(
                conversation_id=conversation,
                parent=fork.parent,
                child=fork.child,
                request_id=fork.request_id,
                kind=fork.kind,
                at=fork.at / MICROSECONDS,
            ),
        )

    def granted(self, grant: LockGrant) -> None:
        """An outside holder has a conversation; its connection follows the id."""
        self._bus.publish(
            LOCKED,
            LockPush(
                conversation_id=grant.conversation,
                request_id=grant.request_id,
                fence=grant.fence,
                external=True,
                expires_at=to_seconds(grant.expires_at),
            ),
            grant.request_id,
        )

    def passed(self, passing: Passing) -> None:
        """A holder let its conversation go."""
        name = "conversation:unlocked" if passing.next_request is None else "conversation:lock_transferred"
        if self._bus.wanted(name):
            self._bus.publish(
                name,
                LockPush(
                    conversation_id=passing.conversation,
                    request_id=passing.released_by,
                    next_request=passing.next_request,
                ),
            )
        if passing.granted is not None:
            self.granted(passing.granted)

    def lapsed(self, lapsed: Lapsed) -> None:
        """An outside holder's time ran out, or a waiter's."""
        self.lapses += 1
        self._log.warning(
            "lock expired" if lapsed.held else "wait for a lock expired",
            conversation=lapsed.conversation,
            request_id=lapsed.request_id,
            next_request=lapsed.passing.next_request if lapsed.passing is not None else None,
        )
        self._bus.publish(
            LOCK_EXPIRED,
            LockPush(
                conversation_id=lapsed.conversation,
                request_id=lapsed.request_id,
                external=True,
                waiting=not lapsed.held,
            ),
            lapsed.request_id,
        )
        if lapsed.passing is not None:
            self.passed(lapsed.passing)
