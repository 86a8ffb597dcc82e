"""Undoes one layer of escapes of one kind, remembering where each character stood."""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections.abc import Callable
from html.entities import html5

import msgspec

_BARE = "|".join(sorted((name for name in html5 if not name.endswith(";")), key=len, reverse=True))
_HEX = re.compile(r"[0-9a-fA-F]+")
_CONTROLS = dict(zip("0ntrbfv", "\0\n\t\r\b\f\v", strict=True))


class WayBack(msgspec.Struct, frozen=True):
    """From places in a text to places in the text that it was made of, by undoing escapes."""

    starts: tuple[int, ...]
    """Where each undone escape stands now ..."""
    lengths: tuple[int, ...]
    """... how long it is now ..."""
    spans: tuple[tuple[int, int], ...]
    """... and where it stood before."""

    def before(self, place: int) -> tuple[int, int]:
        """What the character at `place` was before: a start and an end."""
        number = bisect_right(self.starts, place) - 1
        # Of two that stand in one place the first is empty now.
        if number < 0:
            return place, place + 1
        offset = place - self.starts[number]
        start, end = self.spans[number]
        if offset < self.lengths[number]:
            return start, end
        old = end + offset - self.lengths[number]
        return old, old + 1


class Kind(msgspec.Struct, frozen=True):
    """One way of escaping."""

    hint: str
    """A character that every such escape has, or nothing."""
    pattern: re.Pattern[str]
    plain: Callable[[str], str | None]
    """What one escape stands for; None where it is none."""

    def undo(self, text: str) -> tuple[str, WayBack] | None:
        """The text with one layer of this kind undone; None where there is nothing to undo."""
        if self.hint and self.hint not in text:
            return None
        parts: list[str] = []
        starts: list[int] = []
        lengths: list[int] = []
        spans: list[tuple[int, int]] = []
        done = length = 0
        for found in self.pattern.finditer(text):
            plain = self.plain(found[0])
            if plain is None:
                continue
            kept = text[done : found.start()]
            length += len(kept)
            parts += (kept, plain)
            starts.append(length)
            lengths.append(len(plain))
            spans.append(found.span())
            length += len(plain)
            done = found.end()
        if not spans:
            return None
        parts.append(text[done:])
        return "".join(parts), WayBack(tuple(starts), tuple(lengths), tuple(spans))


def _entity(escape: str) -> str | None:
    if escape[1] == "#":
        # However many zeros: Python reads no number of thousands of digits.
        base = 16 if escape[2] in "xX" else 10
        digits = escape[3 if base == 16 else 2 :].rstrip(";").lstrip("0")
        escape = f"&#{int(digits[:12] or '0', base)};"
    plain = html.unescape(escape)
    return plain if plain != escape else None


def _percent(escape: str) -> str | None:
    try:
        return bytes.fromhex(escape.replace("%", "")).decode()
    except UnicodeDecodeError:
        return None


def _backslash(escape: str) -> str | None:
    code = escape.replace("\\", " ").strip()
    if code[0] in "uUx":
        numbers = [int(digits, 16) for part in code.split() for digits in _HEX.findall(part[1:])]
        if len(numbers) == 2:
            return chr(0x10000 + ((numbers[0] - 0xD800) << 10) + numbers[1] - 0xDC00)
        return chr(numbers[0]) if numbers[0] < 0x110000 else None
    if code in _CONTROLS:
        return _CONTROLS[code]
    return chr(int(code, 8)) if code.isdigit() else code


def _tag(escape: str) -> str:
    return chr(ord(escape) - 0xE0000)


def _nothing(_escape: str) -> str:
    return ""


_TAGS = re.compile(r"[\U000E0020-\U000E007E]")

KINDS: tuple[Kind, ...] = (
    Kind(
        "&",
        re.compile(r"&(?:\#[0-9]+|\#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]{1,31}(?=;)|(?:" + _BARE + r"));?"),
        _entity,
    ),
    Kind(
        "%",
        re.compile(
            r"%[0-7][0-9a-fA-F]"
            r"|%[cCdD][0-9a-fA-F]%[89abAB][0-9a-fA-F]"
            r"|%[eE][0-9a-fA-F](?:%[89abAB][0-9a-fA-F]){2}"
            r"|%[fF][0-7](?:%[89abAB][0-9a-fA-F]){3}"
        ),
        _percent,
    ),
    Kind(
        "\\",
        re.compile(
            r"(?<!\\)\\+(?:u[dD][89abAB][0-9a-fA-F]{2}\\+u[dD][c-fC-F][0-9a-fA-F]{2}"
            r"|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{2,3}|[0ntrbfv/<>-])"
        ),
        _backslash,
    ),
    # Unicode's invisible copies of ASCII: letters for some models, nothing for the eye.
    Kind("", _TAGS, _tag),
    Kind("", _TAGS, _nothing),
)
"""All that are looked through: entities, percent codes, backslash codes, tag characters."""
