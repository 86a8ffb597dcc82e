"""The verbs of chains and deliveries of the store on Redis; what each means is written in `ksi.store.base.Store`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from ksi.clock import Moment
from ksi.errors import InvalidData, NotFound
from ksi.request import State
from ksi.store.chains import (
    Aftermath,
    Block,
    ChainView,
    ChildRequest,
    ClosedChain,
    Delivered,
    FollowUp,
    Hop,
    InjectionView,
    MemberRow,
    Membership,
    Trail,
)
from ksi.store.redis_reads import RedisReads
from ksi.store.redis_values import Answer, encode, rank20
from ksi.store.values import Page

FIRST_BLOB = 3
"""Where in ARGV the bytes of a call begin."""

_children = msgspec.msgpack.Decoder(ChildRequest)


class _Delivered(Answer, frozen=True, kw_only=True):
    injections: tuple[InjectionView, ...] = ()
    state: str = ""
    parent: str = ""


class _Closed(Answer, frozen=True, kw_only=True):
    chain: str = ""
    unfinished: tuple[str, ...] = ()


class _Chain(Answer, frozen=True, kw_only=True):
    view: ChainView | None = None


class _Hop(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    depth: int
    conversation: str
    agent_id: str | None = None
    state: State
    error: str | None = None


class _Member(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    parent: str | None = None
    depth: int
    conversation: str
    agent_id: str | None = None
    state: State
    enqueued_at: int
    finished_at: int | None = None
    tokens: int
    estimated: bool
    reason: Block | None = None


class _Trail(Answer, frozen=True, kw_only=True):
    view: ChainView | None = None
    hops: tuple[_Hop, ...] = ()


class _Injection(Answer, frozen=True, kw_only=True):
    view: InjectionView | None = None


class _Ids(Answer, frozen=True, kw_only=True):
    ids: tuple[str, ...] = ()


class RedisChains(RedisReads, ABC):
    """Chains: written by what their members do, looked at and reset by people."""

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See the protocol."""
        found, _ = await self._calls.read("unrouted", _Ids, limit=limit)
        return found.ids

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See the protocol."""
        blobs: list[bytes] = []
        args = aftermath_args(aftermath, blobs)
        answer, _ = await self._calls.change("deliver", now, _Delivered, blobs, request_id=request_id, aftermath=args)
        self._tell(answer)
        return Delivered(injections=answer.injections)

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See the protocol."""
        blobs: list[bytes] = []
        args = _follow_up_args(again, blobs)
        answer, _ = await self._calls.change("redeliver", now, _Delivered, blobs, injection_id=injection_id, again=args)
        match answer.error:
            case "unknown":
                raise NotFound(f"no delivery {injection_id!r}; it never was, or is past its retention")
            case "alive":
                raise InvalidData(
                    f"delivery {injection_id!r} is {answer.state}; only a dead letter can be sent again",
                    path="injection_id",
                )
            case "no_parent":
                raise NotFound(f"request {answer.parent!r} is not kept any more, so its result cannot be sent again")
        self._tell(answer)
        return Delivered(injections=answer.injections)

    async def injection(self, injection_id: str) -> InjectionView | None:
        """See the protocol."""
        found, blobs = await self._calls.read("injection", _Injection, injection_id=injection_id)
        if found.view is None:
            return None
        child = blobs[0] if blobs else None
        return msgspec.structs.replace(found.view, child=_children.decode(child)) if child else found.view

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See the protocol."""
        index = "injections" if state is None else f"injections:{state}"
        return await self._page(index, limit, cursor, InjectionView, index=index, show="injection", backwards=True)

    async def trail(self, request_id: str, limit: int) -> Trail | None:
        """See the protocol."""
        found, marks = await self._calls.read("trail", _Trail, request_id=request_id, limit=limit)
        if found.view is None:
            return None
        hops = (
            Hop(**msgspec.structs.asdict(hop), mark=marks[2 * place], result=marks[2 * place + 1])
            for place, hop in enumerate(found.hops)
        )
        return Trail(view=found.view, hops=tuple(hops))

    async def chain(self, name: str) -> ChainView | None:
        """See the protocol."""
        found, _ = await self._calls.read("chain", _Chain, name=name)
        return found.view

    async def chains(self, limit: int, cursor: str | None = None) -> Page[ChainView]:
        """See the protocol."""
        return await self._page("chains", limit, cursor, ChainView, index="chains", show="chain", backwards=True)

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See the protocol."""
        page = await self._page("members", limit, cursor, _Member, of=chain, show="member")
        return Page(tuple(MemberRow(**msgspec.structs.asdict(member)) for member in page.items), page.cursor)

    async def close_chain(self, name: str, now: Moment, limit: int = 200) -> ClosedChain:
        """See the protocol."""
        answer, _ = await self._calls.change("close_chain", now, _Closed, name=name, limit=limit)
        _check_known(answer, name)
        return ClosedChain(chain=answer.chain, unfinished=answer.unfinished)

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """See the protocol."""
        answer, _ = await self._calls.change("reset_chain", now, _Chain, name=name)
        _check_known(answer, name)
        assert answer.view is not None
        return answer.view

    @abstractmethod
    def _tell(self, answer: Answer) -> None:
        """Say that there is work, where an answer says so."""


def membership_args(membership: Membership) -> dict[str, Any]:
    """A membership as the functions read it; its mark goes beside it."""
    return {
        "parent": membership.parent,
        "limits": msgspec.to_builtins(membership.limits),
        "injects": membership.injects,
        "estimate": membership.estimate,
        "output_cap": membership.output_cap,
        "block": msgspec.to_builtins(membership.block),
        "trips": membership.trips,
        "guard": membership.guard,
        "marked": membership.mark is not None,
    }


def aftermath_args(aftermath: Aftermath, blobs: list[bytes]) -> dict[str, Any]:
    """An aftermath as the functions read it; its bytes join `blobs`, which go behind the arguments."""
    mark = None
    if aftermath.mark is not None:
        mark = _place(blobs, aftermath.mark)
    return {
        "mark": mark,
        "trip": msgspec.to_builtins(aftermath.trip),
        "follow_ups": [_follow_up_args(follow_up, blobs) for follow_up in aftermath.follow_ups],
    }


def _place(blobs: list[bytes], *more: bytes) -> int:
    """Put bytes behind the others; where the first of them will stand in ARGV."""
    blobs += more
    return FIRST_BLOB + len(blobs) - len(more)


def _follow_up_args(follow_up: FollowUp, blobs: list[bytes]) -> dict[str, Any]:
    child = follow_up.child
    return {
        "injection_id": follow_up.injection_id,
        "target": follow_up.target,
        "trigger": follow_up.trigger,
        "text": follow_up.text,
        "block": msgspec.to_builtins(follow_up.block),
        "guard": follow_up.guard,
        "child": None
        if child is None
        else {
            "blobs": _place(blobs, child.body, encode(child), child.membership.mark or b""),
            "route": child.route,
            "rank": rank20(child.rank),
            "model": child.model,
            "priority": int(child.priority),
            "agent": child.agent_id,
            "error": child.error,
            "membership": membership_args(child.membership),
        },
    }


def _check_known(answer: Answer, name: str) -> None:
    if answer.error is not None:
        raise NotFound(f"no chain {name!r}, and no request of this id in one")


def reminder_bytes(texts: Sequence[str]) -> bytes:
    """Reminders as a turn keeps them; nothing where there are none."""
    return encode(tuple(texts)) if texts else b""
