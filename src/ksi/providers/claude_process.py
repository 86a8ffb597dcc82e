"""One Claude Code process: prompts in, events out, one turn at a time; watched while it waits for the next."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ksi.clock import MICROSECONDS, Clock
from ksi.providers.claude_launch import Launch, Place, arguments
from ksi.providers.claude_stream import Event, HarmlessTools, Limited, LineSplitter, Other, UnreadableError, parse_all
from ksi.providers.process import ChildProcess, ProcessRegistry, ProcessStartError, memory_of

_GRACE = 2.0
"""Seconds between the polite end of a process and the kill."""
_AFTERMATH = 1.0
"""Seconds that tools and servers of a killed process get to end in order."""
_UNREADABLE = 50
"""Lines that are no stream-json until the program counts as broken; a few may be a library's warnings."""
_AHEAD = 1000
"""Events that are read before somebody takes them."""
_QUIET = (Other, Limited, HarmlessTools)
"""What may come between turns."""


class ProcessFault(Exception):
    """The process cannot go on with the turn; the message says why."""


class SilentError(ProcessFault):
    """It said nothing for too long."""


class EndedError(ProcessFault):
    """It ended."""


class BrokenError(ProcessFault):
    """It says what is no stream-json."""


class Spot(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process's session stood after a good turn."""

    last_message: str
    transcript: Path | None
    size: int
    """The transcript's bytes at that time."""


class ClaudeProcess:
    """See the module. After a good turn it is at a `spot` and can make the session's next turn."""

    def __init__(self, child: ChildProcess, launch: Launch, session: str, files: Path, clock: Clock) -> None:
        self._child = child
        self._files = files
        self._clock = clock
        self._events: asyncio.Queue[Event | ProcessFault] = asyncio.Queue(_AHEAD)
        self._in_turn = False
        self._heard = clock.now().mono
        self._unreadable: list[str] = []
        self._reader = asyncio.create_task(self._read(), name=f"claude {child.pid}")
        self.launch = launch
        self.session = session
        self.spot: Spot | None = None
        self.total_cost: float | None = None
        """What it had counted at the end of its last turn, in US dollars."""
        self.turns = 0
        self.used_at = self._heard
        """Monotonic time of its last turn's end, in microseconds."""
        self.disturbed = False
        """Whether it did something between turns, which we did not ask for."""

    @classmethod
    async def start(
        cls,
        registry: ProcessRegistry,
        command: Sequence[str],
        launch: Launch,
        place: Place,
        *,
        environment: Mapping[str, str],
        files: Path,
        clock: Clock,
    ) -> ClaudeProcess:
        """Start a process on a session; `files` is a folder for it alone, which it takes along at its end.

        Raises:
            ProcessStartError: the system said no.
        """
        try:
            child = await ChildProcess.start(
                registry,
                [*command, *arguments(launch, place, files)],
                name=place.session,
                environment=environment,
                folder=Path(launch.folder),
            )
        except BaseException as error:
            shutil.rmtree(files, ignore_errors=True)
            if isinstance(error, OSError):
                raise ProcessStartError(str(error)) from None
            raise
        return cls(child, launch, place.session, files, clock)

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of the same number."""
        return self._child.pid

    @property
    def fit(self) -> bool:
        """Whether it can make another turn."""
        return self.spot is not None and not self.disturbed and not self._child.ended and not self._reader.done()

    @property
    def memory(self) -> int | None:
        """Resident bytes."""
        return memory_of(self.pid)

    # -- a turn ---------------------------------------------------------------------------------------------------

    async def begin(self, prompt: str, uuid: str, patience: float) -> None:
        """Send a prompt; `uuid` is its name in the transcript.

        Raises:
            SilentError: it did not take it in `patience` seconds.
        """
        self._in_turn = True
        self.spot = None
        self._heard = self._clock.now().mono
        message = {"type": "user", "message": {"role": "user", "content": prompt}, "uuid": uuid}
        await self._send(message, patience)

    async def interrupt(self, patience: float) -> None:
        """Have it end the turn now, with its `result`."""
        await self._control("interrupt", patience)

    async def ask_for_harmless_tools(self, patience: float) -> None:
        """Have it tell the annotations of its MCP tools; they come as `HarmlessTools`."""
        await self._control("mcp_status", patience)

    async def next(self, patience: float) -> Event:
        """What it says next.

        Raises:
            SilentError: no byte came for `patience` seconds.
            EndedError: it ended; all that it said before was taken.
            BrokenError: it says what is no stream-json.
        """
        while True:
            quiet = (self._clock.now().mono - self._heard) / MICROSECONDS
            try:
                async with asyncio.timeout(max(0.0, patience - quiet)):
                    event = await self._events.get()
            except TimeoutError:
                if (self._clock.now().mono - self._heard) / MICROSECONDS >= patience:
                    raise SilentError(f"it said nothing for {patience:g} s{self._noise()}") from None
                continue
            if isinstance(event, ProcessFault):
                raise event
            return event

    def rest(self, spot: Spot) -> None:
        """The turn was good: wait for the next one."""
        self._in_turn = False
        self.turns += 1
        self.used_at = self._clock.now().mono
        self.spot = spot

    async def _control(self, what: str, patience: float) -> None:
        await self._send({"type": "control_request", "request_id": what, "request": {"subtype": what}}, patience)

    async def _send(self, message: object, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await self._child.write(msgspec.json.encode(message) + b"\n")
        except TimeoutError:
            raise SilentError(f"it did not read its input for {patience:g} s") from None

    async def _read(self) -> None:
        splitter = LineSplitter()
        fault: ProcessFault | None = None
        try:
            while fault is None and (data := await self._child.read()):
                self._heard = self._clock.now().mono
                for line in splitter.feed(data):
                    fault = await self._take(line)
                    if fault is not None:
                        break
        except UnreadableError as error:
            fault = BrokenError(f"it does not speak stream-json: {error}")
        if fault is None:
            await self._child.ends_within(_GRACE)
            fault = EndedError(f"it ended in the middle of the turn ({self._child.ending}){self._noise()}")
        await self._events.put(fault)

    async def _take(self, line: bytes) -> ProcessFault | None:
        try:
            events = parse_all(line)
        except UnreadableError as error:
            self._unreadable.append(str(error))
            return BrokenError(f"it does not speak stream-json{self._noise()}") if self._too_much() else None
        for event in events:
            if self._in_turn:
                await self._events.put(event)
            elif not isinstance(event, _QUIET):
                self.disturbed = True
        return None

    def _too_much(self) -> bool:
        return len(self._unreadable) > _UNREADABLE

    def _noise(self) -> str:
        return f"; it wrote what is no stream-json: {self._unreadable[0][:200]}" if self._unreadable else ""

    # -- its end --------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """End it politely, which lets it write its transcript to the end; killed after a grace."""
        try:
            await self._child.finish(_GRACE)
        finally:
            await self._clear()

    async def stop(self) -> None:
        """End it in the middle of what it does, at once, and all that it started."""
        try:
            await self._child.stop(_AFTERMATH)
        finally:
            await self._clear()

    async def _clear(self) -> None:
        self._reader.cancel()
        shutil.rmtree(self._files, ignore_errors=True)
