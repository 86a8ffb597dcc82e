"""From the store's views to what goes over the wire."""

from __future__ import annotations

from ksi.clock import MICROSECONDS, to_seconds
from ksi.completion.chain_render import reason_body
from ksi.completion.prices import Prices
from ksi.event_types import AttemptReply, ContentReply, ErrorBody, MessageData, RequestReply, UsageReply
from ksi.request import CUT_SHORT, Attempt, Outcome, State, Usage, decode_body
from ksi.store.values import RequestRow, RequestView


def milliseconds(span: int | None) -> float | None:
    """Microseconds as milliseconds."""
    return None if span is None else span / 1000


def usage_reply(usage: Usage, unknown: int = 0) -> UsageReply:
    """Tokens as they go over the wire."""
    return UsageReply(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        unknown_attempts=unknown,
    )


def attempt_reply(attempt: Attempt) -> AttemptReply:
    """One line of the trail."""
    return AttemptReply(
        attempt=attempt.number,
        provider=attempt.provider,
        outcome=attempt.outcome.value,
        started_at=attempt.started_at / MICROSECONDS,
        duration_ms=(attempt.finished_at - attempt.started_at) / 1000,
        model=attempt.model,
        error=attempt.error,
        message=attempt.message,
        usage="unknown" if attempt.usage is None else usage_reply(attempt.usage),
        time_to_first_token_ms=milliseconds(attempt.first_token_us),
        stop_reason=attempt.stop_reason,
        node=attempt.node,
        text=attempt.text if attempt.outcome is not Outcome.COMPLETED else None,
    )


class Teller:
    """Tells of requests as they stand, with what they cost."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices

    async def tell(self, view: RequestView) -> RequestReply:
        """A request as it goes over the wire. It waits only where public prices are read for the first time."""
        if self._prices.unread:
            await self._prices.ready([attempt.provider for attempt in view.attempts])
        return request_reply(view, self._cost(view))

    def _cost(self, view: RequestView) -> float | None:
        """The sum over its attempts; None where one with a report has no price, and where none has a report."""
        total: float | None = None
        for attempt in view.attempts:
            if attempt.usage is not None:
                cost = self._prices.cost(attempt)
                if cost is None:
                    return None
                total = cost if total is None else total + cost
        return total


def request_reply(view: RequestView, cost_usd: float | None) -> RequestReply:
    """A request as it stands, and what it cost."""
    answer = view.answer if view.state is State.COMPLETED else None
    usage = view.usage
    unknown = sum(1 for a in view.attempts if a.usage is None)
    error = None
    if view.error is not None:
        error = ErrorBody(code=view.error, message=view.message or _MEANINGS.get(view.error, view.error))
    return RequestReply(
        request_id=view.request_id,
        status=view.state.value,
        session_id=view.conversation,
        result=answer.text if answer is not None else None,
        error=error,
        provider_session_id=answer.provider_session if answer is not None else None,
        model=answer.model if answer is not None else None,
        requested_model=view.model or None,
        provider=view.provider,
        priority=view.priority.word,
        agent_id=view.agent_id,
        usage=usage_reply(usage, unknown) if usage is not None else None,
        cost_usd=cost_usd,
        stop_reason=answer.stop_reason if answer is not None else None,
        truncated=answer is not None and answer.stop_reason in CUT_SHORT,
        note=answer.message if answer is not None else None,
        duration_ms=_span(_first_start(view), view.finished_at),
        queued_ms=_span(view.enqueued_at, _first_start(view)),
        enqueued_at=to_seconds(view.enqueued_at),
        started_at=to_seconds(view.started_at),
        finished_at=to_seconds(view.finished_at),
        due_at=to_seconds(view.due),
        attempts=[attempt_reply(a) for a in view.attempts],
        interruptions=view.interruptions,
        interrupted_by=view.interrupted_by,
        requeued_from=view.requeued_from,
        chain_id=view.chain,
        parent_request_id=view.parent,
        ideation_depth=view.depth,
        injection_id=view.injection,
        reason=reason_body(view.block),
        position=view.position,
        holder=view.holder,
        node=view.node,
        cancelling=view.cancelling,
        metadata=decode_body(view.body).metadata if b'"metadata"' in view.body else None,
    )


def content_reply(data: bytes) -> ContentReply:
    """What a request asked: its prompt or messages and its system text, of its canonical bytes."""
    body = decode_body(data)
    messages = [MessageData(message.role, message.content) for message in body.messages]  # type: ignore[arg-type]
    return ContentReply(prompt=body.prompt, messages=messages or None, system=body.system)


def row_reply(row: RequestRow) -> dict[str, object]:
    """One line of a listing."""
    line: dict[str, object] = {
        "request_id": row.request_id,
        "session_id": row.conversation,
        "status": row.state.value,
        "priority": row.priority.word,
        "model": row.model,
        "agent_id": row.agent_id,
        "attempt": row.attempt,
        "enqueued_at": to_seconds(row.enqueued_at),
        "due_at": to_seconds(row.due),
        "started_at": to_seconds(row.started_at),
        "failed_at": to_seconds(row.failed_at),
        "finished_at": to_seconds(row.finished_at),
        "provider": row.provider,
        "error": row.error,
        "message": row.message,
    }
    return {name: value for name, value in line.items() if value is not None}


def _first_start(view: RequestView) -> int | None:
    return view.attempts[0].started_at if view.attempts else view.started_at


def _span(begin: int | None, end: int | None) -> float | None:
    # Two daemons' clocks may differ by more than that took.
    return None if begin is None or end is None else max(0, end - begin) / 1000


_MEANINGS = {
    "cancelled": "cancelled before it was done",
    "daemon_restart": "the daemon ended too often while it ran; ask again to try once more",
}
