"""Any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.answers import Answer, as_object, completed, model_of, read_object, stop_reason
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Message, Setting, StopReason
from ksi.providers.faults import ReportedError, is_error, read_report
from ksi.providers.http import Endpoint, Streaming
from ksi.providers.http_checks import Credential, Timeouts
from ksi.providers.http_checks import base_url as checked_base_url
from ksi.providers.http_environment import access
from ksi.providers.http_provider import HttpProvider, path_at
from ksi.providers.json_text import TextJoiner, encode_clean, repaired
from ksi.providers.sse import DONE, HEARTBEATS, SseEvent
from ksi.providers.usage_counts import chat_usage, later_report

OWN_PATH = "chat/completions"

_NO_INDEX = object()
_LOGIN_PATHS = {"openrouter.ai": "key"}
"""Where an endpoint shows its models to everybody, so that another path has to tell whether a key is good."""


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
    return endpoint.complete(endpoint.url(OWN_PATH), body, _Chat(call.model), pieces=call.stream)


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


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(content: Any, kind: str = "text") -> str:
    """The text of a message's content; with `kind` refusal, what of it declines."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = (part.get(kind) for part in _objects(content) if part.get("type", "text") in (kind, f"output_{kind}"))
    return "".join(part for part in parts if isinstance(part, str))


def _refusal(said: dict[str, Any]) -> str:
    refusal = said.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else _text(said.get("content"), "refusal")


def _reasons(said: dict[str, Any]) -> bool:
    """Whether a message or a piece of one holds reasoning, under any of the names for it."""
    return any(said.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details", "thinking")) or any(
        part.get("type") in ("thinking", "reasoning") for part in _objects(said.get("content"))
    )


def _tools(said: dict[str, Any]) -> dict[Any, str]:
    """The names of the tools that a message or a piece of one calls, by their index."""
    named: dict[Any, str] = {}
    for place, call in enumerate(_objects(said.get("tool_calls"))):
        name = (as_object(call.get("function")) or as_object(call.get("custom"))).get("name") or call.get("name")
        if name:
            named[str(call.get("index", place))] = str(name)
    if name := as_object(said.get("function_call")).get("name"):
        named["function_call"] = str(name)
    return named


def _stop_reason(choice: dict[str, Any]) -> str | None:
    """Why a choice ended. A gateway can hide a refusal behind a plain end, and name it beside that."""
    native = stop_reason(choice.get("native_finish_reason"))
    if native in (StopReason.REFUSAL, StopReason.CONTENT_FILTER):
        return native
    return stop_reason(choice.get("finish_reason") or choice.get("finishReason"))


def _check(choice: dict[str, Any]) -> None:
    """Raise the error that a gateway put into a choice."""
    if isinstance(choice.get("error"), dict):
        raise ReportedError(encode_clean({"error": choice["error"]}))


class _Chat:
    """The dialect of one call. Only what an answer needs is looked at; all else in it may be anything."""

    def __init__(self, model: str) -> None:
        self._asked = model

    def whole(self, data: bytes) -> Completion:
        """See Dialect."""
        value, clean = read_object(data, "chat completion")
        choices = _objects(value.get("choices"))
        first = choices[0] if choices else {}
        choice = next((c for c in choices if c.get("index") in (0, None)), first)
        _check(choice)
        if value.get("error") or not (isinstance(choice.get("message"), dict) or choice.get("finish_reason")):
            if is_error(value):
                raise ReportedError(data)
            words = read_report(data).message or "it has no message"
            raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no chat completion: {words}")
        said = as_object(choice.get("message"))
        return completed(
            Answer(
                text=repaired(_text(said.get("content"))),
                model=model_of(value, self._asked),
                usage=chat_usage(value.get("usage"), value.get("service_tier")),
                stop_reason=_stop_reason(choice),
                refusal=repaired(_refusal(said)),
                tools=tuple(_tools(said).values()),
                reasoned=_reasons(said),
                raw=data if clean else encode_clean(value),
            )
        )

    def reply(self) -> _ChatReply:
        """See Dialect."""
        return _ChatReply(self._asked)


class _ChatReply:
    """A streamed answer. It is whole when `[DONE]` came, or some time after a finish reason, or when the body ended in
    order behind one.

    Some endpoints give a finish reason with every piece: where text comes behind one, it is no end.
    """

    def __init__(self, model: str) -> None:
        self.done = False
        self.ended = False
        self._model = model
        self._index: Any = _NO_INDEX
        self._joiner = TextJoiner()
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._tools: dict[Any, str] = {}
        self._reasoned = False
        self._in_deltas = False
        self._ends_often = False
        self._stop_reason: str | None = None
        self._usage: Any = None
        self._tier: Any = None
        self._odd = ""

    def feed(self, event: SseEvent) -> str | None:
        """See Reply."""
        data = event.data.strip()
        if data == DONE:
            self.done = True
            return self.rest()
        if event.event == "error":
            raise ReportedError(event.data)
        if event.event in HEARTBEATS or not data.startswith(b"{"):
            self._odd = self._odd or data.decode("utf-8", "replace")
            return None
        value, _ = read_object(event.data, "chat completion")
        choices = _objects(value.get("choices"))
        if value.get("error") or (not choices and is_error(value)):
            raise ReportedError(event.data)
        self._model = model_of(value, self._model)
        self._tier = value.get("service_tier") or self._tier
        self._usage = later_report(self._usage, value.get("usage"))
        text = "".join(self._choice(choice) for choice in choices if self._is_ours(choice))
        if text and self.ended:
            self._ends_often = True
        self.ended = self._stop_reason is not None and not self._ends_often
        text = self._joiner.add(text)
        self._texts.append(text)
        return text if choices or value.get("usage") else None

    def _is_ours(self, choice: dict[str, Any]) -> bool:
        """Of several choices the first that comes is taken."""
        index = choice.get("index")
        if self._index is _NO_INDEX:
            self._index = index
        return index is None or self._index in (None, index)

    def _choice(self, choice: dict[str, Any]) -> str:
        """Take a piece of the answer in, and give its text. Some endpoints call it a message, and some send the whole
        message once more at the end."""
        _check(choice)
        delta = choice.get("delta")
        self._in_deltas = self._in_deltas or bool(delta)
        said = as_object(delta) if self._in_deltas else as_object(choice.get("message"))
        self._stop_reason = _stop_reason(choice) or self._stop_reason
        self._refusals.append(_refusal(said))
        self._tools.update(_tools(said))
        self._reasoned = self._reasoned or _reasons(said)
        return _text(said.get("content"))

    def rest(self) -> str:
        """See Reply."""
        text = self._joiner.rest()
        self._texts.append(text)
        return text

    def finish(self) -> Completion:
        """See Reply."""
        if not self.done and self._stop_reason is None:
            if self._index is _NO_INDEX and self._odd:
                raise ProviderError(FailureClass.PROVIDER_ERROR, f"the stream holds no chat completion: {self._odd}")
            raise ProviderError(FailureClass.NETWORK_ERROR, "the stream ended in the middle of the answer")
        return completed(
            Answer(
                text="".join(self._texts),
                model=self._model,
                usage=chat_usage(self._usage, self._tier),
                stop_reason=self._stop_reason,
                refusal=repaired("".join(self._refusals)),
                tools=tuple(self._tools.values()),
                reasoned=self._reasoned,
            )
        )


class OpenAIProvider(HttpProvider):
    """Chat completions at any compatible endpoint: OpenAI, vLLM, llama.cpp, Ollama, OpenRouter and others.

    This API counts cached tokens within `prompt_tokens`; here `input_tokens` leaves them out, as all providers of KSI
    do, so that input and cache can be added. `reasoning_tokens` are a part of `output_tokens`. Of an answer with
    several choices the first is taken.
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
        ca_file: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`api_key_env` names the variable that `api_key` was read from; with the name and no key, calls are refused
        before they leave. `headers` are added to each call and win over those made here. `proxy`, `ca_file` and
        `environ` are those of `ksi.providers.http_environment.access`.

        Raises:
            ConfigError: `base_url`, `proxy`, `ca_file` or a header cannot be used.
        """
        self._settings = settings or ChatSettings()
        credential = Credential.read(api_key, api_key_env)
        base = checked_base_url(name, base_url, OWN_PATH)
        endpoint = Endpoint(
            name,
            base,
            clock=clock,
            credential=credential,
            own_headers={"Authorization": f"Bearer {credential.key}"} if credential.key else {},
            headers=headers,
            timeouts=timeouts,
            access=access(name, base, proxy=proxy, ca_file=ca_file, environ=environ),
        )
        super().__init__(name, endpoint, login_path=_LOGIN_PATHS.get(base.host or "", "models"))
        streams = self._settings.streaming is not Streaming.NEVER
        self.capabilities = Capabilities(stream=streams, context_tokens=context_tokens, price_list=str(base))

    def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        """See the protocol."""
        return chat(self._endpoint, call, self._settings)


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
    """A proxy's URL; without it the one that the environment names. Empty: none."""
    ca_file: str | None = None
    """Certificates in PEM form that are trusted for this endpoint, in place of the system's."""


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
        ca_file=path_at(setting.home, options.ca_file),
        environ=setting.environ,
    )
