"""A scripted provider, for tests, examples and benchmarks: it answers, waits and fails on demand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ksi.content.blocks import text_of
from ksi.content.native import FEATURES
from ksi.errors import FailureClass, ProviderError
from ksi.host.private_files import make_folder
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting
from ksi.request import Usage

Seconds = Annotated[float, Meta(ge=0)]


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The script of one call. A request's `provider_options` win over the configuration."""

    delay: Seconds = 0.0
    """Before the first piece."""
    text: str | None = None
    """The answer; without it an echo of the prompt."""
    pieces: Annotated[int, Meta(ge=1)] = 1
    """How many pieces a streamed answer has."""
    piece_delay: Seconds = 0.0
    """Between pieces."""
    fail: FailureClass | None = None
    """Fail with this [class](errors.md#failure-classes)."""
    fail_attempts: int | None = None
    """Only in the first so many attempts; without it in all."""
    retry_after: float | None = None
    """The failure's retry-after."""
    usage: bool | Usage = True
    """True reports usage, a token for each word; a report is passed on as it is."""


class Options(Script, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration: a script for all calls, and a file that records them."""

    record: str | None = None
    """A file below the home that gets a line at each call's begin and end."""
    context_tokens: int = 8_192
    """The model's context."""
    mcp: bool = False
    """True declares that it takes MCP servers."""


class StubProvider:
    """Follows its script."""

    def __init__(self, setting: Setting, options: Options) -> None:
        self.name = setting.name
        self.capabilities = Capabilities(
            context_tokens=options.context_tokens, mcp=options.mcp, features=frozenset(FEATURES), free=True
        )
        self._options = options
        self._script = Script(**{name: getattr(options, name) for name in Script.__struct_fields__})
        self._record_path = setting.home / options.record if options.record else None
        self._record: int | None = None

    async def start(self) -> None:
        """Open the record."""
        if self._record_path is not None:
            make_folder(self._record_path.parent)
            self._record = os.open(self._record_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def stop(self) -> None:
        """Close the record."""
        if self._record is not None:
            os.close(self._record)
            self._record = None

    def problem(self) -> str | None:
        """A stub has none."""
        return None

    async def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        """Play the script."""
        script = self._script if not call.options else self._script_of(call)
        self._note("begin", call)
        try:
            if script.delay:
                await asyncio.sleep(script.delay)
            if script.fail is not None and (script.fail_attempts is None or call.attempt <= script.fail_attempts):
                raise ProviderError(
                    script.fail, f"scripted {script.fail.value}", retry_after=script.retry_after, provider=self.name
                )
            prompt = text_of(call.messages[-1].content)
            text = script.text if script.text is not None else f"echo: {prompt}"
            if call.stream:
                for piece in _cut(text, script.pieces):
                    yield Chunk(piece)
                    if script.piece_delay:
                        await asyncio.sleep(script.piece_delay)
            yield Completion(
                text=text, model=call.model, usage=_usage(script.usage, prompt, text), stop_reason="end_turn"
            )
        finally:
            self._note("end", call)

    def _script_of(self, call: Call) -> Script:
        script: dict[str, Any] = msgspec.structs.asdict(self._script)
        try:
            return msgspec.convert({**script, **call.options}, Script)
        except msgspec.ValidationError as error:
            raise ProviderError(
                FailureClass.INVALID_REQUEST, f"provider_options: {error}", provider=self.name
            ) from None

    def _note(self, word: str, call: Call) -> None:
        if self._record is not None:
            line = f"{word}\t{os.getpid()}\t{call.conversation}\t{call.request_id}\t{call.attempt}\n"
            os.write(self._record, line.encode())


def build(setting: Setting, options: Options) -> StubProvider:
    """The provider for a configuration."""
    return StubProvider(setting, options)


def _usage(script: bool | Usage, prompt: str, text: str) -> Usage | None:
    if isinstance(script, Usage):
        return script
    return Usage(input_tokens=_words(prompt), output_tokens=_words(text)) if script else None


def _words(text: str) -> int:
    return text.count(" ") + 1


def _cut(text: str, pieces: int) -> list[str]:
    size = max(1, -(-len(text) // pieces))
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]
