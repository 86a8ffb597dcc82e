"""Anthropic's Messages API, at Anthropic or at any endpoint that speaks it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting
from ksi.providers.faults import reported
from ksi.providers.http import Endpoint, Streaming, Timeouts, counts
from ksi.providers.http_checks import Credential
from ksi.providers.sse import SseEvent
from ksi.request import Usage


class MessagesSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint's owner decides about its calls."""

    streaming: Streaming = Streaming.ASKED
    max_tokens: int = 8_192
    """The answer's limit where the request sets none: this API wants one in each call."""
    version: str = "2023-06-01"
    """The `anthropic-version` header."""
    extra_body: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """Fields for every request, as `provider_options` are for one."""


def messages_body(call: Call, settings: MessagesSettings) -> dict[str, Any]:
    """The request's body. Later wins: `extra_body`, then the call's `provider_options`, then the call's own fields.

    So options can add anything and fill in what the request left open, but not change the model, the messages, whether
    the answer is streamed, or a limit that the request set. Blank messages are left out, since the API refuses a whole
    call for one; it joins the neighbours that then have the same role.
    """
    body: dict[str, Any] = {"max_tokens": settings.max_tokens, **settings.extra_body, **call.options}
    body["model"] = call.model
    body["messages"] = [message for message in call.messages if message.content.strip()]
    body["stream"] = settings.streaming.wanted(call.stream)
    if call.system:
        body["system"] = call.system
    if call.max_tokens is not None:
        body["max_tokens"] = call.max_tokens
    if call.temperature is not None:
        body["temperature"] = call.temperature
    if call.stop:
        body["stop_sequences"] = list(call.stop)
    return body


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    def updated(self, later: _Usage) -> _Usage:
        """The counts are running totals: the last word on each is the truth, and they are never added up (T1)."""
        names = self.__struct_fields__
        return _Usage(*(getattr(self, name) if (new := getattr(later, name)) is None else new for name in names))

    def report(self) -> Usage | None:
        """As KSI counts; None where the counts are missing (T1)."""
        given, made = self.input_tokens, self.output_tokens
        read, written = self.cache_read_input_tokens or 0, self.cache_creation_input_tokens or 0
        if given is None or made is None or not counts(given, made, read, written):
            return None
        return Usage(input_tokens=given, output_tokens=made, cache_read_tokens=read, cache_write_tokens=written)


class _Block(msgspec.Struct):
    type: str = ""
    text: str | None = None

    def words(self) -> str:
        return (self.text or "") if self.type == "text" else ""


class _Message(msgspec.Struct):
    """A whole answer, or the head of a streamed one."""

    type: str = ""
    content: list[_Block] | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None


_T = TypeVar("_T")
_MESSAGE = msgspec.json.Decoder(_Message, strict=False)
_EVENT = msgspec.json.Decoder(_Event, strict=False)


class _Messages:
    """The dialect of one call."""

    def __init__(self, model: str) -> None:
        self._model = model

    def whole(self, data: bytes) -> Completion:
        """See Dialect."""
        message = _decode(_MESSAGE, data)
        if message.type == "error":
            raise reported(data)
        if message.content is None:
            raise ProviderError(FailureClass.PROVIDER_ERROR, "the answer is no message: it has no content")
        return Completion(
            text="".join(block.words() for block in message.content),
            model=message.model or self._model,
            usage=message.usage.report() if message.usage is not None else None,
            stop_reason=message.stop_reason,
            raw=data,
        )

    def reply(self) -> _MessagesReply:
        """See Dialect."""
        return _MessagesReply(self._model)


class _MessagesReply:
    """A streamed answer. It is whole when `message_stop` came, or when the body ended in order after a stop reason.

    Event types that are not named here (`ping`, and what the API may add) are passed over.
    """

    def __init__(self, model: str) -> None:
        self.done = False
        self._model = model
        self._texts: list[str] = []
        self._usage = _Usage()
        self._stop_reason: str | None = None

    def feed(self, event: SseEvent) -> str:
        """See Reply."""
        said, text = _decode(_EVENT, event.data), ""
        match said.type:
            case "content_block_delta":
                if said.delta is not None and said.delta.type == "text_delta":
                    text = said.delta.text or ""
            case "content_block_start":
                if said.content_block is not None:
                    text = said.content_block.words()
            case "message_start":
                if said.message is not None:
                    self._model = said.message.model or self._model
                    self._count(said.message.usage)
            case "message_delta":
                self._count(said.usage)
                if said.delta is not None:
                    self._stop_reason = said.delta.stop_reason or self._stop_reason
            case "message_stop":
                self.done = True
            case "error":
                raise reported(event.data)
        self._texts.append(text)
        return text

    def _count(self, usage: _Usage | None) -> None:
        if usage is not None:
            self._usage = self._usage.updated(usage)

    def finish(self) -> Completion:
        """See Reply."""
        if not self.done and self._stop_reason is None:
            raise ProviderError(FailureClass.NETWORK_ERROR, "the stream ended in the middle of the answer")
        return Completion(
            text="".join(self._texts),
            model=self._model,
            usage=self._usage.report(),
            stop_reason=self._stop_reason,
        )


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no message: {fault}") from None


class AnthropicProvider:
    """The Messages API.

    Usage (T1): `input_tokens` are what was neither read from nor written to the cache, as this API counts and as all
    providers of KSI report. Thinking is a part of `output_tokens`, and not reported by itself. Tool calls are not text
    and stay in `raw`.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        base_url: str = "https://api.anthropic.com",
        api_key: str | None = None,
        api_key_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        context_tokens: int = 200_000,
        settings: MessagesSettings | None = None,
        proxy: str | None = None,
    ) -> None:
        """`base_url` with or without `/v1` at its end. `api_key_env` names the variable that `api_key` was read from;
        with the name and no key, calls are refused before they leave. `headers` are added to each call and win over
        those made here.

        Raises:
            ConfigError: `base_url` is no URL.
        """
        self.name = name
        self._settings = settings or MessagesSettings()
        credential = Credential.read(api_key, api_key_env)
        key = {"x-api-key": credential.key} if credential.key else {}
        self._endpoint = Endpoint(
            name,
            base_url,
            clock=clock,
            credential=credential,
            own_headers={"anthropic-version": self._settings.version, **key},
            headers=headers,
            timeouts=timeouts,
            proxy=proxy,
        )
        self._url = self._endpoint.url("messages" if self._endpoint.path.endswith("/v1") else "v1/messages")
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
        body = messages_body(call, self._settings)
        return self._endpoint.complete(self._url, body, _Messages(call.model), pieces=call.stream)

    def problem(self) -> str | None:
        """A missing key, or what the endpoint last said about it."""
        return self._endpoint.problem()


class Options(MessagesSettings, frozen=True, kw_only=True):
    """The configuration keys of kind `anthropic`, beside what every provider has."""

    base_url: str = "https://api.anthropic.com"
    api_key_env: str = "ANTHROPIC_API_KEY"
    """The variable that holds the key."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    connect_timeout: float = 10.0
    context_tokens: int = 200_000
    proxy: str | None = None


def build(setting: Setting, options: Options) -> AnthropicProvider:
    """The provider for a configuration."""
    return AnthropicProvider(
        setting.name,
        clock=setting.clock,
        base_url=options.base_url,
        api_key=setting.environ.get(options.api_key_env),
        api_key_env=options.api_key_env,
        headers=options.headers,
        timeouts=Timeouts(total=setting.timeout, idle=setting.idle_timeout, connect=options.connect_timeout),
        context_tokens=options.context_tokens,
        settings=options,
        proxy=options.proxy,
    )
