"""Chains in the memory store: admission, starts and costs of members, and the effect of a member's end on its chain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from ksi.clock import Moment
from ksi.request import Attempt, Outcome, State
from ksi.store.admission import DeadLetter, Routing, Standing, may_enter, may_run, unanswered
from ksi.store.chains import (
    Block,
    ClosedChain,
    Grant,
    InjectionState,
    InjectionView,
    MemberGrant,
    Membership,
    Reminder,
    Spending,
    charge,
)
from ksi.store.image.chains import Chain, Injection, Link
from ksi.store.image.data import Request
from ksi.store.rules import refusals
from ksi.store.values import NewRequest, StoreRules
from tests.reference_store.chain_data import injection_view
from tests.reference_store.chain_data import standing as standing_of
from tests.reference_store.data import MemoryData


@dataclass(slots=True, frozen=True, kw_only=True)
class Arriving:
    """How a new request belongs to a chain, before anything of it is written."""

    membership: Membership
    parent: Request | None
    chain: Chain | None
    """None: it is begun with this request or with its parent."""
    standing: Standing
    estimated: int = 0
    """The estimated part of a root's usage before it had a chain."""


class Chains:
    """The figures of chains, and the members that move them."""

    def __init__(self, rules: StoreRules, data: MemoryData) -> None:
        self._rules = rules
        self._data = data

    # -- coming in ----------------------------------------------------------------------------------------------------

    def arriving(self, new: NewRequest, now: Moment) -> Arriving | None:
        """The future position of a new request; None if it belongs to no chain.

        Raises:
            UnknownParent: its parent is not kept.
            RequestIdConflict: the chain that it would begin has the name of an older one.
        """
        membership = new.chain
        if membership is None:
            return None
        if membership.parent is None:
            self._refuse_known(new.request_id)
            spending = Spending(started_at=now.wall)
            standing = Standing(spending=spending, limits=membership.limits, depth=0, guards=0)
            return Arriving(membership=membership, parent=None, chain=None, standing=standing)
        parent = self._data.ids.get(membership.parent)
        if not isinstance(parent, Request):
            raise refusals.unknown_parent(membership.parent)
        if parent.link is not None:
            standing = standing_of(parent.link).below(membership.limits)
            return Arriving(membership=membership, parent=parent, chain=parent.link.chain, standing=standing)
        self._refuse_known(parent.request_id)
        used, estimated = _spent(parent)
        spending = Spending(started_at=parent.enqueued_at, used=used)
        root = Standing(spending=spending, limits=self._rules.chain_limits, depth=0, guards=0)
        return Arriving(
            membership=membership,
            parent=parent,
            chain=None,
            standing=root.below(membership.limits),
            estimated=estimated,
        )

    def _refuse_known(self, name: str) -> None:
        if name in self._data.chains.named:
            raise refusals.names_an_older_chain(name)

    def against(self, arriving: Arriving, now: Moment) -> Block | None:
        """The reason against a newcomer."""
        membership = arriving.membership
        cap = self._rules.guard_messages
        return may_enter(
            arriving.standing,
            cap,
            now.wall,
            block=membership.block,
            guard=membership.guard,
            estimate=membership.estimate,
        )

    def would_run(self, arriving: Arriving, now: Moment) -> Block | Grant | None:
        """The decision if a newcomer may run at once, and with how many tokens."""
        membership = arriving.membership
        return may_run(
            arriving.standing,
            now.wall,
            estimate=membership.estimate,
            output_cap=membership.output_cap,
            guard=membership.guard,
        )

    def join(self, request: Request, arriving: Arriving, block: Block | None, now: Moment) -> None:
        """Make a new request, which is in no index yet, a member."""
        membership, parent = arriving.membership, arriving.parent
        chain = arriving.chain or self._begin(request, arriving, now)
        if membership.block is not None and membership.trips:
            self.trip(chain, membership.block)
        self.add_member(request, chain, membership, arriving.standing, parent, block)

    def add_member(
        self,
        request: Request,
        chain: Chain,
        membership: Membership,
        standing: Standing,
        parent: Request | None,
        block: Block | None = None,
    ) -> Link:
        """Write how a request belongs to its chain."""
        routing = Routing.AT_END if membership.injects else Routing.NONE
        request.link = link = Link(
            chain=chain,
            parent=None if parent is None else parent.request_id,
            parent_key=None if parent is None else parent.key,
            depth=standing.depth,
            limits=standing.limits,
            estimate=membership.estimate,
            output_cap=membership.output_cap,
            guard=membership.guard,
            routing=routing if block is None else routing.ended(routed=False),
            mark=membership.mark,
            block=block,
        )
        chain.members.append(request.key)
        chain.notices += link.guard
        chain.deepest = max(chain.deepest, 0 if link.guard else link.depth)
        if block is None:
            chain.unfinished += 1
            chain.guard_messages += membership.guard
        return link

    def _begin(self, request: Request, arriving: Arriving, now: Moment) -> Chain:
        root = arriving.parent
        chain = Chain(
            number=self._data.number("chain"),
            name=request.request_id if root is None else root.request_id,
            limits=arriving.standing.limits if root is None else self._rules.chain_limits,
            created_at=now.wall if root is None else root.enqueued_at,
            started_at=arriving.standing.spending.started_at,
            used=arriving.standing.spending.used,
            estimated=arriving.estimated,
        )
        self._data.chains.add(chain)
        if root is not None:
            root.link = Link(
                chain=chain,
                parent=None,
                parent_key=None,
                depth=0,
                limits=chain.limits,
                tokens=chain.used,
                estimated=chain.estimated > 0,
            )
            chain.members.append(root.key)
            chain.unfinished += not root.state.final
        return chain

    def trip(self, chain: Chain, block: Block) -> None:
        """Admit no more members (C7); the first finding against it stays."""
        chain.tripped = chain.tripped or block

    # -- running ------------------------------------------------------------------------------------------------------

    def may_run(self, link: Link, now: Moment) -> Block | Grant | None:
        """The decision if a member may run now, and with how many tokens."""
        return may_run(
            standing_of(link), now.wall, estimate=link.estimate, output_cap=link.output_cap, guard=link.guard
        )

    def started(self, link: Link, grant: Grant | None) -> MemberGrant:
        """Make the reservation of a run."""
        if grant is not None:
            link.reserved = grant.reserved
            link.chain.reserved += grant.reserved
        return MemberGrant(
            chain=link.chain.name,
            depth=link.depth,
            parent=link.parent,
            output_cap=None if grant is None else grant.output_cap,
            injects=link.routing is not Routing.NONE,
        )

    def attempt_ended(self, request: Request, attempt: Attempt) -> None:
        """Return the reservation of a member's attempt, and charge its usage (C6)."""
        link = request.link
        if link is None:
            return
        link.chain.reserved -= link.reserved
        link.reserved = 0
        tokens, estimated = charge(attempt, link.estimate)
        link.tokens += tokens
        link.chain.used += tokens
        if estimated:
            link.estimated = True
            link.chain.estimated += tokens

    # -- reminders ----------------------------------------------------------------------------------------------------

    def take_reminders(self, request: Request) -> tuple[Reminder, ...]:
        """Give a run the deliveries that wait for its conversation's next prompt (C2)."""
        request.taken = [self._data.injections.numbered[number] for number in request.conversation.reminders]
        request.conversation.reminders = []
        for injection in request.taken:
            with self._data.injections.changing(injection):
                injection.state, injection.request_id = InjectionState.TAKEN, request.request_id
        return tuple(Reminder(injection_id=one.injection_id, text=one.text) for one in request.taken)

    def put_reminders_back(self, request: Request) -> None:
        """A run brought no answer: its taken deliveries wait again."""
        for injection in request.taken:
            with self._data.injections.changing(injection):
                injection.state, injection.request_id = InjectionState.QUEUED, None
        waiting = request.conversation.reminders
        request.conversation.reminders = sorted([*waiting, *(injection.number for injection in request.taken)])
        request.taken = []

    def use_reminders(self, request: Request, now: Moment) -> tuple[InjectionView, ...]:
        """A run completed: its taken deliveries are delivered."""
        for injection in request.taken:
            with self._data.injections.changing(injection):
                injection.state, injection.finished_at = InjectionState.DELIVERED, now.wall
        used, request.taken = request.taken, []
        return tuple(injection_view(injection) for injection in used)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def leave(self, request: Request, block: Block | None, *, routed: bool) -> None:
        """A member ends now; inside `MemoryData.changing`."""
        link = request.link
        if link is not None:
            link.routing = link.routing.ended(routed)
            link.block = block
            link.chain.unfinished -= 1

    def carried(self, request: Request, now: Moment) -> tuple[InjectionView, ...]:
        """The state of the delivery that an ended request carried."""
        link = request.link
        if link is None or not link.carries:
            return ()
        injection = self._data.injections.named[request.request_id]
        if request.state is State.COMPLETED:
            self.deliver(injection, now)
        else:
            dead = unanswered(request.request_id, request.state, request.error, request.message, link.block)
            self.bury(injection, dead, now.wall)
        return (injection_view(injection),)

    def deliver(self, injection: Injection, now: Moment) -> None:
        """A delivery reached its target."""
        with self._data.injections.changing(injection):
            injection.state, injection.finished_at, injection.child = InjectionState.DELIVERED, now.wall, None

    def bury(self, injection: Injection, dead: DeadLetter, at: int) -> None:
        """Make a delivery a dead letter."""
        with self._data.injections.changing(injection):
            injection.state, injection.reason, injection.finished_at = dead.state, dead.reason, at

    # -- an operator's hands ------------------------------------------------------------------------------------------

    def called(self, name: str) -> tuple[Chain, Link | None]:
        """A chain by its id, or by any member's, with that member.

        Raises:
            NotFound: no such chain.
        """
        if (chain := self._data.chains.named.get(name)) is not None:
            return chain, None
        request = self._data.ids.get(name)
        if not isinstance(request, Request) or request.link is None:
            raise refusals.unknown_chain(name)
        return request.link.chain, request.link

    def close(self, chain: Chain, limit: int) -> ClosedChain:
        """Let nothing more in (F8)."""
        chain.closed = True
        members = (self._data.request((key,)) for key in chain.members)
        left = (one.request_id for one in members if not one.state.final and not one.cancelling)
        return ClosedChain(chain=chain.name, unfinished=tuple(islice(left, limit)))

    def reset(self, chain: Chain, now: Moment) -> None:
        """Restart budget and time, and open it (C8)."""
        chain.started_at, chain.used, chain.estimated = now.wall, 0, 0
        chain.closed, chain.tripped, chain.guard_messages = False, None, 0
        chain.resets += 1
        chain.reset_key = self._data.last_number("member")


def _spent(root: Request) -> tuple[int, int]:
    """The cost of a request before it was in a chain, and the estimated part of it."""
    charges = [charge(attempt, 0) for attempt in root.attempts if attempt.outcome is not Outcome.FENCED]
    return sum(tokens for tokens, _ in charges), sum(tokens for tokens, estimated in charges if estimated)
