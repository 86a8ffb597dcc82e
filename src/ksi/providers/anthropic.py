"""Anthropic's Messages API, at Anthropic or at any endpoint that speaks it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from ksi.content.anthropic import write_request
from ksi.content.blocks import Block, as_blocks
from ksi.content.native import FEATURES
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import (
    Call,
    Chunk,
    Completion,
    Frame,
    Piece,
    Setting,
    StopReason,
    Thought,
    ToolPiece,
)
from ksi.providers.faults import ReportedError, is_error, read_report
from ksi.providers.http.access import Timeouts
from ksi.providers.http.answers import Answer, as_object, completed, model_of, read_object, stop_reason
from ksi.providers.http.endpoint import Continuation
from ksi.providers.http.provider import HttpOptions, HttpProvider, headers_of
from ksi.providers.http.sse import DONE, HEARTBEATS, SseEvent
from ksi.providers.http.usage import later_message_report, message_usage
from ksi.providers.json_text import TextJoiner, decode_json, encode_clean

MOST_PAUSES = 10
"""How often an answer that the API pauses is continued."""

_ANY = msgspec.json.Decoder()
_APPENDED = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
"""Pieces whose text is put behind the text of a block's field."""
_FEATURES = frozenset(FEATURES) - {"seed", "json_object", "service_tiers"}
"""This API has no seed, no answers that are JSON of any shape, and two tiers."""


class Options(HttpOptions, frozen=True, kw_only=True):
    """The configuration keys of kind `anthropic`, in addition to the common ones."""

    base_url: str = "https://api.anthropic.com"
    """With or without `/v1` or `/v1/messages` at its end."""
    api_key_env: str | None = "ANTHROPIC_API_KEY"
    """The variable that holds the key."""
    context_tokens: int = 200_000
    """The model's context; history is cut to it."""
    max_tokens: int = 8_192
    """The maximum length of the answer if the request sets none: this API requires a limit."""
    version: str = "2023-06-01"
    """The `anthropic-version` header."""


def messages_body(call: Call, options: Options) -> dict[str, Any]:
    """The request's body. Later wins: `extra_body`, then the call's `provider_options`, then the call's own fields.

    So options can add fields and set those that the request left open, but not change the model, the messages, whether
    the answer is streamed, or a limit that the request set. A native request is not changed: only the model, the
    streaming flag, and the fields of the configuration and the options are set.
    """
    if call.native is not None:
        body: dict[str, Any] = {**call.native.body, **options.extra_body, **call.options}
        if call.max_tokens is not None:
            body["max_tokens"] = min(call.max_tokens, body.get("max_tokens") or call.max_tokens)
    else:
        body = {"max_tokens": options.max_tokens, **options.extra_body, **call.options}
        body.update(write_request(call.messages, call.system, call.features))
        if call.max_tokens is not None:
            body["max_tokens"] = call.max_tokens
        elif body.get("thinking", {}).get("type") == "enabled":
            # The limit counts thinking too, and must be over its budget.
            body["max_tokens"] += body["thinking"]["budget_tokens"]
        if call.temperature is not None:
            body["temperature"] = call.temperature
        if call.stop:
            body["stop_sequences"] = list(call.stop)
    body["model"] = call.model
    body["stream"] = options.streaming.wanted(call.stream)
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
                f"the answer was paused {len(self._rounds)} times (pause_turn) and is incomplete; ask for less at once",
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
            content=_content([block for part in (*self._rounds, last) for block in blocks_of(part)]),
            usage=usage,
            cache_write_hour_tokens=hour_tokens,
            reasoned=any(part.reasoned for part in (*self._rounds, last)),
            raw=None,
        )


class _Messages:
    """The dialect of one call. Only the fields that an answer needs are checked; the others may be anything."""

    def __init__(self, asked: str, body: Mapping[str, Any], *, native: bool) -> None:
        self.asked = asked
        self.native = native
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
            content=_content(blocks),
            native=self.native,
            reasoned=_reasons(blocks),
            raw=data,
        )
        return self.ended(answer, lambda: blocks, message)

    def ended(
        self, answer: Answer, content: Callable[[], list[Any]], told: Mapping[str, Any]
    ) -> Completion | Continuation:
        """The end of one call's part of the answer. `told` is the API's object with details."""
        if answer.stop_reason == StopReason.PAUSE_TURN and not self.native:
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
        self._calls: dict[Any, ToolPiece] = {}
        self._plain = True
        self._reasoned = False
        self._usage: Any = None
        self._last: dict[str, Any] = {}
        self._odd = ""

    def feed(self, event: SseEvent) -> Sequence[Piece] | None:
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
                return self._block(event.data, said.get("index"), as_object(said.get("content_block")))
            case "content_block_delta":
                self._blocks.append(event.data)
                return self._delta(said.get("index"), as_object(said.get("delta")))
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
        return ()

    def _block(self, data: bytes, index: Any, block: dict[str, Any]) -> Sequence[Piece]:
        self._blocks.append(data)
        self._plain = self._plain and is_plain(block)
        self._reasoned = self._reasoned or _reasons([block])
        if block.get("type") == "tool_use":
            self._calls[index] = ToolPiece(str(block.get("id")), str(block.get("name")))
            return (self._calls[index],)
        if block.get("type") == "thinking":
            return _thought(block.get("thinking"))
        return self._piece(_text(block))

    def _delta(self, index: Any, delta: dict[str, Any]) -> Sequence[Piece]:
        match delta.get("type"):
            case "input_json_delta" if index in self._calls:
                added = delta.get("partial_json")
                return (msgspec.structs.replace(self._calls[index], json=added),) if isinstance(added, str) else ()
            case "thinking_delta":
                return _thought(delta.get("thinking"))
            case "citations_delta":
                self._plain = False
        return self._piece(_text(delta, "text_delta"))

    def _piece(self, text: str) -> Sequence[Piece]:
        text = self._joiner.add(text)
        self._texts.append(text)
        return (Chunk(text),)

    def rest(self) -> Sequence[Piece]:
        """See Reply."""
        text = self._joiner.rest()
        self._texts.append(text)
        return (Chunk(text),) if text else ()

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
            content=() if self._plain else _content(streamed_blocks(self._blocks)),
            native=self._dialect.native,
            reasoned=self._reasoned,
        )
        return self._dialect.ended(answer, lambda: streamed_blocks(self._blocks, whole=True), self._last)


def _text(block: Any, kind: str = "text") -> str:
    text = block.get("text") if isinstance(block, dict) and block.get("type") == kind else None
    return text if isinstance(text, str) else ""


def is_plain(block: Any) -> bool:
    """True if a block is text and nothing else."""
    return isinstance(block, dict) and block.get("type") == "text" and not block.get("citations")


def _content(blocks: Sequence[Any]) -> tuple[Block, ...]:
    """An answer's blocks, if they are more than its text."""
    if all(is_plain(block) for block in blocks):
        return ()
    return tuple(block for block in blocks if isinstance(block, dict))


def blocks_of(answer: Answer) -> Sequence[Block]:
    """An answer's blocks, also if they are nothing but its text."""
    return answer.content or as_blocks(answer.text)


def _thought(text: Any) -> Sequence[Piece]:
    return (Thought(text),) if isinstance(text, str) and text else ()


def _reasons(blocks: list[Any]) -> bool:
    return any(as_object(block).get("type") in ("thinking", "redacted_thinking") for block in blocks)


def _explanation(told: Mapping[str, Any]) -> str:
    """The model's reason to decline, if the API gives one with an empty answer."""
    details = as_object(told.get("stop_details"))
    words = (details.get("explanation"), details.get("category"))
    return ": ".join(word for word in reversed(words) if isinstance(word, str) and word)


def streamed_blocks(events: Sequence[bytes], *, whole: bool = False) -> list[dict[str, Any]]:
    """The blocks that the data of `content_block_start` and `content_block_delta` events make, in order.

    Args:
        whole: they go back to the API, so nothing may be missing from them.

    Raises:
        ProviderError: a piece of a `whole` answer is of a kind that cannot be put together.
    """
    blocks: dict[Any, dict[str, Any]] = {}
    inputs: dict[Any, str] = {}
    for data in events:
        event, _ = decode_json(data, _ANY)
        index = event.get("index")
        if event["type"] == "content_block_start":
            blocks[index] = dict(event.get("content_block") or {})
            continue
        delta, block = event.get("delta") or {}, blocks.setdefault(index, {"type": "text", "text": ""})
        kind = delta.get("type")
        if kind in _APPENDED:
            field = _APPENDED[kind]
            block[field] = (block.get(field) or "") + (delta.get(field) or "")
        elif kind == "input_json_delta":
            inputs[index] = inputs.get(index, "") + (delta.get("partial_json") or "")
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or ()), delta.get("citation")]
        elif whole:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR,
                f"the answer was paused (pause_turn) and cannot go on: it holds a piece of an unknown kind, {kind}",
            )
    for index, text in inputs.items():
        if text:
            blocks[index]["input"] = _input(text, whole=whole)
    cleaned: list[dict[str, Any]] = _ANY.decode(encode_clean(list(blocks.values())))
    return cleaned


def _input(text: str, *, whole: bool) -> Any:
    """A tool's input. An answer that was cut may end within it: then its text is all that there is."""
    try:
        return _ANY.decode(text)
    except msgspec.DecodeError as fault:
        if not whole:
            return {"partial_json": text}
        raise ProviderError(
            FailureClass.PROVIDER_ERROR,
            f"the answer was paused (pause_turn) and cannot go on: the input of a tool is no JSON: {fault}",
        ) from None


class AnthropicProvider(HttpProvider):
    """The Messages API.

    `input_tokens` are those that were neither read from nor written to the cache, as this API counts and as all
    providers of KSI report. Thinking is a part of `output_tokens`. An answer that the API pauses (`pause_turn`) is
    continued here. The base URL may end with `/v1`.
    """

    own_path = "v1/messages"

    def __init__(self, setting: Setting, options: Options, timeouts: Timeouts | None = None) -> None:
        """See HttpProvider."""
        self._options = options
        super().__init__(setting, options, timeouts)
        self.capabilities = msgspec.structs.replace(self.capabilities, dialect="anthropic", features=_FEATURES)
        self._version = "" if self._endpoint.path.endswith("/v1") else "v1/"

    def own_headers(self, key: str | None) -> dict[str, str]:
        """See HttpProvider."""
        return {"anthropic-version": self._options.version, **({"x-api-key": key} if key else {})}

    @property
    def login_path(self) -> str:
        """See HttpProvider."""
        return f"{self._version}models"

    def complete(self, call: Call) -> AsyncGenerator[Piece | Frame | Completion, None]:
        """See the protocol."""
        body = messages_body(call, self._options)
        native = call.native is not None
        return self._endpoint.complete(
            self._endpoint.url(f"{self._version}messages"),
            body,
            _Messages(call.model, body, native=native),
            pieces=call.stream,
            frames=native and call.stream,
            headers=headers_of(call),
        )


def build(setting: Setting, options: Options) -> AnthropicProvider:
    """The provider for a configuration."""
    return AnthropicProvider(setting, options)
