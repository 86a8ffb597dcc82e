"""Chains and deliveries in the reference store: their indexes, and how they are seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ksi.store.admission import Standing
from ksi.store.chains import ChainLimits, ChainView, InjectionState, InjectionView, Spending
from ksi.store.image.chains import Chain, ChainTable, Injection, InjectionTable, Link
from ksi.store.image.ordered import Key, Ordered


class IndexedChains(ChainTable):
    """All chains, by name and in the order in which they began."""

    def __init__(self) -> None:
        super().__init__()
        self.order = Ordered()

    def add(self, chain: Chain) -> None:
        """Take a new chain in."""
        super().add(chain)
        self.order.add((chain.number,))

    def leave(self, link: Link, key: int) -> None:
        """A member is no longer kept; with the last one its chain goes."""
        chain = link.chain
        chain.members.remove(key)
        chain.notices -= link.guard
        if not chain.members:
            self.order.remove((chain.number,))
            del self.named[chain.name], self.numbered[chain.number]


class IndexedInjections(InjectionTable):
    """All deliveries, in the order in which they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.order = Ordered()
        self.by_state = Ordered()
        """(state, number)"""
        self.ended = Ordered()
        """(finished_at, number)"""

    def add(self, injection: Injection) -> None:
        """Take a new delivery in."""
        super().add(injection)
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


def spending(chain: Chain) -> Spending:
    """Its figures as a check sees them."""
    return Spending(
        started_at=chain.started_at,
        used=chain.used,
        reserved=chain.reserved,
        closed=chain.closed,
        tripped=chain.tripped,
    )


def standing(link: Link) -> Standing:
    """A member's position."""
    chain = link.chain
    return Standing(spending=spending(chain), limits=link.limits, depth=link.depth, guards=chain.guard_messages)


def chain_view(chain: Chain, limits: ChainLimits | None = None, depth: int | None = None) -> ChainView:
    """Its figures: as a whole, or as a member of these limits sees them."""
    return ChainView(
        chain=chain.name,
        created_at=chain.created_at,
        limits=chain.limits if limits is None else limits,
        spending=spending(chain),
        members=len(chain.members) - chain.notices,
        depth=chain.deepest if depth is None else depth,
        estimated=chain.estimated,
        unfinished=chain.unfinished,
        guard_messages=chain.guard_messages,
        resets=chain.resets,
    )


def member_view(link: Link) -> ChainView:
    """Its chain's figures, as a member sees them."""
    return chain_view(link.chain, link.limits, link.depth)


def is_dead_letter(injection: Injection) -> bool:
    """True if it never reached its target."""
    return injection.state in (InjectionState.BLOCKED, InjectionState.FAILED)


def injection_view(injection: Injection) -> InjectionView:
    """Its form in lists and events."""
    return InjectionView(
        injection_id=injection.injection_id,
        chain=injection.chain,
        parent=injection.parent,
        target=injection.target,
        mode="direct" if injection.direct else "next",
        trigger=injection.trigger,
        state=injection.state,
        created_at=injection.created_at,
        finished_at=injection.finished_at,
        request_id=injection.request_id,
        reason=injection.reason,
    )
