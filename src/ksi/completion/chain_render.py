"""From the store's chains and deliveries to what goes over the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

from ksi.clock import MICROSECONDS, to_seconds
from ksi.event_types import ChainReply, InjectionReply, MemberReply, ReasonBody
from ksi.store.chains import Block, ChainView, InjectionView, MemberRow, check


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
    """The limit that keeps a chain from going on; None where it can."""
    spending, limits = view.spending, view.limits
    spent = msgspec.structs.replace(spending, reserved=0)  # what is set aside for a run may come back
    block = check(spent, limits, 0, now)
    if block is not None or view.depth <= limits.max_depth or view.unfinished:
        return block
    # Its deepest request was blocked, and nothing that still runs could bring it on.
    return check(spent, limits, view.depth, now)


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
    """One delivery; `text` adds what is delivered."""
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
