"""Deliveries in SQL: what a request's end sends to other conversations (C1-C3)."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.errors import InvalidData, NotFound
from ksi.request import State
from ksi.store.admission import Routing, Standing, fate, is_guard, trip_of
from ksi.store.chains import Aftermath, ChildRequest, Delivered, FollowUp, InjectionState, InjectionView
from ksi.store.sqlite_chain_rows import INJECTION_CODES, INJECTION_STATES, Link, is_dead, write_block, write_child
from ksi.store.sqlite_chains import Chains
from ksi.store.sqlite_ledger import Ledger
from ksi.store.sqlite_rows import IN_LINE, STATE_CODES


class Injections:
    """Writes follow-ups: children into lines, reminders before prompts, dead letters."""

    def __init__(self, ledger: Ledger, chains: Chains) -> None:
        self._ledger = ledger
        self._chains = chains

    def write(self, key: int, request_id: str, aftermath: Aftermath, now: Moment) -> tuple[InjectionView, ...]:
        """A member's aftermath, in the step of its end or behind it."""
        link = self._chains.link(key)
        if aftermath.mark is not None:
            self._ledger.run("set_result", key, aftermath.mark)
        if aftermath.trip is not None:
            self._chains.trip(link.chain, aftermath.trip)
        return tuple(self._send(key, request_id, link, follow_up, now) for follow_up in aftermath.follow_ups)

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
            raise NotFound(f"no delivery {injection_id!r}; it never was, or is past its retention")
        identity, state, _, parent, parent_key = row
        if not is_dead(state):
            raise InvalidData(
                f"delivery {injection_id!r} is {INJECTION_STATES[state]}; only a dead letter can be sent again",
                path="injection_id",
            )
        if self._ledger.one("member", parent_key) is None:
            raise NotFound(f"request {parent!r} is not kept any more, so its result cannot be sent again")
        self._ledger.run("retried", injection_id)
        old = self._chains.delivery(identity)
        return Delivered(injections=(old, self._send(parent_key, parent, self._chains.link(parent_key), again, now)))

    def _send(self, key: int, request_id: str, link: Link, follow_up: FollowUp, now: Moment) -> InjectionView:
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
            self._enqueue(name, conversation, key, request_id, link, child, standing, now, guard=is_guard(follow_up))
        identity = self._ledger.scalar(
            "add_injection", name, chain.name, request_id, key, target, child is not None, follow_up.trigger,
            INJECTION_CODES[state], now.wall, None if dead is None else now.wall,
            conversation if child is None else None, name if dead is None and child is not None else None,
            None if dead is None else write_block(dead.reason), follow_up.text, write_child(child),
        )  # fmt: skip
        return self._chains.delivery(identity)

    def _free_id(self, follow_up: FollowUp) -> str:
        """Its own id, or the next one that nobody has: ids come again when old ones are past their retention."""
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
        now: Moment,
        *,
        guard: bool,
    ) -> None:
        """Put a child request into its line."""
        if child.agent_id is not None:
            self._ledger.know_agent(child.agent_id, conversation)
        self._ledger.know_route(child.route)
        key = self._ledger.next_key()
        self._ledger.run(
            "add_request", key, request_id, conversation, STATE_CODES[State.QUEUED], IN_LINE, 0, child.priority,
            child.rank, 1, child.route, None, 0, None, None, now.wall, None, None, None, None, None,
        )  # fmt: skip
        self._ledger.run("add_body", key, child.model, child.agent_id, None, child.body)
        self._ledger.count(State.QUEUED.value, 1)
        membership = msgspec.structs.replace(child.membership, guard=guard)
        below = standing.below(membership.limits)
        self._chains.add_member(key, link.chain, membership, below, parent, parent_key, carries=True)
        self._ledger.refresh_line(conversation, now)
