"""The verbs of chains and deliveries of the store on Redis; `ksi.store.base.Store` documents each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from ksi.clock import Moment
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
from ksi.store.passages import LEAST, Passage, cut, cut_bytes
from ksi.store.questions import write_question
from ksi.store.redis.budgets import demand_args
from ksi.store.redis.calls import Calls
from ksi.store.redis.passages import read_child
from ksi.store.redis.reads import RedisReads
from ksi.store.redis.values import Answer, encode, pad20, rank20
from ksi.store.rules import refusals
from ksi.store.values import Page

FIRST_BLOB = 3
"""The index in ARGV at which the bytes of a call begin."""

LONG = 1_000_000
"""Characters in all from which texts are cut off the loop."""


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


class RedisChains:
    """Chains: written by the ends of their members, read and reset by people."""

    def __init__(self, calls: Calls, reads: RedisReads) -> None:
        self._calls = calls
        self._reads = reads

    async def unrouted(self, limit: int = 100) -> tuple[str, ...]:
        """See the protocol."""
        found, _ = await self._calls.read("unrouted", _Ids, limit=limit)
        return found.ids

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See the protocol."""
        blobs: list[bytes] = []
        args = await aftermath_args(aftermath, blobs)
        answer, _ = await self._calls.change("deliver", now, _Delivered, blobs, request_id=request_id, aftermath=args)
        self._calls.tell(answer)
        return Delivered(injections=answer.injections)

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See the protocol."""
        blobs: list[bytes] = []
        args = _follow_up_args(again, blobs, None)
        answer, _ = await self._calls.change("redeliver", now, _Delivered, blobs, injection_id=injection_id, again=args)
        match answer.error:
            case "unknown":
                raise refusals.unknown_delivery(injection_id)
            case "alive":
                raise refusals.not_a_dead_letter(injection_id, answer.state)
            case "no_parent":
                raise refusals.result_is_gone(answer.parent)
        self._calls.tell(answer)
        return Delivered(injections=answer.injections)

    async def injection(self, injection_id: str) -> InjectionView | None:
        """See the protocol."""
        found, blobs = await self._calls.read("injection", _Injection, injection_id=injection_id)
        if found.view is None:
            return None
        child, passage = blobs
        return msgspec.structs.replace(found.view, child=read_child(child, passage)) if child else found.view

    async def injections(self, limit: int, cursor: str | None = None, state: str | None = None) -> Page[InjectionView]:
        """See the protocol."""
        index = "injections" if state is None else f"injections:{state}"
        return await self._reads.page(
            index, limit, cursor, InjectionView, index=index, show="injection", backwards=True
        )

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
        return await self._reads.page("chains", limit, cursor, ChainView, index="chains", show="chain", backwards=True)

    async def members(self, chain: str, limit: int, cursor: str | None = None) -> Page[MemberRow]:
        """See the protocol."""
        page = await self._reads.page("members", limit, cursor, _Member, of=chain, show="member")
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


def membership_args(membership: Membership) -> dict[str, Any]:
    """A membership as the functions read it; its mark is separate."""
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


async def aftermath_args(aftermath: Aftermath, blobs: list[bytes]) -> dict[str, Any]:
    """An aftermath as the functions read it; its bytes join `blobs`, which go behind the arguments."""
    if len(aftermath.passage) * len(aftermath.follow_ups) > LONG:
        return await asyncio.to_thread(_aftermath_args, aftermath, blobs)
    return _aftermath_args(aftermath, blobs)


def _aftermath_args(aftermath: Aftermath, blobs: list[bytes]) -> dict[str, Any]:
    passage = Passage.of(aftermath.passage) if len(aftermath.passage) >= LEAST else None
    return {
        "mark": None if aftermath.mark is None else _place(blobs, aftermath.mark),
        "passage": None if passage is None else _place(blobs, passage.text.encode(), passage.data),
        "trip": msgspec.to_builtins(aftermath.trip),
        "follow_ups": [_follow_up_args(follow_up, blobs, passage) for follow_up in aftermath.follow_ups],
    }


def _place(blobs: list[bytes], *more: bytes) -> int:
    """Append bytes to the others; returns the index of the first in ARGV."""
    blobs += more
    return FIRST_BLOB + len(blobs) - len(more)


def _follow_up_args(follow_up: FollowUp, blobs: list[bytes], passage: Passage | None) -> dict[str, Any]:
    child = follow_up.child
    text, place = (follow_up.text, None) if passage is None else cut(follow_up.text, passage.text)
    return {
        "injection_id": follow_up.injection_id,
        "target": follow_up.target,
        "trigger": follow_up.trigger,
        "text": _place(blobs, text.encode()),
        "cut": None if place is None else len(text[:place].encode()),
        "block": msgspec.to_builtins(follow_up.block),
        "guard": follow_up.guard,
        "child": None if child is None else _child_args(child, blobs, passage),
    }


def _child_args(child: ChildRequest, blobs: list[bytes], passage: Passage | None) -> dict[str, Any]:
    body, place = (child.body, None) if passage is None else cut_bytes(child.body, passage.data)
    packed = encode(child if place is None else msgspec.structs.replace(child, body=body))
    return {
        "blobs": _place(blobs, body, packed, child.membership.mark or b""),
        "cut": place,
        "route": child.route,
        "rank": rank20(child.rank),
        "model": child.model,
        "priority": int(child.priority),
        "agent": child.agent_id,
        "demand": demand_args(child.demand),
        "error": child.error,
        "question": write_question(child.question),
        "text": None if child.question is None else child.question.text,
        "expires": _expires(child),
        "membership": membership_args(child.membership),
    }


def _expires(child: ChildRequest) -> str | None:
    return None if child.question is None or child.question.expires is None else pad20(child.question.expires)


def _check_known(answer: Answer, name: str) -> None:
    if answer.error is not None:
        raise refusals.unknown_chain(name)


def reminder_bytes(texts: Sequence[str]) -> bytes:
    """Reminders as a turn keeps them; empty if there are none."""
    return encode(tuple(texts)) if texts else b""
