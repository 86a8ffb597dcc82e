"""The queue's motor: wakes, claims what may run, starts it, and stops it; does what time asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.announcer import Announcer
from ksi.completion.completion_runner import CompletionRunner, Run, Stop
from ksi.completion.provider_manager import ProviderManager
from ksi.config import Config
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError
from ksi.event_bus import EventBus
from ksi.store.base import Store
from ksi.store.values import Claimed, Expiry, Recovery

CLAIMS = 64
"""Requests that one claim takes."""

TICK = 0.25
"""Seconds between looks at running requests' timeouts, and the longest sleep before a look at what is due."""

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
        self._work = asyncio.Event()
        self._due_changed = asyncio.Event()
        self._runs: dict[str, Run] = {}
        self._live: set[Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._claiming = True
        self._waits_for_provider = False
        self._log = structlog.get_logger("ksi.queue")

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, recovery: Recovery) -> None:
        """Begin to claim. What the recovery ended is told first."""
        for ended in recovery.ended:
            await self._announcer.ended_unrun(ended)
        if recovery.requeued or recovery.ended:
            self._log.warning("recovered", requeued=len(recovery.requeued), ended=len(recovery.ended))
        self._providers.know(await self._store.waiting_by_route())
        self._tasks = [
            asyncio.create_task(self._forever(self._claim), name="ksi-claim"),
            asyncio.create_task(self._forever(self._keep_time), name="ksi-time"),
            asyncio.create_task(self._forever(self._watch_runs), name="ksi-watch"),
        ]

    async def stop(self, grace: float) -> None:
        """Claim no more; give what runs its grace, then give the rest back to the queue (R6)."""
        self._claiming = False
        claiming, *others = self._tasks
        for task in others:
            task.cancel()
        # Not cancelled: what a claim under way brings runs here, and must be given back by us.
        self._work.set()
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
        self._work.set()

    def on_due(self) -> None:
        """Something new has a time."""
        self._due_changed.set()

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

    async def _claim(self) -> None:
        """Start what may run, when something may."""
        await self._work.wait()
        self._work.clear()
        now = self._clock.now()
        try:
            claims = await self._store.claim(self._providers.offers(now), CLAIMS, now)
        except BaseException:
            self._work.set()
            raise
        for claim in claims.started:
            self.launch(claim)
        for ended in claims.blocked:
            await self._announcer.ended_unrun(ended)
        if len(claims.started) + len(claims.blocked) >= CLAIMS:
            self._work.set()
        if claims.waits:
            self._providers.waits(claims.waits, now)
        if not self._waits_for_provider and self._providers.next_change(now) is not None:
            # Time alone will let more run: a breaker, a quota or a rate limit.
            self.on_due()

    # -- time -----------------------------------------------------------------------------------------------------

    async def _keep_time(self) -> None:
        """Queue what is due and end what is late, at its moment."""
        self._due_changed.clear()
        if self._waits_for_provider:
            self.on_work()
        expiry = await self._store.expire(self._clock.now())
        for ended in expiry.ended:
            await self._announcer.ended_unrun(ended)
        for lapsed in expiry.lapsed:
            self._locks.lapsed(lapsed)
        if not expiry.more:
            await self._sleep_until_due(expiry)

    async def _sleep_until_due(self, expiry: Expiry) -> None:
        """Until the next time is there, another one comes in, or, with a time set, the clock may have stepped."""
        now = self._clock.now()
        provider_back = self._providers.next_change(now)
        self._waits_for_provider = provider_back is not None
        spans = [
            (at - here) / MICROSECONDS
            for at, here in (
                (expiry.next_wall, now.wall),
                (expiry.next_mono, now.mono),
                (provider_back, now.mono),
            )
            if at is not None
        ]
        changed = asyncio.ensure_future(self._due_changed.wait())
        slept = asyncio.ensure_future(self._clock.sleep(min(*spans, TICK) if spans else 3600.0))
        try:
            await asyncio.wait((changed, slept), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            slept.cancel()

    async def _watch_runs(self) -> None:
        """Stop what runs past its total timeout: one look at all, so that no request has a timer of its own."""
        await self._clock.sleep(TICK)
        now = self._clock.now().mono
        for run in list(self._live):
            if run.deadline is not None and run.deadline <= now:
                run.stop(Stop.TIMEOUT)
