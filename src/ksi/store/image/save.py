"""The records of an image."""

from __future__ import annotations

from collections.abc import Iterator

from ksi.clock import Moment
from ksi.request import Attempt, State
from ksi.store.admission import Routing
from ksi.store.chains import InjectionState
from ksi.store.image.chains import Chain, Injection, Link
from ksi.store.image.data import Conversation, ExternalLock, Image, Request
from ksi.store.snapshot.records import (
    Figures,
    Record,
    SavedAttempt,
    SavedChain,
    SavedConversation,
    SavedFork,
    SavedInjection,
    SavedLock,
    SavedMember,
    SavedRecord,
    SavedRequest,
    SavedSpare,
    pack,
    stopped,
)
from ksi.store.values import Fork


def save(data: Image, now: Moment) -> list[Record]:
    """Everything, as of this moment."""
    return list(_Save(data, now).records())


class _Save:
    """One snapshot being made. Attempts have no numbers here: they get some, in the order in which they ended."""

    def __init__(self, data: Image, now: Moment) -> None:
        self._data = data
        self._now = now
        self._ids: dict[int, int] = {}
        """By the identity of an attempt."""
        self._records = {id(record.attempt): record for record in data.turns.values()}
        """Likewise."""
        self._turns: dict[int, int] = {}
        """From this store's turns to saved ids."""
        self._number_attempts()

    def _number_attempts(self) -> None:
        turn_of = {identity: record.turn.id for identity, record in self._records.items()}
        accounted = [spent.attempt for spent in self._data.spent]
        known = set(map(id, accounted))
        kept = [attempt for request in self._requests() for attempt in request.attempts]
        kept += [record.attempt for record in self._data.turns.values()]
        older = {id(attempt): attempt for attempt in kept if id(attempt) not in known}
        by_end = sorted(older.values(), key=lambda attempt: (turn_of.get(id(attempt), 0), attempt.finished_at))
        for number, attempt in enumerate([*by_end, *accounted], 1):
            self._ids[id(attempt)] = number
            if id(attempt) in turn_of:
                self._turns[turn_of[id(attempt)]] = number

    def _requests(self) -> Iterator[Request]:
        return (member for member in self._data.members.values() if isinstance(member, Request))

    def records(self) -> Iterator[Record]:
        """All, in their order."""
        data = self._data
        yield self._figures()
        yield from (self._conversation(conversation) for _, conversation in sorted(data.numbered.items()))
        forks = {number: owner for owner in data.conversations.values() for number in owner.forks}
        yield from (self._fork(forks[number], data.forks[number]) for number in sorted(forks))
        yield from (self._chain(chain) for _, chain in sorted(data.chains.numbered.items()))
        coming = len(self._ids)
        for _, member in sorted(data.members.items()):
            if isinstance(member, Request):
                coming += member.state is State.RUNNING
                yield self._request(member, coming)
            elif isinstance(member, ExternalLock):
                yield self._lock(member)
        yield from self._spare()
        yield from (self._injection(injection) for _, injection in sorted(data.injections.numbered.items()))
        for name, kept in sorted(data.records.kept.items()):
            yield SavedRecord(name=name, value=pack(kept.value))

    def _figures(self) -> Figures:
        ended = {state.value: self._data.states[state] for state in State if state.final}
        ended[State.CANCELLED.value] += sum(r.cancelling for r in self._requests() if r.state is State.RUNNING)
        logged = max((saved for turn, saved in self._turns.items() if turn <= self._data.watermark), default=0)
        return Figures(
            ended=ended, fence=self._data.last_number("fence"), logged=logged, routes=tuple(sorted(self._data.routes))
        )

    def _conversation(self, conversation: Conversation) -> SavedConversation:
        return SavedConversation(
            name=conversation.name,
            created_at=conversation.created_at,
            active_at=conversation.active_at,
            turns=len(conversation.turns),
            head=None if conversation.head is None else self._turns[conversation.head],
            forked_from=None if conversation.parent is None else conversation.parent.name,
            agents=tuple(conversation.agents),
            aliases=tuple(conversation.aliases),
        )

    def _fork(self, owner: Conversation, fork: Fork) -> SavedFork:
        return SavedFork(
            conversation=owner.name,
            parent=fork.parent,
            child=fork.child,
            request_id=fork.request_id,
            at=fork.at,
            kind=fork.kind,
        )

    def _attempt(self, attempt: Attempt) -> SavedAttempt:
        number = self._ids[id(attempt)]
        record = self._records.get(id(attempt))
        previous = None if record is None or record.turn.previous is None else self._turns[record.turn.previous]
        return SavedAttempt.of(number, attempt, previous)

    def _request(self, request: Request, coming: int) -> SavedRequest:
        running = request.state is State.RUNNING
        saved = SavedRequest(
            key=request.key,
            request_id=request.request_id,
            conversation=request.conversation.name,
            state=request.state,
            holds=request.holds,
            priority=request.priority,
            rank=request.rank,
            route=request.route,
            model=request.model,
            agent_id=request.agent_id,
            hold_on_retry=request.hold_on_retry,
            requeued_from=request.requeued_from,
            enqueued_at=request.enqueued_at,
            due=request.due,
            expires=request.expires,
            begun=request.attempt,
            interruptions=request.interruptions,
            interrupted_by=request.interrupted_by,
            fence=request.fence,
            since=request.conversation.since if request.holds else None,
            provider=request.provider if running or request.state is State.COMPLETED else None,
            started_at=request.started_at,
            finished_at=request.finished_at,
            error=request.error,
            message=request.message,
            question=request.question,
            body=pack(request.body),
            attempts=tuple(map(self._attempt, request.attempts)),
            member=None if request.link is None else _member(request.link),
            reminders=self._reminders(request.turn),
        )
        return stopped(saved, coming, self._now, cancelling=request.cancelling) if running else saved

    def _reminders(self, turn: int | None) -> tuple[str, ...]:
        return () if turn is None else self._data.turns[turn].turn.reminders

    def _chain(self, chain: Chain) -> SavedChain:
        members = [self._data.request((key,)) for key in chain.members]
        cut = [one.link.estimate for one in members if one.state is State.RUNNING and one.link is not None]
        return SavedChain(
            name=chain.name,
            created_at=chain.created_at,
            started_at=chain.started_at,
            limits=chain.limits,
            used=chain.used + sum(cut),
            estimated=chain.estimated + sum(cut),
            closed=chain.closed,
            tripped=chain.tripped,
            guard_messages=chain.guard_messages,
            resets=chain.resets,
            reset_key=chain.reset_key,
            deepest=chain.deepest,
        )

    def _injection(self, injection: Injection) -> SavedInjection:
        taken = injection.state == InjectionState.TAKEN
        return SavedInjection(
            injection_id=injection.injection_id,
            chain=injection.chain,
            parent=injection.parent,
            parent_key=injection.parent_key,
            target=injection.target,
            direct=injection.direct,
            trigger=injection.trigger,
            state=InjectionState.QUEUED if taken else injection.state,
            created_at=injection.created_at,
            finished_at=injection.finished_at,
            request_id=None if taken else injection.request_id,
            reason=injection.reason,
            text=injection.text,
            child=injection.child,
        )

    def _lock(self, lock: ExternalLock) -> SavedLock:
        return SavedLock(
            key=lock.key,
            request_id=lock.request_id,
            conversation=lock.conversation.name,
            holds=lock.holds,
            priority=lock.priority,
            rank=lock.rank,
            enqueued_at=lock.enqueued_at,
            fence=lock.fence,
            since=lock.conversation.since if lock.holds else None,
            patience=lock.patience,
            metadata=None if lock.metadata is None else pack(lock.metadata),
        )

    def _spare(self) -> Iterator[SavedSpare]:
        """Attempts whose request is gone, as long as their conversation is there."""
        kept = {id(attempt) for request in self._requests() for attempt in request.attempts}
        for spent in self._data.spent:
            if id(spent.attempt) not in kept and spent.conversation in self._data.conversations:
                turn = self._records.get(id(spent.attempt))
                yield SavedSpare(
                    key=spent.key,
                    conversation=spent.conversation,
                    agent_id=spent.agent_id,
                    body=None if turn is None else pack(turn.turn.body),
                    saved=self._attempt(spent.attempt),
                    reminders=() if turn is None else turn.turn.reminders,
                )


def _member(link: Link) -> SavedMember:
    return SavedMember(
        chain=link.chain.name,
        parent=link.parent,
        parent_key=link.parent_key,
        depth=link.depth,
        limits=link.limits,
        estimate=link.estimate,
        output_cap=link.output_cap,
        guard=link.guard,
        injects=link.routing is not Routing.NONE,
        routed=link.routing is Routing.ROUTED,
        carries=link.carries,
        mark=link.mark,
        result=link.result,
        block=link.block,
        tokens=link.tokens,
        estimated=link.estimated,
    )
