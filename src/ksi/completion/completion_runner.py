"""One claimed request: prepare the call, ask the provider, decide, settle, tell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from enum import Enum

import msgspec
import structlog

from ksi.clock import Chance, Clock, Moment, microseconds
from ksi.completion.announcer import Announcer
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.prices import Prices
from ksi.completion.provider_manager import CallEnd, ProviderManager
from ksi.completion.retry_manager import FailOver, GiveUp, ParkUntil, RetryAt, decide, policy_of
from ksi.completion.routes import model_at, parse_route
from ksi.completion.session_manager import SessionManager
from ksi.config import Config
from ksi.errors import FailureClass, InvalidData, NotFound, ProviderError, StoreError, UnknownModel
from ksi.event_types import ChunkPush
from ksi.providers.base import Chunk, Completion, ToolUsed
from ksi.request import Attempt, Outcome, RequestBody, State, decode_body, full_model
from ksi.store.base import Store
from ksi.store.chains import Aftermath
from ksi.store.values import Claimed, Finish, GiveBack, Retry, Settled, Verdict

SETTLE_RETRY = 0.5
"""Seconds between tries to settle while the store says no; the first waits a tenth of it."""


class Stop(Enum):
    """Why a run is stopped from outside."""

    CANCEL = "cancel"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    REPORTED = "reported"


class Run:
    """A request that runs here, and what others may ask of it."""

    def __init__(self, claim: Claimed, *, stream: bool) -> None:
        self.claim = claim
        self.stream = stream
        self.body = RequestBody()
        """Read when the run begins."""
        self.asked = ""
        """The full name of the model that was asked for."""
        self.model = ""
        """The full name of the model that its provider is asked for: a fallback's where the route says so."""
        self.deadline: int | None = None
        """Monotonic time of its total timeout, in microseconds."""
        self.pieces: list[str] = []
        """The answer so far, by seq; kept until the request ends (R2)."""
        self.stopped: Stop | None = None
        self.reported: ProviderError | None = None
        """A failure that a client reported."""
        self.task: asyncio.Task[None] | None = None
        self.asking = False
        self.tools_used: list[str] = []
        """Tools with effects that the turn has used so far."""

    def stop(self, why: Stop) -> None:
        """End the provider's work. What was answered before is settled all the same."""
        if self.stopped is None:
            self.stopped = why
            if self.asking and self.task is not None:
                self.task.cancel()

    def fail(self, error: ProviderError) -> None:
        """End the attempt with a failure that was seen from outside."""
        if self.stopped is None:
            self.reported = error
            self.stop(Stop.REPORTED)


class _Answer(msgspec.Struct):
    """How asking went: a completion, or an error; None for both means that it was stopped."""

    completion: Completion | None = None
    error: ProviderError | None = None
    first_token: int | None = None
    asked: bool = True
    """Whether its provider was asked at all."""
    end: CallEnd = CallEnd()


class CompletionRunner:
    """Takes a claim to its settlement."""

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        sessions: SessionManager,
        injections: InjectionManager,
        announcer: Announcer,
        prices: Prices,
        config: Config,
        clock: Clock,
        chance: Chance,
        node: str | None = None,
    ) -> None:
        """`node` is this machine, where several share the store."""
        self._node = node
        self._store = store
        self._providers = providers
        self._sessions = sessions
        self._injections = injections
        self._announcer = announcer
        self._prices = prices
        self._config = config
        self._clock = clock
        self._chance = chance
        self._log = structlog.get_logger("ksi.runner")

    async def execute(self, run: Run) -> Settled | None:
        """The steps, in order; None where the request was not kept any more."""
        self._begin(run)
        answer = await self._answer(run)
        now = self._clock.now()
        attempt = self._record(run, answer, now)
        if answer.asked:
            answer.end = self._providers.ended(
                run.claim, attempt, answer.error, now, own_limit=self._own_limit(run, answer)
            )
        if answer.end.uncounted and attempt.outcome is Outcome.FAILED:
            attempt = msgspec.structs.replace(attempt, outcome=Outcome.PARKED)
        verdict = await self._decide(run, answer, now)
        aftermath = await self._aftermath(run, attempt, verdict)
        settled = await self._settle(run, attempt, verdict, aftermath)
        if settled is not None:
            await self._announcer.settled(run.claim, run.asked, attempt, verdict, settled)
            if settled.turn is not None and attempt.text is not None:
                # When the answer is on its way: nobody waits for this.
                loop = asyncio.get_running_loop()
                loop.call_soon(self._sessions.turn_made, run.claim, run.body, settled.turn, attempt.text)
        return settled

    def _begin(self, run: Run) -> None:
        run.body = decode_body(run.claim.body)
        run.asked = full_model(run.body.model, self._config.service.default_model)
        run.model = model_at(run.claim.route, run.claim.provider, run.asked)
        run.deadline = self._clock.now().mono + microseconds(self._timeout(run))

    def _timeout(self, run: Run) -> float:
        """Seconds that the attempt may take."""
        return run.body.timeout or self._config.timeout_of(run.claim.provider)

    def _own_limit(self, run: Run, answer: _Answer) -> bool:
        """Whether the caller gave the provider less time than it has: that it was too short says nothing about it."""
        failed = answer.error is not None and answer.error.failure is FailureClass.TIMEOUT
        wish = run.body.timeout
        return failed and wish is not None and wish < self._config.timeout_of(run.claim.provider)

    async def abandon(self, run: Run) -> None:
        """End a request whose run broke on a defect of ours. If it was settled already, nothing changes."""
        now = self._clock.now()
        error = ProviderError(FailureClass.PROVIDER_ERROR, "a defect of the daemon; its log has the trace")
        attempt = self._record(run, _Answer(error=error), now)
        verdict = Finish(state=State.FAILED, error=error.failure.value, message=error.message)
        settled = await self._settle(run, attempt, verdict)
        if settled is not None:
            await self._announcer.settled(run.claim, run.asked, attempt, verdict, settled)

    # -- ask ------------------------------------------------------------------------------------------------------

    async def _answer(self, run: Run) -> _Answer:
        """Ask, where the model that is asked for may be asked now."""
        away = self._providers.away(run.claim.provider, run.model, self._clock.now())
        if away is not None and self._waits(run, away):
            return _Answer(error=away, asked=False, end=CallEnd(away=True))
        self._providers.began(run.claim, run.model)
        self._prices.warm(run.claim.provider)
        return await self._ask(run)

    def _waits(self, run: Run, away: ProviderError) -> bool:
        """Whether a request whose model is limited goes elsewhere or waits. Where nobody else has a model that was gone
        a while ago, its provider is asked again: perhaps it is there now."""
        if away.failure is not FailureClass.MODEL_NOT_FOUND:
            return True
        return self._others(run, away, self._clock.now()) is not None

    async def _ask(self, run: Run) -> _Answer:
        """The provider's answer. A cancellation that nobody asked for through `Run.stop` goes on up."""
        answer = _Answer()
        run.asking = True
        try:
            if run.stopped is None:
                await self._complete(run, answer)
        except asyncio.CancelledError:
            if run.stopped is None:
                raise
            if run.task is not None:
                run.task.uncancel()
            # An answer that was whole when the stop came is kept, and paid for.
            answer.error = None
        except ProviderError as error:
            answer.error = error
        except Exception as error:  # noqa: BLE001 - a provider's defect is a failed attempt, not the daemon's end
            self._log.exception("provider raised what it must not", provider=run.claim.provider)
            answer.error = ProviderError(FailureClass.PROVIDER_ERROR, f"{type(error).__name__}: {error}")
        finally:
            run.asking = False
        if answer.completion is None and answer.error is None:
            if run.stopped is Stop.TIMEOUT:
                message = f"no complete answer within {self._timeout(run):g} s"
                answer.error = ProviderError(FailureClass.TIMEOUT, message, provider=run.claim.provider)
            elif run.stopped is Stop.REPORTED:
                answer.error = run.reported
        return answer

    async def _complete(self, run: Run, answer: _Answer) -> None:
        """Ask; where the context is too long for the provider, once more with half the history (L9)."""
        try:
            await self._call(run, answer, shrink=1)
        except ProviderError as error:
            if error.failure is not FailureClass.CONTEXT_TOO_LONG or run.claim.head is None or run.pieces:
                raise
            await self._call(run, answer, shrink=2)

    async def _call(self, run: Run, answer: _Answer, *, shrink: int) -> None:
        provider = self._providers[run.claim.provider]
        body = self._injections.within(run.claim, run.body)
        call = await self._sessions.prepare(run.claim, body, run.model, provider, stream=run.stream, shrink=shrink)
        async with aclosing(provider.complete(call)) as stream:
            async for item in stream:
                if isinstance(item, Chunk):
                    self._take_piece(run, answer, item.text)
                elif isinstance(item, ToolUsed):
                    run.tools_used.append(item.name)
                else:
                    answer.completion = item if call.fork is None else _forked(item, call.fork)
        if answer.completion is None:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR, "the provider ended without an answer", provider=provider.name
            )

    def _take_piece(self, run: Run, answer: _Answer, text: str) -> None:
        if answer.first_token is None:
            answer.first_token = self._clock.now().wall - run.claim.started_at
        run.pieces.append(text)
        self._announcer.chunk(
            ChunkPush(request_id=run.claim.request_id, attempt=run.claim.attempt, seq=len(run.pieces) - 1, text=text)
        )

    # -- record and decide ----------------------------------------------------------------------------------------

    def _record(self, run: Run, answer: _Answer, now: Moment) -> Attempt:
        """What the attempt leaves in the trail."""
        claim, completion, error = run.claim, answer.completion, answer.error
        attempt = Attempt(
            number=claim.attempt,
            provider=claim.provider,
            outcome=Outcome.SHUTDOWN if run.stopped is Stop.SHUTDOWN else Outcome.CANCELLED,
            started_at=claim.started_at,
            finished_at=now.wall,
            asked=run.model or None,
            mcp=run.body.mcp or (completion is not None and completion.mcp),
            first_token_us=answer.first_token,
        )
        if completion is not None:
            return msgspec.structs.replace(
                attempt,
                outcome=Outcome.COMPLETED,
                model=completion.model,
                text=completion.text,
                usage=completion.usage,
                stop_reason=completion.stop_reason,
                message=completion.note,
                provider_session=completion.provider_session,
                node=self._home_of(completion, claim.provider),
                last_message=completion.last_message,
                fork=completion.fork,
                raw=completion.raw,
            )
        text = "".join(run.pieces) or None
        if error is not None:
            return msgspec.structs.replace(
                attempt,
                outcome=Outcome.FAILED,
                error=error.failure.value,
                message=error.message,
                text=text,
            )
        return msgspec.structs.replace(attempt, error=FailureClass.CANCELLED.value, text=text)

    def _home_of(self, completion: Completion, provider: str) -> str | None:
        """The machine that an answer's provider session lives on, where it is one of several (D4)."""
        if self._node is None or completion.provider_session is None:
            return None
        return self._node if self._providers[provider].capabilities.sessions_on_node else None

    async def _decide(self, run: Run, answer: _Answer, now: Moment) -> Verdict:
        """What becomes of the request."""
        if answer.completion is not None:
            return Finish(state=State.COMPLETED)
        if answer.error is None:
            if run.stopped is Stop.SHUTDOWN and not run.tools_used:
                return GiveBack()
            if run.stopped is Stop.SHUTDOWN:
                return _not_again(ProviderError(FailureClass.DAEMON_RESTART, "the daemon was stopped"), run.tools_used)
            return Finish(state=State.CANCELLED, error=FailureClass.CANCELLED.value)
        return await self._decide_failure(run, answer, answer.error, now)

    async def _decide_failure(self, run: Run, answer: _Answer, error: ProviderError, now: Moment) -> Verdict:
        code, end = error.failure.value, answer.end
        others = self._others(run, error, now)
        whole = self._whole_route(run)
        tools = error.tools_used or run.tools_used
        decision = decide(
            error,
            await self._failures(run.claim, end),
            policy_of(self._config.retry, run.body.retry),
            now,
            self._chance,
            others=others is not None,
            route_length=len(parse_route(whole)),
            back=self._providers.back(whole, run.asked, now),
            away=end.away,
            probe=end.probe,
            tools_used=bool(tools),
        )
        match decision:
            case FailOver():
                return Retry(at=now.wall, route=others, error=code, message=error.message)
            case RetryAt(at):
                return Retry(at=at, route=whole, error=code, message=error.message)
            case ParkUntil(at):
                return Retry(at=at, route=whole, parked=True, error=code, message=error.message)
            case GiveUp("tools_used"):
                return _not_again(error, tools)
        return Finish(state=State.FAILED, error=code, message=error.message)

    def _others(self, run: Run, error: ProviderError, now: Moment) -> str | None:
        """The route on which the request can go on elsewhere at once; after a refusal, with another model."""
        refused = error.failure is FailureClass.REFUSED
        return self._providers.others(run.claim.route, run.claim.provider, run.asked, now, other_model=refused)

    def _whole_route(self, run: Run) -> str:
        """After a wait every provider of the model may be asked again."""
        try:
            return self._providers.route(run.asked, mcp=run.body.mcp)
        except (UnknownModel, InvalidData):
            return run.claim.route

    async def _failures(self, claim: Claimed, end: CallEnd) -> int:
        """How many of its attempts failed, this one included; waits for a provider do not count."""
        failures = 0 if end.uncounted else 1
        if claim.attempt > 1:
            view = await self._store.get(claim.request_id)
            if view is not None:
                failures += sum(a.outcome is Outcome.FAILED for a in view.attempts)
        return failures

    async def _aftermath(self, run: Run, attempt: Attempt, verdict: Verdict) -> Aftermath | None:
        """What its end leaves to its chain and to other conversations (C3)."""
        if run.claim.chain is None or not isinstance(verdict, Finish):
            return None
        return await self._injections.aftermath(run.claim, run.body, run.asked, attempt, verdict)

    # -- settle ---------------------------------------------------------------------------------------------------

    async def _settle(
        self, run: Run, attempt: Attempt, verdict: Verdict, aftermath: Aftermath | None = None
    ) -> Settled | None:
        """Write the end. While the store says no the lock is kept, and the answer is not lost."""
        wait = SETTLE_RETRY / 10
        while True:
            try:
                return await self._store.settle(run.claim, attempt, verdict, self._clock.now(), aftermath)
            except NotFound:
                self._log.warning("settled a request that is not kept", request_id=run.claim.request_id)
                return None
            except StoreError as error:
                self._log.error("settle failed, trying again", request_id=run.claim.request_id, error=error.message)
                await self._clock.sleep(wait)
                wait = SETTLE_RETRY


def _forked(completion: Completion, kind: str) -> Completion:
    """An answer that began a provider session in the place of one that is out of reach."""
    return completion if completion.provider_session is None else msgspec.structs.replace(completion, fork=kind)


def _not_again(error: ProviderError, tools: Sequence[str]) -> Finish:
    """The end of a turn that has done something: doing it again is its owner's decision."""
    used = ", ".join(dict.fromkeys(tools))
    message = f"{error.message}; it had already used {used}, so it is not run again by itself (`ksi requeue` runs it)"
    return Finish(state=State.FAILED, error=error.failure.value, message=message)
