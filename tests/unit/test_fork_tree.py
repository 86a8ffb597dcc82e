"""The tree of forks as the command draws it."""

from __future__ import annotations

import pytest

from ksi.cli.fork_tree import tree


def fork(parent: str, child: str, kind: str = "requested") -> dict[str, object]:
    return {"parent": parent, "child": child, "request_id": f"to-{child}", "kind": kind, "at": 0.0}


def names(*forks: dict[str, object]) -> list[str]:
    return [line.partition("  asked")[0] for line in tree(forks)]


def test_nothing_is_drawn_of_nothing() -> None:
    assert names() == []


@pytest.mark.promise("L6")
def test_children_stand_below_their_parents_in_the_order_in_which_they_came() -> None:
    assert names(fork("trip", "a"), fork("trip", "b"), fork("a", "c"), fork("other", "d"), fork("c", "e")) == [
        "trip",
        "├─ a",
        "│  └─ c",
        "│     └─ e",
        "└─ b",
        "other",
        "└─ d",
    ]


def test_a_fork_says_how_by_whom_and_when() -> None:
    (_, line) = tree([fork("trip", "a", "node_lost")])
    assert line.startswith("└─ a  moved from a machine that was lost by to-a, 19")
    (_, line) = tree([fork("trip", "a", "foreign_turn")])
    assert line.startswith("└─ a  continued next to a foreign turn by to-a, 19")
    (_, other) = tree([fork("trip", "a", "of_another_kind")])
    assert "of_another_kind by to-a" in other


@pytest.mark.parametrize(
    ("forks", "drawn"),
    [
        ([fork("a", "a")], ["a", "└─ a"]),
        ([fork("a", "b"), fork("b", "a")], ["a", "└─ b", "   └─ a"]),
        ([fork("a", "b"), fork("a", "b"), fork("b", "c")], ["a", "├─ b", "│  └─ c", "└─ b"]),
    ],
)
def test_a_circle_is_not_unfolded_again(forks: list[dict[str, object]], drawn: list[str]) -> None:
    assert names(*forks) == drawn
