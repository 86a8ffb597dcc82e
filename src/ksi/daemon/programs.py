"""Programs that an agent has started and that come over the socket: they act for the agent's run, not for the owner."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import structlog

from ksi.clock import Chance, Clock
from ksi.completion.children.deadlock import refuse_deadlock
from ksi.completion.children.lending import Lending
from ksi.completion.children.rules import FIRST_LOOK, NEXT_LOOK, chain_below, refuse_wait_for_budget, urgency
from ksi.completion.completion_runner import Run, Stop
from ksi.completion.completion_service import CompletionService
from ksi.completion.notify.announcer import Announcer
from ksi.config.schema import Chain
from ksi.errors import BudgetExceeded, Forbidden, NotFound
from ksi.events.completions import CancelData, CompletionData, SubmitReply, WaitData
from ksi.events.specs import parse_priority
from ksi.http.own import Ownership
from ksi.http.tokens import Identity, Scope
from ksi.protocol import Envelope
from ksi.providers.base import Origin, StartingProvider
from ksi.request import decode_body
from ksi.store.base import Store
from ksi.store.values import RequestView
from ksi.transports.dispatch import LATER, Connection, Exchange, Handler, HeldExchange

_LOST = (
    "an agent that ran under KSI has started this program, and the agent's process has ended, or the program itself "
    "had before KSI saw it: there is no request any more that it could act for. Start it outside of the agent, or set "
    'programs = "owner" for the agent\'s provider in ksi.toml'
)


class _Client:
    """A program's connection."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.gone = False
        self.waits: set[asyncio.Future[Any]] = set()
        """The ends that it waits for."""


class Programs:
    """Knows the connections of agents' programs, and has their events handled within the limits of the run.

    A program that waits for the end of a request lends its run's slot, like one of the run's own tools.
    """

    def __init__(
        self,
        providers: Sequence[StartingProvider],
        own: Ownership,
        completions: CompletionService,
        announcer: Announcer,
        store: Store,
        runs: Mapping[str, Run],
        lending: Lending,
        config: Chain,
        clock: Clock,
        chance: Chance,
    ) -> None:
        """`runs` are those of this daemon, by request id."""
        self._providers = providers
        self._own = own
        self._completions = completions
        self._announcer = announcer
        self._store = store
        self._runs = runs
        self._lending = lending
        self._config = config
        self._clock = clock
        self._chance = chance
        # By connection, however long that lives: lines that came before its end are served after it.
        self._clients: WeakKeyDictionary[Connection, _Client] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("ksi.programs")

    def came(self, connection: Connection, pid: int) -> None:
        """A client has connected; its process is looked at while it lives."""
        for provider in self._providers:
            origin = provider.origin(pid)
            if origin is not None:
                self._clients[connection] = _Client(origin)
                return

    def gone(self, connection: Connection) -> None:
        """A client is gone, and waits for nothing any more."""
        client = self._clients.get(connection)
        if client is not None:
            client.gone = True
            for outcome in client.waits:
                outcome.cancel()

    def guarded(self, handlers: Mapping[str, Handler]) -> Mapping[str, Handler]:
        """The handlers with the limits of programs; other clients notice nothing."""
        return {event: partial(self._handle, event, handler) for event, handler in handlers.items()}

    async def _handle(self, event: str, handler: Handler, data: Any, exchange: Exchange) -> Any:
        client = self._clients.get(exchange.connection)
        if client is None:
            return await handler(data, exchange)
        parent = await self._parent(client)
        run = self._runs.get(parent.request_id)
        if isinstance(data, CompletionData):
            data = await self._child(event, data, parent, run)
            if run is None or client.gone:
                return await handler(data, exchange)
            if event == "completion:async":
                return await self._submit(client, run, handler, data, exchange)
            return await self._wait(client, run, handler, data, exchange)
        data = await self._allowed(event, data, parent)
        if not isinstance(data, WaitData) or run is None or client.gone:
            return await handler(data, exchange)
        view = await self._store.get(data.request_id)
        if view is not None and not view.state.final:
            await refuse_deadlock(self._store, self._lending, parent.request_id, view.conversation)
        return await self._wait(client, run, handler, data, exchange)

    # -- what it may do -----------------------------------------------------------------------------------------------

    async def _parent(self, client: _Client) -> RequestView:
        """The request that a program acts for.

        Raises:
            Forbidden: it is not known any more.
        """
        request_id = client.origin()
        view = None if request_id is None else await self._store.get(request_id)
        if view is None:
            raise Forbidden(_LOST)
        return view

    async def _allowed(self, event: str, data: Any, parent: RequestView) -> Any:
        """The data of an event as the run may send it. Raises as `Ownership.check_event`."""
        fields = {name: value for name, value in msgspec.to_builtins(data).items() if value is not None}
        name = parent.agent_id or parent.request_id
        identity = Identity(name=name, scope=Scope.READ, priority=parent.priority.word)
        allowed = (await self._own.check_event(Envelope(event, fields), identity)).data
        return msgspec.structs.replace(data, by=allowed["by"]) if "by" in allowed else data

    async def _child(self, event: str, data: CompletionData, parent: RequestView, run: Run | None) -> CompletionData:
        """A request as the run may send it: as its child.

        Raises:
            ConversationBusy: its conversation waits for the run.
            KsiError: as `Ownership.check_event`.
        """
        conversation = data.session_id or data.conversation_id
        if run is not None and conversation is not None and not data.fork:
            # One that only submits counts as well: it is told of the end, and nobody sees whether it waits for that.
            await refuse_deadlock(self._store, self._lending, parent.request_id, conversation)
        own = parent.priority
        data = msgspec.structs.replace(
            data,
            request_id=data.request_id or self._chance.identifier("req", self._clock.now()),
            agent_id=parent.agent_id or parent.request_id,
            priority=urgency(own if data.priority is None else parse_priority(data.priority), own),
            circuit_breaker_config=None,
        )
        await self._allowed(event, data, parent)
        chain = chain_below(parent.request_id, decode_body(parent.body), self._config)
        return msgspec.structs.replace(data, circuit_breaker_config=chain)

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _wait(
        self, client: _Client, run: Run, handler: Handler, data: CompletionData | WaitData, exchange: Exchange
    ) -> Any:
        """Answer when the request has ended and the run has its slot again."""
        request_id, held = data.request_id or "", HeldExchange(exchange)
        client.waits.add(held.outcome)
        try:
            async with self._lending.wait(run, request_id):
                reply = await handler(data, held)
                return await self._end(held.outcome, request_id) if reply is LATER else reply
        except (BudgetExceeded, asyncio.CancelledError) as error:
            if isinstance(data, CompletionData):
                await self._give_up(run, request_id, error)
            raise
        finally:
            client.waits.discard(held.outcome)
            held.outcome.cancel()

    async def _submit(
        self, client: _Client, run: Run, handler: Handler, data: CompletionData, exchange: Exchange
    ) -> Any:
        """Submit a request. As long as the client is there to be told of its end, the run counts as waiting for it."""
        request_id, outcome = data.request_id or "", asyncio.get_running_loop().create_future()

        def over(_: object) -> None:
            if not outcome.done():
                outcome.set_result(None)

        wait = self._announcer.wait_for(request_id, over, over, exchange.connection)
        try:
            reply = await handler(data, exchange)
        except BaseException:
            wait.take_back()
            raise
        if not isinstance(reply, SubmitReply) or reply.status == "blocked" or client.gone:
            wait.take_back()
            return reply
        client.waits.add(outcome)
        task = asyncio.create_task(self._lend(client, run, request_id, outcome), name=f"wait of {run.claim.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return reply

    async def _lend(self, client: _Client, run: Run, request_id: str, outcome: asyncio.Future[Any]) -> None:
        try:
            async with self._lending.wait(run, request_id):
                await self._end(outcome, request_id)
        except (BudgetExceeded, asyncio.CancelledError) as error:
            await self._give_up(run, request_id, error)
        finally:
            client.waits.discard(outcome)

    async def _end(self, outcome: asyncio.Future[Any], request_id: str) -> Any:
        pause = FIRST_LOOK
        while not outcome.done():
            await asyncio.wait((outcome,), timeout=pause)
            if not outcome.done():
                await refuse_wait_for_budget(self._store, self._completions, request_id)
                pause = NEXT_LOOK
        return await outcome

    async def _give_up(self, run: Run, request_id: str, error: BaseException) -> None:
        """Nobody waits for a request any more. It is cancelled if the run may not wait for it, or was stopped itself.
        The request of a program that only left continues."""
        if not isinstance(error, BudgetExceeded) and run.stopped not in (Stop.CANCEL, Stop.TIMEOUT):
            return
        self._log.warning("the request of an agent's program is cancelled", request_id=request_id, why=str(error))
        with suppress(NotFound):
            await asyncio.shield(self._completions.cancel(CancelData(request_id=request_id)))
