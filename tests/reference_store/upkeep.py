"""Due work and recovery of the memory store: recovery, due and late requests, expired locks, pruning."""

from __future__ import annotations

from ksi.clock import Moment
from ksi.errors import FailureClass
from ksi.request import Attempt, Outcome, State, decode_body
from ksi.store.admission import Routing
from ksi.store.image.data import Conversation, Member, Request
from ksi.store.image.ordered import Key
from ksi.store.questions import is_asking
from ksi.store.values import Ended, Expiry, Lapsed, Paused, Pruned, Recovery, StoreRules
from tests.reference_store.budgets import Budgets
from tests.reference_store.chains import Chains
from tests.reference_store.data import ASIDE, MemoryData, is_stopped
from tests.reference_store.lines import Lines


class Upkeep:
    """The work that no client asks for."""

    def __init__(self, rules: StoreRules, data: MemoryData, lines: Lines, chains: Chains, budgets: Budgets) -> None:
        self._budgets = budgets
        self._rules = rules
        self._data = data
        self._lines = lines
        self._chains = chains

    def hear(self, node: str, now: Moment) -> None:
        """A machine gives a sign of life."""
        self._data.heard[node] = now.mono

    def lose_silent(self, now: Moment) -> None:
        """Release requests bound to machines without a heartbeat for too long (D4)."""
        silent = now.mono - self._rules.node_timeout
        for node in [node for node, heard in self._data.heard.items() if heard <= silent]:
            if self._data.lose(node):
                self._lines.on_work()

    def recover(self, now: Moment) -> Recovery:
        """See `Store.open`. Waiters without a deadline go: the connection that they were tied to died (L5)."""
        for lock in [self._data.lock(key) for key in self._data.waiters.walk()]:
            self._lines.begin_patience_anew(lock, now)
        for lock in [self._data.lock(key) for key in self._data.locks.walk()]:
            self._lines.renew(lock, now)
        requeued: list[str] = []
        ended: list[Ended] = []
        for request in [self._data.request(key) for key in self._data.active.walk()]:
            end = self._recover(request, now)
            if end is None:
                requeued.append(request.request_id)
            else:
                ended.append(end)
        if len(self._data.ready):
            self._lines.on_work()
        return Recovery(requeued=tuple(requeued), ended=tuple(ended))

    def _recover(self, request: Request, now: Moment) -> Ended | None:
        """Requeue or end the runs of a dead daemon (Q3)."""
        request.interruptions += 1
        attempt = Attempt(
            number=request.attempt,
            provider=request.provider or "",
            outcome=Outcome.INTERRUPTED,
            started_at=request.started_at or 0,
            finished_at=now.wall,
            asked=request.model,
            mcp=decode_body(request.body).mcp,
            error=FailureClass.DAEMON_RESTART.value,
        )
        self._data.ended(request, attempt)
        self._budgets.interrupted(request)
        self._chains.attempt_ended(request, attempt)
        self._chains.put_reminders_back(request)
        if request.cancelling:
            return self._lines.end(request, State.CANCELLED, now, FailureClass.CANCELLED.value)
        if self._rules.fail_interrupted or request.interruptions >= self._rules.max_interruptions:
            return self._lines.end(request, State.FAILED, now, FailureClass.DAEMON_RESTART.value)
        with self._data.changing(request):
            request.state = State.QUEUED
        self._lines.refresh(request.conversation, now)
        return None

    def expire(self, now: Moment, limit: int = 500) -> Expiry:
        """See `Store.expire`. Waiters that gave up go first, so that none of them is granted a lock that lapses now."""
        woken = 0
        ended: list[Ended] = []
        lapsed: list[Lapsed] = []
        for _ in range(limit):
            match self._expire_one(now):
                case Lapsed() as lapse:
                    lapsed.append(lapse)
                case Ended() as end:
                    ended.append(end)
                case State.QUEUED:
                    woken += 1
                case None:
                    break
        woken += self._budgets.bring_back_ended(now.wall, limit)
        walls = [key[0] for key in (self._data.delayed.first(), self._data.perishable.first()) if key]
        if (over := self._budgets.next_end()) is not None:
            walls.append(over)
        monos = [key[0] for key in (self._data.locks.first(), self._data.deadlines.first()) if key]
        next_wall = min(walls, default=None)
        next_mono = min(monos, default=None)
        return Expiry(
            woken=woken,
            ended=tuple(ended),
            lapsed=tuple(lapsed),
            next_wall=next_wall,
            next_mono=next_mono,
            more=(next_wall is not None and next_wall <= now.wall) or (next_mono is not None and next_mono <= now.mono),
        )

    def _expire_one(self, now: Moment) -> Lapsed | Ended | State | None:
        """Do the next thing that time asks for; a woken request answers with its new state."""
        if (waiter := self._reached(self._data.deadlines.first(), now.mono)) is not None:
            return self._lapse(waiter, now)
        if isinstance(late := self._reached(self._data.perishable.first(), now.wall), Request):
            return self._lines.end(late, State.EXPIRED, now)
        if isinstance(due := self._reached(self._data.delayed.first(), now.wall), Request):
            with self._data.changing(due):
                joins = not due.holds
                due.state, due.due = State.QUEUED, None
            if joins and due.flow is not None:
                self._lines.take_turn(due, due.flow)
            self._lines.refresh(due.conversation, now)
            return due.state
        if (holder := self._reached(self._data.locks.first(), now.mono)) is not None:
            return self._lapse(holder, now)
        return None

    def _reached(self, key: Key | None, time: int) -> Member | None:
        return self._data.members[key[-1]] if key is not None and key[0] <= time else None

    def _lapse(self, lock: Member, now: Moment) -> Lapsed:
        held = lock.holds
        passing = self._lines.take_away(lock, now)
        return Lapsed(request_id=lock.request_id, conversation=lock.conversation.name, held=held, passing=passing)

    def bring_back(self, paused: Paused, after: str | None, limit: int) -> str | None:
        """See `Store.bring_back`."""
        found = [key for key in self._data.ready.walk() if key[1] == ASIDE and (after is None or str(key) > after)]
        step = sorted(found, key=str)[:limit]
        for request in map(self._data.request, step):
            if request.key not in self._data.budget_waiters and not is_stopped(request, paused):
                self._data.move_ready(request.conversation, self._data.home(request.conversation, request.route))
                self._lines.on_work()
        return str(step[-1]) if len(step) == limit else None

    def unpark(self, route: str, now: Moment, limit: int = 500) -> int:
        """See `Store.unpark`."""
        waiting = [self._data.request(key) for key in self._data.delayed.walk() if key[0] > now.wall]
        parked = [one for one in waiting if one.state is State.PARKED and one.route == route]
        parked = [one for one in parked if not is_asking(one.state, one.question)][:limit]
        for request in parked:
            with self._data.changing(request):
                request.due = now.wall
        return len(parked)

    def prune(self, now: Moment, limit: int = 500) -> Pruned:
        """See `Store.prune`. A completed request also stays until the response log has its turn (R3), and one with an
        injection until that is routed (C3)."""
        finished = [
            self._data.request(key)
            for key in self._data.finished.walk()
            if key[0] + self._rules.keep_finished <= now.wall
        ]
        old = [
            request
            for request in finished
            if (request.turn is None or request.turn <= self._data.watermark)
            and not (request.link is not None and request.link.routing is Routing.UNROUTED)
        ]
        for request in old[:limit]:
            self._data.drop(request)
            if request.turn is not None:
                self._data.log.remove((request.turn,))
            self._data.reindex(request.conversation)
        deliveries = [
            self._data.injections.numbered[key[-1]]
            for key in self._data.injections.ended.walk()
            if key[0] + self._rules.keep_finished <= now.wall
        ]
        for injection in deliveries[:limit]:
            self._data.injections.drop(injection)
        self._forget_spent(now.wall - self._rules.keep_sessions)
        conversations = 0
        idle = self._first_idle(now)
        while idle is not None and conversations < limit - len(old):
            self.forget(idle)
            conversations += 1
            idle = self._first_idle(now)
        return Pruned(
            requests=min(len(old), limit),
            conversations=conversations,
            more=len(old) > limit or len(deliveries) > limit or idle is not None,
        )

    def _forget_spent(self, oldest: int) -> None:
        """The account goes back as far as conversations are kept."""
        kept = next((n for n, spent in enumerate(self._data.spent) if spent.attempt.finished_at > oldest), None)
        del self._data.spent[:kept]

    def _first_idle(self, now: Moment) -> Conversation | None:
        """The conversation that has been idle longest, if it is past its retention and its head is in the log."""
        for active_at, number in self._data.idle.walk():
            conversation = self._data.numbered[number]
            if active_at + self._rules.keep_sessions > now.wall:
                break
            if conversation.head is None or conversation.head <= self._data.watermark:
                return conversation
        return None

    def forget(self, conversation: Conversation) -> None:
        """Take a conversation away with its turns; nothing else of it is kept."""
        for index, key in conversation.entries:
            index.remove(key)
        for turn in conversation.turns:
            del self._data.turns[turn]
        del self._data.conversations[conversation.name]
        del self._data.numbered[conversation.number]
        for alias in conversation.aliases:
            del self._data.aliases[alias]
        for number in conversation.forks:
            self._data.trees.remove((conversation.root, number))
            self._data.fork_order.remove((number,))
            del self._data.forks[number]
        parent = conversation.parent
        if parent is not None:
            parent.children -= 1
            self._data.reindex(parent)
