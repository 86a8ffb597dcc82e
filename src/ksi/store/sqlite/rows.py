"""How the SQLite store writes values in rows, and reads them back."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec

from ksi.budgets.rules import Amount, Use
from ksi.content.features import Json
from ksi.request import Attempt, Outcome, Priority, State, Usage
from ksi.store.questions import read_question
from ksi.store.rules import refusals
from ksi.store.values import Fork, LineEntry, Listing, LockView, RequestRow, SessionView

Row = tuple[Any, ...]

_contents = msgspec.json.Decoder(tuple[Json, ...])

# The order is part of the layout: partial indexes in schema.sql name these numbers.
STATES: tuple[State, ...] = (
    State.SCHEDULED,
    State.QUEUED,
    State.RUNNING,
    State.RETRYING,
    State.PARKED,
    State.COMPLETED,
    State.FAILED,
    State.CANCELLED,
    State.BLOCKED,
    State.EXPIRED,
)
STATE_CODES: dict[State, int] = {state: code for code, state in enumerate(STATES)}

_BEYOND = 2**63
"""The first number that no column holds."""

# `place`: a request's place in its conversation.
IN_LINE = 0
HOLDS = 1
BESIDE = 2

# `ready`, if it is neither 0 nor 1.
SET_ASIDE = 2


def attempt_values(attempt: Attempt) -> Row:
    """An attempt's columns from `number` on, as `add_attempt` takes them."""
    usage = attempt.usage
    tokens: Row = (None,) * 6
    if usage is not None:
        tokens = (
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
            usage.cost_usd,
        )
    return (
        attempt.number,
        attempt.provider,
        attempt.outcome.value,
        attempt.started_at,
        attempt.finished_at,
        attempt.first_token_us,
        attempt.model,
        attempt.asked,
        attempt.mcp,
        attempt.stop_reason,
        attempt.provider_session,
        attempt.last_message,
        attempt.fork,
        attempt.error,
        attempt.message,
        *tokens,
        attempt.text,
        msgspec.json.encode(attempt.content).decode() if attempt.content else None,
        attempt.raw,
    )


def read_content(text: str | None) -> tuple[Json, ...]:
    """An answer's blocks."""
    return _contents.decode(text) if text else ()


def read_attempt(row: Row) -> Attempt:
    """An attempt from the columns of `attempt`, `earlier` taken off."""
    (
        number,
        provider,
        outcome,
        started,
        finished,
        first,
        model,
        asked,
        mcp,
        stop,
        session,
        last_message,
        fork,
        error,
        message,
        *tokens,
        text,
        content,
        raw,
    ) = row
    usage = None
    if tokens[0] is not None:
        usage = Usage(
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            cache_read_tokens=tokens[2],
            cache_write_tokens=tokens[3],
            reasoning_tokens=tokens[4],
            cost_usd=tokens[5],
        )
    return Attempt(
        number=number,
        provider=provider,
        outcome=Outcome(outcome),
        started_at=started,
        finished_at=finished,
        first_token_us=first,
        model=model,
        asked=asked,
        mcp=bool(mcp),
        stop_reason=stop,
        provider_session=session,
        last_message=last_message,
        fork=fork,
        error=error,
        message=message,
        usage=usage,
        text=text,
        content=read_content(content),
        raw=raw,
    )


def read_request_row(row: Row) -> RequestRow:
    """A listing's line from the columns after its two sorting ones."""
    return RequestRow(
        request_id=row[0],
        conversation=row[1],
        state=STATES[row[2]],
        priority=Priority(row[3]),
        model=row[4] or "",
        agent_id=row[5],
        attempt=row[6],
        enqueued_at=row[7],
        due=row[8],
        started_at=row[9],
        finished_at=row[10],
        provider=row[11],
        error=row[12],
        message=row[13],
        failed_at=row[14],
        question=read_question(row[15]),
    )


def read_session(row: Row, agents: tuple[str, ...]) -> SessionView:
    """A session from the columns of `session`, its id taken off."""
    return SessionView(
        conversation=row[0],
        created_at=row[1],
        active_at=row[2],
        turns=row[3],
        head=row[4],
        provider=row[5],
        provider_session=row[6],
        forked_from=row[7],
        locked=bool(row[8]),
        agents=agents,
    )


def read_lock(conversation: str, row: Row, waiting: int, line: tuple[LineEntry, ...] = ()) -> LockView:
    """A lock from (holder, external, state, since, expires, fence, metadata); all None if it is free."""
    holder, external, state, since, expires_at, fence, metadata = row
    return LockView(
        conversation=conversation,
        holder=holder,
        external=bool(external),
        state=None if state is None else STATES[state],
        since=since,
        expires_at=expires_at if external else None,
        fence=fence,
        metadata=(metadata or None) if external else None,
        line=line,
        waiting=waiting,
    )


def read_fork(row: Row) -> Fork:
    """A fork from (parent, child, request, at, kind)."""
    return Fork(parent=row[0], child=row[1], request_id=row[2], at=row[3], kind=row[4])


def read_use(row: Row) -> Use:
    """Figures from the columns after those that name them."""
    return Use(used=Amount(*row[:3]), held=Amount(*row[3:6]), told=row[6], told_of=row[7])


def write_cursor(listing: str, *parts: int | str) -> str:
    """The end of a page, as an opaque word."""
    return base64.urlsafe_b64encode(msgspec.json.encode((listing, *parts))).decode().rstrip("=")


def read_cursor(listing: Listing | str, cursor: str | None, first: Sequence[int | str]) -> tuple[Any, ...]:
    """The parts of a cursor, or `first` without one.

    Raises:
        InvalidData: it is not one of this listing's.
    """
    if cursor is None:
        return tuple(first)
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        name, *parts = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=list[int | str])
    except (ValueError, msgspec.MsgspecError):
        name, parts = "", []
    fits = all(isinstance(p, str) or -_BEYOND <= p < _BEYOND for p in parts)
    if name != str(listing) or [type(p) for p in parts] != [type(f) for f in first] or not fits:
        raise refusals.foreign_cursor()
    return tuple(parts)
