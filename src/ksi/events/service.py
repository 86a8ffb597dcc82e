"""The data of the events about the service as a whole: its queue, subscriptions, usage, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ksi.events.common import Data, Name, PageData, Pattern


class QueueStatusData(PageData):
    """`list` names a listing to page through; without it, the reply has figures only."""

    list: Literal["active", "ready", "waiting", "delayed", "asking", "failed", "finished"] | None = None
    """A list to page through; without it, the reply has figures only."""


class SubscribeData(Data):
    """Patterns of event names; `*` stands for anything."""

    patterns: Annotated[list[Pattern], Meta(min_length=1, max_length=100)] | None = None
    """Names of events; `*` stands for anything. A connection has at most 100, of at most 200 characters."""
    pattern: Pattern | None = None
    """A single pattern."""


class DiscoverData(Data):
    """One event or all; `schemas: false` leaves out the JSON Schemas."""

    event: Name | None = None
    """The event's name. Without it, the reply has all events."""
    schemas: bool = True
    """Include the JSON Schemas."""


class TokenUsageData(PageData):
    """Which attempts to account for: those that ended in the last `hours`, of one agent, model, provider, session or
    chain.

    `limit` applies to the rows of each grouping; `cursor` goes with `group_by`.
    """

    agent_id: Name | None = None
    """Only requests of this agent."""
    model: Name | None = None
    """Only this model, by the name in the request or in the answer."""
    provider: Name | None = None
    """Only attempts at this provider."""
    session_id: Name | None = None
    """Only requests of this conversation."""
    conversation_id: Name | None = None
    """Alias of `session_id`."""
    chain_id: Name | None = None
    """Only requests of this chain that are still kept (`retention.finished`)."""
    hours: Annotated[float, Meta(gt=0, le=100_000)] = 24.0
    """The number of hours to look back."""
    bucket_minutes: Annotated[int, Meta(ge=1, le=6_000_000)] | None = None
    """Length of a bucket in `trend`, of which there are at most 1,000. Without it, there are about twenty."""
    group_by: Literal["agent", "model", "provider", "session"] | None = None
    """A single grouping; without it, all four."""


class CollectData(Data):
    """Where to write the checkpoint: an absolute path, or one below `var/checkpoints`. The default is a generated name
    there."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    """Where to write it: an absolute path, or one below `var/checkpoints` of the home. The default is a generated name
    there."""


class RestoreData(Data):
    """Which checkpoint to load: an absolute path, or one below `var/checkpoints`."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """The file: an absolute path, or one below `var/checkpoints` of the home."""


class CheckpointReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The contents of a checkpoint. `created_at` is the saved moment, `version` the KSI that wrote it."""

    path: str
    """The file."""
    created_at: float
    """The saved moment, Unix time."""
    version: str
    """The version of KSI that wrote it."""
    bytes: int
    """The size of the data after the header of 1,024 bytes."""
    sha256: str
    """The SHA-256 of these bytes."""
    conversations: int
    """The number of conversations in the checkpoint; after a restore, of those that are here now."""
    requests: int
    """The number of requests in the checkpoint, waiting ones and kept finished ones; after a restore, of those that
    are here now."""
    locks: int
    """External holders and waiters that were saved."""
    interrupted: int
    """Requests that were running at the saved moment. They run again after a restore."""
    failed: int = 0
    """After a restore: how many of the interrupted requests failed instead, by `queue.on_interrupted` and
    `queue.max_interruptions`."""
    notice: str | None = None
    """After a restore: a warning that a daemon which still lives runs the same requests."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
