"""What the memory store holds of chains and deliveries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ksi.store.admission import Routing, Standing
from ksi.store.chains import Block, ChainLimits, ChainView, ChildRequest, InjectionState, InjectionView, Spending
from ksi.store.memory_index import Key, Ordered


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
    """The keys of kept ones, in the order of arrival."""

    @property
    def spending(self) -> Spending:
        """Its figures as a check sees them."""
        return Spending(
            started_at=self.started_at,
            used=self.used,
            reserved=self.reserved,
            closed=self.closed,
            tripped=self.tripped,
        )

    def standing(self, limits: ChainLimits, depth: int) -> Standing:
        """Where a member of these limits stands."""
        return Standing(spending=self.spending, limits=limits, depth=depth, guards=self.guard_messages)

    def view(self, limits: ChainLimits | None = None, depth: int | None = None) -> ChainView:
        """Its figures: as a whole, or as a member of these limits sees them."""
        return ChainView(
            chain=self.name,
            created_at=self.created_at,
            limits=self.limits if limits is None else limits,
            spending=self.spending,
            members=len(self.members),
            depth=self.deepest if depth is None else depth,
            estimated=self.estimated,
            unfinished=self.unfinished,
            guard_messages=self.guard_messages,
            resets=self.resets,
        )


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
    """Of mode `direct`, until it is delivered."""
    direct: bool
    state: str = InjectionState.QUEUED
    finished_at: int | None = None
    request_id: str | None = None
    reason: Block | None = None

    @property
    def dead(self) -> bool:
        """Whether it is a dead letter."""
        return self.state in (InjectionState.BLOCKED, InjectionState.FAILED)

    @property
    def row(self) -> InjectionView:
        """As it is listed and told."""
        return InjectionView(
            injection_id=self.injection_id,
            chain=self.chain,
            parent=self.parent,
            target=self.target,
            mode="direct" if self.direct else "next",
            trigger=self.trigger,
            state=self.state,
            created_at=self.created_at,
            finished_at=self.finished_at,
            request_id=self.request_id,
            reason=self.reason,
        )


class ChainTable:
    """All chains, by name and in the order in which they began."""

    def __init__(self) -> None:
        self.named: dict[str, Chain] = {}
        self.numbered: dict[int, Chain] = {}
        self.order = Ordered()

    def add(self, chain: Chain) -> None:
        """Take a new chain in."""
        self.named[chain.name] = self.numbered[chain.number] = chain
        self.order.add((chain.number,))

    def leave(self, chain: Chain, key: int) -> None:
        """A member is no longer kept; with the last one its chain goes."""
        chain.members.remove(key)
        if not chain.members:
            self.order.remove((chain.number,))
            del self.named[chain.name], self.numbered[chain.number]


class InjectionTable:
    """All deliveries, in the order in which they were made."""

    def __init__(self) -> None:
        self.numbered: dict[int, Injection] = {}
        self.named: dict[str, Injection] = {}
        self.order = Ordered()
        self.by_state = Ordered()
        """(state, number)"""
        self.ended = Ordered()
        """(finished_at, number)"""

    def add(self, injection: Injection) -> None:
        """Take a new delivery in."""
        self.numbered[injection.number] = self.named[injection.injection_id] = injection
        for index, key in self._entries(injection):
            index.add(key)

    def drop(self, injection: Injection) -> None:
        """Forget an ended delivery."""
        for index, key in self._entries(injection):
            index.remove(key)
        del self.numbered[injection.number], self.named[injection.injection_id]

    @contextmanager
    def changing(self, injection: Injection) -> Iterator[None]:
        """Change a delivery inside: its entries follow."""
        for index, key in self._entries(injection):
            index.remove(key)
        yield
        for index, key in self._entries(injection):
            index.add(key)

    def _entries(self, injection: Injection) -> Iterator[tuple[Ordered, Key]]:
        yield self.order, (injection.number,)
        yield self.by_state, (injection.state, injection.number)
        if injection.finished_at is not None:
            yield self.ended, (injection.finished_at, injection.number)


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

    @property
    def standing(self) -> Standing:
        """Where it stands."""
        return self.chain.standing(self.limits, self.depth)

    @property
    def view(self) -> ChainView:
        """Its chain's figures, as it sees them."""
        return self.chain.view(self.limits, self.depth)
