"""Anthropic's Messages API, at Anthropic or at any endpoint that speaks it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ksi.clock import Clock
from ksi.errors import FailureClass, ProviderError
from ksi.providers.answers import Answer, as_object, completed, model_of, read_object, stop_reason
from ksi.providers.anthropic_blocks import streamed_blocks
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting, StopReason
from ksi.providers.faults import ReportedError, is_error, read_report
from ksi.providers.http import Continuation, Endpoint, Streaming
from ksi.providers.http_checks import Credential, Timeouts
from ksi.providers.http_checks import base_url as checked_base_url
from ksi.providers.http_environment import access
from ksi.providers.http_provider import HttpProvider, path_at
from ksi.providers.json_text import TextJoiner, encode_clean
from ksi.providers.sse import DONE, HEARTBEATS, SseEvent
from ksi.providers.usage_counts import later_message_report, message_usage

OWN_PATH = "v1/messages"
MOST_PAUSES = 10
"""How often an answer that the API pauses is continued."""

_ANY = msgspec.json.Decoder()


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


class _Paused:
    """The parts of an answer that was paused, over several calls."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._content: list[Any] = []
        self._rounds: list[Answer] = []

    def go_on(self, answer: Answer, content: list[Any], container: Any) -> Continuation:
        """The next call: the assistant's content goes back as it came.

        Raises:
            ProviderError: it was paused too often.
        """
        self._rounds.append(answer)
        if len(self._rounds) > MOST_PAUSES:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR,
                f"the answer was paused {len(self._rounds)} times (pause_turn) and is not whole; ask for less at once",
            )
        self._content += content
        body = {**self._body, "messages": [*self._body["messages"], {"role": "assistant", "content": self._content}]}
        if isinstance(container, dict) and container.get("id"):
            body["container"] = container["id"]
        return Continuation(body, answer.text)

    def joined(self, last: Answer) -> Answer:
        """The whole answer: texts joined, usage added up. It came in several pieces, so none of them is kept raw."""
        if not self._rounds:
            return last
        usage, hour_tokens = last.usage, last.cache_write_hour_tokens
        for part in self._rounds:
            usage = usage.plus(part.usage) if usage is not None and part.usage is not None else None
            hour_tokens += part.cache_write_hour_tokens
        return msgspec.structs.replace(
            last,
            text="".join(part.text for part in (*self._rounds, last)),
            usage=usage,
            cache_write_hour_tokens=hour_tokens,
            reasoned=any(part.reasoned for part in (*self._rounds, last)),
            raw=None,
        )


class _Messages:
    """The dialect of one call. Only what an answer needs is looked at; all else in it may be anything."""

    def __init__(self, asked: str, body: Mapping[str, Any]) -> None:
        self.asked = asked
        self._paused = _Paused(body)

    def whole(self, data: bytes) -> Completion | Continuation:
        """See Dialect."""
        message, clean = read_object(data, "message")
        content = message.get("content")
        if message.get("type") == "error" or not isinstance(content, list | str):
            if is_error(message):
                raise ReportedError(data)
            said = read_report(data).message or "it has no content"
            raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no message: {said}")
        if not clean:
            data = encode_clean(message)
            content = as_object(_ANY.decode(data)).get("content")
        blocks: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        counted = message_usage(message.get("usage"))
        answer = Answer(
            text="".join(_text(block) for block in blocks),
            model=model_of(message, self.asked),
            usage=counted.usage,
            cache_write_hour_tokens=counted.hour_tokens,
            stop_reason=stop_reason(message.get("stop_reason")),
            tools=_tools(blocks),
            reasoned=_reasons(blocks),
            raw=data,
        )
        return self.ended(answer, lambda: blocks, message)

    def ended(
        self, answer: Answer, content: Callable[[], list[Any]], told: Mapping[str, Any]
    ) -> Completion | Continuation:
        """The end of one call's part of the answer. `told` is where the API says more about it."""
        if answer.stop_reason == StopReason.PAUSE_TURN:
            return self._paused.go_on(answer, content(), told.get("container"))
        answer = self._paused.joined(answer)
        if answer.stop_reason == StopReason.REFUSAL and not answer.text.strip():
            answer = msgspec.structs.replace(answer, refusal=_explanation(told))
        return completed(answer)

    def reply(self) -> _MessagesReply:
        """See Dialect."""
        return _MessagesReply(self)


class _MessagesReply:
    """A streamed answer. It is whole when `message_stop` came, or some time after a stop reason, or when the body ended
    in order behind one.

    Event types that are not named here (`ping`, and those that the API may add) are passed over.
    """

    def __init__(self, dialect: _Messages) -> None:
        self.done = False
        self.ended = False
        self._dialect = dialect
        self._model = dialect.asked
        self._joiner = TextJoiner()
        self._texts: list[str] = []
        self._blocks: list[bytes] = []
        self._tools: list[str] = []
        self._reasoned = False
        self._usage: Any = None
        self._last: dict[str, Any] = {}
        self._odd = ""

    def feed(self, event: SseEvent) -> str | None:
        """See Reply."""
        data = event.data.strip()
        if data == DONE:
            self.done = True
            return self.rest()
        if event.event in HEARTBEATS or not data.startswith(b"{"):
            if event.event == "error":
                raise ReportedError(event.data)
            self._odd = self._odd or data.decode("utf-8", "replace")
            return None
        said, _ = read_object(event.data, "message")
        match said.get("type", event.event):
            case "content_block_start":
                return self._block(event.data, as_object(said.get("content_block")))
            case "content_block_delta":
                self._blocks.append(event.data)
                return self._piece(_text(as_object(said.get("delta")), "text_delta"))
            case "message_start":
                message = as_object(said.get("message"))
                self._model = model_of(message, self._model)
                self._usage = later_message_report(self._usage, message.get("usage"))
            case "message_delta":
                self._usage = later_message_report(self._usage, said.get("usage"))
                self._last = {**self._last, **{k: v for k, v in as_object(said.get("delta")).items() if v is not None}}
                self.ended = stop_reason(self._last.get("stop_reason")) is not None
            case "message_stop":
                self.done = True
                return self.rest()
            case "content_block_stop":
                pass
            case _:
                if event.event == "error" or is_error(said):
                    raise ReportedError(event.data)
                return None
        return ""

    def _block(self, data: bytes, block: dict[str, Any]) -> str:
        self._blocks.append(data)
        self._tools += _tools([block])
        self._reasoned = self._reasoned or _reasons([block])
        return self._piece(_text(block))

    def _piece(self, text: str) -> str:
        text = self._joiner.add(text)
        self._texts.append(text)
        return text

    def rest(self) -> str:
        """See Reply."""
        text = self._joiner.rest()
        self._texts.append(text)
        return text

    def finish(self) -> Completion | Continuation:
        """See Reply."""
        reason = stop_reason(self._last.get("stop_reason"))
        if not self.done and reason is None:
            if not self._blocks and self._usage is None and self._odd:
                raise ProviderError(FailureClass.PROVIDER_ERROR, f"the stream holds no message: {self._odd}")
            raise ProviderError(FailureClass.NETWORK_ERROR, "the stream ended in the middle of the answer")
        counted = message_usage(self._usage)
        answer = Answer(
            text="".join(self._texts),
            model=self._model,
            usage=counted.usage,
            cache_write_hour_tokens=counted.hour_tokens,
            stop_reason=reason,
            tools=tuple(self._tools),
            reasoned=self._reasoned,
        )
        return self._dialect.ended(answer, lambda: streamed_blocks(self._blocks), self._last)


def _text(block: Any, kind: str = "text") -> str:
    text = block.get("text") if isinstance(block, dict) and block.get("type") == kind else None
    return text if isinstance(text, str) else ""


def _tools(blocks: list[Any]) -> tuple[str, ...]:
    """The tools of the caller that the answer calls; the endpoint's own have run already."""
    return tuple(str(as_object(block).get("name")) for block in blocks if as_object(block).get("type") == "tool_use")


def _reasons(blocks: list[Any]) -> bool:
    return any(as_object(block).get("type") in ("thinking", "redacted_thinking") for block in blocks)


def _explanation(told: Mapping[str, Any]) -> str:
    """Why the model declined, where the API says it beside an empty answer."""
    details = as_object(told.get("stop_details"))
    words = (details.get("explanation"), details.get("category"))
    return ": ".join(word for word in reversed(words) if isinstance(word, str) and word)


class AnthropicProvider(HttpProvider):
    """The Messages API.

    `input_tokens` are those that were neither read from nor written to the cache, as this API counts and as all
    providers of KSI report. Thinking is a part of `output_tokens`. An answer that the API pauses (`pause_turn`) is
    continued here.
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
        ca_file: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`base_url` with or without `/v1` at its end. `api_key_env` names the variable that `api_key` was read from;
        with the name and no key, calls are refused before they leave. `headers` are added to each call and win over
        those made here. `proxy`, `ca_file` and `environ` are those of `ksi.providers.http_environment.access`.

        Raises:
            ConfigError: `base_url`, `proxy`, `ca_file` or a header cannot be used.
        """
        self._settings = settings or MessagesSettings()
        credential = Credential.read(api_key, api_key_env)
        key = {"x-api-key": credential.key} if credential.key else {}
        base = checked_base_url(name, base_url, OWN_PATH)
        endpoint = Endpoint(
            name,
            base,
            clock=clock,
            credential=credential,
            own_headers={"anthropic-version": self._settings.version, **key},
            headers=headers,
            timeouts=timeouts,
            access=access(name, base, proxy=proxy, ca_file=ca_file, environ=environ),
        )
        version = "" if endpoint.path.endswith("/v1") else "v1/"
        super().__init__(name, endpoint, login_path=f"{version}models")
        self._url = endpoint.url(f"{version}messages")
        streams = self._settings.streaming is not Streaming.NEVER
        self.capabilities = Capabilities(stream=streams, context_tokens=context_tokens, price_list=str(base))

    def complete(self, call: Call) -> AsyncGenerator[Chunk | Completion, None]:
        """See the protocol."""
        body = messages_body(call, self._settings)
        return self._endpoint.complete(self._url, body, _Messages(call.model, body), pieces=call.stream)


class Options(MessagesSettings, frozen=True, kw_only=True):
    """The configuration keys of kind `anthropic`, beside what every provider has."""

    base_url: str = "https://api.anthropic.com"
    api_key_env: str = "ANTHROPIC_API_KEY"
    """The variable that holds the key."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    connect_timeout: float = 10.0
    context_tokens: int = 200_000
    proxy: str | None = None
    """A proxy's URL; without it the one that the environment names. Empty: none."""
    ca_file: str | None = None
    """Certificates in PEM form that are trusted for this endpoint, in place of the system's."""


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
        ca_file=path_at(setting.home, options.ca_file),
        environ=setting.environ,
    )
