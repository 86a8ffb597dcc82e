"""What a client can ask of completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock, Moment, to_seconds
from ksi.completion.announcer import Announcer
from ksi.completion.chain_render import chain_reply, reason_body
from ksi.completion.completion_runner import Stop
from ksi.completion.injection_events import InjectionEvents
from ksi.completion.injection_manager import InjectionManager
from ksi.completion.intake import Intake
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.completion.render import Teller, content_reply, row_reply
from ksi.completion.routes import parse_route
from ksi.completion.session_manager import SessionManager
from ksi.config import Config
from ksi.conversation.lock_events import LockEvents
from ksi.errors import (
    ConversationBusy,
    FailureClass,
    InvalidData,
    NotFound,
    ProviderError,
    ShuttingDown,
    UnknownModel,
    WaitTimeout,
)
from ksi.event_bus import EventBus, Listener
from ksi.event_types import (
    CancelData,
    CancelReply,
    ChunkPush,
    CompletionData,
    FailedData,
    FailedReply,
    ForkBody,
    GetData,
    PageData,
    ProviderName,
    QueueStatusData,
    RequestId,
    RequestReply,
    SessionStatusData,
    SubmitReply,
    WaitData,
)
from ksi.events import conversation_name
from ksi.request import State, decode_body, full_model
from ksi.store.base import Store
from ksi.store.values import CancelOutcome, Enqueued, Fork, Lapsed, Listing, NewRequest, RequestRow, SessionView

PAGES_READ_ON = 100
"""Pages of a list that are read for one page of a part of it."""

USUAL_CLAUDE = "sonnet"
"""The model that goes on with a dialogue of Claude Code whose own model is not known."""

Answer = Callable[[RequestReply], None]
Refuse = Callable[[Exception], None]
Attach = Callable[[Enqueued], None]


class CompletionService:
    """Submit, look, wait, cancel, and the reports."""

    def __init__(
        self,
        store: Store,
        intake: Intake,
        queue: QueueManager,
        providers: ProviderManager,
        sessions: SessionManager,
        teller: Teller,
        announcer: Announcer,
        locks: LockEvents,
        injections: InjectionManager,
        injection_events: InjectionEvents,
        bus: EventBus,
        config: Config,
        clock: Clock,
    ) -> None:
        self._store = store
        self._intake = intake
        self._queue = queue
        self._providers = providers
        self._sessions = sessions
        self._teller = teller
        self._announcer = announcer
        self._locks = locks
        self._injections = injections
        self._injection_events = injection_events
        self._bus = bus
        self._config = config
        self._clock = clock
        self._telling: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("ksi.completions")

    # -- submit ---------------------------------------------------------------------------------------------------

    async def submit(self, data: CompletionData, listener: Listener) -> SubmitReply | RequestReply:
        """`completion:async`: into the queue; the result is pushed. A known id answers as it stands (Q4)."""

        def follow(enqueued: Enqueued) -> None:
            if enqueued.block is not None:
                return  # the reply is all that there is to tell
            if enqueued.existing is None or not enqueued.existing.state.final:
                self._bus.follow(listener, enqueued.request_id, chunks=data.stream)
                if data.stream:
                    self._catch_up(listener, enqueued.request_id, None)

        new, enqueued = await self._enqueue(data, follow, awaited=False)
        if enqueued.existing is not None:
            return await self._teller.tell(enqueued.existing)
        due = to_seconds(new.due) if enqueued.state is State.SCHEDULED else None
        reply = _submit_reply(enqueued, due, self._clock.now().wall)
        if new.fork_of is not None and enqueued.block is None:
            reply.forked = _requested_fork(new.fork_of, new.conversation)
        return reply

    async def request(
        self, data: CompletionData, listener: Listener, answer: Answer, refuse: Refuse
    ) -> RequestReply | None:
        """`completion:request`: as `submit`, but `answer` is called when it is done, unless it is returned at once.

        `refuse` is called when the daemon stops before that.
        """

        def wait(enqueued: Enqueued) -> None:
            if enqueued.existing is not None and enqueued.existing.state.final:
                return
            self._announcer.wait_for(enqueued.request_id, _with_fork(data, enqueued, answer), refuse)
            if data.stream:
                self._bus.follow(listener, enqueued.request_id, end=False, chunks=True)
                self._catch_up(listener, enqueued.request_id, None)

        _, enqueued = await self._enqueue(data, wait, awaited=True)
        if enqueued.existing is not None and enqueued.existing.state.final:
            return await self._teller.tell(enqueued.existing)
        return None

    async def _enqueue(self, data: CompletionData, attach: Attach, *, awaited: bool) -> tuple[NewRequest, Enqueued]:
        """Make the request, and enter it."""
        model = await self._model(data)
        if data.model is None and model != full_model(None, self._config.service.default_model):
            data = msgspec.structs.replace(data, model=model)
        route = self._providers.route(model, mcp=bool(data.mcp_config))
        new = self._intake.new_request(data, model, route, self._clock.now())
        if data.injection_config is not None or data.circuit_breaker_config is not None:
            chain = await self._injections.membership(decode_body(new.body), new.conversation)
            new = msgspec.structs.replace(new, chain=chain)
        return new, await self._enter(new, attach, awaited=awaited)

    async def _model(self, data: CompletionData) -> str:
        """The model that a request asks for. Without one, its conversation stays with its kind of model.

        Raises:
            UnknownModel: nothing serves the model that the conversation was made with.
        """
        default = full_model(data.model, self._config.service.default_model)
        name = conversation_name(data.session_id, data.conversation_id)
        if data.model is not None or name is None:
            return default
        last = await self._sessions.last_provider(name)
        kinds = {self._kind(step.provider) for step in parse_route(self._route_or_none(default))}
        if last is None or self._kind(last) in kinds:
            return default
        usual = await self._sessions.last_model(name)
        if usual is None and self._kind(last) == "claude-cli":
            usual = f"{last}/{USUAL_CLAUDE}"
        why = "nothing serves that now"
        try:
            if usual is not None:
                self._providers.route(usual)
                return usual
        except UnknownModel as error:
            why = error.message
        raise UnknownModel(
            f"conversation {name!r} was made at {last} and stays there: {why}; name a model to go on elsewhere with "
            "what was said",
            model=usual,
        )

    def _kind(self, provider: str) -> str:
        entry = self._config.providers.get(provider)
        return provider if entry is None else entry.kind

    def _route_or_none(self, model: str) -> str:
        try:
            return self._providers.route(model)
        except UnknownModel:
            return ""

    async def _enter(self, new: NewRequest, attach: Attach, *, awaited: bool = False) -> Enqueued:
        """Into the store, and to work if it may run at once; `attach` comes in between, so that no end is missed."""
        if not self._queue.claiming:
            raise ShuttingDown("the daemon is stopping; send the request again when it is back")
        now = self._clock.now()
        try:
            enqueued = await self._store.enqueue(new, self._providers.offers(now), now, awaited=awaited)
        except ConversationBusy as busy:
            raise _with_age(busy, now) from None
        attach(enqueued)
        if enqueued.existing is not None:
            return enqueued
        if enqueued.block is not None:
            self._log.warning(
                "blocked", request_id=new.request_id, code=enqueued.block.code, reason=enqueued.block.message
            )
            chain = chain_reply(enqueued.chain, now.wall) if enqueued.chain is not None else None
            # In a task: the reply to who asked comes before the news of its end.
            telling = asyncio.create_task(self._announcer.ended(new.request_id, chain))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
            return enqueued
        if new.fork_of is not None:
            self._locks.forked(
                new.conversation,
                Fork(
                    parent=new.fork_of,
                    child=new.conversation,
                    request_id=new.request_id,
                    at=now.wall,
                    kind="requested",
                ),
            )
        if enqueued.claim is not None:
            self._queue.launch(enqueued.claim)
        else:
            await self._announce_waiting(enqueued, timed=new.due is not None or new.expires is not None)
        return enqueued

    async def _announce_waiting(self, enqueued: Enqueued, *, timed: bool) -> None:
        if timed:
            self._queue.on_due()
        if enqueued.passing is not None:
            self._locks.passed(enqueued.passing)
            self._injection_events.tell(enqueued.injections)
            await self._announcer.ended(enqueued.passing.released_by)
        if enqueued.stopping is not None:
            self._queue.stop_run(enqueued.stopping, Stop.CANCEL)
        if not enqueued.ready and enqueued.state is State.QUEUED:
            self._locks.queued(
                enqueued.conversation, enqueued.request_id, enqueued.position, enqueued.holder, external=False
            )

    # -- look and wait --------------------------------------------------------------------------------------------

    async def get(self, data: GetData) -> RequestReply:
        """`completion:get`: a request as it stands; of a running one, the text so far behind `after_seq`."""
        view = await self._store.get(data.request_id)
        if view is None:
            raise _not_found(data.request_id)
        reply = await self._teller.tell(view)
        if view.block is not None:
            chain = await self._store.chain(data.request_id)
            reply.chain = chain_reply(chain, self._clock.now().wall) if chain is not None else None
        if data.content:
            reply.content = content_reply(view.body)
        if data.after_seq is not None:
            run = self._queue.runs.get(data.request_id)
            if run is None:
                reply.chunks_lost = view.state.final
            else:
                reply.text_so_far = "".join(run.pieces[data.after_seq + 1 :])
                reply.next_seq = len(run.pieces)
        return reply

    async def wait(self, data: WaitData, listener: Listener, answer: Answer, refuse: Refuse) -> RequestReply | None:
        """`completion:wait`: `answer` is called at the request's end, unless it is returned at once.

        With `stream`, the pieces behind `after_seq` come first and the further ones as they are made (R2).
        """
        take_back = self._announcer.wait_for(data.request_id, answer, refuse)
        view = await self._store.get(data.request_id)
        if view is None or view.state.final:
            if not take_back():
                return None
            if view is None:
                raise _not_found(data.request_id)
            reply = await self._teller.tell(view)
            reply.chunks_lost = data.stream or data.after_seq is not None
            return reply
        if data.stream:
            self._bus.follow(listener, data.request_id, end=False, chunks=True)
            self._catch_up(listener, data.request_id, data.after_seq)
        if data.timeout is not None:
            self._limit_wait(data.request_id, data.timeout, take_back, refuse)
        return None

    def _catch_up(self, listener: Listener, request_id: str, after_seq: int | None) -> None:
        """Send the pieces of a running answer that a listener has not seen; further ones follow (R2)."""
        run = self._queue.runs.get(request_id)
        if run is None:
            return
        first = after_seq + 1 if after_seq is not None else 0
        if first > len(run.pieces):
            first = 0
        for seq in range(first, len(run.pieces)):
            push = ChunkPush(request_id=request_id, attempt=run.claim.attempt, seq=seq, text=run.pieces[seq])
            self._announcer.chunk_to(listener, push)

    def _limit_wait(self, request_id: str, timeout: float, take_back: Callable[[], bool], refuse: Refuse) -> None:
        def give_up() -> None:
            if take_back():
                refuse(
                    WaitTimeout(f"{request_id!r} is not done after {timeout:g} s; wait again", request_id=request_id)
                )

        asyncio.get_running_loop().call_later(timeout, give_up)

    # -- cancel ---------------------------------------------------------------------------------------------------

    async def cancel(self, data: CancelData) -> CancelReply:
        """`completion:cancel`: stop a request, or a whole chain, and the providers' work (F8).

        Raises:
            NotFound: no such request or chain.
            InvalidData: neither is named, or both.
        """
        if data.chain_id is not None and data.request_id is None:
            return await self._cancel_chain(data.chain_id)
        if data.request_id is None or data.chain_id is not None:
            raise InvalidData("give the request_id of a request or the chain_id of a chain", path="request_id")
        return await self._cancel_request(data.request_id)

    async def _cancel_chain(self, name: str) -> CancelReply:
        """Close it to new members first: then it comes to an end however fast it grew."""
        stopped = 0
        while True:
            closed = await self._store.close_chain(name, self._clock.now())
            if not closed.unfinished:
                return CancelReply(chain_id=closed.chain, status="closed", cancelled=stopped)
            replies = await asyncio.gather(*map(self._cancel_request, closed.unfinished))
            stopped += sum(reply.status == "cancelled" for reply in replies)

    async def _cancel_request(self, request_id: str) -> CancelReply:
        """Stop one; answers when its provider has let go of it."""
        ended: asyncio.Future[RequestReply] = asyncio.get_running_loop().create_future()

        def note(reply: RequestReply) -> None:
            if not ended.done():
                ended.set_result(reply)

        take_back = self._announcer.wait_for(request_id, note)
        try:
            cancelled = await self._store.cancel(request_id, self._clock.now())
            if cancelled.passing is not None:
                self._locks.passed(cancelled.passing)
            self._injection_events.tell(cancelled.injections)
            if cancelled.outcome is CancelOutcome.STOPPING:
                self._queue.stop_run(request_id, Stop.CANCEL)
                reply = await ended
                was = "cancelled" if reply.status == State.CANCELLED.value else "already_final"
                return _cancel_reply(request_id, was, reply.status, reply.session_id)
            if cancelled.outcome is CancelOutcome.CANCELLED:
                await self._announcer.ended(request_id)
                if self._bus.followed(request_id):
                    # It was no request but a wait for a lock: who waits hears that it is over.
                    self._locks.lapsed(Lapsed(request_id=request_id, conversation=cancelled.conversation, held=False))
            return _cancel_reply(request_id, cancelled.outcome.value, cancelled.state.value, cancelled.conversation)
        finally:
            take_back()

    # -- failures -------------------------------------------------------------------------------------------------

    async def failed(self, data: FailedData) -> FailedReply:
        """`completion:failed`: a client's word ends a running attempt; answers with what that led to (F2).

        Raises:
            InvalidData: `reason` is no failure class.
        """
        if data.reason not in list(FailureClass):
            raise InvalidData(f"reason: {data.reason!r} is none of {', '.join(FailureClass)}", path="reason")
        run = self._queue.runs.get(data.request_id)
        if run is None:
            return await self._not_running(data.request_id)
        message = data.message or f"reported as {data.reason}"
        run.fail(ProviderError(FailureClass(data.reason), message, provider=run.claim.provider))
        if run.task is not None:
            await asyncio.wait([run.task])
        view = await self._store.get(data.request_id)
        if view is None:
            return FailedReply(request_id=data.request_id, status="not_found")
        status: Any = "not_retryable" if view.state.final else "retry_scheduled"
        return FailedReply(
            request_id=data.request_id, status=status, state=view.state.value, due_at=to_seconds(view.due)
        )

    async def _not_running(self, request_id: str) -> FailedReply:
        view = await self._store.get(request_id)
        if view is None:
            return FailedReply(request_id=request_id, status="not_found")
        status: Any = "not_retryable" if view.state.final else "not_running"
        return FailedReply(request_id=request_id, status=status, state=view.state.value)

    async def requeue(self, data: RequestId) -> SubmitReply:
        """`completion:requeue`: ask again for a request that ended without an answer, as a new one.

        Raises:
            NotFound: no such request.
            InvalidData: it has an answer, or has not ended.
        """
        view = await self._store.get(data.request_id)
        if view is None:
            raise _not_found(data.request_id)
        if not view.state.final or view.state is State.COMPLETED:
            raise InvalidData(
                f"request_id: {data.request_id!r} is {view.state}; only what ended without an answer is asked again",
                path="request_id",
            )
        route = self._providers.route(view.model, mcp=decode_body(view.body).mcp)
        new = self._intake.requeue(view, route, self._clock.now())
        new = msgspec.structs.replace(new, chain=await self._injections.membership_again(view))
        enqueued = await self._enter(new, lambda _: None)
        return _submit_reply(enqueued, None, self._clock.now().wall)

    # -- reports --------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """`completion:status`: figures and what runs."""
        page = await self._store.requests(Listing.ACTIVE, 100)
        return {
            "status": "ok" if self._queue.claiming else "stopping",
            **await self._figures(),
            "running": [row_reply(row) for row in page.items],
            "more": page.cursor is not None,
        }

    async def queue_status(self, data: QueueStatusData) -> dict[str, Any]:
        """`completion:queue_status`: figures, and a page of a list where one is named (R4)."""
        totals = await self._store.totals()
        reply: dict[str, Any] = {
            **await self._figures(),
            "locked_conversations": totals.locks,
            "external_locks": totals.external_locks,
            "external_waiters": totals.external_waiters,
            "conversations": totals.conversations,
            "max_queued": self._config.queue.max_queued,
            "ready_by_route": {r: n for r, n in (await self._store.waiting_by_route()).items() if n},
        }
        if data.list is not None:
            page = await self._store.requests(Listing(data.list), data.limit, data.cursor)
            reply["items"] = [row_reply(row) for row in page.items]
            if page.cursor is not None:
                reply["cursor"] = page.cursor
        return reply

    async def _figures(self) -> dict[str, int]:
        totals = await self._store.totals()
        return {
            "queued": totals.queued,
            "active": totals.running,
            "completed": totals.completed,
            "failed": totals.failed,
            "cancelled": totals.cancelled,
            "expired": totals.expired,
            "blocked": totals.blocked,
            "scheduled": totals.scheduled,
            "retrying": totals.retrying,
            "parked": totals.parked,
        }

    async def session_status(self, data: SessionStatusData) -> dict[str, Any]:
        """`completion:session_status`: one session's life, or a page of sessions (L10)."""
        name = conversation_name(data.session_id, data.conversation_id)
        if name is not None:
            view = await self._store.session(name)
            if view is None:
                raise NotFound(f"no session {name!r}", session_id=name)
            return self._session(view)
        page = await self._store.sessions(data.limit, data.cursor, data.agent_id)
        reply: dict[str, Any] = {"sessions": [self._session(view) for view in page.items]}
        return reply if page.cursor is None else {**reply, "cursor": page.cursor}

    def _session(self, view: SessionView) -> dict[str, Any]:
        return {
            "session_id": view.conversation,
            "state": self._sessions.life(view, self._clock.now()),
            "created_at": to_seconds(view.created_at),
            "active_at": to_seconds(view.active_at),
            "turns": view.turns,
            "provider": view.provider,
            "provider_session_id": view.provider_session,
            "agents": list(view.agents),
            "locked": view.locked,
            "forked_from": view.forked_from,
            **({} if view.node is None else {"node": view.node}),
        }

    async def retry_status(self, data: PageData) -> dict[str, Any]:
        """`completion:retry_status`: what waits to be tried again, with its last error (F2)."""
        totals = await self._store.totals()
        waiting, cursor = await self._to_be_tried_again(data, totals.retrying + totals.parked)
        reply: dict[str, Any] = {
            "retrying": totals.retrying,
            "parked": totals.parked,
            "max_attempts": self._config.retry.max_attempts,
            "initial_delay": self._config.retry.initial_delay,
            "max_delay": self._config.retry.max_delay,
            "waiting": [row_reply(row) for row in waiting],
        }
        return reply if cursor is None else {**reply, "cursor": cursor}

    async def _to_be_tried_again(self, data: PageData, there_are: int) -> tuple[list[RequestRow], str | None]:
        """A page of them, out of the list of all that waits for a time.

        Scheduled requests stand in that list too: it is read on until the page is full, but not for ever.
        """
        found: list[RequestRow] = []
        cursor = data.cursor
        for _ in range(PAGES_READ_ON):
            page = await self._store.requests(Listing.DELAYED, data.limit - len(found), cursor)
            found += [row for row in page.items if row.state in (State.RETRYING, State.PARKED)]
            cursor = page.cursor
            if data.cursor is None and len(found) >= there_are:
                return found, None
            if cursor is None or len(found) == data.limit:
                break
        return found, cursor

    async def disable_provider(self, data: ProviderName) -> dict[str, Any]:
        """`provider:disable`: ask it no more; what waits for it goes to the next of its route."""
        report = await self._providers.set_enabled(data.provider, False)
        self._queue.on_work()
        return report

    async def enable_provider(self, data: ProviderName) -> dict[str, Any]:
        """`provider:enable`: ask it again."""
        report = await self._providers.set_enabled(data.provider, True)
        self._queue.on_work()
        return report

    async def reset_provider(self, data: ProviderName) -> dict[str, Any]:
        """`provider:reset`: forget its failures and its quota; what waited for that is due now."""
        report = await self._providers.reset(data.provider)
        self._queue.on_work()
        return report

    def provider_status(self) -> dict[str, Any]:
        """`completion:provider_status`: each provider's record (F6)."""
        return {"providers": self._providers.report()}


def _with_age(busy: ConversationBusy, now: Moment) -> ConversationBusy:
    """The refusal as the wire has it: when the holder began, and how long it has held, in seconds (L3)."""
    facts = dict(busy.facts)
    since = facts.pop("since", None)
    if since is not None:
        facts |= {"since": since / MICROSECONDS, "age": (now.wall - since) / MICROSECONDS}
    return ConversationBusy(busy.message, **facts)


def _requested_fork(parent: str, child: str) -> ForkBody:
    return ForkBody(parent=parent, child=child, kind="requested")


def _with_fork(data: CompletionData, enqueued: Enqueued, answer: Answer) -> Answer:
    """The answer to who asked for a fork says which one was made."""
    parent = conversation_name(data.session_id, data.conversation_id)
    if not data.fork or parent is None:
        return answer
    fork = _requested_fork(parent, enqueued.conversation)
    # A copy: others who wait for the same answer did not ask for the fork.
    return lambda reply: answer(msgspec.structs.replace(reply, forked=reply.forked or fork))


def _submit_reply(enqueued: Enqueued, due_at: float | None, now: int) -> SubmitReply:
    if enqueued.block is not None:
        return SubmitReply(
            request_id=enqueued.request_id,
            status="blocked",
            session_id=enqueued.conversation,
            state=enqueued.state.value,
            reason=reason_body(enqueued.block),
            chain=chain_reply(enqueued.chain, now) if enqueued.chain is not None else None,
        )
    reply = SubmitReply(
        request_id=enqueued.request_id,
        status="ready" if enqueued.ready else "queued",
        session_id=enqueued.conversation,
        state=enqueued.state.value,
        holder=enqueued.holder,
        due_at=due_at,
    )
    if not enqueued.ready:
        reply.position = enqueued.position
        reply.conversation_locked = enqueued.holder is not None
    return reply


def _cancel_reply(request_id: str, status: Any, state: str, session_id: str) -> CancelReply:
    return CancelReply(request_id=request_id, status=status, state=state, session_id=session_id)


def _not_found(request_id: str) -> NotFound:
    return NotFound(f"no request {request_id!r} (or it is not kept any more)", request_id=request_id)
