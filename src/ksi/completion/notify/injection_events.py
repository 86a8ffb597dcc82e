"""Notifies subscribers of deliveries, and wakes the router of ends outside runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable

import structlog

from ksi.completion.replies import injection_reply
from ksi.events.bus import EventBus
from ksi.events.completions import ChainWarningPush
from ksi.injection.circuit_breakers import Judgement
from ksi.store.chains import InjectionState, InjectionView, Trail

WARNING = "circuit_breaker:warning"
_EVENTS = {
    InjectionState.QUEUED: "injection:queued",
    InjectionState.BLOCKED: "injection:blocked",
    InjectionState.DELIVERED: "injection:delivered",
    InjectionState.FAILED: "injection:failed",
}


class InjectionEvents:
    """The `injection:*` events; each is made only if a subscriber wants it."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._log = structlog.get_logger("ksi.injections")
        self.deliveries: Counter[str] = Counter()
        """How many came to each state, since the daemon started."""
        self.blocks: Counter[str] = Counter()
        """The reasons against requests and deliveries of chains, by code, likewise."""
        self.on_end: Callable[[InjectionView], None] | None = None
        """Called with each delivery that came to its end."""
        self.unrouted = asyncio.Event()
        """Something may have ended whose end is not routed yet."""

    def warn(self, trail: Trail, judgement: Judgement) -> None:
        """The pattern checks have a suspicion that does not stop the chain yet."""
        own = trail.hops[0]
        if judgement.warning is None or not self._bus.wanted(WARNING):
            return
        push = ChainWarningPush(
            chain_id=trail.view.chain,
            request_id=own.request_id,
            session_id=own.conversation,
            agent_id=own.agent_id,
            code=judgement.code or "",
            message=judgement.warning,
            risk_score=judgement.risk_score,
            evidence=list(judgement.evidence),
        )
        self._bus.publish(WARNING, push)

    def tell(self, injections: Iterable[InjectionView]) -> None:
        """Deliveries changed. Dead letters are in the log too."""
        for view in injections:
            if self.on_end is not None and view.finished_at is not None:
                self.on_end(view)
            self.deliveries[view.state] += 1
            if view.reason is not None and view.state == InjectionState.BLOCKED:
                self.blocks[view.reason.code] += 1
            if view.reason is not None and view.state in (InjectionState.BLOCKED, InjectionState.FAILED):
                self._log.warning(
                    "not delivered",
                    injection_id=view.injection_id,
                    target=view.target,
                    code=view.reason.code,
                    reason=view.reason.message,
                )
            name = _EVENTS.get(view.state)
            if name is not None and self._bus.wanted(name):
                self._bus.publish(name, injection_reply(view))
