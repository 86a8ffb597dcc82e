"""Enqueue and claim in SQL: each decides, then writes, in a transaction that its caller holds."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import msgspec

from ksi.clock import Moment
from ksi.errors import ConversationBusy, InternalError, NotFound, QueueFull, RequestIdConflict
from ksi.request import OnBusy, Priority, State
from ksi.store.chains import Block, Grant, InjectionView, MemberGrant, Reminder
from ksi.store.sqlite_chains import Arriving, Chains
from ksi.store.sqlite_ends import CANCELLED, blocked
from ksi.store.sqlite_ledger import Holder, Ledger
from ksi.store.sqlite_reads import Reads
from ksi.store.sqlite_rows import BESIDE, HOLDS, IN_LINE, STATE_CODES, Row
from ksi.store.values import (
    Claimed,
    Claims,
    Ended,
    Enqueued,
    NewRequest,
    Offer,
    Passing,
)

_WAITING = ("scheduled", "queued", "retrying", "parked")


class _Arrival(msgspec.Struct, frozen=True):
    """What a new request finds: its conversation as it is before it."""

    name: str
    """The conversation's own, where the request named it by a provider session."""
    conversation: int | None
    turn: int | None
    holder: Holder | None
    head: Row | None
    delayed: bool
    reminders: int = 0
    """How many deliveries wait for the conversation's next prompt."""

    @property
    def free(self) -> bool:
        """Nobody holds the conversation, nobody waits for it."""
        return self.holder is None and self.head is None


class Requests:
    """How requests come in and begin to run."""

    def __init__(self, ledger: Ledger, reads: Reads, chains: Chains) -> None:
        self._ledger = ledger
        self._reads = reads
        self._chains = chains

    # -- enqueue --------------------------------------------------------------------------------------------------

    def enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Enqueued:
        """See `Store.enqueue`."""
        known = self._ledger.one("known", new.request_id)
        if known is not None:
            return self._attach(new, known)
        arriving = None if new.chain is None else self._chains.arriving(new, now)
        parent = None
        if new.fork_of is not None:
            parent = self._ledger.one("conversation", new.fork_of)
            if parent is None:
                raise NotFound(f"no conversation {new.fork_of!r} to fork from", conversation_id=new.fork_of)
        arrival = self._arrive(new, now)
        if arriving is not None and (block := self._chains.against(arriving, now)) is not None:
            return self._keep_blocked(new, arrival, parent, arriving, block, now)
        if not arrival.delayed:
            self._refuse_if_busy(new, arrival)
        provider = self._free_provider(new, offers, now) if self._may_run(new, arrival, now) else None
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
            return self._insert_running(new, arrival, provider, arriving, grant, now)
        return self._insert_waiting(new, arrival, arriving, now)

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
            what = "an external lock" if external else "another request"
            raise RequestIdConflict(
                f"request_id {new.request_id!r} already names {what}; use a new id", request_id=new.request_id
            )
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
        delayed = new.due is not None and new.due > now.wall
        row = self._ledger.one("arrival", new.conversation)
        if row is None:
            return _Arrival(new.conversation, None, None, None, None, delayed)
        conversation, turn, held, waited_for, name, reminders = row
        holder = self._ledger.holder(conversation) if held is not None else None
        head = self._ledger.all("line_heads", conversation)[0] if waited_for is not None else None
        return _Arrival(name, conversation, turn, holder, head, delayed, reminders)

    def _refuse_if_busy(self, new: NewRequest, arrival: _Arrival) -> None:
        """Raise ConversationBusy where `on_busy` says so (L3)."""
        holder = arrival.holder
        if new.on_busy is OnBusy.ENQUEUE or arrival.free or arrival.conversation is None:
            return
        if new.on_busy is OnBusy.INTERRUPT and (
            holder is None or (not holder.external and holder.priority >= new.priority)
        ):
            return
        raise ConversationBusy(
            f"conversation {arrival.name!r} is taken; wait for it with on_busy 'enqueue', or try again later",
            conversation_id=arrival.name,
            holder=holder.request_id if holder is not None else None,
            since=holder.since if holder is not None else None,
            position=self._ledger.position(arrival.conversation, new.rank, self._ledger.coming_key),
        )

    def _may_run(self, new: NewRequest, arrival: _Arrival, now: Moment) -> bool:
        return arrival.free and not arrival.delayed and (new.expires is None or new.expires > now.wall)

    def _free_provider(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> str | None:
        """Who can run it at once: a free slot, and nobody ready before it on a route to the same provider."""
        for offer in offers:
            if offer.route != new.route or self._ledger.running_at(offer.provider) >= offer.limit:
                continue
            if self._ledger.totals.get("queued") and self._outranked(new, offer, offers, now):
                continue
            return offer.provider
        return None

    def _outranked(self, new: NewRequest, offer: Offer, offers: Sequence[Offer], now: Moment) -> bool:
        routes = (other.route for other in offers if other.provider == offer.provider)
        heads = (self._ledger.one("ready_heads", route, now.wall, 1) for route in routes)
        return any(head is not None and head[0] <= new.rank for head in heads)

    def _refuse_if_full(self, provider: str | None) -> None:
        """Raise QueueFull for a request that would wait (Q5)."""
        limit = self._ledger.rules.max_queued
        if provider is None and sum(self._ledger.totals.get(name, 0) for name in _WAITING) >= limit:
            raise QueueFull(f"the queue holds its {limit} requests; try again later", limit=limit)

    def _enter_conversation(
        self, new: NewRequest, arrival: _Arrival, parent: Row | None, now: Moment, *, running: bool
    ) -> _Arrival:
        """The arrival with its conversation, made where it is new."""
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
        now: Moment,
    ) -> Enqueued:
        key, fence, token = self._ledger.next_key(), self._ledger.next_fence(), self._ledger.token()
        self._ledger.run(
            "add_request", key, new.request_id, arrival.conversation, STATE_CODES[State.RUNNING], HOLDS, 0,
            int(new.priority), new.rank, new.hold_on_retry, new.route, provider, 1, fence, token, now.wall, None, None,
            None, None, now.wall,
        )  # fmt: skip
        self._ledger.run("add_body", key, new.model, new.agent_id, new.requeued_from, new.body)
        self._ledger.count("running", 1)
        self._ledger.count("locks", 1)
        self._ledger.load(provider, 1)
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
            new.hold_on_retry, new.route, None, 0, None, None, now.wall, new.due if arrival.delayed else None,
            new.expires, None, None, None,
        )  # fmt: skip
        self._ledger.run("add_body", key, new.model, new.agent_id, new.requeued_from, new.body)
        self._ledger.count(state.value, 1)
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

    def claim(self, offers: Sequence[Offer], limit: int, now: Moment) -> Claims:
        """See `Store.claim`."""
        by_route: dict[str, list[Offer]] = {}
        for offer in offers:
            by_route.setdefault(offer.route, []).append(offer)
        started: list[Claimed] = []
        blocked: list[Ended] = []
        more = True
        while more:
            # Who ends as blocked frees its line: look again who comes first.
            more = self._claim_until_blocked(by_route, limit - len(blocked), started, blocked, now)
        return Claims(tuple(started), tuple(blocked))

    def _claim_until_blocked(
        self,
        by_route: Mapping[str, Sequence[Offer]],
        limit: int,
        started: list[Claimed],
        blocked: list[Ended],
        now: Moment,
    ) -> bool:
        """Start what may run, up to the first that may not; whether there was one."""
        heads: list[tuple[int, int, str]] = []
        for route, its_offers in by_route.items():
            free = sum(max(0, offer.limit - self._ledger.running_at(offer.provider)) for offer in its_offers)
            if free:
                rows = self._ledger.all("ready_heads", route, now.wall, min(limit - len(started), free))
                heads.extend((rank, key, route) for rank, key in rows)
        heapq.heapify(heads)
        while heads and len(started) < limit:
            _, key, route = heapq.heappop(heads)
            provider = self._first_free(by_route[route])
            if provider is None:
                continue
            outcome = self._start(key, provider, now)
            if isinstance(outcome, Ended):
                blocked.append(outcome)
                return True
            started.append(outcome)
        return False

    def _first_free(self, offers: Sequence[Offer]) -> str | None:
        return next((o.provider for o in offers if self._ledger.running_at(o.provider) < o.limit), None)

    def _start(self, key: int, provider: str, now: Moment) -> Claimed | Ended:
        """Run a ready request, or end it where its chain has no place for it."""
        row = self._ledger.one("claimable", key)
        if row is None:
            raise InternalError("a ready request without its body or conversation", key=key)
        (
            request_id, place, priority, route, attempt, enqueued_at, body, agent, requeued_from, name, head,
            conversation, waiting, chain,
        ) = row  # fmt: skip
        member = None if chain is None else self._chains.start(key, now)
        if isinstance(member, Block):
            return self._end_blocked(key, request_id, conversation, name, place, member, now)
        reminders = self._chains.take_reminders(key, request_id, conversation) if waiting else ()
        fence, token = self._ledger.next_fence(), self._ledger.token()
        self._ledger.run("start", key, provider, fence, token, now.wall)
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
            reminders=reminders,
        )

    def _end_blocked(
        self, key: int, request_id: str, conversation: int, name: str, place: int, block: Block, now: Moment
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
            injections=self._chains.leave(key, request_id, end, now, block=block),
        )
