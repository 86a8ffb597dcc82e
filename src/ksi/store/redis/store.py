"""The store on Redis or Valkey: any number of daemons share one queue. Each verb is one function on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog
from msgspec import to_builtins

from ksi.budgets.rules import NO_CAPS, Caps, Spent
from ksi.clock import MICROSECONDS, Chance, Moment
from ksi.errors import (
    InternalError,
    StoreError,
    StoreUnavailable,
    StoreVersion,
)
from ksi.request import Attempt, answer_chars, said_chars
from ksi.store import account
from ksi.store.base import SharedStore
from ksi.store.binding import node_of
from ksi.store.chains import Aftermath, charge
from ksi.store.news import Kind, News, OnNews
from ksi.store.questions import Question, write_question
from ksi.store.redis.address import Address
from ksi.store.redis.budgets import OverMap, caps_args, demand_args, notices_of, spent_args
from ksi.store.redis.calls import Calls, no_work
from ksi.store.redis.chains import RedisChains, aftermath_args, membership_args, reminder_bytes
from ksi.store.redis.conversations import RedisConversations
from ksi.store.redis.lease import RedisLease
from ksi.store.redis.library import LAYOUT, Library
from ksi.store.redis.link import ANSWER_TIME, WRONG, Link
from ksi.store.redis.locks import RedisLocks
from ksi.store.redis.news import Listener
from ksi.store.redis.providers import RedisProviders
from ksi.store.redis.reads import RedisReads
from ksi.store.redis.snapshot import RedisSnapshots
from ksi.store.redis.values import (
    Answer,
    AnsweredMap,
    CancelMap,
    ClaimMap,
    EnqueueMap,
    SettleMap,
    encode,
    key16,
    pad20,
    rank20,
)
from ksi.store.rules import refusals
from ksi.store.rules.budgets import LONGEST_WINDOW, block_of, over_budget
from ksi.store.values import (
    CLAIM_ASIDE,
    NO_PAUSE,
    Answered,
    Cancelled,
    Claimed,
    Claims,
    Ended,
    Enqueued,
    Expiry,
    Finish,
    GiveBack,
    Lapsed,
    NewRequest,
    Offer,
    Paused,
    Pruned,
    Recovery,
    Retry,
    Settled,
    StoreCondition,
    StoreRules,
    Terms,
    Verdict,
)

LEASE = 30_000_000
"""Microseconds that a daemon's runs are its own after it was last heard of."""

START_TIME = 60.0
"""Seconds within which a server must let a daemon begin, with the requests of its last lease recovered."""

CLOSE_TIMEOUT = 2.0
"""Seconds for which the end of a daemon waits for a server that is away."""

_STEP = 200
"""Maximum size of one step of a recovery, or of releasing requests bound to a lost machine."""


class _Opened(Answer, frozen=True, kw_only=True):
    before: str | None = None


class _Recovered(Answer, frozen=True, kw_only=True):
    requeued: tuple[str, ...] = ()
    ended: tuple[Ended, ...] = ()
    done: bool = True
    more: bool = False


class _Renewed(Answer, frozen=True, kw_only=True):
    dead: int = 0
    freeing: int = 0


class _Freed(Answer, frozen=True, kw_only=True):
    more: bool = False


class _Expired(Answer, frozen=True, kw_only=True):
    woken: int = 0
    ended: tuple[Ended, ...] = ()
    lapsed: tuple[Lapsed, ...] = ()
    next_wall: int | None = None
    next_mono: int | None = None
    more: bool = False


class _Pruned(Answer, frozen=True, kw_only=True):
    requests: int = 0
    conversations: int = 0
    more: bool = False


class _BroughtBack(Answer, frozen=True, kw_only=True):
    after: str | None = None


class _EndedOver(Answer, frozen=True, kw_only=True):
    ended: Ended | None = None


class _Count(Answer, frozen=True, kw_only=True):
    count: int = 0


def _no_news(news: News) -> None:
    """Stands for `on_news` if news of other daemons are not wanted."""


class RedisStore:
    """A `ksi.store.base.SharedStore` on a server that other daemons use too; that protocol documents each verb.

    `daemon` names this one: a daemon that opens the store under the same name takes over its requests. `node` is the
    machine. With `hand`, `Moment.mono` measures leases and locks in place of the server's clock: for one daemon under
    test.
    """

    def __init__(
        self,
        address: Address,
        rules: StoreRules,
        chance: Chance,
        *,
        daemon: str,
        node: str,
        lease: int = LEASE,
        hand: bool = False,
    ) -> None:
        calls = self._calls = Calls(rules, address.namespace, daemon, node, lease, hand=hand)
        self._rules = rules
        self._address = address
        self._chance = chance
        self._library = Library()
        self._links: tuple[Link, ...] = ()
        self._fence = 0
        """The highest that was seen."""
        self._running: dict[int, int] = {}
        """Fencing tokens of the local runs, by key."""
        self.on_news: OnNews = _no_news
        """Called from the event loop with events at other daemons; see `ksi.store.news`."""
        self._listener: Listener | None = None
        self._rejoining = asyncio.Lock()
        # By the server's clock alone: one that a test moves by hand is not kept.
        self.lease = None if hand else RedisLease(address.again(), self._library, self._calls, lease / MICROSECONDS)
        """For the watchdog: keeps the lease while the event loop is blocked."""
        self._log = structlog.get_logger("ksi.redis")
        # Verbs that need nothing of this object are those of its parts.
        reads = RedisReads(calls)
        self.get, self.find, self.requests = reads.get, reads.find, reads.requests
        self.history, self.session, self.sessions = reads.history, reads.session, reads.sessions
        self.lock, self.locks, self.forks, self.nodes = reads.lock, reads.locks, reads.forks, reads.nodes
        self.totals, self.usage = reads.totals, reads.usage
        self.waiting_by_route, self.waiting_by_priority = reads.waiting_by_route, reads.waiting_by_priority
        self.log_after, self.log_watermark = reads.log_after, reads.log_watermark
        self.next_flows, self.budget_uses, self.budget_waits = reads.next_flows, reads.budget_uses, reads.budget_waits
        chains = RedisChains(calls, reads)
        self.chain, self.chains, self.members, self.trail = chains.chain, chains.chains, chains.members, chains.trail
        self.close_chain, self.reset_chain = chains.close_chain, chains.reset_chain
        self.injection, self.injections = chains.injection, chains.injections
        self.unrouted, self.deliver, self.redeliver = chains.unrouted, chains.deliver, chains.redeliver
        conversations = RedisConversations(calls)
        self.rename, self.delete, self.search = conversations.rename, conversations.delete, conversations.search
        held = RedisLocks(calls, rules)
        self.acquire, self.renew_lock = held.acquire, held.renew_lock
        self.release, self.withdraw = held.release, held.withdraw
        records = RedisProviders(calls)
        self.provider_records, self.put_provider_record = records.provider_records, records.put_provider_record
        snapshots = self._snapshots = RedisSnapshots(calls, rules, hand=hand)
        self.export, self.load = snapshots.export, snapshots.load

    @property
    def shared(self) -> SharedStore:
        """See the protocol."""
        return self

    # -- life and time ------------------------------------------------------------------------------------------------

    async def open(self, now: Moment, on_work: Callable[[], None]) -> Recovery:
        """See the protocol. Requests of this daemon's last lease are recovered; runs of other daemons are not touched.

        Raises:
            StoreVersion: another version of KSI wrote there.
            StoreUnavailable: the server cannot be reached.
        """
        self._calls.on_work = on_work
        self._links = tuple(Link(self._address, self._library, name, self._calls.bundle) for name in ("calls", "reads"))
        self._calls.begin(*self._links)
        try:
            async with asyncio.timeout(START_TIME):
                before = await self._begin_life(now)
                return await self._recover(before, now)
        except TimeoutError:
            trouble = self._links[0].trouble or "no word"
            await self.leave()
            raise StoreUnavailable(f"{self._address} does not answer ({trouble}); {WRONG}") from None
        except BaseException:
            await self.leave()
            raise

    async def _begin_life(self, now: Moment) -> str | None:
        """Begin a life of this daemon; the one before it, if there was one."""
        number = await self._calls.plain("HINCRBY", f"{self._calls.namespace}:meta", "life", 1)
        if self._listener is not None:
            await self._listener.close()
        self._listener = Listener(self._address, f"{self._calls.namespace}:to:{number}", self._hear)
        await self._listener.ready(ANSWER_TIME)
        self._calls.live(str(number))
        opened, _ = await self._calls.change("open", now, _Opened, layout=LAYOUT)
        if opened.error == "layout":
            raise StoreVersion(
                f"{self._address} holds layout {opened.found}, this KSI writes {LAYOUT}; "
                + (
                    "stop the daemons of the older version that serve it, and start this one again"
                    if opened.found < LAYOUT
                    else "export it with the version that wrote it, or use another namespace"
                ),
                found=opened.found,
                known=LAYOUT,
            )
        if opened.error == "half_loaded":
            self._log.warning("the remains of an interrupted load are deleted")
            await self._snapshots.wipe()
            await self._calls.change("go_on", now, Answer)
            opened, _ = await self._calls.change("open", now, _Opened, layout=LAYOUT)
        self._calls.tell(opened)
        self._renewed()
        return opened.before

    def _renewed(self) -> None:
        if self.lease is not None:
            self.lease.renewed()

    async def _rejoin(self, life: str, now: Moment) -> tuple[int, ...]:
        """This life was declared dead: begin another. The keys of the runs that are lost with it."""
        async with self._rejoining:
            if self._calls.life != life:
                return ()
            lost = tuple(self._running)
            self._running.clear()
            await self._begin_life(now)
        self.on_news(News(kind=Kind.LOST, keys=lost))
        return lost

    def _hear(self, news: News) -> None:
        self.on_news(news)

    async def _recover(self, life: str | None, now: Moment) -> Recovery:
        """Requeue the runs of an expired lease: of a named one, or of any."""
        requeued: list[str] = []
        ended: list[Ended] = []
        while True:
            step, _ = await self._calls.change("recover", now, _Recovered, of=life, limit=_STEP)
            requeued += step.requeued
            ended += step.ended
            self._calls.tell(step)
            if step.done if life is not None else not step.more:
                return Recovery(requeued=tuple(requeued), ended=tuple(ended))

    def begin_shutdown(self) -> None:
        """The daemon is about to close it: a server that is away is not waited for much longer."""
        for link in self._links:
            link.hurry(CLOSE_TIMEOUT)

    async def close(self) -> None:
        """See the protocol. If the server is away, the lease expires by itself."""
        if self._links:
            try:
                await asyncio.wait_for(self._calls.change("close", Moment(0, 0), Answer), CLOSE_TIMEOUT)
            except (StoreError, TimeoutError) as error:
                self._log.warning(
                    "the server could not be told of the stop; the lease will expire",
                    error=str(error) or type(error).__name__,
                )
            await self.leave()

    def condition(self) -> StoreCondition:
        """See the protocol."""
        away = {link.away for link in self._links} - {None}
        return StoreCondition(
            serving=not away,
            problems=tuple(sorted(word for word in away if word is not None)),
            commits=self._calls.count,
            commit_seconds=self._calls.seconds,
        )

    async def leave(self) -> None:
        """Disconnect from the server without notice, as a killed daemon does."""
        self._calls.on_work = no_work
        if self.lease is not None:
            self.lease.given_back()
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        links, self._links = self._links, ()
        self._calls.end()
        for link in links:
            await link.close()

    async def renew(self, now: Moment) -> tuple[int, ...]:
        """See the protocol. Daemons whose lease has expired lose their runs here, silent machines the requests bound to
        them."""
        life = self._calls.life
        renewed, _ = await self._calls.change("renew", now, _Renewed, fence=self._fence)
        if renewed.error is not None:
            return await self._rejoin(life, now)
        self._renewed()
        if renewed.dead:
            recovery = await self._recover(None, now)
            for ended in recovery.ended:
                self.on_news(News(kind=Kind.ENDED, name=ended.request_id, ended=ended))
        if renewed.freeing:
            await self._free(now)
        return ()

    async def _free(self, now: Moment) -> None:
        """Let all daemons start requests that wait for lost machines."""
        more = True
        while more:
            step, _ = await self._calls.change("free", now, _Freed, limit=_STEP)
            self._calls.tell(step)
            more = step.more

    async def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """See the protocol."""
        answer, _ = await self._calls.change("expire", now, _Expired, limit=limit)
        self._calls.tell(answer)
        return Expiry(
            woken=answer.woken,
            ended=answer.ended,
            lapsed=answer.lapsed,
            next_wall=answer.next_wall,
            next_mono=answer.next_mono,
            more=answer.more,
        )

    async def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """See the protocol."""
        answer, _ = await self._calls.change("unpark", now, _Count, route=route, limit=limit)
        return answer.count

    async def give_back(self, limit: int = 32) -> int:
        """See `Store.give_back`. The server's memory is its own affair."""
        return 0

    async def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See the protocol."""
        rules = self._rules
        pruned, _ = await self._calls.change(
            "prune",
            now,
            _Pruned,
            finished=pad20(now.wall - rules.keep_finished),
            active=pad20(now.wall - rules.keep_sessions),
            spent=pad20(now.wall - rules.keep_sessions),
            daemons=pad20(now.wall - rules.keep_finished),
            budgets=pad20(now.wall - max(rules.keep_sessions, LONGEST_WINDOW)),
            limit=limit,
        )
        return Pruned(requests=pruned.requests, conversations=pruned.conversations, more=pruned.more)

    async def set_log_watermark(self, watermark: int) -> None:
        """See the protocol: for requests that this daemon ran."""
        await self._calls.change("set_watermark", Moment(0, 0), Answer, watermark=key16(watermark))

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
        """The server's own settings decide the durability."""
        life = self._calls.life
        mark = None if new.chain is None else new.chain.mark
        answer, bytes_of = await self._calls.change(
            "enqueue",
            now,
            EnqueueMap,
            (new.body, mark) if mark is not None else (new.body,),
            request_id=new.request_id,
            conversation=new.conversation,
            route=new.route,
            rank=rank20(new.rank),
            priority=int(new.priority),
            model=new.model,
            agent=new.agent_id,
            due=None if new.due is None else pad20(new.due),
            expires=None if new.expires is None else pad20(new.expires),
            on_busy=new.on_busy.value,
            hold=new.hold_on_retry,
            fork_of=new.fork_of,
            requeued_from=new.requeued_from,
            question=write_question(new.question),
            text=None if new.question is None else new.question.text,
            offers=_offers(offers),
            paused=_paused(paused),
            token=str(self._chance.token()),
            chain=None if new.chain is None else membership_args(new.chain),
            caps=caps_args(caps),
            demand=demand_args(new.demand),
            flow=new.flow or None,
        )
        if answer.error == "dead_life":
            await self._rejoin(life, now)
            return await self.enqueue(new, offers, now, awaited=awaited, paused=paused, caps=caps)
        if answer.over is not None:
            raise over_budget(answer.over.over(caps))
        if answer.error is not None:
            raise self._refusal(answer, new)
        self._calls.tell(answer)
        existing = None if answer.existing is None else answer.existing.view(bytes_of)
        if existing is not None:
            return Enqueued(
                request_id=existing.request_id,
                conversation=existing.conversation,
                state=existing.state,
                position=existing.position or 0,
                holder=existing.holder,
                existing=existing,
            )
        return Enqueued(
            request_id=answer.request_id,
            conversation=answer.conversation,
            state=answer.state,
            ready=answer.ready,
            position=answer.position,
            holder=answer.holder,
            claim=None if answer.claim is None else self._started(answer.claim.claimed(new.body)),
            stopping=answer.stopping,
            passing=answer.passing,
            injections=answer.injections,
            block=answer.block,
            chain=answer.chain,
        )

    def _refusal(self, answer: EnqueueMap, new: NewRequest) -> Exception:
        match answer.error:
            case "lock_id":
                return refusals.names_a_lock(new.request_id)
            case "other_content":
                return refusals.names_another_request(new.request_id)
            case "unknown_parent":
                parent = None if new.chain is None else new.chain.parent
                return refusals.unknown_parent(parent)
            case "chain_known":
                return refusals.names_an_older_chain(answer.name)
            case "no_fork_parent":
                return refusals.unknown_fork(new.fork_of)
            case "queue_full":
                limit = self._rules.max_queued
                return refusals.queue_full(limit)
            case "conversation_busy":
                return refusals.conversation_busy(answer.conversation_id, answer.holder, answer.since, answer.position)
        return InternalError(f"enqueue: {answer.error}")

    def _started(self, claim: Claimed) -> Claimed:
        self._running[claim.key] = claim.fence
        self._fence = max(self._fence, claim.fence)
        return claim

    async def claim(
        self, offers: Sequence[Offer], limit: int, now: Moment, paused: Paused = NO_PAUSE, caps: Caps = NO_CAPS
    ) -> Claims:
        """See the protocol."""
        life = self._calls.life
        answer, bodies = await self._calls.change(
            "claim",
            now,
            ClaimMap,
            offers=_offers(offers),
            limit=limit,
            paused=_paused(paused),
            aside=CLAIM_ASIDE,
            token=str(self._chance.token()),
            caps=caps_args(caps),
        )
        if answer.error == "dead_life":
            await self._rejoin(life, now)
            return await self.claim(offers, limit, now, paused, caps)
        if len(bodies) < len(answer.started):
            # The call was sent again, and answered as the first time; bodies are not kept with answers.
            bodies = await self._bodies([key16(run.key) for run in answer.started])
        self._calls.tell(answer)
        runs = zip(answer.started, bodies, strict=True)
        started = tuple(self._started(run.claimed(body)) for run, body in runs)
        stopped = [await self._end_over(one, caps, now) for one in answer.stopped]
        return Claims(
            started=started,
            blocked=(*answer.blocked, *(one for one in stopped if one is not None)),
            waits=answer.waits,
            notices=notices_of(answer.notices, caps),
            waiting=answer.waiting,
            more=answer.more,
        )

    async def _end_over(self, found: OverMap, caps: Caps, now: Moment) -> Ended | None:
        """End a request that waits for a budget which does not let it wait; None if that is done already."""
        block = block_of(found.over(caps))
        answer, _ = await self._calls.change("end_over", now, _EndedOver, key=found.key, block=to_builtins(block))
        self._calls.tell(answer)
        return answer.ended

    async def reconsider(self, budget: str | None, now: Moment, limit: int = 500) -> bool:
        """See the protocol."""
        answer, _ = await self._calls.change("reconsider", now, _Count, budget=budget, limit=limit)
        self._calls.on_work()
        return answer.count >= limit

    async def bring_back(self, paused: Paused, now: Moment, after: str | None = None, limit: int = 500) -> str | None:
        """See the protocol. A cursor is a lane's name and the last that was looked at in it."""
        lane, _, entry = (after or "").rpartition("\n")
        answer, _ = await self._calls.change(
            "bring_back", now, _BroughtBack, paused=_paused(paused), lane=lane, entry=entry, limit=limit
        )
        return answer.after

    async def _bodies(self, keys: list[str]) -> list[bytes]:
        """The bodies of requests that now run here, fetched until they arrive: no other daemon would run them."""
        while True:
            try:
                _, bodies = await self._calls.read("bodies", Answer, keys=keys)
            except StoreUnavailable as error:
                if not self._links:
                    raise
                self._log.warning("claimed requests start later", error=error.message)
            else:
                return bodies

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
        """See the protocol."""
        kept = account.Spent(
            key=claim.key,
            conversation=claim.conversation,
            agent_id=claim.agent_id,
            first=attempt.outcome == "completed" and claim.head is None,
            attempt=msgspec.structs.replace(attempt, text=None, raw=None),
        )
        reminders = [reminder.text for reminder in claim.reminders]
        blobs = [encode(attempt), encode(kept), reminder_bytes(reminders)]
        left = None if aftermath is None else await aftermath_args(aftermath, blobs)
        tokens, estimated = charge(attempt, 0)
        answer, _ = await self._calls.change(
            "settle",
            now,
            SettleMap,
            blobs,
            key=key16(claim.key),
            fence=claim.fence,
            token=str(claim.token),
            number=attempt.number,
            ended=pad20(attempt.finished_at),
            session=attempt.provider_session,
            node=node_of(attempt),
            fork=attempt.fork,
            provider=attempt.provider,
            interrupted=attempt.outcome == "interrupted",
            size=len(claim.body) + said_chars(attempt) + sum(map(len, reminders)),
            answer=answer_chars(attempt),
            tokens=None if estimated else tokens,
            text_tokens=tokens if estimated else 0,
            spent=spent_args(spent),
            caps=caps_args(caps),
            context=None if attempt.usage is None else attempt.usage.input_size + attempt.usage.output_tokens,
            aftermath=left,
            **_verdict(verdict),
        )
        if answer.error == "no_chain":
            raise InternalError("an aftermath of a request in no chain", request_id=claim.request_id)
        if answer.error == "not_kept":
            raise refusals.late_answer(claim.request_id)
        if self._running.get(claim.key) == claim.fence:
            del self._running[claim.key]
        # A slot is free, whatever became ready.
        self._calls.on_work()
        return Settled(
            state=answer.state,
            fenced=answer.fenced,
            turn=answer.turn,
            finished_at=answer.finished_at,
            passing=answer.passing,
            due=answer.due,
            fork=answer.fork,
            injections=answer.injections,
            notices=notices_of(answer.notices, caps),
        )

    async def cancel(self, request_id: str, now: Moment, by: str | None = None) -> Cancelled:
        """See the protocol."""
        answer, _ = await self._calls.change("cancel", now, CancelMap, request_id=request_id, by=by)
        if answer.error is not None:
            raise refusals.unknown_request(request_id)
        self._calls.tell(answer)
        return Cancelled(
            outcome=answer.outcome,
            request_id=answer.request_id,
            conversation=answer.conversation,
            state=answer.state,
            passing=answer.passing,
            injections=answer.injections,
        )

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
        answer, _ = await self._calls.change(
            "answer",
            now,
            AnsweredMap,
            request_id=request_id,
            asked=write_question(asked),
            answered=write_question(answered),
            due=pad20(due or now.wall),
            expires=None if expires is None else pad20(expires),
            state=None if end is None else end.state.value,
            error=None if end is None else end.error,
            message=None if end is None else end.message,
        )
        if answer.error is not None:
            raise refusals.unknown_request(request_id)
        self._calls.tell(answer)
        return Answered(
            taken=answer.taken,
            conversation=answer.conversation,
            state=answer.state,
            passing=answer.passing,
            injections=answer.injections,
        )


def _offers(offers: Sequence[Offer]) -> list[tuple[object, ...]]:
    return [
        (offer.route, offer.provider, offer.limit, offer.by_node)
        if offer.terms is None
        else (offer.route, offer.provider, offer.limit, offer.by_node, _terms(offer.terms))
        for offer in offers
    ]


def _paused(paused: Paused) -> dict[str, dict[str, bool]] | None:
    if not paused:
        return None
    return {
        "agents": dict.fromkeys(paused.agents, True),
        "conversations": dict.fromkeys(paused.conversations, True),
        "priorities": {str(int(priority)): True for priority in paused.priorities},
    }


def _terms(terms: Terms) -> tuple[int | bool, ...]:
    known = False if terms.known is None else terms.known
    return (terms.probes or False, terms.requests or False, terms.tokens or False, known)


def _verdict(verdict: Verdict) -> dict[str, object]:
    """A verdict as arguments of `settle`."""
    match verdict:
        case Finish():
            return {
                "verdict": "finish",
                "state": verdict.state.value,
                "error": verdict.error,
                "message": verdict.message,
            }
        case Retry():
            return {
                "verdict": "retry",
                "at": pad20(verdict.at),
                "route": verdict.route,
                "parked": verdict.parked,
                "error": verdict.error,
                "message": verdict.message,
                "question": write_question(verdict.question),
                "asks": verdict.question is not None and verdict.question.open,
            }
        case GiveBack():
            return {"verdict": "give_back"}
