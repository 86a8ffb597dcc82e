"""The reference store: every verb of the protocol over plain dicts and sorted lists, written to be read.

No verb awaits in its middle, so each is one atomic step on its event loop. Nothing is durable beyond the `MemoryData`
it works on; a new store over the same data stands for a daemon's restart.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import msgspec

from ksi.clock import Chance, Moment
from ksi.errors import ConversationBusy, FailureClass, NotFound, NotLockHolder, QueueFull, RequestIdConflict
from ksi.request import Attempt, OnBusy, Outcome, State, Turn
from ksi.store.chains import Aftermath
from ksi.store.memory_data import Conversation, ExternalLock, Member, MemoryData, Request, TurnRecord, name_of
from ksi.store.memory_lines import Lines, no_work
from ksi.store.memory_load import load
from ksi.store.memory_reads import MemoryReads
from ksi.store.memory_save import save
from ksi.store.memory_upkeep import Upkeep
from ksi.store.snapshot import Loaded, Record
from ksi.store.unfinished import Unfinished
from ksi.store.values import (
    Acquired,
    Cancelled,
    CancelOutcome,
    Claimed,
    Claims,
    Enqueued,
    Expiry,
    Finish,
    Fork,
    GiveBack,
    LockGrant,
    NewLock,
    NewRequest,
    Offer,
    Passing,
    Pruned,
    Recovery,
    Retry,
    Settled,
    StoreRules,
    Verdict,
)

_CANCELLED = FailureClass.CANCELLED.value
_PIECE = 100


class MemoryStore(MemoryReads, Unfinished):
    """A `ksi.store.base.Store` in memory; what each verb means is written there.

    `data` is what an earlier store left: a new store over it, opened, stands for a daemon's restart.
    """

    def __init__(self, rules: StoreRules, chance: Chance, data: MemoryData | None = None) -> None:
        self.data = MemoryData() if data is None else data
        super().__init__(rules, self.data)
        self._chance = chance
        self._lines = Lines(rules, self._data)
        self._upkeep = Upkeep(rules, self._data, self._lines)

    # -- life and time ------------------------------------------------------------------------------------------------

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """See the protocol."""
        self._lines.on_work = on_work
        return self._upkeep.recover(now)

    async def close(self) -> None:
        """See the protocol; the data stays with whoever holds it."""
        self._lines.on_work = no_work

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """See the protocol."""
        return self._upkeep.expire(now, limit)

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """See the protocol."""
        return self._upkeep.unpark(route, now, limit)

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See the protocol."""
        return self._upkeep.prune(now, limit)

    async def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """See the protocol."""
        records = save(self._data, now)
        for begin in range(0, len(records), _PIECE):
            yield records[begin : begin + _PIECE]

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """See the protocol."""
        loaded = load(self._data, self._rules, records, now)
        self._lines.on_work()
        return loaded

    # -- requests -----------------------------------------------------------------------------------------------------

    async def enqueue(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Enqueued:
        """See the protocol."""
        kept = self._kept(new)
        if kept is not None:
            return kept
        if new.fork_of is not None and self._data.find(new.fork_of) is None:
            raise NotFound(f"no conversation {new.fork_of!r} to fork; leave `fork` out to begin a new one")
        delayed = new.due is not None and new.due > now.wall
        conversation = self._data.find(new.conversation)
        holder = None if conversation is None else conversation.holder
        head = None if conversation is None else self._data.head_of_line(conversation)
        interrupted = None if delayed else self._interrupted(new, conversation, holder, head)
        ready = not delayed and holder is None and head is None
        offer = self._free_offer(new, offers, now) if ready else None
        if offer is None and self._data.waiting >= self._rules.max_queued:
            limit = self._rules.max_queued
            raise QueueFull(f"the queue holds {limit} requests; try again when some have run", limit=limit)

        # All is decided; from here on the store changes.
        conversation = self._conversation(new.conversation, now, new.fork_of, new.request_id)
        if new.agent_id is not None and new.agent_id not in conversation.agents:
            conversation.agents.append(new.agent_id)
        self._data.routes.add(new.route)
        request = self._new_request(new, conversation, State.SCHEDULED if delayed else State.QUEUED, now)
        if not delayed and new.on_busy is OnBusy.INTERRUPT and head is not None:
            request.rank = min(new.rank, head.rank - 1)
        self._data.add(request)
        if offer is not None:
            claim = self._run(request, offer.provider, now)
            return Enqueued(
                request_id=request.request_id,
                conversation=conversation.name,
                state=request.state,
                ready=True,
                claim=claim,
            )
        conversation.active_at = now.wall
        passing = None if interrupted is None else self._interrupt(interrupted, request, now)
        self._lines.refresh(conversation, now)
        return Enqueued(
            request_id=request.request_id,
            conversation=conversation.name,
            state=request.state,
            ready=ready,
            position=0 if delayed else self._position(conversation, request.rank, request.key),
            holder=name_of(conversation.holder),
            stopping=interrupted.request_id if interrupted is not None and passing is None else None,
            passing=passing,
        )

    async def claim(self, offers: Sequence[Offer], limit: int, now: Moment) -> Claims:
        """See the protocol."""
        claims: list[Claimed] = []
        while len(claims) < limit:
            best: tuple[Request, Offer] | None = None
            for offer in offers:
                head = self._first_ready(offer.route, now) if self._has_slot(offer) else None
                if head is not None and (best is None or (head.rank, head.key) < (best[0].rank, best[0].key)):
                    best = head, offer
            if best is None:
                break
            claims.append(self._run(best[0], best[1].provider, now))
        return Claims(started=tuple(claims))

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """See the protocol: one daemon has this store, so nobody can take its runs."""
        return ()

    async def settle(
        self, claim: Claimed, attempt: Attempt, verdict: Verdict, now: Moment, aftermath: Aftermath | None = None
    ) -> Settled:
        """See the protocol.

        Raises:
            NotFound: the request ended and was pruned meanwhile.
        """
        request = self._data.members.get(claim.key)
        if not isinstance(request, Request):
            raise NotFound(f"request {claim.request_id!r} is no longer kept; its late answer is dropped")
        mine = (request.state, request.fence, request.token) == (State.RUNNING, claim.fence, claim.token)
        if not mine:
            self._keep_fenced(request, attempt)
            return Settled(state=request.state, fenced=True)
        if request.cancelling and not isinstance(verdict, Finish):
            verdict = Finish(state=State.CANCELLED, error=_CANCELLED)
        conversation = request.conversation
        fork: Fork | None = None
        if isinstance(verdict, Finish) and verdict.state is State.COMPLETED:
            attempt = self._bind(conversation, attempt)
            fork = self._fork_seen(request, attempt, now)
        self._data.ended(request, attempt, previous=conversation.head)
        conversation.active_at = now.wall
        passing: Passing | None = None
        match verdict:
            case Finish():
                if verdict.state is State.COMPLETED:
                    request.turn = self._add_turn(request, attempt)
                    request.provider = attempt.provider
                passing = self._lines.end(request, verdict.state, now, verdict.error, verdict.message)
            case Retry():
                passing = self._put_off(request, verdict, now)
            case GiveBack():
                with self._data.changing(request):
                    request.state = State.QUEUED
                self._lines.refresh(conversation, now)
        self._lines.on_work()
        return Settled(
            state=request.state,
            turn=request.turn,
            finished_at=request.finished_at,
            passing=passing,
            due=request.due,
            fork=fork,
        )

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """See the protocol."""
        member = self._data.ids.get(request_id)
        if member is None:
            raise NotFound(f"no request {request_id!r}; it was never taken, or is past its retention")
        if isinstance(member, Request):
            return self._cancel_request(member, now, by)
        passing = self._lines.take_away(member, now)
        return Cancelled(
            outcome=CancelOutcome.CANCELLED,
            request_id=request_id,
            conversation=member.conversation.name,
            state=State.CANCELLED,
            passing=passing,
        )

    # -- external locks -----------------------------------------------------------------------------------------------

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See the protocol."""
        known = self._data.ids.get(lock.request_id)
        if known is not None:
            return self._acquire_again(lock, known, now)
        conversation = self._data.find(lock.conversation)
        holder = None if conversation is None else conversation.holder
        head = None if conversation is None else self._data.head_of_line(conversation)
        free = holder is None and (head is None or lock.rank < head.rank)
        if conversation is not None and not free and not lock.wait:
            return Acquired(position=self._position(conversation, lock.rank), holder=name_of(holder))
        if not free and len(self._data.waiters) >= self._rules.max_queued:
            limit = self._rules.max_queued
            raise QueueFull(f"{limit} wait for a lock already; try again later", limit=limit)

        conversation = self._conversation(lock.conversation, now)
        conversation.active_at = now.wall
        waiter = ExternalLock(
            key=self._data.number("member"),
            request_id=lock.request_id,
            conversation=conversation,
            rank=lock.rank,
            priority=lock.priority,
            enqueued_at=now.wall,
            metadata=lock.metadata,
            deadline=lock.deadline,
            patience=None if lock.deadline is None else lock.deadline - now.mono,
        )
        self._data.add(waiter)
        grant = self._lines.refresh(conversation, now)
        if grant is not None:
            return Acquired(grant=grant)
        return Acquired(
            queued=True, position=self._position(conversation, waiter.rank, waiter.key), holder=name_of(holder)
        )

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """See the protocol."""
        lock = self._held_lock(request_id, fence)
        lock.conversation.active_at = now.wall
        return self._lines.renew(lock, now)

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """See the protocol."""
        lock = self._held_lock(request_id, fence)
        return self._lines.release(lock, now)

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See the protocol."""
        waiter = self._data.ids.get(request_id)
        if not isinstance(waiter, ExternalLock) or waiter.holds:
            return None
        return self._lines.take_away(waiter, now)

    # -- coming in ----------------------------------------------------------------------------------------------------

    def _kept(self, new: NewRequest) -> Enqueued | None:
        known = self._data.ids.get(new.request_id)
        if known is None:
            return None
        if not isinstance(known, Request):
            raise RequestIdConflict(f"{new.request_id!r} is a lock's id; choose another", request_id=new.request_id)
        if known.body != new.body:
            raise RequestIdConflict(
                f"{new.request_id!r} names a request with other content; choose another id", request_id=new.request_id
            )
        view = self._view(known)
        return Enqueued(
            request_id=view.request_id,
            conversation=view.conversation,
            state=view.state,
            position=view.position or 0,
            holder=view.holder,
            existing=view,
        )

    def _interrupted(
        self, new: NewRequest, conversation: Conversation | None, holder: Member | None, head: Member | None
    ) -> Request | None:
        """The holder that `new` interrupts, if it does.

        Raises:
            ConversationBusy: `on_busy` says not to wait, or not for this holder.
        """
        if conversation is None or (holder is None and head is None) or new.on_busy is OnBusy.ENQUEUE:
            return None
        if new.on_busy is OnBusy.INTERRUPT:
            if holder is None:
                return None
            if isinstance(holder, Request) and holder.priority >= new.priority:
                return holder
        raise ConversationBusy(
            f"conversation {conversation.name!r} is taken; try again later, or send `on_busy: enqueue` to wait",
            conversation_id=conversation.name,
            holder=name_of(holder),
            since=conversation.since,
            position=self._position(conversation, new.rank),
        )

    def _free_offer(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Offer | None:
        """The offer by which `new` can run at once: a free slot, and nobody ready before it for the same provider."""
        if new.expires is not None and new.expires <= now.wall:
            return None
        for offer in offers:
            if offer.route != new.route or not self._has_slot(offer):
                continue
            rivals = {other.route for other in offers if other.provider == offer.provider}
            heads = [self._first_ready(route, now) for route in rivals]
            if all(head is None or head.rank > new.rank for head in heads):
                return offer
        return None

    def _conversation(
        self, name: str, now: Moment, fork_of: str | None = None, request_id: str | None = None
    ) -> Conversation:
        """The conversation of this name; begun if it is new, where `fork_of` stands if that is given."""
        found = self._data.find(name)
        if found is None:
            number = self._data.number("conversation")
            found = Conversation(number=number, name=name, created_at=now.wall, active_at=now.wall)
            self._data.conversations[name] = self._data.numbered[number] = found
            parent = self._data.find(fork_of) if fork_of is not None else None
            if parent is not None and request_id is not None:
                self._fork(parent, found, request_id, now)
        return found

    def _fork(self, parent: Conversation, child: Conversation, request_id: str, now: Moment) -> None:
        child.parent, child.head = parent, parent.head
        parent.children += 1
        fork = Fork(parent=parent.name, child=child.name, request_id=request_id, at=now.wall, kind="requested")
        self._data.record_fork(child, fork)
        self._data.reindex(parent)

    def _bind(self, conversation: Conversation, attempt: Attempt) -> Attempt:
        """Make a provider session a name of this conversation; one that names another is let go (L7)."""
        if attempt.provider_session is None:
            return attempt
        owner = self._data.find(attempt.provider_session)
        if owner is None:
            self._data.aliases[attempt.provider_session] = conversation
            conversation.aliases.append(attempt.provider_session)
        elif owner is not conversation:
            return msgspec.structs.replace(attempt, provider_session=None, last_message=None)
        return attempt

    def _fork_seen(self, request: Request, attempt: Attempt, now: Moment) -> Fork | None:
        """Record a fork that the provider saw (L7)."""
        conversation = request.conversation
        if attempt.fork is None or attempt.provider_session is None:
            return None
        head = None if conversation.head is None else self._data.turns[conversation.head].turn
        before = None if head is None else head.provider_session
        parent = before if attempt.fork == "new_session" and before is not None else conversation.name
        fork = Fork(
            parent=parent,
            child=attempt.provider_session,
            request_id=request.request_id,
            at=now.wall,
            kind=attempt.fork,
        )
        self._data.record_fork(conversation, fork)
        return fork

    def _new_request(self, new: NewRequest, conversation: Conversation, state: State, now: Moment) -> Request:
        return Request(
            key=self._data.number("member"),
            request_id=new.request_id,
            conversation=conversation,
            rank=new.rank,
            priority=new.priority,
            enqueued_at=now.wall,
            state=state,
            body=new.body,
            route=new.route,
            model=new.model,
            agent_id=new.agent_id,
            hold_on_retry=new.hold_on_retry,
            requeued_from=new.requeued_from,
            due=new.due if state is State.SCHEDULED else None,
            expires=new.expires,
        )

    def _interrupt(self, holder: Request, by: Request, now: Moment) -> Passing | None:
        """Stop a holder for `by`: a running one is marked, another one ends here (L3)."""
        holder.interrupted_by = holder.interrupted_by or by.request_id
        if holder.state is State.RUNNING:
            holder.cancelling = True
            return None
        return self._lines.end(holder, State.CANCELLED, now, _CANCELLED)

    # -- running ------------------------------------------------------------------------------------------------------

    def _has_slot(self, offer: Offer) -> bool:
        return self._data.running.count((offer.provider,)) < offer.limit

    def _first_ready(self, route: str, now: Moment) -> Request | None:
        """The first of a route that may still be started."""
        for key in self._data.ready.walk((route,)):
            request = self._data.request(key)
            if request.expires is None or request.expires > now.wall:
                return request
        return None

    def _run(self, request: Request, provider: str, now: Moment) -> Claimed:
        conversation = request.conversation
        with self._data.changing(request):
            request.state = State.RUNNING
            request.expires = None
            request.provider = provider
            request.started_at = now.wall
            request.attempt += 1
            request.token = self._chance.token()
            self._lines.hold(request, now)
        self._lines.refresh(conversation, now)
        return Claimed(
            key=request.key,
            request_id=request.request_id,
            conversation=conversation.name,
            body=request.body,
            route=request.route,
            provider=provider,
            priority=request.priority,
            attempt=request.attempt,
            fence=request.fence,
            token=request.token,
            started_at=now.wall,
            enqueued_at=request.enqueued_at,
            head=conversation.head,
            agent_id=request.agent_id,
            requeued_from=request.requeued_from,
        )

    def _add_turn(self, request: Request, attempt: Attempt) -> int:
        """Make a completed attempt the conversation's head."""
        conversation = request.conversation
        number = self._data.number("turn")
        turn = Turn(
            id=number,
            body=request.body,
            text=attempt.text or "",
            provider=attempt.provider,
            provider_session=attempt.provider_session,
            finished_at=attempt.finished_at,
            previous=conversation.head,
            last_message=attempt.last_message,
            conversation=conversation.name,
        )
        self._data.turns[number] = TurnRecord(
            turn=turn,
            request_id=request.request_id,
            conversation=conversation.name,
            agent_id=request.agent_id,
            attempt=attempt,
        )
        self._data.log.add((number,))
        conversation.turns.append(number)
        conversation.head = number
        conversation.provider = attempt.provider
        conversation.provider_session = attempt.provider_session
        return number

    def _keep_fenced(self, request: Request, attempt: Attempt) -> None:
        """Keep what a late run brought, unless its own end is there already: usage counts once (T1)."""
        ends = (kept for kept in request.attempts if kept.number == attempt.number)
        if all(kept.outcome is Outcome.INTERRUPTED for kept in ends):
            self._data.ended(request, msgspec.structs.replace(attempt, outcome=Outcome.FENCED))

    def _put_off(self, request: Request, retry: Retry, now: Moment) -> Passing | None:
        self._data.routes.add(retry.route or request.route)
        with self._data.changing(request):
            request.state = State.PARKED if retry.parked else State.RETRYING
            request.due = retry.at
            request.route = retry.route or request.route
            request.error, request.message = retry.error, retry.message
            if not request.hold_on_retry:
                request.conversation.holder = None
        return None if request.hold_on_retry else self._lines.pass_on(request, now)

    def _cancel_request(self, request: Request, now: Moment, by: str | None) -> Cancelled:
        passing: Passing | None = None
        outcome = CancelOutcome.CANCELLED
        if request.state.final:
            outcome = CancelOutcome.ALREADY_FINAL
        else:
            request.interrupted_by = request.interrupted_by or by
            if request.state is State.RUNNING:
                outcome = CancelOutcome.STOPPING
                request.cancelling = True
            else:
                passing = self._lines.end(request, State.CANCELLED, now, _CANCELLED)
        return Cancelled(
            outcome=outcome,
            request_id=request.request_id,
            conversation=request.conversation.name,
            state=request.state,
            passing=passing,
        )

    # -- locks --------------------------------------------------------------------------------------------------------

    def _acquire_again(self, lock: NewLock, known: Member, now: Moment) -> Acquired:
        if not isinstance(known, ExternalLock):
            raise RequestIdConflict(
                f"{lock.request_id!r} is a request's id; choose another", request_id=lock.request_id
            )
        conversation = known.conversation
        if self._data.find(lock.conversation) is not conversation:
            raise RequestIdConflict(
                f"{lock.request_id!r} holds or awaits the lock of another conversation; choose another id",
                request_id=lock.request_id,
            )
        if known.holds:
            conversation.active_at = now.wall
            return Acquired(grant=self._lines.renew(known, now), renewed=True)
        return Acquired(
            queued=True,
            position=self._position(conversation, known.rank, known.key),
            holder=name_of(conversation.holder),
        )

    def _position(self, conversation: Conversation, rank: int, key: int | None = None) -> int:
        return self._data.before(conversation, rank, key, self._rules.position_limit)

    def _held_lock(self, request_id: str, fence: int | None) -> ExternalLock:
        member = self._data.ids.get(request_id)
        if isinstance(member, Request):
            raise RequestIdConflict(f"{request_id!r} is a request's id, not a lock's", request_id=request_id)
        if not isinstance(member, ExternalLock) or not member.holds:
            raise NotLockHolder(f"{request_id!r} holds no lock (any more); acquire it first", request_id=request_id)
        if fence is not None and fence != member.fence:
            raise NotLockHolder(
                f"{request_id!r} lost the lock of fence {fence} and holds another; acquire again to learn its fence",
                request_id=request_id,
            )
        return member
