"""`completion:approvals`, `completion:release`, `completion:approve`, `completion:reject`: people's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from ksi.clock import Clock, microseconds
from ksi.completion.approval.news import ApprovalNews, approval_body
from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.replies import question_body, status_of
from ksi.conversation.lock_events import LockEvents
from ksi.errors import FailureClass, InvalidData
from ksi.events.approval import AnswerData, AnswerReply, ApprovalBody, ApprovalsData, ApprovalsReply
from ksi.events.completions import QuestionBody
from ksi.request import State, decode_body
from ksi.store.base import Store
from ksi.store.questions import Question, QuestionKind, is_asking
from ksi.store.rules import refusals
from ksi.store.values import Finish, Listing, RequestView

LOOKED_THROUGH = 1_000
"""Requests that are looked through for one reply that shows a kind alone."""


class ApprovalService:
    """Shows the requests that wait for a person, and accepts the answers. Each question is answered once."""

    def __init__(
        self,
        store: Store,
        announcer: Announcer,
        locks: LockEvents,
        injections: InjectionEvents,
        news: ApprovalNews,
        on_due: Callable[[], None],
        clock: Clock,
    ) -> None:
        """`on_due` is called when something is due now."""
        self._store = store
        self._announcer = announcer
        self._locks = locks
        self._injections = injections
        self._news = news
        self._on_due = on_due
        self._clock = clock

    # -- looking --------------------------------------------------------------------------------------------------

    async def list(self, data: ApprovalsData) -> ApprovalsReply:
        """`completion:approvals`: the requests that wait for an answer, in the order of arrival.

        Raises:
            InvalidData: the cursor is not this list's.
            NotFound: there is no such request.
        """
        if data.request_id is not None:
            view = await self._view(data.request_id)
            return ApprovalsReply(approvals=[approval_body(view)] if is_asking(view.state, view.question) else [])
        found: list[ApprovalBody] = []
        cursor, looked = data.cursor, 0
        while True:
            page = await self._store.requests(Listing.ASKING, data.limit - len(found), cursor)
            looked += len(page.items)
            for row in page.items:
                if row.question is None or data.kind not in (None, row.question.kind.value):
                    continue
                whole = await self._store.get(row.request_id)
                if whole is not None and is_asking(whole.state, whole.question):
                    found.append(approval_body(whole))
            cursor = page.cursor
            if cursor is None or len(found) >= data.limit or looked >= LOOKED_THROUGH:
                return ApprovalsReply(approvals=found, cursor=cursor)

    # -- answering ------------------------------------------------------------------------------------------------

    async def release(self, data: AnswerData) -> AnswerReply:
        """`completion:release`: a held request comes into the line.

        Raises:
            NotFound: there is no such request.
            InvalidData: it waits for something else, or for nothing.
        """
        view, question = await self._open(data.request_id, "yes")
        if question.kind is not QuestionKind.HOLD:
            raise InvalidData(
                f"request {data.request_id!r} is not held by its sender but asks for {_article(question.kind)}; "
                "`completion:approve` or `completion:reject` answers it",
                path="request_id",
            )
        return await self._answer(view, question, "yes", data)

    async def approve(self, data: AnswerData) -> AnswerReply:
        """`completion:approve`: yes. Raises the same errors as `release`, for its own kind of question."""
        view, question = await self._open(data.request_id, "yes")
        return await self._answer(view, question, "yes", data)

    async def reject(self, data: AnswerData) -> AnswerReply:
        """`completion:reject`: no. A request that has not run ends; one that asks for a permission continues without
        it."""
        view, question = await self._open(data.request_id, "no")
        return await self._answer(view, question, "no", data)

    async def _answer(
        self, view: RequestView, question: Question, answer: Literal["yes", "no"], data: AnswerData
    ) -> AnswerReply:
        if question.answer is not None:
            return _reply(view, question)
        now = self._clock.now()
        answered = msgspec.structs.replace(question, answer=answer, answered_at=now.wall, by=data.by, why=data.why)
        body = decode_body(view.body)
        runs_on = question.kind is QuestionKind.PERMISSION
        due = now.wall if runs_on else max(now.wall, _not_before(view))
        expires = None if body.ttl is None or runs_on else view.enqueued_at + microseconds(body.ttl)
        end = _rejected(data) if answer == "no" and not runs_on else None
        taken = await self._store.answer(view.request_id, question, answered, now, end=end, due=due, expires=expires)
        if not taken.taken:
            # Another answer was faster; it is reported, or the reason why there is none to give any more.
            found, known = await self._open(view.request_id, answer)
            return await self._answer(found, known, answer, data)
        reply = AnswerReply(
            request_id=view.request_id,
            session_id=taken.conversation,
            status=taken.state.value,
            question=_body(answered),
        )
        self._news.answered(reply)
        if end is None:
            self._on_due()
            return reply
        if taken.passing is not None:
            self._locks.passed(taken.passing)
        self._injections.tell(taken.injections)
        await self._announcer.ended(view.request_id)
        return reply

    async def _open(self, request_id: str, answer: str) -> tuple[RequestView, Question]:
        """A request and its question, which is open, or has this answer already: the same answer twice is one.

        Raises:
            NotFound: there is no such request.
            InvalidData: it asks nothing, or has another answer.
        """
        view = await self._view(request_id)
        question = view.question
        if question is not None and (is_asking(view.state, question) or question.answer == answer):
            return view, question
        if question is None:
            why = "it asks nothing"
        elif question.answer is not None:
            why = f"{question.by or 'somebody'} has said {question.answer} already"
        else:
            why = "its question is over"
        raise InvalidData(f"request {request_id!r} waits for no answer: {why}; it is {view.state}", path="request_id")

    async def _view(self, request_id: str) -> RequestView:
        view = await self._store.get(request_id)
        if view is None:
            raise refusals.unknown_request(request_id)
        return view


def _not_before(view: RequestView) -> int:
    """The time before which a request's sender does not want it to run."""
    body = decode_body(view.body)
    if body.not_before is not None:
        return microseconds(body.not_before)
    return view.enqueued_at + microseconds(body.delay) if body.delay is not None else 0


def _rejected(data: AnswerData) -> Finish:
    who = data.by or "a person"
    message = f"{who} said no: {data.why}" if data.why else f"{who} said no"
    return Finish(state=State.CANCELLED, error=FailureClass.REJECTED.value, message=message)


def _article(kind: QuestionKind) -> str:
    return "an approval" if kind is QuestionKind.APPROVAL else f"a {kind}"


def _reply(view: RequestView, question: Question) -> AnswerReply:
    return AnswerReply(
        request_id=view.request_id,
        session_id=view.conversation,
        status=status_of(view.state, question),
        question=_body(question),
    )


def _body(question: Question) -> QuestionBody:
    body = question_body(question)
    assert body is not None
    return body
