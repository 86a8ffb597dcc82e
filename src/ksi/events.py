"""Every event: its name, direction, request and reply types, and one line on what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec

from ksi.errors import InvalidData
from ksi.event_types import (
    AcquireLockData,
    CancelData,
    CancelReply,
    ChainName,
    ChainReply,
    ChainStatusData,
    ChainStatusReply,
    CheckpointReply,
    ChunkPush,
    CollectData,
    CompletionData,
    DiscoverData,
    FailedData,
    FailedReply,
    ForkPush,
    GetData,
    InjectionId,
    InjectionReply,
    InjectionRetryReply,
    InjectionStatusData,
    InjectionStatusReply,
    LockHolderData,
    LockPush,
    LockReply,
    LockStatusData,
    Nothing,
    PageData,
    ProgressPush,
    ProviderName,
    ProviderPush,
    QueueStatusData,
    ReleaseReply,
    RequestId,
    RequestReply,
    RestoreData,
    SessionStatusData,
    SubmitReply,
    SubscribeData,
    TokenUsageData,
    WaitData,
)
from ksi.lookup_types import ConfigReply, FindData, FindReply, HistoryData, HistoryReply
from ksi.protocol import nearest
from ksi.request import PRIORITY_WORDS, Priority
from ksi.usage_report import TokenUsageReply

Json = dict[str, Any]

MAX_DEPTH = 100
"""Levels of objects and lists in free JSON."""


class EventSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the wire."""

    name: str
    doc: str
    request: type[msgspec.Struct] | None = None
    """None for events that only the daemon sends."""
    reply: type[msgspec.Struct] | None = None
    """None where the answer is a report whose keys its page in the reference lists."""

    @property
    def incoming(self) -> bool:
        """Whether a client may send it."""
        return self.request is not None


def _in(name: str, request: type[msgspec.Struct], doc: str, reply: type[msgspec.Struct] | None = None) -> EventSpec:
    return EventSpec(name=name, doc=doc, request=request, reply=reply)


def _out(name: str, doc: str, push: type[msgspec.Struct] | None = None) -> EventSpec:
    return EventSpec(name=name, doc=doc, reply=push)


SPECS: Mapping[str, EventSpec] = {
    spec.name: spec
    for spec in (
        _in("system:startup", Nothing, "When and with what this daemon started. Changes nothing."),
        _in("system:context", Nothing, "Home, node, store and providers of this daemon. Changes nothing."),
        _in("system:ready", Nothing, "Whether the daemon serves, and which of its tasks run. Changes nothing."),
        _in("system:shutdown", Nothing, "Stop in order: running requests get their grace, nothing is lost (R6)."),
        _in("system:health", Nothing, "How the daemon, its store and its providers are."),
        _in("system:config", Nothing, "The configuration that this daemon holds, without secrets.", ConfigReply),
        _in("system:discover", DiscoverData, "Every event with the JSON Schema of what it takes and gives."),
        _in(
            "completion:request", CompletionData, "Ask for a completion; the reply comes when it is done.", RequestReply
        ),
        _in(
            "completion:async",
            CompletionData,
            "Ask for a completion; the reply comes at once, `completion:result` follows.",
            SubmitReply,
        ),
        _in("completion:get", GetData, "A request as it stands, with its result once it has one.", RequestReply),
        _in("completion:wait", WaitData, "A request's end, from any connection.", RequestReply),
        _in("completion:find", FindData, "Names of requests or conversations that begin so.", FindReply),
        _in("completion:history", HistoryData, "The prompts and answers of a conversation.", HistoryReply),
        _in("completion:cancel", CancelData, "Stop a request that is not final, or a whole chain.", CancelReply),
        _in("completion:status", Nothing, "What the service is doing: figures and running requests."),
        _in("completion:queue_status", QueueStatusData, "The queue's figures, and pages of its lists."),
        _in("completion:session_status", SessionStatusData, "A session's life, or a page of sessions."),
        _in("completion:retry_status", PageData, "What waits to be tried again: why, since when, until when."),
        _in(
            "completion:token_usage",
            TokenUsageData,
            "What completions used and cost: by agent, model, provider, session, of a chain, over time, and with MCP.",
            TokenUsageReply,
        ),
        _in("completion:failed", FailedData, "A client saw a running attempt fail.", FailedReply),
        _in(
            "completion:requeue", RequestId, "Ask again for a request that failed for good, as a new one.", SubmitReply
        ),
        _in("provider:disable", ProviderName, "Ask a provider no more; what runs there goes on."),
        _in("provider:enable", ProviderName, "Ask a disabled provider again."),
        _in("provider:reset", ProviderName, "Forget a provider's failures and ask it at once."),
        _in("checkpoint:collect", CollectData, "Save everything to a file, while requests run.", CheckpointReply),
        _in(
            "checkpoint:restore",
            RestoreData,
            "Load a checkpoint into an empty daemon and go on with it.",
            CheckpointReply,
        ),
        _in("completion:provider_status", Nothing, "Each provider: what it serves, its slots, its trouble."),
        _in(
            "conversation:acquire_lock",
            AcquireLockData,
            "Take a conversation's lock for work outside KSI, or join its line.",
            LockReply,
        ),
        _in("conversation:release_lock", LockHolderData, "Give an acquired lock back.", ReleaseReply),
        _in("conversation:renew_lock", LockHolderData, "Begin an acquired lock's time anew.", LockReply),
        _in("conversation:lock_status", LockStatusData, "Who holds and who waits for one conversation, or all."),
        _in(
            "injection:status",
            InjectionStatusData,
            "How deliveries of results stand: one with its text, or a page.",
            InjectionStatusReply,
        ),
        _in("injection:retry", InjectionId, "Send a dead letter again, as a new delivery.", InjectionRetryReply),
        _in(
            "circuit_breaker:status",
            ChainStatusData,
            "A chain's figures, limits and what stopped it, or a page of chains.",
            ChainStatusReply,
        ),
        _in(
            "circuit_breaker:reset",
            ChainName,
            "Let a stopped chain go on: budget and time begin anew, what tripped it is forgotten.",
            ChainReply,
        ),
        _in("monitor:subscribe", SubscribeData, "Get every pushed event whose name fits a pattern."),
        _in("monitor:unsubscribe", SubscribeData, "Get them no longer; without patterns, none at all."),
        _out("completion:result", "A request ended.", RequestReply),
        _out("completion:progress", "A request changed its state without ending.", ProgressPush),
        _out("completion:chunk", "A piece of a streamed answer.", ChunkPush),
        _out("conversation:locked", "A conversation has a new holder.", LockPush),
        _out("conversation:queued", "A request or outside holder waits for its conversation.", LockPush),
        _out("conversation:unlocked", "A conversation's lock was given back and nobody waits.", LockPush),
        _out("conversation:lock_transferred", "A conversation's lock passes to the next in line.", LockPush),
        _out(
            "conversation:lock_expired",
            "An outside holder did not renew in time, or a waiter's timeout ran out.",
            LockPush,
        ),
        _out("provider:state_changed", "A provider is left alone, tried again, parked or switched.", ProviderPush),
        _out("injection:queued", "A result is on its way into a conversation.", InjectionReply),
        _out("injection:blocked", "A chain's limit stopped a delivery: it is a dead letter.", InjectionReply),
        _out("injection:delivered", "A delivery reached its conversation.", InjectionReply),
        _out("injection:failed", "A delivery's request ended without an answer: it is a dead letter.", InjectionReply),
        _out("conversation:forked", "A conversation went on in another place.", ForkPush),
    )
}


def parse_priority(word: str | None) -> Priority:
    """A priority by its word; case does not matter, none means normal (Q1).

    Raises:
        InvalidData: another word.
    """
    if word is None:
        return Priority.NORMAL
    priority = PRIORITY_WORDS.get(word.lower())
    if priority is None:
        guess = nearest(word.lower(), PRIORITY_WORDS)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise InvalidData(f"priority: {word[:60]!r} is none of {', '.join(PRIORITY_WORDS)}{hint}", path="priority")
    return priority


def conversation_name(session_id: str | None, conversation_id: str | None) -> str | None:
    """`session_id`, or its alias `conversation_id`.

    Raises:
        InvalidData: both are given and differ.
    """
    if session_id is not None and conversation_id is not None and session_id != conversation_id:
        raise InvalidData("session_id and conversation_id name different conversations", path="conversation_id")
    return session_id if session_id is not None else conversation_id


def check_depth(path: str, value: Any) -> None:
    """Refuse free JSON that is nested deeper than any stack it may be read on.

    Raises:
        InvalidData: deeper than MAX_DEPTH.
    """
    if value is None:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _children(outer)]
        if not level:
            return
    if any(isinstance(inner, dict | list) for inner in level):
        raise InvalidData(f"{path}: nested more than {MAX_DEPTH} deep", path=path)


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def schema(spec: EventSpec) -> Json:
    """The JSON Schemas of what an event takes and gives, as far as they are fixed."""
    types = [t for t in (spec.request, spec.reply) if t is not None]
    (*shown,), components = msgspec.json.schema_components(types)
    result: Json = {"$defs": components} if components else {}
    for label, kind in (("request", spec.request), ("reply" if spec.incoming else "data", spec.reply)):
        if kind is not None:
            result[label] = shown[types.index(kind)]
    # Defaults may be tuples; what is shown is JSON.
    return cast(Json, msgspec.json.decode(msgspec.json.encode(result)))
