"""Sessions of Claude Code: opened for a turn in the right place, and looked at before and after it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call
from ksi.providers.claude_cli.launch import Launch, SessionTarget
from ksi.providers.claude_cli.pool import ClaudePool
from ksi.providers.claude_cli.process import ClaudeProcess, SessionPosition
from ksi.providers.claude_cli.transcript import Seal, TranscriptTail, find, last_answer, look_back, look_on, mend, point
from ksi.providers.process import ProcessRegistry, ProcessStartError

FOREIGN = "foreign_turn"
NEW = "new_session"

_WRITTEN = 2.0
"""Seconds in which a turn's last message must be in the transcript: current versions write it before the `result`,
older ones soon after."""
_LOOK_PAUSE = 0.02


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """How processes are started for a call."""

    launch: Launch
    command: Sequence[str]
    environment: Mapping[str, str]
    secrets: Sequence[str] = ()
    """The texts that no message may repeat, longest first."""


class OpenedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A process, ready for its prompt."""

    process: ClaudeProcess
    warm: bool = False
    fresh: bool = False
    """True if its session has no past, so that the prompt must bring the history along."""
    fork: str | None = None
    """The fork that was found on the way, in the words of `Completion.fork`."""
    seen: int | None = None
    """The transcript's bytes that were read; None if nothing before the prompt is of interest."""
    transcript: Path | None = None
    """The file to which the turn will be written; None if it must be searched for."""


class Sessions:
    """Finds or starts the process for a call."""

    def __init__(
        self,
        pool: ClaudePool,
        registry: ProcessRegistry,
        seal: Seal,
        *,
        projects: Callable[[], Path | None],
        files: Path,
        clock: Clock,
    ) -> None:
        """`projects` is the folder of the transcripts; `files` is for the processes' private files."""
        self._pool = pool
        self._registry = registry
        self._seal = seal
        self._projects = projects
        self._files = files
        self._clock = clock
        self._numbers = itertools.count(1)

    def new_id(self) -> str:
        """A uuid for a session or a prompt, by which it is known as ours."""
        return self._seal.new()

    async def find(self, session: str) -> Path | None:
        """A session's transcript."""
        return await asyncio.to_thread(find, self._projects(), session)

    # -- before a turn --------------------------------------------------------------------------------------------

    async def open(self, call: Call, start: Start) -> OpenedSession:
        """The process that makes the call's turn: a warm one, or a new one at the last good message.

        Raises:
            ProviderError: no process can be started.
        """
        session = call.provider_session
        if session is None:
            return await self.begin(call, start)
        if call.fork_session:
            return await self._resume(call, start, session, self._seal.new())
        warm = await self._pool.take(session)
        if warm is None:
            return await self._resume(call, start, session, session)
        tail = None
        good = False
        try:
            tail = await self._since(warm)
            good = tail is not None and not tail.foreign and _can_go_on(warm, start.launch, call.last_message)
        finally:
            if not good:
                await self._pool.discard(warm)
        if good and tail is not None and warm.position is not None:
            return OpenedSession(process=warm, warm=True, seen=tail.size, transcript=warm.position.transcript)
        opened = await self._resume(call, start, session, session)
        foreign = tail is not None and tail.foreign > 0
        return msgspec.structs.replace(opened, fork=opened.fork or (FOREIGN if foreign else None))

    async def begin(self, call: Call, start: Start) -> OpenedSession:
        """A process on a new session; a fork if the call names another one, which is not there any more.

        Raises:
            ProviderError: as for `open`.
        """
        process = await self._start(start, SessionTarget(session=self._seal.new()))
        return OpenedSession(
            process=process, fresh=True, fork=NEW if call.provider_session is not None else None, seen=0
        )

    async def point(self, call: Call) -> bool:
        """Make the branch of a session that ends in the call's last message the current one; False if there is no such
        message."""
        session, message = call.provider_session, call.last_message
        path = await self.find(session) if session is not None else None
        if path is None or session is None or message is None:
            return False
        tail = await asyncio.to_thread(look_back, path, message, self._seal.is_ours)
        if tail.found:
            await asyncio.to_thread(point, path, session, message)
        return tail.found

    async def _resume(self, call: Call, start: Start, session: str, becomes: str) -> OpenedSession:
        """A process that resumes a session or branches off from it; on a new one if it is not there any more.

        An adopted session has no message of ours yet: it continues after the last complete answer.
        """
        path = await self.find(session)
        if path is None:
            return await self.begin(call, start)
        await asyncio.to_thread(mend, path)
        if call.last_message is None:
            answer = await asyncio.to_thread(last_answer, path)
            process = await self._start(start, SessionTarget(session=becomes, resumed=str(path), at=answer))
            return OpenedSession(process=process)
        tail = await asyncio.to_thread(look_back, path, call.last_message, self._seal.is_ours)
        if not tail.found:
            return await self.begin(call, start)
        process = await self._start(start, SessionTarget(session=becomes, resumed=str(path), at=call.last_message))
        if becomes != session:
            return OpenedSession(process=process)
        return OpenedSession(process=process, fork=FOREIGN if tail.foreign else None, seen=tail.size, transcript=path)

    async def _since(self, warm: ClaudeProcess) -> TranscriptTail | None:
        """The end of a warm process's transcript since its turn; None if it cannot be read any more."""
        position = warm.position
        if position is None or position.transcript is None:
            return None
        try:
            return await asyncio.to_thread(
                look_on, position.transcript, position.size, position.last_message, self._seal.is_ours
            )
        except OSError:
            return None

    async def _start(self, start: Start, place: SessionTarget) -> ClaudeProcess:
        try:
            process = await ClaudeProcess.start(
                self._registry,
                start.command,
                start.launch,
                place,
                environment=start.environment,
                files=self._files / f"{place.session}-{next(self._numbers)}",
                clock=self._clock,
                secrets=start.secrets,
            )
        except ProcessStartError as error:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR, f"its process cannot be started in {start.launch.folder}: {error}"
            ) from None
        self._pool.working(process)
        return process

    # -- after a turn ---------------------------------------------------------------------------------------------

    async def look_after(
        self, opened: OpenedSession, session: str, prompt: str, last_message: str
    ) -> tuple[SessionPosition, str | None]:
        """The position of a good turn's session, and the fork that the turn shows.

        `session` is the one that came back, `prompt` and `last_message` are the turn's first and last message. If no
        transcript is written, the session can continue only in its warm process.
        """
        is_same = session == opened.process.session
        fork = None if is_same else NEW
        seen, path = (opened.seen, opened.transcript) if is_same else (None, None)
        waited = 0.0
        while True:
            path = path or await self.find(session)
            tail = await self._turn_in(path, seen, prompt, last_message) if path is not None else None
            if tail is not None and path is not None:
                fork = fork or (FOREIGN if tail.foreign else None)
                return SessionPosition(last_message=last_message, transcript=path, size=tail.size), fork
            if waited >= _WRITTEN:
                return SessionPosition(last_message=last_message, transcript=None, size=0), fork
            path = None  # older versions write a session that was begun in another folder to a file of their own
            await self._clock.sleep(_LOOK_PAUSE)
            waited += _LOOK_PAUSE

    async def _turn_in(self, path: Path, seen: int | None, prompt: str, last_message: str) -> TranscriptTail | None:
        """A turn's part of a transcript: since `seen`, or since its prompt if that is None. None while the turn's last
        message is not there."""
        try:
            if seen is not None:
                tail = await asyncio.to_thread(look_on, path, seen, last_message, self._seal.is_ours)
                return tail if tail.found else None
            written = await asyncio.to_thread(look_back, path, last_message, self._seal.is_ours)
            begun = await asyncio.to_thread(look_back, path, prompt, self._seal.is_ours)
        except OSError:
            return None  # taken away under our hands: the answer is good, and the next turn will not find the session
        return msgspec.structs.replace(begun, size=written.size) if written.found else None


def _can_go_on(warm: ClaudeProcess, launch: Launch, last_message: str | None) -> bool:
    """Return True if a warm process is at the beginning of the next turn, with the arguments that the turn needs."""
    stands = warm.position is not None and warm.position.last_message == last_message
    return stands and warm.fit and warm.launch == launch
