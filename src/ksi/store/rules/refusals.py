"""How stores refuse: each refusal is worded here once, so that message and details are the same on every store."""

from __future__ import annotations

from ksi.errors import (
    ConversationBusy,
    HasForks,
    InvalidData,
    NameTaken,
    NotFound,
    NotLockHolder,
    QueueFull,
    RequestIdConflict,
    UnknownParent,
    Unsupported,
)

# -- requests -----------------------------------------------------------------------------------------------------


def unknown_request(request_id: str) -> NotFound:
    """No request and no lock has this id."""
    return NotFound(f"no request {request_id!r}; it was never taken, or is past its retention", request_id=request_id)


def late_answer(request_id: str) -> NotFound:
    """A run ended whose request was pruned meanwhile."""
    return NotFound(f"request {request_id!r} is no longer kept; its late answer is dropped", request_id=request_id)


def names_a_lock(request_id: str) -> RequestIdConflict:
    """A new request has the id of an external lock."""
    return RequestIdConflict(
        f"request_id {request_id!r} already names an external lock; use a new id", request_id=request_id
    )


def names_another_request(request_id: str) -> RequestIdConflict:
    """A new request has the id of one with other content."""
    return RequestIdConflict(
        f"request_id {request_id!r} already names a request with other content; use a new id", request_id=request_id
    )


def unknown_fork(conversation: str | None) -> NotFound:
    """There is no conversation to fork from."""
    return NotFound(
        f"no conversation {conversation!r} to fork from; leave out `fork` to begin a new one",
        conversation_id=conversation,
    )


def queue_full(limit: int) -> QueueFull:
    """As many requests wait as may."""
    return QueueFull(f"the queue holds its {limit} requests; try again when some have run", limit=limit)


def conversation_busy(
    conversation: str | None, holder: str | None, since: int | None, position: int | None
) -> ConversationBusy:
    """The conversation is taken, and the request does not wait.

    `since` is when the holder took it, in microseconds of wall time. `position` is the place in the line that the
    request would have.
    """
    return ConversationBusy(
        f"conversation {conversation!r} is taken; wait for it with on_busy 'enqueue', or try again later",
        conversation_id=conversation,
        holder=holder,
        since=since,
        position=position,
    )


# -- conversations ------------------------------------------------------------------------------------------------


def unknown_conversation(name: str) -> NotFound:
    """No conversation has this name."""
    return NotFound(f"no session {name!r}", session_id=name)


def name_taken(name: str) -> NameTaken:
    """A conversation cannot be called so."""
    return NameTaken(f"{name!r} is a name of another conversation; choose one that is free", conversation_id=name)


def not_ended(conversation: str, member: str | None) -> ConversationBusy:
    """A conversation is not deleted while something of it has not ended; `member` is a request or lock of that kind."""
    what = "something of it" if member is None else repr(member)
    return ConversationBusy(
        f"conversation {conversation!r} is in use: {what} has not ended; wait for its end, or cancel it first",
        conversation_id=conversation,
        holder=member,
        since=None,
        position=None,
    )


def has_forks(conversation: str, forks: list[str]) -> HasForks:
    """A conversation is not deleted while its forks are kept."""
    return HasForks(
        f"conversation {conversation!r} has forks that begin with its turns ({', '.join(forks[:5])}"
        f"{', ...' if len(forks) > 5 else ''}); delete these first",
        conversation_id=conversation,
        forks=forks,
    )


def no_full_text() -> Unsupported:
    """The store cannot search."""
    return Unsupported(
        "this daemon's store is on Redis, which has no full text to search; export the conversations and search these "
        "files, or use a SQLite store"
    )


# -- external locks -----------------------------------------------------------------------------------------------


def waiters_full(limit: int) -> QueueFull:
    """As many wait for locks as may."""
    return QueueFull(f"{limit} wait for locks already; try again later", limit=limit)


def lock_names_a_request(request_id: str) -> RequestIdConflict:
    """A new lock has the id of a request."""
    return RequestIdConflict(f"request_id {request_id!r} already names a request; use a new id", request_id=request_id)


def lock_of_another(request_id: str) -> RequestIdConflict:
    """The id holds or awaits the lock of another conversation."""
    return RequestIdConflict(
        f"request_id {request_id!r} already holds or awaits another conversation's lock; use a new id",
        request_id=request_id,
    )


def not_a_lock(request_id: str) -> RequestIdConflict:
    """A request's id was given instead of a lock's."""
    return RequestIdConflict(
        f"request_id {request_id!r} names a request, not a lock; see completion:cancel", request_id=request_id
    )


def holds_no_lock(request_id: str) -> NotLockHolder:
    """The id holds no lock, or none any more."""
    return NotLockHolder(f"{request_id!r} holds no lock (any more); acquire it first", request_id=request_id)


def wrong_fence(request_id: str, fence: int | None) -> NotLockHolder:
    """The id holds a lock under another fence than the one that it brings."""
    return NotLockHolder(
        f"{request_id!r} lost the lock of fence {fence} and holds another; acquire again to learn its fence",
        request_id=request_id,
    )


# -- chains and deliveries ----------------------------------------------------------------------------------------


def unknown_parent(request_id: str | None) -> UnknownParent:
    """The parent of a new request is not kept."""
    return UnknownParent(
        f"no request {request_id!r} to be the parent; it was never accepted, or is past its retention",
        request_id=request_id,
    )


def names_an_older_chain(name: str) -> RequestIdConflict:
    """The chain that a request would begin has the name of one that is kept."""
    return RequestIdConflict(
        f"{name!r} names an older chain whose requests are still kept; choose another id", request_id=name
    )


def unknown_chain(name: str) -> NotFound:
    """Neither a chain nor a member of one has this name."""
    return NotFound(f"no chain {name!r}, and no request of this id in one", request_id=name)


def unknown_delivery(injection_id: str) -> NotFound:
    """No delivery has this id."""
    return NotFound(f"no delivery {injection_id!r}; it never was, or is past its retention", injection_id=injection_id)


def not_a_dead_letter(injection_id: str, state: str) -> InvalidData:
    """A delivery is to be sent again that did not fail."""
    return InvalidData(
        f"delivery {injection_id!r} is {state}; only a dead letter can be sent again", path="injection_id"
    )


def result_is_gone(request_id: str) -> NotFound:
    """The request whose result a dead letter carries is not kept."""
    return NotFound(
        f"request {request_id!r} is not kept any more, so its result cannot be sent again", request_id=request_id
    )


# -- lists --------------------------------------------------------------------------------------------------------


def foreign_cursor() -> InvalidData:
    """A cursor came that the list did not give."""
    return InvalidData(
        "cursor: it is not from this list; take it from the last page's reply, or leave it out to start again",
        path="cursor",
    )
