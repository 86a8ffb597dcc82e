"""The question of a request that waits for a person, as a frozen value that belongs to the request.

Times are microseconds of wall time.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from ksi.request import State


class QuestionKind(StrEnum):
    """Why a person is asked."""

    HOLD = "hold"
    """The sender asked to hold the request back until it is released."""
    APPROVAL = "approval"
    """Its chain has reached a depth, a cost or a risk at which a person has to approve the next request."""
    PERMISSION = "permission"
    """It runs at a program that asks whether it may use a tool."""


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A question, and its answer once there is one."""

    kind: QuestionKind
    asked_at: int
    text: str
    """The question in words."""
    expires: int | None = None
    """From this time on, no answer is a no."""
    code: Literal["depth", "cost", "risk"] | None = None
    """The reason for an approval."""
    tool: str | None = None
    """The tool that a permission is needed for."""
    input: str | None = None
    """The tool's arguments, as JSON."""
    used: tuple[str, ...] = ()
    """Tools with effects that its turn had used before: such a turn cannot be run again."""
    answer: Literal["yes", "no"] | None = None
    answered_at: int | None = None
    by: str = ""
    """The person who answered, as given."""
    why: str = ""

    @property
    def open(self) -> bool:
        """True if it is not answered yet."""
        return self.answer is None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Question)


def write_question(question: Question | None) -> str | None:
    """A question as a column holds it."""
    return None if question is None else _encoder.encode(question).decode()


def read_question(text: str | bytes | None) -> Question | None:
    """The question that a column holds."""
    return None if text is None else _decoder.decode(text)


def is_asking(state: State, question: Question | None) -> bool:
    """True if a request in this state waits for an answer."""
    return question is not None and question.open and state in (State.SCHEDULED, State.PARKED)
