"""Any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Message, Setting
from ksi.providers.faults import reported
from ksi.providers.http import Endpoint, Streaming, Timeouts, counts
from ksi.providers.http_checks import Credential
from ksi.providers.sse import SseEvent
from ksi.request import Usage


class ChatSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between endpoints of this kind."""

    streaming: Streaming = Streaming.ASKED
    stream_usage: bool = True
    """Ask for usage at a stream's end (`stream_options`). Off for endpoints that reject the field; where they then
    report none, a streamed call's usage is unknown (T1)."""
    max_tokens_field: str | None = None
    """The name of the answer's limit. None: `max_completion_tokens` at api.openai.com, whose newer models know no
    other, and `max_tokens` elsewhere."""
    extra_body: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """Fields for every request, as `provider_options` are for one."""


def chat(
    endpoint: Endpoint, call: Call, settings: ChatSettings | None = None
) -> AsyncGenerator[Chunk | Completion, None]:
    """One chat completion at `endpoint`, which must be started; its base URL ends before `/chat/completions`.

    Raises:
        ProviderError: with its class, from the iterator.
    """
    settings = settings or ChatSettings()
    body = chat_body(call, settings, openai=endpoint.host == "api.openai.com")
    return endpoint.complete(endpoint.url("chat/completions"), body, _Chat(call.model), pieces=call.stream)


def chat_body(call: Call, settings: ChatSettings, *, openai: bool = False) -> dict[str, Any]:
    """The request's body; `openai`: for OpenAI's own endpoint.

    Later wins: `extra_body`, then the call's `provider_options`, then the call's own fields.
    So options can add anything and fill in what the request left open, but not change the model, the messages, whether
    the answer is streamed, or a limit that the request set.
    """
    body: dict[str, Any] = {**settings.extra_body, **call.options}
    body["model"] = call.model
    system = [Message("system", call.system)] if call.system else []
    body["messages"] = [*system, *call.messages]
    if call.max_tokens is not None:
        field = "max_completion_tokens" if openai else "max_tokens"
        body[settings.max_tokens_field or field] = call.max_tokens
    if call.temperature is not None:
        body["temperature"] = call.temperature
    if call.stop:
        body["stop"] = list(call.stop)
    body["stream"] = settings.streaming.wanted(call.stream)
    body.pop("stream_options", None)
    if body["stream"] and settings.stream_usage:
        body["stream_options"] = {"include_usage": True}
    return body


class _Part(msgspec.Struct):
    type: str = ""
    text: str = ""


class _Text(msgspec.Struct):
    content: str | list[_Part] | None = None

    def words(self) -> str:
        content = self.content
        if isinstance(content, list):
            return "".join(part.text for part in content if part.type == "text")
        return content or ""


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Text | None = None
    delta: _Text | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None

    def report(self) -> Usage | None:
        """As KSI counts; None where the counts are missing (T1)."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        cached = (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0
        reasoning = (self.completion_tokens_details and self.completion_tokens_details.reasoning_tokens) or 0
        if prompt is None or completion is None or not counts(prompt, completion, cached, reasoning):
            return None
        return Usage(
            input_tokens=max(0, prompt - cached),
            output_tokens=completion,
            cache_read_tokens=cached,
            reasoning_tokens=reasoning,
        )


class _Body(msgspec.Struct):
    """A whole answer, or one event of a streamed one."""

    choices: list[_Choice] | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None


_BODY = msgspec.json.Decoder(_Body, strict=False)


def _decode(data: bytes) -> _Body:
    try:
        body = _BODY.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no chat completion: {fault}") from None
    if body.error:
        raise reported(data)
    return body


class _Chat:
    """The dialect of one call."""

    def __init__(self, model: str) -> None:
        self._model = model

    def whole(self, data: bytes) -> Completion:
        """See Dialect."""
        body = _decode(data)
        choice = next((c for c in body.choices or () if c.index == 0), None)
        if choice is None or choice.message is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "the answer is no chat completion: it has no message")
        return Completion(
            text=choice.message.words(),
            model=body.model or self._model,
            usage=body.usage.report() if body.usage is not None else None,
            stop_reason=choice.finish_reason,
            raw=data,
        )

    def reply(self) -> _ChatReply:
        """See Dialect."""
        return _ChatReply(self._model)


class _ChatReply:
    """A streamed answer. It is whole when `[DONE]` came, or when the body ended in order after a finish reason."""

    def __init__(self, model: str) -> None:
        self.done = False
        self._model = model
        self._texts: list[str] = []
        self._usage: _Usage | None = None
        self._stop_reason: str | None = None

    def feed(self, event: SseEvent) -> str:
        """See Reply."""
        if event.data == b"[DONE]":
            self.done = True
            return ""
        if event.event == "error":
            raise reported(event.data)
        body = _decode(event.data)
        self._model = body.model or self._model
        self._usage = body.usage or self._usage
        text = ""
        for choice in body.choices or ():
            if choice.index == 0:
                self._stop_reason = choice.finish_reason or self._stop_reason
                if choice.delta is not None:
                    text += choice.delta.words()
        self._texts.append(text)
        return text

    def finish(self) -> Completion:
        """See Reply."""
        if not self.done and self._stop_reason is None:
            raise ProviderError(FailureClass.NETWORK_ERROR, "the stream ended in the middle of the answer")
        return Completion(
            text="".join(self._texts),
            model=self._model,
            usage=self._usage.report() if self._usage is not None else None,
            stop_reason=self._stop_reason,
        )


class OpenAIProvider:
    """Chat completions at any compatible endpoint: OpenAI, vLLM, llama.cpp, Ollama, OpenRouter and others.

    Usage (T1): this API counts cached tokens within `prompt_tokens`; here `input_tokens` leaves them out, as all
    providers of KSI do, so that input and cache can be added. `reasoning_tokens` are a part of `output_tokens`.
    Of an answer with several choices the first is taken; tool calls are not text and stay in `raw`.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        base_url: str = "https://api.openai.com/v1",
        api_key: str | None = None,
        api_key_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        context_tokens: int = 128_000,
        settings: ChatSettings | None = None,
        proxy: str | None = None,
    ) -> None:
        """`api_key_env` names the variable that `api_key` was read from; with the name and no key, calls are refused
        before they leave. `headers` are added to each call and win over those made here.

        Raises:
            ConfigError: `base_url` is no URL.
        """
        self.name = name
        self._settings = settings or ChatSettings()
        credential = Credential.read(api_key, api_key_env)
        self._endpoint = Endpoint(
            name,
            base_url,
            clock=clock,
            credential=credential,
            own_headers={"Authorization": f"Bearer {credential.key}"} if credential.key else {},
            headers=headers,
            timeouts=timeouts,
            proxy=proxy,
        )
        streams = self._settings.streaming is not Streaming.NEVER
        self.capabilities = Capabilities(stream=streams, context_tokens=context_tokens, price_list=base_url)

    async def start(self) -> None:
        """Make the session; nothing is sent."""
        await self._endpoint.start()

    async def stop(self) -> None:
        """Close the session and what runs on it."""
        await self._endpoint.stop()

    def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        """See the protocol."""
        return chat(self._endpoint, call, self._settings)

    def problem(self) -> str | None:
        """A missing key, or what the endpoint last said about it."""
        return self._endpoint.problem()


class Options(ChatSettings, frozen=True, kw_only=True):
    """The configuration keys of kind `openai`, beside what every provider has."""

    base_url: str = "https://api.openai.com/v1"
    """Up to and with the version; `/chat/completions` is added."""
    api_key_env: str | None = None
    """The variable that holds the key. OpenAI's own endpoint reads OPENAI_API_KEY without it."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    connect_timeout: float = 10.0
    context_tokens: int = 128_000
    proxy: str | None = None


def build(setting: Setting, options: Options) -> OpenAIProvider:
    """The provider for a configuration."""
    variable = options.api_key_env
    if variable is None and options.base_url == Options().base_url:
        variable = "OPENAI_API_KEY"
    return OpenAIProvider(
        setting.name,
        clock=setting.clock,
        base_url=options.base_url,
        api_key=setting.environ.get(variable) if variable else None,
        api_key_env=variable,
        headers=options.headers,
        timeouts=Timeouts(total=setting.timeout, idle=setting.idle_timeout, connect=options.connect_timeout),
        context_tokens=options.context_tokens,
        settings=options,
        proxy=options.proxy,
    )
