"""The memory store's reading verbs and views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ksi.request import WAITING_STATES, Priority, State, Turn, answer_chars, decode_body, said_in
from ksi.store.account import report
from ksi.store.image.data import Conversation, ExternalLock, Member, Request
from ksi.store.rules import refusals
from ksi.store.rules.terms import Phrase, has_all
from ksi.store.usage import Pricing, UsageQuery, UsageReport
from ksi.store.values import (
    Fork,
    Found,
    LineEntry,
    Listing,
    LockView,
    LoggedTurn,
    Named,
    Page,
    RequestRow,
    RequestView,
    SearchPage,
    SessionView,
    Totals,
)
from tests.reference_store.chain_reads import MemoryChainReads
from tests.reference_store.data import name_of
from tests.reference_store.index import Listed


class MemoryReads(MemoryChainReads):
    """The verbs that change nothing; `ksi.store.base.Store` documents each."""

    async def get(self, request_id: str) -> RequestView | None:
        """See the protocol."""
        request = self._data.ids.get(request_id)
        return self._view(request) if isinstance(request, Request) else None

    async def find(self, kind: Named, beginning: str, limit: int) -> tuple[str, ...]:
        """See the protocol."""
        names = self._data.ids if kind == "request" else self._data.conversations
        return tuple(sorted(name for name in names if name.startswith(beginning))[:limit])

    async def history(self, head: int, max_chars: int) -> list[Turn]:
        """See the protocol."""
        turns: list[Turn] = []
        chars = 0
        record = self._data.turns.get(head)
        while record is not None:
            chars += record.turn.chars
            if turns and chars > max_chars:
                break
            turns.append(record.turn)
            record = None if record.turn.previous is None else self._data.turns.get(record.turn.previous)
        return turns

    async def session(self, conversation: str) -> SessionView | None:
        """See the protocol."""
        found = self._data.find(conversation)
        return None if found is None else self._session_view(found)

    async def sessions(self, limit: int, cursor: str | None = None, agent_id: str | None = None) -> Page[SessionView]:
        """See the protocol."""
        if agent_id is None:
            listed = Listed(name="sessions", index=self._data.sessions, shape=(int,), backwards=True)
        else:
            listed = Listed(
                name="agent_sessions",
                index=self._data.agent_sessions,
                shape=(str, int),
                prefix=(agent_id,),
                backwards=True,
            )
        return listed.page(limit, cursor, lambda key: self._session_view(self._data.numbered[key[-1]]))

    async def lock(self, conversation: str, line_limit: int) -> LockView | None:
        """See the protocol."""
        found = self._data.find(conversation)
        return None if found is None else self._lock_view(found, line_limit)

    async def locks(self, limit: int, cursor: str | None = None) -> Page[LockView]:
        """See the protocol."""
        listed = Listed(name="locks", index=self._data.held, shape=(int,))
        return listed.page(limit, cursor, lambda key: self._lock_view(self._data.numbered[key[-1]], 0))

    async def forks(self, limit: int, cursor: str | None = None, conversation: str | None = None) -> Page[Fork]:
        """See the protocol."""
        listed = Listed(name="forks", index=self._data.fork_order, shape=(int,))
        if conversation is not None:
            found = self._data.find(conversation)
            root = 0 if found is None else found.root
            listed = Listed(name="tree", index=self._data.trees, shape=(int, int), prefix=(root,))
        return listed.page(limit, cursor, lambda key: self._data.forks[key[-1]])

    async def requests(self, listing: Listing, limit: int, cursor: str | None = None) -> Page[RequestRow]:
        """See the protocol."""
        return self._listed(listing).page(limit, cursor, lambda key: _row(self._data.members[key[-1]]))

    async def totals(self) -> Totals:
        """See the protocol."""
        return Totals(
            **{state.value: count for state, count in self._data.states.items()},
            locks=len(self._data.held),
            external_locks=len(self._data.locks),
            external_waiters=len(self._data.waiters),
            conversations=len(self._data.conversations),
        )

    async def waiting_by_route(self) -> Mapping[str, int]:
        """See the protocol."""
        ready = self._data.ready
        return {route: min(ready.count((route,)), self._rules.position_limit) for route in self._data.routes}

    async def waiting_by_priority(self) -> Mapping[Priority, int] | None:
        """See the protocol."""
        waiting = [one for one in self._data.members.values() if isinstance(one, Request)]
        return Counter(one.priority for one in waiting if one.state in WAITING_STATES)

    async def usage(self, query: UsageQuery, pricing: Pricing) -> UsageReport:
        """See the protocol."""
        conversation, members = None, None
        if query.conversation is not None:
            found = self._data.find(query.conversation)
            conversation = "" if found is None else found.name
        if query.chain is not None:
            chain = self._data.chains.named.get(query.chain)
            members = frozenset(() if chain is None else chain.members)
        return report(self._data.spent, query, pricing, conversation=conversation, members=members)

    async def search(self, terms: Sequence[Phrase], limit: int, cursor: str | None = None) -> SearchPage:
        """See the protocol: it reads everything each time."""
        if cursor is not None and not cursor.isdecimal():
            raise refusals.foreign_cursor()
        before = 2**62 if cursor is None else int(cursor)
        found = [
            Found(
                turn=number,
                conversation=record.conversation,
                body=record.turn.body,
                text=record.turn.text,
                provider=record.turn.provider,
                finished_at=record.turn.finished_at,
            )
            for number, record in sorted(self._data.turns.items(), reverse=True)
            if number < before and has_all(f"{said_in(decode_body(record.turn.body))}\n{record.turn.text}", terms)
        ]
        more = len(found) > limit
        return SearchPage(items=tuple(found[:limit]), cursor=str(found[limit - 1].turn) if more else None)

    async def log_after(self, watermark: int, limit: int, max_chars: int = 2**62) -> list[LoggedTurn]:
        """See the protocol."""
        turns: list[LoggedTurn] = []
        for (number,) in self._data.log.walk(after=(watermark,)):
            if len(turns) == limit or max_chars <= 0:
                break
            record = self._data.turns[number]
            max_chars -= answer_chars(record.attempt)
            turns.append(
                LoggedTurn(
                    id=number,
                    request_id=record.request_id,
                    conversation=record.conversation,
                    agent_id=record.agent_id,
                    attempt=record.attempt,
                )
            )
        return turns

    async def log_watermark(self) -> int:
        """See the protocol."""
        return self._data.watermark

    async def set_log_watermark(self, watermark: int) -> None:
        """See the protocol."""
        self._data.watermark = watermark

    def _view(self, request: Request) -> RequestView:
        conversation = request.conversation
        link = request.link
        in_line = request.state is State.QUEUED and not request.holds
        place = self._data.before(conversation, request.rank, request.key, self._rules.position_limit)
        return RequestView(
            request_id=request.request_id,
            conversation=conversation.name,
            state=request.state,
            priority=request.priority,
            model=request.model,
            route=request.route,
            body=request.body,
            agent_id=request.agent_id,
            enqueued_at=request.enqueued_at,
            due=request.due,
            expires=request.expires,
            started_at=request.started_at,
            finished_at=request.finished_at,
            attempts=tuple(request.attempts),
            provider=_provider(request),
            error=request.error,
            message=request.message,
            interruptions=request.interruptions,
            interrupted_by=request.interrupted_by,
            cancelling=request.cancelling and request.state is State.RUNNING,
            requeued_from=request.requeued_from,
            position=place if in_line else None,
            holder=None if request.state.final or request.holds else name_of(conversation.holder),
            node=self._data.waits_for(request),
            chain=None if link is None else link.chain.name,
            parent=None if link is None else link.parent,
            depth=None if link is None else link.depth,
            block=None if link is None else link.block,
            injection=request.request_id if link is not None and link.carries else None,
            budget=self._budget(request),
            question=request.question,
        )

    def _budget(self, request: Request) -> str | None:
        waiter = self._data.budget_waiters.get(request.key)
        return waiter.budget if waiter is not None and self._data.is_aside(request) else None

    def _lock_view(self, conversation: Conversation, line_limit: int) -> LockView:
        holder = conversation.holder
        external = isinstance(holder, ExternalLock)
        line = self._data.lines.walk((conversation.number,))
        waiting = self._data.lines.count((conversation.number,))
        return LockView(
            conversation=conversation.name,
            holder=name_of(holder),
            external=external,
            state=holder.state if isinstance(holder, Request) else State.RUNNING if external else None,
            since=conversation.since,
            expires_at=holder.expires_at if isinstance(holder, ExternalLock) else None,
            fence=None if holder is None else holder.fence,
            metadata=holder.metadata if isinstance(holder, ExternalLock) else None,
            line=tuple(
                _line_entry(self._data.members[key[-1]]) for _, key in zip(range(line_limit), line, strict=False)
            ),
            waiting=min(waiting, self._rules.position_limit),
            node=self._node_of(conversation),
        )

    def _session_view(self, conversation: Conversation) -> SessionView:
        return SessionView(
            conversation=conversation.name,
            created_at=conversation.created_at,
            active_at=conversation.active_at,
            turns=len(conversation.turns),
            head=conversation.head,
            provider=conversation.provider,
            provider_session=conversation.provider_session,
            agents=tuple(conversation.agents),
            locked=conversation.holder is not None,
            forked_from=None if conversation.parent is None else conversation.parent.name,
            node=self._node_of(conversation),
        )

    def _node_of(self, conversation: Conversation) -> str | None:
        binding = self._data.binding(conversation)
        return None if binding is None else binding.node

    def _listed(self, listing: Listing) -> Listed:
        data = self._data
        match listing:
            case Listing.ACTIVE:
                return Listed(name=listing, index=data.active, shape=(int,))
            case Listing.READY:
                return Listed(name=listing, index=data.ready, shape=(str, str, int, int))
            case Listing.WAITING:
                return Listed(name=listing, index=data.lines, shape=(int, int, int))
            case Listing.DELAYED:
                return Listed(name=listing, index=data.delayed, shape=(int, int))
            case Listing.ASKING:
                return Listed(name=listing, index=data.asking, shape=(int,))
            case Listing.FAILED:
                return Listed(name=listing, index=data.failed, shape=(int, int), backwards=True)
            case Listing.FINISHED:
                return Listed(name=listing, index=data.finished, shape=(int, int), backwards=True)


def _provider(request: Request) -> str | None:
    """The provider that runs it, or gave the answer."""
    return request.provider if request.state in (State.RUNNING, State.COMPLETED) else None


def _row(member: Member) -> RequestRow | None:
    """One line of a listing; None for an external waiter."""
    if not isinstance(member, Request):
        return None
    return RequestRow(
        request_id=member.request_id,
        conversation=member.conversation.name,
        state=member.state,
        priority=member.priority,
        model=member.model,
        agent_id=member.agent_id,
        attempt=member.attempt,
        enqueued_at=member.enqueued_at,
        due=member.due,
        started_at=member.started_at,
        failed_at=member.attempts[-1].finished_at if member.state in (State.RETRYING, State.PARKED) else None,
        finished_at=member.finished_at,
        provider=_provider(member),
        error=member.error,
        message=member.message,
        question=member.question,
    )


def _line_entry(member: Member) -> LineEntry:
    return LineEntry(
        request_id=member.request_id,
        priority=member.priority,
        external=isinstance(member, ExternalLock),
        enqueued_at=member.enqueued_at,
    )
