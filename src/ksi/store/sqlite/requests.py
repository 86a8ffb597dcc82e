"""Enqueue and claim in SQL: each decides, then writes, in a transaction that its caller holds."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import apsw
import msgspec

from ksi.budgets.rules import Caps, Facts, Notice, Over
from ksi.clock import Moment
from ksi.errors import InternalError
from ksi.request import OnBusy, Priority, State
from ksi.store.chains import Block, Grant, InjectionView, MemberGrant, Reminder
from ksi.store.rules import refusals
from ksi.store.rules.budgets import block_of, ends
from ksi.store.rules.fairness import Shares, flow_of
from ksi.store.sqlite.budgets import Budgets, Room
from ksi.store.sqlite.chains import Arriving, Chains
from ksi.store.sqlite.ends import CANCELLED, blocked
from ksi.store.sqlite.in_play import FreeConversation, KnownRun
from ksi.store.sqlite.ledger import Holder, Ledger
from ksi.store.sqlite.reads import Reads
from ksi.store.sqlite.rows import BESIDE, HOLDS, IN_LINE, SET_ASIDE, STATE_CODES, Row
from ksi.store.values import (
    CLAIM_ASIDE,
    CLAIM_BYTES,
    Claimed,
    Claims,
    Ended,
    Enqueued,
    NewRequest,
    Offer,
    Passing,
    Paused,
)

RUNNING = STATE_CODES[State.RUNNING]

_WAITING = ("scheduled", "queued", "retrying", "parked")


class _Arrival(msgspec.Struct, frozen=True):
    """The state that a new request meets: its conversation before it."""

    name: str
    """The conversation's own name, if the request used a provider session's."""
    conversation: int | None
    turn: int | None
    holder: Holder | None
    head: Row | None
    delayed: bool
    reminders: int = 0
    """How many deliveries wait for the conversation's next prompt."""

    @property
    def free(self) -> bool:
        """The conversation is free, with an empty wait queue."""
        return self.holder is None and self.head is None


def _is_delayed(new: NewRequest, now: Moment) -> bool:
    """True if a request waits outside the queue, for its time or for a person."""
    return new.question is not None or (new.due is not None and new.due > now.wall)


class _Heads:
    """The next request on a route for one claim. Paused requests are set aside on the way."""

    def __init__(self, ledger: Ledger, paused: Paused, caps: Caps, now: Moment) -> None:
        self.caps = caps
        self.notices: list[Notice] = []
        """The notices of budgets."""
        self.passed = 0
        """How many wait for their budgets since this claim."""
        self._ledger = ledger
        self._paused = paused
        self._now = now
        self._left = CLAIM_ASIDE

    @property
    def more(self) -> bool:
        """True if it set aside as many as one claim does."""
        return self._left <= 0

    def wait(self, notices: Sequence[Notice]) -> None:
        """One of them waits for its budget."""
        self.notices += notices
        self.passed += 1
        self._left -= 1

    def of(self, route: str, limit: int) -> list[Row]:
        """Priority, tag, rank and key of the first `limit` requests of each priority that may run."""
        if not self._paused:
            return self._ledger.all("ready_heads", route, self._now.wall, limit)
        window = limit
        while True:
            rows = self._ledger.all("ready_heads_named", route, self._now.wall, window)
            stopped = [row[3] for row in rows if self._paused.stops(row[4], row[5], row[0])]
            if not stopped or self.more:
                return [row[:4] for row in rows if row[3] not in stopped]
            self._set_aside(stopped[: self._left])
            # Many paused requests are passed in few looks.
            window = max(limit, min(2 * window, CLAIM_ASIDE))

    def _set_aside(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._ledger.run("set_ready", key, SET_ASIDE)
        self._left -= len(keys)


class Requests:
    """How requests come in and begin to run."""

    def __init__(self, ledger: Ledger, reads: Reads, chains: Chains, budgets: Budgets) -> None:
        self._ledger = ledger
        self._reads = reads
        self._chains = chains
        self._budgets = budgets
        self._shares = Shares()

    # -- enqueue --------------------------------------------------------------------------------------------------

    def enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment, paused: Paused, caps: Caps) -> Enqueued:
        """See `Store.enqueue`."""
        free = self._ledger.in_play.free(new.conversation)
        if free is not None and new.chain is None and new.fork_of is None:
            enqueued = self._run_at_once(new, free, offers, now, paused, caps)
            if enqueued is not None:
                return enqueued
        known = self._ledger.one("known", new.request_id)
        if known is not None:
            return self._attach(new, known)
        arriving = None if new.chain is None else self._chains.arriving(new, now)
        parent = None
        if new.fork_of is not None:
            parent = self._ledger.one("conversation", new.fork_of)
            if parent is None:
                raise refusals.unknown_fork(new.fork_of)
        arrival = self._arrive(new, now)
        if arriving is not None and (block := self._chains.against(arriving, now)) is not None:
            return self._keep_blocked(new, arrival, parent, arriving, block, now)
        if not arrival.delayed:
            self._refuse_if_busy(new, arrival)
        turn = arrival.turn if parent is None else parent[1]
        if caps:
            self._budgets.check(new, arrival.name, turn, caps)
        provider = self._free_provider(new, offers, now) if self._may_run(new, arrival, now, paused) else None
        room: Room | None = None
        if provider is not None and caps:
            room = self._budgets.room(new, provider, arrival.name, turn, caps)
            provider = None if room is None else provider
        self._refuse_if_full(provider)
        grant: Grant | None = None
        if provider is not None and arriving is not None:
            would = self._chains.would_run(arriving, now)
            if isinstance(would, Block):
                return self._keep_blocked(new, arrival, parent, arriving, would, now)
            grant = would
        self._ledger.know_route(new.route)
        arrival = self._enter_conversation(new, arrival, parent, now, running=provider is not None)
        if provider is not None:
            return self._insert_running(new, arrival, provider, arriving, grant, room, now)
        return self._insert_waiting(new, arrival, arriving, now)

    def _run_at_once(
        self,
        new: NewRequest,
        free: FreeConversation,
        offers: Sequence[Offer],
        now: Moment,
        paused: Paused,
        caps: Caps,
    ) -> Enqueued | None:
        """Run a request in a conversation that is known to be free; None if a closer look is needed."""
        arrival = _Arrival(free.name, free.id, free.head, None, None, _is_delayed(new, now))
        provider = self._free_provider(new, offers, now) if self._may_run(new, arrival, now, paused) else None
        if provider is None:
            return None
        room: Room | None = None
        if caps:
            room = self._budgets.room(new, provider, free.name, free.head, caps)
            if room is None:
                return None
        try:
            enqueued = self._insert_running(new, arrival, provider, None, None, room, now)
        except apsw.ConstraintError:
            # Its id is known: the row was not written, and nothing before it.
            known = self._ledger.one("known", new.request_id)
            if known is None:
                raise
            return self._attach(new, known)
        self._ledger.know_route(new.route)
        if new.agent_id is not None:
            self._ledger.know_agent(new.agent_id, free.id)
        return enqueued

    def _keep_blocked(
        self,
        new: NewRequest,
        arrival: _Arrival,
        parent: Row | None,
        arriving: Arriving,
        block: Block,
        now: Moment,
    ) -> Enqueued:
        """Keep a request that its chain has no place for."""
        self._ledger.know_route(new.route)
        arrival = self._enter_conversation(new, arrival, parent, now, running=False)
        key = self._ledger.next_key()
        self._ledger.run(
            "add_request", key, new.request_id, arrival.conversation, STATE_CODES[State.BLOCKED], None, 0,
            int(new.priority), new.rank, new.hold_on_retry, new.route, None, 0, None, None, now.wall, None, new.expires,
            None, None, None,
        )  # fmt: skip
        self._ledger.run("add_body", key, new.model, new.agent_id, new.requeued_from, new.body)
        end = blocked(block)
        self._ledger.run("finish", key, STATE_CODES[end.state], now.wall, end.error, end.message, None, None)
        self._ledger.count(State.BLOCKED.value, 1)
        chain = self._chains.join(key, new.request_id, arriving, block, now)
        return Enqueued(
            request_id=new.request_id,
            conversation=arrival.name,
            state=State.BLOCKED,
            block=block,
            chain=self._chains.view(arriving, chain),
        )

    def _attach(self, new: NewRequest, known: Row) -> Enqueued:
        external, body = known
        if external or body != new.body:
            conflict = refusals.names_a_lock if external else refusals.names_another_request
            raise conflict(new.request_id)
        view = self._reads.get(new.request_id)
        if view is None:
            raise InternalError("a request without its view", request_id=new.request_id)
        return Enqueued(
            request_id=new.request_id,
            conversation=view.conversation,
            state=view.state,
            position=view.position or 0,
            holder=view.holder,
            existing=view,
        )

    def _arrive(self, new: NewRequest, now: Moment) -> _Arrival:
        delayed = _is_delayed(new, now)
        row = self._ledger.one("arrival", new.conversation)
        if row is None:
            return _Arrival(new.conversation, None, None, None, None, delayed)
        conversation, turn, held, waited_for, name, reminders = row
        holder = self._ledger.holder(conversation) if held is not None else None
        head = self._ledger.all("line_heads", conversation)[0] if waited_for is not None else None
        return _Arrival(name, conversation, turn, holder, head, delayed, reminders)

    def _refuse_if_busy(self, new: NewRequest, arrival: _Arrival) -> None:
        """Raise ConversationBusy if `on_busy` says so."""
        holder = arrival.holder
        if new.on_busy is OnBusy.ENQUEUE or arrival.free or arrival.conversation is None:
            return
        if new.on_busy is OnBusy.INTERRUPT and (
            holder is None or (not holder.external and holder.priority >= new.priority)
        ):
            return
        raise refusals.conversation_busy(
            arrival.name,
            holder.request_id if holder is not None else None,
            holder.since if holder is not None else None,
            self._ledger.position(arrival.conversation, new.rank, self._ledger.coming_key),
        )

    def _may_run(self, new: NewRequest, arrival: _Arrival, now: Moment, paused: Paused) -> bool:
        if not arrival.free or arrival.delayed or (new.expires is not None and new.expires <= now.wall):
            return False
        return not paused.stops(new.agent_id, arrival.name, new.priority)

    def _free_provider(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> str | None:
        """The provider that can run it at once: a free slot, and no earlier ready request on a route to the same
        provider."""
        for offer in offers:
            if offer.route != new.route or self._ledger.running_at(offer.provider) >= offer.limit:
                continue
            if self._ledger.totals.get("queued") and self._outranked(new, offer, offers, now):
                continue
            return offer.provider
        return None

    def _outranked(self, new: NewRequest, offer: Offer, offers: Sequence[Offer], now: Moment) -> bool:
        routes = (other.route for other in offers if other.provider == offer.provider)
        heads = (head for route in routes for head in self._ledger.all("ready_heads", route, now.wall, 1))
        return any(rank <= new.rank for _, _, rank, _ in heads)

    def _refuse_if_full(self, provider: str | None) -> None:
        """Raise QueueFull for a request that would wait."""
        limit = self._ledger.rules.max_queued
        if provider is None and sum(self._ledger.totals.get(name, 0) for name in _WAITING) >= limit:
            raise refusals.queue_full(limit)

    def _enter_conversation(
        self, new: NewRequest, arrival: _Arrival, parent: Row | None, now: Moment, *, running: bool
    ) -> _Arrival:
        """The arrival with its conversation, created if it is new."""
        identity = arrival.conversation
        if identity is None:
            forked_from, turn, parent_name = parent if parent is not None else (None, None, "")
            identity = self._ledger.add_conversation(new.conversation, now, turn, forked_from)
            if forked_from is not None:
                names = (parent_name, new.conversation)
                self._ledger.run("add_fork", forked_from, identity, *names, new.request_id, now.wall, "requested")
            arrival = msgspec.structs.replace(arrival, conversation=identity, turn=turn)
        elif not running:
            # One that runs is settled in a moment, and touches it then.
            self._ledger.run("touch_conversation", identity, now.wall)
        if new.agent_id is not None:
            self._ledger.know_agent(new.agent_id, identity)
        return arrival

    def _insert_running(
        self,
        new: NewRequest,
        arrival: _Arrival,
        provider: str,
        arriving: Arriving | None,
        grant: Grant | None,
        room: Room | None,
        now: Moment,
    ) -> Enqueued:
        key, fence, token = self._ledger.coming_key, self._ledger.coming_fence, self._ledger.token()
        self._ledger.run(
            "add_request", key, new.request_id, arrival.conversation, RUNNING, HOLDS, 0,
            int(new.priority), new.rank, new.hold_on_retry, new.route, provider, 1, fence, token, now.wall, None, None,
            None, None, now.wall,
        )  # fmt: skip
        self._ledger.next_key()
        self._ledger.next_fence()
        self._ledger.run("add_body", key, new.model, new.agent_id, new.requeued_from, new.body)
        if arriving is None and not arrival.reminders and arrival.conversation is not None:
            self._ledger.in_play.runs(
                key,
                KnownRun(
                    new.request_id, RUNNING, fence, token, arrival.conversation, new.hold_on_retry, new.route, 0, None,
                    arrival.turn,
                ),
            )  # fmt: skip
        self._ledger.count("running", 1)
        self._ledger.count("locks", 1)
        self._ledger.load(provider, 1)
        if room is not None:
            self._budgets.begin(key, new.demand, room)
        member: MemberGrant | None = None
        if arriving is not None:
            chain = self._chains.join(key, new.request_id, arriving, None, now)
            member = self._chains.begun(key, new.request_id, chain, arriving, grant)
        reminders: tuple[Reminder, ...] = ()
        if arrival.reminders and arrival.conversation is not None:
            reminders = self._chains.take_reminders(key, new.request_id, arrival.conversation)
        claim = Claimed(
            key=key,
            request_id=new.request_id,
            conversation=arrival.name,
            body=new.body,
            route=new.route,
            provider=provider,
            priority=new.priority,
            attempt=1,
            fence=fence,
            token=token,
            started_at=now.wall,
            enqueued_at=now.wall,
            head=arrival.turn,
            agent_id=new.agent_id,
            requeued_from=new.requeued_from,
            chain=member,
            output_cap=None if room is None else room.output_cap,
            reminders=reminders,
        )
        return Enqueued(
            request_id=new.request_id,
            conversation=arrival.name,
            state=State.RUNNING,
            ready=True,
            claim=claim,
        )

    def _insert_waiting(self, new: NewRequest, arrival: _Arrival, arriving: Arriving | None, now: Moment) -> Enqueued:
        conversation = arrival.conversation
        assert conversation is not None
        interrupts = new.on_busy is OnBusy.INTERRUPT and not arrival.delayed
        rank = new.rank
        if interrupts and arrival.head is not None:
            rank = min(rank, arrival.head[4] - 1)
        state, place = (State.SCHEDULED, BESIDE) if arrival.delayed else (State.QUEUED, IN_LINE)
        key = self._ledger.next_key()
        self._ledger.run(
            "add_request", key, new.request_id, conversation, STATE_CODES[state], place, 0, int(new.priority), rank,
            new.hold_on_retry, new.route, None, 0, None, None, now.wall,
            new.due if arrival.delayed and new.question is None else None, new.expires, None, None, None,
        )  # fmt: skip
        self._ledger.run("add_body", key, new.model, new.agent_id, new.requeued_from, new.body)
        self._ledger.count(state.value, 1)
        self._budgets.remember(key, new.demand)
        if self._ledger.rules.fair:
            flow = flow_of(new.agent_id, new.flow, arrival.name)
            self._ledger.take_turn(key, int(new.priority), flow, waits=state is State.QUEUED)
        if new.question is not None:
            self._ledger.ask(key, new.question)
        if arriving is not None:
            self._chains.join(key, new.request_id, arriving, None, now)
        holder = arrival.holder
        stopping: str | None = None
        passing: Passing | None = None
        injections: tuple[InjectionView, ...] = ()
        if interrupts and holder is not None:
            stopping, passing, injections = self._interrupt(holder, new, conversation, now)
        elif not arrival.delayed:
            self._ledger.refresh_line(conversation, now)
        return Enqueued(
            request_id=new.request_id,
            conversation=arrival.name,
            state=state,
            ready=arrival.free and not arrival.delayed,
            position=0 if arrival.delayed else self._ledger.position(conversation, rank, key),
            holder=holder.request_id if holder is not None and passing is None else None,
            stopping=stopping,
            passing=passing,
            injections=injections,
        )

    def _interrupt(
        self, holder: Holder, new: NewRequest, conversation: int, now: Moment
    ) -> tuple[str | None, Passing | None, tuple[InjectionView, ...]]:
        """Stop a holder for the new request: a running one is marked, another ends here."""
        self._ledger.run("mark_interrupted", holder.key, new.request_id)
        if holder.state is State.RUNNING:
            self._ledger.run("mark_cancelling", holder.key)
            return holder.request_id, None, ()
        passing = self._ledger.end_waiting(
            holder.key, holder.request_id, conversation, holder.state, HOLDS, CANCELLED, now
        )
        if holder.chain is None:
            return None, passing, ()
        return None, passing, self._chains.leave(holder.key, holder.request_id, CANCELLED, now)

    # -- claim ----------------------------------------------------------------------------------------------------

    def claim(self, offers: Sequence[Offer], limit: int, now: Moment, paused: Paused, caps: Caps) -> Claims:
        """See `Store.claim`."""
        by_route: dict[str, list[Offer]] = {}
        for offer in offers:
            by_route.setdefault(offer.route, []).append(offer)
        started: list[Claimed] = []
        blocked: list[Ended] = []
        heads = _Heads(self._ledger, paused, caps, now)
        more = True
        while more:
            # A request that ends as blocked frees its queue: look again for the next.
            more = self._claim_until_blocked(by_route, limit - len(blocked), started, blocked, heads, now)
        return Claims(
            tuple(started),
            tuple(blocked),
            notices=tuple(heads.notices),
            waiting=heads.passed > 0,
            more=heads.more,
        )

    def _claim_until_blocked(
        self,
        by_route: Mapping[str, Sequence[Offer]],
        limit: int,
        started: list[Claimed],
        blocked: list[Ended],
        heads_of: _Heads,
        now: Moment,
    ) -> bool:
        """Start the next request that may run; returns True if there was one."""
        lanes: dict[int, list[tuple[int, int, int, str]]] = {}
        for route, its_offers in by_route.items():
            free = sum(max(0, offer.limit - self._ledger.running_at(offer.provider)) for offer in its_offers)
            if free:
                rows = heads_of.of(route, min(limit - len(started), free + heads_of.passed))
                for priority, tag, rank, key in rows:
                    lanes.setdefault(priority, []).append((tag, rank, key, route))
        for lane in lanes.values():
            heapq.heapify(lane)
        size, passed = sum(len(claim.body) for claim in started), heads_of.passed
        while lanes and len(started) < limit and size < CLAIM_BYTES:
            found = self._next(lanes, by_route)
            if found is None:
                break
            key, provider = found
            outcome = self._start(key, provider, heads_of, now)
            if isinstance(outcome, Ended):
                blocked.append(outcome)
                return True
            if outcome is not None:
                started.append(outcome)
                size += len(outcome.body)
        # Behind those that wait for their budgets others may stand that have room in theirs.
        return heads_of.passed > passed and not heads_of.more

    def _next(
        self, lanes: dict[int, list[tuple[int, int, int, str]]], by_route: Mapping[str, Sequence[Offer]]
    ) -> tuple[int, str] | None:
        """The request whose turn it is, and a provider that has a slot for it."""
        providers: dict[int, str] = {}
        for priority, lane in list(lanes.items()):
            while lane and (provider := self._first_free(by_route[lane[0][3]])) is None:
                heapq.heappop(lane)
            if lane:
                providers[priority] = provider or ""
            else:
                del lanes[priority]
        if not lanes:
            return None
        heads = {priority: (lane[0][1], lane[0][2]) for priority, lane in lanes.items()}
        chosen = self._shares.choose(heads, fair=self._ledger.rules.fair)
        _, _, key, _ = heapq.heappop(lanes[chosen])
        if not lanes[chosen]:
            del lanes[chosen]
        return key, providers[chosen]

    def _first_free(self, offers: Sequence[Offer]) -> str | None:
        return next((o.provider for o in offers if self._ledger.running_at(o.provider) < o.limit), None)

    def _start(self, key: int, provider: str, heads: _Heads, now: Moment) -> Claimed | Ended | None:
        """Run a ready request, or end it if its chain or its budgets do not admit it. None: it waits for one of its
        budgets."""
        row = self._ledger.one("claimable", key)
        if row is None:
            raise InternalError("a ready request without its body or conversation", key=key)
        (
            request_id, place, priority, route, attempt, enqueued_at, body, agent, requeued_from, name, head,
            conversation, waiting, chain, hold, earlier, model, tag,
        ) = row  # fmt: skip
        room: Room | None = None
        if heads.caps:
            found = self._budgets.look(key, Facts(agent, name), provider, model or "", head, len(body), heads.caps)
            if isinstance(found, Over):
                if ends(found):
                    heads.notices += self._budgets.exceeded(found)
                    return self._end_blocked(key, request_id, conversation, name, place, block_of(found), chain, now)
                heads.wait(self._budgets.wait(key, found))
                return None
            room = found
        member = None if chain is None else self._chains.start(key, now)
        if isinstance(member, Block):
            return self._end_blocked(key, request_id, conversation, name, place, member, chain, now)
        if room is not None:
            self._budgets.start(key, room)
        reminders = self._chains.take_reminders(key, request_id, conversation) if waiting else ()
        fence, token = self._ledger.next_fence(), self._ledger.token()
        self._ledger.run("start", key, provider, fence, token, now.wall)
        self._ledger.turns.started(priority, tag)
        if chain is None and not waiting:
            run = KnownRun(request_id, RUNNING, fence, token, conversation, hold, route, 0, earlier, head)
            self._ledger.in_play.runs(key, run)
        self._ledger.move(State.QUEUED, State.RUNNING)
        if place != HOLDS:
            self._ledger.count("locks", 1)
        self._ledger.load(provider, 1)
        return Claimed(
            key=key,
            request_id=request_id,
            conversation=name,
            body=body,
            route=route,
            provider=provider,
            priority=Priority(priority),
            attempt=attempt + 1,
            fence=fence,
            token=token,
            started_at=now.wall,
            enqueued_at=enqueued_at,
            head=head,
            agent_id=agent,
            requeued_from=requeued_from,
            chain=member,
            output_cap=None if room is None else room.output_cap,
            reminders=reminders,
        )

    def _end_blocked(
        self,
        key: int,
        request_id: str,
        conversation: int,
        name: str,
        place: int,
        block: Block,
        chain: int | None,
        now: Moment,
    ) -> Ended:
        end = blocked(block)
        passing = self._ledger.end_waiting(key, request_id, conversation, State.QUEUED, place, end, now)
        return Ended(
            request_id=request_id,
            conversation=name,
            state=end.state,
            error=end.error,
            passing=passing,
            block=block,
            injections=() if chain is None else self._chains.leave(key, request_id, end, now, block=block),
        )
