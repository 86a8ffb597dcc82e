"""The types of the events that look things up: names, conversations, and the configuration. Times in seconds."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.events.common import Data, Json, Name, PageData
from ksi.events.completions import ContentReply


class FindData(Data):
    """The beginning of a name, and the kind of thing that it names; external locks count as requests."""

    beginning: Name
    """The beginning of the names."""
    kind: Literal["request", "conversation"] = "request"
    """The kind of thing that they name; external holders and waiters of locks count as requests."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20
    """The maximum number of names."""


class FindReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The matching names."""

    names: list[str]
    """The matching names, in order."""
    more: bool = False
    """There are more than `limit`; the choice of those named is arbitrary."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class HistoryData(PageData):
    """The turns of one conversation."""

    session_id: Name | None = None
    """The conversation's name."""
    conversation_id: Name | None = None
    """Alias of `session_id`."""


class TurnReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One completed turn of a conversation."""

    content: ContentReply
    """The prompt, as it was sent."""
    result: str
    """The answer's text."""
    provider: str
    """The provider that answered."""
    finished_at: float
    """Unix time of the answer."""
    session_id: str
    """The conversation that it was made in; a fork's history begins in its parent."""
    agent_id: str | None = None
    """The agent that asked."""
    blocks: list[Json] = []
    """The answer's [blocks](dialects.md#blocks), if it is more than its text."""
    reminders: list[str] = []
    """Deliveries that went before its prompt."""


class HistoryReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Completed turns of a conversation, the newest first."""

    session_id: str
    """The conversation's name."""
    turns: list[TurnReply]
    """The newest first. `content` has the `prompt` or the `messages`, and the `system` text; `blocks` are the answer's,
    if it is more than its text; `session_id` is the conversation that the turn was made in; `reminders` are deliveries
    that went before its prompt."""
    cursor: str | None = None
    """The cursor of the page of earlier turns; absent if there are none."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class ConfigReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The configuration that the daemon read at its start; a secret is `(hidden)`."""

    home: str
    """The home folder."""
    values: Json
    """Every key with its sections, and its value. A value that may be secret is `(hidden)`."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
