"""What the events carry that look things up: names, conversations, and the configuration. Times in seconds."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.event_types import ContentReply, Data, Json, Name, PageData


class FindData(Data):
    """The beginning of a name, and what it names; a request's id stands for external locks too."""

    beginning: Name
    kind: Literal["request", "conversation"] = "request"
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20


class FindReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The names that begin so."""

    names: list[str]
    more: bool = False
    """There are more than `limit`; which of them are named here is chance."""
    warnings: list[str] = []


class HistoryData(PageData):
    """The turns of one conversation."""

    session_id: Name | None = None
    conversation_id: Name | None = None


class TurnReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One completed turn of a conversation."""

    content: ContentReply
    result: str
    provider: str
    finished_at: float
    session_id: str
    """The conversation that it was made in; a fork's history begins in its parent."""
    agent_id: str | None = None
    reminders: list[str] = []
    """Deliveries that went before its prompt."""


class HistoryReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Completed turns of a conversation, the newest first."""

    session_id: str
    turns: list[TurnReply]
    cursor: str | None = None
    warnings: list[str] = []


class ConfigReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The configuration that the daemon read at its start; a secret is `(hidden)`."""

    home: str
    values: Json
    warnings: list[str] = []
