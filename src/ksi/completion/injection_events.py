"""Tells who listens what becomes of deliveries, and wakes who routes the ends that no run brought."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from ksi.completion.chain_render import injection_reply
from ksi.event_bus import EventBus
from ksi.store.chains import InjectionState, InjectionView

_EVENTS = {
    InjectionState.QUEUED: "injection:queued",
    InjectionState.BLOCKED: "injection:blocked",
    InjectionState.DELIVERED: "injection:delivered",
    InjectionState.FAILED: "injection:failed",
}


class InjectionEvents:
    """The `injection:*` events; each is made only where somebody wants it."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._log = structlog.get_logger("ksi.injections")
        self.unrouted = asyncio.Event()
        """Something may have ended whose end is not routed yet."""

    def tell(self, injections: Iterable[InjectionView]) -> None:
        """Deliveries changed. What became a dead letter is in the log too."""
        for view in injections:
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
