"""What every store decides alike about chains."""

from __future__ import annotations

import msgspec
import pytest

from ksi.request import State
from ksi.store.admission import (
    DeadLetter,
    Routing,
    Standing,
    fate,
    is_guard,
    may_enter,
    may_run,
    trip_of,
    unanswered,
)
from ksi.store.chains import Block, ChainLimits, ChildRequest, FollowUp, Grant, Membership, Spending

LIMITS = ChainLimits(max_depth=1, token_budget=100, time_window=1_000)
FOUND = Block(code="growth", message="ever longer")
CHILD = ChildRequest(body=b"{}", route="r", rank=1, model="m", priority=2, membership=Membership(limits=LIMITS))
FOLLOW = FollowUp(injection_id="a/1", target="talk", trigger="general", text="text", child=CHILD)


def standing(depth: int = 0, guards: int = 0, used: int = 0) -> Standing:
    return Standing(spending=Spending(started_at=0, used=used), limits=LIMITS, depth=depth, guards=guards)


def code(block: Block | Grant | None) -> str | None:
    return block.code if isinstance(block, Block) else None


def letter(dead: DeadLetter | None) -> tuple[str, str] | None:
    return None if dead is None else (dead.state, dead.reason.code)


def child(**membership: object) -> FollowUp:
    own = msgspec.structs.replace(CHILD.membership, **membership)
    return msgspec.structs.replace(FOLLOW, child=msgspec.structs.replace(CHILD, membership=own))


@pytest.mark.promise("C5")
def test_a_newcomer_is_checked_unless_it_was_blocked_before_or_is_a_guard_message() -> None:
    deep = standing(depth=2, guards=2)
    assert code(may_enter(deep, 3, 0, block=None, guard=False, estimate=0)) == "max_depth"
    assert may_enter(deep, 3, 0, block=FOUND, guard=True, estimate=0) is FOUND
    assert may_enter(deep, 3, 0, block=None, guard=True, estimate=0) is None
    assert code(may_enter(deep, 2, 0, block=None, guard=True, estimate=0)) == "guard_cap"


@pytest.mark.promise("C5", "C6")
def test_a_run_reserves_its_grant_unless_nothing_binds_it() -> None:
    assert may_run(standing(used=50), 0, estimate=10, output_cap=90, guard=False) == Grant(40, 50)
    assert may_run(standing(used=50), 0, estimate=10, output_cap=None, guard=False) is None
    assert code(may_run(standing(used=100), 0, estimate=10, output_cap=None, guard=False)) == "token_budget"
    assert may_run(standing(used=100), 0, estimate=10, output_cap=5, guard=True) is None


def test_a_child_stands_one_deeper_under_the_narrower_limits() -> None:
    below = standing(used=7).below(ChainLimits(max_depth=9, token_budget=50, time_window=9_000))
    assert below.limits == ChainLimits(max_depth=1, token_budget=50, time_window=1_000)
    assert (below.depth, below.spending.used) == (1, 7)


@pytest.mark.promise("C3")
def test_a_follow_up_is_sent_or_is_a_dead_letter_for_its_first_reason() -> None:
    unasked = msgspec.structs.replace(FOLLOW, child=msgspec.structs.replace(CHILD, error="nobody serves it"))
    reminder = msgspec.structs.replace(FOLLOW, child=None)
    deep = standing(depth=1)
    assert fate(FOLLOW, standing(), 3, 0) is None
    assert letter(fate(FOLLOW, deep, 3, 0)) == ("blocked", "max_depth")
    assert fate(reminder, standing(), 3, 0) is None
    assert letter(fate(reminder, deep, 3, 0)) == ("blocked", "max_depth")
    assert letter(fate(unasked, deep, 3, 0)) == ("failed", "invalid_request")
    assert letter(fate(msgspec.structs.replace(unasked, block=FOUND), deep, 3, 0)) == ("blocked", "growth")
    assert letter(fate(child(block=FOUND), standing(), 3, 0)) == ("blocked", "growth")
    assert fate(child(guard=True), deep, 3, 0) is None
    narrow = ChainLimits(max_depth=0, token_budget=100, time_window=1_000)
    assert letter(fate(child(limits=narrow), standing(), 3, 0)) == ("blocked", "max_depth")


def test_a_guard_message_says_so_itself_or_in_its_request() -> None:
    assert not is_guard(FOLLOW)
    assert is_guard(msgspec.structs.replace(FOLLOW, child=None, guard=True))
    assert is_guard(child(guard=True))


def test_only_a_block_that_trips_is_the_chain_s() -> None:
    assert trip_of(FOLLOW) is None
    assert trip_of(child(block=FOUND)) is None
    assert trip_of(child(block=FOUND, trips=True)) is FOUND
    assert trip_of(msgspec.structs.replace(FOLLOW, child=None, block=FOUND)) is None


@pytest.mark.promise("C3")
def test_a_delivery_without_an_answer_says_why() -> None:
    assert unanswered("a", State.BLOCKED, "blocked", FOUND.message, FOUND) == DeadLetter("blocked", FOUND)
    failed = DeadLetter("failed", Block(code="timeout", message="slow"))
    assert unanswered("a", State.FAILED, "timeout", "slow", None) == failed
    expired = DeadLetter("failed", Block(code="expired", message="request 'a' ended expired"))
    assert unanswered("a", State.EXPIRED, None, None, None) == expired


@pytest.mark.promise("C1")
def test_only_an_end_that_is_to_be_routed_waits_for_it() -> None:
    assert Routing.NONE.ended(routed=False) is Routing.NONE
    assert Routing.AT_END.ended(routed=False) is Routing.UNROUTED
    assert Routing.AT_END.ended(routed=True) is Routing.ROUTED
    assert Routing.ROUTED.ended(routed=False) is Routing.ROUTED
