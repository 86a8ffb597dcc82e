"""Whose turn it is: start-time fair queueing of agents within a priority, and a small share for every priority.

Each request that waits gets a tag on a virtual clock of its priority: one step of its flow behind that flow's last one,
and not before the clock, which stands at the tag of the latest start. The lowest tag runs first. So flows that have
something waiting take turns, by their weights, however much each has sent; one that comes anew is next in a moment, and
saves nothing up while it is away. A flow is an agent, or what stands for one.

Between priorities the rank decides, as it does without fairness. But a priority that was passed over `SHARE` times
while it had something ready gets the next place, so that no flood keeps it out for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ksi.request import Priority

STEP = 1_000_000
"""The step of a flow of weight 1 on the virtual clock."""

SHARE = 15
"""How often in a row a priority that has something ready is passed over: it gets one place in sixteen at least."""

KNOWN_FLOWS = 10_000
"""Flows that are remembered. One that is forgotten goes on at the clock: it gains a turn at most."""


def step_of(flow: str, weights: Mapping[str, float]) -> int:
    """How far a request of a flow moves it on. `weights` are by name, or by a beginning with a star behind it."""
    weight = weights.get(flow)
    if weight is None:
        fitting = [name for name in weights if name.endswith("*") and flow.startswith(name[:-1])]
        weight = weights[max(fitting, key=len)] if fitting else 1.0
    return max(1, math.floor(STEP / weight + 0.5))


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """Whose turn is next in a priority."""

    priority: Priority
    flow: str
    """`agent:NAME`, or the connection or session that stands for one."""
    request_id: str
    """Its next request."""


class Turns:
    """The virtual clocks of a store that one daemon has for itself. Nothing of it need be kept: see `restore`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._steps: dict[str, int] = {}
        self._clock: dict[int, int] = {}
        self._last: dict[tuple[int, str], int] = {}

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Go by these weights from now on."""
        self._weights = weights
        self._steps.clear()

    def tag(self, priority: int, flow: str) -> int:
        """The tag of a request that begins to wait."""
        step = self._steps.get(flow)
        if step is None:
            if len(self._steps) >= KNOWN_FLOWS:
                self._steps.clear()
            step = self._steps[flow] = step_of(flow, self._weights)
        clock = self._clock.get(priority, 0)
        tag = max(clock, self._last.get((priority, flow), 0)) + step
        if len(self._last) >= KNOWN_FLOWS:
            self._last = {key: last for key, last in self._last.items() if last > self._clock.get(key[0], 0)}
            if len(self._last) >= KNOWN_FLOWS:
                self._last.clear()
        self._last[priority, flow] = tag
        return tag

    def started(self, priority: int, tag: int) -> None:
        """A request begins to run."""
        if tag > self._clock.get(priority, 0):
            self._clock[priority] = tag

    def restore(self, waiting: Iterable[tuple[int, str, int, int]]) -> None:
        """Go on after a restart: priority, flow, and the lowest and highest tag of what waits of it."""
        for priority, flow, lowest, highest in waiting:
            self._last[priority, flow] = highest
            reached = max(0, lowest - STEP)
            self._clock[priority] = min(self._clock.get(priority, reached), reached)


class Shares:
    """Which priority gets the next place."""

    def __init__(self) -> None:
        self._passed: dict[int, int] = {}

    def choose(self, heads: Mapping[int, tuple[int, int]], *, fair: bool) -> int:
        """The priority whose next request runs; `heads` are the rank and key of each one's next."""
        first = min(heads, key=heads.__getitem__)
        if not fair or len(heads) == 1:
            self._passed.pop(first, None)
            return first
        longest = max(sorted(heads), key=lambda priority: self._passed.get(priority, 0))
        chosen = longest if self._passed.get(longest, 0) >= SHARE else first
        for priority in heads:
            self._passed[priority] = 0 if priority == chosen else self._passed.get(priority, 0) + 1
        return chosen


def flow_of(agent_id: str | None, flow: str, conversation: str) -> str:
    """Whom a request counts for: its agent, or what stands for one."""
    return f"agent:{agent_id}" if agent_id is not None else flow or f"session:{conversation}"


def next_flows(found: Sequence[tuple[int, int, int, str, str]], limit: int) -> list[Flow]:
    """Whose turn is next, of (priority, tag, rank, flow, request): each flow once, in order."""
    flows: list[Flow] = []
    seen: set[tuple[int, str]] = set()
    count: dict[int, int] = {}
    for priority, _, _, flow, request_id in sorted(found):
        if (priority, flow) not in seen and count.get(priority, 0) < limit:
            seen.add((priority, flow))
            count[priority] = count.get(priority, 0) + 1
            flows.append(Flow(priority=Priority(priority), flow=flow, request_id=request_id))
    return flows
