"""The one bound of all unfinished lines, and who loses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.transports.held_input import REST, Held, HeldInput, losers

MB = 1_000_000


@given(sizes=st.lists(st.integers(1, 10_000), max_size=50), bound=st.integers(1, 50_000))
@pytest.mark.promise("S4")
def test_who_is_left_holds_little_enough_and_only_large_ones_lose(sizes: list[int], bound: int) -> None:
    clients = {number: Held(number, size) for number, size in enumerate(sizes)}
    lost = losers(clients.items(), bound)
    left = sum(held.size for number, held in clients.items() if number not in lost)
    if sum(sizes) <= bound:
        assert lost == []
    else:
        assert left <= bound * REST
        assert all(clients[number].size > bound * REST / len(sizes) for number in lost)
    assert lost == sorted(lost), "the oldest first"


@pytest.mark.promise("S4")
def test_a_sender_of_a_long_line_does_not_lose_to_idle_ones() -> None:
    held: HeldInput[str] = HeldInput(64 * MB)
    for number in range(4):
        assert held.note(f"lies {number}", 15 * MB, progress=False) == []
    assert held.note("sends", 2 * MB, progress=False) == []
    assert held.note("sends", 10 * MB, progress=False) == ["lies 0", "lies 1"]
    assert held.note("sends", 16 * MB, progress=False) == []
    assert held.note("sends", 0, progress=True) == []
    assert held.total == 30 * MB


@pytest.mark.promise("S4")
def test_half_a_command_that_was_typed_long_ago_is_spared() -> None:
    held: HeldInput[int] = HeldInput(MB)
    held.note(0, 20, progress=False)
    assert held.note(1, 600_000, progress=False) == []
    assert held.note(2, 600_000, progress=False) == [1]
    assert held.note(0, 40, progress=False) == []


def test_a_client_that_finishes_lines_makes_progress_and_loses_after_one_that_does_not() -> None:
    held: HeldInput[str] = HeldInput(1_000)
    held.note("first", 400, progress=False)
    held.note("second", 400, progress=False)
    held.note("first", 400, progress=True)
    assert held.note("third", 400, progress=False) == ["second", "first"]


def test_who_is_gone_is_not_counted() -> None:
    held: HeldInput[str] = HeldInput(1_000)
    held.note("one", 900, progress=False)
    held.forget("one")
    held.forget("one")
    assert held.total == 0
    assert held.note("two", 1_000, progress=False) == []
    assert held.note("two", 1_001, progress=False) == ["two"]
