"""The answers that a run brings along when its program asks for permissions."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.providers.base import Permission, Verdict
from ksi.store.questions import Question, QuestionKind

NOBODY = "there was no answer in time"


class Desk:
    """Knows the one question that the request was asked before, and gives its answer once, to the same question."""

    def __init__(self, question: Question | None, now: Moment, *, keeps: bool) -> None:
        """`question` is the request's last one. One that is open has run out of time: that is a no. `keeps`: a process
        may wait here for an answer."""
        if question is not None and question.kind is not QuestionKind.PERMISSION:
            question = None
        if question is not None and question.open:
            question = msgspec.structs.replace(question, answer="no", answered_at=now.wall, why=NOBODY)
        self.question = question
        self.keeps = keeps
        self._given = question is None

    @property
    def used_before(self) -> tuple[str, ...]:
        """The tools with effects that the turn had used when it asked."""
        return () if self.question is None else self.question.used

    def verdict(self, permission: Permission) -> Verdict | None:
        """The answer to a permission that is asked for; None if a person has to be asked."""
        known = self.question
        if known is None or self._given or (known.tool, known.input) != (permission.tool, permission.input):
            return None
        self._given = True
        if known.answer == "yes":
            return Verdict(allowed=True)
        return Verdict(allowed=False, why=_sentence(known))


def _sentence(question: Question) -> str:
    """The message to the model after a denied tool."""
    if question.why == NOBODY and not question.by:
        return "Denied: there was no answer in time. Do without it, or name your need."
    who = question.by or "a person"
    return f"Denied by {who}: {question.why}" if question.why else f"Denied by {who}."
