"""Answers the events about single requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from ksi.clock import Clock, to_seconds
from ksi.completion.budget.book import BudgetBook
from ksi.completion.completion_runner import Stop
from ksi.completion.entry import Entry
from ksi.completion.new_requests import NewRequests
from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.completion.replies import (
    HELD,
    Teller,
    chain_reply,
    chunk_push,
    content_reply,
    question_body,
    submit_reply,
)
from ksi.conversation.lock_events import LockEvents
from ksi.errors import (
    FailureClass,
    InvalidData,
    NotFound,
    ProviderError,
)
from ksi.events.bus import EventBus, Listener
from ksi.events.common import RequestId
from ksi.events.completions import (
    CancelData,
    CancelReply,
    CompletionData,
    FailedData,
    FailedReply,
    GetData,
    RequestReply,
    SubmitReply,
    WaitData,
)
from ksi.events.conversations import ForkBody
from ksi.events.specs import conversation_name
from ksi.injection.judge import GUARD
from ksi.providers.base import Piece
from ksi.request import State
from ksi.store.base import Store
from ksi.store.rules import refusals
from ksi.store.values import CancelOutcome, Enqueued, Lapsed, NewRequest

Answer = Callable[[RequestReply], None]
Refuse = Callable[[Exception], None]


class CompletionService:
    """Submits requests, shows them, waits for them, cancels them and asks again for failed ones."""

    def __init__(
        self,
        store: Store,
        requests: NewRequests,
        entry: Entry,
        queue: QueueManager,
        providers: ProviderManager,
        teller: Teller,
        announcer: Announcer,
        locks: LockEvents,
        injection_events: InjectionEvents,
        budgets: BudgetBook,
        bus: EventBus,
        clock: Clock,
    ) -> None:
        self._store = store
        self._requests = requests
        self._entry = entry
        self._queue = queue
        self._providers = providers
        self._teller = teller
        self._announcer = announcer
        self._locks = locks
        self._injection_events = injection_events
        self._budgets = budgets
        self._bus = bus
        self._clock = clock

    # -- submit ---------------------------------------------------------------------------------------------------

    async def submit(self, data: CompletionData, listener: Listener) -> SubmitReply | RequestReply:
        """`completion:async`: enqueue a request; its result is pushed. The reply to a known id is its present state."""

        def follow(enqueued: Enqueued) -> None:
            if enqueued.block is not None:
                return  # the reply is all that there is to tell
            if enqueued.existing is None or not enqueued.existing.state.final:
                self._bus.follow(listener, enqueued.request_id, chunks=data.stream)
                if data.stream:
                    self._catch_up(listener, enqueued.request_id, None)

        _check_agent(data)
        new = _counted_for(await self._requests.of(data), data, listener)
        enqueued = await self._entry.enter(new, follow)
        if enqueued.existing is not None:
            return await self._teller.tell(enqueued.existing)
        held = enqueued.block is None and new.question is not None
        due = to_seconds(new.due) if enqueued.state is State.SCHEDULED and not held else None
        reply = submit_reply(enqueued, due, self._clock.now().wall)
        if held:
            reply.state, reply.question = HELD, question_body(new.question)
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
            self._announcer.wait_for(enqueued.request_id, _with_fork(data, enqueued, answer), refuse, listener)
            if data.stream:
                self._bus.follow(listener, enqueued.request_id, end=False, chunks=True)
                self._catch_up(listener, enqueued.request_id, None)

        _check_agent(data)
        new = _counted_for(await self._requests.of(data), data, listener)
        enqueued = await self._entry.enter(new, wait, awaited=True)
        if enqueued.existing is not None and enqueued.existing.state.final:
            return await self._teller.tell(enqueued.existing)
        return None

    async def ask_for_guard(self, data: CompletionData) -> None:
        """Enqueue a question of the guard's own; nobody is told of its end. Raises as `submit`."""
        await self._entry.enter(await self._requests.of(data), lambda _: None)

    # -- look and wait --------------------------------------------------------------------------------------------

    async def get(self, data: GetData) -> RequestReply:
        """`completion:get`: the present state of a request; of a running one, the text so far after `after_seq`."""
        view = await self._store.get(data.request_id)
        if view is None:
            raise not_found(data.request_id)
        reply = await self._teller.tell(view)
        if view.block is not None:
            chain = await self._store.chain(data.request_id)
            reply.chain = chain_reply(chain, self._clock.now().wall) if chain is not None else None
        if not view.state.final and view.state is not State.RUNNING:
            reply.paused = self._providers.why_paused(view.agent_id, view.conversation, view.priority)
            if reply.paused is None and view.budget is not None:
                reply.paused = self._budgets.why_waiting(view.budget)
        if data.content:
            reply.content = content_reply(view.body)
        if data.after_seq is not None:
            run = self._queue.runs.get(data.request_id)
            if run is None:
                reply.chunks_lost = view.state.final
            else:
                reply.text_so_far = run.text_from(data.after_seq + 1)
                reply.next_seq = len(run.pieces)
        return reply

    async def wait(self, data: WaitData, listener: Listener, answer: Answer, refuse: Refuse) -> RequestReply | None:
        """`completion:wait`: `answer` is called at the request's end, unless it is returned at once.

        With `stream`, the pieces after `after_seq` are sent first, then each further piece as the provider makes it.
        """
        wait = self._announcer.wait_for(data.request_id, answer, refuse, listener)
        try:
            view = await self._store.get(data.request_id)
        except BaseException:
            wait.take_back()
            raise
        if view is None or view.state.final:
            if not wait.take_back():
                return None
            if view is None:
                raise not_found(data.request_id)
            reply = await self._teller.tell(view)
            reply.chunks_lost = data.stream or data.after_seq is not None
            return reply
        if not wait.waiting:
            # It was answered while the store was asked.
            return None
        if data.stream:
            self._bus.follow(listener, data.request_id, end=False, chunks=True)
            self._catch_up(listener, data.request_id, data.after_seq)
        if data.timeout is not None:
            wait.limit(data.timeout)
        return None

    def pieces_so_far(self, request_id: str) -> tuple[int, list[Piece]]:
        """The attempt of a request that runs here, and the pieces of its answer so far."""
        run = self._queue.runs.get(request_id)
        return (0, []) if run is None else (run.claim.attempt, list(run.pieces))

    def _catch_up(self, listener: Listener, request_id: str, after_seq: int | None) -> None:
        """Send the pieces of a running answer that a listener has not seen; further ones follow."""
        run = self._queue.runs.get(request_id)
        if run is None:
            return
        first = after_seq + 1 if after_seq is not None else 0
        if first > len(run.pieces):
            first = 0
        for seq in range(first, len(run.pieces)):
            push = chunk_push(request_id, run.claim.attempt, seq, run.pieces[seq])
            self._announcer.chunk_to(listener, push)

    # -- cancel ---------------------------------------------------------------------------------------------------

    async def cancel(self, data: CancelData) -> CancelReply:
        """`completion:cancel`: stop a request or a whole chain, and the providers' work for it.

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
        """Stop one; answers when its provider has stopped."""
        ended: asyncio.Future[RequestReply] = asyncio.get_running_loop().create_future()

        def note(reply: RequestReply) -> None:
            if not ended.done():
                ended.set_result(reply)

        wait = self._announcer.wait_for(request_id, note)
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
                await self._providers.let_go(cancelled.conversation)
                lapsed = Lapsed(request_id=request_id, conversation=cancelled.conversation, held=False)
                await self._announcer.ended(request_id, unknown=lambda: self._tell_lapsed(lapsed))
            return _cancel_reply(request_id, cancelled.outcome.value, cancelled.state.value, cancelled.conversation)
        finally:
            wait.take_back()

    def _tell_lapsed(self, lapsed: Lapsed) -> None:
        """It was no request but a wait for a lock: the waiter is notified that it is over."""
        if self._bus.followed(lapsed.request_id):
            self._locks.lapsed(lapsed)

    # -- failures -------------------------------------------------------------------------------------------------

    async def failed(self, data: FailedData) -> FailedReply:
        """`completion:failed`: a client reports a running attempt as failed. The reply names the effect.

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
            raise not_found(data.request_id)
        if not view.state.final or view.state is State.COMPLETED:
            raise InvalidData(
                f"request_id: {data.request_id!r} is {view.state}; only a request that ended without an answer is "
                "asked again",
                path="request_id",
            )
        new = await self._requests.again(view)
        enqueued = await self._entry.enter(new, lambda _: None)
        return submit_reply(enqueued, None, self._clock.now().wall)


def _check_agent(data: CompletionData) -> None:
    """Keep the guard's name to itself: its requests are believed to be the judge's.

    Raises:
        InvalidData: a client uses it.
    """
    if data.agent_id == GUARD:
        raise InvalidData(f"agent_id: {GUARD!r} is KSI's own name", path="agent_id")


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


def _cancel_reply(request_id: str, status: Any, state: str, session_id: str) -> CancelReply:
    return CancelReply(request_id=request_id, status=status, state=state, session_id=session_id)


def not_found(request_id: str) -> NotFound:
    """There is no such request, as far as who asks may know."""
    return refusals.unknown_request(request_id)


def _counted_for(new: NewRequest, data: CompletionData, listener: Listener) -> NewRequest:
    """A request without an agent counts for its connection; by HTTP for its session, or for all of these together."""
    if new.agent_id is not None:
        return new
    flow = getattr(listener, "client", None)
    if flow is None and data.session_id is None and data.conversation_id is None:
        flow = "http"
    return new if flow is None else msgspec.structs.replace(new, flow=flow)
