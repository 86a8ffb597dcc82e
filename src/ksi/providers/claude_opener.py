"""From a call to a process that stands where the call goes on: the warm one, or a new one at the last good message."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call
from ksi.providers.claude_launch import Launch, Place
from ksi.providers.claude_pool import ClaudePool
from ksi.providers.claude_process import ClaudeProcess
from ksi.providers.claude_transcript import Seal, Tail, find, look_back, look_on
from ksi.providers.process import ProcessRegistry, ProcessStartError

FOREIGN = "foreign_turn"
NEW = "new_session"


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """A process, ready for the prompt."""

    process: ClaudeProcess
    warm: bool
    fresh: bool
    """Whether its session has no past of ours: the prompt must bring the history."""
    fork: str | None
    """What was found on the way, in the words of `Completion.fork`."""
    seen: int | None
    """The transcript's bytes that were looked at; None where what comes before our prompt is not to be judged."""


class Opener:
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
        """`projects` is where transcripts are; `files` is for the processes' private files."""
        self._pool = pool
        self._registry = registry
        self._seal = seal
        self._projects = projects
        self._files = files
        self._clock = clock
        self._numbers = itertools.count(1)

    async def open(
        self, call: Call, launch: Launch, command: list[str], environment: Mapping[str, str], *, lost: bool
    ) -> Opened:
        """The process that makes the call's turn.

        `lost` says that the call's session turned out not to be there: a new one takes its place.

        Raises:
            ProviderError: no process can be started.
        """
        session = call.provider_session
        if session is None or lost:
            place = Place(session=self._seal.new())
            process = await self._start(launch, place, command, environment)
            fork = NEW if session is not None else None
            return Opened(process=process, warm=False, fresh=True, fork=fork, seen=0)
        if call.fork_session:
            return await self._branch(call, session, launch, command, environment)
        fork: str | None = None
        warm = await self._pool.take(session)
        if warm is not None:
            foreign = await self._written_by_others(warm)
            if not foreign and warm.fit and warm.launch == launch and _stands_at(warm, call.last_message):
                size = warm.spot.size if warm.spot is not None else 0
                return Opened(process=warm, warm=True, fresh=False, fork=None, seen=size)
            await self._pool.discard(warm)
            fork = FOREIGN if foreign else None
        return await self._resume(call, session, launch, command, environment, fork)
