"""Keeps one record of each provider in the store, together with the other daemons where there are any.

No request waits for the store here, and a provider that is well costs nothing. A failure is written at once, and the
latest calls of every daemon with it; what else calls of a suspected provider say within LAZY. PACE keeps a storm of
failures to a few writes. What a probe or a quota said holds here before it is written: no call follows in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import structlog

from ksi.clock import Clock, Moment
from ksi.completion.provider_breaker import BreakerState
from ksi.completion.provider_limits import LimitCause
from ksi.completion.provider_record import PlaceRecord, ProviderRecord, Seen, decode_record, encode_record, learned
from ksi.config import BreakerConfig
from ksi.errors import StoreError
from ksi.store.provider_records import KeptRecord, KeptRecords, PutRecord

LAZY = 0.25
"""Seconds after which calls that succeeded are written, where they matter."""

PACE = 0.02
"""Seconds between two writes at least."""

FAULT_PAUSE = 0.5
"""Seconds to wait after the store said no."""


class RecordStore(Protocol):
    """What is asked of a store; see `ksi.store.base.Store`."""

    async def provider_records(self, now: Moment) -> KeptRecords:
        """All records."""
        ...

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """Compare and set one."""
        ...


class Place(msgspec.Struct, frozen=True):
    """Where a provider is reached from, and how many calls it takes at once."""

    name: str = ""
    """Empty where all daemons reach the same provider, else this machine."""
    slots: int = 1


class View(msgspec.Struct, frozen=True):
    """A provider's record as this daemon goes by it, in its own wall time."""

    enabled: bool
    place: PlaceRecord
    version: int
    """Of the record."""


def _nobody(name: str, view: View) -> None:
    """Stands for `on_view` until somebody wants to see."""


def _nothing() -> None:
    """Stands for `on_change` until somebody wants to know."""


class _Kept:
    """One provider: the record as it was last seen, and what calls said since it was written."""

    def __init__(self, name: str, place: Place, samples: int, *, alone: bool) -> None:
        self.name = name
        self.where = place
        self.alone = alone
        self.kept = KeptRecord()
        self.record = ProviderRecord()
        self.state = BreakerState.CLOSED
        self.wary = False
        """Whether calls that succeed are to be written too."""
        self.calls: deque[Seen] = deque(maxlen=samples)
        """The latest ones; more are not judged."""
        self.hits: deque[Seen] = deque(maxlen=samples)
        """Calls that ran into a limit."""
        self.failed = False
        """Whether one of `calls` failed."""
        self.writing: tuple[Seen, ...] = ()
        """What is on its way to the store."""

    @property
    def place(self) -> PlaceRecord:
        """The record of this daemon's place."""
        return self.record.place(self.where.name)

    @property
    def matters(self) -> bool:
        """Whether the record would change by what is unwritten."""
        return self.failed or bool(self.hits) or (self.wary and bool(self.calls))

    def hold(self, kept: KeptRecord, record: ProviderRecord) -> None:
        """Go by this record."""
        self.kept, self.record = kept, record
        self.state, self.wary = self.place.breaker.state, self.place.wary

    def note(self, seen: Seen) -> None:
        """Keep what a call said until it is written."""
        if seen.hit is None and not (seen.neutral and not self.place.limits):
            self.calls.append(seen)
            self.failed = self.failed or seen.failed
        elif seen.hit is not None:
            self.hits.append(seen)

    @property
    def unwritten(self) -> tuple[Seen, ...]:
        """What calls said that is in no record yet."""
        return (*self.writing, *self.calls, *self.hits)

    @property
    def decisive(self) -> list[Seen]:
        """Of that, what no other daemon's calls can outweigh: this one goes by it before it is written."""
        decisive = self.alone or self.state is not BreakerState.CLOSED or bool(self.place.limits)
        return [one for one in self.unwritten if decisive or one.hit is not None]

    def take(self) -> tuple[Seen, ...]:
        """What is unwritten, which is on its way from now on."""
        self.writing = self.unwritten
        self.forget()
        return self.writing

    def put_back(self) -> None:
        """It could not be written."""
        unwritten, self.writing = self.unwritten, ()
        self.forget()
        for one in unwritten:
            self.note(one)

    def forget(self) -> None:
        """Say no more of the calls until now."""
        self.calls.clear()
        self.hits.clear()
        self.failed = False


class Team:
    """One task, `ksi-providers`. `on_view` is called with each record that changed, `on_change` when more may run."""

    def __init__(
        self,
        store: RecordStore,
        places: Mapping[str, Place],
        config: BreakerConfig,
        clock: Clock,
        *,
        alone: bool = False,
    ) -> None:
        """`alone`: no other daemon writes these records."""
        self._store = store
        self._alone = alone
        self._config = config
        self._clock = clock
        self._providers = {name: _Kept(name, place, config.max_samples, alone=alone) for name, place in places.items()}
        self._ahead = 0
        """By how much the store's wall clock is ahead of this machine's."""
        self._one = asyncio.Lock()
        self._something = asyncio.Event()
        self._urgent = asyncio.Event()
        self._prompt = asyncio.Event()
        self._look = False
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.providers")
        self.on_view: Callable[[str, View], None] = _nobody
        self.on_change: Callable[[], None] = _nothing

    # -- life -----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether its task runs."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Look at what is known, and begin to write."""
        await self.refresh()
        self._task = asyncio.create_task(self._forever(), name="ksi-providers")

    async def stop(self) -> None:
        """Write what is unwritten, and no more."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        try:
            await asyncio.wait_for(self.write(), FAULT_PAUSE)
        except (StoreError, TimeoutError) as error:
            self._log.warning("the latest calls of providers are forgotten", error=str(error))

    # -- what is told ---------------------------------------------------------------------------------------------

    def saw(self, name: str, seen: Seen) -> None:
        """A call ended; times are this process's."""
        kept = self._providers[name]
        kept.note(seen)
        trying = kept.state is not BreakerState.CLOSED or bool(kept.place.limits)
        if seen.hit is not None or trying or (kept.alone and kept.matters):
            self._show(kept)
        if seen.hit is not None or trying:
            self._prompt.set()
            self._hurry()
        elif seen.failed:
            self._hurry()
        elif kept.wary:
            self._something.set()

    def look(self) -> None:
        """Other daemons changed a record, or may have."""
        self._look = True
        self._prompt.set()
        self._hurry()

    def _hurry(self) -> None:
        self._urgent.set()
        self._something.set()

    async def switch(self, name: str, *, enabled: bool) -> None:
        """An operator's word: to be asked, or not.

        Raises:
            StoreError: it could not be written, and holds nowhere.
        """
        async with self._one:
            await self._change(self._providers[name], lambda record: record.switched(enabled))

    async def reset(self, name: str) -> None:
        """An operator says that it is healthy. Raises as `switch`."""
        kept = self._providers[name]
        async with self._one:
            kept.forget()
            await self._change(kept, lambda record: record.reset(kept.where.name, self._config))

    async def lift(self, name: str, cause: LimitCause) -> None:
        """A limit's cause is over: the provider is probed at once. Raises as `switch`."""
        kept = self._providers[name]
        async with self._one:
            at = self._clock.now().wall + self._ahead
            await self._change(kept, lambda record: record.lifted(kept.where.name, cause, at))

    # -- the store ------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Look at all records.

        Raises:
            StoreError: they cannot be read.
        """
        async with self._one:
            found = await self._store.provider_records(self._clock.now())
            self._read_clock(found.at)
            for kept in self._providers.values():
                self._take(kept, found.records.get(kept.name, KeptRecord()))

    def _read_clock(self, at: int) -> None:
        """Compare the store's clock with this machine's; a store that one daemon has alone goes by the same one."""
        if not self._alone:
            self._ahead = at - self._clock.now().wall

    async def write(self) -> None:
        """Put what calls said into the records, where it matters."""
        for kept in self._providers.values():
            if kept.matters:
                await self._learn(kept)

    async def _learn(self, kept: _Kept) -> None:
        async with self._one:
            seen = kept.take()
            try:
                await self._change(
                    kept,
                    lambda record: record.learned(
                        kept.where.name, [one.shifted(self._ahead) for one in seen], self._config, kept.where.slots
                    ),
                )
            finally:
                kept.put_back()

    async def _change(self, kept: _Kept, step: Callable[[ProviderRecord], ProviderRecord]) -> None:
        """Take a step from the record as it is; from another daemon's again, where that one was faster."""
        while (after := step(kept.record)) != kept.record:
            tell = after.told != kept.record.told
            now = self._clock.now()
            put = await self._store.put_provider_record(
                kept.name, kept.kept.version, encode_record(after), now, tell=tell
            )
            self._read_clock(put.at)
            if put.written:
                kept.writing = ()
            self._take(kept, put.kept)
            if put.written:
                return
        kept.writing = ()

    def _take(self, kept: _Kept, found: KeptRecord) -> None:
        """Go by a record from now on."""
        if found == kept.kept:
            return
        told, was_wary = kept.record.told, kept.wary
        kept.hold(found, self._decoded(kept.name, found))
        if kept.wary and not was_wary and kept.calls:
            # Somebody met a failure: what this daemon's calls said before counts together with it.
            self._hurry()
        self._show(kept)
        if kept.record.told != told:
            self.on_change()

    def _show(self, kept: _Kept) -> None:
        """Publish the effective record: the stored one plus our unwritten calls."""
        place = kept.place.shifted(-self._ahead)
        if decisive := kept.decisive:
            place = learned(place, decisive, self._config, kept.where.slots)
        self.on_view(kept.name, View(kept.record.enabled, place, kept.kept.version))

    def _decoded(self, name: str, found: KeptRecord) -> ProviderRecord:
        if not found.version:
            return ProviderRecord()
        try:
            return decode_record(found.value)
        except msgspec.MsgspecError as error:
            self._log.error("a record that cannot be read; the provider begins anew", provider=name, error=str(error))
            return ProviderRecord()

    async def _forever(self) -> None:
        while True:
            await self._something.wait()
            if not self._urgent.is_set():
                await self._wait(LAZY, self._urgent)
            self._something.clear()
            self._urgent.clear()
            pause = PACE
            try:
                await self._step()
            except StoreError as error:
                self._log.warning("providers' records are written later", error=error.message)
                self._hurry()
                pause = FAULT_PAUSE
            except Exception:  # noqa: BLE001 - the top of a long-lived loop: without it nobody hears of a failure
                self._log.exception("providers' records not written")
                pause = FAULT_PAUSE
            await self._wait(pause, self._prompt)
            self._prompt.clear()

    async def _step(self) -> None:
        if self._look:
            self._look = False
            try:
                await self.refresh()
            except StoreError:
                self._look = True
                raise
        await self.write()

    async def _wait(self, seconds: float, unless: asyncio.Event) -> None:
        """Wait so long, or until there is a reason not to."""
        reason = asyncio.ensure_future(unless.wait())
        slept = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait((reason, slept), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reason.cancel()
            slept.cancel()
