"""Decisions about chains that all stores share: admission, starts, and the reasons for dead letters."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from ksi.request import State
from ksi.store.chains import Block, ChainLimits, FollowUp, Grant, InjectionState, Spending, admit, check


class Routing(IntEnum):
    """The outbox state of a member's end."""

    NONE = 0
    AT_END = 1
    UNROUTED = 2
    """It ended, and its aftermath is not written yet."""
    ROUTED = 3

    def ended(self, routed: bool) -> Routing:
        """The state after the member's end; `routed`: its aftermath was written in the same step."""
        if self is not Routing.AT_END:
            return self
        return Routing.ROUTED if routed else Routing.UNROUTED


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The present or future position of a request in its chain."""

    spending: Spending
    limits: ChainLimits
    """The minimum over itself and its ancestors."""
    depth: int
    guards: int
    """Guard messages that the chain sent."""

    def below(self, limits: ChainLimits) -> Standing:
        """The same of a child."""
        return msgspec.structs.replace(self, limits=limits.within(self.limits), depth=self.depth + 1)


class DeadLetter(msgspec.Struct, frozen=True):
    """Why something cannot be delivered. `state` is an `InjectionState`."""

    state: str
    reason: Block


def may_enter(
    standing: Standing, guard_cap: int, now: int, *, block: Block | None, guard: bool, estimate: int
) -> Block | None:
    """The reason against a newcomer; None if there is none. `block` was found before; `now` is wall time, `estimate` in
    tokens."""
    if block is not None:
        return block
    if not guard:
        return check(standing.spending, standing.limits, standing.depth, now, estimate=estimate)
    if standing.guards >= guard_cap:
        return Block(code="guard_cap", message=f"the chain sent its {guard_cap} guard messages")
    return None


def may_run(
    standing: Standing, now: int, *, estimate: int, output_cap: int | None, guard: bool
) -> Block | Grant | None:
    """The decision if a member may run now; None: it runs without a reservation.

    `output_cap` is None for a request that was in no chain when it came in.
    """
    if guard:
        return None
    if output_cap is None:
        return check(standing.spending, standing.limits, standing.depth, now)
    return admit(standing.spending, standing.limits, standing.depth, now, estimate=estimate, output_cap=output_cap)


def fate(follow_up: FollowUp, parent: Standing, guard_cap: int, now: int) -> DeadLetter | None:
    """The reason why a follow-up cannot even be sent; None if it can."""
    membership = None if follow_up.child is None else follow_up.child.membership
    block = follow_up.block if follow_up.block is not None or membership is None else membership.block
    if block is None and follow_up.child is not None and follow_up.child.error is not None:
        return DeadLetter(InjectionState.FAILED, Block(code="invalid_request", message=follow_up.child.error))
    standing = parent.below(parent.limits if membership is None else membership.limits)
    estimate = 0 if membership is None else membership.estimate
    block = may_enter(standing, guard_cap, now, block=block, guard=is_guard(follow_up), estimate=estimate)
    return None if block is None else DeadLetter(InjectionState.BLOCKED, block)


def is_guard(follow_up: FollowUp) -> bool:
    """True if limits do not apply to it."""
    return follow_up.guard or (follow_up.child is not None and follow_up.child.membership.guard)


def trip_of(follow_up: FollowUp) -> Block | None:
    """The finding of a follow-up's own check against the whole chain."""
    if follow_up.child is None or not follow_up.child.membership.trips:
        return None
    return follow_up.child.membership.block


def unanswered(
    request_id: str, state: State, error: str | None, message: str | None, block: Block | None
) -> DeadLetter:
    """The dead letter of a delivery whose request ended without an answer."""
    if block is not None:
        return DeadLetter(InjectionState.BLOCKED, block)
    reason = Block(code=error or state.value, message=message or f"request {request_id!r} ended {state.value}")
    return DeadLetter(InjectionState.FAILED, reason)
