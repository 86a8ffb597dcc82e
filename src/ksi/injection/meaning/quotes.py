"""Picks the sentence of a result that shows best why its chain is thought to go on without getting on."""

from __future__ import annotations

from collections.abc import Sequence

from ksi.host.printable import visible
from ksi.injection.meaning import tones
from ksi.injection.meaning.sentences import Piece

LONGEST = 160
"""Characters of a quotation."""
_EMPTY = tones.THANKS | tones.APPROVAL | tones.RESTATEMENT | tones.PROCESS | tones.INTENT | tones.DOUBT


def telling(pieces: Sequence[Piece]) -> str | None:
    """The sentence with the least in it; None where there is none."""
    prose = [piece for piece in pieces if not piece.sentence.formal]
    if not prose:
        return None
    text = " ".join(max(prose, key=_emptiness).text.split())
    return visible(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def _emptiness(piece: Piece) -> float:
    sentence = piece.sentence
    return sentence.emptiness / 100 + (sentence.tone & _EMPTY).bit_count() + sentence.question - len(sentence.facts)
