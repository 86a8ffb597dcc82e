"""The types of the events that rename, search and delete conversations. Times are in seconds."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ksi.events.common import Data, Name


class RenameData(Data):
    """A conversation and its new name."""

    session_id: Name
    """Any name of the conversation."""
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    """Its new name."""


class RenamedReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation has another name."""

    session_id: str
    """Its present name."""
    before: str
    """Its former name, which stays an alias of it."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class DeleteData(Data):
    """The conversation to delete."""

    session_id: Name
    """Any name of the conversation."""


class RemainBody(msgspec.Struct, kw_only=True):
    """A trace that a deletion did not reach."""

    what: str
    """The kind of trace."""
    where: str
    """Its place: a file, a conversation, or another place."""
    how: str
    """How to remove it."""


class DeleteReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The deleted conversation, and the traces of it that are left elsewhere."""

    session_id: str
    """The name of the deleted conversation."""
    requests: int = 0
    """Number of deleted requests, of those that could still be asked for."""
    turns: int = 0
    """Number of deleted turns."""
    deliveries: int = 0
    """Number of deleted deliveries: those of its results, and those to it."""
    response_file: bool = False
    """Its file of answers existed and was removed."""
    remains: list[RemainBody] = []
    """Traces that the daemon cannot reach: the kind (`what`), the place (`where`), and the way to remove it (`how`)."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class DeletedPush(msgspec.Struct, kw_only=True):
    """A conversation was deleted."""

    session_id: str
    """The name of the deleted conversation."""


class SearchData(Data):
    """A search in prompts and answers."""

    query: Annotated[str, Meta(min_length=1, max_length=1_000)]
    """Words, each of which must be in the turn; `"words in a row"`; the beginning of a word followed by `*`. Case and
    accents do not matter."""
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    """Maximum number of turns."""
    cursor: str | None = None
    """The `cursor` of the previous page's reply."""


class MatchReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One found turn."""

    session_id: str
    """The conversation."""
    finished_at: float
    """Unix time of the answer."""
    provider: str
    """The provider that answered."""
    agent_id: str | None = None
    """The agent that asked."""
    excerpt: str
    """Some words around the first match, in one line."""
    start: int
    """The beginning of the match in `excerpt`, in characters."""
    end: int
    """The end of the match."""


class SearchReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The found turns, the newest first."""

    matches: list[MatchReply]
    """The turns, with `session_id`, `finished_at`, `provider`, `agent_id`, and an `excerpt` with the first match
    between `start` and `end`."""
    cursor: str | None = None
    """The cursor of the page of earlier turns; absent if there are none."""
    behind: int = 0
    """Approximate number of turns that are not indexed yet: repeating the search continues the indexing, and may find
    more."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
