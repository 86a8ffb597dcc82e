"""The queue's motor: it wakes, claims, starts and stops requests, and does the work that is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from ksi.budgets.rules import EXCEEDED, Notice
from ksi.clock import Clock, Moment
from ksi.completion.budget.book import BudgetBook
from ksi.completion.completion_runner import CompletionRunner, Run, Stop
from ksi.completion.notify.announcer import Announcer
from ksi.completion.pause.set_aside import SetAside
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.wakeup import TICK, Alarm
from ksi.config.schema import Config
from ksi.conversation.lock_events import LockEvents
from ksi.errors import StoreError, StoreUnavailable
from ksi.events.bus import EventBus
from ksi.host.supervise import MAX_BACKOFF, Periodic, Supervised, is_cancelled
from ksi.request import Outcome
from ksi.store.base import Store
from ksi.store.values import CLAIM_BYTES, Claimed, Recovery

CLAIMS = 64
"""Requests that one claim takes."""

GIVE_BACK = 5.0
"""Seconds, in addition to the grace period, in which stopped requests must be back in the queue."""

FAULT_PAUSE = 0.5
"""Seconds to wait after a fault. The pause grows."""

LONGEST_PAUSE = 2.0
"""Seconds to wait after many faults: when the store is back, claims resume soon."""


def _nobody() -> None:
    """Stands for `on_end` while no run waits for a slot."""


class QueueManager:
    """Holds the local runs. `on_work` may be called at any time; it only sets a flag."""

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        runner: CompletionRunner,
        announcer: Announcer,
        locks: LockEvents,
        bus: EventBus,
        budgets: BudgetBook,
        config: Config,
        clock: Clock,
    ) -> None:
        self._budgets = budgets
        budgets.on_notice.append(self._hear_of_budget)
        self._left: set[str] = set()
        """Budgets of providers that are used up, whose waiting requests may go on at another provider."""
        self._store = store
        self._providers = providers
        self._runner = runner
        self._announcer = announcer
        self._locks = locks
        self._bus = bus
        self._config = config
        self._clock = clock
        self._alarm = Alarm(clock)
        self.set_aside = SetAside(store)
        self._runs: dict[str, Run] = {}
        self._live: set[Run] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._claims = Supervised(
            "ksi-claim", self._look, clock, backoff=FAULT_PAUSE, longest_pause=LONGEST_PAUSE, vital=True
        )
        self._watch = Periodic("ksi-watch", self._watch_runs, TICK, clock, longest_pause=LONGEST_PAUSE, vital=True)
        self._unparked: list[str] = []
        """Routes whose parked requests are due, and not in the store yet."""
        self._broken: set[Run] = set()
        """Runs that broke and could not be ended yet."""
        self._claiming = True
        self._still = False
        self._draining = False
        self._undrained = asyncio.Event()
        self.on_end: Callable[[], None] = _nobody
        """Called when a run has ended, and its slot is free."""
        self._log = structlog.get_logger("ksi.queue")
        providers.on_change = self.on_work

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, recovery: Recovery) -> None:
        """Begin to claim. Ends by the recovery are published first."""
        for ended in recovery.ended:
            await self._announcer.ended_unrun(ended)
        if recovery.requeued or recovery.ended:
            self._log.warning("recovered", requeued=len(recovery.requeued), ended=len(recovery.ended))
        self._providers.know(await self._store.waiting_by_route())
        self.on_due()
        for task in self.tasks():
            task.start()

    async def stop(self, grace: float) -> None:
        """Claim no more. Give running requests their grace, then give the rest back to the queue."""
        self._claiming = False
        await self._watch.stop()
        # Not stopped in the middle: requests of a claim under way run here, and must be requeued by us.
        self.on_work()
        await self._claims.finish()
        if self._live and not await self.drained(grace):
            self._log.warning("giving back to the queue", requests=len(self._live))
            for run in list(self._live):
                run.stop(Stop.SHUTDOWN)
            await self._abandon_after(grace + GIVE_BACK)

    async def _abandon_after(self, seconds: float) -> None:
        """Wait for the requeueing. Requests that cannot be requeued (a store error) are left to the next start's
        recovery."""
        if not await self.drained(seconds):
            answers = sum(run.attempt is not None and run.attempt.outcome is Outcome.COMPLETED for run in self._live)
            self._log.error(
                "left running for the next start to recover", requests=sorted(self._runs)[:100], answers_lost=answers
            )
            tasks = [run.task for run in self._live if run.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def claiming(self) -> bool:
        """Return whether new work is taken."""
        return self._claiming

    # -- drain ----------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Return whether it starts nothing and takes nothing new until `undrain`."""
        return self._draining

    def drain(self) -> None:
        """Start nothing more; running requests continue."""
        self._draining = True
        self._undrained.clear()

    def undrain(self) -> None:
        """Start waiting requests again."""
        self._draining = False
        self._undrained.set()
        self.on_work()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Claim nothing inside: a new request may be paused by an order that came with it."""
        self._still = True
        try:
            yield
        finally:
            self._still = False
            self.on_work()

    async def drain_over(self, timeout: float | None) -> None:
        """Return when nothing runs, when the drain was cancelled, or after `timeout` seconds."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._undrained)]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def drained(self, timeout: float | None) -> bool:
        """Return when nothing runs, or after `timeout` seconds; True if nothing runs."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    @property
    def runs(self) -> dict[str, Run]:
        """The runs at this daemon, by request id."""
        return self._runs

    def tasks(self) -> list[Supervised]:
        """The supervised tasks."""
        return [self._claims, self._watch]

    def problems(self) -> list[str]:
        """One sentence on broken runs that cannot be ended, if there are any."""
        if not self._broken:
            return []
        one = min(run.claim.request_id for run in self._broken)
        return [f"{len(self._broken)} runs broke and cannot be ended yet; one is {one!r}. The log has the traces"]

    # -- work -----------------------------------------------------------------------------------------------------

    def on_work(self) -> None:
        """Something may have become ready, or a slot free."""
        self._alarm.work.ring()

    def on_due(self) -> None:
        """Something new has a time."""
        self._alarm.time.ring()

    def launch(self, claims: Sequence[Claimed]) -> None:
        """Run claimed requests: every run begins here. Whatever a body holds, this does not fail: the run does."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        for claim in claims:
            # After a restart the run may begin before its reader is back.
            run = Run(claim, stream=self._bus.streams(claim.request_id) or claim.attempt > 1)
            self._runs[claim.request_id] = run
            self._live.add(run)
            self._idle.clear()
            run.task = loop.create_task(self._run(run))
        for claim in claims:
            self._announcer.started(claim)

    async def _run(self, run: Run) -> None:
        request_id = run.claim.request_id
        try:
            settled = await self._runner.execute(run)
            if settled is not None and settled.due is not None:
                self.on_due()
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            await self._end_broken(run, error)
        except Exception as error:  # noqa: BLE001 - the top of a run: a defect must not keep the conversation locked
            await self._end_broken(run, error)
        finally:
            self._broken.discard(run)
            self._live.discard(run)
            # A later attempt of the same request may have begun while this one was still telling of its end.
            if self._runs.get(request_id) is run:
                del self._runs[request_id]
            if not self._live:
                self._idle.set()
            self.on_end()

    async def _end_broken(self, run: Run, fault: BaseException) -> None:
        """End a run that broke on a defect, however often that breaks as well: till then its conversation is locked."""
        pause = FAULT_PAUSE
        while True:
            self._log.error("a run failed", request_id=run.claim.request_id, exc_info=fault)
            try:
                await self._runner.abandon(run)
                return
            except Exception as error:  # noqa: BLE001 - as above
                fault = error
            if isinstance(fault, StoreError):
                # The store is damaged: clients should not wait until an operator has repaired it.
                self._announcer.refuse(run.claim.request_id, fault)
            self._broken.add(run)
            await self._clock.sleep(pause)
            pause = min(2 * pause, MAX_BACKOFF)

    def _refuse_waiting(self, fault: StoreUnavailable) -> None:
        """The store is damaged: clients should not wait until an operator has repaired it."""
        for request_id in self._announcer.awaited():
            if request_id not in self._runs:
                self._announcer.refuse(request_id, fault)

    def stop_run(self, request_id: str, why: Stop) -> bool:
        """Stop a request if it runs here; returns True if it does."""
        run = self._runs.get(request_id)
        if run is None:
            return False
        run.stop(why)
        return True

    async def _look(self) -> None:
        """Wait for a reason, then do the due work and start admissible requests, each by one clock reading.

        Work left undone by a fault rings again, so that the next look repeats it.
        """
        now = await self._alarm.wait()
        await self._unpark(now)
        await self._bring_back(now)
        if self._alarm.work.due(now):
            await self._claim(now)
        if self._alarm.time.due(now):
            await self._expire(now)

    async def _unpark(self, now: Moment) -> None:
        """Let parked requests become due if their provider is back early."""
        self._unparked += self._providers.take_lifted()
        try:
            while self._unparked:
                while await self._store.unpark(self._unparked[0], now):
                    self.on_due()
                del self._unparked[0]
        except BaseException:
            self._alarm.work.ring()
            raise

    async def _bring_back(self, now: Moment) -> None:
        """Let requests that are not paused any more be claimed, a step in each look."""
        try:
            more = await self.set_aside.step(self._providers.paused(now), now)
        except BaseException:
            self._alarm.work.ring()
            raise
        if more:
            self.on_work()

    async def _expire(self, now: Moment) -> None:
        """Queue due requests and end late ones."""
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
        """Start admissible requests, and note when time alone admits more."""
        work = self._alarm.work
        work.take()
        if self._draining or self._still:
            return
        try:
            while self._left:
                budget = next(iter(self._left))
                if not await self._store.reconsider(budget, now):
                    self._left.discard(budget)
            claims = await self._store.claim(
                self._providers.offers(now), CLAIMS, now, self._providers.paused(now), self._budgets.caps(now.wall)
            )
        except BaseException as fault:
            work.ring()
            if isinstance(fault, StoreUnavailable) and not fault.passes:
                self._refuse_waiting(fault)
            raise
        self.launch(claims.started)
        if claims.notices:
            self._budgets.tell(claims.notices)
        if claims.waiting:
            self._alarm.time.ring()
            await self._look_at_providers(now)
        if claims.waits:
            self._providers.waits(claims.waits, now)
        wait = self._providers.next_change(now)
        if wait is not None:
            later = now.after_us(wait)
            work.at(wall=later.wall, mono=later.mono)
        large = sum(len(claim.body) for claim in claims.started) >= CLAIM_BYTES
        if large or claims.more or len(claims.started) + len(claims.blocked) >= CLAIMS:
            work.ring()
        for ended in claims.blocked:
            await self._announcer.ended_unrun(ended)

    def _hear_of_budget(self, notice: Notice) -> None:
        if notice.threshold is None:
            self._leave(notice.name, notice.subject, notice.end)

    async def _look_at_providers(self, now: Moment) -> None:
        """Some wait for budgets: see if those of providers are used up. Another daemon may have been told."""
        for cap in self._budgets.caps(now.wall):
            for one in await self._store.budget_uses(cap.name, cap.start) if cap.kind == "provider" else ():
                told_of = cap.limit_of(one.subject) if one.use.told & EXCEEDED else None
                if one.start == cap.start and one.use.told_of == told_of:
                    self._leave(cap.name, one.subject, cap.end)

    def _leave(self, budget: str, subject: str, until: int) -> None:
        kind, _, named = subject.partition(":")
        if kind == "provider" and self._providers.use_up(named, until):
            self._left.add(budget)
            self.on_work()

    def budgets_changed(self) -> None:
        """An operator set, dropped or raised a budget."""
        self._providers.refill()
        self.on_work()

    # -- time -----------------------------------------------------------------------------------------------------

    async def _watch_runs(self) -> None:
        """Stop runs past their total timeout: one check for all, so that no request has a timer of its own."""
        now = self._clock.now().mono
        for run in list(self._live):
            if run.deadline is not None and run.deadline <= now:
                run.stop(Stop.TIMEOUT)
