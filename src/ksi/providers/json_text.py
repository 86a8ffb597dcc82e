"""JSON and text as endpoints really send them: stray bytes, halves of characters, control characters inside strings.

A character can be torn over two events, as bytes of UTF-8 or as the two halves of a UTF-16 pair. `TextJoiner` puts it
together again. A half that never finds the other becomes U+FFFD, and the rest of the answer stands.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")

_ANY = msgspec.json.Decoder()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_STRAY_BYTES = re.compile("[\udc80-\udcff]+")
"""Bytes that are no UTF-8, as the error handler `surrogateescape` writes them."""
_EVERY_STRAY_BYTE = "".join(map(chr, range(0xDC80, 0xDD00)))


def decode_json(data: bytes, decoder: msgspec.json.Decoder[_T]) -> tuple[_T, bool]:
    """The value of a JSON text, and True if the text was clean.

    A text that was not clean is read all the same; its strings can then hold lone surrogates, which stand for stray
    bytes and halves of characters (see `TextJoiner`).

    Raises:
        msgspec.DecodeError: it is no JSON, or not of the decoder's type.
    """
    try:
        return decoder.decode(data), True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        try:
            text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
            value = json.loads(text.strip(), strict=False)
        except (ValueError, RecursionError):
            raise msgspec.DecodeError(str(fault)) from None
        return msgspec.convert(value, decoder.type, strict=False), False


def is_json(data: bytes) -> bool:
    """Return True if the bytes are one whole JSON value."""
    try:
        decode_json(data, _ANY)
    except msgspec.DecodeError:
        return False
    return True


def encode_clean(value: Any) -> bytes:
    """A value from an unclean text as clean JSON, with U+FFFD in the place of lone halves."""
    return msgspec.json.encode(json.loads(_SURROGATES.sub("\ufffd", json.dumps(value, ensure_ascii=False))))


def repaired(text: str) -> str:
    """Text without lone surrogates: halves that belong together are joined, the others become U+FFFD."""
    return text if _SURROGATES.search(text) is None else _without_halves(_paired(text))


def _paired(text: str) -> str:
    """Two halves of UTF-16 that stand side by side as the character that they are."""
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)


def _without_halves(text: str) -> str:
    text = _STRAY_BYTES.sub(lambda run: _bytes(run[0]).decode("utf-8", "replace"), text)
    return _SURROGATES.sub("\ufffd", text)


def _bytes(run: str) -> bytes:
    return run.encode("utf-8", "surrogateescape")


def _unfinished(text: str) -> int:
    """How many characters at the end of a text are the beginning of one that is not whole."""
    if text and "\ud800" <= text[-1] <= "\udbff":
        return 1
    run = text[len(text.rstrip(_EVERY_STRAY_BYTE)) :]
    if not run:
        return 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(_bytes(run))
    return len(decoder.getstate()[0])


class TextJoiner:
    """Pieces of text in, whole characters out."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """The text that is whole now; an unfinished character at its end is kept for the next piece."""
        if not self._held and (text.isascii() or _SURROGATES.search(text) is None):
            return text
        text = _paired(self._held + text)
        whole = len(text) - _unfinished(text)
        self._held = text[whole:]
        return _without_halves(text[:whole])

    def rest(self) -> str:
        """Return the rest at the end: U+FFFD in the place of a character that was never finished."""
        held, self._held = self._held, ""
        return repaired(held)
