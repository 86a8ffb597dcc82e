"""Tells waiting clients and subscribers how a request ended."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from ksi.clock import Clock, to_seconds
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.notify.waits import Refuse, Wait, Waiter, Waits
from ksi.completion.replies import Teller, fork_body, status_of
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.events.bus import CHUNK, RESULT, EventBus, Listener
from ksi.events.chains import ChainReply
from ksi.events.completions import ChunkPush, ProgressPush, RequestReply
from ksi.providers.base import Frame, Piece
from ksi.request import Attempt, State
from ksi.store.base import Store
from ksi.store.values import Claimed, Ended, Finish, Fork, RequestView, Retry, Settled, Verdict

TELL_AGAIN = 0.5
"""Seconds between two tries to tell an end while the store cannot be read."""


AT_ONCE = 256
"""Maximum number of ends that are published in one turn of the loop."""


class Watcher(Protocol):
    """A listener in this process that follows an answer as it is made."""

    def piece(self, attempt: int, piece: Piece) -> None:
        """A piece of an attempt's answer. It must never block or raise."""
        ...

    def frame(self, attempt: int, frame: Frame) -> None:
        """An event of a vendor's stream as it came, before the pieces that are in it."""
        ...

    def answered(self, attempt: Attempt) -> None:
        """The answer, when it is stored: before the request's end is published."""
        ...

    def ended(self, reply: RequestReply) -> None:
        """The request's end, if it completed at its first attempt, as soon as it is stored: a watcher's client does not
        read the response log, so it does not wait for that."""
        ...


class _End(msgspec.Struct, frozen=True):
    """A run's end, with all the facts of its notification."""

    claim: Claimed
    model: str
    attempt: Attempt
    settled: Settled

    @property
    def first_try(self) -> bool:
        """True if its first attempt completed it, so that nothing need be read for its notification."""
        return self.claim.attempt == 1 and self.claim.chain is None and self.settled.state is State.COMPLETED

    def view(self) -> RequestView:
        """The request as the store would show it after its first attempt completed it."""
        claim, attempt, settled = self.claim, self.attempt, self.settled
        return RequestView(
            request_id=claim.request_id,
            conversation=claim.conversation,
            state=settled.state,
            priority=claim.priority,
            model=self.model,
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
        clock: Clock,
    ) -> None:
        """`saved` is done when all answers that were committed are in their session's files; None: they are."""
        self._store = store
        self._saved = saved
        self._clock = clock
        self._saving: asyncio.Future[None] | None = None
        """Done when the lines of `_unsaved` are written."""
        self._unsaved: list[_End] = []
        self._untold: set[asyncio.Future[None]] = set()
        """The task that must be done before all ends are published."""
        self._retelling: set[asyncio.Task[None]] = set()
        """Ends that are published when the store can be read again."""
        self._log = structlog.get_logger("ksi.announcer")
        self._teller = teller
        self._bus = bus
        self._locks = locks
        self._injections = injections
        self.on_end: Callable[[str], None] = _nobody
        """Called with the id of each request that ended here."""
        self._waits = Waits()
        self._watchers: dict[str, list[Watcher]] = {}

    # -- waiting for ends -----------------------------------------------------------------------------------------

    def wait_for(
        self, request_id: str, answer: Waiter, refuse: Refuse | None = None, listener: Listener | None = None
    ) -> Wait:
        """Call `answer` once when the request ends, or `refuse` if the daemon stops before that.

        A wait of a `listener` ends when that is gone (`forget`).
        """
        return self._waits.add(request_id, answer, refuse, listener)

    def forget(self, listener: Listener) -> None:
        """A client is gone: end the waits on its behalf."""
        self._waits.forget(listener)

    async def stopping(self) -> None:
        """The daemon stops: notify all waiting clients that the requests are kept and continue when it is back."""
        for task in self._retelling:
            task.cancel()
        while self._untold:
            await asyncio.wait(self._untold)
        self._waits.refuse_all()

    def refuse(self, request_id: str, error: Exception) -> None:
        """A request's end cannot be written: its waiting clients get this error and wait no more."""
        self._waits.refuse(request_id, error)

    def awaited(self) -> list[str]:
        """The ids that clients here wait for."""
        return list(dict.fromkeys((*self._waits.request_ids(), *self._bus.followed_ids())))

    async def settled(self, claim: Claimed, model: str, attempt: Attempt, verdict: Verdict, settled: Settled) -> None:
        """An attempt was settled."""
        if settled.fenced:
            return
        if settled.state is State.COMPLETED:
            for watcher in self._watchers.get(claim.request_id, ()):
                watcher.answered(attempt)
        if settled.fork is not None:
            self._locks.forked(claim.conversation, settled.fork)
        if settled.passing is not None:
            self._locks.passed(settled.passing)
        self._injections.tell(settled.injections)
        if settled.state.final:
            self.on_end(claim.request_id)
        if not settled.state.final:
            self._progress(claim, settled, verdict)
        elif self._cared_for(claim.request_id):
            end = _End(claim, model, attempt, settled)
            saved = self._saved() if settled.state is State.COMPLETED else None
            if saved is None:
                await self._tell_end(end)
            else:
                self._tell_when_saved(end, saved)
                self._tell_watchers(end)

    def _tell_watchers(self, end: _End) -> None:
        watchers = self._watchers.get(end.claim.request_id, ())
        if watchers and self._teller.ready and end.first_try:
            reply = self._teller.reply(end.view())
            for watcher in watchers:
                watcher.ended(reply)

    def _tell_when_saved(self, end: _End, saved: asyncio.Future[None]) -> None:
        """Tell it with all others whose lines are written with its line. Its run is over, and does not wait."""
        if saved is not self._saving:
            self._saving, self._unsaved = saved, []
            self._untold.add(saved)
            saved.add_done_callback(functools.partial(self._tell_saved, self._unsaved))
        self._unsaved.append(end)

    def _tell_saved(self, ends: list[_End], saved: asyncio.Future[None]) -> None:
        for end in ends[:AT_ONCE]:
            if self._teller.ready and end.first_try:
                try:
                    self._publish_end(end.claim.request_id, self._teller.reply(end.view()), fork=end.settled.fork)
                except Exception:  # noqa: BLE001 - a defect in one must not keep the others; it can still be asked for
                    self._log.exception("the result of a request was not published", request_id=end.claim.request_id)
            else:
                task = asyncio.create_task(self._tell_end_alone(end))
                self._untold.add(task)
                task.add_done_callback(self._untold.discard)
        if len(ends) > AT_ONCE:
            asyncio.get_running_loop().call_soon(self._tell_saved, ends[AT_ONCE:], saved)
        else:
            self._untold.discard(saved)

    async def _tell_end_alone(self, end: _End) -> None:
        try:
            await self._tell_end(end)
        except Exception:  # noqa: BLE001 - the top of a task: waiting clients can still ask with completion:get
            self._log.exception("the result of a request was not published", request_id=end.claim.request_id)

    async def _tell_end(self, end: _End) -> None:
        if end.first_try:
            reply = await self._teller.tell(end.view())
            self._publish_end(end.claim.request_id, reply, fork=end.settled.fork)
        else:
            await self._publish(end.claim.request_id, fork=end.settled.fork)

    async def ended(
        self,
        request_id: str,
        chain: ChainReply | None = None,
        fork: Fork | None = None,
        unknown: Callable[[], None] | None = None,
    ) -> None:
        """A request reached its final state. If no run brought it there, its end may have to be routed.

        `chain`: its chain's figures, if that is the reason of its end. `fork`: the fork of its last attempt. `unknown`
        is called if a client waits for this id and the store has no request of that name.
        """
        self.on_end(request_id)
        await self._publish(request_id, chain, fork, unknown)

    async def _publish(
        self,
        request_id: str,
        chain: ChainReply | None = None,
        fork: Fork | None = None,
        unknown: Callable[[], None] | None = None,
    ) -> None:
        self._injections.unrouted.set()
        try:
            await self._tell(request_id, chain, fork, unknown)
        except StoreError as error:
            self._log.error("the end of a request is published later", request_id=request_id, error=error.message)
            task = asyncio.create_task(self._tell_later(request_id, chain, fork, unknown))
            self._retelling.add(task)
            task.add_done_callback(self._retelling.discard)

    async def _tell(
        self, request_id: str, chain: ChainReply | None, fork: Fork | None, unknown: Callable[[], None] | None
    ) -> None:
        if self._cared_for(request_id):
            view = await self._store.get(request_id)
            if view is not None:
                self._publish_end(request_id, await self._teller.tell(view), chain, fork)
            elif unknown is not None:
                unknown()

    async def _tell_later(
        self, request_id: str, chain: ChainReply | None, fork: Fork | None, unknown: Callable[[], None] | None
    ) -> None:
        """Tell an end when the store can be read again: it is settled, and nothing else would bring it up."""
        while True:
            await self._clock.sleep(TELL_AGAIN)
            try:
                await self._tell(request_id, chain, fork, unknown)
                return
            except StoreError:
                continue  # the first one is in the log

    def look_for_unrouted(self) -> None:
        """A daemon that is gone may have left ends that are not routed yet."""
        self._injections.unrouted.set()

    async def ended_elsewhere(self, request_id: str) -> None:
        """A request ended at another daemon, which tells the subscribers. This daemon answers its own waiters only."""
        self._injections.unrouted.set()
        if self._waits.awaited(request_id) or self._bus.followed(request_id):
            view = await self._store.get(request_id)
            if view is not None:
                reply = await self._teller.tell(view)
                self._bus.tell_followers(RESULT, reply, request_id)
                self._waits.answer(request_id, reply)

    def _cared_for(self, request_id: str) -> bool:
        return self._waits.awaited(request_id) or self._bus.wanted(RESULT, request_id)

    def _publish_end(
        self, request_id: str, reply: RequestReply, chain: ChainReply | None = None, fork: Fork | None = None
    ) -> None:
        reply.chain = chain
        reply.forked = fork_body(fork) if fork is not None else None
        self._bus.publish(RESULT, reply, request_id)
        self._waits.answer(request_id, reply)

    # -- progress -------------------------------------------------------------------------------------------------

    def watch(self, request_id: str, watcher: Watcher) -> Callable[[], None]:
        """Have a watcher hear of a request's pieces; the returned function ends that."""
        self._watchers.setdefault(request_id, []).append(watcher)

        def leave() -> None:
            watchers = self._watchers.get(request_id, [])
            if watcher in watchers:
                watchers.remove(watcher)
            if not watchers:
                self._watchers.pop(request_id, None)

        return leave

    def chunk(self, push: ChunkPush, piece: Piece) -> None:
        """A piece of an answer."""
        self._bus.publish(CHUNK, push, push.request_id)
        for watcher in self._watchers.get(push.request_id, ()):
            watcher.piece(push.attempt, piece)

    def frame(self, claim: Claimed, frame: Frame) -> None:
        """An event of a vendor's stream as it came."""
        for watcher in self._watchers.get(claim.request_id, ()):
            watcher.frame(claim.attempt, frame)

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
                status=status_of(settled.state, verdict.question if isinstance(verdict, Retry) else None),
                attempt=claim.attempt,
                due_at=to_seconds(settled.due),
                error=verdict.error if isinstance(verdict, Retry | Finish) else None,
            ),
        )

    async def ended_unrun(self, ended: Ended) -> None:
        """A request ended without running: its chain has no room for it any more."""
        self._injections.blocks["at_start"] += 1
        if ended.passing is not None:
            self._locks.passed(ended.passing)
        self._injections.tell(ended.injections)
        await self.ended(ended.request_id)


def _nobody(_request_id: str) -> None:
    """Stands for the receiver of ends, if no traces are sent."""
