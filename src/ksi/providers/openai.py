"""Any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec

from ksi.content.blocks import Block, as_blocks
from ksi.content.chat import write_features, write_messages
from ksi.content.features import Json
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
from ksi.providers.http.provider import HttpOptions, HttpProvider, headers_of
from ksi.providers.http.sse import DONE, HEARTBEATS, SseEvent
from ksi.providers.http.usage import chat_usage, later_report
from ksi.providers.json_text import TextJoiner, encode_clean, repaired

OPENAI_HOST = "api.openai.com"
OPENAI = f"https://{OPENAI_HOST}/v1"
"""The base URL of OpenAI itself."""

_ANY = msgspec.json.Decoder()
_FEATURES = frozenset(FEATURES) - {"document_urls", "files", "citations"}
"""Documents go along in this API; it fetches none, has files under ids of its own, and quotes none."""
_NO_INDEX = object()
_LOGIN_PATHS = {"openrouter.ai": "key"}
"""Endpoints that show their models without a key, so that another path has to test the key."""


class Options(HttpOptions, frozen=True, kw_only=True):
    """The configuration keys of kind `openai`, in addition to the common ones."""

    base_url: str = OPENAI
    """The address up to the version; `/chat/completions` is appended if it is missing."""
    api_key_env: str | None = None
    """The variable that holds the key. OpenAI's own endpoint reads `OPENAI_API_KEY` without it; others need none
    without it."""
    context_tokens: int = 128_000
    """The model's context; history is cut to it."""
    stream_usage: bool = True
    """Ask for usage at a stream's end (`stream_options`). Off for endpoints that reject the field: a streamed call's
    usage is unknown if they then report none."""
    max_tokens_field: str | None = None
    """The name of the answer's limit; without it `max_completion_tokens` at OpenAI and `max_tokens` elsewhere."""


def chat_body(call: Call, options: Options, *, openai: bool = False) -> dict[str, Any]:
    """The request's body; `openai`: for OpenAI's own endpoint.

    Later wins: `extra_body`, then the call's `provider_options`, then the call's own fields. So options can add fields
    and set those that the request left open, but not change the model, the messages, whether the answer is streamed, or
    a limit that the request set. A native request is not changed: only the model, the streaming flag, and the fields of
    the configuration and the options are set.
    """
    if call.native is not None:
        body: dict[str, Any] = {**call.native.body, **options.extra_body, **call.options}
        if call.max_tokens is not None:
            name = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
            body[name] = min(call.max_tokens, body.get(name) or call.max_tokens)
    else:
        body = {**options.extra_body, **call.options, **write_features(call.features)}
        body["messages"] = write_messages(call.messages, call.system)
        if call.max_tokens is not None:
            field = "max_completion_tokens" if openai else "max_tokens"
            body[options.max_tokens_field or field] = call.max_tokens
        if call.temperature is not None:
            body["temperature"] = call.temperature
        if call.stop:
            body["stop"] = list(call.stop)
    body["model"] = call.model
    body["stream"] = options.streaming.wanted(call.stream)
    asked = body.pop("stream_options", None)
    if body["stream"] and options.stream_usage:
        body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
    return body


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(content: Any, kind: str = "text") -> str:
    """The text of a message's content; with `kind` refusal, its words that decline."""
    if isinstance(content, str):
        return content if kind == "text" else ""
    parts = (part.get(kind) for part in _objects(content) if part.get("type", "text") in (kind, f"output_{kind}"))
    return "".join(part for part in parts if isinstance(part, str))


def _refusal(said: dict[str, Any]) -> str:
    refusal = said.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else _text(said.get("content"), "refusal")


def _reasons(said: dict[str, Any]) -> bool:
    """Return True if a message or a piece of one holds reasoning, under any of the names for it."""
    return any(said.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details", "thinking")) or any(
        part.get("type") in ("thinking", "reasoning") for part in _objects(said.get("content"))
    )


def _thinking(said: dict[str, Any]) -> str:
    """The words of the reasoning in a message or a piece of one."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(said.get(name), str):
            return str(said[name])
    return ""


class _Calls:
    """The calls of tools in an answer, put together from a whole message or from pieces."""

    def __init__(self) -> None:
        self._calls: dict[Any, ToolPiece] = {}
        self._last: Any = None

    def add(self, said: dict[str, Any]) -> Sequence[ToolPiece]:
        """Take a message or a piece of one in; gives the pieces of calls that it brought."""
        pieces = [self._add(place, call) for place, call in enumerate(_objects(said.get("tool_calls")))]
        if function := as_object(said.get("function_call")):
            pieces.append(self._add("function_call", {"function": function}))
        return pieces

    def _add(self, place: Any, call: dict[str, Any]) -> ToolPiece:
        """Some endpoints give no index with the later pieces of a call; one with another id is another call."""
        function = as_object(call.get("function")) or as_object(call.get("custom")) or call
        index = call.get("index", place)
        known = self._calls.get(index)
        call_id, name = call.get("id"), function.get("name")
        if known is not None and call_id and known.id and call_id != known.id:
            index = (index, call_id)
            known = self._calls.get(index)
        elif known is not None and name and not call_id and _is_whole(known.json):
            index, known = (index, len(self._calls)), None
        elif known is not None and not call_id and self._last in self._calls and isinstance(self._last, tuple):
            index, known = self._last, self._calls[self._last]
        self._last = index
        added = function.get("arguments", function.get("input"))
        text = added if isinstance(added, str) else "" if added is None else msgspec.json.encode(added).decode()
        if known is None:
            known = ToolPiece(str(call_id or f"call_{len(self._calls)}"), str(name or ""))
        self._calls[index] = ToolPiece(known.id, known.name or str(name or ""), known.json + text)
        return ToolPiece(known.id, self._calls[index].name, text)

    def blocks(self) -> list[Block]:
        """The calls as blocks, in order."""
        return [
            {"type": "tool_use", "id": c.id, "name": c.name, "input": _arguments(c.json)} for c in self._calls.values()
        ]


def _is_whole(text: str) -> bool:
    """True if a call's input is complete, so that a name after it begins another call."""
    try:
        return isinstance(_ANY.decode(text), dict)
    except msgspec.DecodeError:
        return False


def _arguments(text: str) -> Json:
    """A call's input. A model may write invalid JSON: then only its text is kept."""
    try:
        value = _ANY.decode(text) if text.strip() else {}
    except msgspec.DecodeError:
        return {"partial_json": text}
    return value if isinstance(value, dict) else {"value": value}


def _content(text: str, thinking: str, calls: _Calls) -> tuple[Block, ...]:
    """An answer's blocks, if they are more than its text."""
    blocks = calls.blocks()
    if not blocks and not thinking:
        return ()
    thought: list[Block] = [{"type": "thinking", "thinking": thinking, "signature": ""}] if thinking else []
    return (*thought, *as_blocks(text), *blocks)


def _stop_reason(choice: dict[str, Any]) -> str | None:
    """Why a choice ended. A gateway can hide a refusal behind a plain end, and name it in another field."""
    native = stop_reason(choice.get("native_finish_reason"))
    if native in (StopReason.REFUSAL, StopReason.CONTENT_FILTER):
        return native
    return stop_reason(choice.get("finish_reason") or choice.get("finishReason"))


def _check(choice: dict[str, Any]) -> None:
    """Raise the error that a gateway put into a choice."""
    if isinstance(choice.get("error"), dict):
        raise ReportedError(encode_clean({"error": choice["error"]}))


class _Chat:
    """The dialect of one call. Only the fields that an answer needs are checked; the others may be anything."""

    def __init__(self, model: str, *, native: bool) -> None:
        self._asked = model
        self._native = native

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
        calls = _Calls()
        calls.add(said)
        text = repaired(_text(said.get("content")))
        return completed(
            Answer(
                text=text,
                model=model_of(value, self._asked),
                usage=chat_usage(value.get("usage"), value.get("service_tier")),
                stop_reason=_stop_reason(choice),
                refusal=repaired(_refusal(said)),
                content=_content(text, repaired(_thinking(said)), calls),
                native=self._native,
                reasoned=_reasons(said),
                raw=data if clean else encode_clean(value),
            )
        )

    def reply(self) -> _ChatReply:
        """See Dialect."""
        return _ChatReply(self._asked, native=self._native)


class _ChatReply:
    """A streamed answer. It is whole when `[DONE]` came, or some time after a finish reason, or when the body ended in
    order behind one.

    Some endpoints give a finish reason with every piece: if text follows one, it is no end.
    """

    def __init__(self, model: str, *, native: bool) -> None:
        self.done = False
        self.ended = False
        self._model = model
        self._native = native
        self._index: Any = _NO_INDEX
        self._joiner = TextJoiner()
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._thoughts: list[str] = []
        self._calls = _Calls()
        self._reasoned = False
        self._in_deltas = False
        self._ends_often = False
        self._stop_reason: str | None = None
        self._usage: Any = None
        self._tier: Any = None
        self._odd = ""

    def feed(self, event: SseEvent) -> Sequence[Piece] | None:
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
        pieces = [piece for choice in choices if self._is_ours(choice) for piece in self._choice(choice)]
        if self.ended and any(isinstance(piece, Chunk) for piece in pieces):
            self._ends_often = True
        self.ended = self._stop_reason is not None and not self._ends_often
        return pieces if choices or value.get("usage") else None

    def _is_ours(self, choice: dict[str, Any]) -> bool:
        """If there are several choices, the first to arrive is used."""
        index = choice.get("index")
        if self._index is _NO_INDEX:
            self._index = index
        return index is None or self._index in (None, index)

    def _choice(self, choice: dict[str, Any]) -> Iterator[Piece]:
        """Process a piece of the answer, and return its contents. Some endpoints call it a message, and some send the
        whole message once more at the end."""
        _check(choice)
        delta = choice.get("delta")
        self._in_deltas = self._in_deltas or bool(delta)
        said = as_object(delta) if self._in_deltas else as_object(choice.get("message"))
        self._stop_reason = _stop_reason(choice) or self._stop_reason
        self._refusals.append(_refusal(said))
        self._reasoned = self._reasoned or _reasons(said)
        if thought := _thinking(said):
            self._thoughts.append(thought)
            yield Thought(repaired(thought))
        if text := _text(said.get("content")):
            yield self._said(self._joiner.add(text))
        yield from self._calls.add(said)

    def _said(self, text: str) -> Chunk:
        self._texts.append(text)
        return Chunk(text)

    def rest(self) -> Sequence[Piece]:
        """See Reply."""
        text = self._joiner.rest()
        return (self._said(text),) if text else ()

    def finish(self) -> Completion:
        """See Reply."""
        if not self.done and self._stop_reason is None:
            if self._index is _NO_INDEX and self._odd:
                raise ProviderError(FailureClass.PROVIDER_ERROR, f"the stream holds no chat completion: {self._odd}")
            raise ProviderError(FailureClass.NETWORK_ERROR, "the stream ended in the middle of the answer")
        text = "".join(self._texts)
        return completed(
            Answer(
                text=text,
                model=self._model,
                usage=chat_usage(self._usage, self._tier),
                stop_reason=self._stop_reason,
                refusal=repaired("".join(self._refusals)),
                content=_content(text, repaired("".join(self._thoughts)), self._calls),
                native=self._native,
                reasoned=self._reasoned,
            )
        )


class OpenAIProvider(HttpProvider):
    """Chat completions at any compatible endpoint: OpenAI, vLLM, llama.cpp, Ollama, OpenRouter and others.

    This API counts cached tokens within `prompt_tokens`; here `input_tokens` leaves them out, as all providers of KSI
    do, so that input and cache can be added. `reasoning_tokens` are a part of `output_tokens`. If there are several
    choices, the first is used.
    """

    own_path = "chat/completions"

    def __init__(self, setting: Setting, options: Options, timeouts: Timeouts | None = None) -> None:
        """OpenAI's own endpoint reads OPENAI_API_KEY unless `api_key_env` names another variable."""
        if options.api_key_env is None and options.base_url == OPENAI:
            options = msgspec.structs.replace(options, api_key_env="OPENAI_API_KEY")
        super().__init__(setting, options, timeouts)
        self._options = options
        features = _FEATURES - {"top_k"} if self._endpoint.host == OPENAI_HOST else _FEATURES
        self.capabilities = msgspec.structs.replace(self.capabilities, dialect="chat", features=features)

    def own_headers(self, key: str | None) -> dict[str, str]:
        """See HttpProvider."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    @property
    def login_path(self) -> str:
        """See HttpProvider."""
        return _LOGIN_PATHS.get(self._endpoint.host or "", "models")

    def complete(self, call: Call) -> AsyncGenerator[Piece | Frame | Completion, None]:
        """See the protocol."""
        native = call.native is not None
        return self._endpoint.complete(
            self._endpoint.url(self.own_path),
            chat_body(call, self._options, openai=self._endpoint.host == OPENAI_HOST),
            _Chat(call.model, native=native),
            pieces=call.stream,
            frames=native and call.stream,
            headers=headers_of(call),
        )


def build(setting: Setting, options: Options) -> OpenAIProvider:
    """The provider for a configuration."""
    return OpenAIProvider(setting, options)
