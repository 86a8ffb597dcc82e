"""Common parts of the tests of chains and deliveries: limits, members, follow-ups, and ends with an aftermath."""

from __future__ import annotations

from typing import Any

from ksi.clock import microseconds
from ksi.request import Outcome, Priority, State, Usage
from ksi.store.base import Store
from ksi.store.chains import (
    Aftermath,
    Block,
    ChainLimits,
    ChainView,
    ChildRequest,
    FollowUp,
    InjectionView,
    Membership,
)
from ksi.store.values import Claimed, Claims, Enqueued, Finish, Settled
from tests.conformance.world import HOUR, OFFER, ROUTE, World, items

LOOP = Block(code="cycle", message="it goes round", risk_score=0.9, evidence=("a says the same as b",))


def limits(depth: int = 5, budget: int = 10_000, window: float = HOUR) -> ChainLimits:
    """A chain's limits; `window` in seconds."""
    return ChainLimits(max_depth=depth, token_budget=budget, time_window=microseconds(window))


def member(parent: str | None = None, **fields: Any) -> Membership:
    """A place in a chain: by default of ten tokens in and at most a hundred out."""
    defaults: dict[str, Any] = {"limits": limits(), "parent": parent, "estimate": 10, "output_cap": 100}
    return Membership(**(defaults | fields))


def direct(injection_id: str, target: str = "talk", **fields: Any) -> FollowUp:
    """A follow-up that is a request; fields of its membership go by their names."""
    own = {name: fields.pop(name) for name in ("block", "guard") if name in fields}
    of_child = {name: fields.pop(name) for name in ("agent_id", "error", "route") if name in fields}
    defaults: dict[str, Any] = {
        "body": b'{"prompt":"%s"}' % injection_id.encode(),
        "route": ROUTE,
        "rank": 1_000,
        "model": "stub/echo",
        "priority": int(Priority.NORMAL),
        "membership": member(**fields),
    }
    child = ChildRequest(**(defaults | of_child))
    return FollowUp(
        injection_id=injection_id, target=target, trigger="general", text=f"text {injection_id}", child=child, **own
    )


def reminder(injection_id: str, target: str = "talk", **fields: Any) -> FollowUp:
    """A follow-up that waits for a prompt."""
    return FollowUp(injection_id=injection_id, target=target, trigger="memory", text=f"text {injection_id}", **fields)


def after(*follow_ups: FollowUp, **fields: Any) -> Aftermath:
    """The consequences of a request's end."""
    return Aftermath(follow_ups=follow_ups, **fields)


async def complete(world: World, claim: Claimed, aftermath: Aftermath | None = None, **fields: Any) -> Settled:
    """A run brought an answer; with `tokens` in total, if given."""
    if (tokens := fields.pop("tokens", None)) is not None:
        fields["usage"] = Usage(input_tokens=tokens, output_tokens=0)
    verdict = Finish(state=State.COMPLETED)
    return await world.store.settle(claim, world.attempt(claim, **fields), verdict, world.clock.now(), aftermath)


async def fail(world: World, claim: Claimed, aftermath: Aftermath | None = None) -> Settled:
    """A run failed for good, without a report."""
    attempt = world.attempt(claim, Outcome.FAILED, error="timeout", message="slow")
    verdict = Finish(state=State.FAILED, error="timeout", message="slow")
    return await world.store.settle(claim, attempt, verdict, world.clock.now(), aftermath)


async def begin(world: World, name: str = "root", conversation: str = "talk", **fields: Any) -> Claimed:
    """A running root of a chain."""
    return await world.run(name, conversation, chain=member(**fields))


async def born(world: World, name: str, parent: str, conversation: str | None = None, **fields: Any) -> Enqueued:
    """A request that names its parent; it waits."""
    return await world.enqueue(name, conversation or f"talk of {name}", chain=member(parent, **fields))


async def claims(world: World, limit: int = 100) -> Claims:
    """The started and the blocked requests of a claim."""
    return await world.store.claim((OFFER,), limit, world.clock.now())


async def figures(world: World, name: str = "root") -> ChainView:
    """A chain that is kept."""
    view = await world.store.chain(name)
    assert view is not None
    return view


async def hops(world: World, name: str, limit: int = 100) -> list[str]:
    """The way from a member back to its root."""
    trail = await world.store.trail(name, limit)
    assert trail is not None
    return [hop.request_id for hop in trail.hops]


async def delivery(world: World, injection_id: str) -> InjectionView:
    """A delivery that is kept."""
    view = await world.store.injection(injection_id)
    assert view is not None
    return view


async def deliveries(store: Store, state: str | None = None) -> list[InjectionView]:
    """All deliveries, the newest first."""
    return [one async for one in items(lambda cursor: store.injections(2, cursor, state))]


def told(settled: Any) -> list[tuple[str, str]]:
    """The deliveries reported by a step: ids and states."""
    return [(one.injection_id, one.state) for one in settled.injections]


async def run_first(world: World, name: str, conversation: str, **fields: Any) -> Claimed:
    """Have a request run at once, though others are ready before it."""
    return await world.run(name, conversation, priority=Priority.CRITICAL, **fields)
