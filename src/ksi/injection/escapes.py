"""Undoes one layer of escapes (entities, percent codes, backslash codes), remembering where each character stood."""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from html.entities import html5

import msgspec

_BARE = "|".join(sorted((name for name in html5 if not name.endswith(";")), key=len, reverse=True))
_ESCAPE = re.compile(
    # A run of escaped escapes is one layer, however deep: &amp;amp;lt; %252525 \\\\u003c.
    r"&(?P<again>(?:amp;|\#0*38;|\#[xX]0*26;)+)"
    r"|&(?:\#[0-9]{1,9}|\#[xX][0-9a-fA-F]{1,8}|[A-Za-z][A-Za-z0-9]{1,31}(?=;)|(?:" + _BARE + r"));?"
    r"|%(?P<percent>(?:25)+)(?=[0-9a-fA-F]{2})"
    r"|%[0-7][0-9a-fA-F]"
    r"|%[cCdD][0-9a-fA-F]%[89abAB][0-9a-fA-F]"
    r"|%[eE][0-9a-fA-F](?:%[89abAB][0-9a-fA-F]){2}"
    r"|%[fF][0-7](?:%[89abAB][0-9a-fA-F]){3}"
    r"|(?<!\\)\\+(?:u[dD][89abAB][0-9a-fA-F]{2}\\+u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{2,3}|[0ntrbfv/<>-])"
    r"|[\U000E0020-\U000E007E]"
)
_HINT = re.compile(r"[&%\\\U000E0020-\U000E007E]")
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
        if number < 0:
            return place, place + 1
        offset = place - self.starts[number]
        start, end = self.spans[number]
        if offset < self.lengths[number]:
            return start, end
        old = end + offset - self.lengths[number]
        return old, old + 1


def undo(text: str) -> tuple[str, WayBack] | None:
    """The text with one layer undone; None where there is nothing to undo."""
    if _HINT.search(text) is None:
        return None
    parts: list[str] = []
    starts: list[int] = []
    lengths: list[int] = []
    spans: list[tuple[int, int]] = []
    done = length = 0
    for found in _ESCAPE.finditer(text):
        plain = _plain(found)
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


def _plain(found: re.Match[str]) -> str | None:
    """What one escape stands for; None where it is none."""
    escape = found[0]
    if found["again"]:
        return "&"
    if found["percent"]:
        return "%"
    if escape[0] == "&":
        plain = html.unescape(escape)
        return plain if plain != escape else None
    if escape[0] == "%":
        try:
            return bytes.fromhex(escape.replace("%", "")).decode()
        except UnicodeDecodeError:
            return None
    if escape[0] != "\\":
        return chr(ord(escape) - 0xE0000)
    return _backslash(escape.replace("\\", " ").strip())


def _backslash(code: str) -> str | None:
    """What stands behind a backslash: `u003c`, `x3c`, `74`, `n`, ..."""
    if code[0] in "uUx":
        numbers = [int(digits, 16) for part in code.split() for digits in _HEX.findall(part[1:])]
        if len(numbers) == 2:
            return chr(0x10000 + ((numbers[0] - 0xD800) << 10) + numbers[1] - 0xDC00)
        return chr(numbers[0]) if numbers[0] < 0x110000 else None
    if code in _CONTROLS:
        return _CONTROLS[code]
    return chr(int(code, 8)) if code.isdigit() else code
