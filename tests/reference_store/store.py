"""The reference store: every verb of the protocol over plain dicts and sorted lists, written to be read.

No verb awaits in its middle, so each is one atomic step on its event loop. Nothing is durable beyond the `MemoryData`
it works on; a new store over the same data stands for a daemon's restart.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import msgspec

from ksi.budgets.account import exceeded
from ksi.budgets.rules import NO_CAPS, Caps, Hold, Notice, Over, Spent
from ksi.clock import Chance, Moment
from ksi.errors import (
    FailureClass,
    InternalError,
)
from ksi.request import Attempt, OnBusy, Outcome, State
from ksi.store.chains import (
    Aftermath,
    Block,
    ChainView,
    ClosedChain,
    Delivered,
    FollowUp,
    Grant,
    InjectionView,
)
from ksi.store.image.data import Conversation, Member, Request
from ksi.store.image.save import save
from ksi.store.provider_records import KeptRecords, PutRecord
from ksi.store.questions import Question, is_asking
from ksi.store.rules import refusals
from ksi.store.rules.budgets import CODE, block_of, ends
from ksi.store.rules.fairness import Flow, Shares, flow_of, next_flows
from ksi.store.snapshot.records import Loaded, Record
from ksi.store.values import (
    CLAIM_ASIDE,
    NO_PAUSE,
    Acquired,
    Answered,
    BudgetUse,
    BudgetWait,
    Cancelled,
    CancelOutcome,
    Claimed,
    Claims,
    Deleted,
    Ended,
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
    Paused,
    Pruned,
    Recovery,
    Retry,
    Settled,
    StoreCondition,
    StoreRules,
    Verdict,
)
from tests.reference_store.budgets import Budgets
from tests.reference_store.chain_data import chain_view, member_view
from tests.reference_store.chains import Arriving, Chains
from tests.reference_store.conversations import Conversations
from tests.reference_store.data import ASIDE, MemoryData, is_stopped, name_of
from tests.reference_store.injections import Injections
from tests.reference_store.lines import Lines, no_work
from tests.reference_store.load import load
from tests.reference_store.locks import Locks
from tests.reference_store.owning import Owning
from tests.reference_store.reads import MemoryReads
from tests.reference_store.terms import TermsKeeper
from tests.reference_store.upkeep import Upkeep

_CANCELLED = FailureClass.CANCELLED.value
_BLOCKED = FailureClass.BLOCKED.value
_PIECE = 100


class MemoryStore(MemoryReads):
    """A `ksi.store.base.Store` in memory; that protocol documents each verb.

    `data` is what an earlier store left: a new store over it, opened, stands for a daemon's restart. One with another
    `node`, opened while nothing runs, stands for a daemon on another machine (D4).
    """

    def __init__(
        self, rules: StoreRules, chance: Chance, data: MemoryData | None = None, *, node: str = "here"
    ) -> None:
        self._node = node
        self.data = MemoryData() if data is None else data
        super().__init__(rules, self.data)
        self._chance = chance
        self._chains = Chains(rules, self._data)
        self._conversations = Conversations(self._data)
        self._lines = Lines(rules, self._data, self._chains)
        self._upkeep = Upkeep(rules, self._data, self._lines, self._chains, Budgets(self._data))
        self._locks = Locks(rules, self._data, self._lines, self._conversations)
        self._injections = Injections(rules, self._data, self._lines, self._chains, self._conversations)
        self._terms = TermsKeeper(self._data)
        self._budgets = Budgets(self._data)
        self._shares = Shares()
        self._data.clocks.weigh(rules.weights)
        self._owning = Owning(self._data, self._upkeep)

    @property
    def shared(self) -> None:
        """See the protocol: no other process can use it."""
        return None

    # -- life and time ------------------------------------------------------------------------------------------------

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """See the protocol."""
        self._lines.on_work = on_work
        self._upkeep.hear(self._node, now)
        return self._upkeep.recover(now)

    async def close(self) -> None:
        """See the protocol; the data stay with their holder."""
        self._lines.on_work = no_work

    def condition(self) -> StoreCondition:
        """See the protocol: there is no disk and no server that could fail."""
        return StoreCondition()

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """See the protocol."""
        return self._upkeep.expire(now, limit)

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """See the protocol."""
        return self._upkeep.unpark(route, now, limit)

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See the protocol."""
        return self._upkeep.prune(now, limit)

    async def rename(self, conversation: str, name: str, now: Moment) -> str:
        """See the protocol."""
        return self._owning.rename(conversation, name)

    async def delete(self, conversation: str, now: Moment) -> Deleted:
        """See the protocol."""
        return self._owning.delete(conversation)

    async def export(self, now: Moment) -> AsyncGenerator[Sequence[Record], None]:
        """See the protocol."""
        records = save(self._data, now)
        for begin in range(0, len(records), _PIECE):
            yield records[begin : begin + _PIECE]

    async def give_back(self, limit: int = 32) -> int:
        """See `Store.give_back`. It has no file."""
        return 0

    async def load(self, records: Iterable[Record], now: Moment) -> Loaded:
        """See the protocol."""
        loaded = load(self._data, self._rules, records, now)
        self._lines.on_work()
        return loaded

    # -- requests -----------------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        new: NewRequest,
        offers: Sequence[Offer],
        now: Moment,
        *,
        awaited: bool = False,
        paused: Paused = NO_PAUSE,
        caps: Caps = NO_CAPS,
    ) -> Enqueued:
        """See the protocol."""
        kept = self._kept(new)
        if kept is not None:
            return kept
        arriving = self._chains.arriving(new, now)
        if new.fork_of is not None and self._data.find(new.fork_of) is None:
            raise refusals.unknown_fork(new.fork_of)
        if arriving is not None and (block := self._chains.against(arriving, now)) is not None:
            return self._keep_blocked(new, arriving, block, now)
        delayed = new.question is not None or (new.due is not None and new.due > now.wall)
        conversation = self._data.find(new.conversation)
        holder = None if conversation is None else conversation.holder
        head = None if conversation is None else self._data.head_of_line(conversation)
        interrupted = None if delayed else self._interrupted(new, conversation, holder, head)
        ready = not delayed and holder is None and head is None
        if caps:
            self._budgets.check(new, conversation, caps)
        name = new.conversation if conversation is None else conversation.name
        may_run = ready and not paused.stops(new.agent_id, name, new.priority) and self._may_run_here(new, conversation)
        offer = self._free_offer(new, offers, now) if may_run else None
        hold: Hold | None = None
        if offer is not None and caps:
            found = self._budgets.room(new, conversation, offer.provider, caps)
            offer, hold = (None, None) if isinstance(found, Over) else (offer, found)
        if offer is None and self._data.waiting >= self._rules.max_queued:
            limit = self._rules.max_queued
            raise refusals.queue_full(limit)

        grant: Grant | None = None
        if offer is not None and arriving is not None:
            would = self._chains.would_run(arriving, now)
            if isinstance(would, Block):
                return self._keep_blocked(new, arriving, would, now)
            grant = would

        # All is decided; from here on the store changes.
        conversation = self._enter(new, now)
        request = self._new_request(new, conversation, State.SCHEDULED if delayed else State.QUEUED, now)
        if arriving is not None:
            self._chains.join(request, arriving, None, now)
        if not delayed and new.on_busy is OnBusy.INTERRUPT and head is not None:
            request.rank = min(new.rank, head.rank - 1)
        self._data.add(request)
        if new.demand or hold is not None:
            self._data.demands[request.key] = new.demand
        if offer is not None:
            claim = self._run(request, offer, grant, hold, now)
            return Enqueued(
                request_id=request.request_id,
                conversation=conversation.name,
                state=request.state,
                ready=True,
                claim=claim,
            )
        self._lines.take_turn(request, flow_of(new.agent_id, new.flow, conversation.name))
        conversation.active_at = now.wall
        ended = None if interrupted is None else self._interrupt(interrupted, request, now)
        self._lines.refresh(conversation, now)
        return Enqueued(
            request_id=request.request_id,
            conversation=conversation.name,
            state=request.state,
            ready=ready,
            position=0 if delayed else self._position(conversation, request.rank, request.key),
            holder=name_of(conversation.holder),
            stopping=interrupted.request_id if interrupted is not None and ended is None else None,
            passing=None if ended is None else ended.passing,
            injections=() if ended is None else ended.injections,
        )

    async def claim(
        self, offers: Sequence[Offer], limit: int, now: Moment, paused: Paused = NO_PAUSE, caps: Caps = NO_CAPS
    ) -> Claims:
        """See the protocol."""
        notices: list[Notice] = []
        started: list[Claimed] = []
        blocked: list[Ended] = []
        aside, waiting = 0, False
        while len(started) + len(blocked) < limit and aside < CLAIM_ASIDE:
            best = self._next(offers, now)
            if best is None:
                break
            if is_stopped(best[0], paused):
                self._data.move_ready(best[0].conversation, ASIDE)
                aside += 1
                continue
            outcome = self._start(*best, caps, notices, now)
            if outcome is None:
                aside, waiting = aside + 1, True
            elif isinstance(outcome, Ended):
                blocked.append(outcome)
            else:
                started.append(outcome)
        waits = self._waits(offers, now)
        return Claims(
            started=tuple(started),
            blocked=tuple(blocked),
            waits=waits,
            notices=tuple(notices),
            waiting=waiting,
            more=aside >= CLAIM_ASIDE,
        )

    async def bring_back(self, paused: Paused, now: Moment, after: str | None = None, limit: int = 500) -> str | None:
        """See the protocol."""
        return self._upkeep.bring_back(paused, after, limit)

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """See the protocol: no other can take this store's runs."""
        self._upkeep.hear(self._node, now)
        self._upkeep.lose_silent(now)
        return ()

    async def reconsider(self, budget: str | None, now: Moment, limit: int = 500) -> bool:
        """See the protocol."""
        more = self._budgets.reconsider(budget, limit)
        self._lines.on_work()
        return more

    async def next_flows(self, limit: int = 3) -> Sequence[Flow]:
        """See the protocol."""
        ready = [self._data.request(key) for key in self._data.ready.walk() if key[1] != ASIDE]
        found = [(int(one.priority), one.tag, one.rank, one.flow or "", one.request_id) for one in ready]
        return next_flows(found, limit)

    async def budget_uses(self, budget: str, since: int) -> Sequence[BudgetUse]:
        """See the protocol."""
        return self._budgets.uses(budget, since)

    async def budget_waits(self, limit: int = 1_000) -> Sequence[BudgetWait]:
        """See the protocol."""
        return self._budgets.waits()[:limit]

    async def settle(
        self,
        claim: Claimed,
        attempt: Attempt,
        verdict: Verdict,
        now: Moment,
        aftermath: Aftermath | None = None,
        spent: Spent | None = None,
        caps: Caps = NO_CAPS,
    ) -> Settled:
        """See the protocol.

        Raises:
            NotFound: the request ended and was pruned meanwhile.
        """
        request = self._data.members.get(claim.key)
        if not isinstance(request, Request):
            raise refusals.late_answer(claim.request_id)
        mine = (request.state, request.fence, request.token) == (State.RUNNING, claim.fence, claim.token)
        if not mine:
            self._keep_fenced(request, attempt)
            return Settled(state=request.state, fenced=True)
        if request.cancelling and not isinstance(verdict, Finish):
            verdict = Finish(state=State.CANCELLED, error=_CANCELLED)
        if aftermath is not None and isinstance(verdict, Finish) and request.link is None:
            raise InternalError("an aftermath of a request in no chain", request_id=request.request_id)
        conversation = request.conversation
        notices = self._budgets.settle(request, spent, caps)
        fork: Fork | None = None
        if isinstance(verdict, Finish) and verdict.state is State.COMPLETED:
            attempt = self._conversations.bind(conversation, attempt)
            fork = self._conversations.fork_seen(request, attempt, now)
        self._data.ended(request, attempt, previous=conversation.head)
        self._chains.attempt_ended(request, attempt)
        self._terms.settle(request, attempt, now)
        conversation.active_at = now.wall
        passing: Passing | None = None
        injections: tuple[InjectionView, ...] = ()
        match verdict:
            case Finish():
                passing, injections = self._finish(request, attempt, verdict, aftermath, now)
            case Retry():
                self._chains.put_reminders_back(request)
                passing = self._put_off(request, verdict, now)
            case GiveBack():
                self._chains.put_reminders_back(request)
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
            injections=injections,
            notices=tuple(notices),
        )

    def _finish(
        self, request: Request, attempt: Attempt, verdict: Finish, aftermath: Aftermath | None, now: Moment
    ) -> tuple[Passing | None, tuple[InjectionView, ...]]:
        """End a run's request: returns the lock's next holder, and the state of deliveries."""
        reminders: tuple[InjectionView, ...] = ()
        if verdict.state is State.COMPLETED:
            request.turn = self._conversations.add_turn(request, attempt)
            request.provider = attempt.provider
            reminders = self._chains.use_reminders(request, now)
        else:
            self._chains.put_reminders_back(request)
        # Before the lock passes on: a follow-up may be the next in this line.
        link = request.link
        sent = () if aftermath is None or link is None else self._injections.write(request, link, aftermath, now)
        ended = self._lines.end(
            request, verdict.state, now, verdict.error, verdict.message, routed=aftermath is not None
        )
        return ended.passing, (*ended.injections, *reminders, *sent)

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """See the protocol."""
        member = self._data.ids.get(request_id)
        if member is None:
            raise refusals.unknown_request(request_id)
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

    # -- providers ----------------------------------------------------------------------------------------------------

    async def provider_records(self, now: Moment) -> KeptRecords:
        """See the protocol."""
        return await self._data.records.provider_records(now)

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """See the protocol."""
        return await self._data.records.put_provider_record(name, version, value, now, tell=tell)

    # -- chains -------------------------------------------------------------------------------------------------------

    async def deliver(self, request_id: str, aftermath: Aftermath, now: Moment) -> Delivered:
        """See the protocol."""
        return self._injections.deliver(request_id, aftermath, now)

    async def redeliver(self, injection_id: str, again: FollowUp, now: Moment) -> Delivered:
        """See the protocol."""
        return self._injections.redeliver(injection_id, again, now)

    async def close_chain(self, name: str, now: Moment, limit: int = 200) -> ClosedChain:
        """See the protocol."""
        return self._chains.close(self._chains.called(name)[0], limit)

    async def reset_chain(self, name: str, now: Moment) -> ChainView:
        """See the protocol."""
        chain, link = self._chains.called(name)
        self._chains.reset(chain, now)
        return chain_view(chain) if link is None else member_view(link)

    # -- external locks -----------------------------------------------------------------------------------------------

    async def acquire(self, lock: NewLock, now: Moment) -> Acquired:
        """See the protocol."""
        return self._locks.acquire(lock, now)

    async def renew_lock(self, request_id: str, now: Moment, fence: int | None = None) -> LockGrant:
        """See the protocol."""
        return self._locks.renew(request_id, now, fence)

    async def release(self, request_id: str, now: Moment, fence: int | None = None) -> Passing:
        """See the protocol."""
        return self._locks.release(request_id, now, fence)

    async def withdraw(self, request_id: str, now: Moment) -> Passing | None:
        """See the protocol."""
        return self._locks.withdraw(request_id, now)

    # -- coming in ----------------------------------------------------------------------------------------------------

    def _kept(self, new: NewRequest) -> Enqueued | None:
        known = self._data.ids.get(new.request_id)
        if known is None:
            return None
        if not isinstance(known, Request):
            raise refusals.names_a_lock(new.request_id)
        if known.body != new.body:
            raise refusals.names_another_request(new.request_id)
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
        raise refusals.conversation_busy(
            conversation.name, name_of(holder), conversation.since, self._position(conversation, new.rank)
        )

    def _free_offer(self, new: NewRequest, offers: Sequence[Offer], now: Moment) -> Offer | None:
        """The offer by which `new` can run at once: a free slot, and no earlier ready request for the same provider."""
        if new.expires is not None and new.expires <= now.wall:
            return None
        for offer in offers:
            if offer.route != new.route or not self._has_slot(offer, now):
                continue
            rivals = {other.route for other in offers if other.provider == offer.provider}
            heads = [head for route in rivals for head in self._heads(route, now)]
            if all(head.rank > new.rank for head in heads):
                return offer
        return None

    def _keep_blocked(self, new: NewRequest, arriving: Arriving, block: Block, now: Moment) -> Enqueued:
        """Keep a request that its chain has no place for."""
        conversation = self._enter(new, now)
        conversation.active_at = now.wall
        request = self._new_request(new, conversation, State.BLOCKED, now)
        request.error, request.message, request.finished_at = _BLOCKED, block.message, now.wall
        self._chains.join(request, arriving, block, now)
        self._data.add(request)
        self._lines.refresh(conversation, now)
        return Enqueued(
            request_id=request.request_id,
            conversation=conversation.name,
            state=request.state,
            block=block,
            chain=None if request.link is None else member_view(request.link),
        )

    def _enter(self, new: NewRequest, now: Moment) -> Conversation:
        conversation = self._conversations.enter(new.conversation, now, new.fork_of, new.request_id)
        self._conversations.meet(conversation, new.agent_id)
        self._data.routes.add(new.route)
        return conversation

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
            due=new.due if state is State.SCHEDULED and new.question is None else None,
            expires=new.expires,
            message=None if new.question is None or state is not State.SCHEDULED else new.question.text,
            question=new.question if state is State.SCHEDULED else None,
        )

    def _interrupt(self, holder: Request, by: Request, now: Moment) -> Ended | None:
        """Stop a holder for `by`: a running one is marked, another one ends here (L3)."""
        holder.interrupted_by = holder.interrupted_by or by.request_id
        if holder.state is State.RUNNING:
            holder.cancelling = True
            return None
        return self._lines.end(holder, State.CANCELLED, now, _CANCELLED)

    # -- running ------------------------------------------------------------------------------------------------------

    def _may_run_here(self, new: NewRequest, conversation: Conversation | None) -> bool:
        """True if the provider session that it continues is on this machine, or on none (D4)."""
        if conversation is None and new.fork_of is not None:
            conversation = self._data.find(new.fork_of)
        return conversation is None or self._data.home(conversation, new.route) in ("", self._node)

    def _slot(self, offer: Offer) -> str:
        return f"{offer.provider}@{self._node}" if offer.by_node else offer.provider

    def _has_slot(self, offer: Offer, now: Moment) -> bool:
        slot = self._slot(offer)
        terms = offer.terms
        if terms is not None and terms.known not in (None, self._data.records.version(offer.provider)):
            return False
        return self._data.running.count((slot,)) < offer.limit and self._terms.allow(terms, slot, now)

    def _waits(self, offers: Sequence[Offer], now: Moment) -> dict[str, int]:
        waits = {offer.provider: self._terms.wait(offer.terms, self._slot(offer), now) for offer in offers}
        return {provider: wait for provider, wait in waits.items() if wait}

    def _next(self, offers: Sequence[Offer], now: Moment) -> tuple[Request, Offer] | None:
        """The request whose turn it is, and an offer with room for it."""
        best: dict[int, tuple[Request, Offer]] = {}
        for offer in offers:
            for head in self._heads(offer.route, now) if self._has_slot(offer, now) else ():
                known = best.get(head.priority)
                if known is None or _turn(head) < _turn(known[0]):
                    best[head.priority] = head, offer
        if not best:
            return None
        heads = {priority: (head.rank, head.key) for priority, (head, _) in best.items()}
        return best[self._shares.choose(heads, fair=self._rules.fair)]

    def _heads(self, route: str, now: Moment) -> list[Request]:
        """For each priority, the first request of a route that may still be started, and here."""
        heads: dict[int, Request] = {}
        for node in ("", self._node):
            for key in self._data.ready.walk((route, node)):
                request = self._data.request(key)
                if request.expires is not None and request.expires <= now.wall:
                    continue
                known = heads.get(request.priority)
                if known is None or _turn(request) < _turn(known):
                    heads[request.priority] = request
        return list(heads.values())

    def _start(
        self, request: Request, offer: Offer, caps: Caps, notices: list[Notice], now: Moment
    ) -> Claimed | Ended | None:
        """Run a ready request, or end it if its chain or its budgets do not admit it. None: it waits for one of
        them."""
        hold: Hold | None = None
        if caps:
            found = self._budgets.look(request, offer.provider, caps)
            if isinstance(found, Over):
                if not ends(found):
                    notices += self._budgets.wait(request, found)
                    return None
                notices += () if found.never else exceeded(self._data.uses, found)
                block = block_of(found)
                return self._lines.end(request, State.BLOCKED, now, CODE, block.message, block=block)
            hold = found
        grant = None if request.link is None else self._chains.may_run(request.link, now)
        if isinstance(grant, Block):
            return self._lines.end(request, State.BLOCKED, now, _BLOCKED, grant.message, block=grant)
        return self._run(request, offer, grant, hold, now)

    def _run(self, request: Request, offer: Offer, grant: Grant | None, hold: Hold | None, now: Moment) -> Claimed:
        conversation = request.conversation
        with self._data.changing(request):
            request.state = State.RUNNING
            self._data.clocks.started(request.priority, request.tag)
            request.expires = None
            request.provider = offer.provider
            request.slot = self._slot(offer)
            request.started_at = now.wall
            request.attempt += 1
            request.token = self._chance.token()
            self._lines.hold(request, now)
        self._terms.take(request, offer.terms, now)
        if hold is not None:
            self._budgets.begin(request, hold)
        reminders = self._chains.take_reminders(request)
        self._lines.refresh(conversation, now)
        return Claimed(
            key=request.key,
            request_id=request.request_id,
            conversation=conversation.name,
            body=request.body,
            route=request.route,
            provider=offer.provider,
            priority=request.priority,
            attempt=request.attempt,
            fence=request.fence,
            token=request.token,
            started_at=now.wall,
            enqueued_at=request.enqueued_at,
            head=conversation.head,
            agent_id=request.agent_id,
            requeued_from=request.requeued_from,
            chain=None if request.link is None else self._chains.started(request.link, grant),
            output_cap=None if hold is None else self._budgets.output_cap(request, offer.provider, hold),
            reminders=reminders,
        )

    def _keep_fenced(self, request: Request, attempt: Attempt) -> None:
        """Keep the answer of a late run, unless its own end is there already: usage counts once (T1)."""
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
            request.question = retry.question
            keeps = request.hold_on_retry or is_asking(request.state, request.question)
            if not keeps:
                request.conversation.holder = None
        return None if keeps else self._lines.pass_on(request, now)

    async def answer(
        self,
        request_id: str,
        asked: Question,
        answered: Question,
        now: Moment,
        *,
        end: Finish | None = None,
        due: int | None = None,
        expires: int | None = None,
    ) -> Answered:
        """See the protocol."""
        request = self._data.ids.get(request_id)
        if not isinstance(request, Request):
            raise refusals.unknown_request(request_id)
        name = request.conversation.name
        if not is_asking(request.state, request.question) or request.question != asked:
            return Answered(taken=False, conversation=name, state=request.state)
        with self._data.changing(request):
            request.question, request.expires = answered, expires
            if end is None:
                request.due = due or now.wall
        self._lines.on_work()
        if end is None:
            return Answered(taken=True, conversation=name, state=request.state)
        ended = self._lines.end(request, end.state, now, end.error, end.message)
        return Answered(
            taken=True, conversation=name, state=end.state, passing=ended.passing, injections=ended.injections
        )

    def _cancel_request(self, request: Request, now: Moment, by: str | None) -> Cancelled:
        ended: Ended | None = None
        outcome = CancelOutcome.CANCELLED
        if request.state.final:
            outcome = CancelOutcome.ALREADY_FINAL
        else:
            request.interrupted_by = request.interrupted_by or by
            if request.state is State.RUNNING:
                outcome = CancelOutcome.STOPPING
                request.cancelling = True
            else:
                ended = self._lines.end(request, State.CANCELLED, now, _CANCELLED)
        return Cancelled(
            outcome=outcome,
            request_id=request.request_id,
            conversation=request.conversation.name,
            state=request.state,
            passing=None if ended is None else ended.passing,
            injections=() if ended is None else ended.injections,
        )

    def _position(self, conversation: Conversation, rank: int, key: int | None = None) -> int:
        return self._data.before(conversation, rank, key, self._rules.position_limit)


def _turn(request: Request) -> tuple[int, int, int]:
    return request.tag, request.rank, request.key
