"""The nouns: request, attempt, usage, priority, and the one state table. They know no machine."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ksi.clock import MICROSECONDS

Json = dict[str, Any]


class Priority(IntEnum):
    """How urgent a request is (promise Q1). Lower comes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BACKGROUND = 4

    @property
    def word(self) -> str:
        """The wire word, lower case."""
        return _PRIORITY_NAMES[self]


_PRIORITY_NAMES = tuple(p.name.lower() for p in Priority)
PRIORITY_WORDS: dict[str, Priority] = {p.word: p for p in Priority}

CRITICAL_HEAD_START = 100_000 * 365 * 86_400 * MICROSECONDS
"""What puts `critical` before all others: a head start of a hundred thousand years."""


class HeadStarts(msgspec.Struct, frozen=True, kw_only=True):
    """What each priority passes others by, in microseconds (promise Q2).

    It is also the longest that a higher priority can make a lower one wait; `critical` is beyond all bounds.
    """

    high: int
    normal: int
    low: int
    background: int
    critical: int = CRITICAL_HEAD_START

    def rank(self, priority: Priority, at: int) -> int:
        """A place in every line: lowest first, ties by arrival. `at` is when it came, or is due if it was delayed."""
        start: int = getattr(self, priority.word)
        return at - start


def full_model(model: str | None, default: str) -> str:
    """A model's full name, `provider/model`; bare names mean Claude Code, as in V1."""
    model = model or default
    return model if "/" in model else f"claude-cli/{model}"


class State(StrEnum):
    """Where a request is."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    PARKED = "parked"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    BLOCKED = "blocked"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """Whether it never changes again."""
        return not TRANSITIONS[self]


# Drawn in ARCHITECTURE.md. `running -> queued`: daemon lost or shut down.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.SCHEDULED: frozenset({State.QUEUED, State.CANCELLED, State.EXPIRED}),
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.BLOCKED, State.EXPIRED}),
    State.RUNNING: frozenset(
        {State.COMPLETED, State.FAILED, State.CANCELLED, State.RETRYING, State.PARKED, State.QUEUED}
    ),
    State.RETRYING: frozenset({State.QUEUED, State.CANCELLED, State.FAILED}),
    State.PARKED: frozenset({State.QUEUED, State.CANCELLED, State.FAILED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.BLOCKED: frozenset(),
    State.EXPIRED: frozenset(),
}

FIRST_STATES = frozenset({State.SCHEDULED, State.QUEUED, State.RUNNING, State.BLOCKED})
"""Where a new request can begin."""

FINAL_STATES = frozenset(s for s in State if s.final)
WAITING_STATES = frozenset({State.SCHEDULED, State.QUEUED, State.RETRYING, State.PARKED})


def may_become(before: State, after: State) -> bool:
    """Whether the state table has this step."""
    return after in TRANSITIONS[before]


class OnBusy(StrEnum):
    """What a request does when its conversation is taken (promise L3)."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    INTERRUPT = "interrupt"


UNPRICED = -1e-300
"""`Usage.cost_usd` of a call that no price fits, such as one in another service tier than the lists are for. Its cost
is unknown, and stays so whatever price is configured later. It is too small to change a sum."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Tokens as the provider reported them (promise T1).

    `cost_usd` is the cost in US dollars as the provider told it, or UNPRICED. With None it follows from the tokens.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = None

    @property
    def input_size(self) -> int:
        """All input, what came from a cache or went into one included."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens

    def plus(self, other: Usage) -> Usage:
        """The sum of two reports; a cost is told only where both are, and UNPRICED where one of them is."""
        cost = None
        if self.cost_usd is not None and other.cost_usd is not None:
            cost = self.cost_usd + other.cost_usd
        if UNPRICED in (self.cost_usd, other.cost_usd):
            cost = UNPRICED
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cost_usd=cost,
        )


class MessageBody(msgspec.Struct, frozen=True):
    """One message of a request."""

    role: str
    content: str


class RetryBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request says about its own retries; the configuration fills in the rest (F2). Times in seconds."""

    max_attempts: int | None = None
    initial_delay: float | None = None
    max_delay: float | None = None


ORIGINATING = "originating"
"""The target that means the request's own conversation."""

PatternCode = Literal["repetition", "cycle", "growth", "collapse", "error_loop"]
"""What the pattern checks can find (C7)."""

_Name = Annotated[str, Meta(min_length=1, max_length=65_536)]


class InjectionConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a request's result goes when it ended (C1)."""

    enabled: bool = True
    trigger_type: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$(?!\n)")] = "general"
    """The template's name."""
    target_sessions: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=100)] = (ORIGINATING,)
    """Conversations; one that is named twice is a target once."""
    follow_up_guidance: Annotated[str, Meta(max_length=16_384)] | None = None
    mode: Literal["direct", "next"] = "direct"
    """`direct`: a request of its own in the target; `next`: before the target's next prompt (C2)."""
    inherit: bool | Literal["same", "reply"] = False
    """What the child of a direct delivery does with its own result: nothing; `same` as this request; or `reply`, it
    goes back into the conversation that sent."""

    def __post_init__(self) -> None:
        if self.inherit is True:
            raise ValueError('inherit is false, "same" or "reply", not true')


class ChainConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits that a request wants for its chain (C5), within the daemon's own. Times in seconds."""

    max_depth: Annotated[int, Meta(ge=0, le=1_000_000)] = 5
    token_budget: Annotated[int, Meta(ge=1, le=1_000_000_000_000)] = 50_000
    time_window: Annotated[float, Meta(gt=0, le=1e9)] = 3600.0
    parent_request_id: _Name | None = None
    """The request that it was born of: it joins that one's chain."""


class PatternsConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request says about the pattern checks (C7); what is not given is as configured."""

    enabled: bool | None = None
    threshold: Annotated[float, Meta(gt=0, le=1)] | None = None
    """The risk_score from which its chain is blocked."""
    ignore: tuple[PatternCode, ...] = ()
    """Findings that do not count."""


class RequestBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's content as it is stored: normalised, without request_id and stream (Q4).

    Two submissions mean the same when their canonical bytes are equal. Times in seconds.
    """

    prompt: str | None = None
    messages: tuple[MessageBody, ...] = ()
    model: str | None = None
    session_id: str | None = None
    agent_id: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    priority: int = int(Priority.NORMAL)
    on_busy: str = OnBusy.ENQUEUE.value
    fork: bool = False
    hold_on_retry: bool = True
    not_before: float | None = None
    delay: float | None = None
    ttl: float | None = None
    timeout: float | None = None
    retry: RetryBody | None = None
    mcp_config: Json | str | None = None
    injection_config: InjectionConfig | None = None
    circuit_breaker_config: ChainConfig | None = None
    patterns: PatternsConfig | None = None
    metadata: Json | None = None
    provider_options: Json | None = None

    @property
    def mcp(self) -> bool:
        """Whether it asks for MCP servers; an empty configuration names none."""
        return bool(self.mcp_config)

    def dialogue(self) -> tuple[MessageBody, ...]:
        """What is said in this turn: the messages, or the prompt as one."""
        return self.messages or (MessageBody("user", self.prompt or ""),)


_body_encoder = msgspec.json.Encoder(order="deterministic")
_body_decoder = msgspec.json.Decoder(RequestBody)


def encode_body(body: RequestBody) -> bytes:
    """The canonical bytes."""
    return _body_encoder.encode(body)


def decode_body(data: bytes) -> RequestBody:
    """What the canonical bytes say."""
    return _body_decoder.decode(data)


class Outcome(StrEnum):
    """How one attempt ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The daemon died under it."""
    PARKED = "parked"
    """The provider was limited or away, or was only being probed: no failure of the request, and not counted as one."""
    SHUTDOWN = "shutdown"
    """The daemon stopped in order and gave the request back to the queue."""
    FENCED = "fenced"
    """Its lock had passed on; what it brought was kept here and went nowhere else (F10)."""


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One try at a request, ended. Times in microseconds of wall time.

    `usage` None means that no report came: unknown, never zero (T1).
    """

    number: int
    provider: str
    outcome: Outcome
    started_at: int
    finished_at: int
    model: str | None = None
    """The model that answered, as the provider names it."""
    asked: str | None = None
    """The full name of the model that was asked for at this provider: a fallback's where one was asked (F4)."""
    mcp: bool = False
    """Whether it had MCP servers."""
    text: str | None = None
    usage: Usage | None = None
    stop_reason: str | None = None
    provider_session: str | None = None
    node: str | None = None
    """The machine that `provider_session` lives on, where it lives on one of several (D4)."""
    last_message: str | None = None
    """A stateful provider's id of the answer's last message: the next turn goes on behind it (F9)."""
    fork: str | None = None
    """A fork that was seen on the way: `new_session` or `foreign_turn` by the provider (L7), or `node_lost` (D4)."""
    error: str | None = None
    """A FailureClass word."""
    message: str | None = None
    """Why it failed; of one that completed, what a program should know beside the text."""
    first_token_us: int | None = None
    """Microseconds from the start to the first piece of text."""
    raw: bytes | None = None
    """What the provider sent, as JSON, for the response log (R3)."""


CUT_SHORT = frozenset({"max_tokens", "context_window"})
"""Stop reasons of an answer that was cut before its end."""


def answer_chars(attempt: Attempt) -> int:
    """How much an attempt's answer is, text and raw together."""
    return len(attempt.text or "") + len(attempt.raw or b"")


class Turn(msgspec.Struct, frozen=True):
    """One completed exchange of a conversation: the request's body and the answer's text."""

    id: int
    body: bytes
    text: str
    provider: str
    provider_session: str | None
    finished_at: int
    previous: int | None
    """The turn before it; None at the conversation's beginning."""
    last_message: str | None = None
    """The provider's id of its last message."""
    conversation: str = ""
    """Where it was made: a fork's history begins in its parent."""
    reminders: tuple[str, ...] = ()
    """What went before its prompt (C2)."""
    node: str | None = None
    """The machine that `provider_session` lives on, where it lives on one of several (D4)."""
