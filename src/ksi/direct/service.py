"""Service version 1: each completion runs at once, at the first provider of its model. No queue, no locks, no store."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Chance, Clock
from ksi.completion.intake import normalise
from ksi.completion.pool.routes import model_at, parse_route
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.replies import Teller
from ksi.config.schema import Config
from ksi.direct.dialogues import Dialogues
from ksi.errors import FailureClass, NotFound, ProviderError, RequestIdConflict, ShuttingDown
from ksi.events.bus import RESULT, EventBus, Listener
from ksi.events.completions import CancelReply, CompletionData, RequestReply, SubmitReply
from ksi.events.reports import RowReply
from ksi.providers.base import Completion, Provider
from ksi.request import Attempt, Outcome, Priority, RequestBody, State, encode_body, full_model
from ksi.store.values import LoggedTurn, RequestView

WITHOUT_EFFECT = (
    "priority",
    "on_busy",
    "fork",
    "not_before",
    "delay",
    "ttl",
    "retry",
    "stream",
    "injection_config",
    "circuit_breaker_config",
    "patterns",
)
"""Fields of a completion that only version 2 heeds."""
_DEFAULTS = CompletionData()


class _Run:
    """A request that runs."""

    task: asyncio.Task[RequestReply]
    """Set as soon as it is there."""

    def __init__(self, request_id: str, conversation: str, body: RequestBody, model: str, route: str, at: int) -> None:
        self.request_id = request_id
        self.conversation = conversation
        self.body = body
        self.asked = model
        self.route = route
        self.provider = next(iter(parse_route(route))).provider
        self.model = model_at(route, self.provider, model)
        self.started_at = at
        self.cancelled = False


class DirectService:
    """The requests about completions in version 1."""

    def __init__(
        self,
        providers: ProviderManager,
        dialogues: Dialogues,
        teller: Teller,
        bus: EventBus,
        config: Config,
        clock: Clock,
        chance: Chance,
    ) -> None:
        self._providers = providers
        self._dialogues = dialogues
        self._teller = teller
        self._bus = bus
        self._config = config
        self._clock = clock
        self._chance = chance
        self._runs: dict[str, _Run] = {}
        self._ended = dict.fromkeys((State.COMPLETED, State.FAILED, State.CANCELLED), 0)
        self.taking = True
        """True if new requests are accepted."""
        self._log = structlog.get_logger("ksi.direct")

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._runs)

    async def stop(self, grace: float) -> None:
        """Accept no more, let running requests finish for the given seconds, then cancel the rest."""
        self.taking = False
        tasks = [run.task for run in self._runs.values()]
        if tasks and grace > 0:
            await asyncio.wait(tasks, timeout=grace)
        for run in list(self._runs.values()):
            self._cancel(run)
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- requests of clients ------------------------------------------------------------------------------------------

    async def request(self, data: CompletionData) -> RequestReply:
        """`completion:request`: the reply comes when it is done. A vanished client cancels nothing."""
        return await asyncio.shield(self._begin(data).task)

    async def submit(self, data: CompletionData, listener: Listener) -> SubmitReply:
        """`completion:async`: the reply comes at once, `completion:result` follows."""
        run = self._begin(data)
        self._bus.follow(listener, run.request_id)
        return SubmitReply(
            request_id=run.request_id, status="ready", session_id=run.conversation, state=State.RUNNING.value
        )

    async def cancel(self, request_id: str) -> CancelReply:
        """`completion:cancel`: stop a running request, and the provider's work.

        Raises:
            NotFound: it does not run (any more).
        """
        run = self._runs.get(request_id)
        if run is None:
            raise NotFound(
                f"no request {request_id!r} runs; version 1 keeps none that has ended", request_id=request_id
            )
        self._cancel(run)
        reply = await asyncio.shield(run.task)
        was: Any = "cancelled" if reply.status == State.CANCELLED.value else "already_final"
        return CancelReply(request_id=run.request_id, status=was, state=reply.status, session_id=run.conversation)

    async def status(self) -> dict[str, Any]:
        """The figures of `completion:status`, by the fields of `DirectStatusReply`."""
        return {
            "status": "ok" if self.taking else "stopping",
            "active": len(self._runs),
            **{state.value: count for state, count in self._ended.items()},
            "running": [
                RowReply(
                    request_id=run.request_id,
                    session_id=run.conversation,
                    status=State.RUNNING.value,
                    model=run.asked,
                    provider=run.provider,
                    agent_id=run.body.agent_id,
                    started_at=run.started_at / MICROSECONDS,
                )
                for run in self._runs.values()
            ],
        }

    # -- a run ----------------------------------------------------------------------------------------------------

    def _begin(self, data: CompletionData) -> _Run:
        if not self.taking:
            raise ShuttingDown("the daemon is stopping; send the request again when it is back")
        body = normalise(data)
        model = full_model(data.model, self._config.service.default_model)
        route = self._providers.route(model, mcp=body.mcp)
        now = self._clock.now()
        request_id = data.request_id or self._chance.identifier("req", now)
        if request_id in self._runs:
            raise RequestIdConflict(f"{request_id!r} runs already", request_id=request_id)
        conversation = body.session_id or self._chance.identifier("conv", now)
        run = _Run(request_id, conversation, body, model, route, now.wall)
        self._runs[request_id] = run
        run.task = asyncio.create_task(self._run(run))
        return run

    def _cancel(self, run: _Run) -> None:
        if not run.cancelled:
            run.cancelled = True
            run.task.cancel()

    async def _run(self, run: _Run) -> RequestReply:
        """Ask, remember, tell."""
        try:
            attempt = await self._attempt(run)
            # From here on it has ended: a cancellation comes too late.
            del self._runs[run.request_id]
            state = _STATES[attempt.outcome]
            self._ended[state] += 1
            if state is State.COMPLETED:
                await self._remember(run, attempt)
            reply = await self._teller.tell(_view(run, attempt, state))
            self._bus.publish(RESULT, reply, run.request_id)
            return reply
        finally:
            self._runs.pop(run.request_id, None)

    async def _attempt(self, run: _Run) -> Attempt:
        completion: Completion | None = None
        error: ProviderError | None = None
        timeout = run.body.timeout or self._config.limits.timeout
        try:
            async with asyncio.timeout(timeout):
                completion = await self._ask(run)
        except TimeoutError:
            error = ProviderError(FailureClass.TIMEOUT, f"no complete answer within {timeout:g} s")
        except ProviderError as raised:
            error = raised
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not run.cancelled or task is None:
                raise
            task.uncancel()
        except Exception as raised:  # noqa: BLE001 - a provider's defect is a failed request, not the daemon's end
            self._log.exception("unexpected exception from a provider", provider=run.provider)
            error = ProviderError(FailureClass.PROVIDER_ERROR, f"{type(raised).__name__}: {raised}")
        return _attempt(run, completion, error, self._clock.now().wall)

    async def _ask(self, run: _Run) -> Completion:
        provider: Provider = self._providers[run.provider]
        call = await self._dialogues.call(run.request_id, run.conversation, run.body, run.model, provider)
        stream = provider.complete(call)
        try:
            async for item in stream:
                if isinstance(item, Completion):
                    return item
        finally:
            await stream.aclose()
        raise ProviderError(FailureClass.PROVIDER_ERROR, "the provider ended without an answer")

    async def _remember(self, run: _Run, attempt: Attempt) -> None:
        turn = LoggedTurn(
            id=0,
            request_id=run.request_id,
            conversation=run.conversation,
            agent_id=run.body.agent_id,
            attempt=attempt,
        )
        try:
            await self._dialogues.made(turn, run.body)
        except OSError as error:
            self._log.error("response log not written", request_id=run.request_id, error=str(error))


_STATES = {
    Outcome.COMPLETED: State.COMPLETED,
    Outcome.FAILED: State.FAILED,
    Outcome.CANCELLED: State.CANCELLED,
}


def without_effect(data: CompletionData) -> list[str]:
    """Warnings for fields that were given and mean nothing in version 1."""
    given = [name for name in WITHOUT_EFFECT if getattr(data, name) != getattr(_DEFAULTS, name)]
    return [f"{name}: no effect in service version 1" for name in given]


def _attempt(run: _Run, completion: Completion | None, error: ProviderError | None, now: int) -> Attempt:
    """The result of a run."""
    attempt = Attempt(
        number=1,
        provider=run.provider,
        outcome=Outcome.CANCELLED,
        started_at=run.started_at,
        finished_at=now,
        asked=run.model,
        mcp=run.body.mcp or (completion is not None and completion.mcp),
    )
    if completion is not None:
        return msgspec.structs.replace(
            attempt,
            outcome=Outcome.COMPLETED,
            model=completion.model,
            text=completion.text,
            usage=completion.usage,
            stop_reason=completion.stop_reason,
            provider_session=completion.provider_session,
            raw=completion.raw,
        )
    if error is not None:
        return msgspec.structs.replace(
            attempt, outcome=Outcome.FAILED, error=error.failure.value, message=error.message
        )
    return msgspec.structs.replace(attempt, error=FailureClass.CANCELLED.value)


def _view(run: _Run, attempt: Attempt, state: State) -> RequestView:
    return RequestView(
        request_id=run.request_id,
        conversation=run.conversation,
        state=state,
        priority=Priority.NORMAL,
        model=run.asked,
        route=run.route,
        body=encode_body(run.body),
        agent_id=run.body.agent_id,
        enqueued_at=run.started_at,
        started_at=run.started_at,
        finished_at=attempt.finished_at,
        attempts=(attempt,),
        provider=run.provider,
        error=attempt.error,
        message=attempt.message,
    )
