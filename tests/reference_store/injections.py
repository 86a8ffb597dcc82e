"""Deliveries in the memory store: the results that a request's end sends to other conversations (C1-C3)."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.request import Priority, State
from ksi.store.admission import Routing, Standing, fate, is_guard, trip_of
from ksi.store.chains import Aftermath, ChildRequest, Delivered, FollowUp, InjectionState, InjectionView
from ksi.store.image.chains import Injection, Link
from ksi.store.image.data import Request
from ksi.store.rules import refusals
from ksi.store.rules.fairness import flow_of
from ksi.store.values import StoreRules
from tests.reference_store.chain_data import injection_view, is_dead_letter
from tests.reference_store.chain_data import standing as standing_of
from tests.reference_store.chains import Chains
from tests.reference_store.conversations import Conversations
from tests.reference_store.data import MemoryData
from tests.reference_store.lines import Lines


class Injections:
    """Writes follow-ups: children into lines, reminders before prompts, dead letters."""

    def __init__(
        self, rules: StoreRules, data: MemoryData, lines: Lines, chains: Chains, conversations: Conversations
    ) -> None:
        self._rules = rules
        self._data = data
        self._lines = lines
        self._chains = chains
        self._conversations = conversations

    def write(self, request: Request, link: Link, aftermath: Aftermath, now: Moment) -> tuple[InjectionView, ...]:
        """A member's aftermath, in the step of its end or behind it."""
        if aftermath.mark is not None:
            link.result = aftermath.mark
        if aftermath.trip is not None:
            self._chains.trip(link.chain, aftermath.trip)
        return tuple(self._send(request, link, follow_up, now) for follow_up in aftermath.follow_ups)

    def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See `Store.deliver`."""
        request = self._data.ids.get(request_id)
        if not isinstance(request, Request) or request.link is None or request.link.routing is not Routing.UNROUTED:
            return Delivered()
        with self._data.changing(request):
            request.link.routing = Routing.ROUTED
        return Delivered(injections=self.write(request, request.link, aftermath, now))

    def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See `Store.redeliver`."""
        old = self._data.injections.named.get(injection_id)
        if old is None:
            raise refusals.unknown_delivery(injection_id)
        if not is_dead_letter(old):
            raise refusals.not_a_dead_letter(injection_id, old.state)
        parent = self._data.members.get(old.parent_key)
        if not isinstance(parent, Request) or parent.link is None:
            raise refusals.result_is_gone(old.parent)
        with self._data.injections.changing(old):
            old.state = InjectionState.RETRIED
        return Delivered(injections=(injection_view(old), self._send(parent, parent.link, again, now)))

    def _send(self, parent: Request, link: Link, follow_up: FollowUp, now: Moment) -> InjectionView:
        if (trip := trip_of(follow_up)) is not None:
            self._chains.trip(link.chain, trip)
        standing = standing_of(link)
        dead = fate(follow_up, standing, self._rules.guard_messages, now.wall)
        injection = self._record(parent, link, follow_up, now)
        if dead is not None:
            self._chains.bury(injection, dead, now.wall)
        elif follow_up.child is None:
            self._remind(injection, link, now, guard=is_guard(follow_up))
        else:
            self._enqueue(injection, parent, link, follow_up.child, standing, now, guard=is_guard(follow_up))
        return injection_view(injection)

    def _record(self, parent: Request, link: Link, follow_up: FollowUp, now: Moment) -> Injection:
        known = self._data.find(follow_up.target)
        injection = Injection(
            number=self._data.number("injection"),
            injection_id=self._free_id(follow_up),
            chain=link.chain.name,
            parent=parent.request_id,
            parent_key=parent.key,
            target=follow_up.target if known is None else known.name,
            trigger=follow_up.trigger,
            text=follow_up.text,
            created_at=now.wall,
            child=follow_up.child,
            direct=follow_up.child is not None,
        )
        self._data.injections.add(injection)
        return injection

    def _free_id(self, follow_up: FollowUp) -> str:
        """Its own id, or the next free one: ids come again when old ones are past their retention."""
        name = follow_up.injection_id
        while name in self._data.injections.named or (follow_up.child is not None and name in self._data.ids):
            name += "+"
        return name

    def _remind(self, injection: Injection, link: Link, now: Moment, *, guard: bool) -> None:
        conversation = self._conversations.enter(injection.target, now)
        conversation.reminders.append(injection.number)
        conversation.active_at = now.wall
        link.chain.guard_messages += guard
        self._lines.refresh(conversation, now)

    def _enqueue(
        self,
        injection: Injection,
        parent: Request,
        link: Link,
        child: ChildRequest,
        standing: Standing,
        now: Moment,
        *,
        guard: bool,
    ) -> None:
        """Put a child request into its line."""
        conversation = self._conversations.enter(injection.target, now)
        self._conversations.meet(conversation, child.agent_id)
        conversation.active_at = now.wall
        self._data.routes.add(child.route)
        request = Request(
            key=self._data.number("member"),
            request_id=injection.injection_id,
            conversation=conversation,
            rank=child.rank,
            priority=Priority(child.priority),
            enqueued_at=now.wall,
            state=State.QUEUED if child.question is None else State.SCHEDULED,
            body=child.body,
            route=child.route,
            model=child.model,
            agent_id=child.agent_id,
            hold_on_retry=True,
            requeued_from=None,
            due=None,
            expires=None if child.question is None else child.question.expires,
            message=None if child.question is None else child.question.text,
            question=child.question,
        )
        membership = msgspec.structs.replace(child.membership, guard=guard)
        own = self._chains.add_member(request, link.chain, membership, standing.below(membership.limits), parent)
        own.carries = True
        with self._data.injections.changing(injection):
            injection.request_id = request.request_id
        self._data.add(request)
        self._lines.take_turn(request, flow_of(child.agent_id, "", conversation.name))
        if child.demand:
            self._data.demands[request.key] = child.demand
        self._lines.refresh(conversation, now)
