"""Splits a text into the pieces of words that the model knows, as BERT's uncased models want it."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
"""BERT's vocabulary for English in lower case (Apache-2.0), one piece a line; a piece that goes on begins with `##`."""
_BEGIN, _END, _UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
_LONGEST_WORD = 100
_ALONE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[!-/:-@\[-`{-~]")
"""Letters of Chinese and punctuation: each is a word of its own."""


class WordPieces:
    """The vocabulary, and how a text is split by it."""

    def __init__(self, vocabulary: Path = VOCABULARY) -> None:
        self._numbers = {piece: number for number, piece in enumerate(vocabulary.read_text("utf-8").splitlines())}
        self._unknown = self._numbers[_UNKNOWN]

    def encode(self, text: str, most: int) -> list[int]:
        """The numbers of a text's pieces, at most so many with the marks of its beginning and end."""
        found = [self._numbers[_BEGIN]]
        for word in _words(text):
            found += self._pieces(word)
            if len(found) >= most:
                break
        return [*found[: most - 1], self._numbers[_END]]

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning, then the longest of what is left, and so on."""
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            end = len(word)
            while end > start and (("##" if start else "") + word[start:end]) not in self._numbers:
                end -= 1
            if end == start:
                return [self._unknown]
            found.append(self._numbers[("##" if start else "") + word[start:end]])
            start = end
        return found


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without accents and control characters."""
    found: list[str] = []
    for letter in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(letter)
        if letter.isspace():
            found.append(" ")
        elif _ALONE.match(letter) or category.startswith("P"):
            found.append(f" {letter} ")
        elif category not in ("Mn", "Cc", "Cf"):
            found.append(letter)
    return "".join(found).split()
