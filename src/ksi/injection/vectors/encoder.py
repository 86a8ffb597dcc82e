"""Asks the process that makes vectors: started when the first chain needs it, ended when none has for a while."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from ksi.clock import Clock, microseconds
from ksi.errors import ConfigError
from ksi.injection.meaning.sentences import Piece
from ksi.injection.vectors.network import model_file
from ksi.injection.vectors.wire import LENGTH, Meant, frame
from ksi.providers.process import ChildProcess, ProcessRegistry, ProcessStartError

NAME = "sentence-vectors"
TIMEOUT = 10.0
"""Seconds that one result may wait for its turn, and then for its answer, the start of the process included; after
that it is judged without vectors."""
MOST_WAITING = 16
"""Results that wait for it at once; what comes above that is judged without vectors."""
IDLE = 900.0
"""Seconds without a question after which the process ends."""
PAUSE = 60.0
"""Seconds after a fault in which it is not asked."""
LONGEST = 400
"""Characters that are sent of a sentence."""
_GRACE = 1.0
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


class Encoder:
    """Adds to sentences what they mean. Its failure is told in `problem`, and costs a result its vectors only."""

    def __init__(self, registry: ProcessRegistry, clock: Clock, environment: Mapping[str, str] = os.environ) -> None:
        self._registry = registry
        self._clock = clock
        self._environment = {name: value for name, value in environment.items() if name in _KEPT}
        self._process: ChildProcess | None = None
        self._asking = asyncio.Lock()
        self._retry_at = 0
        """Monotonic time until which it is not asked after a fault, in microseconds."""
        self._waiting = 0
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("ksi.vectors")
        self._missing: str | None = None
        """What is not installed."""
        self._fault = ""
        """What happened last, in a sentence."""
        try:
            model_file()
        except ConfigError as error:
            self._missing = error.message

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None

    @property
    def problem(self) -> str | None:
        """Why results are judged without vectors now, for `system:health`. A fault counts until it may be asked again:
        no chain may come that asks, and the fault is past by then as far as is known."""
        return self._fault if self._pausing else self._missing

    @property
    def _pausing(self) -> bool:
        return self._clock.now().mono < self._retry_at

    async def start(self) -> None:
        """End what an earlier daemon left running; its own process is started when it is needed."""
        await self._registry.reap(self._clock)

    async def add(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their vectors; as they came where none can be had. Lines of code and tables have none."""
        prose = [piece for piece in pieces if not piece.sentence.formal]
        if not prose or self.problem is not None or self._waiting >= MOST_WAITING:
            return list(pieces)
        self._waiting += 1
        try:
            return await self._added(pieces, prose)
        finally:
            self._waiting -= 1

    async def _added(self, pieces: Sequence[Piece], prose: Sequence[Piece]) -> list[Piece]:
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._asking.acquire()
        except TimeoutError:
            return list(pieces)
        try:
            # It may have failed for the results before this one.
            found = None if self._pausing else await self._asked([piece.text[:LONGEST] for piece in prose])
        finally:
            self._asking.release()
        if found is None:
            return list(pieces)
        meant = {id(piece): one for piece, one in zip(prose, found, strict=True)}
        return [_with(piece, meant.get(id(piece))) for piece in pieces]

    async def stop(self) -> None:
        """End its process."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._process is not None:
            await self._process.finish(_GRACE)
            self._process = None

    async def _asked(self, sentences: list[str]) -> list[Meant] | None:
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._process is None:
                    self._process = await self._started()
                found = await self._answer(self._process, sentences)
        except (TimeoutError, ProcessStartError, msgspec.DecodeError, _EndedError) as fault:
            await self._failed(fault)
            return None
        except asyncio.CancelledError:
            await self.stop()
            raise
        self._rest()
        return found

    async def _started(self) -> ChildProcess:
        program = [sys.executable, "-I", "-m", "ksi.injection.vectors.child"]
        return await ChildProcess.start(self._registry, program, name=NAME, environment=self._environment)

    async def _answer(self, process: ChildProcess, sentences: list[str]) -> list[Meant]:
        await process.write(frame(sentences))
        data = b""
        while len(data) < LENGTH or len(data) < LENGTH + int.from_bytes(data[:LENGTH]):
            read = await process.read()
            if not read:
                await process.ends_within(_GRACE)
                raise _EndedError(process.ending)
            data += read
        found = msgspec.msgpack.decode(data[LENGTH:], type=list[Meant])
        if len(found) != len(sentences):
            raise _EndedError(f"it answered {len(found)} of {len(sentences)} sentences")
        return found

    async def _failed(self, fault: Exception) -> None:
        words = f"no answer within {TIMEOUT:g} s" if isinstance(fault, TimeoutError) else str(fault)
        self._fault = f"what results mean is not looked at for {PAUSE:g} s: {words}"
        self._retry_at = self._clock.now().mono + microseconds(PAUSE)
        self._log.warning("no vectors", problem=words)
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    def _rest(self) -> None:
        """Count the idle time from now."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE, self._begin_end)

    def _begin_end(self) -> None:
        self._ending = asyncio.create_task(self._end_idle(), name="ksi-vectors-idle")

    async def _end_idle(self) -> None:
        async with self._asking:
            await self.stop()


class _EndedError(Exception):
    """The process ended, or said something else than was asked."""


def _with(piece: Piece, meant: Meant | None) -> Piece:
    if meant is None:
        return piece
    sentence = msgspec.structs.replace(piece.sentence, vector=meant.signs, emptiness=meant.emptiness)
    return Piece(piece.text, sentence)
