"""Notifies subscribers that a request waits for a person, and of the person's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from ksi.clock import to_seconds
from ksi.completion.replies import question_body, status_of
from ksi.content.blocks import text_of
from ksi.events.approval import AnswerReply, ApprovalBody
from ksi.events.bus import EventBus
from ksi.request import decode_body
from ksi.store.base import Store
from ksi.store.chains import Aftermath, InjectionState, InjectionView
from ksi.store.questions import is_asking
from ksi.store.values import RequestView

SHOWN = 2_000
"""Characters of a prompt that a person is shown."""


def approval_body(view: RequestView) -> ApprovalBody:
    """A request that asks, as it goes over the wire."""
    question = question_body(view.question)
    assert question is not None
    said = decode_body(view.body).dialogue()
    return ApprovalBody(
        request_id=view.request_id,
        session_id=view.conversation,
        status=status_of(view.state, view.question),
        question=question,
        agent_id=view.agent_id,
        model=view.model or None,
        priority=view.priority.word,
        enqueued_at=to_seconds(view.enqueued_at),
        chain_id=view.chain,
        parent_request_id=view.parent,
        ideation_depth=view.depth,
        prompt=text_of(said[-1].content)[:SHOWN] if said else None,
    )


class ApprovalNews:
    """The events about questions; each is made only if a subscriber wants it."""

    def __init__(self, store: Store, bus: EventBus, on_due: Callable[[], None]) -> None:
        """`on_due` is called when a question has a time at which it ends."""
        self._store = store
        self._bus = bus
        self._on_due = on_due
        self._log = structlog.get_logger("ksi.approvals")

    async def asked(self, request_id: str) -> None:
        """A request waits for a person."""
        self._on_due()
        view = await self._store.get(request_id)
        if view is None or not is_asking(view.state, view.question) or view.question is None:
            return
        self._log.info("asks", request_id=request_id, kind=view.question.kind.value, question=view.question.text)
        if self._bus.wanted("completion:approval_required", request_id):
            self._bus.publish("completion:approval_required", approval_body(view), request_id)

    async def delivered(self, aftermath: Aftermath | None, injections: Iterable[InjectionView]) -> None:
        """Deliveries were made; some of their requests may wait for a person."""
        if aftermath is None or all(one.child is None or one.child.question is None for one in aftermath.follow_ups):
            return
        for view in injections:
            if view.state == InjectionState.QUEUED and view.request_id is not None:
                await self.asked(view.request_id)

    def answered(self, reply: AnswerReply) -> None:
        """A person has answered."""
        word = "approved" if reply.question.answer == "yes" else "rejected"
        self._log.info(word, request_id=reply.request_id, by=reply.question.by, why=reply.question.why)
        if self._bus.wanted(f"completion:{word}", reply.request_id):
            self._bus.publish(f"completion:{word}", reply, reply.request_id)
