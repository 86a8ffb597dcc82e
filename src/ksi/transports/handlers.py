"""Which service call answers which event."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from msgspec import UNSET

from ksi.completion.approval.service import ApprovalService
from ksi.completion.budget.service import BudgetService
from ksi.completion.chain_service import ChainService
from ksi.completion.completion_service import CompletionService
from ksi.completion.conversations import Conversations
from ksi.completion.lookups import Lookups
from ksi.completion.pause.service import PauseService
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.reports import Reports
from ksi.completion.token_tracker import TokenTracker
from ksi.completion.upkeep.checkpoint import Checkpoints
from ksi.completion.upkeep.queue_trend import QueueTrend
from ksi.conversation.conversation_lock import ConversationLocks
from ksi.errors import InvalidData, UnknownEvent
from ksi.events.bus import EventBus
from ksi.events.completions import CompletionData, WaitData
from ksi.events.lookups import ConfigReply
from ksi.events.reports import (
    ContextReply,
    DiscoverReply,
    EventEntry,
    HealthReply,
    PatternsReply,
    ProviderFacts,
    ProviderStatusReply,
    ReadyReply,
    ShutdownReply,
    StartupReply,
    StatusReply,
)
from ksi.events.service import DiscoverData, SubscribeData
from ksi.events.specs import SPECS, EventSpec, schema
from ksi.events.tokens import OwnerTokenReply, TokenCreateData, TokenCreateReply, TokenNameData, TokensReply
from ksi.protocol import nearest
from ksi.transports.dispatch import Exchange, Handler


class System(Protocol):
    """Reports of the daemon about itself, and its stop."""

    def identity(self) -> dict[str, Any]:
        """Its version, and how long it runs."""
        ...

    def startup(self) -> StartupReply:
        """Its start time, version and process."""
        ...

    def context(self) -> ContextReply:
        """Its place, and the providers it serves with."""
        ...

    def ready(self) -> ReadyReply:
        """Its readiness."""
        ...

    async def health(self) -> HealthReply:
        """How it is."""
        ...

    def held_config(self) -> ConfigReply:
        """The configuration that it holds."""
        ...

    def provider_facts(self) -> dict[str, ProviderFacts]:
        """The origin of each provider, and the account it uses."""
        ...

    def ask_to_stop(self) -> ShutdownReply:
        """Begin to stop in order."""
        ...


class TokenEvents(Protocol):
    """The tokens for HTTP."""

    async def create(self, data: TokenCreateData) -> TokenCreateReply:
        """Make one."""
        ...

    async def list(self) -> TokensReply:
        """All of them."""
        ...

    async def revoke(self, data: TokenNameData) -> TokensReply:
        """End one."""
        ...

    async def renew(self) -> OwnerTokenReply:
        """Replace the owner's."""
        ...


def handlers(
    completions: CompletionService,
    reports: Reports,
    providers: ProviderManager,
    lookups: Lookups,
    conversations: Conversations,
    chains: ChainService,
    approvals: ApprovalService,
    tracker: TokenTracker,
    locks: ConversationLocks,
    checkpoints: Checkpoints,
    pauses: PauseService,
    trend: QueueTrend,
    budgets: BudgetService,
    tokens: TokenEvents,
    bus: EventBus,
    system: System,
) -> Mapping[str, Handler]:
    """Every incoming event's handler."""

    def request(data: CompletionData, exchange: Exchange) -> Awaitable[Any]:
        return completions.request(data, exchange.connection, exchange.answer, exchange.refuse)

    def wait(data: WaitData, exchange: Exchange) -> Awaitable[Any]:
        return completions.wait(data, exchange.connection, exchange.answer, exchange.refuse)

    async def status(_data: Any, _: Exchange) -> Any:
        queue = await reports.status()
        return StatusReply(**queue, paused=pauses.shown(), draining=pauses.draining, **system.identity())

    async def provider_status(_data: Any, _: Exchange) -> Any:
        found, facts = providers.report(), system.provider_facts()
        for name in found.keys() & facts.keys():
            found[name].source, found[name].account = facts[name].source, facts[name].account
        return ProviderStatusReply(providers=found)

    return {
        "system:startup": report(system.startup),
        "system:context": report(system.context),
        "system:ready": report(system.ready),
        "system:health": _plain(lambda _: system.health()),
        "system:shutdown": report(system.ask_to_stop),
        "system:config": report(system.held_config),
        "system:discover": Discovery().discover,
        "completion:request": request,
        "completion:async": lambda data, exchange: completions.submit(data, exchange.connection),
        "completion:get": _plain(completions.get),
        "completion:find": _plain(lookups.find),
        "completion:history": _plain(lookups.history),
        "completion:wait": wait,
        "completion:cancel": _plain(completions.cancel),
        "completion:status": status,
        "completion:queue_status": _plain(reports.queue_status),
        "completion:session_status": _plain(reports.session_status),
        "completion:retry_status": _plain(reports.retry_status),
        "completion:token_usage": _plain(tracker.report),
        "completion:failed": _plain(completions.failed),
        "injection:status": _plain(chains.injections),
        "injection:retry": _plain(chains.retry),
        "circuit_breaker:status": _plain(chains.status),
        "circuit_breaker:reset": _plain(chains.reset),
        "completion:requeue": _plain(completions.requeue),
        "completion:approvals": _plain(approvals.list),
        "completion:release": _plain(approvals.release),
        "completion:approve": _plain(approvals.approve),
        "completion:reject": _plain(approvals.reject),
        "provider:disable": _plain(lambda data: providers.set_enabled(data.provider, False, by=data.by, why=data.why)),
        "provider:enable": _plain(lambda data: providers.set_enabled(data.provider, True, by=data.by, why=data.why)),
        "provider:reset": _plain(lambda data: providers.reset(data.provider)),
        "completion:provider_status": provider_status,
        "conversation:acquire_lock": lambda data, exchange: locks.acquire(data, exchange.connection),
        "conversation:release_lock": lambda data, exchange: locks.release(data, exchange.connection),
        "conversation:renew_lock": _plain(locks.renew),
        "conversation:lock_status": _plain(locks.status),
        "conversation:rename": _plain(conversations.rename),
        "conversation:search": _plain(conversations.search),
        "conversation:delete": _plain(conversations.delete),
        "queue:pause": _plain(pauses.pause),
        "queue:resume": _plain(pauses.resume),
        "queue:pauses": _plain(lambda _: pauses.status()),
        "queue:trend": _plain(lambda _: trend.trend()),
        "queue:drain": _plain(pauses.drain),
        "queue:undrain": _plain(lambda _: pauses.undrain()),
        "budget:status": _plain(budgets.status),
        "budget:set": _plain(budgets.set),
        "budget:drop": _plain(budgets.drop),
        "budget:raise": _plain(budgets.raise_),
        "checkpoint:collect": _plain(checkpoints.collect),
        "checkpoint:restore": _plain(checkpoints.restore),
        "token:create": _plain(tokens.create),
        "token:list": _plain(lambda _: tokens.list()),
        "token:revoke": _plain(tokens.revoke),
        "token:renew": _plain(lambda _: tokens.renew()),
        **subscriptions(bus),
    }


def subscriptions(bus: EventBus) -> dict[str, Handler]:
    """The handlers by which a connection says which pushes it wants."""

    async def subscribe(data: SubscribeData, exchange: Exchange) -> Any:
        return PatternsReply(patterns=bus.subscribe(exchange.connection, _patterns_of(data) or ["*"]))

    async def unsubscribe(data: SubscribeData, exchange: Exchange) -> Any:
        return PatternsReply(patterns=bus.unsubscribe(exchange.connection, _patterns_of(data) or None))

    return {"monitor:subscribe": subscribe, "monitor:unsubscribe": unsubscribe}


class Discovery:
    """Answers `system:discover`: every event, or one, with its schemas, which are made at their first use."""

    def __init__(self, specs: Mapping[str, EventSpec] = SPECS) -> None:
        self._specs = specs
        self._made: dict[str, dict[str, Any]] = {}
        self._making = asyncio.Lock()

    async def discover(self, data: DiscoverData, _: Exchange) -> DiscoverReply:
        """`system:discover`."""
        if data.event is not None and data.event not in self._specs:
            guess = nearest(data.event, self._specs)
            raise UnknownEvent(f"no event {data.event[:100]!r}" + (f"; did you mean {guess!r}?" if guess else ""))
        chosen = list(self._specs.values()) if data.event is None else [self._specs[data.event]]
        if data.schemas and any(spec.name not in self._made for spec in chosen):
            # One after another: threads that make the same schemas would hold the loop up together, and replies of
            # this size must not all be written in one turn of it.
            async with self._making:
                self._made |= await asyncio.to_thread(lambda: {spec.name: schema(spec) for spec in chosen})
        entries = [
            EventEntry(
                name=spec.name,
                direction="in" if spec.incoming else "out",
                doc=spec.doc,
                schema=self._made[spec.name] if data.schemas else UNSET,
            )
            for spec in chosen
        ]
        return DiscoverReply(events=entries)


def _plain(call: Callable[[Any], Awaitable[Any]]) -> Handler:
    """A handler that needs the data only."""

    @functools.wraps(call)
    async def handler(data: Any, _: Exchange) -> Any:
        return await call(data)

    return handler


def report(call: Callable[[], Any]) -> Handler:
    """A handler that needs nothing and waits for nothing."""

    async def handler(_data: Any, _: Exchange) -> Any:
        return call()

    return handler


def _patterns_of(data: SubscribeData) -> list[str]:
    """The patterns of a subscription, checked."""
    patterns = [*(data.patterns or ()), *([data.pattern] if data.pattern is not None else ())]
    for pattern in patterns:
        if len(pattern) > 200:
            raise InvalidData("patterns: a pattern has at most 200 characters", path="patterns")
    return patterns
