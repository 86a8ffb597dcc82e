"""Chains at work: the membership of requests, the consequences of their ends, and the deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from ksi.clock import Clock
from ksi.completion.approval.gate import ApprovalGate, approve_at_of
from ksi.completion.approval.news import ApprovalNews
from ksi.completion.budget.book import BudgetBook
from ksi.completion.judge import Judge
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.provider_manager import ProviderManager
from ksi.config.schema import Config
from ksi.errors import FailureClass, InvalidData, StoreError, UnknownModel
from ksi.host.supervise import Supervised
from ksi.injection.circuit_breakers import ChainBreaker, Judgement, Reading, estimate, prompt_text
from ksi.injection.injection_router import Ended, InjectionRouter, effort, unknown_triggers
from ksi.injection.judge import UNHEARD
from ksi.injection.meaning.features import WINDOW
from ksi.injection.meaning.quotes import telling
from ksi.injection.meaning.sentences import read_sentences
from ksi.injection.reminders import Templates
from ksi.injection.vectors.encoder import Encoder
from ksi.request import (
    CUT_SHORT,
    ApproveAt,
    Attempt,
    ChainConfig,
    Outcome,
    Priority,
    RequestBody,
    State,
    decode_body,
    full_model,
)
from ksi.store.base import Store
from ksi.store.chains import (
    Aftermath,
    ChildRequest,
    FollowUp,
    Hop,
    InjectionView,
    Membership,
    Trail,
    charge,
)
from ksi.store.questions import Question
from ksi.store.rules import refusals
from ksi.store.values import Claimed, Finish, RequestView

FAULT_PAUSE = 0.5
"""Seconds to wait after a fault. The pause grows."""

LONGEST_PAUSE = 2.0
"""Seconds to wait after many faults."""

SHORT = 1024
"""Characters of a prompt and a result that are judged on the loop ..."""
SHALLOW = 3
"""... up to this depth of a chain: that takes less than a millisecond."""

MOST_ON_THE_LOOP = 16 * 1024
"""Characters that are read at once to route an end; more are read in a thread, which costs as much as some thousand."""


_T = TypeVar("_T")


class InjectionManager:
    """Between the store's chains and the pure decisions of `ksi.injection`.

    Ends of runs are routed with their settlement. Other ends (cancelled while waiting, expired, blocked) are routed by
    a task of its own, soon after.
    """

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        router: InjectionRouter,
        breaker: ChainBreaker,
        templates: Templates,
        gate: ApprovalGate,
        news: ApprovalNews,
        events: InjectionEvents,
        budgets: BudgetBook,
        config: Config,
        clock: Clock,
        encoder: Encoder | None = None,
        judge: Judge | None = None,
    ) -> None:
        """`encoder` adds to results what they mean; without it their words are judged alone. `judge` is a model that
        is asked about chains, where there is one."""
        self._encoder = encoder
        self._judge = judge
        self._budgets = budgets
        self._store = store
        self._providers = providers
        self._router = router
        self._breaker = breaker
        self._templates = templates
        self._gate = gate
        self._news = news
        self._events = events
        self._config = config
        self._clock = clock
        self.task = Supervised(
            "ksi-injections", self._work, clock, backoff=FAULT_PAUSE, longest_pause=LONGEST_PAUSE, vital=True
        )
        self._log = structlog.get_logger("ksi.injections")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to route; undispatched ends from before a crash come first."""
        if self._encoder is not None:
            await self._encoder.start()
        self._events.unrouted.set()
        self.task.start()

    async def stop(self) -> None:
        """Route no more; the rest is routed at the next start."""
        await self.task.stop()
        if self._encoder is not None:
            await self._encoder.stop()

    def problems(self) -> list[str]:
        """The reasons why results are not judged by meaning or by a model, for `system:health`."""
        found = (
            None if self._encoder is None else self._encoder.problem,
            None if self._judge is None else self._judge.problem,
        )
        return [problem for problem in found if problem is not None]

    # -- coming in ------------------------------------------------------------------------------------------------

    async def membership(self, body: RequestBody, conversation: str) -> Membership | None:
        """Return a new request's place in a chain: its limits, its parent, and the result of the pattern checks.

        Raises:
            InvalidData: its trigger has no template.
        """
        if body.injection_config is None and body.circuit_breaker_config is None:
            return None
        known = unknown_triggers(self._templates, body.injection_config)
        if known:
            raise InvalidData(
                f"injection_config.trigger_type: no template for it; known are {', '.join(known)}; add your own in "
                f"{self._config.path('var/templates')}",
                path="injection_config.trigger_type",
            )
        trail = await self._parents_trail(body)
        return self._breaker.membership(body, conversation, trail)

    async def _parents_trail(self, body: RequestBody) -> Trail | None:
        config = body.circuit_breaker_config
        if config is None or config.parent_request_id is None:
            return None
        return await self._store.trail(config.parent_request_id, self._breaker.hops)

    async def question(self, body: RequestBody, membership: Membership | None) -> Question | None:
        """Return the question to a person before a new request joins the queue."""
        held = self._gate.hold(body)
        if held is not None or (membership is not None and membership.block is not None):
            return held
        parent = None if membership is None else membership.parent
        trail = await self._parents_trail(body)
        depth = 0 if parent is None else 1 if trail is None else trail.view.depth + 1
        chain = parent if trail is None else trail.view.chain
        return await self._gate.approval(
            approve_at_of(body), chain, depth, 0.0 if membership is None else membership.risk_score
        )

    async def of_parent(self, config: ChainConfig) -> ChainConfig:
        """Return a request's settings for its chain, with its parent's settings for questions."""
        if config.parent_request_id is None:
            return config
        view = await self._store.get(config.parent_request_id)
        above = None if view is None else decode_body(view.body).circuit_breaker_config
        if above is None or above.approve_at is None:
            return config
        return msgspec.structs.replace(config, approve_at=above.approve_at.strictest(config.approve_at))

    async def membership_again(self, view: RequestView) -> Membership | None:
        """Return a repeated request's place in a chain. It joins the first one's chain if that one had a parent.

        Raises:
            InvalidData: its trigger has no template any more.
        """
        body = decode_body(view.body)
        if view.parent is not None:
            return self._breaker.child(body, view.parent)
        return await self.membership(body, view.conversation)

    def within(self, claim: Claimed, body: RequestBody) -> RequestBody:
        """Return the request as the provider gets it. Its output is limited to the rest of the chain's budget.

        The reservation of a request without `max_tokens` is an estimate, which does not cut its answer.
        """
        cap = claim.chain.output_cap if claim.chain is not None else None
        if cap is None or cap >= self._breaker.output_cap(body):
            return body
        return msgspec.structs.replace(body, max_tokens=cap)

    # -- ends -----------------------------------------------------------------------------------------------------

    async def aftermath(
        self, claim: Claimed, body: RequestBody, model: str, attempt: Attempt, verdict: Finish
    ) -> Aftermath | None:
        """Return the effects of a run's end on its chain; None if it belongs to no chain."""
        grant = claim.chain
        if grant is None:
            return None
        trail = await self._store.trail(claim.request_id, self._breaker.hops)
        judgement = None
        # The answer to a notice is no step of the chain: it is not judged, and leaves no mark.
        notice = grant.output_cap is None
        if trail is not None and trail.hops and not notice:
            judgement = await self._judged(body, attempt, verdict.error, trail, Priority(claim.priority))
        ended = self._ended(claim.request_id, claim.conversation, body, verdict.state, model)
        ended = msgspec.structs.replace(
            ended,
            priority=claim.priority,
            agent_id=claim.agent_id,
            text=attempt.text if attempt.outcome is Outcome.COMPLETED else None,
            truncated=attempt.stop_reason in CUT_SHORT,
            error=verdict.error,
            message=verdict.message,
            charged=charge(attempt, estimate(body))[0],
        )
        return await self._route(ended, trail, judgement)

    async def _judged(
        self, body: RequestBody, attempt: Attempt, error: str | None, trail: Trail, priority: Priority
    ) -> Judgement:
        """Judge an end: in a thread if that takes long. It is written when this is done, so order and locks do not
        depend on its place."""
        long = trail.hops[0].depth >= SHALLOW or len(attempt.text or "") + len(prompt_text(body)) > SHORT
        reading = await _done(partial(self._breaker.read, body, attempt, error, trail), in_thread=long)
        if reading is not None and self._encoder is not None:
            said = await self._encoder.add((*reading.said, *reading.task))
            reading = Reading(tuple(said[: len(reading.said)]), tuple(said[len(reading.said) :]))
        hearing = UNHEARD
        if reading is not None and self._judge is not None:
            hearing = await self._judge.heard(trail)
        judged = partial(self._breaker.judge_result, body, attempt, error, trail, reading, hearing)
        judgement = await _done(judged, in_thread=long)
        if reading is not None and self._judge is not None:
            text = attempt.text if error is None else attempt.message
            self._judge.consider(trail, text or "", judgement, hearing, priority)
        if judgement.to_be_shown and reading is not None:
            judgement = judgement.showing(await self._quotes(trail, reading))
        if judgement.warning is not None:
            self._events.warn(trail, judgement)
        return judgement

    async def _quotes(self, trail: Trail, reading: Reading) -> list[str]:
        """From each of the latest results the sentence that shows best that nothing is in it, the oldest first."""
        own, *before = trail.hops[:WINDOW]
        found = [_quote(own, telling(reading.said))]
        for hop in before:
            view = await self._store.get(hop.request_id)
            text = view.answer.text if view is not None and view.answer is not None else None
            found.append(_quote(hop, telling(await asyncio.to_thread(read_sentences, text or ""))))
        return [quote for quote in reversed(found) if quote is not None]

    async def _route(self, ended: Ended, trail: Trail | None, judgement: Judgement | None) -> Aftermath:
        agents = await self._agents(ended)
        routed = partial(self._router.route, ended, trail, self._clock.now().wall, judgement, agents)
        # The end is written when this is done, so order and locks do not depend on its place.
        large = effort(ended) > MOST_ON_THE_LOOP
        routing = await asyncio.to_thread(routed) if large else routed()
        for problem in routing.problems:
            self._log.warning("template", request_id=ended.request_id, problem=problem)
        asked = await self._asked(routing.follow_ups, trail, judgement, large=large)
        routing = msgspec.structs.replace(routing, follow_ups=asked)
        tripped = trail is not None and trail.view.spending.tripped is not None
        if judgement is not None and judgement.block is not None and not tripped:
            self._log.warning(
                "chain tripped",
                chain_id=trail.view.chain if trail is not None else ended.request_id,
                request_id=ended.request_id,
                code=judgement.block.code,
                risk_score=judgement.risk_score,
                evidence=judgement.evidence,
            )
        demanded = partial(self._budgets.with_demands, routing.aftermath(judgement), decode_body)
        return await asyncio.to_thread(demanded) if large else demanded()

    async def _asked(
        self, follow_ups: tuple[FollowUp, ...], trail: Trail | None, judgement: Judgement | None, *, large: bool
    ) -> tuple[FollowUp, ...]:
        """The deliveries, each with the question to a person before its request joins the queue."""
        read = partial(_approvals, follow_ups)
        limits = await asyncio.to_thread(read) if large else read()
        pairs = zip(follow_ups, limits, strict=True)
        return tuple([await self._one_asked(one, approve_at, trail, judgement) for one, approve_at in pairs])

    async def _one_asked(
        self, follow_up: FollowUp, approve_at: ApproveAt | None, trail: Trail | None, judgement: Judgement | None
    ) -> FollowUp:
        child = follow_up.child
        if child is None or follow_up.block is not None or child.membership.guard:
            return follow_up
        depth, chain = (1, child.membership.parent) if trail is None else (trail.view.depth + 1, trail.view.chain)
        risk = 0.0 if judgement is None else judgement.risk_score
        question = await self._gate.approval(approve_at, chain, depth, risk)
        if question is None:
            return follow_up
        return msgspec.structs.replace(follow_up, child=msgspec.structs.replace(child, question=question))

    async def _agents(self, ended: Ended) -> dict[str, str]:
        """The owners of the target conversations: the last agent of each."""
        config = ended.body.injection_config
        if config is None or config.mode != "direct":
            return {}
        found: dict[str, str] = {}
        for target in config.target_sessions:
            view = await self._store.session(target)
            if view is not None and view.agents:
                found[target] = view.agents[-1]
        return found

    def _ended(self, request_id: str, conversation: str, body: RequestBody, state: State, model: str) -> Ended:
        route, problem = "", None
        try:
            route = self._providers.route(model, mcp=body.mcp)
        except (UnknownModel, InvalidData) as error:
            problem = error.message
        return Ended(
            request_id=request_id,
            conversation=conversation,
            body=body,
            state=state,
            model=model,
            route=route,
            route_error=problem,
        )

    # -- ends outside a run -------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        await self._events.unrouted.wait()
        self._events.unrouted.clear()
        try:
            while names := await self._store.unrouted():
                await self._deliver_all(names)
        except BaseException:
            self._events.unrouted.set()
            raise

    async def _deliver_all(self, names: Sequence[str]) -> None:
        """Deliver each end. One that breaks on a defect is reported when the others are delivered.

        Raises:
            StoreError: the store said no.
        """
        defect: Exception | None = None
        for name in names:
            try:
                await self._deliver(name)
            except StoreError:
                raise
            except Exception as error:  # noqa: BLE001 - a defect with one request must not hold up the others
                self._log.error("an end could not be routed", request_id=name, exc_info=error)
                defect = error
        if defect is not None:
            raise defect

    async def _deliver(self, request_id: str) -> None:
        view = await self._store.get(request_id)
        if view is None or _was_refused(view):
            aftermath = Aftermath()
        else:
            trail = await self._store.trail(request_id, self._breaker.hops)
            aftermath = await self._route(self._seen(view), trail, None)
        delivered = await self._store.deliver(request_id, aftermath, self._clock.now())
        self._events.tell(delivered.injections)
        await self._news.delivered(aftermath, delivered.injections)

    def _seen(self, view: RequestView) -> Ended:
        body = decode_body(view.body)
        ended = self._ended(view.request_id, view.conversation, body, view.state, view.model)
        return msgspec.structs.replace(
            ended,
            priority=view.priority,
            agent_id=view.agent_id,
            text=view.answer.text if view.answer is not None else None,
            truncated=view.answer is not None and view.answer.stop_reason in CUT_SHORT,
            error=view.error,
            message=view.message,
            block=view.block,
        )

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def retry(self, injection_id: str) -> InjectionView:
        """Send a dead letter again, under a new id.

        Raises:
            NotFound: no such delivery.
            InvalidData: it is no dead letter.
        """
        view = await self._store.injection(injection_id)
        if view is None:
            raise refusals.unknown_delivery(injection_id)
        again = FollowUp(
            injection_id=_next_id(injection_id),
            target=view.target,
            trigger=view.trigger,
            text=view.text,
            child=self._child_again(view.child),
        )
        delivered = await self._store.redeliver(injection_id, again, self._clock.now())
        self._events.tell(delivered.injections)
        return next(one for one in delivered.injections if one.injection_id == again.injection_id)

    def _child_again(self, child: ChildRequest | None) -> ChildRequest | None:
        """The request that carries it, with today's route.

        Raises:
            UnknownModel: no provider serves its model.
        """
        if child is None:
            return None
        body = decode_body(child.body)
        model = full_model(body.model, self._config.service.default_model)
        route = self._providers.route(model, mcp=body.mcp)
        demand = self._budgets.demand_now(body, route, model)
        # No question is asked again: an operator's decision brought it here.
        return msgspec.structs.replace(child, route=route, demand=demand, error=None, question=None)


async def _done(work: Callable[[], _T], *, in_thread: bool) -> _T:
    return await asyncio.to_thread(work) if in_thread else work()


def _quote(hop: Hop, sentence: str | None) -> str | None:
    return None if sentence is None else f"{hop.agent_id or hop.conversation}: “{sentence}”"


def _next_id(injection_id: str) -> str:
    """`<id>`, then `<id>+1`, `<id>+2`: the same delivery, sent again."""
    name, _, number = injection_id.rpartition("+")
    if name and number.isdigit():
        return f"{name}+{int(number) + 1}"
    return f"{injection_id}+1"


def _was_refused(view: RequestView) -> bool:
    """True if a person rejected it: its result goes to no others, which would ask again."""
    over = view.state is State.EXPIRED and view.question is not None and view.question.open
    return over or view.error == FailureClass.REJECTED


def _approvals(follow_ups: Sequence[FollowUp]) -> list[ApproveAt | None]:
    """The settings for questions of each delivery's request."""
    return [None if one.child is None else approve_at_of(decode_body(one.child.body)) for one in follow_ups]
