"""Decides which conversations get the result of an ended request. Pure; asked before the end is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ksi.errors import FailureClass
from ksi.injection.circuit_breakers import ChainBreaker, Judgement
from ksi.injection.reminders import Facts, Templates
from ksi.injection.wrapper import LONGEST_TAG, neutralise
from ksi.request import (
    ORIGINATING,
    HeadStarts,
    InjectionConfig,
    Json,
    Priority,
    RequestBody,
    State,
    encode_body,
)
from ksi.store.chains import (
    Aftermath,
    Block,
    ChainLimits,
    ChildRequest,
    FollowUp,
    Spending,
    Trail,
    check,
)

UNDELIVERED = "undelivered"
"""The outcome in the notice that a delivery was blocked."""
CLOSED = "chain_closed"


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A request that ends now, as the router needs to know it. Times in microseconds."""

    request_id: str
    conversation: str
    body: RequestBody
    state: State
    """The final state that it gets."""
    model: str
    """Its model's full name."""
    route: str
    """The route for its children: that of its present model; empty with `route_error`."""
    route_error: str | None = None
    """Why its model cannot be asked for any more."""
    priority: Priority = Priority.NORMAL
    agent_id: str | None = None
    text: str | None = None
    """Its answer."""
    truncated: bool = False
    """True if the answer was cut at a limit of tokens."""
    error: str | None = None
    """A FailureClass word, if there is no answer."""
    message: str | None = None
    block: Block | None = None
    """The reason why it was blocked."""
    charged: int = 0
    """Tokens that its end adds to its chain's figures."""


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """The decisions about a request's end."""

    follow_ups: tuple[FollowUp, ...] = ()
    reason: str = ""
    """Why there are none, or none of them is sent."""
    passage: str = ""
    """The result's text, which is the same in all of them."""
    problems: tuple[str, ...] = ()
    """Problems of templates for the log; the deliveries were made all the same."""

    def aftermath(self, judgement: Judgement | None = None) -> Aftermath:
        """The data for the store with the request's end."""
        if judgement is None:
            return Aftermath(follow_ups=self.follow_ups, passage=self.passage)
        return Aftermath(follow_ups=self.follow_ups, mark=judgement.mark, trip=judgement.block, passage=self.passage)


class _Figures(msgspec.Struct, frozen=True):
    """The state of the request's chain: as stored, or as it begins with this request."""

    chain: str
    depth: int
    limits: ChainLimits
    spending: Spending


class InjectionRouter:
    """Decides follow-ups. Reads templates, nothing else."""

    def __init__(self, templates: Templates, breaker: ChainBreaker, head_starts: HeadStarts) -> None:
        self._templates = templates
        self._breaker = breaker
        self._head_starts = head_starts

    def route(
        self,
        ended: Ended,
        trail: Trail | None,
        now: int,
        judgement: Judgement | None = None,
        agents: Mapping[str, str] | None = None,
    ) -> Routing:
        """The follow-ups of an ended request, numbered from 1 within it.

        `trail` is the request's own, None if it is in no chain yet; `now` is wall time. `judgement` is of its result:
        if it blocks, the deliveries are made as dead letters, and each target is notified by a guard message. The same
        holds if the chain's limits stop the next hop already now; the store checks again. A cancelled chain sends no
        notices: its operator knows. `agents` names the owners of the target conversations, if known.
        """
        config = ended.body.injection_config
        if config is None or not config.enabled:
            return Routing(reason="it has no injection")
        figures = self._figures(ended, trail, now)
        block = judgement.block if judgement is not None else None
        if block is None and ended.state is not State.BLOCKED:
            block = check(figures.spending, figures.limits, figures.depth + 1, now)
        warning = judgement.warning if judgement is not None else None
        delivery = _Delivery(ended, config, figures, now, agents or {}, warning)
        found: list[FollowUp] = []
        problems: list[str] = []
        for target in targets(config, ended.conversation):
            found.append(self._follow_up(delivery, target, len(found) + 1, problems, block=block))
        if block is not None and block.code != CLOSED:
            for blocked in tuple(found):
                found.append(self._follow_up(delivery, blocked.target, len(found) + 1, problems, notice_of=blocked))
        reason = f"blocked: {block.code}, {block.message}" if block is not None else ""
        return Routing(
            follow_ups=tuple(found),
            reason=reason,
            passage=delivery.result,
            problems=tuple(dict.fromkeys(problems)),
        )

    def _figures(self, ended: Ended, trail: Trail | None, now: int) -> _Figures:
        if trail is None:
            limits = self._breaker.limits(ended.body.circuit_breaker_config)
            return _Figures(ended.request_id, 0, limits, Spending(started_at=now, used=ended.charged))
        view = trail.view
        # The present reservation is not spent yet; the store checks it when it writes.
        spending = msgspec.structs.replace(view.spending, used=view.spending.used + ended.charged, reserved=0)
        return _Figures(view.chain, trail.hops[0].depth if trail.hops else view.depth, view.limits, spending)

    def _follow_up(
        self,
        delivery: _Delivery,
        target: str,
        number: int,
        problems: list[str],
        *,
        block: Block | None = None,
        notice_of: FollowUp | None = None,
    ) -> FollowUp:
        """One delivery: of the result, blocked if `block` is given; or the notice that one was blocked."""
        guard = notice_of is not None or delivery.ended.state is State.BLOCKED
        rendered = self._templates.render(delivery.facts(target, guard=guard, notice_of=notice_of), delivery.wrapped)
        if rendered.problem is not None:
            problems.append(rendered.problem)
        injection_id = f"{delivery.ended.request_id}/{number}"
        child = None
        if delivery.config.mode == "direct":
            child = self._child(delivery, target, injection_id, rendered.text, guard=guard)
        return FollowUp(
            injection_id=injection_id,
            target=target,
            trigger=delivery.config.trigger_type,
            text=rendered.text,
            child=child,
            block=block,
            guard=guard,
        )

    def _child(self, delivery: _Delivery, target: str, injection_id: str, text: str, *, guard: bool) -> ChildRequest:
        ended = delivery.ended
        agent = ended.agent_id if target == ended.conversation else delivery.agents.get(target)
        body = msgspec.structs.replace(
            _body_for(ended, target),
            prompt=text,
            session_id=target,
            agent_id=agent,
            injection_config=None if guard else delivery.inherited(target),
            metadata=delivery.provenance(injection_id),
        )
        return ChildRequest(
            body=encode_body(body),
            route=ended.route,
            rank=self._head_starts.rank(ended.priority, delivery.now),
            model=ended.model,
            priority=int(ended.priority),
            membership=self._breaker.child(body, ended.request_id, guard=guard),
            agent_id=agent,
            error=ended.route_error,
        )


class _Delivery:
    """The common part of all deliveries of one ended request."""

    def __init__(
        self,
        ended: Ended,
        config: InjectionConfig,
        figures: _Figures,
        now: int,
        agents: Mapping[str, str],
        warning: str | None,
    ) -> None:
        self.ended = ended
        self.config = config
        self.now = now
        self.agents = agents
        self._warning = warning
        self._figures = figures
        self.result = neutralise(ended.text or "")
        guidance = config.follow_up_guidance
        self._guidance = neutralise(guidance) if guidance is not None else None
        self.wrapped: dict[str, str] = {}
        """The reminders by their text: one for all targets with the same."""

    def inherited(self, target: str) -> InjectionConfig | None:
        """The delivery of the child's own result."""
        if self.config.inherit == "same":
            return self.config
        if self.config.inherit == "reply" and target != self.ended.conversation:
            return msgspec.structs.replace(self.config, target_sessions=(self.ended.conversation,))
        if self.config.inherit == "reply":
            return msgspec.structs.replace(self.config, target_sessions=(ORIGINATING,))
        return None

    def provenance(self, injection_id: str) -> Json:
        """Return the facts on the result's origin, without its text."""
        facts = {
            "injection_id": injection_id,
            "request_id": self.ended.request_id,
            "agent_id": self.ended.agent_id,
            "conversation_id": self.ended.conversation,
            "chain_id": self._figures.chain,
            "hop": self._figures.depth + 1,
            "trigger_type": self.config.trigger_type,
            "outcome": outcome(self.ended),
        }
        return {"injection": {name: value for name, value in facts.items() if value is not None}}

    def facts(self, target: str, *, guard: bool, notice_of: FollowUp | None) -> Facts:
        """The values for the template."""
        ended, figures = self.ended, self._figures
        inherited = None if guard or self.config.mode == "next" else self.inherited(target)
        reason = notice_of.block if notice_of is not None else ended.block
        return Facts(
            trigger=self.config.trigger_type,
            outcome=UNDELIVERED if notice_of is not None else outcome(ended),
            mode=self.config.mode,
            request_id=ended.request_id,
            conversation=ended.conversation,
            target=target,
            own=target == ended.conversation,
            agent_id=ended.agent_id,
            chain=figures.chain,
            hop=figures.depth + (1 if notice_of is None else 0),
            max_depth=figures.limits.max_depth,
            tokens_used=figures.spending.used,
            token_budget=figures.limits.token_budget,
            age_seconds=max(0, self.now - figures.spending.started_at) // 1_000_000,
            time_window_seconds=figures.limits.time_window // 1_000_000,
            result=self.result if notice_of is None else "",
            truncated=ended.truncated and notice_of is None,
            error_code=reason.code if reason is not None else ended.error,
            error_message=reason.message if reason is not None else ended.message,
            guidance=self._guidance if notice_of is None else None,
            passed_on=inherited is not None,
            reply_to=ended.conversation if inherited is not None and inherited.inherit == "reply" else None,
            warning=self._warning if notice_of is None else None,
            undelivered_id=notice_of.injection_id if notice_of is not None else None,
        )


def effort(ended: Ended) -> int:
    """About how many characters have to be looked at to route it."""
    config = ended.body.injection_config
    if config is None or not config.enabled:
        return 0
    long = len(ended.text or "") + len(config.follow_up_guidance or "")
    return long + len(config.target_sessions) * (LONGEST_TAG + long // 100)


def targets(config: InjectionConfig, conversation: str) -> tuple[str, ...]:
    """The conversations that get the result, each once, in order; `originating` is the request's own."""
    return tuple(dict.fromkeys(conversation if name == ORIGINATING else name for name in config.target_sessions))


def outcome(ended: Ended) -> str:
    """How it ended, in a word: its state, or `timeout`."""
    if ended.state is State.FAILED and ended.error == FailureClass.TIMEOUT:
        return "timeout"
    return ended.state.value


def unknown_triggers(templates: Templates, config: InjectionConfig | None) -> Sequence[str]:
    """The known triggers, if a request's is none of them; empty otherwise."""
    if config is None or not config.enabled or templates.known(config.trigger_type):
        return ()
    return templates.names()


def _body_for(ended: Ended, target: str) -> RequestBody:
    """The fields that a child inherits from its parent's body.

    In the parent's own conversation all that shapes an answer. Elsewhere neither its system text nor its tools, which
    were given to another agent.
    """
    parent = ended.body
    config = parent.circuit_breaker_config
    if config is not None:
        config = msgspec.structs.replace(config, parent_request_id=None)
    if target == ended.conversation:
        return msgspec.structs.replace(
            parent,
            messages=(),
            on_busy="enqueue",
            fork=False,
            not_before=None,
            delay=None,
            ttl=None,
            circuit_breaker_config=config,
        )
    return RequestBody(
        model=parent.model,
        max_tokens=parent.max_tokens,
        temperature=parent.temperature,
        priority=parent.priority,
        timeout=parent.timeout,
        retry=parent.retry,
        circuit_breaker_config=config,
        patterns=parent.patterns,
    )
