"""What events carry: the data that comes in, the replies and the pushes, as types. Times in seconds.

`Data` is what a client sends, `Reply` what it is answered, `Push` what the daemon sends by itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ksi.request import ChainConfig, InjectionConfig, PatternsConfig

Name = Annotated[str, Meta(min_length=1, max_length=65_536)]


Pattern = Annotated[str, Meta(min_length=1, max_length=200)]


Seconds = Annotated[float, Meta(ge=0, le=1e11)]


Span = Annotated[float, Meta(gt=0, le=1e9)]


Seq = Annotated[int, Meta(ge=-1)]


Limit = Annotated[int, Meta(ge=1, le=1000)]


Json = dict[str, Any]


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
    """Names one request.

    With `after_seq` the pieces of its running answer after that one come too, with `content` what was asked.
    """

    request_id: Name
    after_seq: Seq | None = None
    content: bool = False


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


class ContentReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What was asked in a turn, as it was sent."""

    prompt: str | None = None
    messages: list[MessageData] | None = None
    system: str | None = None


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
    while_connected: bool = False
    """Without a timeout: wait as long as this connection lasts, instead of for `lock.wait_timeout`."""
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
    node: str | None = None
    """The machine that its provider session lives on, where it is one of several (D4)."""
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


class ForkBody(msgspec.Struct, kw_only=True):
    """A conversation that a request made of another one."""

    parent: str
    child: str
    kind: str


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
    truncated: bool = False
    """The answer was cut at a limit of tokens."""
    note: str | None = None
    """A sentence about the answer, such as which tools were denied."""
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
    node: str | None = None
    """The machine whose daemons alone may start it now: its dialogue lives there (D4)."""
    cancelling: bool = False
    forked: ForkBody | None = None
    """The conversation that it forked, told with its end."""
    metadata: Json | None = None
    content: ContentReply | None = None
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
    forked: ForkBody | None = None
    """The conversation that it forked, where it asked for that."""
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
    timeout: float | None = None
    """Seconds that it waits at most, whatever becomes of its connection."""
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
