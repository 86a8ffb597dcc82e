"""Forked conversations as a tree: the parent, the reason, the request and the time of each fork."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ksi.cli.render import clock_time, say

Json = Mapping[str, Any]
KINDS = {
    "requested": "asked for",
    "foreign_turn": "continued next to a foreign turn",
    "new_session": "in a new session of its provider",
    "node_lost": "moved from a machine that was lost",
}


def print_forks(forks: Sequence[Json]) -> None:
    """The trees of these forks, each from its root; empty without forks."""
    if not forks:
        return
    say()
    say("forks")
    for line in tree(forks):
        say(line)


def tree(forks: Sequence[Json]) -> Iterator[str]:
    """The lines of the trees, for `forks` as in `conversation:lock_status`.

    A conversation that the forks lead back to is named again, but not expanded again.
    """
    branches: dict[str, list[Json]] = defaultdict(list)
    for fork in forks:
        branches[str(fork.get("parent"))].append(fork)
    children = {str(fork.get("child")) for fork in forks if fork.get("child") != fork.get("parent")}
    shown: set[str] = set()
    for root in sorted(branches, key=lambda name: name in children):  # in order; members of a circle come last
        if root not in shown:
            yield root
            yield from _below(root, branches, shown, "")


def _below(parent: str, branches: Mapping[str, Sequence[Json]], shown: set[str], indent: str) -> Iterator[str]:
    shown.add(parent)
    forks = branches.get(parent, ())
    for number, fork in enumerate(forks, 1):
        last, child = number == len(forks), str(fork.get("child"))
        yield f"{indent}{'└─' if last else '├─'} {child}  {_how(fork)}"
        if child not in shown:
            yield from _below(child, branches, shown, f"{indent}{'   ' if last else '│  '}")


def _how(fork: Json) -> str:
    kind = str(fork.get("kind"))
    return f"{KINDS.get(kind, kind)} by {fork.get('request_id')}, {clock_time(fork.get('at'))}"
