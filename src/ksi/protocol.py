"""The wire, without I/O: lines in and out, the envelope, and checking an event's data against its type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast

import msgspec

from ksi.errors import LONGEST_QUOTE, InvalidData, InvalidEnvelope, InvalidJson, KsiError, PayloadTooLarge

MAX_LINE = 16 * 1024 * 1024
"""Bytes in one line, its newline not counted."""

MOST_WARNINGS = 20
"""About unknown fields, in one reply."""

T = TypeVar("T")


class Envelope(msgspec.Struct, frozen=True):
    """One event as it came: `data` is still plain JSON."""

    event: str
    data: dict[str, Any] = {}
    correlation_id: str | int | None = None
    replies: Literal["v1", "v2"] | None = None
    """The form in which this client wants replies and pushes; without it, the configured one."""


class LineReader:
    """Cuts a byte stream into lines, holding at most one line of `limit` bytes.

    A longer line is reported once and skipped to its end; the stream continues after it.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        # One buffer, so that a line which comes byte by byte takes no more than its length.
        self._begun = bytearray()
        self._skipping = False

    @property
    def held(self) -> int:
        """Bytes of a line whose end has not come."""
        return len(self._begun)

    def feed(self, data: bytes) -> Iterator[bytes | PayloadTooLarge]:
        """Lines that `data` completes, in order; a PayloadTooLarge in the place of one that is too long."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            line = data[start:end]
            start = end + 1
            if self._skipping:
                self._skipping = False
                continue
            if self._begun:
                self._begun += line
                line = self._take()
            if len(line) > self._limit:
                yield self._too_large()
            else:
                yield line
        if start < len(data) and not self._skipping:
            if len(self._begun) + len(data) - start > self._limit:
                self.skip()
                yield self._too_large()
            else:
                self._begun += data[start:]

    def skip(self) -> None:
        """Drop the unfinished line, including its coming rest."""
        self._begun = bytearray()
        self._skipping = True

    def finish(self) -> bytes | None:
        """The text after the last newline when the stream ended."""
        return self._take() or None

    def _take(self) -> bytes:
        line = bytes(self._begun)
        self._begun = bytearray()
        return line

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the line is longer than {self._limit} bytes; split the request or send less text", limit=self._limit
        )


_envelope_decoder = msgspec.json.Decoder(Envelope)
_encoder = msgspec.json.Encoder()


def decode_envelope(line: bytes) -> Envelope:
    """Read one line.

    Raises:
        InvalidJson: it is not JSON (bad UTF-8, numbers out of range and too deep nesting included).
        InvalidEnvelope: it is JSON, but `event` or `data` is missing or of the wrong type.
    """
    try:
        return _envelope_decoder.decode(line)
    except msgspec.ValidationError as error:
        reason, path = split_path(str(error))
        if "out of range" in reason:
            raise InvalidJson(f"not JSON: {reason}", path=path or None) from None
        raise InvalidEnvelope(
            f'an event is {{"event": "name", "data": {{...}}}}: {reason}', path=path or None
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJson(f"not JSON: {error}") from None
    except RecursionError:
        raise InvalidJson("not JSON that can be read: nested too deeply") from None


def encode(value: Any) -> bytes:
    """One message as JSON, without the newline."""
    return _encoder.encode(value)


class _Reply(msgspec.Struct, omit_defaults=True):
    event: str
    data: Any
    timestamp: float
    correlation_id: str | int | None = None


class _Refusal(msgspec.Struct, omit_defaults=True):
    event: str | None
    error: Any
    timestamp: float
    correlation_id: str | int | None = None


def encode_reply(event: str, data: Any, correlation_id: str | int | None, timestamp: float) -> bytes:
    """A reply or pushed event as one line."""
    return _encoder.encode(_Reply(event, data, timestamp, correlation_id)) + b"\n"


def encode_error(event: str | None, error: KsiError, correlation_id: str | int | None, timestamp: float) -> bytes:
    """An error answer as one line."""
    return _encoder.encode(_Refusal(event, error_body(error), timestamp, correlation_id)) + b"\n"


def error_body(error: KsiError) -> dict[str, Any]:
    """An error as it goes over the wire."""
    return {
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        "details": dict(error.details),
    }


def convert(data: dict[str, Any], into: type[T]) -> T:
    """Check an event's data against its type.

    Raises:
        InvalidData: with the field's path.
    """
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as error:
        reason, path = split_path(str(error))
        raise InvalidData(f"{path}: {reason}" if path else reason, path=path) from None


_LONGEST_REASON = 300
"""Maximum length of msgspec's own message, in characters."""


def split_path(message: str) -> tuple[str, str]:
    """A msgspec message as (reason, path): "Expected `int` - at `$.a[0]`" → ("Expected `int`", "a[0]")."""
    reason, _, tail = message.partition(" - at `$")
    if len(reason) > _LONGEST_REASON:
        # It repeats a value that was sent, and a value may hold quotes itself.
        reason = reason[:LONGEST_QUOTE] + "…"
    path = tail.rstrip("`").lstrip(".")
    # A missing field is named in the text only.
    if "missing required field `" in reason:
        missing = reason.rpartition("field `")[2].rstrip("`")
        path = f"{path}.{missing}" if path else missing
    return reason, path


@lru_cache(maxsize=256)
def field_names(of: type[msgspec.Struct]) -> frozenset[str]:
    """The wire names of a type's fields."""
    return frozenset(f.encode_name for f in msgspec.structs.fields(of))


@lru_cache(maxsize=256)
def inner_types(of: type[msgspec.Struct]) -> Mapping[str, type[msgspec.Struct]]:
    """The fields of a type whose values have fields themselves, and their types."""
    found = {}
    for field in cast(msgspec.inspect.StructType, msgspec.inspect.type_info(of)).fields:
        options = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        structs = [option.cls for option in options if isinstance(option, msgspec.inspect.StructType)]
        if len(structs) == 1:
            found[field.encode_name] = structs[0]
    return found


def unknown_fields(data: dict[str, Any], of: type[msgspec.Struct], place: str = "") -> list[str]:
    """A warning for each field that a type does not have, inner ones too, with a guess at the typo.

    `place` is the path of `data` in the whole, and precedes their names.
    """
    known = field_names(of)
    warnings: list[str] = []
    if not data.keys() <= known:
        for name in data:
            if name not in known:
                guess = nearest(name, known)
                shown = place + (name if len(name) <= 60 else name[:60] + "…")
                hint = f"; did you mean {guess!r}?" if guess else ""
                warnings.append(f"unknown field {shown!r} was ignored{hint}")
                if len(warnings) == MOST_WARNINGS:
                    return warnings
    for name, inner in inner_types(of).items():
        value = data.get(name)
        if isinstance(value, dict):
            warnings += unknown_fields(value, inner, f"{place}{name}.")
    return warnings[:MOST_WARNINGS]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one probably means."""
    found = difflib.get_close_matches(word[:100], sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None
