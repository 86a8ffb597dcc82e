"""Every event: its name, direction, request and reply types, and one line on what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ksi.errors import InvalidData
from ksi.protocol import nearest
from ksi.request import PRIORITY_WORDS, ChainConfig, InjectionConfig, PatternsConfig, Priority
from ksi.usage_report import TokenUsageReply

Name = Annotated[str, Meta(min_length=1, max_length=65_536)]
Pattern = Annotated[str, Meta(min_length=1, max_length=200)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Span = Annotated[float, Meta(gt=0, le=1e9)]
Seq = Annotated[int, Meta(ge=-1)]
Limit = Annotated[int, Meta(ge=1, le=1000)]
Json = dict[str, Any]

MAX_DEPTH = 100
"""Levels of objects and lists in free JSON."""


class Data(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What an event carries in."""


class Nothing(Data):
    """No fields."""


class TextPart(msgspec.Struct):
    """One piece of a message's content."""

    text: str
    type: Literal["text"] = "text"


class MessageData(msgspec.Struct):
    """One message of a dialogue."""

    role: Literal["user", "assistant", "system"]
    content: str | list[TextPart]


class RetryData(Data):
    """How this request is tried again; what is not given is as configured (F2). Times in seconds."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] | None = None
    initial_delay: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    max_delay: Annotated[float, Meta(gt=0, le=86_400)] | None = None


class CompletionData(Data):
    """A completion request. Times in seconds; `not_before` in Unix time."""

    prompt: str | None = None
    messages: Annotated[list[MessageData], Meta(min_length=1)] | None = None
    model: Name | None = None
    session_id: Name | None = None
    conversation_id: Name | None = None
    request_id: Name | None = None
    agent_id: Name | None = None
    system: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    stop: str | list[str] | None = None
    priority: str | None = None
    on_busy: Literal["enqueue", "reject", "interrupt"] = "enqueue"
    fork: bool = False
    hold_on_retry: bool = True
    not_before: Seconds | None = None
    delay: Seconds | None = None
    ttl: Span | None = None
    timeout: Span | None = None
    retry: RetryData | None = None
    stream: bool = False
    mcp_config: Name | Json | None = None
    injection_config: InjectionConfig | None = None
    circuit_breaker_config: ChainConfig | None = None
    patterns: PatternsConfig | None = None
    metadata: Json | None = None
    provider_options: Json | None = None


class RequestId(Data):
    """Names one request."""

    request_id: Name


class CancelData(Data):
    """Names one request, or a whole chain by its id (F8)."""

    request_id: Name | None = None
    chain_id: Name | None = None


class GetData(Data):
    """Names one request; with `after_seq`, the pieces of its running answer after that one (R2)."""

    request_id: Name
    after_seq: Seq | None = None


class WaitData(Data):
    """Names one request and how long to wait for its end."""

    request_id: Name
    timeout: Span | None = None
    stream: bool = False
    after_seq: Seq | None = None


class PageData(Data):
    """A page of a list."""

    limit: Limit = 100
    cursor: str | None = None


class ChainStatusData(PageData):
    """One chain, by its id or by any request of it; without either, a page of chains. `members` adds its requests."""

    request_id: Name | None = None
    chain_id: Name | None = None
    members: bool = False


class ChainName(Data):
    """Names one chain, by its id or by any request of it."""

    request_id: Name | None = None
    chain_id: Name | None = None


class InjectionStatusData(PageData):
    """One delivery with its text, or a page: of all, or of one `state`. `blocked` and `failed` are the dead letters."""

    injection_id: Name | None = None
    state: Literal["queued", "taken", "delivered", "blocked", "failed", "retried"] | None = None


class InjectionId(Data):
    """Names one delivery."""

    injection_id: Name


class QueueStatusData(PageData):
    """`list` names a listing to page through; without it only figures come."""

    list: Literal["active", "ready", "waiting", "delayed", "failed", "finished"] | None = None


class SessionStatusData(PageData):
    """One session, or a page of all, or of one agent's."""

    session_id: Name | None = None
    conversation_id: Name | None = None
    agent_id: Name | None = None


class AcquireLockData(Data):
    """An outside holder's wish for a conversation's lock (L5)."""

    request_id: Name
    conversation_id: Name | None = None
    session_id: Name | None = None
    metadata: Json | None = None
    wait: bool = True
    timeout: Span | None = None
    priority: str | None = None


class LockHolderData(Data):
    """Names an external lock by its holder; a given `fence` must be the lock's."""

    request_id: Name
    fence: int | None = None


class LockStatusData(PageData):
    """One conversation's lock, or all."""

    conversation_id: Name | None = None
    session_id: Name | None = None


class SubscribeData(Data):
    """Patterns of event names; `*` stands for anything."""

    patterns: Annotated[list[Pattern], Meta(min_length=1, max_length=100)] | None = None
    pattern: Pattern | None = None


class DiscoverData(Data):
    """One event or all; `schemas: false` leaves the JSON Schemas away."""

    event: Name | None = None
    schemas: bool = True


class UsageReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Tokens summed over a request's attempts; `unknown_attempts` had no report (T1)."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    unknown_attempts: int = 0


class AttemptReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One attempt in a request's trail."""

    attempt: int
    provider: str
    outcome: str
    started_at: float
    duration_ms: float
    model: str | None = None
    error: str | None = None
    message: str | None = None
    usage: UsageReply | Literal["unknown"]
    time_to_first_token_ms: float | None = None
    stop_reason: str | None = None
    text: str | None = None
    """Only of attempts whose answer did not become the request's."""


class ErrorBody(msgspec.Struct, kw_only=True):
    """Why a request has no answer."""

    code: str
    message: str


class ReasonBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request of a chain did not run (C5, C7)."""

    code: str
    message: str
    risk_score: float | None = None
    evidence: list[str] = []


class ChainReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A chain's figures (C8). Limits are the minimum over the asked request and its ancestors; times in seconds."""

    chain_id: str
    state: Literal["open", "tripped", "exhausted", "closed"]
    """`tripped`: patterns stopped it; `exhausted`: its budget or time is spent; `closed`: it was cancelled."""
    ideation_depth: int
    """Of the asked request; of a chain as a whole, its deepest one's."""
    max_depth: int
    tokens_used: int
    tokens_estimated: int
    """Of `tokens_used`, what no provider reported."""
    tokens_reserved: int
    token_budget: int
    age: float
    time_window: float
    members: int
    unfinished: int
    guard_messages: int
    resets: int
    created_at: float
    reason: ReasonBody | None = None
    """What tripped it."""
    warnings: list[str] = []


class MemberReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request of a chain, in the order of arrival."""

    request_id: str
    parent_request_id: str | None = None
    depth: int
    session_id: str
    agent_id: str | None = None
    status: str
    enqueued_at: float
    finished_at: float | None = None
    tokens: int
    estimated: bool = False
    """Whether `tokens` holds an estimate."""
    reason: ReasonBody | None = None
    """What blocked it."""


class ChainStatusReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One chain and, where asked for, a page of its requests; or a page of chains."""

    chain: ChainReply | None = None
    requests: list[MemberReply] | UnsetType = UNSET
    chains: list[ChainReply] | UnsetType = UNSET
    cursor: str | None = None
    warnings: list[str] = []


class InjectionReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One delivery of a result; also the data of the `injection:*` events. `text` only where one is asked for."""

    injection_id: str
    state: str
    chain_id: str
    parent_request_id: str
    """The request whose result it is."""
    target: str
    mode: str
    trigger_type: str
    created_at: float
    finished_at: float | None = None
    request_id: str | None = None
    """The request that carries it."""
    reason: ReasonBody | None = None
    text: str | None = None


class InjectionStatusReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One delivery, or a page of them, the newest first."""

    injection: InjectionReply | None = None
    injections: list[InjectionReply] | UnsetType = UNSET
    cursor: str | None = None
    warnings: list[str] = []


class InjectionRetryReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of a dead letter that was sent again, under an id of its own."""

    injection: InjectionReply
    retried: str
    """The dead letter's id."""
    warnings: list[str] = []


class RequestReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request as it stands; with `result` once it completed. Also the data of `completion:result`."""

    request_id: str
    status: str
    session_id: str
    result: str | None = None
    error: ErrorBody | None = None
    provider_session_id: str | None = None
    model: str | None = None
    requested_model: str | None = None
    provider: str | None = None
    priority: str | None = None
    agent_id: str | None = None
    usage: UsageReply | None = None
    cost_usd: float | None = None
    stop_reason: str | None = None
    duration_ms: float | None = None
    queued_ms: float | None = None
    enqueued_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    due_at: float | None = None
    attempts: list[AttemptReply] = []
    interruptions: int = 0
    interrupted_by: str | None = None
    requeued_from: str | None = None
    chain_id: str | None = None
    parent_request_id: str | None = None
    ideation_depth: int | None = None
    injection_id: str | None = None
    """The delivery that it carries."""
    reason: ReasonBody | None = None
    """What blocked it."""
    chain: ChainReply | None = None
    """Its chain's figures, where it was blocked."""
    position: int | None = None
    holder: str | None = None
    cancelling: bool = False
    metadata: Json | None = None
    chunks_lost: bool = False
    next_seq: int | None = None
    text_so_far: str | None = None
    warnings: list[str] = []


class SubmitReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `completion:async`. `position` is what stands before it in its conversation's line, from 0."""

    request_id: str
    status: Literal["ready", "queued", "blocked"]
    session_id: str
    state: str
    position: int | UnsetType = UNSET
    conversation_locked: bool | UnsetType = UNSET
    holder: str | None = None
    due_at: float | None = None
    reason: ReasonBody | None = None
    """What blocked it."""
    chain: ChainReply | None = None
    """Its chain's figures, where it was blocked."""
    warnings: list[str] = []


class CancelReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`status` is `cancelled`, or `already_final` with the state it ended in.

    Of a chain: `closed`, and how many of its requests were stopped.
    """

    request_id: str | None = None
    chain_id: str | None = None
    status: Literal["cancelled", "already_final", "closed"]
    state: str | None = None
    session_id: str | None = None
    cancelled: int | None = None
    warnings: list[str] = []


class ChunkPush(msgspec.Struct, kw_only=True):
    """A piece of a running answer; `seq` counts from 0 in each attempt, which voids the text of earlier ones (R2)."""

    request_id: str
    attempt: int
    seq: int
    text: str


class ProgressPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request changed its state without ending."""

    request_id: str
    session_id: str
    status: str
    attempt: int | None = None
    provider: str | None = None
    due_at: float | None = None
    error: str | None = None


class LockReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `conversation:acquire_lock`; waiting positions count from 1 here."""

    acquired: bool
    request_id: str
    conversation_id: str
    state: Literal["locked", "queued", "busy"]
    fence: int | None = None
    expires_at: float | None = None
    position: int | None = None
    holder: str | None = None
    renewed: bool = False
    warnings: list[str] = []


class ReleaseReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `conversation:release_lock`."""

    released: bool
    conversation_id: str
    request_id: str
    next_request: str | None = None
    warnings: list[str] = []


class LockPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation's lock moved."""

    conversation_id: str
    request_id: str
    fence: int | None = None
    external: bool = False
    waiting: bool = False
    """It only waited for the lock when its time ran out."""
    expires_at: float | None = None
    next_request: str | None = None
    position: int | None = None
    holder: str | None = None


class ProviderPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A provider's breaker made a step, it was parked for its quota, or an operator switched it (F3, F5)."""

    provider: str
    before: str
    after: str
    reason: str
    until: float | None = None


class ProviderName(Data):
    """Names one provider."""

    provider: Name


class FailedData(Data):
    """A client's word that a running attempt has failed, and why."""

    request_id: Name
    reason: str = "provider_error"
    message: str | None = None


class FailedReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of a reported failure."""

    request_id: str
    status: Literal["retry_scheduled", "not_retryable", "not_running", "not_found"]
    state: str | None = None
    due_at: float | None = None
    warnings: list[str] = []


class TokenUsageData(PageData):
    """Which attempts to account for: those that ended in the last `hours`, of one agent, model, provider, session or
    chain.

    `limit` is for the rows of each grouping; `cursor` goes with `group_by`.
    """

    agent_id: Name | None = None
    model: Name | None = None
    provider: Name | None = None
    session_id: Name | None = None
    conversation_id: Name | None = None
    chain_id: Name | None = None
    hours: Annotated[float, Meta(gt=0, le=100_000)] = 24.0
    bucket_minutes: Annotated[int, Meta(ge=1, le=6_000_000)] | None = None
    group_by: Literal["agent", "model", "provider", "session"] | None = None


class CollectData(Data):
    """Where the checkpoint goes: an absolute path, or one below `var/checkpoints`; without it a name is made there."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


class RestoreData(Data):
    """Which checkpoint to load: an absolute path, or one below `var/checkpoints`."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]


class CheckpointReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a checkpoint holds. `created_at` is the moment that was saved, `version` the KSI that wrote it."""

    path: str
    created_at: float
    version: str
    bytes: int
    sha256: str
    conversations: int
    requests: int
    locks: int
    interrupted: int
    """Requests that ran when it was saved: they run again."""
    failed: int = 0
    """Those of them that failed instead when it was loaded, as `queue.on_interrupted` says."""
    notice: str | None = None
    warnings: list[str] = []


class ForkPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation went on in another place (L7)."""

    conversation_id: str
    parent: str
    child: str
    request_id: str
    kind: str
    at: float


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
