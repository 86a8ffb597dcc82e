"""Chains in SQL: admission, starts and costs of members, and the effect of a member's end on its chain."""

from __future__ import annotations

import msgspec

from ksi.clock import Moment
from ksi.errors import InternalError
from ksi.request import Attempt, Outcome, State
from ksi.store.admission import DeadLetter, Routing, Standing, may_enter, may_run, unanswered
from ksi.store.chains import (
    Block,
    ChainLimits,
    ChainView,
    ClosedChain,
    Grant,
    InjectionView,
    MemberGrant,
    Membership,
    Reminder,
    Spending,
    charge,
)
from ksi.store.passages import cut
from ksi.store.rules import refusals
from ksi.store.sqlite.chain_rows import (
    INJECTION_CODES,
    ChainRow,
    Link,
    limit_values,
    read_injection,
    whole_text,
    write_block,
    write_reminders,
)
from ksi.store.sqlite.ledger import Ledger
from ksi.store.sqlite.reads import Reads
from ksi.store.sqlite.rows import STATES
from ksi.store.values import Finish, NewRequest


class Root(msgspec.Struct, frozen=True):
    """A kept request that becomes the root of a new chain."""

    key: int
    request_id: str
    enqueued_at: int
    unfinished: bool
    limits: ChainLimits
    used: int
    estimated: int


class Arriving(msgspec.Struct, frozen=True, kw_only=True):
    """How a new request belongs to a chain, before anything of it is written."""

    membership: Membership
    parent_key: int | None = None
    chain: int | None = None
    """None: it is begun with this request or with its parent."""
    root: Root | None = None
    """The parent, if it was in no chain."""
    standing: Standing


class Chains:
    """The figures of chains, and the members that move them."""

    def __init__(self, ledger: Ledger, reads: Reads) -> None:
        self._ledger = ledger
        self._reads = reads

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
            return Arriving(membership=membership, standing=standing)
        row = self._ledger.one("chain_parent", membership.parent)
        if row is None or row[1]:
            raise refusals.unknown_parent(membership.parent)
        key, _, state, enqueued_at, last_attempt, chain, depth, *limits = row
        if chain is not None:
            names = ("max_depth", "token_budget", "time_window")
            own = ChainLimits(**dict(zip(names, limits, strict=True)))
            standing = self.figures(chain).standing(own, depth).below(membership.limits)
            return Arriving(membership=membership, parent_key=key, chain=chain, standing=standing)
        self._refuse_known(membership.parent)
        root = self._root(key, membership.parent, enqueued_at, last_attempt, unfinished=not STATES[state].final)
        spending = Spending(started_at=enqueued_at, used=root.used)
        standing = Standing(spending=spending, limits=root.limits, depth=0, guards=0).below(membership.limits)
        return Arriving(membership=membership, parent_key=key, root=root, standing=standing)

    def _root(self, key: int, request_id: str, enqueued_at: int, last_attempt: int | None, *, unfinished: bool) -> Root:
        charges = [
            charge(attempt, 0)
            for attempt in self._reads.attempts(last_attempt)
            if attempt.outcome is not Outcome.FENCED
        ]
        return Root(
            key=key,
            request_id=request_id,
            enqueued_at=enqueued_at,
            unfinished=unfinished,
            limits=self._ledger.rules.chain_limits,
            used=sum(tokens for tokens, _ in charges),
            estimated=sum(tokens for tokens, estimated in charges if estimated),
        )

    def _refuse_known(self, name: str) -> None:
        if self._ledger.one("chain_named", name) is not None:
            raise refusals.names_an_older_chain(name)

    def against(self, arriving: Arriving, now: Moment) -> Block | None:
        """The reason against a newcomer."""
        membership, cap = arriving.membership, self._ledger.rules.guard_messages
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

    def join(self, key: int, request_id: str, arriving: Arriving, block: Block | None, now: Moment) -> int:
        """Make a new request, whose row is written, a member; returns its chain."""
        membership = arriving.membership
        chain = arriving.chain if arriving.chain is not None else self._begin(request_id, arriving, now)
        if membership.block is not None and membership.trips:
            self.trip(chain, membership.block)
        self.add_member(key, chain, membership, arriving.standing, membership.parent, arriving.parent_key, block=block)
        return chain

    def add_member(
        self,
        key: int,
        chain: int,
        membership: Membership,
        standing: Standing,
        parent: str | None,
        parent_key: int | None,
        *,
        block: Block | None = None,
        carries: bool = False,
    ) -> None:
        """Write how a request belongs to its chain."""
        routing = Routing.AT_END if membership.injects else Routing.NONE
        self._ledger.run(
            "add_member", key, chain, parent, parent_key, standing.depth, *limit_values(standing.limits),
            membership.estimate, membership.output_cap, membership.guard,
            int(routing if block is None else routing.ended(routed=False)), 0, 0, carries, membership.mark,
            write_block(block),
        )  # fmt: skip
        self._ledger.run("join_chain", key, chain)
        came_in = block is None
        depth = 0 if membership.guard else standing.depth
        self._ledger.run("grow_chain", chain, not membership.guard, came_in, depth, came_in and membership.guard)

    def _begin(self, request_id: str, arriving: Arriving, now: Moment) -> int:
        root = arriving.root
        if root is None:
            limits = limit_values(arriving.standing.limits)
            return int(self._ledger.scalar("add_chain", request_id, now.wall, now.wall, *limits, 0, 0))
        limits = limit_values(root.limits)
        times = (root.enqueued_at, root.enqueued_at)
        chain = int(self._ledger.scalar("add_chain", root.request_id, *times, *limits, root.used, root.estimated))
        self._ledger.run(
            "add_member", root.key, chain, None, None, 0, *limits, 0, None, 0, int(Routing.NONE), root.used,
            root.estimated > 0, 0, None, None,
        )  # fmt: skip
        self._ledger.run("join_chain", root.key, chain)
        self._ledger.run("grow_chain", chain, 1, root.unfinished, 0, 0)
        return chain

    def trip(self, chain: int, block: Block) -> None:
        """Admit no more members; the first finding against it stays."""
        self._ledger.run("trip_chain", chain, write_block(block))

    def view(self, arriving: Arriving, chain: int) -> ChainView:
        """The chain's figures as a newcomer sees them."""
        return self.figures(chain).view(arriving.standing.limits, arriving.standing.depth)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def figures(self, chain: int) -> ChainRow:
        """A chain's row."""
        row = self._ledger.one("chain_figures", chain)
        if row is None:
            raise InternalError("a member without its chain", chain=chain)
        return ChainRow(*row)

    def link(self, key: int) -> Link:
        """A member's row."""
        row = self._ledger.one("member", key)
        if row is None:
            raise InternalError("a request in a chain without its row there", key=key)
        return Link(*row)

    # -- running ------------------------------------------------------------------------------------------------------

    def start(self, key: int, now: Moment) -> Block | MemberGrant:
        """Let a member run with its reservation; or return the reason against it."""
        link = self.link(key)
        chain = self.figures(link.chain)
        standing = chain.standing(link.limits, link.depth)
        grant = may_run(standing, now.wall, estimate=link.estimate, output_cap=link.output_cap, guard=bool(link.guard))
        if isinstance(grant, Block):
            return grant
        return self.started(key, link.chain, chain.name, link.depth, link.parent, grant, injects=bool(link.routing))

    def started(
        self, key: int, chain: int, name: str, depth: int, parent: str | None, grant: Grant | None, *, injects: bool
    ) -> MemberGrant:
        """Make the reservation of a run."""
        if grant is not None:
            self._ledger.run("reserve", key, grant.reserved)
            self._ledger.run("reserve_in_chain", chain, grant.reserved)
        cap = None if grant is None else grant.output_cap
        return MemberGrant(chain=name, depth=depth, parent=parent, output_cap=cap, injects=injects)

    def begun(self, key: int, request_id: str, chain: int, arriving: Arriving, grant: Grant | None) -> MemberGrant:
        """`started` for a newcomer that runs at once."""
        membership, root = arriving.membership, arriving.root
        if arriving.chain is not None:
            name = self.figures(chain).name
        else:
            name = request_id if root is None else root.request_id
        depth = arriving.standing.depth
        return self.started(key, chain, name, depth, membership.parent, grant, injects=membership.injects)

    def attempt_ended(self, key: int, attempt: Attempt) -> None:
        """Return the reservation of a member's attempt, and charge its usage."""
        link = self.link(key)
        tokens, estimated = charge(attempt, link.estimate)
        self._ledger.run("charge", key, tokens, estimated)
        self._ledger.run("charge_chain", link.chain, link.reserved, tokens, tokens if estimated else 0)

    # -- reminders ----------------------------------------------------------------------------------------------------

    def take_reminders(self, key: int, request_id: str, conversation: int) -> tuple[Reminder, ...]:
        """Give a run the deliveries that wait for its conversation's next prompt."""
        taken = sorted(self._ledger.all("take_reminders", conversation, key, request_id))
        self._ledger.run("no_reminders_wait", conversation)
        self._ledger.run("note_reminded", key, len(taken))
        return tuple(
            Reminder(injection_id=name, text=whole_text(text, place, passage))
            for _, name, text, place, passage in taken
        )

    def put_reminders_back(self, key: int, conversation: int, count: int) -> None:
        """A run brought no answer: its taken deliveries wait again."""
        self._ledger.run("put_reminders_back", key, conversation)
        self._ledger.run("more_reminders_wait", conversation, count)
        self._ledger.run("note_reminded", key, 0)

    def use_reminders(self, key: int, now: Moment) -> tuple[InjectionView, ...]:
        """A run completed: its taken deliveries are delivered, and stay with its turn."""
        used = sorted(self._ledger.all("use_reminders", key, now.wall))
        reminders = write_reminders([whole_text(text, place, data) for _, text, place, data, _ in used])
        kept = next(((row[4], row[3]) for row in used if row[4] is not None), None)
        if reminders is None or kept is None or self._ledger.scalar("passage_of_body", key) not in (None, kept[0]):
            self._ledger.run("keep_reminders", key, reminders, None, None)
        else:
            self._ledger.run("keep_reminders", key, *_cut_out(reminders, *kept))
        self._ledger.run("note_reminded", key, 0)
        return tuple(self.delivery(row[0]) for row in used)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def leave(
        self,
        key: int,
        request_id: str,
        verdict: Finish,
        now: Moment,
        *,
        block: Block | None = None,
        routed: bool = False,
    ) -> tuple[InjectionView, ...]:
        """A member ends now; returns the state of the delivery that it carried. `block` is the reason of its chain
        against it; `routed`: its aftermath came with its end."""
        link = self.link(key)
        self._ledger.run("leave_member", key, int(link.routes.ended(routed)), write_block(block))
        self._ledger.run("leave_chain", link.chain)
        if not link.carries:
            return ()
        if verdict.state is State.COMPLETED:
            self._ledger.run("delivered", request_id, now.wall)
        else:
            self.bury(request_id, unanswered(request_id, verdict.state, verdict.error, verdict.message, block), now)
        return (self.delivery(self._ledger.scalar("injection_named", request_id)),)

    def bury(self, injection_id: str, dead: DeadLetter, now: Moment) -> None:
        """Make a delivery a dead letter."""
        self._ledger.run("bury", injection_id, INJECTION_CODES[dead.state], now.wall, write_block(dead.reason))

    def delivery(self, identity: int) -> InjectionView:
        """The present state of a delivery, to be published."""
        row = self._ledger.one("injection_row", identity)
        if row is None:
            raise InternalError("a delivery without its row", injection=identity)
        return read_injection(row)

    def forget(self, key: int, chain: int) -> None:
        """A member is no longer kept; with the last one its chain goes."""
        self._ledger.run("shrink_chain", chain, key)
        self._ledger.run("drop_member", key)
        self._ledger.run("drop_empty_chain", chain)

    # -- an operator's hands ------------------------------------------------------------------------------------------

    def close(self, name: str, limit: int) -> ClosedChain:
        """See `Store.close_chain`."""
        chain = self.figures(self._called(name)[0])
        self._ledger.run("close_chain", chain.id)
        unfinished = self._ledger.all("unfinished", chain.id, limit)
        return ClosedChain(chain=chain.name, unfinished=tuple(request_id for (request_id,) in unfinished))

    def reset(self, name: str, now: Moment) -> ChainView:
        """See `Store.reset_chain`."""
        chain, member = self._called(name)
        self._ledger.run("reset_chain", chain, now.wall, self._ledger.coming_key - 1)
        if member is None:
            return self.figures(chain).view()
        link = self.link(member)
        return self.figures(chain).view(link.limits, link.depth)

    def _called(self, name: str) -> tuple[int, int | None]:
        """A chain by its id, or by any member's, with that member.

        Raises:
            NotFound: no such chain.
        """
        whole = self._ledger.one("chain_named", name)
        if whole is not None:
            return whole[0], None
        row = self._ledger.one("chain_of", name)
        if row is None:
            raise refusals.unknown_chain(name)
        return row[0], row[1]


def _cut_out(reminders: str, passage: int, data: bytes) -> tuple[str, int | None, int | None]:
    """The text that `keep_reminders` writes of a column that may have a passage."""
    short, place = cut(reminders, data.decode())
    return short, None if place is None else passage, place
