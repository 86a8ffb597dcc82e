"""Calls of the HTTP providers to scripted endpoints, for the tests of both dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ksi.clock import SystemClock
from ksi.errors import ProviderError
from ksi.providers.anthropic import AnthropicProvider, MessagesSettings
from ksi.providers.base import Call, Chunk, Completion, Message
from ksi.providers.http import Streaming
from ksi.providers.openai import ChatSettings, OpenAIProvider
from tests.endpoint import Answer, ScriptedEndpoint, chat_answer, message_answer

KEY = "sk-secret-0123456789"
HttpProvider = OpenAIProvider | AnthropicProvider
APIS = ("openai", "anthropic")
SOON = 10.0

CHAT_OR_MESSAGE = {"openai": chat_answer, "anthropic": message_answer}
both_apis = pytest.mark.parametrize("api", APIS)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def make(api: str, url: str, *, streaming: Streaming = Streaming.ASKED, **arguments: Any) -> HttpProvider:
    """A provider named `team` for a base URL without `/v1`."""
    arguments = {"clock": SystemClock(), "api_key": KEY, **arguments}
    if api == "openai":
        return OpenAIProvider("team", base_url=f"{url}/v1", settings=ChatSettings(streaming=streaming), **arguments)
    return AnthropicProvider("team", base_url=url, settings=MessagesSettings(streaming=streaming), **arguments)


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
