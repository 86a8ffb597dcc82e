"""The memory store's reading verbs of chains and deliveries."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ksi.store.chains import ChainView, Hop, InjectionView, MemberRow, Trail
from ksi.store.image.chains import Chain
from ksi.store.image.data import Request
from ksi.store.image.ordered import Ordered
from ksi.store.values import Page, StoreRules
from tests.reference_store.chain_data import chain_view, injection_view, is_dead_letter, member_view
from tests.reference_store.data import MemoryData
from tests.reference_store.index import Listed


class MemoryChainReads:
    """The verbs that change nothing; `ksi.store.base.Store` documents each."""

    def __init__(self, rules: StoreRules, data: MemoryData) -> None:
        self._rules = rules
        self._data = data

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See the protocol."""
        keys = zip(range(limit), self._data.unrouted.walk(), strict=False)
        return tuple(self._data.request(key).request_id for _, key in keys)

    async def injection(self, injection_id: str) -> InjectionView | None:
        """See the protocol."""
        found = self._data.injections.named.get(injection_id)
        if found is None:
            return None
        return msgspec.structs.replace(
            injection_view(found), text=found.text, child=found.child if is_dead_letter(found) else None
        )

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See the protocol."""
        listed = Listed(name="injections", index=self._data.injections.order, shape=(int,), backwards=True)
        if state is not None:
            listed = Listed(
                name="injections_by_state",
                index=self._data.injections.by_state,
                shape=(str, int),
                prefix=(state,),
                backwards=True,
            )
        return listed.page(limit, cursor, lambda key: injection_view(self._data.injections.numbered[key[-1]]))

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """See the protocol."""
        request = self._data.ids.get(request_id)
        if not isinstance(request, Request) or request.link is None:
            return None
        hops = zip(range(limit), self._hops(request), strict=False)
        return Trail(view=member_view(request.link), hops=tuple(hop for _, hop in hops))

    def _hops(self, last: Request) -> Iterator[Hop]:
        request: Request | None = last
        while request is not None and request.link is not None and request.key > request.link.chain.reset_key:
            link = request.link
            yield Hop(
                request_id=request.request_id,
                depth=link.depth,
                conversation=request.conversation.name,
                agent_id=request.agent_id,
                state=request.state,
                error=request.error,
                mark=link.mark,
                result=link.result,
            )
            parent = None if link.parent_key is None else self._data.members.get(link.parent_key)
            request = parent if isinstance(parent, Request) else None

    async def chain(self, name: str) -> ChainView | None:
        """See the protocol."""
        if (chain := self._data.chains.named.get(name)) is not None:
            return chain_view(chain)
        request = self._data.ids.get(name)
        return member_view(request.link) if isinstance(request, Request) and request.link is not None else None

    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """See the protocol."""
        listed = Listed(name="chains", index=self._data.chains.order, shape=(int,), backwards=True)
        return listed.page(limit, cursor, lambda key: chain_view(self._data.chains.numbered[key[-1]]))

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See the protocol."""
        found = self._chain(chain)
        index = Ordered()
        for key in [] if found is None else found.members:
            index.add((key,))
        listed = Listed(name="members", index=index, shape=(int,))
        return listed.page(limit, cursor, lambda key: _member_row(self._data.request(key)))

    def _chain(self, name: str) -> Chain | None:
        """A chain by its id or by any member's."""
        request = self._data.ids.get(name)
        link = request.link if isinstance(request, Request) else None
        return self._data.chains.named.get(name) or (None if link is None else link.chain)


def _member_row(request: Request) -> MemberRow | None:
    link = request.link
    if link is None:
        return None
    return MemberRow(
        request_id=request.request_id,
        parent=link.parent,
        depth=link.depth,
        conversation=request.conversation.name,
        agent_id=request.agent_id,
        state=request.state,
        enqueued_at=request.enqueued_at,
        finished_at=request.finished_at,
        tokens=link.tokens,
        estimated=link.estimated,
        reason=link.block,
    )
