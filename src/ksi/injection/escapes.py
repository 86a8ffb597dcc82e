"""Decodes nested escapes in a single pass; remembers the original place of each character."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from enum import IntFlag
from html.entities import html5
from itertools import accumulate, product

import msgspec

from ksi.injection.lookalikes import narrow, narrow_undone

_FRONT = 256
"""Characters behind an escape's first one that are kept at hand, at most ..."""
_REACH = 64
"""... and at least: no escape is longer, but for the zeros of a number."""
_BARE = 6
"""Letters of the longest entity that needs no semicolon."""

_FIRST = "[&%\x1b\x9b]|\\\\+|\\^(?=\\[)|\\[(?=[0-9;]{1,16}m)"
_INTRODUCERS = re.compile(_FIRST)
_CAREFUL_INTRODUCERS = re.compile(f"\x1b\\\\|{_FIRST}")
"""A backslash behind an ESC ends a terminal's code, and begins nothing."""
_ESC, _CSI, _END = "\x1b", "\x9b", "\x9c"
_COLOURED = "\U0010ffff"
"""The code of a colour that lost its ESC, or whose ESC is still to be read. In texts this character is left out."""
_CONTROLS = dict(zip("0ntrbfve", f"\0\n\t\r\b\f\v{_ESC}", strict=True))


class Doubt(IntFlag):
    """Why an escape may as well be meant as it stands."""

    NONE = 0
    LETTER = 1
    """A letter behind a backslash, as in `remi\\nder`: a line break or the letter n."""
    NUMBER = 2
    """A number may end before the digits or the semicolon that were escapes themselves."""
    NAME = 4
    """Its letters and digits may also be read as letters of the name, as in `sy&#57;em`."""


class WayBack(msgspec.Struct, frozen=True):
    """From places in a reading to places in the text that was read."""

    starts: tuple[int, ...]
    """The present place of each decoded escape ..."""
    lengths: tuple[int, ...]
    """... how long it is now ..."""
    spans: tuple[tuple[int, int], ...]
    """... and its original place."""
    kept: tuple[int, ...] | None = None
    """The place of each character before the invisible ones were left out; None if none was."""

    def before(self, place: int) -> tuple[int, int]:
        """The original start and end of the character at `place`."""
        start, end = self._undone(place)
        return (start, end) if self.kept is None else (self.kept[start], self.kept[end - 1] + 1)

    def _undone(self, place: int) -> tuple[int, int]:
        number = bisect_right(self.starts, place) - 1
        # If two are in one place, the first is empty now.
        if number < 0:
            return place, place + 1
        offset = place - self.starts[number]
        start, end = self.spans[number]
        if offset < self.lengths[number]:
            return start, end
        old = end + offset - self.lengths[number]
        return old, old + 1


class Reading(msgspec.Struct, frozen=True):
    """A text as one reader understands it."""

    text: str
    way: WayBack
    doubts: Doubt
    """The escapes that were met, decoded or left."""


def read(text: str, *, leave: Doubt, tags: bool) -> Reading | None:
    """The text with all escapes undone, nested ones too; None if there are none.

    Args:
        leave: escapes of such doubt are left as they stand.
        tags: read Unicode's invisible copies of ASCII as the letters; else they are left out like all that is
            invisible.
    """
    plain, kept = narrow(text, tags=tags)
    introducers = _CAREFUL_INTRODUCERS if leave else _INTRODUCERS
    places = [(found.start(), found.end()) for found in introducers.finditer(plain)]
    if not places:
        return None if kept is None and plain == text else Reading(plain, WayBack((), (), (), kept), Doubt.NONE)
    suffix = _Suffix()
    end = len(plain)
    doubts = Doubt.LETTER if _ESC + "\\" in plain else Doubt.NONE
    for start, after in reversed(places):
        suffix.put(plain[after:end], after, end)
        end = start
        first = plain[start]
        if plain[start:after] == f"{_ESC}\\":
            # The backslash that ends a terminal's code may be an escape itself; one of several is none.
            if plain[after : after + 1] == "\\" or suffix.front().startswith(f"e{_COLOURED}"):
                suffix.put("\\", start + 1, after)
            else:
                _undo("\\", start + 1, after, suffix, leave=leave, tags=tags)
            doubts |= _undo(first, start, start + 1, suffix, leave=leave, tags=tags)
        else:
            doubts |= _undo(first, start, after, suffix, leave=leave, tags=tags)
    suffix.put(plain[:end], 0, end)
    return suffix.reading(kept, doubts)


class _Suffix:
    """The end of a text, read already. It grows at its front, and the front is taken away again by escapes."""

    def __init__(self) -> None:
        self._pieces: list[tuple[str, int, int, int]] = []
        """Text, start and end in the original, `slashed`; the nearest last. An undone escape is a piece of its own."""
        self._front = ""

    def put(self, text: str, start: int, end: int, *, slashed: int = 0) -> None:
        if text or end > start:
            self._pieces.append((text, start, end, slashed))
            self._front = (text[:_FRONT] + self._front)[:_FRONT]

    @property
    def slashed(self) -> int:
        """The number of nested escapes if it begins with a character after a backslash; otherwise 0."""
        return self._pieces[-1][3] if self._pieces else 0

    def front(self) -> str:
        """At least the next `_REACH` characters, if there are so many."""
        if len(self._front) < _REACH:
            self._front = self._ahead(_FRONT)
        return self._front

    def zeros(self, behind: int) -> int:
        """How many zeros stand behind the first `behind` characters."""
        ahead = _FRONT
        while True:
            text = self._ahead(ahead)
            rest = text[behind:].lstrip("0")
            if rest or len(text) < ahead:
                return len(text) - behind - len(rest)
            ahead *= 2

    def _ahead(self, size: int) -> str:
        parts: list[str] = []
        for text, *_ in reversed(self._pieces):
            parts.append(text[:size])
            size -= len(text)
            if size <= 0:
                break
        return "".join(parts)

    def raw(self, count: int) -> int:
        """How many of the next `count` characters stand there as they were written, before the first undone one."""
        found = 0
        for text, start, end, _ in reversed(self._pieces):
            if len(text) != end - start:
                break
            found += len(text)
            if found >= count:
                return count
        return found

    def take(self, count: int) -> int:
        """Remove this many characters; returns their end in the original."""
        self._front = self._front[count:]
        place = 0
        while count > 0:
            text, start, end, _ = self._pieces.pop()
            if len(text) <= count:
                count -= len(text)
                place = end
                continue
            # If a decoded escape stands for two characters, the second keeps the whole of its place.
            place = start + count if len(text) == end - start else end
            self._pieces.append((text[count:], place if len(text) == end - start else start, end, 0))
            count = 0
        return place

    def reading(self, kept: tuple[int, ...] | None, doubts: Doubt) -> Reading:
        pieces = self._pieces[::-1]
        places = accumulate((len(text) for text, *_ in pieces), initial=0)
        undone = [(place, p) for place, p in zip(places, pieces, strict=False) if len(p[0]) != p[2] - p[1]]
        way = WayBack(
            tuple(place for place, _ in undone),
            tuple(len(text) for _, (text, *_) in undone),
            tuple((start, end) for _, (_, start, end, _) in undone),
            kept,
        )
        return Reading("".join(text for text, *_ in pieces), way, doubts)


def _undo(first: str, start: int, after: int, suffix: _Suffix, *, leave: Doubt, tags: bool) -> Doubt:
    """Prepend the meaning of an escape that begins with `first` to the suffix, or `first` itself.

    The meaning of an escape can begin another one. Returns the doubts that were met.
    """
    before, character, depth, doubts, end = "", first, 0, Doubt.NONE, after
    while (kind := _KINDS.get(character)) is not None:
        if character == "\\" and depth and suffix.slashed == depth + 1:
            # Of two backslashes the first may only belong to the second.
            doubts |= Doubt.LETTER
            if leave & Doubt.LETTER:
                character = ""
                break
        length, plain, doubt = _begins(character, kind, suffix, leave)
        doubts |= doubt
        if not length:
            break
        end = max(end, suffix.take(length))
        if character == "\\" and not depth:
            plain, last, doubt = _behind_another(plain, after - start - 1, suffix, leave=leave)
            doubts, end = doubts | doubt, max(end, last)
        before, depth = character, depth + 1
        character = plain if plain == _COLOURED and before == "[" else narrow_undone(_joined(plain, suffix), tags=tags)
        if len(character) != 1:
            break
    if depth:
        suffix.put(character, start, end, slashed=depth if before == "\\" else 0)
    else:
        suffix.put(first * (after - start), start, after)
    return doubts


def _begins(character: str, kind: _Kind, suffix: _Suffix, leave: Doubt) -> tuple[int, str, Doubt]:
    """The length of the escape that begins before the suffix, its meaning, and the doubts; no length if it is none, or
    is left."""
    front = suffix.front()
    if character == "&" and (number := _ZEROS.match(front)) is not None:
        length, plain = _long_number(number, suffix, front)
    else:
        length, plain = kind(front)
    if not length:
        return 0, "", Doubt.NONE
    doubt = _doubt(character, front, length)
    if character == "&" and front[0] == "#" and (raw := suffix.raw(length)) < length:
        cut, shorter = kind(front[:raw])
        if cut and leave & Doubt.NUMBER:
            return cut, shorter, Doubt.NUMBER
        doubt |= Doubt.NUMBER if cut else Doubt.NONE
    return (0, "", doubt) if leave & doubt else (length, plain, doubt)


def _behind_another(plain: str, spare: int, suffix: _Suffix, *, leave: Doubt) -> tuple[str, int, Doubt]:
    """What the backslashes before an escape make of the character that it stands for: of `\\\\x{75}003c` a bracket.

    Returns it, the end of the last escape, and the doubt: the backslashes may have been doubled.
    """
    end, doubt, odd = 0, Doubt.NONE, spare % 2 == 0
    for _ in range(spare):
        front = plain + suffix.front()
        length, behind = _backslash(front)
        if not length or (length == 1 and behind == plain):
            break
        if (length == 1 and not (odd and front[:2] == f"e{_COLOURED}")) or plain.isdigit():
            doubt = Doubt.LETTER
            if leave & doubt:
                break
        end = max(end, suffix.take(length - 1))
        plain = behind
    return plain, end, doubt


def _joined(high: str, suffix: _Suffix) -> str:
    """Two halves of UTF-16 as the character that they are."""
    if "\ud800" <= high <= "\udbff":
        low = suffix.front()[:1]
        if "\udc00" <= low <= "\udfff":
            suffix.take(1)
            return chr(0x10000 + ((ord(high) - 0xD800) << 10) + ord(low) - 0xDC00)
    return high


# -- kinds: the number of characters of the escape after the first one, and its meaning ---------------------------

_NUMBER = re.compile(r"#(?:[xX]([0-9a-fA-F]{1,12})|([0-9]{1,12}));?")
_ZEROS = re.compile(r"#([xX]?)0{8}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{1,31};?")
_PERCENT = re.compile(
    r"[0-7][0-9a-fA-F]|[cCdD][0-9a-fA-F]%[89abAB][0-9a-fA-F]|[eE][0-9a-fA-F](?:%[89abAB][0-9a-fA-F]){2}"
    r"|[fF][0-7](?:%[89abAB][0-9a-fA-F]){3}|[uU]([0-9a-fA-F]{4})"
)
_BACKSLASH = re.compile(
    r"u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|[ux]\{([0-9a-fA-F]{1,8})\}"
    r"|(?:o\{([0-7]{1,8})\}|([0-7]{2,3}))|([0ntrbfve])|([/<>-])"
)
_TERMINAL = re.compile(
    r"\[[0-?]{0,40}[ -/]{0,4}[@-~]"  # CSI: colours, the cursor
    r"|[\]PX^_][^\x07\x1b\x9c]{0,62}[\x07\x9c]"  # OSC and other strings: titles, links
    r"|[ -.]{1,2}[0-;=?-~]|[0-;=?-OQ-WYZcno|}~]"  # character sets, the cursor
)
_SEQUENCE = re.compile(r"[0-?]{0,40}[ -/]{0,4}[@-~]")
_COLOUR = re.compile(r"[0-9;]{1,16}m")

_Kind = Callable[[str], tuple[int, str]]


def _character(number: int) -> str:
    return chr(number) if number < 0x110000 else "\ufffd"


def _entity(front: str) -> tuple[int, str]:
    number = _NUMBER.match(front)
    if number is not None:
        return number.end(), _character(int(number[1], 16) if number[1] else int(number[2]))
    name = _NAME.match(front)
    if name is None:
        return 0, ""
    if name[0].endswith(";") and name[0] in html5:
        return name.end(), html5[name[0]]
    for length in range(min(_BARE, len(name[0])), 1, -1):
        if name[0][:length] in html5:
            return length, html5[name[0][:length]]
    return 0, ""


def _long_number(number: re.Match[str], suffix: _Suffix, front: str) -> tuple[int, str]:
    """An entity with a number that begins with many zeros: Python reads no number of thousands of digits."""
    begin = 1 + len(number[1])
    zeros = suffix.zeros(begin)
    length, plain = _entity(front[:begin] + "0" + suffix._ahead(begin + zeros + _REACH)[begin + zeros :])
    return (length + zeros - 1, plain) if length else (0, "")


def _percent(front: str) -> tuple[int, str]:
    found = _PERCENT.match(front)
    if found is None:
        return 0, ""
    if found[1]:
        return found.end(), chr(int(found[1], 16))
    try:
        return found.end(), bytes.fromhex(found[0].replace("%", "")).decode()
    except UnicodeDecodeError:
        return 0, ""


def _backslash(front: str) -> tuple[int, str]:
    found = _BACKSLASH.match(front)
    if found is None:
        return 0, ""
    u, long, x, braces, o, octal, control, itself = found.groups()
    if hexadecimal := u or long or x or braces:
        return found.end(), _character(int(hexadecimal, 16))
    if o or octal:
        return found.end(), _character(int(o or octal, 8))
    return found.end(), _CONTROLS[control] if control else itself


def _terminal(front: str) -> tuple[int, str]:
    if front.startswith(_COLOURED):
        return 1, ""
    # The end of a string, which the string before it needs to be known as one.
    return (1, _END) if front.startswith("\\") else _left_out(_TERMINAL)(front)


def _colour(front: str) -> tuple[int, str]:
    found = _COLOUR.match(front)
    return (found.end(), _COLOURED) if found is not None else (0, "")


def _left_out(pattern: re.Pattern[str]) -> _Kind:
    def kind(front: str) -> tuple[int, str]:
        found = pattern.match(front)
        return (found.end(), "") if found is not None else (0, "")

    return kind


def _caret(front: str) -> tuple[int, str]:
    return (1, _ESC) if front.startswith("[") else (0, "")


_KINDS: dict[str, _Kind] = {
    "&": _entity,
    "%": _percent,
    "\\": _backslash,
    "^": _caret,
    "[": _colour,
    _ESC: _terminal,
    _CSI: _left_out(_SEQUENCE),
}

# -- doubt ------------------------------------------------------------------------------------------------------------

_LONGEST_DOUBT = 5
"""Letters of the longest escape that can be a part of the name as it stands."""
_SPELLINGS = [("s", "5"), "y", ("s", "5"), ("t", "7"), ("e", "3"), ("m", "rn"), "r", ("e", "3"), ("m", "rn")]
_SPELLINGS += [("i", "1", "l"), "n", "d", ("e", "3"), "r"]
_PARTS = frozenset(
    part
    for start in range(len(_SPELLINGS))
    for length in range(1, _LONGEST_DOUBT + 1)
    for part in map("".join, product(*_SPELLINGS[start : start + length]))
)


def _doubt(character: str, front: str, length: int) -> Doubt:
    """The reason why an escape may be literal: its letters are letters of the name, or it is only a backslash, which
    ends a terminal's code after an ESC. `\\e` before a colour is nothing but an ESC."""
    if character == "\\" and length == 1:
        return Doubt.NONE if front[:2] == f"e{_COLOURED}" else Doubt.LETTER
    letters = "".join(filter(str.isalnum, front[:length]))
    return Doubt.NAME if letters.lower() in _PARTS else Doubt.NONE
