"""A chain's figures on the wire: its state, and the limit that stopped it."""

from __future__ import annotations

import msgspec
import pytest

from ksi.cli.chains import _depth
from ksi.completion.replies import chain_reply
from ksi.store.chains import Block, ChainLimits, ChainView, Spending

HOUR = 3_600_000_000
VIEW = ChainView(
    chain="root",
    created_at=0,
    limits=ChainLimits(max_depth=3, token_budget=100, time_window=HOUR),
    spending=Spending(started_at=0),
    members=4,
    depth=3,
    estimated=0,
    unfinished=0,
    guard_messages=0,
    resets=0,
)


def told(now: int = 0, **fields: object) -> tuple[str, str | None]:
    """State, and the reason's code."""
    spending = {name: fields.pop(name) for name in ("used", "reserved", "closed", "tripped") if name in fields}
    view = msgspec.structs.replace(VIEW, **fields, spending=msgspec.structs.replace(VIEW.spending, **spending))
    reply = chain_reply(view, now)
    return reply.state, reply.reason.code if reply.reason is not None else None


@pytest.mark.promise("C5", "C8")
def test_a_chain_whose_deepest_request_was_blocked_is_exhausted_once_nothing_of_it_runs() -> None:
    assert told() == ("open", None)
    assert told(depth=4) == ("exhausted", "max_depth")
    assert told(depth=4, unfinished=1) == ("open", None)
    assert told(guard_messages=1) == ("exhausted", "max_depth"), "a notice tells of the delivery that was blocked"
    assert told(depth=2, guard_messages=1) == ("open", None)


@pytest.mark.promise("C5", "C8")
def test_a_spent_budget_and_a_passed_time_are_reported_with_the_state() -> None:
    assert told(used=100) == ("exhausted", "token_budget")
    assert told(used=90, reserved=20) == ("open", None), "what is set aside may come back"
    assert told(now=HOUR + 1) == ("exhausted", "time_window")


@pytest.mark.promise("C8")
def test_a_tripped_chain_has_its_finding_and_a_closed_one_its_end() -> None:
    assert told(tripped=Block(code="cycle", message="round and round"), used=100) == ("tripped", "cycle")
    assert told(closed=True)[0] == "closed"


def test_no_chain_is_deeper_than_it_may_be() -> None:
    assert _depth({"ideation_depth": 3, "max_depth": 3}) == "3 of 3"
    assert _depth({"ideation_depth": 4, "max_depth": 3}) == "3 of 3, and a request at depth 4 was blocked"
