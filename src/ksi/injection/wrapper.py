"""The reminder around an injected text, and what keeps the text from leaving it (C4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ksi.injection.escapes import WayBack, undo
from ksi.injection.lookalikes import INVISIBLE, PAIR, SOLID, fold

OPENING = "<system-reminder>\n"
CLOSING = "\n</system-reminder>"
BETWEEN = "\n\n----\n\n"
"""What stands between several results in one reminder."""

MAX_LAYERS = 32
"""Layers of escapes that are looked through; what is escaped more often than that loses its escapes."""
_TAGS = re.compile("[\U000e0020-\U000e007e]")
"""Unicode's invisible copies of ASCII: noise for the eye, letters for some models. Both readings are looked at."""
_NAME_START = 40
"""Letters that may stand before the name in one word, as in `ns:system-reminder`."""
_ATTRIBUTES = 200
"""How far behind the name the tag's end is looked for."""

_NOISE = f"<>/,- {INVISIBLE}"
_WORD = re.compile(f"[a-z0-9{SOLID}]")


def _name() -> re.Pattern[str]:
    """`system-reminder` in a folded text, with anything that is no letter or digit between its letters."""
    noise = f"[{re.escape(_NOISE)}]*"
    st, within, mr = (re.escape(PAIR[character]) for character in "ﬆ㏌🅬")
    m = f"(?:m|r{noise}n)"
    parts = ["[s5]", "y", f"(?:[s5]{noise}[t7]|{st})", "[e3]", f"(?:{m}{noise}r|{mr})"]
    parts += ["[e3]", m, f"(?:[i1l]{noise}n|{within})", "d", "[e3]", "r"]
    return re.compile(noise.join(parts))


_NAME = _name()


def neutralise(value: str) -> str:
    """The text with no `<system-reminder>` tag in it, opening or closing, in any disguise; all else as it was.

    The brackets of what reads as such a tag become parentheses. Looked through are: case, spacing, punctuation, line
    breaks, invisible and combining characters between the letters, look-alikes of letters and brackets, entities,
    percent and backslash codes, one within the other.
    """
    while changes := _changes(value):
        value = _replaced(value, changes)
    return value


def wrap(body: str) -> str:
    """The body in one reminder. It is neutralised as a whole: values beside each other make no tag either."""
    return f"{OPENING}{neutralise(body)}{CLOSING}"


def join(reminders: Sequence[str]) -> str:
    """Several wrapped texts as one reminder, in order (C2, mode `next`)."""
    return wrap(BETWEEN.join(text.removeprefix(OPENING).removesuffix(CLOSING) for text in reminders))


def _replaced(value: str, changes: dict[tuple[int, int], str]) -> str:
    parts: list[str] = []
    done = 0
    for (start, end), mark in sorted(changes.items()):
        if start >= done:
            parts += (value[done:start], mark)
            done = end
    return "".join((*parts, value[done:]))


def _changes(value: str) -> dict[tuple[int, int], str]:
    """What has to become of which places, over all readings of the text."""
    changes: dict[tuple[int, int], str] = {}
    for text, ways in _readings(value):
        for place, mark in _brackets(fold(text)):
            changes[_origin(ways, place)] = mark
        if len(ways) > MAX_LAYERS and (more := undo(text)) is not None:
            changes |= {_origin(ways, start): " " for start, _ in more[1].spans}
    return changes


def _brackets(folded: str) -> Iterator[tuple[int, str]]:
    """The places of the brackets of each tag in a folded text."""
    if "<" not in folded:
        return
    for name in _NAME.finditer(folded):
        start = _opening(folded, name.start())
        if start is None:
            continue
        end = name.end()
        closing = folded.find(">", end, end + _ATTRIBUTES)
        if closing >= 0 and "<" not in folded[end:closing]:
            end = closing + 1
        for place in range(start, end):
            if folded[place] in "<>":
                yield place, "(" if folded[place] == "<" else ")"


def _opening(folded: str, name: int) -> int | None:
    """Where the tag begins whose name stands at `name`; None where no bracket is before it."""
    start = _back(folded, name, _NOISE)
    if "<" in folded[start:name]:
        return start
    # The name's beginning: letters and what joins them, up to a bracket.
    place, letters = name, 0
    while place and letters <= _NAME_START and (folded[place - 1] in f"-{INVISIBLE}" or _WORD.match(folded[place - 1])):
        letters += folded[place - 1] not in f"-{INVISIBLE}"
        place -= 1
    start = _back(folded, place, f"<>/ {INVISIBLE}")
    return start if "<" in folded[start:place] else None


def _back(folded: str, place: int, over: str) -> int:
    while place and folded[place - 1] in over:
        place -= 1
    return place


def _readings(value: str) -> Iterator[tuple[str, list[WayBack]]]:
    """The text as it stands, and with one, two, ... layers of escapes undone; the same without Unicode's tags."""
    yield from _deeper(value, [])
    if _TAGS.search(value):
        yield from _deeper(*_without_tags(value))


def _deeper(text: str, ways: list[WayBack]) -> Iterator[tuple[str, list[WayBack]]]:
    yield text, ways
    while len(ways) <= MAX_LAYERS and (layer := undo(text)) is not None:
        text, ways = layer[0], [*ways, layer[1]]
        yield text, ways


def _without_tags(value: str) -> tuple[str, list[WayBack]]:
    spans = tuple(tag.span() for tag in _TAGS.finditer(value))
    starts = tuple(start - number for number, (start, _) in enumerate(spans))
    return _TAGS.sub("", value), [WayBack(starts, (0,) * len(starts), spans)]


def _origin(ways: Sequence[WayBack], place: int) -> tuple[int, int]:
    """Where in the given text a character of a reading stood."""
    start, end = place, place + 1
    for way in reversed(ways):
        start, end = way.before(start)[0], way.before(end - 1)[1]
    return start, end
