"""What a provider's death under load costs: waiting times before, while and after, and how soon it is used again.

Two providers serve one model, each an endpoint in a process of its own. Requests come at a steady rate, whatever
becomes of those before them. The first provider dies, by failing at once or by saying nothing, and is well again later.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.daemon_under_test import DaemonUnderTest, Home, Tables
from benchmarks.fault_endpoint import FaultEndpoint
from benchmarks.figures import Times
from ksi.client import Client
from ksi.config.schema import BreakerConfig
from ksi.errors import InternalError

Way = Literal["fails", "hangs"]
WAYS: tuple[Way, ...] = ("fails", "hangs")
PATIENCE = 60.0
"""Seconds that the provider gets to be used again, and then the last requests to end."""


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How the provider dies. Times in seconds."""

    rate: int = 200
    """Requests per second."""
    warm_up: float = 2.0
    """At the beginning, not counted."""
    before: float = 5.0
    dead: float = 10.0
    after: float = 3.0
    """That it is watched once it is used again."""
    delay: float = 0.02
    """That each endpoint takes for an answer."""
    timeout: float = 1.0
    """Of one attempt."""
    open_for: float = 1.0
    """That the provider is left alone at first; the rest of the breaker is as configured by default."""
    slots: int = 64
    """Calls that each provider takes at once."""

    @property
    def bound(self) -> int:
        """Calls that may go to the dead provider before it is left alone: those that the breaker must see fail, and
        all that can be under way beside them."""
        breaker = BreakerConfig()
        return max(breaker.failures, math.ceil(breaker.rate * breaker.max_samples)) + self.slots


QUICK = FaultPlan(warm_up=1.0, before=2.0, dead=4.0, after=1.0)


class FaultRun(msgspec.Struct, frozen=True, kw_only=True):
    """What one death cost. Times of requests are from sending to the whole reply."""

    way: Way
    before: Times
    dead: Times
    """Requests that were sent while it was dead."""
    met: Times
    """Those requests that were tried at it in vain."""
    after: Times
    """Requests that were sent when it was used again."""
    calls_in_vain: int
    """Attempts that began before it was left alone, and failed at it."""
    probes_in_vain: int
    """Attempts that failed at it later: it was tried again while it was dead."""
    left_alone_after: float
    """Seconds from its death to the breaker's opening."""
    spare_share: float
    """Of the answers to requests that were sent while it was dead."""
    used_again_after: float
    """Seconds from its recovery to its first answer."""
    not_completed: int


class _Asked(msgspec.Struct, frozen=True):
    """One request: when it was sent, how long it took, and what came."""

    sent: float
    took: float
    reply: dict[str, Any]

    @property
    def provider(self) -> str | None:
        return self.reply.get("provider")

    @property
    def ended(self) -> float:
        return self.sent + self.took

    @property
    def in_vain(self) -> list[float]:
        """When its attempts at the dying provider began that failed, as wall time."""
        return [
            attempt["started_at"]
            for attempt in self.reply.get("attempts", ())
            if attempt["provider"] == "team" and attempt["outcome"] == "failed"
        ]


def measure_faults(plan: FaultPlan, folder: Path, say: Callable[[str], None]) -> list[FaultRun]:
    """Let a provider die in each way, on daemons with homes below `folder`; `say` hears what is going on.

    Raises:
        InternalError: a daemon did not start, or the provider was not used again.
    """
    found = []
    for way in WAYS:
        say(f"a provider that {way}")
        with FaultEndpoint(plan.delay) as first, FaultEndpoint(plan.delay) as spare:
            home = Home(folder / f"faults-{way}", _tables(plan, first.url, spare.url))
            with DaemonUnderTest(home) as daemon:
                found.append(asyncio.run(_Death(plan, way, first, daemon.socket).run()))
    return found


def _tables(plan: FaultPlan, first: str, spare: str) -> Tables:
    common = {"kind": "openai", "models": ["team/*"], "max_concurrency": plan.slots}
    return {
        "providers.team": {**common, "base_url": f"{first}/v1", "priority": 1},
        "providers.spare": {**common, "base_url": f"{spare}/v1", "priority": 2},
        "limits": {"timeout": plan.timeout},
        "breaker": {"open_for": plan.open_for},
    }


class _Death:
    """One run: load from the beginning to the end, and the endpoint's life in between."""

    def __init__(self, plan: FaultPlan, way: Way, endpoint: FaultEndpoint, socket: Path) -> None:
        self._plan = plan
        self._way = way
        self._endpoint = endpoint
        self._socket = socket
        self._asked: list[_Asked] = []
        self._left_alone: tuple[float, float] | None = None
        """As monotonic and as wall time."""
        self._used_again = asyncio.Event()
        self._healed: float | None = None

    async def run(self) -> FaultRun:
        """The whole story."""
        try:
            return await self._run()
        except ExceptionGroup as group:
            raise InternalError(f"the run did not come to its end: {group.exceptions[0]}") from group

    async def _run(self) -> FaultRun:
        async with Client(self._socket) as client, asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(client))
            load = tasks.create_task(self._load(client, tasks))
            await asyncio.sleep(self._plan.warm_up)
            begun = time.monotonic()
            await asyncio.sleep(self._plan.before)
            died = time.monotonic()
            self._endpoint.be(self._way)
            await asyncio.sleep(self._plan.dead)
            self._endpoint.be("well")
            self._healed = time.monotonic()
            try:
                await asyncio.wait_for(self._used_again.wait(), PATIENCE)
            except TimeoutError:
                raise InternalError(f"the provider was not used again within {PATIENCE:g} s") from None
            await asyncio.sleep(self._plan.after)
            load.cancel()
            watching.cancel()
        return self._told(begun, died, self._healed)

    async def _load(self, client: Client, tasks: asyncio.TaskGroup) -> None:
        """A request at each tick, whether the earlier ones are answered or not."""
        begun, number = time.monotonic(), 0
        while True:
            number += 1
            tasks.create_task(self._ask(client, number))
            await asyncio.sleep(max(0.0, begun + number / self._plan.rate - time.monotonic()))

    async def _ask(self, client: Client, number: int) -> None:
        sent = time.monotonic()
        reply = await client.send_event(
            "completion:request", {"prompt": f"What is number {number} for?", "model": "team/small"}
        )
        asked = _Asked(sent, time.monotonic() - sent, reply)
        self._asked.append(asked)
        if self._healed is not None and asked.provider == "team":
            self._used_again.set()

    async def _watch(self, client: Client) -> None:
        async with client.subscribe("provider:state_changed") as changes:
            async for change in changes:
                if change.data["provider"] == "team" and change.data["after"] == "open" and self._left_alone is None:
                    self._left_alone = time.monotonic(), time.time()

    def _told(self, begun: float, died: float, healed: float) -> FaultRun:
        first = min(asked.ended for asked in self._asked if asked.provider == "team" and asked.ended > healed)
        dead = [asked for asked in self._asked if died <= asked.sent < healed]
        in_vain = [at for asked in self._asked for at in asked.in_vain]
        alone, alone_wall = self._left_alone or (healed, math.inf)
        calls = sum(at <= alone_wall for at in in_vain)
        return FaultRun(
            way=self._way,
            before=_times(asked for asked in self._asked if begun <= asked.sent < died),
            dead=_times(dead),
            met=_times(asked for asked in dead if asked.in_vain),
            after=_times(asked for asked in self._asked if asked.sent > first),
            calls_in_vain=calls,
            probes_in_vain=len(in_vain) - calls,
            left_alone_after=alone - died,
            spare_share=sum(asked.provider == "spare" for asked in dead) / max(1, len(dead)),
            used_again_after=first - healed,
            not_completed=sum(asked.reply.get("status") != "completed" for asked in self._asked),
        )


def _times(asked: Iterable[_Asked]) -> Times:
    return Times.of([round(one.took * 1e9) for one in asked] or [0])
