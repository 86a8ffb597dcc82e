"""Which service call answers which event."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from ksi.completion.chain_service import ChainService
from ksi.completion.checkpoint import Checkpoints
from ksi.completion.completion_service import CompletionService
from ksi.completion.lookups import Lookups
from ksi.completion.token_tracker import TokenTracker
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.errors import InvalidData, UnknownEvent
from ksi.event_bus import EventBus
from ksi.event_types import CompletionData, DiscoverData, SubscribeData, WaitData
from ksi.events import SPECS, schema
from ksi.lookup_types import ConfigReply
from ksi.protocol import nearest
from ksi.transports.dispatch import LATER, Exchange, Handler


class System(Protocol):
    """What the daemon says of itself, and how it is stopped."""

    def identity(self) -> dict[str, Any]:
        """Its version, and how long it runs."""
        ...

    def startup(self) -> dict[str, Any]:
        """When and with what it started."""
        ...

    def context(self) -> dict[str, Any]:
        """Where it lives and what it serves with."""
        ...

    def ready(self) -> dict[str, Any]:
        """Whether it serves."""
        ...

    async def health(self) -> dict[str, Any]:
        """How it is."""
        ...

    def held_config(self) -> ConfigReply:
        """The configuration that it holds."""
        ...

    def provider_facts(self) -> dict[str, dict[str, Any]]:
        """Where each provider comes from, and whose account it uses."""
        ...

    def ask_to_stop(self) -> dict[str, Any]:
        """Begin to stop in order."""
        ...


def handlers(
    completions: CompletionService,
    lookups: Lookups,
    chains: ChainService,
    tracker: TokenTracker,
    locks: ConversationLocks,
    checkpoints: Checkpoints,
    bus: EventBus,
    system: System,
) -> Mapping[str, Handler]:
    """Every incoming event's handler."""

    async def request(data: CompletionData, exchange: Exchange) -> Any:
        return await completions.request(data, exchange.connection, exchange.answer, exchange.refuse) or LATER

    async def wait(data: WaitData, exchange: Exchange) -> Any:
        return await completions.wait(data, exchange.connection, exchange.answer, exchange.refuse) or LATER

    async def status(_data: Any, _: Exchange) -> Any:
        return {**await completions.status(), **system.identity()}

    async def provider_status(_data: Any, _: Exchange) -> Any:
        reports, facts = completions.provider_status()["providers"], system.provider_facts()
        return {"providers": {name: {**report, **facts.get(name, {})} for name, report in reports.items()}}

    async def subscribe(data: SubscribeData, exchange: Exchange) -> Any:
        return {"patterns": bus.subscribe(exchange.connection, patterns_of(data) or ["*"])}

    async def unsubscribe(data: SubscribeData, exchange: Exchange) -> Any:
        return {"patterns": bus.unsubscribe(exchange.connection, patterns_of(data) or None)}

    return {
        "system:startup": _report(system.startup),
        "system:context": _report(system.context),
        "system:ready": _report(system.ready),
        "system:health": _plain(lambda _: system.health()),
        "system:shutdown": _report(system.ask_to_stop),
        "system:config": _report(system.held_config),
        "system:discover": discover,
        "completion:request": request,
        "completion:async": lambda data, exchange: completions.submit(data, exchange.connection),
        "completion:get": _plain(completions.get),
        "completion:find": _plain(lookups.find),
        "completion:history": _plain(lookups.history),
        "completion:wait": wait,
        "completion:cancel": _plain(completions.cancel),
        "completion:status": status,
        "completion:queue_status": _plain(completions.queue_status),
        "completion:session_status": _plain(completions.session_status),
        "completion:retry_status": _plain(completions.retry_status),
        "completion:token_usage": _plain(tracker.report),
        "completion:failed": _plain(completions.failed),
        "injection:status": _plain(chains.injections),
        "injection:retry": _plain(chains.retry),
        "circuit_breaker:status": _plain(chains.status),
        "circuit_breaker:reset": _plain(chains.reset),
        "completion:requeue": _plain(completions.requeue),
        "provider:disable": _plain(completions.disable_provider),
        "provider:enable": _plain(completions.enable_provider),
        "provider:reset": _plain(completions.reset_provider),
        "completion:provider_status": provider_status,
        "conversation:acquire_lock": lambda data, exchange: locks.acquire(data, exchange.connection),
        "conversation:release_lock": lambda data, exchange: locks.release(data, exchange.connection),
        "conversation:renew_lock": _plain(locks.renew),
        "conversation:lock_status": _plain(locks.status),
        "checkpoint:collect": _plain(checkpoints.collect),
        "checkpoint:restore": _plain(checkpoints.restore),
        "monitor:subscribe": subscribe,
        "monitor:unsubscribe": unsubscribe,
    }


async def discover(data: DiscoverData, _: Exchange) -> dict[str, Any]:
    """`system:discover`: every event, or one, with its schemas."""
    if data.event is not None and data.event not in SPECS:
        guess = nearest(data.event, SPECS)
        raise UnknownEvent(f"no event {data.event[:100]!r}" + (f"; did you mean {guess!r}?" if guess else ""))
    chosen = SPECS.values() if data.event is None else [SPECS[data.event]]
    return {
        "events": [
            {
                "name": spec.name,
                "direction": "in" if spec.incoming else "out",
                "doc": spec.doc,
                **({"schema": schema(spec)} if data.schemas else {}),
            }
            for spec in chosen
        ]
    }


def _plain(call: Callable[[Any], Awaitable[Any]]) -> Handler:
    """A handler that needs the data only."""

    @functools.wraps(call)
    async def handler(data: Any, _: Exchange) -> Any:
        return await call(data)

    return handler


def _report(call: Callable[[], Any]) -> Handler:
    """A handler that needs nothing and waits for nothing."""

    async def handler(_data: Any, _: Exchange) -> Any:
        return call()

    return handler


def patterns_of(data: SubscribeData) -> list[str]:
    """What a subscription names, checked."""
    patterns = [*(data.patterns or ()), *([data.pattern] if data.pattern is not None else ())]
    for pattern in patterns:
        if len(pattern) > 200:
            raise InvalidData("patterns: a pattern has at most 200 characters", path="patterns")
    return patterns
