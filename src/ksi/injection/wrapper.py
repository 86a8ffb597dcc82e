"""Wraps an injected text in a reminder, and keeps the text from breaking out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ksi.injection.escapes import Doubt, WayBack, read
from ksi.injection.lookalikes import INVISIBLE, PAIR, SOLID, fold

OPENING = "<system-reminder>\n"
CLOSING = "\n</system-reminder>"
BETWEEN = "\n\n----\n\n"
"""The separator of several results in one reminder."""

LONGEST_TAG = 4_096
"""Maximum length of a tag with its disguise, in characters; a longer one is not read as a tag."""
_WINDOW = 64 * 1024
"""Characters that are looked at in one go: no call lasts long, and memory is bounded."""
_ROUNDS = 4
"""Number of passes over a text after changes; then possible escapes are removed."""
_INTRODUCERS = dict.fromkeys(map(ord, "&%\\^\x1b\x9b"), " ")
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
_LEAVING = (Doubt.NONE, Doubt.LETTER, Doubt.LETTER | Doubt.NUMBER, Doubt.LETTER | Doubt.NUMBER | Doubt.NAME)
"""The literal escapes, reading by reading; a text without such doubts has one."""
_TAG_CHARACTERS = re.compile("[\U000e0020-\U000e007e]")


def neutralise(value: str) -> str:
    """The text without any `<system-reminder>` tag, opening or closing, in any disguise; all else stays as it was.

    The brackets of a text that reads as such a tag become parentheses. `docs/reference/reminders.md` lists the
    disguises. The work grows with the text's length and nothing else.
    """
    return _cleaned(value, [(0, len(value))])


def wrap(body: str, clean: Sequence[str] = ()) -> str:
    """The body in one reminder. It is neutralised as a whole: adjacent values make no tag either.

    `clean`: parts of the body that are neutralised already, in their order; only their edges are looked at again.
    """
    return f"{OPENING}{_cleaned(body, _unseen(body, clean))}{CLOSING}"


def join(reminders: Sequence[str]) -> str:
    """Several wrapped texts as one reminder, in order."""
    bodies = [text.removeprefix(OPENING).removesuffix(CLOSING) for text in reminders]
    return wrap(BETWEEN.join(bodies), bodies)


def _unseen(body: str, clean: Sequence[str]) -> list[tuple[int, int]]:
    """The parts of a body that were not looked at yet, with as much around them as a tag may take up."""
    spans: list[tuple[int, int]] = []
    begin = searched = 0
    for part in clean:
        if len(part) <= 2 * LONGEST_TAG or (place := body.find(part, searched)) < 0:
            continue
        spans.append((begin, place + LONGEST_TAG))
        searched = place + len(part)
        begin = searched - LONGEST_TAG
    return [*spans, (begin, len(body))]


def _cleaned(value: str, spans: Sequence[tuple[int, int]]) -> str:
    for _ in range(_ROUNDS):
        changes = _changes(value, spans)
        if not changes:
            return value
        value = _replaced(value, changes)
        spans = [(0, len(value))]
    value = value.translate(_INTRODUCERS)
    return _replaced(value, _changes(value, [(0, len(value))]))


def _replaced(value: str, changes: dict[tuple[int, int], str]) -> str:
    parts: list[str] = []
    done = 0
    for (start, end), mark in sorted(changes.items()):
        if start >= done:
            parts += (value[done:start], mark)
            done = end
    return "".join((*parts, value[done:]))


def _changes(value: str, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The places that have to become something else, over all readings of the text."""
    changes: dict[tuple[int, int], str] = {}
    for begin, end in spans:
        # A window begins before the last one ends: a tag is whole in one of them.
        for start in range(begin, max(begin + 1, end - LONGEST_TAG), _WINDOW):
            window = value[start : min(end, start + _WINDOW + LONGEST_TAG)]
            for text, way in _readings(window):
                for place, mark in _brackets(fold(text)):
                    first, last = (place, place + 1) if way is None else way.before(place)
                    changes[start + first, start + last] = mark
    return changes


def _readings(text: str) -> Iterator[tuple[str, WayBack | None]]:
    """The text as it stands, and as those understand it who undo escapes."""
    yield text, None
    tagged = _TAG_CHARACTERS.search(text) is not None
    for tags in (True, False) if tagged else (False,):
        left = doubts = Doubt.NONE
        for leave in _LEAVING:
            if leave and not doubts & leave & ~left:
                continue
            reading = read(text, leave=leave, tags=tags)
            if reading is None:
                break
            yield reading.text, reading.way
            left, doubts = leave, doubts | reading.doubts


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
    """The beginning of the tag with the name at `name`; None if there is no bracket before it."""
    start = _back(folded, name, _NOISE)
    if (bracket := folded.find("<", start, name)) >= 0:
        return bracket
    # The name's beginning: letters and joiners, up to a bracket.
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
