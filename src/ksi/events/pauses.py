"""The types of the events that pause, drain and resume the queue. Times are in Unix time and seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

from ksi.events.common import Data, Name, Span


class ResumeData(Data):
    """Resumes everything, or the one thing that is named."""

    provider: Name | None = None
    """This provider: it gets no new requests; requests that another provider serves go there."""
    agent_id: Name | None = None
    """Requests of this agent."""
    session_id: Name | None = None
    """Requests of this conversation."""
    priority: Literal["critical", "high", "normal", "low", "background"] | None = None
    """Requests of this priority."""


class PauseData(ResumeData):
    """Pauses everything, or the one thing that is named."""

    seconds: Span | None = None
    """The pause ends by itself after this time."""
    by: str = ""
    """The person who pauses it."""
    why: str = ""
    """The reason, for other operators."""


class PauseBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One pause."""

    scope: Literal["all", "provider", "agent", "session", "priority"]
    """The kind of thing: `all`, `provider`, `agent`, `session` or `priority`."""
    name: str = ""
    """The provider, agent, session or priority; empty for everything."""
    since: float
    """Unix time."""
    until: float | None = None
    """Unix time when it ends by itself."""
    by: str = ""
    """The person who paused it."""
    why: str = ""
    """The given reason."""
    sentence: str
    """All of it in one sentence."""


class PauseReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """All pauses, and whether the daemon drains."""

    paused: list[PauseBody]
    """Each pause: `scope` (`all`, `provider`, `agent`, `session`, `priority`), `name`, `since`, `until` (when it ends
    by itself), `by`, `why`, and all of this as a `sentence`."""
    draining: bool = False
    """This daemon starts nothing and accepts nothing new."""
    running: int = 0
    """Number of requests that run at this daemon."""
    waiting: int | None = None
    """Number of requests in the store's queue."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class DrainData(Data):
    """The limit of the wait for running requests."""

    timeout: Span | None = None
    """Seconds, after which the reply is sent even if requests still run."""
