"""The parts of the completion service, wired over a store in memory, with providers that do what a test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from ksi.budgets.rules import NO_CAPS, Caps, Spent
from ksi.clock import Chance, Moment
from ksi.completion.approval.gate import ApprovalGate
from ksi.completion.approval.news import ApprovalNews
from ksi.completion.budget.book import BudgetBook
from ksi.completion.completion_runner import CompletionRunner
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.notify.agent_loops import LoopTeller
from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.pause.service import PauseService
from ksi.completion.pool.routes import Router
from ksi.completion.pool.team import Place, Team
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.completion.replies import Teller
from ksi.completion.session_manager import SessionManager
from ksi.completion.usage.prices import Prices
from ksi.completion.usage.tallies import Tallies
from ksi.config.schema import Config, ProviderConfig
from ksi.conversation.lock_events import LockEvents
from ksi.events.bus import EventBus, News
from ksi.events.completions import RequestReply
from ksi.injection.circuit_breakers import ChainBreaker
from ksi.injection.injection_router import InjectionRouter
from ksi.injection.reminders import Templates
from ksi.providers.base import Call, Capabilities, Chunk, Completion
from ksi.request import Attempt, HeadStarts, Priority, RequestBody, Turn, Usage, encode_body
from ksi.store.chains import Aftermath
from ksi.store.values import (
    Claimed,
    Claims,
    Enqueued,
    Expiry,
    NewRequest,
    Offer,
    RequestView,
    Settled,
    StoreRules,
    Verdict,
)
from ksi.testing import SimulatedClock, settle_down
from tests.reference_store.store import MemoryStore

Step = str | Completion | Exception | asyncio.Event | Callable[[], None]
"""A piece of text, the whole answer, a failure, something to wait for, or something to do."""


def whole(text: str = "hi", **fields: Any) -> Completion:
    """A good answer."""
    known: dict[str, Any] = {"text": text, "model": "echo-1", "usage": Usage(input_tokens=3, output_tokens=2)}
    return Completion(**(known | fields))


class Player:
    """A provider that plays one list of steps for each call, the last one for all further calls."""

    def __init__(self, name: str = "p", **can: Any) -> None:
        self.name = name
        self.capabilities = Capabilities(free=True, **can)
        self.plays: list[list[Step]] = [[whole()]]
        self.calls: list[Call] = []
        self.closed = 0
        """Calls that are over."""
        self.linger: asyncio.Event | None = None
        """Closing a call takes until then."""

    def play(self, *plays: list[Step]) -> None:
        """What the next calls do."""
        self.plays = list(plays)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def problem(self) -> str | None:
        return None

    def knows(self, session: str) -> bool:
        return False

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        self.calls.append(call)
        steps = self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]
        try:
            async for item in _played(steps):
                yield item
        finally:
            if self.linger is not None:
                await self.linger.wait()
            self.closed += 1


async def _played(steps: list[Step]) -> AsyncIterator[Chunk | Completion]:
    for step in steps:
        if isinstance(step, str):
            yield Chunk(step)
        elif isinstance(step, Completion):
            yield step
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Exception):
            raise step
        else:
            step()


class FaultyStore(MemoryStore):
    """A store that can say no, verb by verb."""

    def __init__(self, rules: StoreRules) -> None:
        super().__init__(rules, Chance(random.Random(1)))
        self.faults: dict[str, list[Exception]] = {}
        """What the next calls of a verb raise."""
        self.counts: dict[str, int] = {}

    def _maybe(self, verb: str) -> None:
        self.counts[verb] = self.counts.get(verb, 0) + 1
        waiting = self.faults.get(verb)
        if waiting:
            raise waiting.pop(0)

    async def settle(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None = None,
        spent: Spent | None = None,
        caps: Caps = NO_CAPS,
    ) -> Settled:
        self._maybe("settle")
        return await super().settle(claim, attempt, verdict, now, aftermath, spent, caps)

    async def claim(self, *args: Any) -> Claims:
        self._maybe("claim")
        return await super().claim(*args)

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        self._maybe("expire")
        return await super().expire(now, limit)

    async def get(self, request_id: str) -> RequestView | None:
        self._maybe("get")
        return await super().get(request_id)

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        self._maybe("history")
        return await super().history(head, max_chars)

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        self._maybe("unpark")
        return await super().unpark(route, now, limit)


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and data of what came since the last look."""
        events = [msgspec.json.decode(line) for line in self.lines]
        self.lines.clear()
        return [(event["event"], event["data"]) for event in events]

    def names(self) -> list[str]:
        """The names alone."""
        return [name for name, _ in self.heard()]


class Parts:
    """Everything between the store and the providers."""

    def __init__(
        self,
        *players: Player,
        rules: StoreRules | None = None,
        store: FaultyStore | None = None,
        node: str | None = None,
        clock: SimulatedClock | None = None,
        shared: bool = False,
        per_minute: int | None = None,
        **sections: Any,
    ) -> None:
        """`store` is one that other parts use too, `node` the machine that these are on, and `shared` says that other
        daemons ask the same providers. The first provider takes so many calls `per_minute`."""
        self.players = {player.name: player for player in players or (Player(),)}
        configured = {
            name: ProviderConfig(
                kind="player",
                models=("m/*",),
                priority=number,
                max_concurrency=2,
                requests_per_minute=None if number else per_minute,
            )
            for number, name in enumerate(self.players)
        }
        defaults = Config(home=Path("/nowhere"), providers=configured)
        service = msgspec.structs.replace(defaults.service, default_model="m/echo")
        self.config = msgspec.structs.replace(defaults, **({"service": service} | sections))
        self.clock = clock or SimulatedClock(wall=1_800_000_000.0)
        self.chance = Chance(random.Random(1))
        self.store = store or FaultyStore(rules or StoreRules())
        self.bus = EventBus(self.clock)
        self.locks = LockEvents(self.bus)
        can = {name: player.capabilities for name, player in self.players.items()}
        prices = Prices({}, can)
        self.budgets = BudgetBook(
            [section.budget(name) for name, section in self.config.budgets.items()], prices, can, self.bus, self.clock
        )
        self.injection_events = InjectionEvents(self.bus)
        self.announcer = Announcer(
            self.store, Teller(prices), self.bus, self.locks, self.injection_events, lambda: None, self.clock
        )
        router = Router(configured, {})
        places = {name: Place(slots=configured[name].max_concurrency) for name in self.players}
        self.team = Team(self.store, places, self.config.breaker, self.clock, alone=not shared)
        self.providers = ProviderManager(
            self.config, self.players, router, self.bus, self.clock, self.team, shared=shared
        )
        self.sessions = SessionManager(self.store, self.config.session, node)
        breaker = ChainBreaker(self.config.chain, self.config.patterns)
        templates = Templates()
        self.approval_news = ApprovalNews(self.store, self.bus, self.time_came)
        self.injections = InjectionManager(
            self.store,
            self.providers,
            InjectionRouter(templates, breaker, HeadStarts(high=0, normal=0, low=0, background=0)),
            breaker,
            templates,
            ApprovalGate(self.store, prices, [], self.config.chain, self.clock),
            self.approval_news,
            self.injection_events,
            self.budgets,
            self.config,
            self.clock,
        )
        self.runner = CompletionRunner(
            self.store,
            self.providers,
            self.sessions,
            self.injections,
            self.announcer,
            prices,
            LoopTeller(self.config.loops, prices, self.bus),
            self.budgets,
            Tallies(prices),
            None,
            self.approval_news,
            self.config,
            self.clock,
            self.chance,
            node,
        )
        self.queue = QueueManager(
            self.store,
            self.providers,
            self.runner,
            self.announcer,
            self.locks,
            self.bus,
            self.budgets,
            self.config,
            self.clock,
        )
        self.pauses = PauseService(self.store, self.providers, self.queue, self.bus, self.clock, shared=shared)
        self.team.on_records = self.pauses.hear
        self.route = self.providers.route("m/echo")
        self.count = 0

    def time_came(self) -> None:
        """Something has a time at which it ends."""
        self.queue.on_due()

    @property
    def player(self) -> Player:
        """The first provider."""
        return next(iter(self.players.values()))

    @property
    def offer(self) -> Offer:
        """Room at the first provider."""
        return Offer(self.route, self.player.name, 10)

    async def open(self) -> None:
        """Open the store and start the queue."""
        recovery = await self.store.open(self.clock.now(), self.queue.on_work)
        await self.queue.start(recovery)
        await settle_down()

    async def enqueue(self, *offers: Offer, conversation: str | None = None, **fields: Any) -> Enqueued:
        """Into the store; without offers it never runs at once. Fields of the body go by their names."""
        self.count += 1
        name = f"r{self.count}"
        names = ("due", "expires", "hold_on_retry", "agent_id", "requeued_from")
        own = {key: fields.pop(key) for key in names if key in fields}
        body = encode_body(RequestBody(**({"prompt": f"q{self.count}"} | fields)))
        new = NewRequest(
            request_id=name,
            conversation=conversation or f"c{self.count}",
            body=body,
            route=self.route,
            rank=self.count,
            priority=Priority.NORMAL,
            model="m/echo",
            **own,
        )
        return await self.store.enqueue(new, offers, self.clock.now())

    async def claim(self, **fields: Any) -> Claimed:
        """A new request, running."""
        enqueued = await self.enqueue(self.offer, **fields)
        assert enqueued.claim is not None
        return enqueued.claim

    async def view(self, request_id: str) -> RequestView:
        """A request as it stands."""
        view = await MemoryStore.get(self.store, request_id)
        assert view is not None
        return view

    def wait_for(self, request_id: str) -> list[RequestReply]:
        """The answers that a waiter gets."""
        answers: list[RequestReply] = []
        self.announcer.wait_for(request_id, answers.append)
        return answers
