"""What `ksi top` draws fits every window, and its keys lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from ksi.cli.progress import bar
from ksi.cli.top import keys_in
from ksi.cli.top_view import LISTS, QUIT, Seen, View, lines, pressed, shown_rows

pytestmark = pytest.mark.promise("V2")

texts = st.text(st.characters(exclude_categories=()), max_size=16)
requests = st.fixed_dictionaries(
    {"request_id": texts.filter(bool), "session_id": texts, "status": st.sampled_from(["running", "queued", "failed"])},
    optional={
        "agent_id": texts,
        "model": texts,
        "priority": st.sampled_from(["high", "low"]),
        "enqueued_at": st.floats(0, 2e9),
        "started_at": st.floats(0, 2e9),
        "due_at": st.floats(0, 2e9),
        "error": texts,
    },
)
statuses = st.fixed_dictionaries(
    {"active": st.integers(0, 10**9), "version": texts, "uptime_seconds": st.floats(0, 1e9)}
)
looks = st.builds(
    Seen,
    status=statuses,
    rows=st.lists(requests, max_size=6).map(tuple),
    providers=st.dictionaries(texts, st.fixed_dictionaries({"running": st.integers(0, 99)}), max_size=3),
    problems=st.lists(texts, max_size=3).map(tuple),
    text=texts,
    at=st.floats(0, 2e9),
)
keys = st.lists(
    st.sampled_from([*"12345qjkscaphr?/yn", "S", "up", "down", "home", "end", "tab", "enter", "escape", "backspace"]),
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a loaded machine draws such looks slowly
@given(looks, keys, st.integers(1, 200), st.integers(1, 60))
def test_whatever_the_data_and_keys_the_screen_is_never_overrun(
    look: Seen, typed: list[str], width: int, height: int
) -> None:
    view = View()
    for key in typed:
        view, _ = pressed(view, look, key)
    drawn = lines(view, look, width, height)
    assert len(drawn) <= height
    for line in drawn:
        text = "".join(words for words, _ in line)
        assert cell_len(text) <= width
        assert text.isprintable()


def told(*names: str, **fields: Any) -> Seen:
    """A look with running requests of these names."""
    return Seen(rows=tuple({"request_id": name, "status": "running", "enqueued_at": 1.0, **fields} for name in names))


def after(view: View, look: Seen, typed: str) -> View:
    for key in typed:
        view, _ = pressed(view, look, key)
    return view


def test_the_choice_moves_and_stays_within_the_list() -> None:
    look = told("a", "b", "c")
    assert after(View(), look, "j").chosen == "a"
    assert after(View(), look, "jjjjj").chosen == "c"
    assert after(View(), look, "kk").chosen == "b"
    assert after(View(chosen="gone"), look, "j").chosen == "a"
    assert after(View(), told(), "j").chosen is None


def test_only_y_cancels_and_only_waiting_or_running_requests() -> None:
    look = told("a")
    view = after(View(), look, "jc")
    assert pressed(view, look, "y")[1] == ("completion:cancel", {"request_id": "a"}, "cancelled a")
    for key in ("n", "enter", "escape", "c"):
        back, act = pressed(view, look, key)
        assert (back.mode, act) == ("list", None)
    assert after(View(listing="failed"), look, "jc").word == "it has ended"


def test_only_what_asks_is_answered() -> None:
    look = told("a")
    asking = after(View(listing="asking"), look, "j")
    assert pressed(asking, look, "y")[1] == ("completion:approve", {"request_id": "a"}, "said yes to a")
    assert pressed(asking, look, "n")[1] == ("completion:reject", {"request_id": "a"}, "said no to a")
    assert pressed(after(View(), look, "j"), look, "y")[1] is None


def test_an_id_is_whole_and_the_agent_seen_in_80_columns() -> None:
    name = "req_1a2277f0ed656a185387e4e96b"
    look = told(name, agent_id="agent-one", model="anthropic/claude-sonnet", priority="background")
    (row,) = ["".join(text for text, _ in line) for line in lines(View(), look, 80, 24) if line and name in line[0][0]]
    assert name in row
    assert "agent-one" in row
    assert "anthropic/cl" in row


def test_a_filter_is_typed_taken_back_and_left() -> None:
    look = told("anna", "ben")
    view = after(View(), look, "/bex")
    view, _ = pressed(view, look, "backspace")
    assert [row["request_id"] for row in shown_rows(view, look)] == ["ben"]
    kept, _ = pressed(view, look, "enter")
    assert (kept.mode, kept.filter) == ("list", "be")
    gone, _ = pressed(view, look, "escape")
    assert (gone.mode, gone.filter) == ("list", "")
    assert after(View(), look, "/q").filter == "q"


def test_a_pause_is_of_the_chosen_request_s_scope() -> None:
    look = told("a", agent_id="anna", session_id="trip", model="stub/x")
    view = after(View(), look, "jp")
    found = {key: pressed(view, look, key)[1] for key in "easm"}
    data = {key: act.data for key, act in found.items() if act is not None}
    why = {"why": "by hand, in ksi top"}
    assert data == {
        "e": why,
        "a": {"agent_id": "anna", **why},
        "s": {"session_id": "trip", **why},
        "m": {"provider": "stub", **why},
    }
    assert pressed(after(View(), look, "p"), look, "a")[1] is None
    assert pressed(view, look, "escape")[1] is None


def test_every_list_has_a_number_and_q_leaves() -> None:
    assert [after(View(), told(), str(n)).listing for n in range(1, len(LISTS) + 1)] == list(LISTS)
    assert pressed(View(), told(), "q")[1] is QUIT
    assert pressed(View(mode="filter"), told(), "ctrl-c")[1] is QUIT


def test_keys_are_read_from_the_bytes_of_a_terminal() -> None:
    assert list(keys_in(b"a\x1b[A\x1b[B\x1b")) == ["a", "up", "down", "escape"]
    assert list(keys_in(b"\x1b[15~x\x1b[1;5Cy\x1bOAz")) == ["x", "y", "up", "z"]
    assert list(keys_in("é日\r\t\x7f".encode())) == ["é", "日", "enter", "tab", "backspace"]


@given(st.binary(max_size=40))
def test_no_bytes_of_a_terminal_break_it(data: bytes) -> None:
    assert all(keys_in(data))


def test_a_bar_has_the_given_length() -> None:
    assert [bar(share, 4) for share in (-1, 0, 0.5, 1, 7)] == ["░░░░", "░░░░", "██░░", "████", "████"]
