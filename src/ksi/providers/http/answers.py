"""The ends of answers in one vocabulary, and the decision if an end is an answer at all. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from ksi.content.blocks import Block
from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Completion, StopReason
from ksi.providers.faults import read_report
from ksi.providers.json_text import decode_json
from ksi.request import Usage

_STOP_REASONS: dict[str, StopReason] = {
    "stop": StopReason.END_TURN,
    "end_turn": StopReason.END_TURN,
    "eos": StopReason.END_TURN,
    "eos_token": StopReason.END_TURN,
    "complete": StopReason.END_TURN,
    "stop_sequence": StopReason.STOP_SEQUENCE,
    "length": StopReason.MAX_TOKENS,
    "max_tokens": StopReason.MAX_TOKENS,
    "max_output_tokens": StopReason.MAX_TOKENS,
    "tool_calls": StopReason.TOOL_USE,
    "tool_use": StopReason.TOOL_USE,
    "function_call": StopReason.TOOL_USE,
    "refusal": StopReason.REFUSAL,
    "content_filter": StopReason.CONTENT_FILTER,
    "content_filtered": StopReason.CONTENT_FILTER,
    "guardrail_intervened": StopReason.CONTENT_FILTER,
    "safety": StopReason.CONTENT_FILTER,
    "prohibited_content": StopReason.CONTENT_FILTER,
    "blocklist": StopReason.CONTENT_FILTER,
    "recitation": StopReason.CONTENT_FILTER,
    "spii": StopReason.CONTENT_FILTER,
    "sensitive": StopReason.CONTENT_FILTER,
    "model_context_window_exceeded": StopReason.CONTEXT_WINDOW,
    "context_window": StopReason.CONTEXT_WINDOW,
    "model_length": StopReason.CONTEXT_WINDOW,
    "pause_turn": StopReason.PAUSE_TURN,
}
"""The words of both dialects, and those that other endpoints use in them, in lower case."""
_BROKEN_OFF: dict[str, FailureClass] = {
    "error": FailureClass.PROVIDER_ERROR,
    "abort": FailureClass.PROVIDER_ERROR,
    "network_error": FailureClass.PROVIDER_ERROR,
    "insufficient_system_resource": FailureClass.OVERLOADED,
}
"""Reasons that tell that the endpoint gave up in the middle."""
_DECLINED = (StopReason.REFUSAL, StopReason.CONTENT_FILTER)
_ANY = msgspec.json.Decoder()
_CUT = (StopReason.MAX_TOKENS, StopReason.CONTEXT_WINDOW)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as its dialect read it, before it is judged."""

    text: str
    model: str
    usage: Usage | None = None
    cache_write_hour_tokens: int = 0
    stop_reason: str | None = None
    refusal: str = ""
    """The words in which the model, or a filter, declined."""
    content: tuple[Block, ...] = ()
    """Its blocks, if it is more than its text."""
    native: bool = False
    """True if it goes to a client that speaks its dialect, and validates it itself."""
    reasoned: bool = False
    """True if it holds reasoning."""
    raw: bytes | None = None


def stop_reason(word: Any) -> str | None:
    """An endpoint's reason in KSI's vocabulary: its own word if it is not known, None if it gave none."""
    if not isinstance(word, str) or not word:
        return None
    known = _STOP_REASONS.get(word.lower())
    return known.value if known is not None else word


def completed(answer: Answer) -> Completion:
    """The answer as a completion. A native one is passed on whatever it holds.

    Raises:
        ProviderError: it is none: declined (`refused`), broken off by the endpoint, or without text and calls of tools
            (`empty_answer`).
    """
    if not answer.native:
        _judge(answer)
    return Completion(
        text=answer.text,
        model=answer.model,
        content=answer.content,
        usage=answer.usage,
        cache_write_hour_tokens=answer.cache_write_hour_tokens,
        stop_reason=answer.stop_reason,
        raw=answer.raw,
    )


def _judge(answer: Answer) -> None:
    if answer.refusal or answer.stop_reason in _DECLINED:
        words = answer.refusal or answer.text.strip() or "it gave no reason"
        cause = f" ({answer.stop_reason})" if answer.stop_reason in _DECLINED else ""
        raise ProviderError(FailureClass.REFUSED, f"the model declined to answer{cause}: {words}")
    broken_off = _BROKEN_OFF.get((answer.stop_reason or "").lower())
    if broken_off is not None:
        raise ProviderError(broken_off, f"the endpoint broke off in the middle of the answer ({answer.stop_reason})")
    if not answer.text.strip() and not any(block.get("type") == "tool_use" for block in answer.content):
        raise ProviderError(FailureClass.EMPTY_ANSWER, _emptiness(answer))


def _emptiness(answer: Answer) -> str:
    reasoned = answer.reasoned or (answer.usage is not None and answer.usage.reasoning_tokens > 0)
    if answer.stop_reason in _CUT:
        if reasoned:
            return (
                f"the answer holds no text: reasoning used up its limit ({answer.stop_reason}); raise max_tokens, or "
                "ask for less reasoning"
            )
        return f"the answer holds no text: it ended at its limit ({answer.stop_reason}) before any; raise max_tokens"
    ended = f" (it ended with {answer.stop_reason})" if answer.stop_reason is not None else ""
    return f"the answer holds {'reasoning and no text' if reasoned else 'no text'}{ended}"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_object(data: bytes, kind: str) -> tuple[dict[str, Any], bool]:
    """The JSON object of an answer or an event, and whether its text was clean (see `decode_json`).

    Raises:
        ProviderError: it is none; `kind` names the expected form.
    """
    try:
        value, clean = decode_json(data, _ANY)
    except msgspec.DecodeError as fault:
        said = str(fault)
        if data.lstrip().startswith(b"<"):
            said = f"{read_report(data).message}; base_url may be wrong"
        raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no {kind}: {said}") from None
    if not isinstance(value, dict):
        raise ProviderError(FailureClass.PROVIDER_ERROR, f"the answer is no {kind}: it is no JSON object")
    return value, clean


def as_object(value: Any) -> dict[str, Any]:
    """A value that should be a JSON object; an empty one if it is something else."""
    return value if isinstance(value, dict) else {}


def model_of(answer: dict[str, Any], asked: str) -> str:
    """The model that answered, or the one that was asked if the answer does not say it."""
    model = answer.get("model")
    return model if isinstance(model, str) and model else asked
