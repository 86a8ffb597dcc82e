"""The nouns and the state table."""

from __future__ import annotations

from itertools import pairwise, product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.clock import MICROSECONDS
from ksi.content.blocks import Message
from ksi.request import (
    FINAL_STATES,
    FIRST_STATES,
    PRIORITY_WORDS,
    TRANSITIONS,
    WAITING_STATES,
    HeadStarts,
    Priority,
    RequestBody,
    State,
    Usage,
    decode_body,
    encode_body,
    full_model,
    may_become,
)

HOUR = 3_600 * MICROSECONDS
HEAD_STARTS = HeadStarts(high=6 * HOUR, normal=3 * HOUR, low=1 * HOUR, background=0)

# -- states -----------------------------------------------------------------------------------------------------------

TABLE = """
scheduled -> queued cancelled expired
queued -> running cancelled blocked expired
running -> completed failed cancelled retrying parked queued
retrying -> queued cancelled failed
parked -> queued cancelled failed
"""


@pytest.mark.promise("Q3", "R1")
def test_the_state_table_is_the_documented_one() -> None:
    steps = {
        (State(before), State(after))
        for before, afters in (line.split(" -> ") for line in TABLE.strip().splitlines())
        for after in afters.split()
    }
    assert {pair for pair in product(State, State) if may_become(*pair)} == steps


@pytest.mark.promise("R1")
def test_a_request_ends_in_one_of_five_states_and_stays_there() -> None:
    words = {"completed", "failed", "cancelled", "blocked", "expired"}
    assert {state.value for state in FINAL_STATES} == words
    for state in State:
        assert state.final == (state.value in words)
        assert state.final == (not TRANSITIONS[state])


def test_every_state_is_first_or_can_be_reached_and_can_end() -> None:
    reached = set(FIRST_STATES)
    for _ in State:
        reached |= {after for state in reached for after in TRANSITIONS[state]}
    assert reached == set(State)
    for state in State:
        ahead = {state}
        for _ in State:
            ahead |= {after for one in ahead for after in TRANSITIONS[one]}
        assert ahead & FINAL_STATES


def test_a_waiting_request_is_neither_running_nor_final() -> None:
    assert {State.RUNNING} | WAITING_STATES | FINAL_STATES == set(State)
    assert not WAITING_STATES & FINAL_STATES
    assert State.RUNNING not in WAITING_STATES


@pytest.mark.promise("F8")
def test_everything_that_is_not_final_can_be_cancelled() -> None:
    assert all(may_become(state, State.CANCELLED) for state in State if not state.final)


# -- priorities and ranks ---------------------------------------------------------------------------------------------


@pytest.mark.promise("Q1")
def test_there_are_five_priorities_by_their_words() -> None:
    assert list(PRIORITY_WORDS) == ["critical", "high", "normal", "low", "background"]
    for word, priority in PRIORITY_WORDS.items():
        assert priority.word == word
    assert all(higher < lower for higher, lower in pairwise(PRIORITY_WORDS.values()))


priorities = st.sampled_from(list(Priority))
times = st.integers(0, 4_000_000_000 * MICROSECONDS)


@pytest.mark.promise("Q2")
@given(priorities, times, times)
def test_within_one_priority_earlier_comes_first(priority: Priority, one: int, other: int) -> None:
    assert (HEAD_STARTS.rank(priority, one) < HEAD_STARTS.rank(priority, other)) == (one < other)


@pytest.mark.promise("Q2")
@given(priorities, priorities, times)
def test_at_one_moment_a_higher_priority_comes_first(one: Priority, other: Priority, at: int) -> None:
    assert (HEAD_STARTS.rank(one, at) < HEAD_STARTS.rank(other, at)) == (one < other)


@pytest.mark.promise("Q2")
@given(priorities, priorities, times, times)
def test_no_request_waits_for_later_ones_longer_than_the_difference_of_head_starts(
    mine: Priority, theirs: Priority, at: int, later: int
) -> None:
    starts = {priority: -HEAD_STARTS.rank(priority, 0) for priority in Priority}
    passes = HEAD_STARTS.rank(theirs, at + later) < HEAD_STARTS.rank(mine, at)
    assert passes == (later < starts[theirs] - starts[mine])


@pytest.mark.promise("Q2")
@given(times, times, priorities.filter(lambda priority: priority is not Priority.CRITICAL))
def test_critical_comes_before_all_others_of_any_age(at: int, later: int, other: Priority) -> None:
    assert HEAD_STARTS.rank(Priority.CRITICAL, at + later) < HEAD_STARTS.rank(other, at)


@given(priorities, times)
def test_a_rank_fits_a_signed_word_with_room_for_those_who_go_before_it(priority: Priority, at: int) -> None:
    assert -(2**62) < HEAD_STARTS.rank(priority, at) < 2**62


# -- usage ------------------------------------------------------------------------------------------------------------

costs = st.none() | st.integers(0, 1_000).map(lambda quarters: quarters / 4)
usages = st.builds(
    Usage,
    input_tokens=st.integers(0, 10**9),
    output_tokens=st.integers(0, 10**9),
    cache_read_tokens=st.integers(0, 10**9),
    cache_write_tokens=st.integers(0, 10**9),
    reasoning_tokens=st.integers(0, 10**9),
    cost_usd=costs,
)


@pytest.mark.promise("T1")
@given(usages, usages, usages)
def test_usage_adds_up_in_any_order(one: Usage, two: Usage, three: Usage) -> None:
    assert one.plus(two) == two.plus(one)
    assert one.plus(two).plus(three) == one.plus(two.plus(three))


@pytest.mark.promise("T1")
@given(usages, usages)
def test_every_kind_of_token_is_summed_and_a_cost_only_if_both_are_known(one: Usage, two: Usage) -> None:
    total = one.plus(two)
    for name in Usage.__struct_fields__:
        if name != "cost_usd":
            assert getattr(total, name) == getattr(one, name) + getattr(two, name)
    if one.cost_usd is None or two.cost_usd is None:
        assert total.cost_usd is None
    else:
        assert total.cost_usd == one.cost_usd + two.cost_usd


# -- a request's content ----------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
objects = st.none() | st.dictionaries(texts, json_values, max_size=4)
bodies = st.builds(
    RequestBody,
    prompt=st.none() | texts,
    messages=st.lists(st.builds(Message, texts, texts), max_size=3).map(tuple),
    model=st.none() | texts,
    session_id=st.none() | texts,
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.none() | st.integers(1, 2**31),
    stop=st.lists(texts, max_size=3).map(tuple),
    priority=st.integers(0, 4),
    metadata=objects,
    provider_options=objects,
)


@pytest.mark.promise("Q4")
@given(bodies)
def test_a_content_comes_back_from_its_bytes_and_gives_the_same_bytes_again(body: RequestBody) -> None:
    data = encode_body(body)
    assert decode_body(data) == body
    assert encode_body(decode_body(data)) == data


def turned_round(value: object) -> object:
    """The same JSON with the keys of its objects the other way round."""
    if isinstance(value, dict):
        return {name: turned_round(part) for name, part in reversed(value.items())}
    return [turned_round(part) for part in value] if isinstance(value, list) else value


@pytest.mark.promise("Q4")
@given(bodies)
def test_the_order_in_which_fields_were_written_does_not_change_the_bytes(body: RequestBody) -> None:
    other = msgspec.structs.replace(
        body,
        metadata=turned_round(body.metadata),
        provider_options=turned_round(body.provider_options),
    )
    assert encode_body(other) == encode_body(body)


@pytest.mark.promise("Q4")
@given(bodies, bodies)
def test_different_contents_have_different_bytes(one: RequestBody, other: RequestBody) -> None:
    assert (encode_body(one) == encode_body(other)) == (one == other)


def test_a_prompt_is_a_dialogue_of_one_message_and_messages_are_their_own() -> None:
    assert RequestBody(prompt="hi").dialogue() == (Message("user", "hi"),)
    messages = (Message("user", "a"), Message("assistant", "b"))
    assert RequestBody(messages=messages).dialogue() == messages


@pytest.mark.parametrize(
    ("given_model", "full"),
    [
        ("haiku", "claude-cli/haiku"),
        ("claude-cli/opus", "claude-cli/opus"),
        ("team/a/b", "team/a/b"),
        (None, "local/small"),
        ("", "local/small"),
    ],
)
def test_a_bare_model_means_claude_code_and_none_means_the_default(given_model: str | None, full: str) -> None:
    assert full_model(given_model, "local/small") == full
