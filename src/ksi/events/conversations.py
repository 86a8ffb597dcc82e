"""The data of the events about conversations, their locks and forks."""

from __future__ import annotations

from typing import Literal

import msgspec

from ksi.events.common import Data, Json, Name, PageData, Span


class SessionStatusData(PageData):
    """One session, or a page of all sessions or of one agent's."""

    session_id: Name | None = None
    """The conversation's name. Without it, the reply is a page of them, the newest first."""
    conversation_id: Name | None = None
    """Alias of `session_id`."""
    agent_id: Name | None = None
    """Only conversations of this agent."""


class AcquireLockData(Data):
    """An external holder's request for a conversation's lock."""

    request_id: Name
    """The holder's name, of your choice. It shares the name space of requests."""
    conversation_id: Name | None = None
    """The conversation's name."""
    session_id: Name | None = None
    """Alias of `conversation_id`; one of the two is required."""
    metadata: Json | None = None
    """Shown in `conversation:lock_status`."""
    wait: bool = True
    """If the lock is taken, join its wait queue."""
    timeout: Span | None = None
    """Seconds to wait, even if the connection closes. The default is `lock.wait_timeout`, 5 minutes."""
    while_connected: bool = False
    """Without a timeout: wait as long as this connection stays open."""
    priority: str | None = None
    """The priority in the wait queue, as for requests."""


class LockHolderData(Data):
    """Names an external lock by its holder; a `fence` must match the lock's."""

    request_id: Name
    """The holder's name."""
    fence: int | None = None
    """If given, it must match the lock's fencing token."""


class LockStatusData(PageData):
    """One conversation's lock, or all."""

    conversation_id: Name | None = None
    """The conversation's name. Without it, the reply has totals and a page of locks."""
    session_id: Name | None = None
    """Alias of `conversation_id`."""


class ForkBody(msgspec.Struct, kw_only=True):
    """A conversation that a request forked from another one."""

    parent: str
    """The conversation that was forked."""
    child: str
    """The new conversation."""
    kind: str
    """`requested`, `new_session`, `foreign_turn` or `node_lost`."""


class LockReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `conversation:acquire_lock`; waiting positions count from 1 here."""

    acquired: bool
    """The holder has the lock."""
    request_id: str
    """The holder's name."""
    conversation_id: str
    """The conversation."""
    state: Literal["locked", "queued", "busy"]
    """`locked`, `queued` (it waits), or `busy` (taken, and `wait` was false)."""
    fence: int | None = None
    """The lock's fencing token; larger than all earlier ones."""
    expires_at: float | None = None
    """Unix time when the lock expires, for people to read; renew it before then."""
    position: int | None = None
    """Its place in the wait queue, counted from 1 here."""
    holder: str | None = None
    """The id of the lock's holder."""
    timeout: float | None = None
    """The longest wait in seconds, even if its connection closes."""
    renewed: bool = False
    """It already had the lock, and the expiry was extended."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class ReleaseReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `conversation:release_lock`."""

    released: bool
    """`true`."""
    conversation_id: str
    """The conversation."""
    request_id: str
    """The former holder."""
    next_request: str | None = None
    """The next holder, if the wait queue is not empty."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class LockPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation's lock changed hands or gained a waiter."""

    conversation_id: str
    """The conversation."""
    request_id: str
    """The request or external holder concerned: the new holder, the waiter, or the former holder."""
    fence: int | None = None
    """The new holder's fencing token."""
    external: bool = False
    """It is a holder or waiter outside KSI."""
    waiting: bool = False
    """It was still waiting for the lock when its time ran out."""
    expires_at: float | None = None
    """Unix time when an external lock expires."""
    next_request: str | None = None
    """The next holder."""
    position: int | None = None
    """The waiter's place in the queue, from 0."""
    holder: str | None = None
    """The present holder of the lock."""


class LostPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Events of an HTTP stream that its reader will not get; the state that they reported can be asked for."""

    events: int | None = None
    """The number of lost events. Absent if the daemon has forgotten the stream, so that the number is unknown."""


class ForkPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation continued in a new one."""

    conversation_id: str
    """The conversation that continues."""
    parent: str
    """The conversation that was forked."""
    child: str
    """The new conversation."""
    request_id: str
    """The request that caused the fork."""
    kind: str
    """`requested`, `new_session`, `foreign_turn` or `node_lost`."""
    at: float
    """Unix time."""
