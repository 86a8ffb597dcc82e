"""The verbs on chains, until every store has them."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.store.chains import Aftermath, ChainView, ClosedChain, Delivered, FollowUp, InjectionView, MemberRow, Trail
from ksi.store.values import Page


class Unfinished:
    """Answers as a store without chains does."""

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See the protocol."""
        return ()

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See the protocol."""
        return Delivered()

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See the protocol."""
        raise NotImplementedError

    async def injection(self, injection_id: str) -> InjectionView | None:
        """See the protocol."""
        return None

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See the protocol."""
        return Page(())

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """See the protocol."""
        return None

    async def chain(self, name: str) -> ChainView | None:
        """See the protocol."""
        return None

    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """See the protocol."""
        return Page(())

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See the protocol."""
        return Page(())

    async def close_chain(self, name: str, now: Moment, limit: int = 200) -> ClosedChain:
        """See the protocol."""
        raise NotImplementedError

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """See the protocol."""
        raise NotImplementedError
