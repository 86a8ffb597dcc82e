"""Answers the events about chains and deliveries."""

from __future__ import annotations

from ksi.clock import Clock
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.replies import chain_reply, injection_reply, member_reply
from ksi.errors import InvalidData, NotFound
from ksi.events.chains import (
    ChainName,
    ChainReply,
    ChainStatusData,
    ChainStatusReply,
    InjectionId,
    InjectionRetryReply,
    InjectionStatusData,
    InjectionStatusReply,
)
from ksi.store.base import Store
from ksi.store.rules import refusals


class ChainService:
    """Looks at chains and deliveries, resets the former and sends the latter again."""

    def __init__(self, store: Store, injections: InjectionManager, clock: Clock) -> None:
        self._store = store
        self._injections = injections
        self._clock = clock

    async def status(self, data: ChainStatusData) -> ChainStatusReply:
        """`circuit_breaker:status`: one chain and its requests, or a page of chains.

        Raises:
            NotFound: no such chain, or the request is in none.
        """
        now = self._clock.now().wall
        if data.request_id is None and data.chain_id is None:
            page = await self._store.chains(data.limit, data.cursor)
            return ChainStatusReply(chains=[chain_reply(view, now) for view in page.items], cursor=page.cursor)
        name = chain_name(data.request_id, data.chain_id)
        view = await self._store.chain(name)
        if view is None:
            raise await self._no_chain(name)
        reply = ChainStatusReply(chain=chain_reply(view, now))
        if data.members:
            members = await self._store.members(view.chain, data.limit, data.cursor)
            reply.requests = [member_reply(row) for row in members.items]
            reply.cursor = members.cursor
        return reply

    async def _no_chain(self, name: str) -> NotFound:
        if await self._store.get(name) is None:
            return refusals.unknown_chain(name)
        return NotFound(
            f"request {name!r} is in no chain: it has no parent, no limits of its own and no injection", request_id=name
        )

    async def reset(self, data: ChainName) -> ChainReply:
        """`circuit_breaker:reset`: an operator lets a stopped chain continue.

        Raises:
            NotFound: no such chain.
        """
        now = self._clock.now()
        return chain_reply(await self._store.reset_chain(chain_name(data.request_id, data.chain_id), now), now.wall)

    async def injections(self, data: InjectionStatusData) -> InjectionStatusReply:
        """`injection:status`: one delivery, or a page of them.

        Raises:
            NotFound: no such delivery.
        """
        if data.injection_id is not None:
            view = await self._store.injection(data.injection_id)
            if view is None:
                raise refusals.unknown_delivery(data.injection_id)
            return InjectionStatusReply(injection=injection_reply(view, text=True))
        page = await self._store.injections(data.limit, data.cursor, data.state)
        return InjectionStatusReply(injections=[injection_reply(view) for view in page.items], cursor=page.cursor)

    async def retry(self, data: InjectionId) -> InjectionRetryReply:
        """`injection:retry`: a dead letter goes out again, under an id of its own.

        Raises:
            NotFound: no such delivery.
            InvalidData: it is no dead letter.
        """
        view = await self._injections.retry(data.injection_id)
        return InjectionRetryReply(injection=injection_reply(view), retried=data.injection_id)


def chain_name(request_id: str | None, chain_id: str | None) -> str:
    """The one name that was given; a chain's id is its first request's.

    Raises:
        InvalidData: none, or two different ones.
    """
    if request_id is not None and chain_id is not None and request_id != chain_id:
        raise InvalidData("give request_id or chain_id, not both", path="chain_id")
    name = chain_id if chain_id is not None else request_id
    if name is None:
        raise InvalidData("give a chain_id, or the request_id of any request of the chain", path="chain_id")
    return name
