"""Tells once of an agent that asks the same very often, or that spends far more than it usually does.

Nothing is stopped: that is what budgets are for. Equal requests are counted by the clock's hour, in memory. An agent's
usual spending is the mean of its hours in the last week, read from the account when its hour has become dear.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.notify.agent_loops import SEEN, UNNAMED, digest
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Alerts as Rules
from ksi.errors import StoreError
from ksi.events.bus import EventBus
from ksi.events.completions import AlertPush
from ksi.store.base import Store
from ksi.store.usage import UsageQuery

HOUR = 3_600 * MICROSECONDS
LOOK_BACK = 168
"""Hours by which an agent's usual spending is judged."""
LEAST_HOURS = 3
"""Hours with spending that an agent needs before anything is unusual for it."""


class Spender(msgspec.Struct):
    """The figures of one agent in the present hour."""

    hour: int
    cost: float = 0.0
    look_at: float = 0.0
    """The cost at which its usual spending is read next."""
    told: bool = False


class Alerts:
    """Judges what completes; tells each thing once in an hour."""

    def __init__(self, rules: Rules, store: Store, prices: Prices, bus: EventBus, clock: Clock) -> None:
        self._rules = rules
        self._store = store
        self._prices = prices
        self._bus = bus
        self._clock = clock
        self._asked: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        """How often an agent asked a text in an hour."""
        self._spenders: OrderedDict[str, Spender] = OrderedDict()
        self._told: list[tuple[int, AlertPush]] = []
        self._looking: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("ksi.alerts")

    def completed(
        self, agent_id: str, request_id: str, ended_at: int, cost: float | None, text: Callable[[], str]
    ) -> None:
        """A request completed; `text` gives what it asked."""
        hour = ended_at // HOUR
        if self._rules.equal_requests:
            self._count(agent_id, request_id, hour, digest(text()))
        if self._rules.spending_factor and cost:
            self._spend(agent_id, request_id, hour, cost)

    def _count(self, agent_id: str, request_id: str, hour: int, said: str) -> None:
        key = (agent_id, said)
        known, count = self._asked.pop(key, (hour, 0))
        count = count + 1 if known == hour else 1
        self._asked[key] = (hour, count)
        if len(self._asked) > SEEN:
            self._asked.popitem(last=False)
        if count == self._rules.equal_requests:
            self._tell(
                AlertPush(
                    kind="equal_requests",
                    agent_id=agent_id or None,
                    requests=count,
                    since=hour * HOUR / MICROSECONDS,
                    request_id=request_id,
                    message=f"{_who(agent_id)} asked the same {count} times within an hour; "
                    f"`ksi show {request_id}` shows the latest request",
                )
            )

    def _spend(self, agent_id: str, request_id: str, hour: int, cost: float) -> None:
        spender = self._spenders.pop(agent_id, None)
        if spender is None or spender.hour != hour:
            spender = Spender(hour, look_at=self._rules.spending_least)
        self._spenders[agent_id] = spender
        if len(self._spenders) > SEEN:
            self._spenders.popitem(last=False)
        spender.cost += cost
        if not spender.told and spender.cost >= spender.look_at:
            # Read again when it has doubled: few looks, however many requests.
            spender.look_at = 2 * spender.cost
            task = asyncio.create_task(self._look(agent_id, request_id, spender))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _look(self, agent_id: str, request_id: str, spender: Spender) -> None:
        """Compare an agent's hour with what it usually spends."""
        begin = spender.hour * HOUR
        query = UsageQuery(
            since=begin - LOOK_BACK * HOUR, until=begin, agent_id=None if agent_id == UNNAMED else agent_id, bucket=HOUR
        )
        try:
            found = await self._store.usage(query, self._prices.tariff)
        except StoreError as error:
            self._log.warning("an agent's usual spending cannot be read", agent_id=agent_id, error=error.message)
            return
        costs = [sums.cost_usd for sums in found.buckets.values() if sums.cost_usd]
        usual = sum(costs) / len(costs) if len(costs) >= LEAST_HOURS else None
        if usual is None or spender.told or spender.cost < self._rules.spending_factor * usual:
            return
        spender.told = True
        self._tell(
            AlertPush(
                kind="spending",
                agent_id=agent_id or None,
                cost_usd=spender.cost,
                usual_usd=usual,
                since=begin / MICROSECONDS,
                request_id=request_id,
                message=f"{_who(agent_id)} spent ${spender.cost:.2f} within an hour, usually it spends ${usual:.2f}; "
                f"`ksi budgets set NAME --scope agent:{agent_id} --usd ...` bounds it",
            )
        )

    def _tell(self, push: AlertPush) -> None:
        now = self._clock.now().wall
        self._told = [(at, one) for at, one in self._told if at + HOUR > now]
        self._told.append((now, push))
        self._log.warning(push.message, kind=push.kind, agent_id=push.agent_id)
        self._bus.publish("completion:alert", push)

    def problems(self) -> list[str]:
        """The alerts of the last hour."""
        now = self._clock.now().wall
        return [push.message for at, push in self._told if at + HOUR > now]


def _who(agent_id: str) -> str:
    return f"agent {agent_id!r}" if agent_id != UNNAMED else "requests without an agent"
