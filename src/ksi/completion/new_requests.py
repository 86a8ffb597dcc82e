"""Makes new requests: chooses the model, finds the route, and settles the place in a chain."""

from __future__ import annotations

import msgspec

from ksi.clock import Clock
from ksi.completion.budget.book import BudgetBook
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.intake import Intake, normalise
from ksi.completion.pool.abilities import needs_of
from ksi.completion.pool.routes import parse_route
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.session_manager import SessionManager
from ksi.completion.trace.traces import Traces
from ksi.config.schema import Config
from ksi.errors import UnknownModel
from ksi.events.completions import CompletionData
from ksi.events.specs import conversation_name
from ksi.request import RequestBody, decode_body, full_model
from ksi.store.questions import Question
from ksi.store.values import NewRequest, RequestView

USUAL_CLAUDE = "sonnet"
"""The model that continues a dialogue of Claude Code whose own model is not known."""


class NewRequests:
    """Turns an event's data, or a request that ended, into a new request for the store."""

    def __init__(
        self,
        intake: Intake,
        providers: ProviderManager,
        sessions: SessionManager,
        injections: InjectionManager,
        budgets: BudgetBook,
        config: Config,
        clock: Clock,
        traces: Traces | None = None,
    ) -> None:
        self._intake = intake
        self._providers = providers
        self._sessions = sessions
        self._injections = injections
        self._budgets = budgets
        self._config = config
        self._clock = clock
        self._traces = traces

    async def of(self, data: CompletionData) -> NewRequest:
        """Make the request that a client asks for.

        Raises:
            InvalidData: a field cannot be used; `path` names it.
            UnknownModel: nothing serves the model.
        """
        default = self._config.service.default_model
        model = full_model(data.model, default) if data.model is not None else await self._usual_model(data)
        if data.model is None and model != full_model(None, default):
            data = msgspec.structs.replace(data, model=model)
        if data.circuit_breaker_config is not None:
            wishes = await self._injections.of_parent(data.circuit_breaker_config)
            data = msgspec.structs.replace(data, circuit_breaker_config=wishes)
        body = normalise(data)
        route = self._providers.route(model, mcp=body.mcp, needs=needs_of(body))
        new = self._intake.new_request(data, body, model, route, self._clock.now())
        if self._traces is not None:
            self._traces.asked(new.request_id, data.traceparent)
        if data.injection_config is not None or data.circuit_breaker_config is not None:
            chain = await self._injections.membership(body, new.conversation)
            new = msgspec.structs.replace(new, chain=chain)
        question = await self._injections.question(body, new.chain)
        new = new if question is None else _asking(new, question)
        return await self._with_demand(new, body)

    async def _with_demand(self, new: NewRequest, body: RequestBody) -> NewRequest:
        demand = await self._budgets.demand(body, new.route, new.model)
        return msgspec.structs.replace(new, demand=demand) if demand else new

    async def again(self, view: RequestView) -> NewRequest:
        """Make a new request with the content of one that ended. Raises as `of`."""
        body = decode_body(view.body)
        route = self._providers.route(view.model, mcp=body.mcp, needs=needs_of(body))
        new = self._intake.requeue(view, route, self._clock.now())
        new = msgspec.structs.replace(new, chain=await self._injections.membership_again(view))
        return await self._with_demand(new, body)

    async def _usual_model(self, data: CompletionData) -> str:
        """Return the model of a request that names none: its conversation stays with its kind of model.

        Raises:
            UnknownModel: nothing serves the model that the conversation was made with.
        """
        default = full_model(None, self._config.service.default_model)
        name = conversation_name(data.session_id, data.conversation_id)
        if name is None:
            return default
        last = await self._sessions.last_provider(name)
        kinds = {self._kind(step.provider) for step in parse_route(self._route_or_none(default))}
        if last is None or self._kind(last) in kinds:
            return default
        usual = await self._sessions.last_model(name)
        if usual is None and self._kind(last) == "claude-cli":
            usual = f"{last}/{USUAL_CLAUDE}"
        why = "nothing serves that now"
        try:
            if usual is not None:
                self._providers.route(usual)
                return usual
        except UnknownModel as error:
            why = error.message
        raise UnknownModel(
            f"conversation {name!r} was made at {last} and stays there: {why}; name a model to continue elsewhere with "
            "its history",
            model=usual,
        )

    def _kind(self, provider: str) -> str:
        entry = self._config.providers.get(provider)
        return provider if entry is None else entry.kind

    def _route_or_none(self, model: str) -> str:
        try:
            return self._providers.route(model)
        except UnknownModel:
            return ""


def _asking(new: NewRequest, question: Question) -> NewRequest:
    """The request with the question that a person has to answer before it joins the queue."""
    ends = [time for time in (new.expires, question.expires) if time is not None]
    return msgspec.structs.replace(new, question=question, expires=min(ends, default=None))
