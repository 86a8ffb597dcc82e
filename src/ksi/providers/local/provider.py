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

import msgspec

from ksi.content.native import FEATURES
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Completion, Frame, Piece, Setting
from ksi.providers.http.endpoint import Streaming
from ksi.providers.local.model_file import bundled_model
from ksi.providers.local.process import ModelServer, ModelSettings, start_server
from ksi.providers.openai import OpenAIProvider
from ksi.providers.openai import Options as ChatOptions
from ksi.providers.process import ProcessRegistry, ProcessStartError

_BUNDLED_SAMPLING = {"temperature": 0.0, "repeat_penalty": 1.1}
"""The sampling with which a model this small answers best; without the penalty it falls into loops."""
_GRACE = 2.0
"""Seconds between the polite end of the process and the kill."""
_DEATH_NOTICE = 1.0
"""Seconds between a broken connection and the news of the process's end, at most."""
_NO_LIMIT = 7 * 86_400.0
"""Seconds for a call. The queue limits a call's whole time; this end only notices silence."""


_FEATURES = frozenset(FEATURES) - {
    *("images", "documents", "document_urls", "files", "citations"),
    *("reasoning", "service_tier", "service_tiers"),
}
"""The features of llama.cpp's server for a text model."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration keys of kind `local`, in addition to the common ones."""

    model_path: str | None = None
    """A GGUF file, absolute or below the home; without it the model that comes with KSI."""
    context_tokens: int = 4096
    """Maximum size of prompt and answer of a call together; its memory is allocated once for each concurrent answer."""
    parallel: int | None = None
    """Answers made at once; without it as many as `max_concurrency`."""
    threads: int | None = None
    """Threads of the processor; without it as many as it has cores."""
    max_tokens: int = 256
    """The maximum length of the answer if the request sets none."""
    start_timeout: float = 60.0
    """Until the model must be loaded."""
    unload_after: int = 900
    """Without a call for so long, the model's memory is given back; the next call loads it again. 0: never."""
    preload: bool = False
    """Load at the daemon's start, not at the first call."""


class LocalProvider:
    """See the module. Calls beyond the number of slots wait here, so that silence in a call means a fault."""

    def __init__(self, setting: Setting, options: Options) -> None:
        """The process's output goes to a file named after the provider in the log folder. After the idle timeout
        without a byte in a call the process counts as hung; reading a long prompt is silent."""
        self.name = setting.name
        self.capabilities = Capabilities(
            process=True, dialect="chat", features=_FEATURES, context_tokens=options.context_tokens, free=True
        )
        self._setting = setting
        self._options = options
        self._log_path = setting.log_dir / f"{setting.name}.log"
        self._registry = ProcessRegistry(setting.run_folder / "processes")
        self._parallel = options.parallel or setting.max_concurrency
        self._slots = asyncio.Semaphore(self._parallel)
        self._server: ModelServer | None = None
        self._starting: asyncio.Task[ModelServer] | None = None
        self._problem: str | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The pid of the process, while one runs."""
        server = self._server
        return server.process.pid if server is not None and not server.process.ended else None

    async def start(self) -> None:
        """Kill the process of an earlier daemon, and begin to load if `preload` is set. A fault shows in `problem` and
        in the calls."""
        self._stopped = False
        await self._registry.reap(self._setting.clock)
        if self._options.preload:
            self._launching()

    async def stop(self) -> None:
        """End the process and all calls to it; those that wait for a slot fail too."""
        self._stopped = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._discard()

    async def complete(self, call: Call) -> AsyncGenerator[Piece | Frame | Completion, None]:
        """See the protocol. Faults are `provider_error`: they are of this machine, not of a network."""
        async with self._slots:
            server = await self._ready()
            caller = self._caller(server)
            await caller.start()
            try:
                async with aclosing(caller.complete(call)) as answer:
                    async for piece in answer:
                        yield piece
            except ProviderError as error:
                raise await self._explained(error, server) from None
            finally:
                await caller.stop()

    def problem(self) -> str | None:
        """The missing library or model, or the reason why the last start failed."""
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
            return self._setting.home / Path(self._options.model_path).expanduser()
        return bundled_model(self._setting.environ)

    async def _ready(self) -> ModelServer:
        """The process that answers, started if none runs. A start outlives the call that wanted it."""
        if self._server is not None and not self._server.process.ended:
            return self._server
        if self._stopped:
            raise self._fault("it is stopped")
        return await asyncio.shield(self._launching())

    def _launching(self) -> asyncio.Task[ModelServer]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._launch(), name=f"start {self.name}")
            self._starting.add_done_callback(self._launched)
        return self._starting

    def _launched(self, task: asyncio.Task[ModelServer]) -> None:
        self._starting = None
        error = None if task.cancelled() else task.exception()
        self._problem = str(error) if error is not None else None

    async def _launch(self) -> ModelServer:
        await self._discard()
        self._problem = None
        model = self._model()
        if (problem := self.problem()) or model is None:
            raise self._fault(problem or "no model is here")
        try:
            self._server = await start_server(
                self._registry,
                self._settings(model),
                name=self.name,
                inherited=self._setting.environ,
                log_path=self._log_path,
                timeout=self._options.start_timeout,
            )
        except ProcessStartError as error:
            raise self._fault(f"the model {model} did not start: {error}; see {self._log_path}") from None
        return self._server

    def _settings(self, model: Path) -> ModelSettings:
        options = self._options
        return ModelSettings(
            model_path=str(model),
            alias=model.stem,
            context_tokens=options.context_tokens,
            parallel=self._parallel,
            threads=options.threads,
            fit=options.model_path is not None,
            unload_after=options.unload_after or -1,
            api_key=secrets.token_urlsafe(32),
        )

    def _caller(self, server: ModelServer) -> OpenAIProvider:
        """The client of the process, for one call: its server closes kept connections unannounced."""
        sampling = {} if self._options.model_path else _BUNDLED_SAMPLING
        return OpenAIProvider(
            msgspec.structs.replace(self._setting, environ={}, timeout=_NO_LIMIT),
            ChatOptions(
                base_url=f"{server.address}/v1",
                headers={"Authorization": f"Bearer {server.api_key}"},
                streaming=Streaming.ALWAYS,
                extra_body={**sampling, "max_tokens": self._options.max_tokens},
            ),
        )

    async def _discard(self) -> None:
        """End the present process, if there is one."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.process.finish(_GRACE)

    async def _explained(self, error: ProviderError, server: ModelServer) -> ProviderError:
        """The same fault in the terms of this machine: an ended or a hung process, or the model server's own words."""
        if error.failure is FailureClass.TIMEOUT:
            await server.process.kill()
            return ProviderError(
                FailureClass.TIMEOUT,
                f"{error.message}; its process was killed, the next call starts a new one",
                provider=self.name,
            )
        if error.failure is not FailureClass.NETWORK_ERROR:
            return error
        if await server.process.ends_within(_DEATH_NOTICE):
            return self._fault(
                f"its process ended under the call ({server.process.ending}); the next call starts a new one; "
                f"see {self._log_path}"
            )
        return self._fault(error.message.removeprefix(f"{self.name}: "))

    def _fault(self, message: str) -> ProviderError:
        return ProviderError(FailureClass.PROVIDER_ERROR, f"{self.name}: {message}", provider=self.name)


def build(setting: Setting, options: Options) -> LocalProvider:
    """The provider for a configuration."""
    return LocalProvider(setting, options)
