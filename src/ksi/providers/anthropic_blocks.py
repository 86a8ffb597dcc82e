"""The content blocks of a streamed message, put together again so that they can go back to the API as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ksi.errors import FailureClass, ProviderError
from ksi.providers.json_text import decode_json, encode_clean

_ANY = msgspec.json.Decoder()
_APPENDED = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
"""Pieces whose text is put behind the text of a block's field."""


def streamed_blocks(events: Sequence[bytes]) -> list[dict[str, Any]]:
    """The blocks that the data of `content_block_start` and `content_block_delta` events make, in order.

    Raises:
        ProviderError: a piece is of a kind that cannot be put together.
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
        else:
            raise ProviderError(
                FailureClass.PROVIDER_ERROR,
                f"the answer was paused (pause_turn) and cannot go on: it holds a piece of an unknown kind, {kind}",
            )
    for index, text in inputs.items():
        if text:
            blocks[index]["input"] = _input(text)
    cleaned: list[dict[str, Any]] = _ANY.decode(encode_clean(list(blocks.values())))
    return cleaned


def _input(text: str) -> Any:
    try:
        return _ANY.decode(text)
    except msgspec.DecodeError as fault:
        raise ProviderError(
            FailureClass.PROVIDER_ERROR,
            f"the answer was paused (pause_turn) and cannot go on: the input of a tool is no JSON: {fault}",
        ) from None
