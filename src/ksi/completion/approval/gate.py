"""Decides whether a person has to be asked before a new request comes into the line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from ksi.clock import Clock, microseconds
from ksi.completion.usage.prices import Prices
from ksi.config.schema import Chain
from ksi.request import ApproveAt, RequestBody
from ksi.store.base import Store
from ksi.store.questions import Question, QuestionKind
from ksi.store.usage import UsageQuery

UNKNOWN_COST = float("inf")
"""The cost of a chain in which a call has tokens and no price: it counts as over any limit."""

Code = Literal["depth", "cost", "risk"]


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The future position of a request in its chain."""

    depth: int
    cost_usd: float
    risk_score: float


def reached(limits: ApproveAt, standing: Standing) -> tuple[Code, str] | None:
    """The reason for an approval, by a code and in words; None if none is needed."""
    if limits.depth is not None and standing.depth >= limits.depth:
        return "depth", f"it stands at depth {standing.depth} of its chain, where approve_at.depth {limits.depth} asks"
    if limits.cost_usd is not None and standing.cost_usd >= limits.cost_usd:
        cost = "an unknown amount" if standing.cost_usd == UNKNOWN_COST else f"${standing.cost_usd:.4f}"
        return "cost", f"its chain has cost {cost}, and approve_at.cost_usd is {limits.cost_usd:g}"
    if limits.risk is not None and standing.risk_score >= limits.risk:
        return "risk", f"its risk_score is {standing.risk_score:g}, and approve_at.risk is {limits.risk:g}"
    return None


def approve_at_of(body: RequestBody) -> ApproveAt | None:
    """A request's own settings for questions to a person."""
    return None if body.circuit_breaker_config is None else body.circuit_breaker_config.approve_at


class ApprovalGate:
    """Asks for requests that are held back, and for those of chains that have come far enough."""

    def __init__(self, store: Store, prices: Prices, providers: Collection[str], chain: Chain, clock: Clock) -> None:
        """`providers` are the names of all whose calls have a price."""
        self._store = store
        self._prices = prices
        self._providers = providers
        self._clock = clock
        self._timeout = chain.approval_timeout
        self._limits = ApproveAt(
            depth=chain.approve_at_depth, cost_usd=chain.approve_at_cost, risk=chain.approve_at_risk
        )

    def hold(self, body: RequestBody) -> Question | None:
        """The question of a request whose sender holds it back."""
        if not body.hold:
            return None
        return Question(
            kind=QuestionKind.HOLD,
            asked_at=self._clock.now().wall,
            text="its sender holds it back until it is released",
        )

    async def approval(
        self, approve_at: ApproveAt | None, chain: str | None, depth: int, risk_score: float
    ) -> Question | None:
        """The question of a request that would join a chain; `chain` is None if the request begins one."""
        limits = self._limits.strictest(approve_at)
        if limits.depth is None and limits.cost_usd is None and limits.risk is None:
            return None
        cost = 0.0
        if limits.cost_usd is not None and chain is not None:
            cost = await self._cost(chain)
        found = reached(limits, Standing(depth=depth, cost_usd=cost, risk_score=risk_score))
        if found is None:
            return None
        code, text = found
        now = self._clock.now()
        timeout = min(limits.timeout or self._timeout, self._timeout)
        return Question(
            kind=QuestionKind.APPROVAL,
            asked_at=now.wall,
            text=text,
            code=code,
            expires=now.wall + microseconds(timeout),
        )

    async def _cost(self, chain: str) -> float:
        """The cost of a chain's ended calls, in US dollars."""
        await self._prices.ready(self._providers)
        query = UsageQuery(since=0, until=self._clock.now().wall, chain=chain)
        total = (await self._store.usage(query, self._prices.tariff)).total
        if total.unpriced_attempts or total.cost_usd is None:
            return UNKNOWN_COST
        return total.cost_usd
