"""Keeps one record of each provider in the store, together with the other daemons if there are any.

No request waits for the store here, and a provider that is well costs nothing. A failure is written at once, and the
latest calls of every daemon with it; other outcomes of a suspected provider's calls follow within LAZY. PACE keeps a
storm of failures to a few writes. The outcome of a probe or a quota holds here before it is written: no call follows in
between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import structlog

from ksi.clock import Clock, Moment
from ksi.completion.pool.breaker import BreakerState
from ksi.completion.pool.limits import LimitCause
from ksi.completion.pool.record import (
    PlaceRecord,
    ProviderRecord,
    Seen,
    SwitchedOff,
    decode_record,
    encode_record,
    learned,
)
from ksi.config.schema import BreakerConfig
from ksi.errors import StoreError
from ksi.host.supervise import Supervised
from ksi.store.provider_records import KeptRecord, KeptRecords, PutRecord

LAZY = 0.25
"""Seconds after which successful calls are written, if they matter."""

PACE = 0.02
"""Seconds between two writes at least."""

FAULT_PAUSE = 0.5
"""Seconds to wait after a fault, however many there were: other daemons wait for the news."""


class RecordStore(Protocol):
    """The verbs of a store that this module uses; see `ksi.store.base.Store`."""

    async def provider_records(self, now: Moment) -> KeptRecords:
        """All records."""
        ...

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        """Compare and set one."""
        ...


class Place(msgspec.Struct, frozen=True):
    """The place from which a provider is reached, and the number of calls that it takes at once."""

    name: str = ""
    """Empty if all daemons reach the same provider, otherwise this machine."""
    slots: int = 1


class View(msgspec.Struct, frozen=True):
    """A provider's record as this daemon goes by it, in its own wall time."""

    enabled: bool
    place: PlaceRecord
    version: int
    """The version of the record."""
    off: SwitchedOff | None = None
    """The operator's switch, if one disabled it."""


def _nobody(name: str, view: View) -> None:
    """Stands for `on_view` until a listener is set."""


def _nothing() -> None:
    """Stands for `on_change` until a listener is set."""


def _unheard(found: KeptRecords) -> None:
    """Stands for `on_records` until a listener is set."""


class _Kept:
    """One provider: the record as last seen, and the outcomes of calls since it was written."""

    def __init__(self, name: str, place: Place, samples: int, *, alone: bool) -> None:
        self.name = name
        self.where = place
        self.alone = alone
        self.kept = KeptRecord()
        self.record = ProviderRecord()
        self.state = BreakerState.CLOSED
        self.wary = False
        """True if calls that succeed are to be written too."""
        self.calls: deque[Seen] = deque(maxlen=samples)
        """The latest ones; more are not judged."""
        self.hits: deque[Seen] = deque(maxlen=samples)
        """Calls that ran into a limit."""
        self.failed = False
        """True if one of `calls` failed."""
        self.writing: tuple[Seen, ...] = ()
        """The calls' evidence that is being written to the store."""

    @property
    def place(self) -> PlaceRecord:
        """The record of this daemon's place."""
        return self.record.place(self.where.name)

    @property
    def matters(self) -> bool:
        """Return True if the unwritten outcomes would change the record."""
        return self.failed or bool(self.hits) or (self.wary and bool(self.calls))

    def hold(self, kept: KeptRecord, record: ProviderRecord) -> None:
        """Go by this record."""
        self.kept, self.record = kept, record
        self.state, self.wary = self.place.breaker.state, self.place.wary

    def note(self, seen: Seen) -> None:
        """Keep a call's outcome until it is written."""
        if seen.hit is None and not (seen.neutral and not self.place.limits):
            self.calls.append(seen)
            self.failed = self.failed or seen.failed
        elif seen.hit is not None:
            self.hits.append(seen)

    @property
    def unwritten(self) -> tuple[Seen, ...]:
        """The calls' evidence that is in no record yet."""
        return (*self.writing, *self.calls, *self.hits)

    @property
    def decisive(self) -> list[Seen]:
        """The part of it that no other daemon's calls can outweigh. This daemon acts on it before it is written."""
        decisive = self.alone or self.state is not BreakerState.CLOSED or bool(self.place.limits)
        return [one for one in self.unwritten if decisive or one.hit is not None]

    def take(self) -> tuple[Seen, ...]:
        """Take the unwritten evidence; it counts as being written from now on."""
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
    """One task, `ksi-providers`. `on_view` is called with each record that changed, `on_change` when more may run, and
    `on_records` with all records that were read, those of others among them."""

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
        """The store's wall clock minus this machine's, in microseconds."""
        self._one = asyncio.Lock()
        self._something = asyncio.Event()
        self._urgent = asyncio.Event()
        self._prompt = asyncio.Event()
        self._look = False
        self.task = Supervised(
            "ksi-providers", self._work, clock, backoff=FAULT_PAUSE, longest_pause=FAULT_PAUSE, vital=True
        )
        self._log = structlog.get_logger("ksi.providers")
        self.on_view: Callable[[str, View], None] = _nobody
        self.on_change: Callable[[], None] = _nothing
        self.on_records: Callable[[KeptRecords], None] = _unheard

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the records, and begin to write."""
        await self.refresh()
        self.task.start()

    async def stop(self) -> None:
        """Write the unwritten outcomes, and then stop."""
        if not self.task.alive:
            return
        await self.task.stop()
        try:
            await asyncio.wait_for(self.write(), FAULT_PAUSE)
        except (StoreError, TimeoutError) as error:
            self._log.warning("the latest calls of providers are forgotten", error=str(error))

    # -- publication --------------------------------------------------------------------------------------------------

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

    async def switch(self, name: str, *, enabled: bool, by: str = "", why: str = "") -> None:
        """An operator's word: to be asked, or not, by whom and why.

        Raises:
            StoreError: it could not be written, and holds nowhere.
        """
        async with self._one:
            off = None if enabled else SwitchedOff(self._clock.now().wall + self._ahead, by, why)
            await self._change(self._providers[name], lambda record: record.switched(off))

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
            self.on_records(found)
            for kept in self._providers.values():
                self._take(kept, found.records.get(kept.name, KeptRecord()))

    def _read_clock(self, at: int) -> None:
        """Compare the store's clock with this machine's; a store that one daemon has alone goes by the same one."""
        if not self._alone:
            self._ahead = at - self._clock.now().wall

    async def write(self) -> None:
        """Write outcomes of calls into the records, if they matter."""
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
        """Change the present record; again from another daemon's version if that was faster."""
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
            # Another daemon met a failure: this daemon's earlier outcomes count together with it.
            self._hurry()
        self._show(kept)
        if kept.record.told != told:
            self.on_change()

    def _show(self, kept: _Kept) -> None:
        """Publish the effective record: the stored one plus our unwritten calls."""
        place = kept.place.shifted(-self._ahead)
        if decisive := kept.decisive:
            place = learned(place, decisive, self._config, kept.where.slots)
        off = kept.record.off
        off = None if off is None else off.shifted(-self._ahead)
        self.on_view(kept.name, View(kept.record.enabled, place, kept.kept.version, off))

    def _decoded(self, name: str, found: KeptRecord) -> ProviderRecord:
        if not found.version:
            return ProviderRecord()
        try:
            return decode_record(found.value)
        except msgspec.MsgspecError as error:
            self._log.error(
                "a provider's record cannot be read; it starts with an empty one", provider=name, error=str(error)
            )
            return ProviderRecord()

    async def _work(self) -> None:
        """Wait until there is something to write or to look at, and do it."""
        await self._something.wait()
        if not self._urgent.is_set():
            await self._wait(LAZY, self._urgent)
        self._something.clear()
        self._urgent.clear()
        try:
            await self._step()
        except BaseException:
            self._hurry()
            raise
        await self._wait(PACE, self._prompt)
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
