"""Reads a character as what it looks like, as far as a `<system-reminder>` tag needs it: letters, brackets, noise.

Everything is folded to one character, so that a place in the folded text is the same place in the text.
"""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = "\0"
"""Marks, controls, format characters: invisible ones."""
SOLID = "\1"
"""A letter or digit that looks like none that counts."""
PAIR = {"ﬅ": "\2", "ﬆ": "\2", "㏌": "\3", "🅬": "\4"}
"""Single characters that read as two letters: st, in, mr."""

_LETTERS = {
    "s": "ƽѕꮪ𑣁𐑈ЅՏᏕᏚꓢ𖼺𐊖𐐠§",
    "y": "ΥϒⲨУҮᎩᎽꓬ𖽃𑢤𐊲ɣᶌγуүყ𑣜ұҰўЎ¥ɤ",
    "t": "⊤⟙🝨ΤⲦТᎢꓔ𖼊𑢼𐊗𐊱𐌕τтţ†",
    "e": "℮еҽ⋿ΕЕⴹᎬꓰ𑢦𑢮𐊆εєёЁЄ€Ξ∈",
    "m": "ΜϺⲘМᎷᗰᛖꓟ𐊰𐌑мʍⲙ",
    "r": "ᴦⲅгꮁ𝈖ƦᎡᏒ𐒴ᖇꓣ𖼵гΓяЯ®",
    "i": "˛⍳ιͺіꙇӏꭵᎥ𑣃ΙІӀїЇ¡",
    "n": "ΝⲚꓠ𐔓ոռпиИηղ∩",
    "d": "ԁᏧᑯꓒᎠᗞᗪꓓժძδ∂",
}
_OPENING = "‹«❮❬❰˂˱𝈶ᐸᚲᑉ〈⟨⟪⦑⦓⧼〈《︽︿≪⋖≺⋘⧀⪡⫷⩹⩻≤≦⩽◁◀◂◃◄◅⯇くㄑ𐡷"
_CLOSING = "›»❯❭❱˃˲𝈷ᐳ𖼿ᑀ〉⟩⟫⦒⦔⧽〉》︾﹀≫⋗≻⋙⧁⪢⫸⩺⩼≥≧⩾▷▶▸▹►▻⯈"
_SLASHES = "᜵⁁∕⁄╱⟋⧸𝈺㇓〳Ⳇノ丿⼃／"
_FILLERS = "\u115f\u1160\u3164\uffa0"
"""Letters by their class, but without a look."""
_KNOWN = {
    **dict.fromkeys(_FILLERS, INVISIBLE),
    **{character: letter for letter, characters in _LETTERS.items() for character in characters},
    **dict.fromkeys(_OPENING, "<"),
    **dict.fromkeys(_CLOSING, ">"),
    **dict.fromkeys(_SLASHES, "/"),
    **PAIR,
}
_NAMED = re.compile(
    r"LETTER (?:SMALL CAPITAL |DOTLESS |LONG |INSULAR |REVERSED |TURNED |SIDEWAYS |BLACKLETTER |FINAL )*"
    r"([SYTEMRIND])(?: WITH .*| ROTUNDA)?$"
)
_LATIN = ("LATIN", "INDICATOR", "SQUARED", "CIRCLED")


def _ascii(character: str) -> str:
    if character.isalnum():
        return character.lower()
    if character in "<>/":
        return character
    if character in "-_:.":
        return "-"
    if character.isspace():
        return " "
    return "," if character.isprintable() else INVISIBLE


def _read(character: str) -> str:
    """One character beyond ASCII, folded."""
    if character in _KNOWN:
        return _KNOWN[character]
    base = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    shown = [c for c in base if c not in "()"] or base
    if len(shown) == 1 and shown[0] != character:
        return _FOLDED[ord(shown[0])]
    name = unicodedata.name(character, "")
    found = _NAMED.search(name) if name.startswith(_LATIN) or any(word in name for word in _LATIN) else None
    category = unicodedata.category(character)
    if category[0] in "MC":
        return INVISIBLE
    if found is not None:
        return found[1].lower()
    return {"Z": " ", "L": SOLID, "N": SOLID}.get(category[0], "-" if category in {"Pd", "Pc"} else ",")


class _Folding(dict[int, str]):
    """A translation table that fills itself: it is a cache of a pure function, bounded by Unicode."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _read(chr(code))
        return folded


_FOLDED = _Folding({code: _ascii(chr(code)) for code in range(128)})
_RUNS = re.compile(r"[\x00-\x7f]+|[^\x00-\x7f]+")
_ASCII = bytes(ord(_ascii(chr(code))) if code < 128 else 0 for code in range(256))


def fold(text: str) -> str:
    """The visual form of the text, character by character: lower-case letters and digits, `<`, `>`, `/`, `-` for
    joiners of words, space, `,` for other punctuation, `INVISIBLE`, `SOLID`, and the values of `PAIR`."""
    if text.isascii():
        return _fold_ascii(text)
    return "".join(_fold_ascii(run) if run.isascii() else run.translate(_FOLDED) for run in _RUNS.findall(text))


def _fold_ascii(text: str) -> str:
    # Thirty times as fast as a table of strings; most of most texts is ASCII.
    return text.encode("ascii").translate(_ASCII).decode("ascii")


_TAG = range(0xE0020, 0xE007F)
_LEFT_OUT = "\0"
_KEPT = "\a\t\n\v\f\r\x1b\x9b\x9c"
"""Controls that are blanks, or begin or end the codes of terminals."""
_SHOWN = re.compile(r"[\a\t-\r\x1b -~]*")


class _Narrowing(dict[int, str]):
    """A translation table that fills itself, like `_Folding`."""

    def __init__(self, *, tags: bool) -> None:
        super().__init__({code: chr(code) if code > 31 or chr(code) in _KEPT else _LEFT_OUT for code in range(127)})
        self._tags = tags

    def __missing__(self, code: int) -> str:
        self[code] = read = self._narrow(chr(code))
        return read

    def _narrow(self, character: str) -> str:
        if ord(character) in _TAG:
            return chr(ord(character) - 0xE0000) if self._tags else _LEFT_OUT
        if character == "\u241b":  # the symbol for ESC
            return "\x1b"
        plain = unicodedata.normalize("NFKD", character)
        if len(plain) == 1 and plain.isascii():
            return plain
        # Halves of UTF-16 wait for the other half.
        left_out = (
            character not in _KEPT and not "\ud800" <= character <= "\udfff" and _FOLDED[ord(character)] == INVISIBLE
        )
        return _LEFT_OUT if left_out else character


_NARROWED = {tags: _Narrowing(tags=tags) for tags in (False, True)}


def narrow(text: str, *, tags: bool) -> tuple[str, tuple[int, ...] | None]:
    """The text as escapes are looked for in it: full-width and other shapes of ASCII as ASCII, invisible characters
    left out; and the place at which each character stood, None if none was left out.

    `tags` reads Unicode's invisible copies of ASCII as the characters that they copy.
    """
    if text.isascii() and _SHOWN.fullmatch(text) is not None:
        return text, None
    shown = text.translate(_NARROWED[tags])
    if _LEFT_OUT not in shown:
        return shown, None
    kept = tuple(place for place, character in enumerate(shown) if character != _LEFT_OUT)
    return shown.replace(_LEFT_OUT, ""), kept


def narrow_undone(text: str, *, tags: bool) -> str:
    """The meaning of an escape in the form of `narrow`: it may be a part of another escape."""
    return text if " " <= text <= "~" else text.translate(_NARROWED[tags]).replace(_LEFT_OUT, "")
