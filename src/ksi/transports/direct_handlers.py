"""Which call answers which event in service version 1; every other event is `not_available_in_v1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ksi.direct.service import DirectService, without_effect
from ksi.errors import InvalidData, NotAvailableInV1
from ksi.events.bus import EventBus
from ksi.events.common import Nothing
from ksi.events.completions import CancelData, CompletionData
from ksi.events.reports import DirectStatusReply, DiscoverReply
from ksi.events.service import DiscoverData
from ksi.events.specs import SPECS, EventSpec
from ksi.transports.dispatch import Exchange, Handler
from ksi.transports.handlers import Discovery, System, report, subscriptions

AVAILABLE = frozenset(
    {
        "system:startup",
        "system:context",
        "system:ready",
        "system:health",
        "system:config",
        "system:shutdown",
        "system:discover",
        "completion:request",
        "completion:async",
        "completion:cancel",
        "completion:status",
        "monitor:subscribe",
        "monitor:unsubscribe",
    }
)
"""Events that a client may send in version 1."""

PUSHED = frozenset({"completion:result"})
"""Events that it sends by itself."""

DIRECT_SPECS: Mapping[str, EventSpec] = {
    name: spec if name in AVAILABLE or not spec.incoming else msgspec.structs.replace(spec, request=Nothing)
    for name, spec in {
        **SPECS,
        "completion:status": msgspec.structs.replace(SPECS["completion:status"], reply=DirectStatusReply),
    }.items()
}
"""An unavailable event is reported as such, whatever its data."""


def direct_handlers(service: DirectService, bus: EventBus, system: System) -> Mapping[str, Handler]:
    """Every incoming event's handler."""

    async def request(data: CompletionData, exchange: Exchange) -> Any:
        exchange.warn(without_effect(data))
        return await service.request(data)

    async def submit(data: CompletionData, exchange: Exchange) -> Any:
        exchange.warn(without_effect(data))
        return await service.submit(data, exchange.connection)

    async def cancel(data: CancelData, _: Exchange) -> Any:
        if data.chain_id is not None:
            raise NotAvailableInV1("service version 1 has no chains; name a request_id", event="completion:cancel")
        if data.request_id is None:
            raise InvalidData("request_id: say which request", path="request_id")
        return await service.cancel(data.request_id)

    async def status(_data: Any, _: Exchange) -> Any:
        return DirectStatusReply(**await service.status(), **system.identity())

    async def health(_data: Any, _: Exchange) -> Any:
        return await system.health()

    discovery = Discovery(DIRECT_SPECS)

    async def known(data: DiscoverData, exchange: Exchange) -> DiscoverReply:
        found = await discovery.discover(data, exchange)
        return DiscoverReply(events=[event for event in found.events if event.name in AVAILABLE | PUSHED])

    return {
        **{name: _not_available(name) for name, spec in SPECS.items() if spec.incoming},
        "system:startup": report(system.startup),
        "system:context": report(system.context),
        "system:ready": report(system.ready),
        "system:health": health,
        "system:config": report(system.held_config),
        "system:shutdown": report(system.ask_to_stop),
        "system:discover": known,
        "completion:request": request,
        "completion:async": submit,
        "completion:cancel": cancel,
        "completion:status": status,
        **subscriptions(bus),
    }


def _not_available(name: str) -> Handler:
    async def refuse(_data: Any, _: Exchange) -> Any:
        raise NotAvailableInV1(
            f"{name} is not in service version 1; to have it, stop the daemon, run `ksi migrate`, and start it again",
            event=name,
        )

    return refuse
