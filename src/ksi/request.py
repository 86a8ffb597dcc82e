"""The nouns: request, attempt, usage, priority, and the one state table. They know no machine."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ksi.clock import MICROSECONDS
from ksi.content.blocks import Content, Message, text_of, weight_of
from ksi.content.features import NO_FEATURES, Asked, Features, Native
from ksi.content.native import read_dialogue, read_native

Json = dict[str, Any]


class Priority(IntEnum):
    """How urgent a request is. Lower comes first."""

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
"""The head start that puts `critical` before all others: a hundred thousand years."""


class HeadStarts(msgspec.Struct, frozen=True, kw_only=True):
    """The head start of each priority, in microseconds.

    It is also the longest that a higher priority can make a lower one wait; `critical` is beyond all bounds.
    """

    high: int
    normal: int
    low: int
    background: int
    critical: int = CRITICAL_HEAD_START

    def rank(self, priority: Priority, at: int) -> int:
        """A place in every line: lowest first, ties by arrival. `at` is when it came, or is due if it was delayed."""
        starts = (self.critical, self.high, self.normal, self.low, self.background)
        return at - starts[priority]


def full_model(model: str | None, default: str) -> str:
    """A model's full name, `provider/model`; bare names mean Claude Code, as in V1."""
    model = model or default
    return model if "/" in model else f"claude-cli/{model}"


class State(StrEnum):
    """The state of a request."""

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
        """True if it never changes again."""
        return not TRANSITIONS[self]


# Drawn in docs/reference/states.md. `running -> queued`: daemon lost or shut down.
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
"""The possible first states of a request."""

FINAL_STATES = frozenset(s for s in State if s.final)
WAITING_STATES = frozenset({State.SCHEDULED, State.QUEUED, State.RETRYING, State.PARKED})


def may_become(before: State, after: State) -> bool:
    """True if the state table has this step."""
    return after in TRANSITIONS[before]


class OnBusy(StrEnum):
    """The behaviour of a request whose conversation is taken."""

    ENQUEUE = "enqueue"
    REJECT = "reject"
    INTERRUPT = "interrupt"


UNPRICED = -1e-300
"""`Usage.cost_usd` of a call that no price fits, such as one in another service tier than the lists are for. Its cost
is unknown, and stays so whatever price is configured later. It is too small to change a sum."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Tokens as the provider reported them.

    `cost_usd` is the cost in US dollars as reported by the provider, or UNPRICED. With None it follows from the tokens.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float | None = None

    @property
    def input_size(self) -> int:
        """All input, including tokens read from a cache or written to one."""
        return self.input_tokens + self.cache_read_tokens + self.cache_write_tokens

    def plus(self, other: Usage) -> Usage:
        """The sum of two reports; it has a cost only if both have, and is UNPRICED if one of them is."""
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


class RetryBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's own settings for retries; the configuration fills in the rest. Times in seconds."""

    max_attempts: int | None = None
    initial_delay: float | None = None
    max_delay: float | None = None


ORIGINATING = "originating"
"""The target that means the request's own conversation."""

PatternCode = Literal["repetition", "cycle", "growth", "collapse", "error_loop", "no_progress", "judge"]
"""The kinds of findings of the pattern checks."""

_Name = Annotated[str, Meta(min_length=1, max_length=65_536)]


class InjectionConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The delivery of a request's result when it has ended."""

    enabled: bool = True
    """Deliver the result."""
    trigger_type: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$(?!\n)")] = "general"
    """The template: `research`, `coordination`, `memory`, `antThinking`, `general`, or your own in `var/templates`."""
    target_sessions: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=100)] = (ORIGINATING,)
    """The target conversations, created if they do not exist; `originating` is the request's own."""
    follow_up_guidance: Annotated[str, Meta(max_length=16_384)] | None = None
    """Instructions for the reader of the result."""
    mode: Literal["direct", "next"] = "direct"
    """`direct`: a request of its own in the target; `next`: before the target's next prompt, together with other
    deliveries that wait there."""
    inherit: bool | Literal["same", "reply"] = False
    """The delivery of the result of a direct delivery's own request: none, the `same` as for this one, or `reply`,
    which returns it to the sending conversation."""

    def __post_init__(self) -> None:
        if self.inherit is True:
            raise ValueError('inherit is false, "same" or "reply", not true')


class ApproveAt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The points at which a chain stops until a person has approved its next request."""

    depth: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Each request at this depth or deeper needs a word; the chain's first one has depth 0."""
    cost_usd: Annotated[float, Meta(ge=0, le=1e12)] | None = None
    """Each request needs one once the chain has cost so many US dollars. A cost that is not known counts as reached."""
    risk: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Each request needs one for which the pattern checks see a risk_score from this on."""
    timeout: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """Seconds, after which no answer is a no; without it `chain.approval_timeout`."""

    def strictest(self, other: ApproveAt | None) -> ApproveAt:
        """Asks if either of the two would ask."""
        if other is None:
            return self
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__struct_fields__}
        return ApproveAt(**{name: min(filter(_given, both), default=None) for name, both in pairs.items()})


def _given(value: float | None) -> bool:
    return value is not None


class ChainConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits that a request wants for its chain, within the daemon's own. Times in seconds."""

    max_depth: Annotated[int, Meta(ge=0, le=1_000_000)] = 5
    """Maximum depth; a deeper request is blocked. The first request has depth 0."""
    token_budget: Annotated[int, Meta(ge=1, le=1_000_000_000_000)] = 50_000
    """Input and output tokens of all the chain's requests."""
    time_window: Annotated[float, Meta(gt=0, le=1e9)] = 3600.0
    """Seconds after which no request of the chain starts."""
    parent_request_id: _Name | None = None
    """The id of the parent request; this request joins its chain."""
    approve_at: ApproveAt | None = None
    """The point from which a person has to approve each request; it also holds for all descendants."""


class PatternsConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's settings of the pattern checks; fields left out take the configured values."""

    enabled: bool | None = None
    """Check the request's chain for patterns."""
    threshold: Annotated[float, Meta(gt=0, le=1)] | None = None
    """The risk score at which its chain is blocked."""
    ignore: tuple[PatternCode, ...] = ()
    """Findings to ignore."""


class RequestBody(Features, frozen=True, kw_only=True, omit_defaults=True):
    """A request's content as it is stored: normalised, without request_id and stream.

    Two submissions mean the same when their canonical bytes are equal. Times in seconds.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    model: str | None = None
    session_id: str | None = None
    agent_id: str | None = None
    system: Content | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    drop_unsupported: bool = False
    native: Native | None = None
    """If given, it has the content, and the fields for that are empty (`ksi.content.native`)."""
    priority: int = int(Priority.NORMAL)
    on_busy: str = OnBusy.ENQUEUE.value
    fork: bool = False
    hold_on_retry: bool = True
    hold: bool = False
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
        """True if it asks for MCP servers; an empty configuration names none."""
        return bool(self.mcp_config)

    def dialogue(self) -> tuple[Message, ...]:
        """The new content of this turn: the messages, or the prompt as one. None of a native request that its dialect's
        reader does not understand."""
        if self.native is not None:
            return read_dialogue(self.native)
        return self.messages or (Message("user", self.prompt or ""),)

    @property
    def features(self) -> Features:
        """The features that it asks for in the normal form."""
        if self.featureless:
            return NO_FEATURES
        return Features(**{name: getattr(self, name) for name in Features.__struct_fields__})

    @property
    def plain(self) -> bool:
        """True if it holds text alone, so that every provider supports it."""
        if self.native is not None or not (self.system is None or isinstance(self.system, str)):
            return False
        return self.featureless and (not self.messages or all(isinstance(m.content, str) for m in self.messages))

    def asked(self) -> Asked:
        """Its content in the normal form, also if it came in a dialect.

        Raises:
            InvalidData: it is no request of its dialect.
        """
        if self.native is not None:
            return read_native(self.native)
        return Asked(
            messages=self.dialogue(),
            system=self.system,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            stop=self.stop,
            features=self.features,
        )


_body_encoder = msgspec.json.Encoder(order="deterministic")
_body_decoder = msgspec.json.Decoder(RequestBody)


def encode_body(body: RequestBody) -> bytes:
    """The canonical bytes."""
    return _body_encoder.encode(body)


def decode_body(data: bytes) -> RequestBody:
    """The request with these canonical bytes."""
    return _body_decoder.decode(data)


def said_in(body: RequestBody) -> str:
    """The text of this turn's new content. A native request carries the turns before it too: they are left out."""
    messages = body.dialogue()
    if body.native is not None:
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        messages = messages[answers[-1] + 1 :] if answers else messages
    return "\n".join(text_of(message.content) for message in messages)


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
    """Its lock had passed on; its answer was kept here and used nowhere else."""


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One try at a request, ended. Times in microseconds of wall time.

    `usage` None means that no report came: unknown, never zero.
    """

    number: int
    provider: str
    outcome: Outcome
    started_at: int
    finished_at: int
    model: str | None = None
    """The model that answered, as the provider names it."""
    asked: str | None = None
    """The full name of the model requested from this provider: a fallback's if one was asked."""
    mcp: bool = False
    """True if it had MCP servers."""
    text: str | None = None
    content: tuple[Json, ...] = ()
    """The answer's blocks, if it is more than its text."""
    usage: Usage | None = None
    stop_reason: str | None = None
    provider_session: str | None = None
    node: str | None = None
    """The machine with `provider_session`, if it is bound to one of several."""
    last_message: str | None = None
    """A stateful provider's id of the answer's last message: the next turn continues after it."""
    fork: str | None = None
    """A fork that was seen on the way: `new_session` or `foreign_turn` by the provider, or `node_lost`."""
    error: str | None = None
    """A FailureClass word."""
    message: str | None = None
    """Why it failed; for a completed one, a remark for programs in addition to the text."""
    first_token_us: int | None = None
    """Microseconds from the start to the first piece of text."""
    raw: bytes | None = None
    """The provider's reply, as JSON, for the response log."""


BATCH = "batch_"
"""The prefix of the ids that `ksi batch` gives to the lines of its file."""

CUT_SHORT = frozenset({"max_tokens", "context_window"})
"""Stop reasons of an answer that was cut before its end."""


def said_chars(attempt: Attempt) -> int:
    """How much an attempt's answer is, its text and its blocks."""
    return len(attempt.text or "") + weight_of(attempt.content)


def answer_chars(attempt: Attempt) -> int:
    """The size of an attempt's answer, including its provider's reply."""
    return said_chars(attempt) + len(attempt.raw or b"")


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
    """The conversation that it was made in: a fork's history begins in its parent."""
    reminders: tuple[str, ...] = ()
    """The reminders before its prompt."""
    node: str | None = None
    """The machine with `provider_session`, if it is bound to one of several."""
    content: tuple[Json, ...] = ()
    """The answer's blocks, if it is more than its text."""

    @property
    def chars(self) -> int:
        """How much it is to read."""
        return len(self.body) + len(self.text) + weight_of(self.content) + sum(map(len, self.reminders))
