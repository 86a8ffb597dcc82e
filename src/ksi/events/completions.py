"""The data of the events about completion requests."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ksi.content.blocks import Content
from ksi.content.features import Native
from ksi.events.chains import ChainReply
from ksi.events.common import Data, ErrorBody, Json, Name, ReasonBody, Seconds, Seq, Span, UsageReply
from ksi.events.conversations import ForkBody
from ksi.request import ChainConfig, InjectionConfig, PatternsConfig


class MessageData(msgspec.Struct, omit_defaults=True):
    """One message of a dialogue. Its content is a text, or blocks with a `type`: text, image, document, tool_use,
    tool_result, thinking, redacted_thinking."""

    role: Literal["user", "assistant", "system", "developer", "tool"]
    """The speaker's role."""
    content: str | list[Json]
    """A text, or a list of [blocks](dialects.md#blocks)."""
    tool_call_id: str | None = None
    """With the role `tool` and a text: the id of the call whose result this is."""


class MessageBody(msgspec.Struct):
    """One message as stored."""

    role: str
    """The speaker's role."""
    content: Content
    """A text, or a list of [blocks](dialects.md#blocks)."""


class RetryData(Data):
    """How this request is retried; fields left out take the configured values. Times are in seconds."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] | None = None
    """Total number of attempts that may fail."""
    initial_delay: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """Upper bound of the first backoff, in seconds."""
    max_delay: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """Largest upper bound of the backoff, in seconds."""


ToolData = Json
"""A tool that the model may call: `name`, `description` and `input_schema`. One with a `type` is its vendor's own,
and may have any fields."""


class ToolChoice(Data):
    """Which tool the model must call; with `type: tool`, the named one."""

    type: Literal["auto", "any", "none", "tool"]
    """`auto`: the model decides. `any`: it must call one of the tools. `none`: it must call none. `tool`: it must call
    the named one."""
    name: str | None = None
    """With `tool`: the tool's name."""


class JsonSchema(Data):
    """The JSON Schema that an answer must fit."""

    schema: Json
    """The JSON Schema."""
    name: str = "answer"
    """The schema's name, for providers that require one."""
    strict: bool | None = None
    """If true, the provider enforces the schema as far as it can. If left out, the provider's default applies."""


class ResponseFormat(Data):
    """The form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    """`text`, `json_object` (any JSON object), or `json_schema` (JSON of a schema)."""
    json_schema: JsonSchema | None = None
    """With `json_schema`: the schema."""


class Reasoning(Data):
    """How much the model thinks before it answers: an effort by name, or a budget of tokens."""

    effort: Annotated[str, Meta(min_length=1, max_length=50)] | None = None
    """The name of an effort level, as the provider defines it."""
    budget_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    """The maximum number of tokens for thinking."""


class CompletionData(Data):
    """A completion request. Times in seconds; `not_before` in Unix time."""

    prompt: str | None = None
    """The prompt. Give either this or `messages`."""
    messages: Annotated[list[MessageData], Meta(min_length=1)] | None = None
    """A dialogue. Each message has a `role` (`user`, `assistant`, `system`, `developer`, `tool`) and a `content`, which
    is a text or a list of [blocks](dialects.md#blocks). System messages come first; the last message is the user's or a
    tool's."""
    model: Name | None = None
    """`provider/model`. If left out, `service.default_model` is used. A name without a slash means
    `claude-cli/<name>`."""
    session_id: Name | None = None
    """The conversation's name. If left out, a new conversation begins under a generated name."""
    conversation_id: Name | None = None
    """Alias of `session_id`."""
    request_id: Name | None = None
    """The request's id, which serves as an idempotency key: the same id with the same content answers with the present
    state of the request, and other content is `request_id_conflict`. If left out, an id is generated."""
    agent_id: Name | None = None
    """The agent that asks. It is stored with the request and with the conversation."""
    system: str | list[Json] | None = None
    """Instructions above the conversation, a text or blocks. They are not part of its history: send them with each
    request."""
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    """The maximum length of the answer, in tokens."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """0 to 2."""
    stop: str | list[str] | None = None
    """Stop sequences: the answer ends at any of these texts."""
    tools: Annotated[list[ToolData], Meta(max_length=10_000)] | None = None
    """[Tools](dialects.md#features) that the model may call: each a `name`, `description` and `input_schema`, or a
    vendor's own, which has a `type`."""
    tool_choice: Literal["auto", "any", "none"] | ToolChoice | None = None
    """Which tool the model must call: any, none, or with `type: "tool"` the named one."""
    parallel_tool_calls: bool | None = None
    """If false, an answer calls one tool at most."""
    response_format: ResponseFormat | None = None
    """The answer's form: `text`, `json_object`, or `json_schema` with a `schema`."""
    reasoning: Reasoning | None = None
    """How much the model thinks: the name of an `effort`, or `budget_tokens`."""
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Nucleus sampling: the share of probability that tokens are drawn from."""
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Sampling: the number of likeliest tokens to draw from."""
    seed: int | None = None
    """Sampling: the same seed gives the same choices, as far as the provider can."""
    service_tier: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    """`auto`, `default`, or another tier of the provider."""
    drop_unsupported: bool = False
    """Leave out features that no provider of the model supports, instead of refusing the request with `unsupported`."""
    native: Native | None = None
    """The whole request in a vendor's dialect, `anthropic` or `chat`, instead of `prompt`, `messages` and the other
    fields of the content. See [dialects](dialects.md)."""
    priority: str | None = None
    """`critical`, `high`, `normal`, `low` or `background`, in any case. The default is `normal`."""
    on_busy: Literal["enqueue", "reject", "interrupt"] = "enqueue"
    """If the conversation is taken: wait for it, be refused with `conversation_busy`, or cancel the holder and come
    next."""
    fork: bool = False
    """Begin a new conversation from the present end of `session_id`. The reply names it."""
    hold_on_retry: bool = True
    """Keep the conversation locked while the request waits for a retry."""
    hold: bool = False
    """Hold the request back, outside of the queue, until `completion:release`."""
    not_before: Seconds | None = None
    """Unix time before which the request does not run. Until then it holds no lock and is in no queue."""
    delay: Seconds | None = None
    """Seconds from now before which the request does not run. It cannot be combined with `not_before`."""
    ttl: Span | None = None
    """Seconds from now within which the request must start; otherwise it ends as `expired`."""
    timeout: Span | None = None
    """Seconds for one attempt. The default is `limits.timeout`."""
    retry: RetryData | None = None
    """`max_attempts`, `initial_delay` and `max_delay` of this request, instead of `[retry]`."""
    stream: bool = False
    """Also send the answer in pieces, as `completion:chunk`."""
    mcp_config: Name | Json | None = None
    """MCP servers, as in `.mcp.json`, or the path of such a file, relative to the home. Only providers that support
    MCP, such as `claude-cli`, are asked; if none of them serves the model, the request is refused with `invalid_data`.
    The file is read at each turn; one that cannot be read fails the request with `invalid_request`."""
    injection_config: InjectionConfig | None = None
    """Deliver the result to other conversations when the request has ended: see [injection](#injection)."""
    circuit_breaker_config: ChainConfig | None = None
    """Limits for the chain, and the parent request: see [chains](#chains)."""
    patterns: PatternsConfig | None = None
    """Settings of the pattern checks for this request, instead of `[patterns]`."""
    metadata: Json | None = None
    """Any JSON object of yours; it comes back with the request."""
    provider_options: Json | None = None
    """Options of one kind of provider; see [configuration](configuration.md#providers)."""
    traceparent: Annotated[str, Meta(max_length=200)] | None = None
    """Your span, in W3C's form: the request's spans stand below it, where traces are sent. It is no part of the
    content: the same request may come again with another one."""


class CancelData(Data):
    """Names one request, or a whole chain by its id."""

    request_id: Name | None = None
    """The request's id."""
    chain_id: Name | None = None
    """The id of a chain, instead of a request. The chain takes no new requests, and all of its requests that have not
    ended are cancelled."""


class GetData(Data):
    """Names one request.

    `after_seq` adds the later pieces of its running answer, `content` the prompt or messages.
    """

    request_id: Name
    """The request's id."""
    after_seq: Seq | None = None
    """Add the running answer's text after this piece; -1 for all of it."""
    content: bool = False
    """Add the request's content: its prompt or messages."""


class WaitData(Data):
    """Names one request and how long to wait for its end."""

    request_id: Name
    """The request's id."""
    timeout: Span | None = None
    """Seconds, after which the wait fails with `wait_timeout`."""
    stream: bool = False
    """Also send the answer in pieces, beginning with those that exist already."""
    after_seq: Seq | None = None
    """With `stream`: skip the pieces up to this one; -1 skips none."""


class ContentReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The content of a turn, as it was sent."""

    prompt: str | None = None
    """The prompt, if there was one."""
    messages: list[MessageBody] | None = None
    """The dialogue, if there was one."""
    system: Content | None = None
    """The instructions, a text or blocks."""
    native: Native | None = None
    """The whole request, if it came in a vendor's dialect."""


class AttemptReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One attempt in a request's trail."""

    attempt: int
    """The attempt's number, from 1."""
    provider: str
    """The provider that was asked."""
    outcome: str
    """`completed`, `failed`, `cancelled`, `interrupted` (the daemon died), `shutdown` (returned to the queue by an
    orderly stop), `parked` (its provider was limited, away, or only being probed; this does not count as an attempt) or
    `fenced` (its lock had passed on)."""
    started_at: float
    """Unix time."""
    duration_ms: float
    """Milliseconds."""
    model: str | None = None
    """The model that answered."""
    error: str | None = None
    """The class of its failure, see [errors](errors.md#failure-classes)."""
    message: str | None = None
    """The provider's error message."""
    usage: UsageReply | Literal["unknown"]
    """The tokens as the provider reported them; `unknown` if it reported none, which is not zero."""
    time_to_first_token_ms: float | None = None
    """Milliseconds to the first piece, if the answer came in pieces."""
    stop_reason: str | None = None
    """Why the answer ended."""
    node: str | None = None
    """The machine with the provider's session, if it is bound to one and several daemons share the store."""
    text: str | None = None
    """Text received by an attempt whose answer did not become the request's."""


class QuestionBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A question to a person about a request, and the answer once there is one."""

    kind: Literal["hold", "approval", "permission"]
    """`hold`: the sender holds the request back; `approval`: its chain stops until a person approves; `permission`: it
    has run, and asks for the permission to use a tool."""
    text: str
    """The question in words."""
    asked_at: float
    """Unix time of the question."""
    expires_at: float | None = None
    """Unix time from which a missing answer counts as a no."""
    code: Literal["depth", "cost", "risk"] | None = None
    """The reason why an approval is needed."""
    tool: str | None = None
    """The tool that a permission is needed for."""
    input: str | None = None
    """The tool's input, as JSON."""
    answer: Literal["yes", "no"] | None = None
    """The answer."""
    answered_at: float | None = None
    """Unix time of the answer."""
    by: str = ""
    """The person who answered."""
    why: str = ""
    """Why, as given."""


class RequestReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The present state of a request, with its `result` once it has completed. Also the data of `completion:result`."""

    request_id: str
    """Its id."""
    status: str
    """Its state: `scheduled`, `queued`, `running`, `retrying`, `parked`, `completed`, `failed`, `cancelled`, `blocked`
    or `expired`; `held` or `waiting_input` while it waits for a person's answer."""
    session_id: str
    """The conversation's name; send it to continue the conversation."""
    result: str | None = None
    """The answer's text, once it has completed."""
    blocks: list[Json] = []
    """The answer's [blocks](dialects.md#blocks), if it is more than its text."""
    error: ErrorBody | None = None
    """The reason for a missing answer: `code` and `message`."""
    provider_session_id: str | None = None
    """The id of the session at a provider that keeps dialogues itself."""
    model: str | None = None
    """The model that answered, as its provider names it."""
    requested_model: str | None = None
    """The model that was asked for."""
    provider: str | None = None
    """The provider that runs it or answered it."""
    priority: str | None = None
    """Its priority."""
    agent_id: str | None = None
    """The agent that asked."""
    usage: UsageReply | None = None
    """Tokens, summed over the attempts."""
    cost_usd: float | None = None
    """US dollars, as the providers reported them, otherwise by [price](configuration.md#prices). Absent if an attempt
    with a report has no price."""
    stop_reason: str | None = None
    """Why the answer ended: `end_turn`, `stop_sequence`, `max_tokens`, `tool_use`, `refusal`, `content_filter`,
    `context_window`, `pause_turn`, or another reason in the provider's own word."""
    truncated: bool = False
    """The answer was cut at a limit of tokens (`max_tokens` or `context_window`)."""
    note: str | None = None
    """A remark about the answer, such as which tools were denied."""
    duration_ms: float | None = None
    """From the start of its last attempt to its end."""
    queued_ms: float | None = None
    """From its arrival to the start of its first attempt."""
    enqueued_at: float | None = None
    """Unix time of its arrival."""
    started_at: float | None = None
    """Unix time of the start of the running attempt, or of the last one."""
    finished_at: float | None = None
    """Unix time of its end."""
    due_at: float | None = None
    """Unix time before which it does not run."""
    attempts: list[AttemptReply] = []
    """The ended attempts, in order."""
    interruptions: int = 0
    """How often the daemon died while it ran."""
    interrupted_by: str | None = None
    """The request that cancelled it by `on_busy: interrupt`."""
    requeued_from: str | None = None
    """The request that this one repeats."""
    chain_id: str | None = None
    """The id of its chain, which is the id of the chain's first request; absent without a chain."""
    parent_request_id: str | None = None
    """The id of the parent request."""
    ideation_depth: int | None = None
    """The request's depth in its chain; the first request has depth 0."""
    injection_id: str | None = None
    """The id of the delivery that this request carries."""
    reason: ReasonBody | None = None
    """The reason why it was blocked."""
    chain: ChainReply | None = None
    """[The chain's figures](#a-chains-figures), if the request was blocked."""
    position: int | None = None
    """While it waits for its conversation: the number of requests before it, from 0, exact to 1,000."""
    holder: str | None = None
    """The holder of its conversation, if that is another request."""
    node: str | None = None
    """The machine whose daemons alone may start it now, because its dialogue is stored there. Only if several daemons
    share the store."""
    question: QuestionBody | None = None
    """The question to a person about this request, if there is or was one."""
    paused: str | None = None
    """While an operator's pause holds it back: who paused it, since when, and why."""
    cancelling: bool = False
    """It was cancelled, and the provider's work is being stopped."""
    forked: ForkBody | None = None
    """The conversation that its last attempt forked; given only when the request has ended."""
    metadata: Json | None = None
    """The metadata, as they were sent."""
    content: ContentReply | None = None
    """The request's content; only if `completion:get` asks for it."""
    chunks_lost: bool = False
    """Some of the requested pieces are not kept any more; `result` has the whole text."""
    next_seq: int | None = None
    """With `after_seq`: the number of the next piece."""
    text_so_far: str | None = None
    """With `after_seq`: the running attempt's text after that piece."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class SubmitReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer to `completion:async`. `position` is the number of requests before it in its conversation's queue,
    from 0."""

    request_id: str
    """Its id."""
    status: Literal["ready", "queued", "blocked"]
    """State of the conversation: `ready` (it was free, with an empty queue), `queued`, or `blocked`."""
    session_id: str
    """The conversation's name."""
    state: str
    """State of the request: `running`, `queued`, `scheduled` or `blocked`."""
    position: int | UnsetType = UNSET
    """The number of requests before it in its conversation's queue, from 0, exact to 1,000."""
    conversation_locked: bool | UnsetType = UNSET
    """The conversation has a holder."""
    holder: str | None = None
    """The holder's id."""
    due_at: float | None = None
    """Unix time before which a delayed request does not run."""
    forked: ForkBody | None = None
    """The conversation that it forked, if it asked for a fork."""
    reason: ReasonBody | None = None
    """The reason why it was blocked."""
    chain: ChainReply | None = None
    """[The chain's figures](#a-chains-figures), if the request was blocked."""
    question: QuestionBody | None = None
    """The question that a person has to answer before the request is queued."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class CancelReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`status` is `cancelled`, or `already_final` with the final `state`.

    For a chain it is `closed`, with the number of requests that were cancelled.
    """

    request_id: str | None = None
    """The request's id."""
    chain_id: str | None = None
    """The chain's id."""
    status: Literal["cancelled", "already_final", "closed"]
    """`cancelled`, or `already_final` if it had already ended; for a chain `closed`."""
    state: str | None = None
    """The request's final state."""
    session_id: str | None = None
    """The conversation's name."""
    cancelled: int | None = None
    """The number of the chain's requests that were cancelled."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class ToolPieceBody(msgspec.Struct):
    """A piece of a tool call: append `partial_json` to the earlier pieces with the same id."""

    id: str
    """The call's id."""
    name: str
    """The tool's name."""
    partial_json: str
    """A piece of its input, in JSON."""


class ChunkPush(msgspec.Struct, kw_only=True):
    """A piece of a running answer. `seq` counts from 0 in each attempt; a new attempt voids the text of earlier
    ones."""

    request_id: str
    """The request's id."""
    attempt: int
    """The attempt's number; a new attempt voids the text of earlier ones."""
    seq: int
    """The piece's number, from 0 in each attempt."""
    text: str
    """The piece of text; empty for pieces of thinking and of tool calls."""
    thinking: str | UnsetType = UNSET
    """A piece of the model's thinking."""
    tool_use: ToolPieceBody | UnsetType = UNSET
    """A piece of a tool call: append `partial_json` to the earlier pieces with the same id."""


class ProgressPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request changed its state without ending."""

    request_id: str
    """The request's id."""
    session_id: str
    """The conversation's name."""
    status: str
    """Its state now: `running`, `queued`, `retrying`, `parked` or `waiting_input`."""
    attempt: int | None = None
    """The number of the attempt that runs or has ended."""
    provider: str | None = None
    """The provider that runs it."""
    due_at: float | None = None
    """Unix time of the next attempt."""
    error: str | None = None
    """The class of the failure."""


class FailedData(Data):
    """A client reports that a running attempt has failed, and why."""

    request_id: Name
    """The request's id."""
    reason: str = "provider_error"
    """A [failure class](errors.md#failure-classes)."""
    message: str | None = None
    """The failure as the client saw it."""


class FailedReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The effect of a reported failure."""

    request_id: str
    """The request's id."""
    status: Literal["retry_scheduled", "not_retryable", "not_running", "not_found"]
    """The effect of the report."""
    state: str | None = None
    """The request's state now."""
    due_at: float | None = None
    """Unix time of the next attempt."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class AlertPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An agent that does something unusual."""

    kind: Literal["equal_requests", "spending"]
    """`equal_requests`: it asked the same very often within an hour. `spending`: it spent far more than usual."""
    agent_id: str | None = None
    """The agent; left out for requests without one."""
    requests: int | None = None
    """With `equal_requests`: how often."""
    cost_usd: float | None = None
    """With `spending`: what it spent in this hour, in US dollars."""
    usual_usd: float | None = None
    """With `spending`: the mean of its hours in the last week."""
    since: float
    """When the hour began: Unix time."""
    request_id: str
    """The latest request."""
    message: str
    """All of it in one sentence."""


class ChainWarningPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The pattern checks suspect a chain: the score is at half the threshold or more, and the chain goes on."""

    chain_id: str
    """The id of its first request."""
    request_id: str
    """The request whose result it is about."""
    session_id: str
    """Its conversation."""
    agent_id: str | None = None
    """Whose request it is."""
    code: str
    """The kind of the finding: `no_progress`, `repetition`, ..."""
    message: str
    """The same in a sentence; the next reminder says it to the agents."""
    risk_score: float
    """Above 0, and below the threshold."""
    evidence: list[str] = []
    """All findings in words, and sentences that show them."""


class LoopPush(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An agent is in a loop, although all of its requests succeed."""

    kind: Literal["repeats", "turns"]
    """`repeats`: it asks the same again and again. `turns`: it continues one conversation again and again."""
    agent_id: str | None = None
    """The agent; absent if the requests name none."""
    session_id: str | None = None
    """The conversation; absent if the agent begins one conversation after another."""
    requests: int
    """The number of requests so far, each sent after an earlier one was answered."""
    since: float
    """Unix time when the first was sent."""
    last_at: float
    """Unix time when the latest was answered."""
    total_tokens: int
    """The tokens that they used."""
    cost_usd: float | None = None
    """The cost of them; absent if a price is unknown."""
    request_id: str
    """The latest request."""
    message: str
    """All of this in one sentence."""


class ChangedPush(msgspec.Struct, kw_only=True):
    """The number of events since the last such push, for clients that then ask again for the state they show."""

    events: dict[str, int]
    """The number of events of each name."""
