"""Chains in the store: members, usage, the reason if one was stopped; and the one check of their limits. A chain is the
tree of requests that descend from one request, and is named by that root's `request_id`. It is written when a request
belongs to one for sure: it has a parent, limits of its own, or an injection that will make a second hop.

Times are microseconds of wall time. `check` is the rule that every store follows; it knows no machine.
"""

from __future__ import annotations

import msgspec

from ksi.budgets.rules import Demand
from ksi.request import Attempt, State
from ksi.store.questions import Question
from ksi.tokens import CHARACTERS_PER_TOKEN


class ChainLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a chain."""

    max_depth: int
    """Maximum depth; a deeper request is blocked. The root has depth 0."""
    token_budget: int
    """Input and output tokens of all its requests together."""
    time_window: int
    """Age at which nothing of it begins any more, in microseconds."""

    def within(self, other: ChainLimits) -> ChainLimits:
        """The minimum of both: a descendant can only lower the limits."""
        return ChainLimits(
            max_depth=min(self.max_depth, other.max_depth),
            token_budget=min(self.token_budget, other.token_budget),
            time_window=min(self.time_window, other.time_window),
        )


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request of a chain does not run: `code` for programs, `message` for people."""

    code: str
    """`max_depth`, `token_budget`, `time_window`, `chain_closed`; from the patterns `repetition`, `cycle`, `growth`,
    `collapse`, `error_loop`, `no_progress`, `judge`."""
    message: str
    risk_score: float | None = None
    """0..1, if patterns were the reason."""
    evidence: tuple[str, ...] = ()


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """A chain's figures as a check sees them."""

    started_at: int
    """When the chain, or its time since the last reset, began."""
    used: int = 0
    """Tokens charged since the last reset."""
    reserved: int = 0
    """Tokens reserved for running requests."""
    closed: bool = False
    """It was cancelled: it takes no new members."""
    tripped: Block | None = None
    """The finding of the patterns; it holds until an operator resets the chain."""


class Grant(msgspec.Struct, frozen=True):
    """A request may run: its reservation."""

    output_cap: int
    """The most output tokens that it may ask the provider for."""
    reserved: int


def check(spending: Spending, limits: ChainLimits, depth: int, now: int, *, estimate: int = 0) -> Block | None:
    """The reason against a new member; None if it may enter. `now` is wall time.

    `estimate` is its input in tokens: one that leaves no token for an answer need not wait for running requests.
    """
    if spending.closed:
        return Block(code="chain_closed", message="the chain was cancelled and takes no new requests")
    if spending.tripped is not None:
        return spending.tripped
    if depth > limits.max_depth:
        return Block(code="max_depth", message=f"depth {depth} is over the chain's max_depth {limits.max_depth}")
    if now - spending.started_at > limits.time_window:
        age, window = (now - spending.started_at) // 1_000_000, limits.time_window // 1_000_000
        return Block(code="time_window", message=f"the chain is {age} s old, over its time_window of {window} s")
    if max(spending.used + spending.reserved, spending.used + estimate) >= limits.token_budget:
        return _spent(spending, limits, estimate)
    return None


def admit(
    spending: Spending, limits: ChainLimits, depth: int, now: int, *, estimate: int, output_cap: int
) -> Block | Grant:
    """Decide if a member may run now, and with how many tokens.

    `estimate` is its input and `output_cap` the most output it wants, both in tokens. The output is cut to the
    remaining budget; if not even one token is left after the input, it is blocked.
    """
    block = check(spending, limits, depth, now, estimate=estimate)
    if block is not None:
        return block
    left = limits.token_budget - spending.used - spending.reserved - estimate
    if left < 1:
        return _spent(spending, limits, estimate)
    cap = min(output_cap, left)
    return Grant(cap, estimate + cap)


def _spent(spending: Spending, limits: ChainLimits, estimate: int) -> Block:
    message = f"{spending.used} tokens used and {spending.reserved} set aside of the chain's {limits.token_budget}"
    if estimate > 0:
        message += f"; this request's input is about {estimate}"
    return Block(code="token_budget", message=message)


def charge(attempt: Attempt, estimate: int) -> tuple[int, bool]:
    """The cost of an ended attempt for its chain in tokens, and True if it is an estimate."""
    if attempt.usage is not None:
        return attempt.usage.input_tokens + attempt.usage.output_tokens, False
    return estimate + len(attempt.text or "") // CHARACTERS_PER_TOKEN, True


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """How a new request belongs to a chain."""

    limits: ChainLimits
    """Its own wish within the daemon's maxima; the store takes the minimum with its parent's."""
    parent: str | None = None
    """The parent request; None for a root."""
    injects: bool = False
    """Its end has to be routed to other conversations."""
    estimate: int = 0
    """Input tokens, estimated."""
    output_cap: int = 0
    """The most output tokens that it wants."""
    block: Block | None = None
    """An earlier finding against it: it is kept as blocked, and the chain is tripped if `trips`."""
    trips: bool = False
    guard: bool = False
    """It tells of a block: limits and trips do not bind it, and there are at most `StoreRules.guard_messages`."""
    mark: bytes | None = None
    """Its mark for the pattern checks of later hops; the store does not read it."""
    risk_score: float = 0.0
    """The risk score of the pattern checks, 0 to 1; the store does not read it."""


class MemberGrant(msgspec.Struct, frozen=True, kw_only=True):
    """The chain's facts for a running member."""

    chain: str
    depth: int
    parent: str | None
    output_cap: int | None
    """The most output tokens that it may ask for; None for a guard message."""
    injects: bool


class Reminder(msgspec.Struct, frozen=True, kw_only=True):
    """A waiting result that goes before a conversation's next prompt (mode `next`)."""

    injection_id: str
    text: str


class FollowUp(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery of a finished request's result. Its id is `<parent>/<number>`."""

    injection_id: str
    target: str
    """The conversation's name; it is created if it does not exist."""
    trigger: str
    text: str
    """The wrapped result."""
    child: ChildRequest | None = None
    """Mode `direct`: the request that carries it. None: mode `next`."""
    block: Block | None = None
    """An earlier finding against it: it is a dead letter at once."""
    guard: bool = False


class ChildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request of a direct delivery; its id, chain, parent and depth are the follow-up's."""

    body: bytes
    route: str
    rank: int
    model: str
    priority: int
    membership: Membership
    agent_id: str | None = None
    demand: Demand = ()
    """Its caps at each provider of its route; empty without budgets."""
    error: str | None = None
    """It cannot be asked for (its model is not served any more): a dead letter with this reason."""
    question: Question | None = None
    """The question that a person has to answer before it joins the queue."""


class Aftermath(msgspec.Struct, frozen=True, kw_only=True):
    """The consequences of a request's end: its follow-ups, and its effect on the chain."""

    follow_ups: tuple[FollowUp, ...] = ()
    mark: bytes | None = None
    """Its result's mark, in addition to the prompt's."""
    trip: Block | None = None
    """The patterns are over the threshold: the chain takes no more members until it is reset."""
    passage: str = ""
    """The common text of its follow-ups, word for word: a store may keep it once."""


class InjectionState(msgspec.Struct, frozen=True):
    """The words of `InjectionView.state`."""

    QUEUED = "queued"
    """On its way: a child request that has not ended, or a reminder that waits for a prompt."""
    TAKEN = "taken"
    """A reminder in the prompt of a running request."""
    DELIVERED = "delivered"
    BLOCKED = "blocked"
    """A dead letter: a chain's limit stood against it."""
    FAILED = "failed"
    """A dead letter: its request ended without an answer."""
    RETRIED = "retried"
    """It was a dead letter, and was sent again under another id."""


class InjectionView(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery, as it stands."""

    injection_id: str
    chain: str
    parent: str
    """The request whose result it is."""
    target: str
    mode: str
    """`direct` or `next`."""
    trigger: str
    state: str
    """One of `InjectionState`."""
    created_at: int
    finished_at: int | None = None
    request_id: str | None = None
    """The request that carries or carried it."""
    reason: Block | None = None
    text: str = ""
    child: ChildRequest | None = None
    """The facts that a retry needs, for a dead letter in mode `direct`."""


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """The written follow-ups, and the deliveries whose carrier ended."""

    injections: tuple[InjectionView, ...] = ()
    """Changed in this step, without text and child: to be published as events."""


class ChainView(msgspec.Struct, frozen=True, kw_only=True):
    """A chain's figures."""

    chain: str
    created_at: int
    limits: ChainLimits
    """The minimum over the given request and its ancestors; for a chain as a whole, its root's."""
    spending: Spending
    members: int
    """Kept requests, without notices of blocks."""
    depth: int
    """The depth of the given request; for a chain as a whole, the deepest member's."""
    estimated: int
    """The estimated part of `spending.used`."""
    unfinished: int
    """Members that are not final."""
    guard_messages: int
    resets: int


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One request on the way from a chain's root, for the pattern checks."""

    request_id: str
    depth: int
    conversation: str
    agent_id: str | None
    state: State
    error: str | None
    mark: bytes | None
    """The mark of its prompt."""
    result: bytes | None
    """The mark of its result, once it ended."""


class Trail(msgspec.Struct, frozen=True, kw_only=True):
    """A request's way: its chain's figures, and the hops from it back to the root, the nearest first."""

    view: ChainView
    hops: tuple[Hop, ...]


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a chain, for the tree (in the order of arrival)."""

    request_id: str
    parent: str | None
    depth: int
    conversation: str
    agent_id: str | None
    state: State
    enqueued_at: int
    finished_at: int | None
    tokens: int
    """Charged to the chain by it."""
    estimated: bool
    reason: Block | None
    """The reason why it was blocked."""


class ClosedChain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain that takes no more members, and which of them are not final yet."""

    chain: str
    unfinished: tuple[str, ...]
    """At most a few hundred: close it again for the rest."""
