"""The data of the events about chains and injections."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from ksi.events.common import Data, Name, PageData, ReasonBody


class ChainStatusData(PageData):
    """One chain, named by its id or by any of its requests; without either, a page of chains. `members` adds its
    requests."""

    request_id: Name | None = None
    """Any request of the chain. Depth and limits are then those of this request."""
    chain_id: Name | None = None
    """The chain's id. Without it or `request_id`, the reply is a page of all chains, the newest first."""
    members: bool = False
    """Add a page of the chain's requests, in order of arrival."""


class ChainName(Data):
    """Names one chain, by its id or by any of its requests."""

    request_id: Name | None = None
    """Any request of the chain, instead of `chain_id`."""
    chain_id: Name | None = None
    """The chain's id."""


class InjectionStatusData(PageData):
    """One delivery with its text, or a page of all or of those in one `state`. `blocked` and `failed` deliveries are
    dead letters."""

    injection_id: Name | None = None
    """The delivery's id. Without it, the reply is a page, the newest first."""
    state: Literal["queued", "taken", "delivered", "blocked", "failed", "retried"] | None = None
    """Only deliveries in this state."""


class InjectionId(Data):
    """Names one delivery."""

    injection_id: Name
    """The id of a delivery that is `blocked` or `failed`."""


class ChainReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A chain's figures. Limits are the minimum over the given request and its ancestors; times are in seconds."""

    chain_id: str
    """The id of the chain's first request."""
    state: Literal["open", "tripped", "exhausted", "closed"]
    """`tripped`: the pattern checks stopped it; `exhausted`: its budget or time is used up; `closed`: it was
    cancelled."""
    ideation_depth: int
    """The depth of the given request, or of the deepest one."""
    max_depth: int
    """The depth limit. This and the other limits are the minimum over the request and its ancestors."""
    tokens_used: int
    """Tokens charged since the chain began or was reset."""
    tokens_estimated: int
    """The part of `tokens_used` that is estimated, because no provider reported it."""
    tokens_reserved: int
    """Tokens reserved for the requests that run now."""
    token_budget: int
    """The limit of input and output tokens together."""
    age: float
    """Seconds since the chain began or was reset."""
    time_window: float
    """The limit of `age`, in seconds."""
    members: int
    """The number of requests in the chain, without notices of blocks."""
    unfinished: int
    """The number of them that have not ended."""
    guard_messages: int
    """Notices of blocks that were sent past its limits."""
    resets: int
    """How often an operator reset the chain."""
    created_at: float
    """Unix time."""
    reason: ReasonBody | None = None
    """The reason why the chain is not open."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class MemberReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request of a chain, in the order of arrival."""

    request_id: str
    """Its id."""
    parent_request_id: str | None = None
    """The id of the parent request."""
    depth: int
    """The request's depth in the chain."""
    session_id: str
    """Its conversation."""
    agent_id: str | None = None
    """The agent that asked."""
    status: str
    """Its state."""
    enqueued_at: float
    """Unix time of its arrival."""
    finished_at: float | None = None
    """Unix time of its end."""
    tokens: int
    """Tokens charged for it."""
    estimated: bool = False
    """`tokens` contains an estimate."""
    reason: ReasonBody | None = None
    """The reason why it was blocked."""


class ChainStatusReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One chain with an optional page of its requests, or a page of chains."""

    chain: ChainReply | None = None
    """[The chain's figures](#a-chains-figures)."""
    requests: list[MemberReply] | UnsetType = UNSET
    """A page of its requests: `tokens` is the number charged for each, `estimated` says that it contains an estimate,
    and `reason` why it was blocked."""
    chains: list[ChainReply] | UnsetType = UNSET
    """Without an id: [the figures of each chain](#a-chains-figures)."""
    cursor: str | None = None
    """The beginning of the next page; absent at the end."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class InjectionReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One delivery of a result; also the data of the `injection:*` events. `text` is given only for a single
    delivery."""

    injection_id: str
    """The request's id and a number."""
    state: str
    """`queued`, `taken` (in the prompt of a running request), `delivered`, the dead letters `blocked` and `failed`, or
    `retried` (sent again as another delivery)."""
    chain_id: str
    """Its chain."""
    parent_request_id: str
    """The id of the request whose result it is."""
    target: str
    """The target conversation."""
    mode: str
    """`direct` or `next`."""
    trigger_type: str
    """The template."""
    created_at: float
    """Unix time."""
    finished_at: float | None = None
    """Unix time when it was delivered, or became a dead letter."""
    request_id: str | None = None
    """The request that carries it."""
    reason: ReasonBody | None = None
    """Why it is a dead letter."""
    text: str | None = None
    """The delivered text; only if the delivery is asked for by its id."""


class InjectionStatusReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One delivery, or a page of them, the newest first."""

    injection: InjectionReply | None = None
    """[The delivery](#a-delivery), with its text."""
    injections: list[InjectionReply] | UnsetType = UNSET
    """[The deliveries](#a-delivery), without their texts."""
    cursor: str | None = None
    """The beginning of the next page; absent at the end."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""


class InjectionRetryReply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The new delivery made from a dead letter, under an id of its own."""

    injection: InjectionReply
    """[The new delivery](#a-delivery)."""
    retried: str
    """The dead letter's id."""
    warnings: list[str] = []
    """Fields that the event does not have, with a guess at the typo."""
