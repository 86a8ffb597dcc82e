"""Values in rows and back, and cursors."""

from __future__ import annotations

import base64
import re
from typing import Any

import apsw
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.errors import InvalidData
from ksi.request import Attempt, Outcome, Priority, State, Usage
from ksi.store.sqlite.rows import (
    STATE_CODES,
    STATES,
    Row,
    attempt_values,
    read_attempt,
    read_cursor,
    read_fork,
    read_lock,
    read_request_row,
    read_session,
    write_cursor,
)
from ksi.store.sqlite.statements import read_sql
from ksi.store.values import Fork, LineEntry, Listing

counts = st.integers(0, 2**53)
times = st.integers(0, 2**53)
maybe_text = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)
usages = st.builds(
    Usage,
    input_tokens=counts,
    output_tokens=counts,
    cache_read_tokens=counts,
    cache_write_tokens=counts,
    reasoning_tokens=counts,
    cost_usd=st.none() | st.floats(0, 1e6),
)
attempts = st.builds(
    Attempt,
    number=st.integers(1, 1_000),
    provider=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    outcome=st.sampled_from(Outcome),
    started_at=times,
    finished_at=times,
    model=maybe_text,
    asked=maybe_text,
    mcp=st.booleans(),
    text=maybe_text,
    usage=st.none() | usages,
    stop_reason=maybe_text,
    provider_session=maybe_text,
    last_message=maybe_text,
    fork=maybe_text,
    content=st.just(()) | st.just(({"type": "thinking", "thinking": "é", "signature": "s"},)),
    error=maybe_text,
    message=maybe_text,
    first_token_us=st.none() | st.integers(-(2**40), 2**40),
    raw=st.none() | st.binary(max_size=20),
)


def through_sqlite(values: Row) -> Row:
    """What SQLite gives back for a row."""
    connection = apsw.Connection(":memory:")
    places = ", ".join("?" for _ in values)
    (row,) = connection.execute(f"SELECT {places}", values)
    connection.close()
    return tuple(row)


# -- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("T1")
@given(attempts)
def test_an_attempt_comes_back_as_it_went_in(attempt: Attempt) -> None:
    assert read_attempt(through_sqlite(attempt_values(attempt))) == attempt


NOT_KEPT = {"node"}
"""What a store that one machine has for itself has no use for (D4)."""


def test_every_field_of_an_attempt_is_tried_above() -> None:
    whole: dict[str, Any] = {"number": 1, "provider": "p", "outcome": "failed", "started_at": 1, "finished_at": 2}
    others: dict[str, Any] = {"usage": Usage(input_tokens=5), "mcp": True, "raw": b"{}", "first_token_us": 3}
    others["content"] = ({"type": "tool_use", "id": "a", "name": "look", "input": {"x": [1]}},)
    for field in msgspec.structs.fields(Attempt):
        if field.name in whole or field.name in NOT_KEPT:
            continue
        attempt = msgspec.convert({**whole, field.name: others.get(field.name, "x")}, Attempt)
        assert read_attempt(through_sqlite(attempt_values(attempt))) == attempt


@pytest.mark.promise("T1")
def test_no_report_of_usage_is_not_a_report_of_nothing() -> None:
    attempt = Attempt(number=1, provider="p", outcome=Outcome.COMPLETED, started_at=1, finished_at=2)
    reported = msgspec.structs.replace(attempt, usage=Usage())
    assert read_attempt(attempt_values(attempt)).usage is None
    assert read_attempt(attempt_values(reported)).usage == Usage()


# -- states -----------------------------------------------------------------------------------------------------------


def test_every_state_has_one_number_that_never_changes() -> None:
    assert set(STATES) == set(State)
    assert len(STATES) == len(State)
    assert [STATE_CODES[state] for state in STATES] == list(range(len(STATES)))
    assert [str(state) for state in STATES] == [
        "scheduled",
        "queued",
        "running",
        "retrying",
        "parked",
        "completed",
        "failed",
        "cancelled",
        "blocked",
        "expired",
    ]


def test_the_layout_speaks_of_the_same_numbers() -> None:
    """Partial indexes name the states that they hold by number, with the word beside it where there is one."""
    schema = read_sql("schema.sql")
    numbers = {
        int(n) for group in re.findall(r"WHERE state (?:=|IN) \(?([\d, ]+)\)?", schema) for n in group.split(",")
    }
    assert numbers
    assert numbers <= set(range(len(STATES)))


# -- views ------------------------------------------------------------------------------------------------------------


def test_a_listing_s_line_has_its_words_and_no_model_is_an_empty_one() -> None:
    values = ("r", "talk", STATE_CODES[State.RETRYING], int(Priority.LOW), None, "agent", 2, 10, 20, 11, None, "p", "e")
    row = read_request_row((*values, "why", 15, None))
    assert (row.request_id, row.conversation, row.state, row.priority) == ("r", "talk", State.RETRYING, Priority.LOW)
    assert (row.model, row.agent_id, row.attempt) == ("", "agent", 2)
    assert (row.enqueued_at, row.due, row.started_at, row.finished_at) == (10, 20, 11, None)
    assert (row.provider, row.error, row.message) == ("p", "e", "why")


def test_a_session_s_view_has_its_agents_and_its_lock_as_a_truth() -> None:
    row = ("talk", 1, 2, 3, 4, "p", "ps", "parent")
    view = read_session((*row, 1), ("a", "b"))
    assert (view.conversation, view.created_at, view.active_at, view.turns, view.head) == ("talk", 1, 2, 3, 4)
    assert (view.provider, view.provider_session, view.forked_from) == ("p", "ps", "parent")
    assert view.locked is True
    assert view.agents == ("a", "b")
    assert read_session((*row, 0), ()).locked is False


def test_a_free_lock_has_no_holder() -> None:
    view = read_lock("talk", (None,) * 7, 0)
    assert (view.holder, view.external, view.state, view.since) == (None, False, None, None)
    assert (view.expires_at, view.fence, view.metadata) == (None, None, None)


def test_only_an_external_holder_has_an_end_and_metadata() -> None:
    line = (LineEntry(request_id="w", priority=Priority.HIGH, external=True, enqueued_at=5),)
    row = ("h", 1, STATE_CODES[State.RUNNING], 1, 9, 7, b'{"a":1}')
    mine = read_lock("talk", row, 1, line)
    assert (mine.holder, mine.external, mine.state, mine.since) == ("h", True, State.RUNNING, 1)
    assert (mine.expires_at, mine.fence, mine.metadata) == (9, 7, b'{"a":1}')
    assert (mine.line, mine.waiting) == (line, 1)
    other = read_lock("talk", ("h", 0, STATE_CODES[State.PARKED], 1, 9, 7, b'{"a":1}'), 0)
    assert (other.external, other.state) == (False, State.PARKED)
    assert (other.expires_at, other.metadata) == (None, None)
    assert read_lock("talk", ("h", 1, STATE_CODES[State.RUNNING], 1, 9, 7, b""), 0).metadata is None


def test_a_fork_is_read_by_its_columns() -> None:
    assert read_fork(("a", "b", "r", 5, "requested")) == Fork(
        parent="a", child="b", request_id="r", at=5, kind="requested"
    )


# -- cursors ----------------------------------------------------------------------------------------------------------

numbers = st.integers(-(2**63), 2**63 - 1)
parts = st.lists(numbers | st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=4)


@pytest.mark.promise("Q8")
@given(listing=st.sampled_from(Listing), parts=parts)
def test_a_cursor_comes_back_as_it_was_given(listing: Listing, parts: list[Any]) -> None:
    first = [0 if isinstance(part, int) else "" for part in parts]
    cursor = write_cursor(listing, *parts)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", cursor)
    assert read_cursor(listing, cursor, first) == tuple(parts)


def test_without_a_cursor_a_list_begins_at_its_first() -> None:
    assert read_cursor("sessions", None, (5, "a")) == (5, "a")


def forged(value: Any) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


@pytest.mark.promise("S1")
@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "?",
        "é",
        "AAAA",
        "A",
        "=",
        forged(["ready", 1, "a"]),
        forged(["waiting"]),
        forged(["waiting", "a", 1]),
        forged(["waiting", 1]),
        forged(["waiting", 1, "a", 2]),
        forged(["waiting", True, "a"]),
        forged(["waiting", 1.5, "a"]),
        forged(["waiting", None, "a"]),
        forged(["waiting", [1], "a"]),
        forged(["waiting", 2**63, "a"]),
        forged(["waiting", 2**64 - 1, "a"]),
        forged("waiting"),
        forged({"waiting": 1}),
        forged([]),
        forged([5, 1, "a"]),
    ],
)
def test_a_foreign_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidData) as caught:
        read_cursor(Listing.WAITING, cursor, (0, ""))
    assert caught.value.path == "cursor"


@pytest.mark.promise("S1")
@given(st.text(max_size=60))
def test_no_text_is_more_than_refused(cursor: str) -> None:
    try:
        read = read_cursor(Listing.WAITING, cursor, (0, ""))
    except InvalidData:
        return
    assert isinstance(read[0], int) and isinstance(read[1], str)
