"""Chains at work: how a request belongs to one, what its end leaves to others, and what becomes of the deliveries."""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from ksi.clock import Clock
from ksi.completion.injection_events import InjectionEvents
from ksi.completion.provider_manager import ProviderManager
from ksi.config import Config
from ksi.errors import InvalidData, NotFound, StoreError, UnknownModel
from ksi.injection.circuit_breakers import ChainBreaker, Judgement, estimate
from ksi.injection.injection_router import Ended, InjectionRouter, unknown_triggers
from ksi.injection.reminders import Templates
from ksi.request import CUT_SHORT, Attempt, Outcome, RequestBody, State, decode_body, full_model
from ksi.store.base import Store
from ksi.store.chains import (
    Aftermath,
    ChildRequest,
    FollowUp,
    InjectionView,
    Membership,
    Trail,
    charge,
)
from ksi.store.values import Claimed, Finish, RequestView

FAULT_PAUSE = 0.5
"""Seconds to wait after the store said no."""


class InjectionManager:
    """Between the store's chains and the pure decisions of `ksi.injection`.

    What ended in a run is routed with its settlement. What ended otherwise (cancelled while it waited, expired,
    blocked) is routed by a task of its own, soon after.
    """

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        router: InjectionRouter,
        breaker: ChainBreaker,
        templates: Templates,
        events: InjectionEvents,
        config: Config,
        clock: Clock,
    ) -> None:
        self._store = store
        self._providers = providers
        self._router = router
        self._breaker = breaker
        self._templates = templates
        self._events = events
        self._config = config
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.injections")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to route; what a crash left unrouted comes first."""
        self._events.unrouted.set()
        self._task = asyncio.create_task(self._work(), name="ksi-injections")

    async def stop(self) -> None:
        """Route no more; what is left is routed at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    # -- coming in ------------------------------------------------------------------------------------------------

    async def membership(self, body: RequestBody, conversation: str) -> Membership | None:
        """How a new request belongs to a chain: its limits, its parent, and what the pattern checks say of it.

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
        config = body.circuit_breaker_config
        trail = None
        if config is not None and config.parent_request_id is not None:
            trail = await self._store.trail(config.parent_request_id, self._breaker.hops)
        return self._breaker.membership(body, conversation, trail)

    async def membership_again(self, view: RequestView) -> Membership | None:
        """How a repeated request belongs: to the first one's chain, where that was born of another.

        Raises:
            InvalidData: its trigger has no template any more.
        """
        body = decode_body(view.body)
        if view.parent is not None:
            return self._breaker.child(body, view.parent)
        return await self.membership(body, view.conversation)

    def within(self, claim: Claimed, body: RequestBody) -> RequestBody:
        """The request as its provider is asked for it: its answer cut where its chain's budget leaves less (C6).

        What was set aside for a request without `max_tokens` is an estimate, which does not cut its answer.
        """
        cap = claim.chain.output_cap if claim.chain is not None else None
        if cap is None or cap >= self._breaker.output_cap(body):
            return body
        return msgspec.structs.replace(body, max_tokens=cap)

    # -- ends -----------------------------------------------------------------------------------------------------

    async def aftermath(
        self, claim: Claimed, body: RequestBody, model: str, attempt: Attempt, verdict: Finish
    ) -> Aftermath | None:
        """What the end of a run leaves to its chain; None where it belongs to none."""
        grant = claim.chain
        if grant is None:
            return None
        trail = await self._store.trail(claim.request_id, self._breaker.hops)
        judgement = None
        if trail is not None and trail.hops:
            judgement = self._breaker.judge_result(body, attempt, verdict.error, trail)
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

    async def _route(self, ended: Ended, trail: Trail | None, judgement: Judgement | None) -> Aftermath:
        agents = await self._agents(ended)
        routing = self._router.route(ended, trail, self._clock.now().wall, judgement, agents)
        for problem in routing.problems:
            self._log.warning("template", request_id=ended.request_id, problem=problem)
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
        return routing.aftermath(judgement)

    async def _agents(self, ended: Ended) -> dict[str, str]:
        """Whose conversations the targets are: the agent that came to each last."""
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

    # -- what ended outside a run ---------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._events.unrouted.wait()
            self._events.unrouted.clear()
            try:
                while names := await self._store.unrouted():
                    for name in names:
                        await self._deliver(name)
            except StoreError as error:
                self._log.error("the store said no, trying again", error=error.message)
                self._events.unrouted.set()
                await self._clock.sleep(FAULT_PAUSE)
            except Exception:  # noqa: BLE001 - a defect with one request must not end all deliveries
                self._log.exception("routing failed, trying again")
                self._events.unrouted.set()
                await self._clock.sleep(FAULT_PAUSE)

    async def _deliver(self, request_id: str) -> None:
        view = await self._store.get(request_id)
        if view is None:
            aftermath = Aftermath()
        else:
            trail = await self._store.trail(request_id, self._breaker.hops)
            aftermath = await self._route(self._seen(view), trail, None)
        delivered = await self._store.deliver(request_id, aftermath, self._clock.now())
        self._events.tell(delivered.injections)

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
            raise NotFound(f"no delivery {injection_id!r} (or it is not kept any more)", injection_id=injection_id)
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
        return msgspec.structs.replace(child, route=self._providers.route(model, mcp=body.mcp), error=None)


def _next_id(injection_id: str) -> str:
    """`<id>`, then `<id>+1`, `<id>+2`: the same delivery, sent again."""
    name, _, number = injection_id.rpartition("+")
    if name and number.isdigit():
        return f"{name}+{int(number) + 1}"
    return f"{injection_id}+1"
