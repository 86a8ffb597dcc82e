"""Deliveries in SQL: the results that a request's end sends to other conversations."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.request import State
from ksi.store.admission import Routing, Standing, fate, is_guard, trip_of
from ksi.store.chains import Aftermath, ChildRequest, Delivered, FollowUp, InjectionState, InjectionView
from ksi.store.passages import LEAST, Passage, cut, cut_bytes
from ksi.store.rules import refusals
from ksi.store.rules.fairness import flow_of
from ksi.store.sqlite.budgets import Budgets
from ksi.store.sqlite.chain_rows import INJECTION_CODES, INJECTION_STATES, Link, is_dead, write_block, write_child
from ksi.store.sqlite.chains import Chains
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.rows import BESIDE, IN_LINE, STATE_CODES


class _Cutter:
    """Cuts a passage out of the texts of an aftermath; it is kept if the first text has it."""

    def __init__(self, ledger: Ledger, passage: Passage | None, identity: int | None = None) -> None:
        self._ledger = ledger
        self._passage = passage
        self._identity = identity

    def text(self, text: str) -> tuple[str, int | None]:
        """A text without the passage, and the passage's place in it."""
        return (text, None) if self._passage is None else cut(text, self._passage.text)

    def body(self, body: bytes) -> tuple[bytes, int | None]:
        """The same of a request."""
        return (body, None) if self._passage is None else cut_bytes(body, self._passage.data)

    def child(self, child: ChildRequest | None) -> tuple[ChildRequest | None, int | None]:
        """The same of the request of a direct delivery."""
        if child is None:
            return None, None
        body, place = self.body(child.body)
        return (child if place is None else msgspec.structs.replace(child, body=body)), place

    def identity(self) -> int | None:
        """The passage's id."""
        if self._identity is None and self._passage is not None:
            self._identity = self._ledger.scalar("add_passage", self._passage.data)
        return self._identity


class Injections:
    """Writes follow-ups: children into lines, reminders before prompts, dead letters."""

    def __init__(self, ledger: Ledger, chains: Chains, budgets: Budgets) -> None:
        self._ledger = ledger
        self._chains = chains
        self._budgets = budgets

    def write(self, key: int, request_id: str, aftermath: Aftermath, now: Moment) -> tuple[InjectionView, ...]:
        """A member's aftermath, in the step of its end or behind it."""
        link = self._chains.link(key)
        if aftermath.mark is not None:
            self._ledger.run("set_result", key, aftermath.mark)
        if aftermath.trip is not None:
            self._chains.trip(link.chain, aftermath.trip)
        cutter = _Cutter(self._ledger, Passage.of(aftermath.passage) if len(aftermath.passage) >= LEAST else None)
        return tuple(self._send(key, request_id, link, follow_up, cutter, now) for follow_up in aftermath.follow_ups)

    def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See `Store.deliver`."""
        row = self._ledger.one("chain_of", request_id)
        if row is None or self._chains.link(row[1]).routes is not Routing.UNROUTED:
            return Delivered()
        self._ledger.run("set_routing", row[1], int(Routing.ROUTED))
        return Delivered(injections=self.write(row[1], request_id, aftermath, now))

    def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See `Store.redeliver`."""
        row = self._ledger.one("injection_named", injection_id)
        if row is None:
            raise refusals.unknown_delivery(injection_id)
        identity, state, _, parent, parent_key, passage = row
        if not is_dead(state):
            raise refusals.not_a_dead_letter(injection_id, INJECTION_STATES[state])
        if self._ledger.one("member", parent_key) is None:
            raise refusals.result_is_gone(parent)
        self._ledger.run("retried", injection_id)
        old = self._chains.delivery(identity)
        kept = None if passage is None else Passage.kept(self._ledger.scalar("passage", passage))
        cutter = _Cutter(self._ledger, kept, passage)
        sent = self._send(parent_key, parent, self._chains.link(parent_key), again, cutter, now)
        return Delivered(injections=(old, sent))

    def _send(
        self, key: int, request_id: str, link: Link, follow_up: FollowUp, cutter: _Cutter, now: Moment
    ) -> InjectionView:
        if (trip := trip_of(follow_up)) is not None:
            self._chains.trip(link.chain, trip)
        chain = self._chains.figures(link.chain)
        standing = chain.standing(link.limits, link.depth)
        dead = fate(follow_up, standing, self._ledger.rules.guard_messages, now.wall)
        name, child = self._free_id(follow_up), follow_up.child
        found = self._ledger.one("conversation", follow_up.target)
        target = follow_up.target if found is None else found[2]
        state, conversation = InjectionState.QUEUED, None
        if dead is not None:
            state = dead.state
        else:
            conversation = self._enter(target, None if found is None else found[0], now)
        if dead is None and child is None:
            self._ledger.run("more_reminders_wait", conversation, 1)
            if is_guard(follow_up):
                self._ledger.run("count_guard", link.chain)
        elif dead is None and child is not None and conversation is not None:
            guard = is_guard(follow_up)
            self._enqueue(name, conversation, key, request_id, link, child, standing, cutter, now, guard=guard)
        text, place = cutter.text(follow_up.text)
        child, child_place = cutter.child(child)
        cut_out = place is not None or child_place is not None
        identity = self._ledger.scalar(
            "add_injection", name, chain.name, request_id, key, target, child is not None, follow_up.trigger,
            INJECTION_CODES[state], now.wall, None if dead is None else now.wall,
            conversation if child is None else None, name if dead is None and child is not None else None,
            None if dead is None else write_block(dead.reason), text, write_child(child),
            cutter.identity() if cut_out else None, place, child_place,
        )  # fmt: skip
        return self._chains.delivery(identity)

    def _free_id(self, follow_up: FollowUp) -> str:
        """Its own id, or the next free one: ids come again when old ones are past their retention."""
        name = follow_up.injection_id
        while self._ledger.scalar("name_taken", name, follow_up.child is not None):
            name += "+"
        return name

    def _enter(self, name: str, conversation: int | None, now: Moment) -> int:
        if conversation is None:
            return self._ledger.add_conversation(name, now, None, None)
        self._ledger.run("touch_conversation", conversation, now.wall)
        return conversation

    def _enqueue(
        self,
        request_id: str,
        conversation: int,
        parent_key: int,
        parent: str,
        link: Link,
        child: ChildRequest,
        standing: Standing,
        cutter: _Cutter,
        now: Moment,
        *,
        guard: bool,
    ) -> None:
        """Put a child request into its line."""
        if child.agent_id is not None:
            self._ledger.know_agent(child.agent_id, conversation)
        self._ledger.know_route(child.route)
        key = self._ledger.next_key()
        state, place_in_line = (State.QUEUED, IN_LINE) if child.question is None else (State.SCHEDULED, BESIDE)
        expires = None if child.question is None else child.question.expires
        self._ledger.run(
            "add_request", key, request_id, conversation, STATE_CODES[state], place_in_line, 0, child.priority,
            child.rank, 1, child.route, None, 0, None, None, now.wall, None, expires, None, None, None,
        )  # fmt: skip
        body, place = cutter.body(child.body)
        passage = None if place is None else cutter.identity()
        self._ledger.run("add_cut_body", key, child.model, child.agent_id, None, body, passage, place)
        self._ledger.count(state.value, 1)
        self._budgets.remember(key, child.demand)
        if self._ledger.rules.fair:
            flow = flow_of(child.agent_id, "", self._ledger.conversation_name(conversation))
            self._ledger.take_turn(key, child.priority, flow, waits=state is State.QUEUED)
        if child.question is not None:
            self._ledger.ask(key, child.question)
        membership = msgspec.structs.replace(child.membership, guard=guard)
        below = standing.below(membership.limits)
        self._chains.add_member(key, link.chain, membership, below, parent, parent_key, carries=True)
        self._ledger.refresh_line(conversation, now)
