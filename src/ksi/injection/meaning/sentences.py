"""Splits a result into its sentences, and keeps of each what later hops are compared with; no text.

Code, tables and logs are lines of their own kind: what is new in them counts as facts, and what stands between them is
read as if they were not there. So a long result with a listing in it is judged by its words as a short one is.
"""

from __future__ import annotations

import re
from itertools import pairwise
from zlib import crc32

import msgspec

from ksi.injection.fingerprint import CHANGING, COMMON, sample
from ksi.injection.meaning.sentence import Sentence
from ksi.injection.meaning.tones import tone_of

MOST = 16
"""Sentences that are kept of one text, at most."""
MOST_LINES = 12
"""Lines of code, tables and logs that are kept, at most."""
MOST_WORDS = 24
MOST_FACTS = 12
MOST_FIGURES = 6
_CODES = 0xD000
_FIRST_CODE = 0x100
_STEM = 6
_SHORTEST = 2
"""Words that make a sentence, at least."""

_OTHER_COMMON = (
    "der die das den dem des ein eine einen einem einer eines und oder ist sind war wird werden wurde hat haben "
    "ich du er sie es wir ihr nicht auch nur noch mit von zu zum zur für auf im in an am bei aus nach über als wie "
    "dass wenn so el la los las un una unos unas y o de del al que en es son fue ha han con por para se su sus lo "
    "le me te nos ya más le les une des et ou est sont dans sur pour par pas ne ce cette qui que il elle nous vous "
    "au aux du avec"
)
_IGNORED = COMMON | frozenset(_OTHER_COMMON.split())

_FENCE = re.compile(r"^\s*(?:```|~~~)")
_LISTED = re.compile(r"^\s*(?:[-*+•>]|\d+[.):]|#+|\[[ xX✓]?\]|\([a-z0-9]\))\s+")
_FORMAL_LINE = re.compile(
    r"^\s*(?:\||[+-]{3,}|={3,}|\$ |>>> |@@ |[+-](?=\S)|[{}\[\]<]|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|"
    r"(?:DEBUG|INFO|WARN|WARNING|ERROR|FATAL|TRACE)\b|File \"|at \S+\(|(?:def|class|import|from|return|if|for|SELECT|"
    r"INSERT|UPDATE|const|let|var|func|fn|public|private)\b.*[:;({=])"
)
_SYMBOLS = re.compile(r"[{}()\[\]=_;|<>`\\/+&$#@^~]")
_SPLIT = re.compile(r"(?<=[.!?…])[\"')\]]*\s+(?=\S)|(?<=[。！？])")
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:[-_./:@'][^\W_]+)*%?")
_NUMBER = re.compile(r"(?<![\w.,:/-])\d{1,3}(?:[,.'’ ]\d{3})+(?![\w:/-])|(?<![\w.,:/-])\d+(?![\w:/-])")
"""Whole numbers by themselves, not those in dates, times and identifiers."""
_SEPARATORS = re.compile(r"\D")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
_INNER_CAPITAL = re.compile(r"[a-z0-9][A-Z]|[A-Z]{2}")
_FIGURE = re.compile(r"\d+(?:[.,]\d+)*%?")
_THOUSANDS = re.compile(r"[.,](?=\d{3}(?!\d))")
_GERMAN = frozenset(
    [
        "der",
        "die",
        "das",
        "und",
        "ist",
        "nicht",
        "ich",
        "ein",
        "eine",
        "den",
        "dem",
        "wir",
        "sie",
        "es",
        "auf",
        "mit",
        "für",
        "zu",
    ]
)
"""In German all nouns begin with a capital: it says nothing there."""
_QUESTION = re.compile(r"[?？]\s*[\"')\]]*$")


class Piece(msgspec.Struct, frozen=True):
    """A sentence as it stands in its text, with what is kept of it."""

    text: str
    sentence: Sentence


def read_sentences(text: str) -> list[Piece]:
    """The sentences of a text: of a long one those of its beginning, middle and end."""
    prose: list[Piece] = []
    lines: list[Piece] = []
    fenced = False
    read = sample(text)
    names = sum(word in _GERMAN for word in read.split()) < 0.06 * len(read.split())
    for line in read.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
            continue
        if not line.strip():
            continue
        if fenced or _is_formal(line):
            piece = _piece(line.strip(), formal=True, names=False)
            if piece is not None:
                lines.append(piece)
            continue
        for part in _SPLIT.split(_LISTED.sub("", line)):
            piece = _piece(part.strip(), formal=False, names=names)
            if piece is not None:
                prose.append(piece)
    last = MOST_LINES // 2  # where a log goes on, it is at its end
    return _spread(prose, MOST) + _spread(lines[:-last], MOST_LINES - last) + lines[-last:]


def _is_formal(line: str) -> bool:
    if _FORMAL_LINE.match(line):
        return True
    symbols = len(_SYMBOLS.findall(line))
    return symbols >= 4 and symbols > 0.08 * len(line)


def _spread(pieces: list[Piece], most: int) -> list[Piece]:
    """At most so many, evenly from all."""
    if len(pieces) <= most:
        return pieces
    return [pieces[number * len(pieces) // most] for number in range(most)]


def _piece(text: str, *, formal: bool, names: bool) -> Piece | None:
    tokens = _TOKEN.findall(text)
    if len(tokens) < _SHORTEST:
        return None
    words: set[str] = set()
    facts: set[str] = set()
    lower: list[str] = []
    for number, token in enumerate(tokens):
        small = token.lower()
        lower.append(small)
        if _is_fact(token, first=number == 0, names=names):
            if not CHANGING.fullmatch(small):
                facts.add(small)
        elif small not in _IGNORED:
            words.add(small[:_STEM])
    cjk = [token for token in tokens if _CJK.match(token)]
    words.update(one + other for one, other in pairwise(cjk))
    if len(cjk) > len(tokens) // 2:
        words.difference_update(cjk)
    sentence = Sentence(
        words=_codes(words)[:MOST_WORDS],
        facts=_codes(facts)[:MOST_FACTS],
        size=len(tokens) if not cjk else len(tokens) - len(cjk) + (len(cjk) * 3 + 4) // 5,
        tone=tone_of(text.lower(), lower),
        question=_QUESTION.search(text) is not None,
        formal=formal,
        magnitude=max((len(_SEPARATORS.sub("", number)) for number in _NUMBER.findall(text)), default=0),
        figures=() if formal else _figures(lower),
    )
    return Piece(text, sentence)


def _figures(tokens: list[str]) -> tuple[tuple[str, float], ...]:
    """The numbers of a sentence with what they count: the word behind each, or else the one before."""
    found: list[tuple[str, float]] = []
    for place, token in enumerate(tokens):
        if not _FIGURE.fullmatch(token) or CHANGING.fullmatch(token):
            continue
        near = (*tokens[place + 1 : place + 2], *reversed(tokens[max(0, place - 2) : place]))
        word = next((one for one in near if one not in _IGNORED and not _FIGURE.fullmatch(one)), "")
        if token.endswith("%"):
            word = "%"
        plain = _THOUSANDS.sub("", token.rstrip("%")).replace(",", ".")
        if plain.count(".") <= 1:
            found.append((_codes({word[:_STEM]}), float(plain)))
    return tuple(found[:MOST_FIGURES])


def _is_fact(token: str, *, first: bool, names: bool) -> bool:
    """Whether a token is a number, a name or an identifier: something that can be looked up. Where `names` is false
    a capital letter alone makes no name."""
    if any(letter.isdigit() for letter in token):
        return True
    if any(mark in token for mark in "_./:@"):
        return True
    if first:
        return False
    return _INNER_CAPITAL.search(token) is not None or (
        names and len(token) > 2 and token[0].isupper() and "'" not in token
    )


def _codes(words: set[str]) -> str:
    codes = {_FIRST_CODE + crc32(word.encode("utf-8", "surrogatepass")) % _CODES for word in words}
    return "".join(map(chr, sorted(codes)))
