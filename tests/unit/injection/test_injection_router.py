"""Where results go: targets, children, what they inherit, and what is told of failures and blocks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.injection.circuit_breakers import Judgement
from ksi.injection.injection_router import Ended, targets, unknown_triggers
from ksi.injection.reminders import Templates
from ksi.request import (
    ChainConfig,
    InjectionConfig,
    PatternsConfig,
    Priority,
    RequestBody,
    RetryBody,
    State,
    decode_body,
)
from ksi.store.chains import Block, ChildRequest, FollowUp, Spending, Trail
from tests.unit.injection.chain_facts import HEAD_STARTS, NOW, SECOND, body, ended, router, trail


def routed(what: Ended, of: Trail | None = None, judgement: Judgement | None = None) -> tuple[FollowUp, ...]:
    return router().route(what, of, NOW, judgement).follow_ups


def only_child(what: Ended, of: Trail | None = None) -> tuple[ChildRequest, RequestBody]:
    (follow_up,) = routed(what, of)
    assert follow_up.child is not None
    return follow_up.child, decode_body(follow_up.child.body)


# -- whether and where ------------------------------------------------------------------------------------------------


@pytest.mark.promise("C1")
@pytest.mark.parametrize("config", [None, InjectionConfig(enabled=False)])
def test_without_an_injection_nothing_goes_anywhere(config: InjectionConfig | None) -> None:
    routing = router().route(ended(config), None, NOW)
    assert routing.follow_ups == ()
    assert "no injection" in routing.reason


@pytest.mark.promise("C1")
def test_a_result_goes_to_each_target_once_and_by_default_to_its_own_conversation() -> None:
    assert [one.target for one in routed(ended(InjectionConfig()))] == ["alpha"]
    many = InjectionConfig(target_sessions=("beta", "originating", "beta", "alpha", "gamma"))
    found = routed(ended(many))
    assert [one.target for one in found] == ["beta", "alpha", "gamma"]
    assert [one.injection_id for one in found] == ["req_1/1", "req_1/2", "req_1/3"]
    for one in found:
        assert one.text.startswith("<system-reminder>\n")
        assert "The answer." in one.text
        assert one.block is None
        assert not one.guard


@given(names=st.lists(st.sampled_from(["originating", "alpha", "b", "c", "d"]), min_size=1, max_size=100))
def test_no_target_comes_twice_and_none_is_left_out(names: list[str]) -> None:
    found = targets(InjectionConfig(target_sessions=tuple(names)), "alpha")
    assert len(set(found)) == len(found)
    assert set(found) == {"alpha" if name == "originating" else name for name in names}


def test_at_most_a_hundred_targets_can_be_named() -> None:
    with pytest.raises(msgspec.ValidationError, match="length <= 100"):
        msgspec.convert({"target_sessions": [f"s{n}" for n in range(101)]}, InjectionConfig)


@pytest.mark.parametrize(
    "wrong", [{"inherit": True}, {"mode": "later"}, {"trigger_type": "../x"}, {"trigger_type": "a\n"}]
)
def test_a_wrong_setting_is_refused_with_its_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, InjectionConfig)


def test_a_trigger_without_a_template_is_answered_with_the_known_ones() -> None:
    templates = Templates()
    assert unknown_triggers(templates, None) == ()
    assert unknown_triggers(templates, InjectionConfig(trigger_type="research")) == ()
    assert unknown_triggers(templates, InjectionConfig(trigger_type="reserch", enabled=False)) == ()
    assert "research" in unknown_triggers(templates, InjectionConfig(trigger_type="reserch"))


# -- the child --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("C2")
def test_direct_makes_a_request_and_next_makes_none() -> None:
    child, asked = only_child(ended(InjectionConfig(target_sessions=("beta",)), priority=Priority.HIGH))
    assert asked.prompt is not None
    assert asked.prompt.startswith("<system-reminder>\n")
    assert asked.session_id == "beta"
    assert (child.route, child.model, child.priority) == ("stub", "stub/echo", int(Priority.HIGH))
    assert child.rank == HEAD_STARTS.rank(Priority.HIGH, NOW)
    assert child.membership.parent == "req_1"
    (waiting,) = routed(ended(InjectionConfig(mode="next", target_sessions=("beta",))))
    assert waiting.child is None


SHAPED = {
    "model": "echo",
    "system": "Be brief.",
    "max_tokens": 100,
    "temperature": 0.5,
    "timeout": 30.0,
    "retry": RetryBody(max_attempts=1),
    "mcp_config": {"mcpServers": {"files": {}}},
    "provider_options": {"cwd": "/secret"},
    "patterns": PatternsConfig(threshold=0.9),
    "circuit_breaker_config": ChainConfig(max_depth=3, parent_request_id="req_0"),
}


def test_in_its_own_conversation_a_child_inherits_all_that_shapes_an_answer() -> None:
    passing = {"delay": 5.0, "ttl": 9.0, "on_busy": "reject", "fork": True}
    _, asked = only_child(ended(InjectionConfig(), body=body(InjectionConfig(), **SHAPED, **passing)))
    assert (asked.system, asked.mcp_config, asked.provider_options) == (
        SHAPED["system"],
        SHAPED["mcp_config"],
        SHAPED["provider_options"],
    )
    assert (asked.delay, asked.ttl, asked.on_busy, asked.fork) == (None, None, "enqueue", False)
    assert asked.agent_id == "ann"
    assert asked.circuit_breaker_config == ChainConfig(max_depth=3)


@pytest.mark.promise("S3")
def test_another_conversation_gets_neither_tools_nor_system_text_of_the_sender() -> None:
    config = InjectionConfig(target_sessions=("beta",))
    child, asked = only_child(ended(config, body=body(config, **SHAPED)))
    assert (asked.system, asked.mcp_config, asked.provider_options, asked.agent_id) == (None, None, None, None)
    assert (asked.model, asked.max_tokens, asked.timeout) == ("echo", 100, 30.0)
    assert asked.patterns == PatternsConfig(threshold=0.9)
    assert child.membership.limits.max_depth == 3


def test_a_child_runs_for_the_agent_of_its_conversation_if_that_is_known() -> None:
    (one,) = (
        router().route(ended(InjectionConfig(target_sessions=("beta",))), None, NOW, None, {"beta": "bo"}).follow_ups
    )
    assert one.child is not None
    assert one.child.agent_id == "bo"
    assert decode_body(one.child.body).agent_id == "bo"


@pytest.mark.promise("C1")
def test_a_child_injects_as_it_inherits() -> None:
    plain = InjectionConfig(target_sessions=("beta",), trigger_type="research")
    child, asked = only_child(ended(plain))
    assert asked.injection_config is None
    assert not child.membership.injects
    same = msgspec.structs.replace(plain, inherit="same")
    child, asked = only_child(ended(same))
    assert asked.injection_config == same
    assert child.membership.injects
    reply = msgspec.structs.replace(plain, inherit="reply")
    child, asked = only_child(ended(reply))
    assert asked.injection_config == msgspec.structs.replace(reply, target_sessions=("alpha",))
    back = ended(reply, conversation="beta", request_id="req_1/1", body=asked)
    _, again = only_child(back)
    assert again.session_id == "alpha"
    assert again.injection_config == msgspec.structs.replace(reply, target_sessions=("beta",))


@pytest.mark.promise("C4")
def test_its_origin_is_outside_the_text() -> None:
    way = trail([("alpha", "one"), ("beta", "two"), ("alpha", "three")])
    _, asked = only_child(ended(InjectionConfig(target_sessions=("beta",)), request_id="req_2"), way)
    assert asked.metadata == {
        "injection": {
            "injection_id": "req_2/1",
            "request_id": "req_2",
            "agent_id": "ann",
            "conversation_id": "alpha",
            "chain_id": "req_0",
            "hop": 3,
            "trigger_type": "general",
            "outcome": "completed",
        }
    }


def test_a_child_whose_model_is_not_served_any_more_says_so() -> None:
    child, _ = only_child(ended(InjectionConfig(), route="", route_error="no provider serves stub/echo"))
    assert child.error == "no provider serves stub/echo"


# -- ends without a result --------------------------------------------------------------------------------------------


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    ("state", "error", "word"),
    [
        (State.FAILED, "provider_error", "failed"),
        (State.FAILED, "timeout", "did not"),
        (State.FAILED, "daemon_restart", "failed"),
        (State.CANCELLED, "cancelled", "cancelled"),
        (State.EXPIRED, None, "never started"),
    ],
)
def test_an_end_without_a_result_is_delivered_too(state: State, error: str | None, word: str) -> None:
    word = "stopped" if error == "timeout" else word
    child, asked = only_child(ended(InjectionConfig(), state=state, error=error, message="why", text=None))
    assert asked.prompt is not None
    assert word in asked.prompt
    assert not child.membership.guard


@pytest.mark.promise("C3", "C5")
def test_the_notice_of_a_block_is_a_guard_message_and_goes_no_further() -> None:
    block = Block(code="max_depth", message="depth 6 is over the chain's max_depth 5")
    config = InjectionConfig(inherit="same")
    (one,) = routed(ended(config, state=State.BLOCKED, text=None, block=block), trail([("alpha", None)]))
    assert one.guard
    assert one.block is None
    assert one.child is not None
    assert one.child.membership.guard
    assert not one.child.membership.injects
    assert decode_body(one.child.body).injection_config is None
    assert "max_depth" in one.text


# -- blocks -----------------------------------------------------------------------------------------------------------

CYCLE = Judgement(
    risk_score=0.9, evidence=("round and round",), block=Block(code="cycle", message="round and round", risk_score=0.9)
)


@pytest.mark.promise("C3", "C7")
def test_if_the_patterns_block_the_results_are_dead_letters_and_each_target_is_notified() -> None:
    config = InjectionConfig(target_sessions=("beta", "gamma"), inherit="reply", follow_up_guidance="Go on.")
    routing = router().route(ended(config), trail([("alpha", "one"), ("beta", "two")]), NOW, CYCLE)
    first, second, *notices = routing.follow_ups
    assert [(one.target, one.block, one.guard) for one in (first, second)] == [
        ("beta", CYCLE.block, False),
        ("gamma", CYCLE.block, False),
    ]
    assert [(one.injection_id, one.target, one.block, one.guard) for one in notices] == [
        ("req_1/3", "beta", None, True),
        ("req_1/4", "gamma", None, True),
    ]
    assert "req_1/1" in notices[0].text
    assert "The answer." not in notices[0].text
    assert "Go on." not in notices[0].text
    assert "cycle" in routing.reason
    aftermath = routing.aftermath(CYCLE)
    assert aftermath.trip == CYCLE.block
    assert aftermath.follow_ups == routing.follow_ups


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    ("view", "code"),
    [
        ({"limits": msgspec.structs.replace(trail([("a", "x")]).view.limits, max_depth=1)}, "max_depth"),
        ({"spending": Spending(started_at=NOW, used=3_000_000)}, "token_budget"),
        ({"spending": Spending(started_at=NOW - 200_000 * SECOND)}, "time_window"),
        ({"spending": Spending(started_at=NOW, tripped=CYCLE.block)}, "cycle"),
    ],
)
def test_a_limit_that_stops_the_next_hop_is_seen_before_the_store_sees_it(view: dict[str, Any], code: str) -> None:
    first, notice = routed(ended(InjectionConfig()), trail([("alpha", "one"), ("alpha", "two")], **view))
    assert first.block is not None
    assert first.block.code == code
    assert notice.guard


def test_no_target_is_notified_of_a_cancelled_chain() -> None:
    closed = Spending(started_at=NOW, closed=True)
    (one,) = routed(
        ended(InjectionConfig(), state=State.CANCELLED, text=None), trail([("alpha", "x")], spending=closed)
    )
    assert one.block is not None
    assert one.block.code == "chain_closed"


def test_the_usage_of_the_request_itself_is_counted() -> None:
    way = trail([("alpha", "one"), ("alpha", "two")], spending=Spending(started_at=NOW, used=49_000, reserved=5_000))
    assert routed(ended(InjectionConfig(), charged=500), way)[0].block is None
    (first, _) = routed(ended(InjectionConfig(), charged=1_500), way)
    assert first.block is not None
    assert first.block.code == "token_budget"


def test_a_broken_template_is_reported_once_and_the_results_are_delivered() -> None:
    config = InjectionConfig(trigger_type="nowhere", target_sessions=("a", "b", "c"))
    routing = router().route(ended(config), None, NOW)
    assert len(routing.follow_ups) == 3
    assert len(routing.problems) == 1
    assert "nowhere" in routing.problems[0]
