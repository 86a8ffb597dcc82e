"""The types of the events by which people answer requests that wait for them. Times are Unix time and seconds."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.events.common import Data, Name
from ksi.events.completions import QuestionBody

Words = Annotated[str, Meta(max_length=4_000)]


class ApprovalsData(Data):
    """Which questions are listed."""

    kind: Literal["hold", "approval", "permission"] | None = None
    """Only those of this kind."""
    request_id: Name | None = None
    """Only this request's."""
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100
    """Requests in one reply."""
    cursor: Name | None = None
    """As the page before gave it."""


class AnswerData(Data):
    """An answer to a waiting request."""

    request_id: Name
    """Which request."""
    by: Words = ""
    """The person who answers. For a token, its name is stored instead."""
    why: Words = ""
    """Why. A rejection is passed on to the request's agent."""


class ApprovalBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request that waits for a person's answer."""

    request_id: str
    """Its id."""
    session_id: str
    """Its conversation."""
    status: str
    """`held`, or `waiting_input` if it has run and asks for a permission."""
    question: QuestionBody
    """The question."""
    agent_id: str | None = None
    """The agent that sent it."""
    model: str | None = None
    """The model that it asks for."""
    priority: str | None = None
    """Its priority."""
    enqueued_at: float | None = None
    """Unix time of its arrival."""
    chain_id: str | None = None
    """Its chain."""
    parent_request_id: str | None = None
    """The id of the parent request."""
    ideation_depth: int | None = None
    """How deep in its chain it stands."""
    prompt: str | None = None
    """Its prompt, at most the first 2,000 characters."""


class ApprovalsReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Requests that wait for a person's answer, in the order of arrival."""

    approvals: list[ApprovalBody]
    """One entry for each."""
    cursor: str | None = None
    """For the next page; not there at the end."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class AnswerReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How a request stands behind an answer."""

    request_id: str
    """Its id."""
    session_id: str
    """Its conversation."""
    status: str
    """Its state now."""
    question: QuestionBody
    """The question, with the answer."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
