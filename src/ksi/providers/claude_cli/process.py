"""One Claude Code process: prompts in, events out, one turn at a time; watched while it waits for the next."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ksi.clock import MICROSECONDS, Clock
from ksi.content.blocks import Block
from ksi.errors import PayloadTooLarge
from ksi.host.supervise import in_words
from ksi.protocol import LineReader
from ksi.providers.claude_cli.host import Host, HostError
from ksi.providers.claude_cli.launch import Launch, SessionTarget, arguments
from ksi.providers.claude_cli.stream import (
    MAX_LINE,
    Asks,
    Event,
    HarmlessTools,
    Limited,
    Other,
    StreamJsonError,
    parse_all,
)
from ksi.providers.masking import masked
from ksi.providers.process import ChildProcess, ProcessRegistry, ProcessStartError, memory_of

_GRACE = 2.0
"""Seconds between the polite end of a process and the kill."""
_AFTERMATH = 1.0
"""Seconds that tools and servers of a killed process get to end in order."""
_UNREADABLE = 50
"""Lines that are no stream-json until the program counts as broken; a few may be a library's warnings."""
_SHOWN_LINE = 100
"""Characters of such a line that a message repeats."""
_ANSWER_TAKEN = 60.0
"""Seconds in which it must take an answer."""
_AHEAD = 1000
"""Events that are read ahead of the reader."""
CAN_USE_TOOL = "can_use_tool"
"""The question for a permission: it belongs to the turn, in its order."""
BETWEEN_TURNS = (Other, Limited, HarmlessTools)
"""Events that may come between turns."""


class ProcessFault(Exception):
    """The process cannot continue the turn; the message gives the reason."""


class SilentError(ProcessFault):
    """It said nothing for too long."""


class EndedError(ProcessFault):
    """It ended."""


class BrokenError(ProcessFault):
    """Its output is no stream-json."""


class SessionPosition(msgspec.Struct, frozen=True, kw_only=True):
    """The position of a process's session after a good turn."""

    last_message: str
    transcript: Path | None
    size: int
    """The transcript's bytes at that time."""


class ClaudeProcess:
    """See the module. After a good turn it is at a `position` and can make the session's next turn."""

    def __init__(
        self,
        child: ChildProcess,
        launch: Launch,
        session: str,
        *,
        files: Path,
        clock: Clock,
        secrets: Sequence[str],
    ) -> None:
        self._child = child
        self._secrets = secrets
        self._files = files
        self._clock = clock
        self._events: asyncio.Queue[Event | ProcessFault] = asyncio.Queue(_AHEAD)
        self._in_turn = False
        self._heard = clock.now().mono
        self._unreadable = 0
        self._first_unreadable = ""
        self._reader = asyncio.create_task(self._read(), name=f"claude {child.pid}")
        self.launch = launch
        self.session = session
        self.position: SessionPosition | None = None
        self.total_cost: float | None = None
        """Its own count of the cost at the end of its last turn, in US dollars."""
        self.harmless_tools: frozenset[str] = frozenset()
        """Its MCP tools that are annotated as read-only."""
        self.turns = 0
        self.request_id: str | None = None
        """The request whose turn it makes, or made last."""
        self.used_at = self._heard
        """Monotonic time of its last turn's end, in microseconds."""
        self._host: Host | None = None
        self._unanswered: list[Asks] = []
        """Its requests from before there was a host."""
        self._answering: set[asyncio.Task[None]] = set()
        self.disturbed = False
        """True if it did something between turns that we did not ask for."""

    @classmethod
    async def start(
        cls,
        registry: ProcessRegistry,
        command: Sequence[str],
        launch: Launch,
        place: SessionTarget,
        *,
        environment: Mapping[str, str],
        files: Path,
        clock: Clock,
        secrets: Sequence[str] = (),
    ) -> ClaudeProcess:
        """Start a process on a session; `files` is a folder for it alone, which it takes along at its end. No message
        repeats one of the `secrets` (longest first).

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
                secrets=secrets,
            )
        except BaseException as error:
            shutil.rmtree(files, ignore_errors=True)
            if isinstance(error, OSError):
                raise ProcessStartError(str(error)) from None
            raise
        return cls(child, launch, place.session, files=files, clock=clock, secrets=secrets)

    @property
    def pid(self) -> int:
        """The pid of the process, which leads a group of the same number."""
        return self._child.pid

    @property
    def mark(self) -> str:
        """See `ChildProcess`."""
        return self._child.mark

    @property
    def fit(self) -> bool:
        """True if it can make another turn."""
        return self.position is not None and not self.disturbed and not self._child.ended and not self._reader.done()

    @property
    def alive(self) -> bool:
        """True if it runs."""
        return not self._child.ended and not self._reader.done()

    @property
    def memory(self) -> int | None:
        """Resident bytes."""
        return memory_of(self.pid)

    # -- a turn ---------------------------------------------------------------------------------------------------

    async def begin(self, prompt: str | list[Block], uuid: str, patience: float) -> None:
        """Send a prompt, as text or as blocks; `uuid` is its name in the transcript.

        Raises:
            SilentError: it did not take it in `patience` seconds.
        """
        self._in_turn = True
        self.position = None
        self._heard = self._clock.now().mono
        message = {"type": "user", "message": {"role": "user", "content": prompt}, "uuid": uuid}
        await self._send(message, patience)

    def serve(self, host: Host | None) -> None:
        """From now on this host answers the requests of the process; with None they wait for the next one."""
        self._host = host
        asked, self._unanswered = self._unanswered, []
        for asks in asked:
            self._answer(asks)

    async def reply(self, asks: str, response: object, patience: float) -> None:
        """Answer the request with this id."""
        answer = {"subtype": "success", "request_id": asks, "response": response}
        await self._send({"type": "control_response", "response": answer}, patience)

    async def interrupt(self, patience: float) -> None:
        """Have it end the turn now, with its `result`."""
        await self._control("interrupt", patience)

    async def ask_for_harmless_tools(self, patience: float) -> None:
        """Have it tell the annotations of its MCP tools; they come as `HarmlessTools`."""
        await self._control("mcp_status", patience)

    async def next(self, patience: float) -> Event:
        """Wait for its next event.

        Raises:
            SilentError: no byte came for `patience` seconds.
            EndedError: it ended; all that it said before was taken.
            BrokenError: its output is no stream-json.
        """
        while True:
            if self._answering:
                self._heard = self._clock.now().mono  # it waits for us, and says nothing meanwhile
            quiet = (self._clock.now().mono - self._heard) / MICROSECONDS
            try:
                async with asyncio.timeout(max(0.0, patience - quiet)):
                    event = await self._events.get()
            except TimeoutError:
                if not self._answering and (self._clock.now().mono - self._heard) / MICROSECONDS >= patience:
                    raise SilentError(f"it said nothing for {patience:g} s{self._noise()}") from None
                continue
            if isinstance(event, ProcessFault):
                raise event
            return event

    def rest(self, position: SessionPosition) -> None:
        """The turn was good: wait for the next one."""
        self._in_turn = False
        self.turns += 1
        self.used_at = self._clock.now().mono
        self.position = position

    async def _control(self, what: str, patience: float) -> None:
        await self._send({"type": "control_request", "request_id": what, "request": {"subtype": what}}, patience)

    async def _send(self, message: object, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await self._child.write(msgspec.json.encode(message) + b"\n")
        except TimeoutError:
            raise SilentError(f"it did not read its input for {patience:g} s") from None

    async def _read(self) -> None:
        lines = LineReader(MAX_LINE)
        fault: ProcessFault | None = None
        while fault is None and (data := await self._child.read()):
            self._heard = self._clock.now().mono
            for line in lines.feed(data):
                if line and (fault := await self._take(line)) is not None:
                    break
        if fault is None:
            await self._child.ends_within(_GRACE)
            fault = EndedError(f"it ended in the middle of the turn ({self._child.ending}){self._noise()}")
        await self._events.put(fault)

    async def _take(self, line: bytes | PayloadTooLarge) -> ProcessFault | None:
        """Take a line's events, and return a fault if the program does not speak stream-json."""
        if isinstance(line, PayloadTooLarge):
            return BrokenError(f"it does not speak stream-json: a line is longer than {MAX_LINE} bytes")
        try:
            events = parse_all(line)
        except StreamJsonError as error:
            self._unreadable += 1
            if self._unreadable == 1:
                said = masked(line.decode("utf-8", "replace"), self._secrets)
                self._first_unreadable = f"{error} in {said[:_SHOWN_LINE]!r}"
            too_many = self._unreadable > _UNREADABLE
            return BrokenError(f"it does not speak stream-json{self._noise()}") if too_many else None
        for event in events:
            if isinstance(event, Asks) and event.subtype != CAN_USE_TOOL:
                self._answer(event)
            elif self._in_turn:
                await self._events.put(event)
            elif not isinstance(event, BETWEEN_TURNS):
                self.disturbed = True
        return None

    def _answer(self, asks: Asks) -> None:
        """Answer its request, concurrently with everything else: an answer may take as long as another agent's turn."""
        if self._host is None:
            self._unanswered.append(asks)
            return
        task = asyncio.create_task(self._answered(asks, self._host), name=f"answer to claude {self.pid}")
        self._answering.add(task)
        task.add_done_callback(self._over)

    async def _answered(self, asks: Asks, host: Host) -> None:
        try:
            await self.reply(asks.id, await host.answer(asks), _ANSWER_TAKEN)
        except HostError as error:
            answer = {"subtype": "error", "request_id": asks.id, "error": str(error)}
            await self._send({"type": "control_response", "response": answer}, _ANSWER_TAKEN)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._heard = self._clock.now().mono
        if not task.cancelled() and (error := task.exception()) is not None:
            # Without its answer it would wait for ever.
            fault = error if isinstance(error, ProcessFault) else BrokenError(f"it got no answer: {in_words(error)}")
            with suppress(asyncio.QueueFull):
                self._events.put_nowait(fault)

    def _noise(self) -> str:
        return f"; it wrote lines that are no stream-json: {self._first_unreadable}" if self._unreadable else ""

    # -- its end --------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """End it politely, which lets it write its transcript to the end; killed after a grace."""
        try:
            await self._child.finish(_GRACE)
        finally:
            await self._clear()

    async def stop(self) -> None:
        """End it at once in the middle of its work, with its children."""
        try:
            await self._child.stop(_AFTERMATH)
        finally:
            await self._clear()

    async def _clear(self) -> None:
        self._reader.cancel()
        for task in list(self._answering):
            task.cancel()
        shutil.rmtree(self._files, ignore_errors=True)
