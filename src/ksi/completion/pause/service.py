"""`queue:pause`, `queue:resume`, `queue:drain`: the operators' pauses, kept in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo

import msgspec
import structlog

from ksi.clock import MICROSECONDS, Clock
from ksi.completion.pause.pauses import Pause, Pauses, Scope, decode_pauses, encode_pauses
from ksi.completion.provider_manager import ProviderManager
from ksi.completion.queue_manager import QueueManager
from ksi.errors import InvalidData
from ksi.events.bus import EventBus
from ksi.events.pauses import DrainData, PauseBody, PauseData, PauseReply, ResumeData
from ksi.store.base import Store
from ksi.store.provider_records import KeptRecord, KeptRecords

RECORD = ":pauses"
"""The name of the record in the store; no provider can be called that."""


class PauseService:
    """Pauses hold at all daemons of a store and over restarts; a drain is one daemon's, until it ends."""

    def __init__(
        self,
        store: Store,
        providers: ProviderManager,
        queue: QueueManager,
        bus: EventBus,
        clock: Clock,
        *,
        shared: bool,
    ) -> None:
        """`shared`: other daemons have the same store, whose clock all go by."""
        self._store = store
        self._providers = providers
        self._queue = queue
        self._bus = bus
        self._clock = clock
        self._shared = shared
        self._kept = KeptRecord()
        self._ahead = 0
        """The store's wall clock minus this machine's, in microseconds."""
        self._one = asyncio.Lock()
        self._log = structlog.get_logger("ksi.pauses")

    # -- events ---------------------------------------------------------------------------------------------------

    async def pause(self, data: PauseData) -> PauseReply:
        """`queue:pause`: start no more of it until it is resumed.

        Raises:
            InvalidData: more than one thing is named.
            NotFound: no such provider.
            StoreError: it could not be kept, and holds nowhere.
        """
        scope, name = await self._thing(data)
        now = self._clock.now()
        until = None if data.seconds is None else now.after(data.seconds).wall
        pause = Pause(scope=scope, name=name, since=now.wall, until=until, by=data.by, why=data.why)
        await self._change(lambda pauses: pauses.with_(pause), early=True)
        self._log.warning(pause.sentence(now.wall, _zone()))
        self._tell("queue:paused")
        return await self.status()

    async def resume(self, data: ResumeData) -> PauseReply:
        """`queue:resume`: start it again. It has no effect on other scopes. Raises as `pause`."""
        scope, name = await self._thing(data)
        await self._change(lambda pauses: pauses.without(scope, name))
        self._log.warning("resumed", scope=scope.value, name=name)
        self._tell("queue:resumed")
        return await self.status()

    async def drain(self, data: DrainData) -> PauseReply:
        """`queue:drain`: start nothing and take nothing new here.

        It answers when no request runs any more, or at once when the drain is cancelled.
        """
        self._queue.drain()
        self._log.warning("draining", running=len(self._queue.runs))
        await self._queue.drain_over(data.timeout)
        return await self.status()

    async def undrain(self) -> PauseReply:
        """`queue:undrain`: take work again."""
        self._queue.undrain()
        self._log.warning("takes work again")
        return await self.status()

    async def status(self) -> PauseReply:
        """`queue:pauses`: the pauses, with their operators."""
        totals = await self._store.totals()
        return msgspec.structs.replace(self._reply(), waiting=totals.queued)

    def problems(self) -> list[str]:
        """Return the pauses as sentences that say how to end each one."""
        now, zone = self._clock.now().wall, _zone()
        found = [f"{one.sentence(now, zone)}; {_how_to_resume(one)}" for one in self._active()]
        if self._queue.draining:
            found.append("the daemon drains: it takes no new work; `ksi drain --cancel` ends that")
        return found

    def shown(self) -> list[PauseBody]:
        """Return the pauses that hold now."""
        now, zone = self._clock.now().wall, _zone()
        return [
            PauseBody(
                scope=one.scope.value,
                name=one.name,
                since=one.since / MICROSECONDS,
                until=None if one.until is None else one.until / MICROSECONDS,
                by=one.by,
                why=one.why,
                sentence=one.sentence(now, zone),
            )
            for one in self._active()
        ]

    @property
    def draining(self) -> bool:
        """Return whether this daemon takes no new work."""
        return self._queue.draining

    # -- the record -----------------------------------------------------------------------------------------------

    def hear(self, found: KeptRecords) -> None:
        """Apply the stored pauses; called with all records when they were read."""
        self._take(found.records.get(RECORD, KeptRecord()), found.at)

    async def _change(self, step: Callable[[Pauses], Pauses], *, early: bool = False) -> None:
        """Change the stored pauses; again from another daemon's version if that was faster.

        `early`: this daemon goes by it before it is kept. So requests claimed meanwhile have started, or are held back,
        when the operator is answered.
        """
        async with self._one:
            try:
                await self._write(step, early=early)
            except BaseException:
                self._go_by_what_is_kept()
                raise

    async def _write(self, step: Callable[[Pauses], Pauses], *, early: bool) -> None:
        kept = self._providers.pauses
        written = False
        while not written:
            now = self._clock.now()
            after = step(kept.since_ended(now.wall))
            if after == kept:
                return
            if early:
                self._providers.hold_back(after)
            value = encode_pauses(after.shifted(self._ahead))
            put = await self._store.put_provider_record(RECORD, self._kept.version, value, now, tell=True)
            written = put.written
            self._take(put.kept, put.at)
            kept = self._providers.pauses

    def _take(self, kept: KeptRecord, at: int) -> None:
        if self._shared:
            self._ahead = at - self._clock.now().wall
        if kept == self._kept:
            return
        self._kept = kept
        self._go_by_what_is_kept()

    def _go_by_what_is_kept(self) -> None:
        self._providers.hold_back(self._decoded(self._kept).shifted(-self._ahead))

    def _decoded(self, kept: KeptRecord) -> Pauses:
        if not kept.version:
            return Pauses()
        try:
            return decode_pauses(kept.value)
        except msgspec.MsgspecError as error:
            self._log.error("the stored pauses cannot be read; nothing is paused", error=str(error))
            return Pauses()

    def _active(self) -> list[Pause]:
        now = self._clock.now().wall
        return [one for one in self._providers.pauses.items if one.active(now)]

    async def _thing(self, data: ResumeData) -> tuple[Scope, str]:
        """Return the kind and the name of the thing that an event concerns."""
        named = [
            (scope, name)
            for scope, name in (
                (Scope.PROVIDER, data.provider),
                (Scope.AGENT, data.agent_id),
                (Scope.SESSION, data.session_id),
                (Scope.PRIORITY, data.priority),
            )
            if name is not None
        ]
        if len(named) > 1:
            raise InvalidData("name one of provider, agent_id, session_id and priority, or none of them for everything")
        scope, name = named[0] if named else (Scope.ALL, "")
        if scope is Scope.PROVIDER:
            self._providers.check_name(name)
        if scope is Scope.SESSION:
            # A provider's own name for a session means the conversation that it belongs to.
            session = await self._store.session(name)
            name = name if session is None else session.conversation
        return scope, name

    def _reply(self) -> PauseReply:
        return PauseReply(paused=self.shown(), draining=self._queue.draining, running=len(self._queue.runs))

    def _tell(self, event: str) -> None:
        self._bus.publish(event, self._reply())


def _how_to_resume(pause: Pause) -> str:
    option = "" if pause.scope is Scope.ALL else f" --{pause.scope.value} {pause.name}"
    return f"`ksi resume{option}` ends that"


def _zone() -> tzinfo:
    return datetime.now().astimezone().tzinfo or UTC
