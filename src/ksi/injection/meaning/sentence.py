"""What is kept of one sentence of a result, for the comparison with later ones; no text."""

from __future__ import annotations

import msgspec


class Sentence(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of one sentence, or of one line of code, a table or a log."""

    words: str
    """Hashes of its words, each once, sorted; common ones left out."""
    facts: str = ""
    """Hashes of its numbers, names and identifiers, sorted."""
    size: int = 0
    """Its words in all."""
    tone: int = 0
    """Bits of `tones`."""
    question: bool = False
    formal: bool = False
    """Whether it is a line of code, a table or a log."""
    magnitude: int = 0
    """Digits of its largest whole number."""
    vector: bytes = b""
    """What it means, as the signs of its vector; empty where no vectors are made."""
    emptiness: int = 0
    """How much it sounds like sentences that bring nothing, in hundredths, by its vector."""
    figures: tuple[tuple[str, float], ...] = ()
    """Its numbers, each with the hash of the word that says what it counts."""
