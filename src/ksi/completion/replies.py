"""Makes replies of the store's views, as they go over the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

from ksi.clock import MICROSECONDS, to_seconds
from ksi.completion.usage.prices import Prices
from ksi.errors import FailureClass
from ksi.events.chains import ChainReply, InjectionReply, MemberReply
from ksi.events.common import ErrorBody, ReasonBody, UsageReply
from ksi.events.completions import (
    AttemptReply,
    ChunkPush,
    ContentReply,
    MessageBody,
    QuestionBody,
    RequestReply,
    SubmitReply,
    ToolPieceBody,
)
from ksi.events.conversations import ForkBody
from ksi.events.reports import RowReply
from ksi.providers.base import Chunk, Piece, Thought, ToolPiece
from ksi.request import CUT_SHORT, FINAL_STATES, Attempt, Outcome, State, Usage, decode_body
from ksi.store.chains import Block, ChainView, InjectionView, MemberRow, check
from ksi.store.questions import Question, is_asking
from ksi.store.values import Enqueued, Fork, RequestRow, RequestView

HELD = "held"
"""The status of a request that comes into the line when a person lets it."""
WAITING_INPUT = "waiting_input"
"""The status of one that has run, and continues when a person has answered."""

_FINAL = frozenset(state.value for state in FINAL_STATES)

_MEANINGS = {
    "cancelled": "cancelled before it was done",
    "daemon_restart": "the daemon ended too often while it ran; ask again to try once more",
}


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
        outcome=attempt.outcome._value_,
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


def chunk_push(request_id: str, attempt: int, seq: int, piece: Piece) -> ChunkPush:
    """A piece of an answer as it goes over the wire."""
    push = ChunkPush(request_id=request_id, attempt=attempt, seq=seq, text="")
    match piece:
        case Chunk(text):
            push.text = text
        case Thought(text):
            push.thinking = text
        case ToolPiece():
            push.tool_use = ToolPieceBody(id=piece.id, name=piece.name, partial_json=piece.json)
    return push


def question_body(question: Question | None) -> QuestionBody | None:
    """The question to a person, in wire form."""
    if question is None:
        return None
    return QuestionBody(
        kind=question.kind.value,
        text=question.text,
        asked_at=question.asked_at / MICROSECONDS,
        expires_at=to_seconds(question.expires),
        code=question.code,
        tool=question.tool,
        input=question.input,
        answer=question.answer,
        answered_at=to_seconds(question.answered_at),
        by=question.by,
        why=question.why,
    )


def status_of(state: State, question: Question | None) -> str:
    """A request's state, or a better word if it waits for a person."""
    if not is_asking(state, question):
        return state.value
    return HELD if state is State.SCHEDULED else WAITING_INPUT


def is_final(status: str) -> bool:
    """True if a request of this status never changes again."""
    return status in _FINAL


class Teller:
    """Builds replies with the present state and cost of requests."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices

    @property
    def ready(self) -> bool:
        """True if `reply` may be called: no public prices have to be read first."""
        return not self._prices.unread

    async def tell(self, view: RequestView) -> RequestReply:
        """A request as it goes over the wire. It waits only if public prices are read for the first time."""
        if self._prices.unread:
            await self._prices.ready([attempt.provider for attempt in view.attempts])
        return self.reply(view)

    def reply(self, view: RequestView) -> RequestReply:
        """The same at once, by the prices that are known."""
        return request_reply(view, self._cost(view))

    def _cost(self, view: RequestView) -> float | None:
        """The sum over its attempts; None if one with a report has no price, or if none has a report."""
        total: float | None = None
        for attempt in view.attempts:
            if attempt.usage is not None:
                cost = self._prices.cost(attempt)
                if cost is None:
                    return None
                total = cost if total is None else total + cost
        return total


def request_reply(view: RequestView, cost_usd: float | None) -> RequestReply:
    """The present state of a request, and its cost."""
    attempts = view.attempts
    first_start = attempts[0].started_at if attempts else view.started_at
    reply = RequestReply(
        request_id=view.request_id,
        status=view.state._value_,
        session_id=view.conversation,
        requested_model=view.model or None,
        provider=view.provider,
        priority=view.priority.word,
        agent_id=view.agent_id,
        cost_usd=cost_usd,
        queued_ms=_span(view.enqueued_at, first_start),
        enqueued_at=view.enqueued_at / MICROSECONDS,
        attempts=[attempt_reply(attempt) for attempt in attempts],
    )
    if view.started_at is not None:
        reply.started_at = view.started_at / MICROSECONDS
    if view.finished_at is not None:
        reply.finished_at = view.finished_at / MICROSECONDS
        reply.duration_ms = _span(first_start, view.finished_at)
    if view.state is State.COMPLETED and (answer := view.answer) is not None:
        reply.result = answer.text
        reply.model = answer.model
        reply.stop_reason = answer.stop_reason
        reply.truncated = answer.stop_reason in CUT_SHORT
        reply.note = answer.message
        reply.provider_session_id = answer.provider_session
        if answer.content:
            reply.blocks = list(answer.content)
    else:
        _add_what_waits(reply, view)
    usage = view.usage
    if usage is not None:
        reply.usage = usage_reply(usage, sum(1 for a in attempts if a.usage is None) if len(attempts) > 1 else 0)
    reply.interruptions = view.interruptions
    reply.requeued_from = view.requeued_from
    reply.interrupted_by = view.interrupted_by
    reply.cancelling = view.cancelling
    reply.chain_id = view.chain
    reply.parent_request_id = view.parent
    reply.ideation_depth = view.depth
    reply.injection_id = view.injection
    if view.question is not None:
        _add_question(reply, view.state, view.question)
    if b'"metadata"' in view.body:
        reply.metadata = decode_body(view.body).metadata
    return reply


def _add_question(reply: RequestReply, state: State, question: Question) -> None:
    """The question to a person, answered or not."""
    reply.status = status_of(state, question)
    reply.question = question_body(question)
    if state is State.EXPIRED and question.open:
        reply.error = ErrorBody(code=FailureClass.REJECTED, message=f"nobody said yes in time: {question.text}")


def _add_what_waits(reply: RequestReply, view: RequestView) -> None:
    """The reason why a request has no answer: its failure, or its wait."""
    if view.error is not None:
        reply.error = ErrorBody(code=view.error, message=view.message or _MEANINGS.get(view.error, view.error))
    reply.due_at = to_seconds(view.due)
    reply.reason = reason_body(view.block)
    reply.position = view.position
    reply.holder = view.holder
    reply.node = view.node


def content_reply(data: bytes) -> ContentReply:
    """Return a request's prompt or messages and its system text, read from its canonical bytes."""
    body = decode_body(data)
    messages = [MessageBody(m.role, m.content) for m in body.dialogue()] if body.prompt is None else []
    return ContentReply(prompt=body.prompt, messages=messages or None, system=body.system, native=body.native)


def row_reply(row: RequestRow) -> RowReply:
    """One line of a listing."""
    return RowReply(
        request_id=row.request_id,
        session_id=row.conversation,
        status=status_of(row.state, row.question),
        priority=row.priority.word,
        model=row.model,
        agent_id=row.agent_id,
        attempt=row.attempt,
        enqueued_at=to_seconds(row.enqueued_at),
        due_at=to_seconds(row.due),
        started_at=to_seconds(row.started_at),
        failed_at=to_seconds(row.failed_at),
        finished_at=to_seconds(row.finished_at),
        provider=row.provider,
        error=row.error,
        message=row.message,
    )


def _span(begin: int | None, end: int | None) -> float | None:
    # Two daemons' clocks may differ by more than that took.
    return None if begin is None or end is None else max(0, end - begin) / 1000


def submit_reply(enqueued: Enqueued, due_at: float | None, now: int) -> SubmitReply:
    """Return the reply to an entered request. `due_at` is in Unix seconds, `now` in microseconds of wall time."""
    if enqueued.block is not None:
        return SubmitReply(
            request_id=enqueued.request_id,
            status="blocked",
            session_id=enqueued.conversation,
            state=enqueued.state.value,
            reason=reason_body(enqueued.block),
            chain=chain_reply(enqueued.chain, now) if enqueued.chain is not None else None,
        )
    reply = SubmitReply(
        request_id=enqueued.request_id,
        status="ready" if enqueued.ready else "queued",
        session_id=enqueued.conversation,
        state=enqueued.state.value,
        holder=enqueued.holder,
        due_at=due_at,
    )
    if not enqueued.ready:
        reply.position = enqueued.position
        reply.conversation_locked = enqueued.holder is not None
    return reply


def fork_body(fork: Fork) -> ForkBody:
    """Return a fork as the reply to the request that made it names it."""
    return ForkBody(parent=fork.parent, child=fork.child, kind=fork.kind)


# -- chains and deliveries ------------------------------------------------------------------------------------------


def reason_body(block: Block | None) -> ReasonBody | None:
    """Why something of a chain did not run."""
    if block is None:
        return None
    return ReasonBody(
        code=block.code, message=block.message, risk_score=block.risk_score, evidence=list(block.evidence)
    )


def chain_reply(view: ChainView, now: int) -> ChainReply:
    """A chain's figures; `now` is wall time in microseconds."""
    spending, limits = view.spending, view.limits
    stopped = _used_up(view, now)
    return ChainReply(
        chain_id=view.chain,
        state=_state(view, stopped),
        ideation_depth=view.depth,
        max_depth=limits.max_depth,
        tokens_used=spending.used,
        tokens_estimated=view.estimated,
        tokens_reserved=spending.reserved,
        token_budget=limits.token_budget,
        age=(now - spending.started_at) / MICROSECONDS,
        time_window=limits.time_window / MICROSECONDS,
        members=view.members,
        unfinished=view.unfinished,
        guard_messages=view.guard_messages,
        resets=view.resets,
        created_at=view.created_at / MICROSECONDS,
        reason=reason_body(spending.tripped or stopped),
    )


def _used_up(view: ChainView, now: int) -> Block | None:
    """The limit that stops a chain; None if it can continue."""
    spending, limits = view.spending, view.limits
    spent = msgspec.structs.replace(spending, reserved=0)  # the reservation of a run may come back
    block = check(spent, limits, 0, now)
    # After a notice of a block there was a request that did not come in.
    deepest = view.depth + bool(view.guard_messages)
    if block is not None or deepest <= limits.max_depth or view.unfinished:
        return block
    # It was blocked, and nothing that still runs could bring the chain on.
    return check(spent, limits, deepest, now)


def _state(view: ChainView, stopped: Block | None) -> Literal["open", "tripped", "exhausted", "closed"]:
    if view.spending.closed:
        return "closed"
    if view.spending.tripped is not None:
        return "tripped"
    return "open" if stopped is None else "exhausted"


def member_reply(row: MemberRow) -> MemberReply:
    """One request of a chain."""
    return MemberReply(
        request_id=row.request_id,
        parent_request_id=row.parent,
        depth=row.depth,
        session_id=row.conversation,
        agent_id=row.agent_id,
        status=row.state.value,
        enqueued_at=row.enqueued_at / MICROSECONDS,
        finished_at=to_seconds(row.finished_at),
        tokens=row.tokens,
        estimated=row.estimated,
        reason=reason_body(row.reason),
    )


def injection_reply(view: InjectionView, *, text: bool = False) -> InjectionReply:
    """One delivery; `text` adds the delivered text."""
    return InjectionReply(
        injection_id=view.injection_id,
        state=view.state,
        chain_id=view.chain,
        parent_request_id=view.parent,
        target=view.target,
        mode=view.mode,
        trigger_type=view.trigger,
        created_at=view.created_at / MICROSECONDS,
        finished_at=to_seconds(view.finished_at),
        request_id=view.request_id,
        reason=reason_body(view.reason),
        text=view.text if text else None,
    )
