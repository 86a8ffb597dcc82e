"""Fingerprints of texts, for the checks of later hops: a few hundred bytes, made of at most 4 KiB of a text.

A mark holds no text. It has hashes of the words that carry meaning, of the numbers, and of the whole; how long the text
is, and how much of it is one piece said over and over. Values that change by themselves (times, ids, counters) are left
out first, so that a loop cannot hide behind a clock.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from hashlib import blake2b
from zlib import compress, crc32

import msgspec
from rapidfuzz.distance import Indel

from ksi.injection.meaning.sentence import Sentence

VERSION = 1
SAMPLE = 4096
"""Characters that are read of one text, at most: its beginning, middle and end."""
WORDS = 96
NUMBERS = 24
"""Hashes that are kept, at most: the lowest, so that two long texts keep the same ones."""
_CODES = 0xD000
_FIRST_CODE = 0x100
"""Hashes are characters below the surrogates: the library then compares strings."""

_TOKEN = re.compile(r"(?<!\S)[^\s\d]*\d\S*")
"""Words with a digit; only these can change by themselves."""
_EDGE = "\"'`.,;:!?*_~|<>{}"
CHANGING = re.compile(
    r"\d{4}-\d\d-\d\d(?:t\d\d?:\d\d(?::\d\d(?:[.,]\d+)?)?(?:z|[+-]\d\d:?\d\d)?)?"  # dates and times
    r"|\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?(?:z|[ap]m)?"
    r"|\d{1,2}[./]\d{1,2}[./]\d{2,4}"
    r"|1[5-9]\d{8}(?:\.\d+)?|1[5-9]\d{11}"  # Unix times
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # ids
    r"|(?=[0-9]*[a-f])[0-9a-f]{8,64}|0x[0-9a-f]+|[a-z]+[_-][0-9a-f]{8,}"
    r"|\#\d+|\(\d+\)|\[\d+\]"  # counters
    r"|(?:attempt|try|round|iteration|turn|message|msg|no|id|seq|req|run)[=:#.]?\d+"
)
_COUNTERS = (
    "attempt try retry round iteration turn message msg reply pass loop cycle hop seq sequence no nr number id request "
    "req run trial tick"
)
_COUNTED = frozenset(_COUNTERS.split())
_TIMED = frozenset(("took", "elapsed", "within"))
_NUMBERED = re.compile(r"^[^\S\n]*\d+[.):]\s", re.MULTILINE)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*%?")
_WITHOUT_SYMBOLS = str.maketrans("", "", '{}[]()=_;|<>`"\\/+&$#\t')
_UNIT = re.compile(r"[^.!?\n]+[.!?\n]*")
_LISTED = re.compile(r"^\W*\d*[.):]?\s*")
_STEM = 6
_COMMON_WORDS = (
    "a about after again all also am an and any are as at be been before but by can could did do does for from had has "
    "have he her here him his how i if in into is it its just like ll let m may me more my no not now of on one or our "
    "out please re s she should so some such t than thank thanks that the their them then there these they this those "
    "to too up us ve very was we were what when where which who will with would yes you your"
)
COMMON = frozenset(_COMMON_WORDS.split())
_FAULT = re.compile(
    r"\b(?:error|exception|traceback|failed|failure|refused|timed out|timeout|denied|unavailable|not found|unable to"
    r"|cannot|can't|could not|couldn't)\b"
)
_FAULT_LENGTH = 600
_NOTHING = re.compile(
    r"\b(?:no|zero|0|any|keine?|kein|ning[uú]n|sin|aucune?) (?:\w+ )?"
    r"(?:results?|match(?:es)?|hits?|entr(?:y|ies)|records?|rows?|files?|treffer|ergebnis(?:se)?|einträge?|"
    r"resultados?|coincidencias?|résultats?)\b"
    r"|\b(?:nothing|not|none|nichts|nicht|rien) (?:was |were )?(?:found|listed|gefunden|trouvé)\b"
    r"|没有找到|未找到|\[\]"
)
_NOTHING_LENGTH = 200


_WAITING_WORDS = "running pending queued processing scheduled provisioning läuft ausstehend pendiente"


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """The stored mark of one text."""

    length: int
    """Characters of the whole text."""
    size: int
    """Words of the sample, without changing values."""
    digest: bytes
    """The digest of the sample, without changing values."""
    words: str
    """Hashes of its words, each once, sorted; common words are left out if others remain."""
    numbers: str
    """Likewise of its numbers."""
    cut: bool
    """True if `words` are only the lowest of more."""
    formal: bool
    """True if it is a table, code or data: such texts are alike by nature."""
    looped: int
    """How much of the sample is one piece said again and again, in percent."""
    fault: bool = False
    """True if it reads like an error."""
    error: str | None = None
    """The failure's class, if there is no text."""
    said: tuple[Sentence, ...] = ()
    """A result's sentences, for what is compared by meaning."""
    task: tuple[Sentence, ...] = ()
    """Those of the prompt, of the request that begins a chain."""
    nothing: bool = False
    """True if it is short and says that something was looked for and is not there."""


class _Versioned(msgspec.Struct, frozen=True, array_like=True):
    version: int
    mark: Mark


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Versioned)


def mark_text(text: str) -> bytes:
    """The mark of a prompt or a result."""
    return _encoded(_mark(text))


def mark_failure(error: str, message: str) -> bytes:
    """The mark of a request that ended without a result."""
    mark = _mark(message[:SAMPLE])
    return _encoded(msgspec.structs.replace(mark, fault=True, error=error))


def with_sentences(mark: bytes, said: tuple[Sentence, ...], task: tuple[Sentence, ...] = ()) -> bytes:
    """A mark with what its text says, sentence by sentence, and what was asked where that begins a chain."""
    return _encoded(msgspec.structs.replace(_decoder.decode(mark).mark, said=said, task=task))


def read_mark(data: bytes | None) -> Mark | None:
    """A stored mark; None if there is none, or another version of KSI wrote it."""
    if data is None:
        return None
    try:
        return _decoder.decode(data).mark
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def likeness(one: Mark, other: Mark) -> float:
    """The similarity of two texts, 0..1; 0 if their numbers differ: then the result is another one."""
    if one.digest == other.digest and one.error == other.error:
        return 1.0
    if one.error is not None or other.error is not None:
        return 0.9 if one.error == other.error and _alike(one, other) >= 0.5 else 0.0
    if one.numbers != other.numbers and Indel.normalized_similarity(one.numbers, other.numbers) < 0.8:
        return 0.0
    return _alike(one, other)


def waits(mark: Mark) -> bool:
    """Whether a short text says that something is not over yet, as the answer of a poll does. One that waits for
    somebody is another thing: two who wait for each other go round."""
    return mark.size <= _POLL and not mark.fault and not _WAITING.isdisjoint(mark.words)


def containment(one: Mark, other: Mark) -> float:
    """How much of the smaller text's words are in the larger, 0..1."""
    a, b = _comparable(one, other)
    smaller = min(len(a), len(b))
    return (len(a) + len(b) - Indel.distance(a, b)) / (2 * smaller) if smaller else 0.0


def _alike(one: Mark, other: Mark) -> float:
    a, b = _comparable(one, other)
    # Both sorted without repetition: this is twice the common ones by all.
    return Indel.normalized_similarity(a, b) if a or b else 1.0


def _comparable(one: Mark, other: Mark) -> tuple[str, str]:
    """The words of both, as far as both have kept them."""
    a, b = one.words, other.words
    last = min((mark.words[-1] for mark in (one, other) if mark.cut), default=None)
    if last is None:
        return a, b
    return a[: bisect_right(a, last)], b[: bisect_right(b, last)]


def _encoded(mark: Mark) -> bytes:
    return _encoder.encode(_Versioned(VERSION, mark))


def said_digest(text: str) -> bytes:
    """Equal for texts whose samples agree word by word, without changing values."""
    _, said, numbers = _said(sample(text))
    return _digest(said, numbers)


def _said(read: str) -> tuple[str, list[str], list[str]]:
    """A text without changing values, its words, and its numbers."""
    plain, numbers = _lasting(_NUMBERED.sub(" ", read.lower()))
    return plain, _WORD.findall(plain), numbers


def _digest(said: list[str], numbers: list[str]) -> bytes:
    return blake2b(" ".join((*said, "|", *numbers)).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _mark(text: str) -> Mark:
    read = sample(text)
    plain, said, numbers = _said(read)
    meant = {word[:_STEM] for word in said if word not in COMMON}
    words = _codes(meant or {word[:_STEM] for word in said})
    return Mark(
        length=len(text),
        size=len(said),
        digest=_digest(said, numbers),
        words=words[:WORDS],
        numbers=_codes(set(numbers))[:NUMBERS],
        cut=len(words) > WORDS,
        formal=_formal(read),
        looped=round(100 * _looped(read)),
        fault=len(text) < _FAULT_LENGTH and _FAULT.search(plain[:240]) is not None,
        nothing=len(text) < _NOTHING_LENGTH and _NOTHING.search(read.lower()) is not None,
    )


def _lasting(text: str) -> tuple[str, list[str]]:
    """A text without words that have digits and their names, and the numbers in it that do not change by themselves."""
    parts: list[str] = []
    numbers: list[str] = []
    done = 0
    for found in _TOKEN.finditer(text):
        before = text[done : found.start()]
        token, done = found[0].strip(_EDGE), found.end()
        rest, label = _label(before)
        parts.append(rest)
        if not label and not CHANGING.fullmatch(token) and not CHANGING.fullmatch(token.strip("[]()")):
            numbers += _NUMBER.findall(token)
            parts.append(token)
    parts.append(text[done:])
    return " ".join(parts), numbers


def _label(before: str) -> tuple[str, bool]:
    """The text before a number without a word that marks it as a counter or a time, if there is one."""
    words = before[-24:].split()
    if not words:
        return before, False
    word = words[-1].strip(_EDGE + "#=([")
    if word in _TIMED or word.removesuffix("s") in _COUNTED:
        return before[: before.rindex(words[-1])], True
    return before, False


def _formal(text: str) -> bool:
    """True if many of its characters are those of code, data or tables."""
    return len(text.translate(_WITHOUT_SYMBOLS)) < 0.95 * len(text)


def sample(text: str) -> str:
    """The sample of a text: all, or its beginning, middle and end."""
    if len(text) <= SAMPLE:
        return text
    part, middle = SAMPLE // 3, len(text) // 2
    return "\n".join((text[:part], text[middle - part // 2 : middle + part // 2], text[-part:]))


def _codes(words: set[str]) -> str:
    codes = {_FIRST_CODE + crc32(word.encode("utf-8", "surrogatepass")) % _CODES for word in words}
    return "".join(map(chr, sorted(codes)))


# -- one text that repeats itself -------------------------------------------------------------------------------------

_LONGEST_PERIOD = 8
_LONGEST_PHRASE = 24
_FEW_UNITS = 6
_DENSE = 0.3
"""A text of plain language does not get smaller than this share by compression; one that loops does."""


def _looped(text: str) -> float:
    """The share of a text, 0..1, that is one piece said over and over with nothing between."""
    if len(text) < 120 or len(compress(text.encode("utf-8", "surrogatepass"), 1)) > max(_DENSE * len(text), 60):
        return 0.0
    units = [_LISTED.sub("", unit).strip().lower() for unit in _UNIT.findall(text)]
    units = [unit for unit in units if unit]
    if len(units) >= _FEW_UNITS:
        share = _periodic(units, _LONGEST_PERIOD)
        if share:
            return share
    return _periodic(text.lower().split(), _LONGEST_PHRASE)


def _periodic(units: list[str], longest: int) -> float:
    """The largest share of units in one run that repeats itself with a period, at least three times over."""
    total = sum(map(len, units)) or 1
    best = 0
    for period in range(1, min(longest, len(units) // 4) + 1):
        run = size = 0
        for unit, before in zip(units[period:], units, strict=False):
            if unit == before:
                run += 1
                size += len(unit) if _says_something(unit) else 0
                if run >= 3 * period:
                    best = max(best, size)
            else:
                run = size = 0
    return best / total


def _says_something(unit: str) -> bool:
    """True if a unit has a word in it: rows of figures and rules of tables repeat by nature."""
    return any(letter.isalpha() for letter in unit)


_POLL = 25
"""Words of a poll's answer, at most."""
_WAITING = frozenset(_codes({word[:_STEM] for word in _WAITING_WORDS.split()}))
