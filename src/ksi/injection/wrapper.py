"""The reminder around an injected text, and what keeps the text from leaving it (C4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ksi.injection.escapes import KINDS, Kind, WayBack
from ksi.injection.lookalikes import INVISIBLE, PAIR, SOLID, fold

OPENING = "<system-reminder>\n"
CLOSING = "\n</system-reminder>"
BETWEEN = "\n\n----\n\n"
"""What stands between several results in one reminder."""

MAX_READINGS = 48
"""Ways of undoing escapes that are looked at; a text that has more loses its escapes."""
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
        if text is None:
            return changes | {(start, start + 1): " " for kind in KINDS for start in _escapes(kind, value)}
        for place, mark in _brackets(fold(text)):
            changes[_origin(ways, place)] = mark
    return changes


def _escapes(kind: Kind, value: str) -> Iterator[int]:
    undone = kind.undo(value)
    return iter(()) if undone is None else (start for start, _ in undone[1].spans)


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
    if (bracket := folded.find("<", start, name)) >= 0:
        return bracket
    # The name's beginning: letters and what joins them, up to a bracket.
    place, letters = name, 0
    while place and letters <= _NAME_START and (folded[place - 1] in f"-{INVISIBLE}" or _WORD.match(folded[place - 1])):
        letters += folded[place - 1] not in f"-{INVISIBLE}"
        place -= 1
    start = _back(folded, place, f"<>/ {INVISIBLE}")
    bracket = folded.find("<", start, place)
    return bracket if bracket >= 0 else None


def _back(folded: str, place: int, over: str) -> int:
    while place and folded[place - 1] in over:
        place -= 1
    return place


def _readings(value: str) -> Iterator[tuple[str | None, list[WayBack]]]:
    """The text as it stands, and with escapes undone, kind by kind and layer by layer in any order: who reads it may
    know one kind or all. None at the end where there are more than MAX_READINGS."""
    todo: list[tuple[str, list[WayBack]]] = [(value, [])]
    seen = {hash(value)}
    while todo:
        text, ways = todo.pop()
        yield text, ways
        for kind in KINDS:
            undone = kind.undo(text)
            if undone is None or hash(undone[0]) in seen:
                continue
            if len(seen) >= MAX_READINGS:
                yield None, []
                return
            seen.add(hash(undone[0]))
            todo.append((undone[0], [*ways, undone[1]]))


def _origin(ways: Sequence[WayBack], place: int) -> tuple[int, int]:
    """Where in the given text a character of a reading stood."""
    start, end = place, place + 1
    for way in reversed(ways):
        start, end = way.before(start)[0], way.before(end - 1)[1]
    return start, end
