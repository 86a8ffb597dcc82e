"""One claimed request: prepare the call, ask the provider, decide, settle, tell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import ParamSpec, TypeVar

import msgspec
import structlog

from ksi.budgets.rules import Spent
from ksi.clock import Chance, Clock, Moment, microseconds
from ksi.completion.approval.desk import Desk
from ksi.completion.approval.news import ApprovalNews
from ksi.completion.budget.book import BudgetBook
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.notify.agent_loops import LoopTeller
from ksi.completion.notify.announcer import Announcer
from ksi.completion.pool.abilities import needs_of
from ksi.completion.pool.routes import model_at, parse_route
from ksi.completion.provider_manager import CallEnd, ProviderManager
from ksi.completion.replies import chunk_push
from ksi.completion.retry_manager import FailOver, GiveUp, ParkUntil, RetryAt, decide, policy_of
from ksi.completion.session_manager import SessionManager
from ksi.completion.trace.traces import Traces
from ksi.completion.usage.prices import Prices
from ksi.completion.usage.tallies import Tallies
from ksi.config.schema import Config
from ksi.errors import (
    FailureClass,
    InvalidData,
    NotFound,
    ProviderError,
    StoreError,
    StoreUnavailable,
    UnknownModel,
    Unsupported,
)
from ksi.host.supervise import in_words, is_cancelled
from ksi.providers.base import Call, Chunk, Completion, Frame, PersonNeeded, Piece, ToolServer, ToolUsed
from ksi.request import Attempt, Outcome, RequestBody, State, Usage, decode_body, full_model
from ksi.store.base import Store
from ksi.store.chains import Aftermath
from ksi.store.questions import Question, QuestionKind
from ksi.store.values import Claimed, Finish, GiveBack, Retry, Settled, Verdict

P = ParamSpec("P")
T = TypeVar("T")

COMPLETED = Finish(state=State.COMPLETED)

SETTLE_RETRY = 0.5
"""Seconds between tries while the store says no to a run; the first waits a tenth of it."""

LARGE_BODY = 256 * 1024
"""Bytes of a request from which reading it is worth a turn of the loop."""


class Stop(Enum):
    """Why a run is stopped from outside."""

    CANCEL = "cancel"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    REPORTED = "reported"


_UNREAD = RequestBody()


class Run:
    """A request that runs here, and the calls of others on it."""

    __slots__ = (
        "__weakref__", "asked", "asking", "attempt", "body", "claim", "deadline", "desk", "model", "pieces", "reported",
        "settled", "stopped", "stream", "task", "tools_used",
    )  # fmt: skip

    def __init__(self, claim: Claimed, *, stream: bool) -> None:
        self.claim = claim
        self.stream = stream
        self.body = _UNREAD
        """Read when the run begins."""
        self.asked = ""
        """The full name of the model that was asked for."""
        self.model = ""
        """The full name of the model requested from its provider: a fallback's if the route says so."""
        self.deadline: int | None = None
        """Monotonic time of its total timeout, in microseconds."""
        self.pieces: list[Piece] = []
        """The pieces of the answer so far, by seq. They are kept until the request ends."""
        self.stopped: Stop | None = None
        self.reported: ProviderError | None = None
        """A failure that a client reported."""
        self.task: asyncio.Task[None] | None = None
        self.asking = False
        self.attempt: Attempt | None = None
        """The outcome of the call, once it is over."""
        self.settled = False
        self.desk: Desk | None = None
        """The answers to its program's questions, if that can ask."""
        self.tools_used: list[str] = []
        """Tools with effects that the turn has used so far."""

    def text_from(self, seq: int) -> str:
        """The text of the pieces from `seq` on."""
        return "".join(piece.text for piece in self.pieces[seq:] if isinstance(piece, Chunk))

    def stop(self, why: Stop) -> None:
        """End the provider's work. An earlier answer is settled all the same."""
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
    """The outcome of a call: a completion or an error. Both are None if the run was stopped."""

    completion: Completion | None = None
    error: ProviderError | None = None
    first_token: int | None = None
    asked: bool = True
    """True if its provider was asked at all."""
    end: CallEnd = CallEnd()
    person: PersonNeeded | None = None
    """The turn stops until a person has answered."""


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
        loops: LoopTeller,
        budgets: BudgetBook,
        tallies: Tallies,
        traces: Traces | None,
        approvals: ApprovalNews,
        config: Config,
        clock: Clock,
        chance: Chance,
        node: str | None = None,
    ) -> None:
        """`node` is this machine, if several share the store."""
        self._node = node
        self._store = store
        self._providers = providers
        self._sessions = sessions
        self._injections = injections
        self._announcer = announcer
        self._prices = prices
        self._loops = loops
        self._budgets = budgets
        self._tallies = tallies
        self._traces = traces
        self._approvals = approvals
        self._config = config
        self._clock = clock
        self._chance = chance
        self.tools: Callable[[Run], ToolServer] | None = None
        """Makes the tools for a run at a provider that hands KSI's own to its model."""
        self._reading = asyncio.Lock()
        """Held by the large request that is read in this turn of the loop."""
        self._log = structlog.get_logger("ksi.runner")

    async def execute(self, run: Run) -> Settled | None:
        """The steps, in order; None if the request was not kept any more."""
        if len(run.claim.body) < LARGE_BODY:
            self._read(run)
        else:
            await self._read_in_turn(run)
        answer = await self._answer(run)
        now = self._clock.now()
        attempt = self._record(run, answer, now)
        if answer.asked:
            own_limit = answer.error is not None and self._own_limit(run, answer.error)
            answer.end = self._providers.ended(run.claim, attempt, answer.error, now, own_limit=own_limit)
        if attempt.outcome is Outcome.FAILED and answer.end.uncounted:
            attempt = msgspec.structs.replace(attempt, outcome=Outcome.PARKED)
        if answer.person is not None:
            attempt = _stopped_by_question(attempt, answer.person)
        run.attempt = attempt
        # The store is asked on the way to each of these. While it says no, the lock and the answer are kept.
        verdict: Verdict = COMPLETED
        if answer.completion is None:
            verdict = await self._insist(self._decide, run, answer, now)
        aftermath = None
        if run.claim.chain is not None and isinstance(verdict, Finish):
            aftermath = await self._insist(self._aftermath, run, attempt, verdict)
        spent = self._budgets.spent(attempt, asked=answer.asked)
        settled = await self._settle(run, attempt, verdict, aftermath, spent)
        run.settled = True
        if settled is not None:
            self._tallies.ended(run.claim, run.body, attempt, fenced=settled.fenced)
            await self._announcer.settled(run.claim, run.asked, attempt, verdict, settled)
            if aftermath is not None:
                await self._approvals.delivered(aftermath, settled.injections)
            if answer.person is not None:
                await self._asked(run, settled)
            if settled.turn is not None and attempt.text is not None:
                self._sessions.turn_made(run.claim, run.body, settled.turn, attempt)
            if settled.state is State.COMPLETED and not settled.fenced:
                self._loops.completed(run.claim, run.body, attempt)
        return settled

    async def _read_in_turn(self, run: Run) -> None:
        """Read a large request. These take turns of the loop: several may have been claimed in one."""
        async with self._reading:
            self._read(run)
            await asyncio.sleep(0)

    def _read(self, run: Run) -> None:
        run.body = decode_body(run.claim.body)
        run.asked = full_model(run.body.model, self._config.service.default_model)
        run.model = model_at(run.claim.route, run.claim.provider, run.asked)
        run.deadline = self._clock.now().mono + microseconds(self._timeout(run))

    def _timeout(self, run: Run) -> float:
        """Seconds that the attempt may take."""
        return run.body.timeout or self._config.timeout_of(run.claim.provider)

    def _own_limit(self, run: Run, error: ProviderError) -> bool:
        """Return whether the caller allowed less time than the configuration. The provider is not to blame then."""
        wish = run.body.timeout
        if error.failure is not FailureClass.TIMEOUT:
            return False
        return wish is not None and wish < self._config.timeout_of(run.claim.provider)

    async def abandon(self, run: Run) -> None:
        """End a request whose run broke on a defect of ours. Its provider's answer is kept in its trail.

        If it was settled already, nothing changes.
        """
        if run.settled:
            return
        now = self._clock.now()
        error = ProviderError(FailureClass.PROVIDER_ERROR, "a defect of the daemon; its log has the trace")
        attempt = self._record(run, _Answer(error=error), now)
        if run.attempt is not None:
            attempt = msgspec.structs.replace(
                run.attempt, outcome=attempt.outcome, error=attempt.error, message=attempt.message
            )
        verdict = Finish(state=State.FAILED, error=error.failure.value, message=error.message)
        settled = await self._settle(run, attempt, verdict, spent=self._budgets.spent(attempt, asked=True))
        run.settled = True
        if settled is not None:
            self._tallies.ended(run.claim, run.body, attempt, fenced=settled.fenced)
            await self._announcer.settled(run.claim, run.asked, attempt, verdict, settled)

    # -- ask ------------------------------------------------------------------------------------------------------

    async def _answer(self, run: Run) -> _Answer:
        """Ask, if the requested model may be asked now."""
        now = self._clock.now()
        away = self._providers.away(run.claim.provider, run.model, now)
        if away is not None and self._waits(run, away):
            return _Answer(error=away, asked=False, end=CallEnd(away=True))
        self._providers.began(run.claim, run.model)
        self._prices.warm(run.claim.provider)
        return await self._ask(run)

    def _waits(self, run: Run, away: ProviderError) -> bool:
        """Return whether a request whose model is limited goes elsewhere or waits.

        If no other provider has a model that was missing a while ago, this provider is asked again.
        """
        if away.failure is not FailureClass.MODEL_NOT_FOUND:
            return True
        return self._others(run, away, self._clock.now()) is not None

    async def _ask(self, run: Run) -> _Answer:
        """The provider's answer. A cancellation that was not requested through `Run.stop` propagates."""
        answer = _Answer()
        run.asking = True
        try:
            if run.stopped is None:
                await self._complete(run, answer)
        except asyncio.CancelledError as error:
            if not is_cancelled():
                self._note_defect(run, answer, error)
            elif run.stopped is None:
                raise
            elif run.task is not None:
                run.task.uncancel()
                # An answer that was whole when the stop came is kept, and paid for.
                answer.error = None
        except ProviderError as error:
            answer.error = error
        except StoreError as error:
            message = f"the conversation cannot be read: {error.message}"
            answer.error = ProviderError(FailureClass.PROVIDER_ERROR, message)
        except Exception as error:  # noqa: BLE001 - a provider's defect is a failed attempt, not the daemon's end
            self._note_defect(run, answer, error)
        finally:
            run.asking = False
        if answer.completion is None and answer.error is None and answer.person is None:
            if run.stopped is Stop.TIMEOUT:
                message = f"no complete answer within {self._timeout(run):g} s"
                answer.error = ProviderError(FailureClass.TIMEOUT, message, provider=run.claim.provider)
            elif run.stopped is Stop.REPORTED:
                answer.error = run.reported
        return answer

    def _note_defect(self, run: Run, answer: _Answer, error: BaseException) -> None:
        self._log.error("unexpected exception from a provider", provider=run.claim.provider, exc_info=error)
        answer.error = ProviderError(FailureClass.PROVIDER_ERROR, f"{type(error).__name__}: {in_words(error)}")

    async def _complete(self, run: Run, answer: _Answer) -> None:
        """Ask the provider. If the context is too long for it, ask once more with half the history."""
        try:
            await self._call(run, answer, shrink=1)
        except PersonNeeded as needed:
            answer.person = needed
        except ProviderError as error:
            if error.failure is not FailureClass.CONTEXT_TOO_LONG or run.claim.head is None or run.pieces:
                raise
            await self._call(run, answer, shrink=2)

    async def _call(self, run: Run, answer: _Answer, *, shrink: int) -> None:
        provider = self._providers[run.claim.provider]
        body = self._injections.within(run.claim, run.body)
        if run.claim.output_cap is not None:
            body = msgspec.structs.replace(body, max_tokens=run.claim.output_cap)
        # While the store cannot be read, none of the provider's time passes.
        left = max(0, (run.deadline or 0) - self._clock.now().mono)
        run.deadline = None
        call = await self._insist(
            self._sessions.prepare, run.claim, body, run.model, provider, stream=run.stream, shrink=shrink
        )
        run.deadline = self._clock.now().mono + left
        if self._traces is not None:
            claim = run.claim
            chain = None if claim.chain is None else claim.chain.chain
            span = self._traces.of_attempt(claim.request_id, chain, claim.attempt)
            call = msgspec.structs.replace(call, traceparent=span)
        if provider.capabilities.asks:
            run.desk = await self._desk(run)
            call = msgspec.structs.replace(call, permissions=run.desk)
        if provider.capabilities.own_tools and self.tools is not None:
            call = msgspec.structs.replace(call, tools=self.tools(run))
        stream = provider.complete(call)
        try:
            async for item in stream:
                if isinstance(item, Completion):
                    answer.completion = _told(item, call)
                elif isinstance(item, Frame):
                    self._announcer.frame(run.claim, item)
                elif isinstance(item, ToolUsed):
                    run.tools_used.append(item.name)
                else:
                    self._take_piece(run, answer, item)
        finally:
            await stream.aclose()
        if answer.completion is None:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR, "the provider ended without an answer", provider=provider.name
            )

    async def _desk(self, run: Run) -> Desk:
        """The answers that the request has; its first attempt has none."""
        question = None
        if run.claim.attempt > 1:
            view = await self._insist(self._store.get, run.claim.request_id)
            question = None if view is None else view.question
        return Desk(question, self._clock.now(), keeps=not self._config.store.shared)

    async def _asked(self, run: Run, settled: Settled) -> None:
        """Tell that a person is asked. A program that waits for the answer of an ended request is released."""
        if settled.state is State.PARKED and not settled.fenced:
            await self._approvals.asked(run.claim.request_id)
        else:
            await self._providers.let_go(run.claim.conversation)

    def _take_piece(self, run: Run, answer: _Answer, piece: Piece) -> None:
        if answer.first_token is None:
            answer.first_token = self._clock.now().wall - run.claim.started_at
        run.pieces.append(piece)
        self._announcer.chunk(chunk_push(run.claim.request_id, run.claim.attempt, len(run.pieces) - 1, piece), piece)

    # -- record and decide ----------------------------------------------------------------------------------------

    def _record(self, run: Run, answer: _Answer, now: Moment) -> Attempt:
        """Return the attempt's record in the trail."""
        claim, completion, error = run.claim, answer.completion, answer.error
        if completion is not None:
            return Attempt(
                number=claim.attempt,
                provider=claim.provider,
                outcome=Outcome.COMPLETED,
                started_at=claim.started_at,
                finished_at=now.wall,
                asked=run.model or None,
                mcp=completion.mcp or run.body.mcp,
                first_token_us=answer.first_token,
                model=completion.model,
                text=completion.text,
                content=completion.content,
                usage=completion.usage,
                stop_reason=completion.stop_reason,
                message=completion.note,
                provider_session=completion.provider_session,
                node=self._home_of(completion, claim.provider),
                last_message=completion.last_message,
                fork=completion.fork,
                raw=completion.raw,
            )
        stopped = Outcome.SHUTDOWN if run.stopped is Stop.SHUTDOWN else Outcome.CANCELLED
        return Attempt(
            number=claim.attempt,
            provider=claim.provider,
            outcome=stopped if error is None else Outcome.FAILED,
            started_at=claim.started_at,
            finished_at=now.wall,
            asked=run.model or None,
            mcp=run.body.mcp,
            first_token_us=answer.first_token,
            error=FailureClass.CANCELLED.value if error is None else error.failure.value,
            message=None if error is None else error.message,
            text=run.text_from(0) or None,
        )

    def _home_of(self, completion: Completion, provider: str) -> str | None:
        """Return the machine that holds the answer's provider session; None if there is only one machine."""
        if self._node is None or completion.provider_session is None:
            return None
        return self._node if self._providers[provider].capabilities.sessions_on_node else None

    async def _decide(self, run: Run, answer: _Answer, now: Moment) -> Verdict:
        """Decide the next state of a request without a completion."""
        if answer.person is not None:
            return _ask_person(answer.person, now)
        if answer.error is None:
            if run.stopped is Stop.SHUTDOWN and not run.tools_used:
                return GiveBack()
            if run.stopped is Stop.SHUTDOWN:
                return _not_again(ProviderError(FailureClass.DAEMON_RESTART, "the daemon was stopped"), run.tools_used)
            return Finish(state=State.CANCELLED, error=FailureClass.CANCELLED.value)
        return await self._decide_failure(run, answer, answer.error, now)

    async def _decide_failure(self, run: Run, answer: _Answer, error: ProviderError, now: Moment) -> Verdict:
        verdict = await self._decide_anew(run, answer, error, now)
        if isinstance(verdict, Retry) and run.desk is not None and run.desk.question is not None:
            # The same question is not asked twice.
            return msgspec.structs.replace(verdict, question=run.desk.question)
        return verdict

    async def _decide_anew(self, run: Run, answer: _Answer, error: ProviderError, now: Moment) -> Verdict:
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
        """The route on which the request can continue elsewhere at once; after a refusal, with another model."""
        refused = error.failure is FailureClass.REFUSED
        return self._providers.others(run.claim.route, run.claim.provider, run.asked, now, other_model=refused)

    def _whole_route(self, run: Run) -> str:
        """After a wait every provider of the model may be asked again."""
        try:
            return self._providers.route(run.asked, mcp=run.body.mcp, needs=needs_of(run.body))
        except (UnknownModel, InvalidData, Unsupported):
            return run.claim.route

    async def _failures(self, claim: Claimed, end: CallEnd) -> int:
        """Count the request's failed attempts, this one included. Waits for a provider do not count."""
        failures = 0 if end.uncounted else 1
        if claim.attempt > 1:
            view = await self._store.get(claim.request_id)
            if view is not None:
                failures += sum(a.outcome is Outcome.FAILED for a in view.attempts)
        return failures

    async def _aftermath(self, run: Run, attempt: Attempt, verdict: Finish) -> Aftermath | None:
        """Decide the consequences of this request's end for its chain and for other conversations."""
        return await self._injections.aftermath(run.claim, run.body, run.asked, attempt, verdict)

    # -- settle ---------------------------------------------------------------------------------------------------

    async def _settle(
        self,
        run: Run,
        attempt: Attempt,
        verdict: Verdict,
        aftermath: Aftermath | None = None,
        spent: Spent | None = None,
    ) -> Settled | None:
        """Write the end. While the store says no the lock is kept, and the answer is not lost."""
        try:
            settled = await self._insist(self._settle_now, run, attempt, verdict, aftermath, spent)
        except NotFound:
            self._log.warning("settled a request that is not kept", request_id=run.claim.request_id)
            return None
        if settled.notices:
            self._budgets.tell(settled.notices)
        return settled

    def _settle_now(
        self, run: Run, attempt: Attempt, verdict: Verdict, aftermath: Aftermath | None, spent: Spent | None
    ) -> Awaitable[Settled]:
        now = self._clock.now()
        return self._store.settle(run.claim, attempt, verdict, now, aftermath, spent, self._budgets.caps(now.wall))

    async def _insist(self, step: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Take a step that needs the store, again and again while it says no.

        The memory for this is bounded: nothing new is claimed from such a store.

        Raises:
            StoreUnavailable: it is damaged, which does not pass.
        """
        wait = SETTLE_RETRY / 10
        while True:
            try:
                return await step(*args, **kwargs)
            except (StoreError, OSError) as error:
                if isinstance(error, StoreUnavailable) and not error.passes:
                    raise
                self._log.error("the store said no to a run, trying again", error=in_words(error))
                await self._clock.sleep(wait)
                wait = SETTLE_RETRY


def _told(completion: Completion, call: Call) -> Completion:
    """An answer with the facts that its provider cannot know: the features left out of the request, and that it began a
    new provider session because the old one is out of reach."""
    if call.dropped:
        left_out = f"left out, as the provider cannot do it: {', '.join(call.dropped[:20])}"
        note = f"{completion.note}; {left_out}" if completion.note else left_out
        completion = msgspec.structs.replace(completion, note=note)
    if call.fork is None or completion.provider_session is None:
        return completion
    return msgspec.structs.replace(completion, fork=call.fork)


def _not_again(error: ProviderError, tools: Sequence[str]) -> Finish:
    """The end of a turn that has done something: doing it again is its owner's decision."""
    used = ", ".join(dict.fromkeys(tools))
    message = f"{error.message}; it had already used {used}, so it is not retried automatically (`ksi requeue` runs it)"
    return Finish(state=State.FAILED, error=error.failure.value, message=message)


def _stopped_by_question(attempt: Attempt, needed: PersonNeeded) -> Attempt:
    """The attempt's record. The usage of a turn that continues in its program is reported at its end."""
    usage = Usage() if needed.waiting else None
    return msgspec.structs.replace(
        attempt, outcome=Outcome.PARKED, error=None, message=needed.permission.text, usage=usage
    )


def _ask_person(needed: PersonNeeded, now: Moment) -> Retry:
    """It waits at the same providers until a person has answered, or the time for that is over."""
    expires = now.after(needed.seconds).wall
    question = Question(
        kind=QuestionKind.PERMISSION,
        asked_at=now.wall,
        text=needed.permission.text,
        expires=expires,
        tool=needed.permission.tool,
        input=needed.permission.input,
        used=needed.used,
    )
    return Retry(at=expires, parked=True, message=needed.permission.text, question=question)
