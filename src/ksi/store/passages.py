"""Long text that several deliveries and prompts have in common: cut out of them, and put back."""

from __future__ import annotations

import msgspec

LEAST = 1_024
"""Minimum length in characters of a text that is kept once: a shorter one costs less than a reference to it."""


class Passage(msgspec.Struct, frozen=True):
    """A text, and how it stands within a JSON string."""

    text: str
    data: bytes

    @classmethod
    def of(cls, text: str) -> Passage:
        """The passage of a text."""
        return cls(text, msgspec.json.encode(text)[1:-1])

    @classmethod
    def kept(cls, data: bytes) -> Passage:
        """The passage that was kept as `data`."""
        return cls(msgspec.json.decode(b'"%s"' % data, type=str), data)


def cut(text: str, passage: str) -> tuple[str, int | None]:
    """A text without a passage in it, and the passage's place; None if the text does not contain it."""
    place = text.find(passage)
    return (text, None) if place < 0 else (text[:place] + text[place + len(passage) :], place)


def cut_bytes(data: bytes, passage: bytes) -> tuple[bytes, int | None]:
    """The same of bytes."""
    place = data.find(passage)
    return (data, None) if place < 0 else (data[:place] + data[place + len(passage) :], place)


def put_back(text: str, place: int, passage: str) -> str:
    """The passage."""
    return f"{text[:place]}{passage}{text[place:]}"


def put_back_bytes(data: bytes, place: int, passage: bytes) -> bytes:
    """The same of bytes."""
    return b"".join((data[:place], passage, data[place:]))
