"""The list of all events: name, direction, request and reply types, and a line on the purpose of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import msgspec

from ksi.errors import InvalidData
from ksi.events.approval import AnswerData, AnswerReply, ApprovalBody, ApprovalsData, ApprovalsReply
from ksi.events.budget import BudgetNameData, BudgetPush, BudgetRaiseData, BudgetReply, BudgetSetData, BudgetStatusData
from ksi.events.chains import (
    ChainName,
    ChainReply,
    ChainStatusData,
    ChainStatusReply,
    InjectionId,
    InjectionReply,
    InjectionRetryReply,
    InjectionStatusData,
    InjectionStatusReply,
)
from ksi.events.common import Nothing, PageData, RequestId
from ksi.events.completions import (
    AlertPush,
    CancelData,
    CancelReply,
    ChainWarningPush,
    ChangedPush,
    ChunkPush,
    CompletionData,
    FailedData,
    FailedReply,
    GetData,
    LoopPush,
    ProgressPush,
    RequestReply,
    SubmitReply,
    WaitData,
)
from ksi.events.conversations import (
    AcquireLockData,
    ForkPush,
    LockHolderData,
    LockPush,
    LockReply,
    LockStatusData,
    LostPush,
    ReleaseReply,
    SessionStatusData,
)
from ksi.events.descriptions import descriptions, plain, structs_in
from ksi.events.lookups import ConfigReply, FindData, FindReply, HistoryData, HistoryReply
from ksi.events.owned import DeleteData, DeletedPush, DeleteReply, RenameData, RenamedReply, SearchData, SearchReply
from ksi.events.pauses import DrainData, PauseData, PauseReply, ResumeData
from ksi.events.providers import ProviderName, ProviderPush, SwitchData
from ksi.events.reports import (
    ContextReply,
    DiscoverReply,
    HealthReply,
    LockStatusReply,
    PatternsReply,
    ProviderReport,
    ProviderStatusReply,
    QueueStatusReply,
    ReadyReply,
    RetryStatusReply,
    SessionStatusReply,
    ShutdownReply,
    StartupReply,
    StatusReply,
    TrendReply,
)
from ksi.events.service import (
    CheckpointReply,
    CollectData,
    DiscoverData,
    QueueStatusData,
    RestoreData,
    SubscribeData,
    TokenUsageData,
)
from ksi.events.tokens import OwnerTokenReply, Scope, TokenCreateData, TokenCreateReply, TokenNameData, TokensReply
from ksi.events.usage import TokenUsageReply
from ksi.protocol import nearest
from ksi.request import PRIORITY_WORDS, Priority

Json = dict[str, Any]

MAX_DEPTH = 100
"""Maximum nesting of objects and lists in free JSON."""


class EventSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the wire."""

    name: str
    doc: str
    request: type[msgspec.Struct] | None = None
    """None for events that only the daemon sends."""
    reply: type[msgspec.Struct] | None = None
    """The type of the reply or push; None if it is not specified."""

    @property
    def incoming(self) -> bool:
        """True if a client may send it."""
        return self.request is not None


def _in(name: str, request: type[msgspec.Struct], doc: str, reply: type[msgspec.Struct] | None = None) -> EventSpec:
    return EventSpec(name=name, doc=doc, request=request, reply=reply)


def _out(name: str, doc: str, push: type[msgspec.Struct] | None = None) -> EventSpec:
    return EventSpec(name=name, doc=doc, reply=push)


SPECS: Mapping[str, EventSpec] = {
    spec.name: spec
    for spec in (
        _in(
            "system:startup", Nothing, "Start time, version and process of this daemon. Changes nothing.", StartupReply
        ),
        _in(
            "system:context", Nothing, "Home, node, store and providers of this daemon. Changes nothing.", ContextReply
        ),
        _in(
            "system:ready",
            Nothing,
            "The daemon's readiness, and the state of its tasks. Changes nothing.",
            ReadyReply,
        ),
        _in(
            "system:shutdown",
            Nothing,
            "Stop in order: running requests get a grace period, nothing is lost.",
            ShutdownReply,
        ),
        _in("system:health", Nothing, "The health of the daemon, its store and its providers.", HealthReply),
        _in("system:config", Nothing, "The configuration that this daemon holds, without secrets.", ConfigReply),
        _in(
            "system:discover",
            DiscoverData,
            "Every event with the JSON Schemas of its request and reply.",
            DiscoverReply,
        ),
        _in(
            "completion:request", CompletionData, "Ask for a completion; the reply comes when it is done.", RequestReply
        ),
        _in(
            "completion:async",
            CompletionData,
            "Ask for a completion; the reply comes at once, `completion:result` follows.",
            SubmitReply,
        ),
        _in(
            "completion:get", GetData, "The present state of a request, with its result once it has one.", RequestReply
        ),
        _in("completion:wait", WaitData, "Wait for a request's end, from any connection.", RequestReply),
        _in("completion:find", FindData, "Names of requests or conversations with a given beginning.", FindReply),
        _in("completion:history", HistoryData, "The prompts and answers of a conversation.", HistoryReply),
        _in("completion:cancel", CancelData, "Stop a request that has not ended, or a whole chain.", CancelReply),
        _in("completion:status", Nothing, "The service's figures and running requests.", StatusReply),
        _in(
            "completion:queue_status", QueueStatusData, "The queue's figures, and pages of its lists.", QueueStatusReply
        ),
        _in(
            "completion:session_status",
            SessionStatusData,
            "A session's life, or a page of sessions.",
            SessionStatusReply,
        ),
        _in(
            "completion:retry_status",
            PageData,
            "The requests that wait for a retry: why, since when, until when.",
            RetryStatusReply,
        ),
        _in(
            "completion:token_usage",
            TokenUsageData,
            "Tokens and cost of completions: by agent, model, provider, session, of a chain, over time, and with MCP.",
            TokenUsageReply,
        ),
        _in("completion:failed", FailedData, "Report that a running attempt has failed.", FailedReply),
        _in(
            "completion:requeue", RequestId, "Ask again for a request that failed for good, as a new one.", SubmitReply
        ),
        _in("completion:approvals", ApprovalsData, "The requests that wait for a person's answer.", ApprovalsReply),
        _in("completion:release", AnswerData, "Queue a request that its sender held back.", AnswerReply),
        _in("completion:approve", AnswerData, "Answer a request's question with yes.", AnswerReply),
        _in("completion:reject", AnswerData, "Answer a request's question with no.", AnswerReply),
        _in("provider:disable", SwitchData, "Send a provider no new requests; running ones continue.", ProviderReport),
        _in("provider:enable", SwitchData, "Send a disabled provider requests again.", ProviderReport),
        _in(
            "provider:reset",
            ProviderName,
            "Forget a provider's failures, close its circuit and try it at once.",
            ProviderReport,
        ),
        _in(
            "queue:pause",
            PauseData,
            "Start no new requests, at all or of one scope; running ones continue.",
            PauseReply,
        ),
        _in("queue:resume", ResumeData, "End a pause.", PauseReply),
        _in("queue:pauses", Nothing, "The pauses: by whom, since when, and why.", PauseReply),
        _in("queue:drain", DrainData, "Accept no new work; the reply comes when no request runs any more.", PauseReply),
        _in("queue:undrain", Nothing, "Accept work again after a drain.", PauseReply),
        _in("queue:trend", Nothing, "The queue's figures over the last day, minute by minute.", TrendReply),
        _in(
            "budget:status",
            BudgetStatusData,
            "The state of each budget: usage, rest, and the time of its reset.",
            BudgetReply,
        ),
        _in("budget:set", BudgetSetData, "Make a budget, or change one that was set.", BudgetReply),
        _in("budget:drop", BudgetNameData, "Forget a budget that was set.", BudgetReply),
        _in("budget:raise", BudgetRaiseData, "More for a budget, until a time.", BudgetReply),
        _in("checkpoint:collect", CollectData, "Save everything to a file, while requests run.", CheckpointReply),
        _in(
            "checkpoint:restore",
            RestoreData,
            "Load a checkpoint into an empty daemon and continue from it.",
            CheckpointReply,
        ),
        _in(
            "completion:provider_status",
            Nothing,
            "Each provider: its models, slots, limits and failures.",
            ProviderStatusReply,
        ),
        _in(
            "conversation:acquire_lock",
            AcquireLockData,
            "Take a conversation's lock for work outside KSI, or join its wait queue.",
            LockReply,
        ),
        _in("conversation:release_lock", LockHolderData, "Give an acquired lock back.", ReleaseReply),
        _in("conversation:renew_lock", LockHolderData, "Extend the expiry of an acquired lock.", LockReply),
        _in(
            "conversation:lock_status",
            LockStatusData,
            "Holders and waiters of one conversation, or of all.",
            LockStatusReply,
        ),
        _in(
            "conversation:rename",
            RenameData,
            "Give a conversation another name; the old one stays valid.",
            RenamedReply,
        ),
        _in("conversation:search", SearchData, "Find turns by words of their prompts and answers.", SearchReply),
        _in(
            "conversation:delete",
            DeleteData,
            "Delete a conversation for good; the reply names the traces of it that are left elsewhere.",
            DeleteReply,
        ),
        _in(
            "injection:status",
            InjectionStatusData,
            "The state of deliveries of results: one with its text, or a page.",
            InjectionStatusReply,
        ),
        _in("injection:retry", InjectionId, "Send a dead letter again, as a new delivery.", InjectionRetryReply),
        _in(
            "circuit_breaker:status",
            ChainStatusData,
            "A chain's figures, limits and the reason why it was stopped, or a page of chains.",
            ChainStatusReply,
        ),
        _in(
            "circuit_breaker:reset",
            ChainName,
            "Let a stopped chain continue: its budget and time start from zero, the findings against it are forgotten.",
            ChainReply,
        ),
        _in(
            "token:create", TokenCreateData, "Make a token for HTTP; its secret is in the reply only.", TokenCreateReply
        ),
        _in("token:list", Nothing, "The tokens for HTTP, without their secrets.", TokensReply),
        _in("token:revoke", TokenNameData, "Revoke a token at once, and close its open connections.", TokensReply),
        _in("token:renew", Nothing, "Replace the owner's token; the old one is revoked at once.", OwnerTokenReply),
        _in(
            "monitor:subscribe",
            SubscribeData,
            "Receive every pushed event whose name matches a pattern.",
            PatternsReply,
        ),
        _in("monitor:unsubscribe", SubscribeData, "End subscriptions; without patterns, all of them.", PatternsReply),
        _out("monitor:lost", "An HTTP stream continues after a gap: some events are not kept any more.", LostPush),
        _out("monitor:changed", "The number of events of each name, instead of the events themselves.", ChangedPush),
        _out("completion:result", "A request ended.", RequestReply),
        _out("completion:progress", "A request changed its state without ending.", ProgressPush),
        _out("completion:approval_required", "A request waits for a person's answer.", ApprovalBody),
        _out("completion:approved", "A person let a request continue.", AnswerReply),
        _out("completion:rejected", "A person denied a waiting request.", AnswerReply),
        _out("completion:chunk", "A piece of a streamed answer.", ChunkPush),
        _out("completion:alert", "An agent asks the same very often, or spends far more than usual.", AlertPush),
        _out("completion:loop", "An agent is in a loop, although all of its requests succeed.", LoopPush),
        _out("conversation:locked", "A conversation has a new holder.", LockPush),
        _out("conversation:queued", "A request or external holder waits for its conversation.", LockPush),
        _out("conversation:unlocked", "A conversation's lock was released with an empty wait queue.", LockPush),
        _out("conversation:lock_transferred", "A conversation's lock passes to the next in the queue.", LockPush),
        _out(
            "conversation:lock_expired",
            "An external holder did not renew in time, or a waiter's timeout ran out.",
            LockPush,
        ),
        _out(
            "provider:state_changed",
            "A provider's circuit opened, half-opened or closed, or it was parked or switched.",
            ProviderPush,
        ),
        _out("budget:warning", "A budget has reached a share of its limit.", BudgetPush),
        _out("budget:exceeded", "A budget is used up.", BudgetPush),
        _out("queue:paused", "An operator paused something.", PauseReply),
        _out("queue:resumed", "An operator resumed something.", PauseReply),
        _out("circuit_breaker:warning", "The pattern checks suspect a chain, which continues.", ChainWarningPush),
        _out("injection:queued", "A result is queued for delivery to a conversation.", InjectionReply),
        _out("injection:blocked", "A chain's limit stopped a delivery: it is a dead letter.", InjectionReply),
        _out("injection:delivered", "A delivery reached its conversation.", InjectionReply),
        _out("injection:failed", "A delivery's request ended without an answer: it is a dead letter.", InjectionReply),
        _out("conversation:renamed", "A conversation has another name.", RenamedReply),
        _out("conversation:deleted", "A conversation was deleted.", DeletedPush),
        _out("conversation:forked", "A conversation continued in a new one.", ForkPush),
    )
}


SCOPES: Mapping[str, Scope] = {
    "system:startup": Scope.READ,
    "system:context": Scope.READ,
    "system:ready": Scope.SUBMIT,
    "system:shutdown": Scope.OPERATE,
    "system:health": Scope.READ,
    "system:config": Scope.READ,
    "system:discover": Scope.SUBMIT,
    "completion:request": Scope.SUBMIT,
    "completion:async": Scope.SUBMIT,
    "completion:get": Scope.SUBMIT,
    "completion:wait": Scope.SUBMIT,
    "completion:find": Scope.READ,
    "completion:history": Scope.READ,
    "completion:cancel": Scope.SUBMIT,
    "completion:status": Scope.READ,
    "completion:queue_status": Scope.READ,
    "completion:session_status": Scope.READ,
    "completion:retry_status": Scope.READ,
    "completion:token_usage": Scope.READ,
    "completion:failed": Scope.OPERATE,
    "completion:requeue": Scope.OPERATE,
    "completion:approvals": Scope.READ,
    "completion:release": Scope.SUBMIT,
    "completion:approve": Scope.OPERATE,
    "completion:reject": Scope.OPERATE,
    "provider:disable": Scope.OPERATE,
    "provider:enable": Scope.OPERATE,
    "provider:reset": Scope.OPERATE,
    "queue:pause": Scope.OPERATE,
    "queue:resume": Scope.OPERATE,
    "queue:pauses": Scope.READ,
    "queue:trend": Scope.READ,
    "queue:drain": Scope.OPERATE,
    "queue:undrain": Scope.OPERATE,
    "budget:status": Scope.READ,
    "budget:set": Scope.OPERATE,
    "budget:drop": Scope.OPERATE,
    "budget:raise": Scope.OPERATE,
    "checkpoint:collect": Scope.OPERATE,
    "checkpoint:restore": Scope.OPERATE,
    "completion:provider_status": Scope.READ,
    "conversation:acquire_lock": Scope.OPERATE,
    "conversation:release_lock": Scope.OPERATE,
    "conversation:renew_lock": Scope.OPERATE,
    "conversation:lock_status": Scope.READ,
    "conversation:rename": Scope.OPERATE,
    "conversation:search": Scope.READ,
    "conversation:delete": Scope.OPERATE,
    "injection:status": Scope.READ,
    "injection:retry": Scope.OPERATE,
    "circuit_breaker:status": Scope.READ,
    "circuit_breaker:reset": Scope.OPERATE,
    "token:create": Scope.OPERATE,
    "token:list": Scope.OPERATE,
    "token:revoke": Scope.OPERATE,
    "token:renew": Scope.OPERATE,
    "monitor:subscribe": Scope.READ,
    "monitor:unsubscribe": Scope.READ,
}
"""The scope that a token needs for each event that comes by HTTP. With `submit`, a client reaches its own requests
only: `ksi.http.own` enforces that. The socket needs no token: a process that can open it acts as the
owner, unless an agent has started it (`ksi.daemon.programs`)."""


def parse_priority(word: str | None) -> Priority:
    """The priority with this name; case does not matter, None means normal.

    Raises:
        InvalidData: no priority has this name.
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
    """Refuse free JSON that is nested too deeply for some reader's stack.

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


@cache
def schema(spec: EventSpec) -> Json:
    """The JSON Schemas of an event's request and reply, with descriptions. They are cached; do not change them."""
    reply = "reply" if spec.incoming else "data"
    return _schemas(
        {label: kind for label, kind in (("request", spec.request), (reply, spec.reply)) if kind is not None}
    )


def schema_of(kind: type[msgspec.Struct]) -> Json:
    """The JSON Schema of one type, as `it`, with those of the types that it holds."""
    return _schemas({"it": kind})


def _schemas(kinds: Mapping[str, type[msgspec.Struct]]) -> Json:
    shown, components = msgspec.json.schema_components(kinds.values())
    for name, kind in structs_in(kinds.values()).items():
        texts = descriptions(kind)
        for field in msgspec.structs.fields(kind):
            if field.name in texts:
                components[name]["properties"][field.encode_name]["description"] = plain(texts[field.name])
    result: Json = {"$defs": components} if components else {}
    result |= dict(zip(kinds, shown, strict=True))
    # Defaults may be tuples; the schema must be JSON.
    return cast(Json, msgspec.json.decode(msgspec.json.encode(result)))
