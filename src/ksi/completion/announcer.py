"""Tells who waits and who listens what became of a request (R1, R2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from ksi.clock import to_seconds
from ksi.completion.injection_events import InjectionEvents
from ksi.completion.render import Teller
from ksi.conversation.forks import fork_body
from ksi.conversation.lock_events import LockEvents
from ksi.errors import ShuttingDown
from ksi.event_bus import CHUNK, RESULT, EventBus, Listener
from ksi.event_types import ChainReply, ChunkPush, ProgressPush, RequestReply
from ksi.request import Attempt, State
from ksi.store.base import Store
from ksi.store.values import Claimed, Ended, Finish, Fork, RequestView, Retry, Settled, Verdict

Waiter = Callable[[RequestReply], None]
Refuse = Callable[[Exception], None]


class _Waiting(msgspec.Struct, eq=False):
    """Somebody who waits for a request's end."""

    answer: Waiter
    refuse: Refuse | None


class Announcer:
    """The way from a commit to those who care about it."""

    def __init__(
        self,
        store: Store,
        teller: Teller,
        bus: EventBus,
        locks: LockEvents,
        injections: InjectionEvents,
        saved: Callable[[], asyncio.Future[None] | None],
    ) -> None:
        """`saved` is done when all answers that were committed are in their session's files; None: they are."""
        self._store = store
        self._saved = saved
        self._telling: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("ksi.announcer")
        self._teller = teller
        self._bus = bus
        self._locks = locks
        self._injections = injections
        self._waiters: dict[str, list[_Waiting]] = {}

    # -- waiting for ends -----------------------------------------------------------------------------------------

    def wait_for(self, request_id: str, answer: Waiter, refuse: Refuse | None = None) -> Callable[[], bool]:
        """Call `answer` once when the request ends; the returned function takes it back, and says whether it could.

        `refuse` is called instead when the daemon stops before that.
        """
        waiters = self._waiters.setdefault(request_id, [])
        waiting = _Waiting(answer, refuse)
        waiters.append(waiting)

        def take_back() -> bool:
            waits = self._waiters.get(request_id) is waiters and waiting in waiters
            if waits:
                waiters.remove(waiting)
                if not waiters:
                    del self._waiters[request_id]
            return waits

        return take_back

    async def stopping(self) -> None:
        """The daemon stops: tell everybody who waits that the requests are kept and go on when it is back."""
        while self._telling:
            await asyncio.wait(self._telling)
        for request_id, waiters in list(self._waiters.items()):
            for waiting in waiters:
                if waiting.refuse is not None:
                    waiting.refuse(
                        ShuttingDown(
                            f"the daemon is stopping; {request_id!r} is kept and goes on when it is back: "
                            "ask for its end with completion:wait",
                            request_id=request_id,
                            goes_on=True,
                        )
                    )
            self._waiters[request_id] = [waiting for waiting in waiters if waiting.refuse is None]

    def awaited(self) -> list[str]:
        """The ids of which somebody here waits to hear."""
        return list(dict.fromkeys((*self._waiters, *self._bus.followed_ids())))

    async def settled(self, claim: Claimed, model: str, attempt: Attempt, verdict: Verdict, settled: Settled) -> None:
        """An attempt was settled."""
        if settled.fenced:
            return
        if settled.fork is not None:
            self._locks.forked(claim.conversation, settled.fork)
        if settled.passing is not None:
            self._locks.passed(settled.passing)
        self._injections.tell(settled.injections)
        if not settled.state.final:
            self._progress(claim, settled, verdict)
        elif self._cared_for(claim.request_id):
            saved = self._saved() if settled.state is State.COMPLETED else None
            telling = self._tell_end(claim, model, attempt, settled)
            if saved is None:
                await telling
            else:
                # In a task: the run is over, and holds up nobody while its answer's line is written.
                task = asyncio.create_task(self._when_saved(saved, telling, claim.request_id))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _when_saved(self, saved: asyncio.Future[None], telling: Awaitable[None], request_id: str) -> None:
        await asyncio.shield(saved)
        try:
            await telling
        except Exception:  # noqa: BLE001 - the top of a task: who waits can still ask with completion:get
            self._log.exception("an answer was not told", request_id=request_id)

    async def _tell_end(self, claim: Claimed, model: str, attempt: Attempt, settled: Settled) -> None:
        if claim.attempt == 1 and claim.chain is None and settled.state is State.COMPLETED:
            await self._ended(claim.request_id, _first_try(claim, model, attempt, settled), fork=settled.fork)
        else:
            await self.ended(claim.request_id, fork=settled.fork)

    async def ended(self, request_id: str, chain: ChainReply | None = None, fork: Fork | None = None) -> None:
        """A request reached its final state. Where no run brought it there, its end may have to be routed (C3).

        `chain`: its chain's figures, where that is why it ended. `fork`: what its last attempt forked.
        """
        self._injections.unrouted.set()
        if self._cared_for(request_id):
            view = await self._store.get(request_id)
            if view is not None:
                await self._ended(request_id, view, chain, fork)

    def look_for_unrouted(self) -> None:
        """A daemon that is gone may have left ends that have to be routed (C3)."""
        self._injections.unrouted.set()

    async def ended_elsewhere(self, request_id: str) -> None:
        """A request ended at another daemon, which tells its subscribers: here only who waits for it hears (D1)."""
        self._injections.unrouted.set()
        if request_id in self._waiters or self._bus.followed(request_id):
            view = await self._store.get(request_id)
            if view is not None:
                reply = await self._teller.tell(view)
                self._bus.tell_followers(RESULT, reply, request_id)
                self._answer(request_id, reply)

    def _cared_for(self, request_id: str) -> bool:
        return request_id in self._waiters or self._bus.wanted(RESULT, request_id)

    async def _ended(
        self, request_id: str, view: RequestView, chain: ChainReply | None = None, fork: Fork | None = None
    ) -> None:
        reply = await self._teller.tell(view)
        reply.chain = chain
        reply.forked = fork_body(fork) if fork is not None else None
        self._bus.publish(RESULT, reply, request_id)
        self._answer(request_id, reply)

    def _answer(self, request_id: str, reply: RequestReply) -> None:
        for waiting in self._waiters.pop(request_id, ()):
            waiting.answer(reply)

    # -- progress -------------------------------------------------------------------------------------------------

    def chunk(self, push: ChunkPush) -> None:
        """A piece of an answer."""
        self._bus.publish(CHUNK, push, push.request_id)

    def chunk_to(self, listener: Listener, push: ChunkPush) -> None:
        """A piece that one listener missed."""
        self._bus.push(listener, CHUNK, push)

    def started(self, claim: Claimed) -> None:
        """A request runs, and holds its conversation."""
        self._locks.held(claim)
        if self._bus.wanted("completion:progress"):
            self._bus.publish(
                "completion:progress",
                ProgressPush(
                    request_id=claim.request_id,
                    session_id=claim.conversation,
                    status=State.RUNNING.value,
                    attempt=claim.attempt,
                    provider=claim.provider,
                ),
            )

    def _progress(self, claim: Claimed, settled: Settled, verdict: Verdict) -> None:
        self._bus.publish(
            "completion:progress",
            ProgressPush(
                request_id=claim.request_id,
                session_id=claim.conversation,
                status=settled.state.value,
                attempt=claim.attempt,
                due_at=to_seconds(settled.due),
                error=verdict.error if isinstance(verdict, Retry | Finish) else None,
            ),
        )

    async def ended_unrun(self, ended: Ended) -> None:
        """A request ended without running."""
        if ended.passing is not None:
            self._locks.passed(ended.passing)
        self._injections.tell(ended.injections)
        await self.ended(ended.request_id)


def _first_try(claim: Claimed, model: str, attempt: Attempt, settled: Settled) -> RequestView:
    """The view of a request that its first attempt completed: all that it would be read from is at hand."""
    return RequestView(
        request_id=claim.request_id,
        conversation=claim.conversation,
        state=settled.state,
        priority=claim.priority,
        model=model,
        route=claim.route,
        body=claim.body,
        agent_id=claim.agent_id,
        enqueued_at=claim.enqueued_at,
        started_at=claim.started_at,
        finished_at=settled.finished_at,
        attempts=(attempt,),
        provider=attempt.provider,
        requeued_from=claim.requeued_from,
    )
