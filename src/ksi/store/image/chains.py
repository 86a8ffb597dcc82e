"""Chains and deliveries in an image."""

from __future__ import annotations

from dataclasses import dataclass, field

from ksi.store.admission import Routing
from ksi.store.chains import Block, ChainLimits, ChildRequest, InjectionState


@dataclass(slots=True, eq=False, kw_only=True)
class Chain:
    """A tree of requests."""

    number: int
    name: str
    limits: ChainLimits
    """Its root's."""
    created_at: int
    started_at: int
    used: int = 0
    estimated: int = 0
    reserved: int = 0
    closed: bool = False
    tripped: Block | None = None
    guard_messages: int = 0
    resets: int = 0
    reset_key: int = 0
    """Members up to this key came before the last reset."""
    deepest: int = 0
    unfinished: int = 0
    members: list[int] = field(default_factory=list)
    """The keys of kept ones, in the order of arrival, notices of blocks among them."""
    notices: int = 0
    """How many of them are notices."""


@dataclass(slots=True, eq=False, kw_only=True)
class Injection:
    """One delivery."""

    number: int
    injection_id: str
    chain: str
    parent: str
    parent_key: int
    target: str
    trigger: str
    text: str
    created_at: int
    child: ChildRequest | None
    """The request of mode `direct`, until it is delivered."""
    direct: bool
    state: str = InjectionState.QUEUED
    finished_at: int | None = None
    request_id: str | None = None
    reason: Block | None = None


class ChainTable:
    """All chains, by name and by number."""

    def __init__(self) -> None:
        self.named: dict[str, Chain] = {}
        self.numbered: dict[int, Chain] = {}

    def add(self, chain: Chain) -> None:
        """Take a new chain in."""
        self.named[chain.name] = self.numbered[chain.number] = chain


class InjectionTable:
    """All deliveries, by name and by number."""

    def __init__(self) -> None:
        self.numbered: dict[int, Injection] = {}
        self.named: dict[str, Injection] = {}

    def add(self, injection: Injection) -> None:
        """Take a new delivery in."""
        self.numbered[injection.number] = self.named[injection.injection_id] = injection


@dataclass(slots=True, eq=False, kw_only=True)
class Link:
    """How a request belongs to a chain."""

    chain: Chain
    parent: str | None
    parent_key: int | None
    depth: int
    limits: ChainLimits
    """The minimum over itself and its ancestors."""
    estimate: int = 0
    output_cap: int | None = None
    """None: it was in no chain when it came in."""
    guard: bool = False
    routing: Routing = Routing.NONE
    reserved: int = 0
    mark: bytes | None = None
    result: bytes | None = None
    block: Block | None = None
    tokens: int = 0
    """Charged to the chain by it."""
    estimated: bool = False
    carries: bool = False
    """It carries the delivery of its own name."""
