"""The queue's motor: wakes, claims what may run, starts it, and stops it; does what time asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ksi.clock import Clock, Moment
from ksi.completion.announcer import Announcer
from ksi.completion.completion_runner import CompletionRunner, Run, Stop
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.wakeup import TICK, Alarm
from ksi.config import Config
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.event_bus import EventBus
from ksi.store.base import Store
from ksi.store.values import Claimed, Recovery

CLAIMS = 64
"""Requests that one claim takes."""

GIVE_BACK = 5.0
"""Seconds, beside the grace, in which stopped requests must be back in the queue."""

FAULT_PAUSE = 0.5
"""Seconds to wait after the store said no."""


class QueueManager:
    """Holds what runs here. `on_work` may be called at any time; it only sets a flag."""

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        runner: CompletionRunner,
        announcer: Announcer,
        locks: LockEvents,
        bus: EventBus,
        config: Config,
        clock: Clock,
    ) -> None:
        self._store = store
        self._providers = providers
        self._runner = runner
        self._announcer = announcer
        self._locks = locks
        self._bus = bus
        self._config = config
        self._clock = clock
        self._alarm = Alarm(clock)
        self._runs: dict[str, Run] = {}
        self._live: set[Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._claiming = True
        self._log = structlog.get_logger("ksi.queue")
        providers.on_change = self.on_work

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, recovery: Recovery) -> None:
        """Begin to claim. What the recovery ended is told first."""
        for ended in recovery.ended:
            await self._announcer.ended_unrun(ended)
        if recovery.requeued or recovery.ended:
            self._log.warning("recovered", requeued=len(recovery.requeued), ended=len(recovery.ended))
        self._providers.know(await self._store.waiting_by_route())
        self.on_due()
        self._tasks = [
            asyncio.create_task(self._forever(self._look), name="ksi-claim"),
            asyncio.create_task(self._forever(self._watch_runs), name="ksi-watch"),
        ]

    async def stop(self, grace: float) -> None:
        """Claim no more; give what runs its grace, then give the rest back to the queue (R6)."""
        self._claiming = False
        claiming, *others = self._tasks
        for task in others:
            task.cancel()
        # Not cancelled: what a claim under way brings runs here, and must be given back by us.
        self.on_work()
        await asyncio.gather(claiming, *others, return_exceptions=True)
        if self._live and not await self._ends_within(grace):
            self._log.warning("giving back to the queue", requests=len(self._live))
            for run in list(self._live):
                run.stop(Stop.SHUTDOWN)
            await self._abandon_after(grace + GIVE_BACK)

    async def _ends_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _abandon_after(self, seconds: float) -> None:
        """Wait for what gives back. What cannot (a store that says no) is left to the next start's recovery."""
        if not await self._ends_within(seconds):
            self._log.error("left running for the next start to recover", requests=sorted(self._runs)[:100])
            tasks = [run.task for run in self._live if run.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def claiming(self) -> bool:
        """Whether new work is taken."""
        return self._claiming

    @property
    def runs(self) -> dict[str, Run]:
        """What runs here, by request id."""
        return self._runs

    def tasks_alive(self) -> dict[str, bool]:
        """The long-lived tasks, and whether each runs."""
        return {task.get_name(): not task.done() for task in self._tasks}

    # -- work -----------------------------------------------------------------------------------------------------

    def on_work(self) -> None:
        """Something may have become ready, or a slot free."""
        self._alarm.work.ring()

    def on_due(self) -> None:
        """Something new has a time."""
        self._alarm.time.ring()

    def launch(self, claim: Claimed) -> None:
        """Run a claimed request. Whatever its body holds, this does not fail: the run does."""
        # After a restart the run may begin before its reader is back.
        run = Run(claim, stream=self._bus.streams(claim.request_id) or claim.attempt > 1)
        self._runs[claim.request_id] = run
        self._live.add(run)
        self._idle.clear()
        run.task = asyncio.create_task(self._run(run))
        self._announcer.started(claim)

    async def _run(self, run: Run) -> None:
        request_id = run.claim.request_id
        try:
            settled = await self._runner.execute(run)
            if settled is not None and settled.due is not None:
                self.on_due()
        except Exception:  # noqa: BLE001 - the top of a run: a defect must not keep the conversation locked
            self._log.exception("a run failed", request_id=request_id)
            await self._runner.abandon(run)
        finally:
            self._live.discard(run)
            # A later attempt of the same request may have begun while this one was still telling of its end.
            if self._runs.get(request_id) is run:
                del self._runs[request_id]
            if not self._live:
                self._idle.set()

    def stop_run(self, request_id: str, why: Stop) -> bool:
        """Stop a request that runs here; whether it does."""
        run = self._runs.get(request_id)
        if run is None:
            return False
        run.stop(why)
        return True

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat a step until the queue stops. A fault is logged, and the step tried again after a pause."""
        while self._claiming:
            try:
                await step()
            except StoreError as error:
                self._log.error("the store said no, trying again", step=step.__name__, error=error.message)
                await self._clock.sleep(FAULT_PAUSE)
            except Exception:  # noqa: BLE001 - a defect in one step must not end all
                self._log.exception("step failed, trying again", step=step.__name__)
                await self._clock.sleep(FAULT_PAUSE)

    async def _look(self) -> None:
        """Wait for a reason, then do what time asks for and start what may run, each by one clock reading."""
        now = await self._alarm.wait()
        await self._unpark(now)
        if self._alarm.work.due(now):
            await self._claim(now)
        if self._alarm.time.due(now):
            await self._expire(now)

    async def _unpark(self, now: Moment) -> None:
        """Let what is parked be due where its provider is back before its time."""
        for route in self._providers.take_lifted():
            while await self._store.unpark(route, now):
                self.on_due()

    async def _expire(self, now: Moment) -> None:
        """Queue what is due and end what is late."""
        due = self._alarm.time
        due.take()
        try:
            expiry = await self._store.expire(now)
        except BaseException:
            due.ring()
            raise
        due.at(wall=expiry.next_wall, mono=expiry.next_mono)
        if expiry.more:
            due.ring()
        if expiry.woken:
            self.on_work()
        for ended in expiry.ended:
            await self._announcer.ended_unrun(ended)
        for lapsed in expiry.lapsed:
            self._locks.lapsed(lapsed)

    async def _claim(self, now: Moment) -> None:
        """Start what may run, and note when time alone lets more run."""
        work = self._alarm.work
        work.take()
        try:
            claims = await self._store.claim(self._providers.offers(now), CLAIMS, now)
        except BaseException:
            work.ring()
            raise
        for claim in claims.started:
            self.launch(claim)
        if claims.waits:
            self._providers.waits(claims.waits, now)
        wait = self._providers.next_change(now)
        if wait is not None:
            later = now.after_us(wait)
            work.at(wall=later.wall, mono=later.mono)
        if len(claims.started) + len(claims.blocked) >= CLAIMS:
            work.ring()
        for ended in claims.blocked:
            await self._announcer.ended_unrun(ended)

    # -- time -----------------------------------------------------------------------------------------------------

    async def _watch_runs(self) -> None:
        """Stop what runs past its total timeout: one look at all, so that no request has a timer of its own."""
        await self._clock.sleep(TICK)
        now = self._clock.now().mono
        for run in list(self._live):
            if run.deadline is not None and run.deadline <= now:
                run.stop(Stop.TIMEOUT)
