"""An image of the records of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable

from ksi.clock import Moment
from ksi.request import State, Turn
from ksi.store.account import Spent
from ksi.store.binding import node_of
from ksi.store.chains import InjectionState
from ksi.store.image.chains import Chain, Injection, Link
from ksi.store.image.data import Conversation, ExternalLock, Image, Request, TurnRecord
from ksi.store.snapshot.records import (
    FENCE_LEAP,
    Figures,
    Loaded,
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
    admitted,
    begin,
    contradiction,
    loaded,
    unpack,
    whole,
)
from ksi.store.values import Fork, StoreRules


def load(data: Image, rules: StoreRules, records: Iterable[Record], now: Moment) -> Loaded:
    """Put a snapshot into an image that has neither requests nor conversations.

    The state of providers and the known machines may exist already. An image whose load failed is of no use.

    Raises:
        CheckpointInvalid: the records do not fit together.
    """
    loading = _Load(data, rules, now)
    figures, rest = begin(whole(records))
    try:
        for record in rest:
            loading.take(record)
    except KeyError as error:
        raise contradiction(f"it names {error.args[0]!r} and does not have it") from None
    loading.finish(figures, max(figures.fence, data.last_number("fence")) + FENCE_LEAP)
    return Loaded(interrupted=tuple(loading.interrupted), failed=tuple(loading.failed))


class _Load:
    """A snapshot on its way into an image."""

    def __init__(self, data: Image, rules: StoreRules, now: Moment) -> None:
        self._data = data
        self._rules = rules
        self._now = now
        self._carriers: dict[str, SavedRequest] = {}
        self._turns: dict[int, TurnRecord] = {}
        self._spent: dict[int, Spent] = {}
        self.interrupted: list[str] = []
        self.failed: list[str] = []

    def take(self, record: Record) -> None:
        """One record."""
        match record:
            case SavedConversation():
                self._take_conversation(record)
            case SavedFork():
                fork = Fork(
                    parent=record.parent,
                    child=record.child,
                    request_id=record.request_id,
                    at=record.at,
                    kind=record.kind,
                )
                self._data.record_fork(self._data.conversations[record.conversation], fork)
            case SavedRequest():
                self._take_request(record)
            case SavedLock():
                self._take_lock(record)
            case SavedSpare():
                self._take_attempt(record, record.key, record.saved)
            case SavedChain():
                self._take_chain(record)
            case SavedInjection():
                self._take_injection(record)
            case SavedRecord():
                self._data.records.take(record.name, unpack(record.value))
            case Figures():
                raise contradiction("its figures come twice")

    def _take_conversation(self, record: SavedConversation) -> None:
        if self._data.find(record.name) is not None:
            raise contradiction(f"conversation {record.name!r} comes twice")
        parent = None if record.forked_from is None else self._data.conversations[record.forked_from]
        conversation = Conversation(
            number=self._data.number("conversation"),
            name=record.name,
            created_at=record.created_at,
            active_at=record.active_at,
            parent=parent,
            head=record.head,
            agents=list(record.agents),
            aliases=list(record.aliases),
        )
        self._data.conversations[record.name] = self._data.numbered[conversation.number] = conversation
        self._data.aliases.update(dict.fromkeys(record.aliases, conversation))
        if parent is not None:
            parent.children += 1

    def _take_request(self, record: SavedRequest) -> None:
        self._refuse_known(record.request_id, record.key)
        rules = self._rules
        record = admitted(
            record, self._now, fail_interrupted=rules.fail_interrupted, max_interruptions=rules.max_interruptions
        )
        if record.interrupted:
            (self.failed if record.state.final else self.interrupted).append(record.request_id)
        if record.state is State.RUNNING:
            raise contradiction(f"request {record.request_id!r} is running")
        conversation = self._data.conversations[record.conversation]
        request = Request(
            key=record.key,
            request_id=record.request_id,
            conversation=conversation,
            rank=record.rank,
            priority=record.priority,
            enqueued_at=record.enqueued_at,
            fence=record.fence,
            state=record.state,
            body=unpack(record.body),
            route=record.route,
            model=record.model,
            agent_id=record.agent_id,
            hold_on_retry=record.hold_on_retry,
            requeued_from=record.requeued_from,
            due=record.due,
            expires=record.expires,
            attempt=record.begun,
            provider=record.provider,
            started_at=record.started_at,
            finished_at=record.finished_at,
            error=record.error,
            message=record.message,
            question=record.question,
            interruptions=record.interruptions,
            interrupted_by=record.interrupted_by,
            turn=record.turn,
        )
        for saved in record.attempts:
            self._take_attempt(record, record.key, saved, record.request_id)
            request.attempts.append(self._spent[saved.id].attempt)
        if record.holds:
            self._hold(request, record.since)
        self._data.states[request.state] += not request.state.final
        if record.member is not None:
            request.link = self._link(record.member, record)
        self._data.put(request)
        conversation.active_at = max(conversation.active_at, request.finished_at or 0)

    def _link(self, member: SavedMember, record: SavedRequest) -> Link:
        chain = self._data.chains.named[member.chain]
        chain.members.append(record.key)
        chain.notices += member.guard
        chain.unfinished += not record.state.final
        if member.carries:
            self._carriers[record.request_id] = record
        return Link(
            chain=chain,
            parent=member.parent,
            parent_key=member.parent_key,
            depth=member.depth,
            limits=member.limits,
            estimate=member.estimate,
            output_cap=member.output_cap,
            guard=member.guard,
            routing=member.routing(record.state),
            mark=member.mark,
            result=member.result,
            block=member.block,
            tokens=member.tokens,
            estimated=member.estimated,
            carries=member.carries,
        )

    def _take_chain(self, record: SavedChain) -> None:
        if record.name in self._data.chains.named:
            raise contradiction(f"chain {record.name!r} comes twice")
        chain = Chain(
            number=self._data.number("chain"),
            name=record.name,
            limits=record.limits,
            created_at=record.created_at,
            started_at=record.started_at,
            used=record.used,
            estimated=record.estimated,
            closed=record.closed,
            tripped=record.tripped,
            guard_messages=record.guard_messages,
            resets=record.resets,
            reset_key=record.reset_key,
            deepest=record.deepest,
        )
        self._data.chains.add(chain)

    def _take_injection(self, record: SavedInjection) -> None:
        if record.injection_id in self._data.injections.named:
            raise contradiction(f"delivery {record.injection_id!r} comes twice")
        record = loaded(record, self._carriers.get(record.injection_id))
        injection = Injection(
            number=self._data.number("injection"),
            injection_id=record.injection_id,
            chain=record.chain,
            parent=record.parent,
            parent_key=record.parent_key,
            target=record.target,
            trigger=record.trigger,
            text=record.text,
            created_at=record.created_at,
            child=record.child,
            direct=record.direct,
            state=record.state,
            finished_at=record.finished_at,
            request_id=record.request_id,
            reason=record.reason,
        )
        self._data.injections.add(injection)
        if injection.state == InjectionState.QUEUED and not injection.direct:
            self._data.conversations[injection.target].reminders.append(injection.number)

    def _take_lock(self, record: SavedLock) -> None:
        """A holder gets a full expiry; a waiter without a timeout was tied to a connection that is gone."""
        conversation = self._data.conversations[record.conversation]
        if not record.holds and record.patience is None:
            conversation.active_at = max(conversation.active_at, self._now.wall)
            return
        self._refuse_known(record.request_id, record.key)
        lock = ExternalLock(
            key=record.key,
            request_id=record.request_id,
            conversation=conversation,
            rank=record.rank,
            priority=record.priority,
            enqueued_at=record.enqueued_at,
            fence=record.fence,
            metadata=None if record.metadata is None else unpack(record.metadata),
            deadline=None if record.patience is None else self._now.mono + record.patience,
            patience=record.patience,
        )
        if record.holds:
            self._hold(lock, record.since)
            self._renew(lock)
        self._data.put(lock)

    def _hold(self, member: Request | ExternalLock, since: int | None) -> None:
        conversation = member.conversation
        if conversation.holder is not None:
            raise contradiction(f"conversation {conversation.name!r} has two holders")
        conversation.holder, conversation.since = member, since

    def _renew(self, lock: ExternalLock) -> None:
        """Reset a held lock's expiry: it ends by the monotonic clock, the wall time is for people."""
        lock.ends = self._now.mono + self._rules.lock_expiry
        lock.expires_at = self._now.wall + self._rules.lock_expiry

    def _refuse_known(self, request_id: str, key: int) -> None:
        if request_id in self._data.ids or key in self._data.members:
            raise contradiction(f"request {request_id!r} comes twice")

    def _take_attempt(
        self, of: SavedRequest | SavedSpare, key: int, saved: SavedAttempt, request_id: str | None = None
    ) -> None:
        """An attempt of a request, or one whose request is gone."""
        conversation, agent_id, body = of.conversation, of.agent_id, of.body
        if saved.id in self._spent:
            raise contradiction(f"attempt {saved.id} comes twice")
        if conversation not in self._data.conversations:
            raise KeyError(conversation)
        attempt = saved.whole
        self._spent[saved.id] = Spent(
            key=key,
            conversation=conversation,
            agent_id=agent_id,
            attempt=attempt,
            first=saved.is_turn and saved.previous is None,
        )
        if saved.is_turn and body is not None:
            turn = Turn(
                id=saved.id,
                body=unpack(body),
                text=attempt.text or "",
                provider=attempt.provider,
                provider_session=attempt.provider_session,
                finished_at=attempt.finished_at,
                previous=saved.previous,
                last_message=attempt.last_message,
                conversation=conversation,
                reminders=of.reminders,
                node=node_of(attempt),
                content=attempt.content,
            )
            self._turns[saved.id] = TurnRecord(
                turn=turn, request_id=request_id or "", conversation=conversation, agent_id=agent_id, attempt=attempt
            )
            if request_id is not None:
                self._data.log.add((saved.id,))

    def finish(self, figures: Figures, fence: int) -> None:
        """All records are in: put turns and account in order, and let the lines come forward."""
        data = self._data
        for state, count in figures.ended.items():
            data.states[State(state)] = count + (len(self.failed) if state == State.FAILED.value else 0)
        data.routes.update(figures.routes)
        data.watermark = figures.logged
        data.spent = [spent for _, spent in sorted(self._spent.items())]
        for number, record in sorted(self._turns.items()):
            conversation = data.conversations[record.conversation]
            data.turns[number] = record
            conversation.turns.append(number)
            conversation.provider = record.attempt.provider
            conversation.provider_session = record.attempt.provider_session
        data.count_on(
            {
                "turn": max([*self._spent, figures.logged], default=0),
                "member": max(
                    [
                        *data.members,
                        *(spent.key for spent in data.spent),
                        *(injection.parent_key for injection in data.injections.numbered.values()),
                    ],
                    default=0,
                ),
                "fence": fence,
            }
        )
        for conversation in data.conversations.values():
            # Its machine has the usual time to show that it is there.
            if (binding := data.binding(conversation)) is not None:
                data.heard.setdefault(binding.node, self._now.mono)
            self._come_forward(conversation)

    def _come_forward(self, conversation: Conversation) -> None:
        """Let an external waiter at the head of a free line in."""
        if conversation.holder is not None:
            return
        conversation.since = None
        head = self._data.head_of_line(conversation)
        if isinstance(head, ExternalLock):
            with self._data.moving(head):
                conversation.holder, conversation.since = head, self._now.wall
                head.fence = self._data.number("fence")
                self._renew(head)
