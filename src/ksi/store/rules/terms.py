"""The words of a text, split in the same way for stored texts and for queries."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

import msgspec

from ksi.errors import InvalidData

MOST_TERMS = 20

# Scripts without spaces: each letter is a word, so that a match can begin anywhere in a line.
_DENSE = r"\u0e00-\u0eff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_DENSE}]|[^\W_{_DENSE}]+")
_ASKED = re.compile(r'"([^"]*)"(\*?)|(\S+)')


class Phrase(msgspec.Struct, frozen=True):
    """Words that stand one behind the other."""

    words: tuple[str, ...]
    beginning: bool = False
    """True if the last word is a prefix."""


class Place(msgspec.Struct, frozen=True):
    """A word in a text, in its compared form, with its position."""

    word: str
    start: int
    end: int


def composed(text: str) -> str:
    """A text with its letters in one piece each."""
    return unicodedata.normalize("NFC", text)


def words(text: str) -> Iterator[Place]:
    """The words of a composed text."""
    for found in _WORD.finditer(text):
        yield Place(folded(found[0]), found.start(), found.end())


def folded(word: str) -> str:
    """A word without case and accents."""
    if word.isascii():
        return word.lower()
    parts = unicodedata.normalize("NFKD", word.casefold())
    return "".join(char for char in parts if not unicodedata.combining(char))


def phrases(query: str) -> list[Phrase]:
    """The terms of a query: words, phrases in double quotes, and prefixes with a `*`.

    Raises:
        InvalidData: it has no word, or too many.
    """
    asked: list[Phrase] = []
    for found in _ASKED.finditer(composed(query)):
        quoted, more, plain = found.groups()
        text = plain if quoted is None else quoted
        beginning = bool(more) or (quoted is None and text.endswith("*"))
        its_words = tuple(place.word for place in words(text))
        if its_words:
            asked.append(Phrase(its_words, beginning))
    if not asked:
        raise InvalidData("query: it has no word to search for", path="query")
    if len(asked) > MOST_TERMS:
        raise InvalidData(f"query: at most {MOST_TERMS} terms can be searched for at once", path="query")
    return asked


def find(places: Sequence[Place], phrase: Phrase) -> Place | None:
    """The first position of a phrase, as one place; None if it does not occur."""
    length = len(phrase.words)
    for at in range(len(places) - length + 1):
        there = [place.word for place in places[at : at + length]]
        last = phrase.words[-1]
        if there[:-1] == list(phrase.words[:-1]) and (
            there[-1] == last or (phrase.beginning and there[-1].startswith(last))
        ):
            return Place(" ".join(there), places[at].start, places[at + length - 1].end)
    return None


def has_all(text: str, asked: Sequence[Phrase]) -> bool:
    """True if all phrases occur in a text."""
    places = list(words(composed(text)))
    return all(find(places, phrase) is not None for phrase in asked)
