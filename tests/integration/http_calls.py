"""Calls of the HTTP providers to scripted endpoints, for the tests of both dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ksi.clock import Clock, SystemClock
from ksi.content.blocks import Message
from ksi.errors import ProviderError
from ksi.providers import anthropic, openai
from ksi.providers.anthropic import AnthropicProvider
from ksi.providers.base import Call, Chunk, Completion, Setting
from ksi.providers.http.access import Timeouts
from ksi.providers.openai import OpenAIProvider
from tests.endpoint import Answer, ScriptedEndpoint, chat_answer, message_answer

KEY = "sk-secret-0123456789"
HttpProvider = OpenAIProvider | AnthropicProvider
APIS = ("openai", "anthropic")
SOON = 10.0

CHAT_OR_MESSAGE = {"openai": chat_answer, "anthropic": message_answer}
both_apis = pytest.mark.parametrize("api", APIS)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def make(
    api: str,
    url: str,
    *,
    clock: Clock | None = None,
    timeouts: Timeouts | None = None,
    api_key: str | None = KEY,
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> HttpProvider:
    """A provider named `team` for a base URL without `/v1`, which reads `api_key` from TEAM_KEY unless it is None."""
    environ = {**(environ or {}), **({} if api_key is None else {"TEAM_KEY": api_key})}
    options = {"api_key_env": None if api_key is None else "TEAM_KEY", **options}
    setting = setting_of(environ, clock)
    if api == "openai":
        return OpenAIProvider(setting, openai.Options(**{"base_url": f"{url}/v1", **options}), timeouts)
    return AnthropicProvider(setting, anthropic.Options(**{"base_url": url, **options}), timeouts)


def setting_of(environ: Mapping[str, str], clock: Clock | None = None) -> Setting:
    """The setting of a provider named `team`."""
    nowhere = Path("/nowhere")
    return Setting(name="team", clock=clock or SystemClock(), home=nowhere, log_dir=nowhere, environ=environ)


@asynccontextmanager
async def running(provider: HttpProvider) -> AsyncIterator[HttpProvider]:
    await provider.start()
    try:
        yield provider
    finally:
        await provider.stop()


@asynccontextmanager
async def pair(api: str, *answers: Answer, **arguments: Any) -> AsyncIterator[tuple[ScriptedEndpoint, HttpProvider]]:
    async with ScriptedEndpoint(*answers) as endpoint, running(make(api, endpoint.url, **arguments)) as provider:
        yield endpoint, provider


def a_call(prompt: str = "Hi", *, stream: bool = False, **fields: Any) -> Call:
    given = {"messages": [Message("user", prompt)], **fields}
    return Call(request_id="r1", attempt=1, conversation="c1", model="small", stream=stream, **given)


async def whole(provider: HttpProvider, call: Call) -> tuple[list[str], Completion]:
    """All chunks and the completion, which must be the last."""
    *chunks, last = [piece async for piece in provider.complete(call)]
    assert isinstance(last, Completion)
    return [chunk.text for chunk in chunks if isinstance(chunk, Chunk)], last


async def failure(provider: HttpProvider, call: Call) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await whole(provider, call)
    assert KEY not in str(caught.value)
    assert str(caught.value).startswith("team: ")
    assert caught.value.details["provider"] == "team"
    return caught.value
