"""What a chain's latest results bring: the features that the weights are learned for. Pure; marks in, numbers out.

Each hop is compared with all that was said before it. The features of a window are the means over its hops, and how
they have changed since the hops before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, log1p, pi

import msgspec

from ksi.injection.meaning import tones
from ksi.injection.meaning.sentence import Sentence

WINDOW = 4
"""Hops that are looked at together; and so many before them, to see what has changed."""
FEWEST = 4
"""Results, the latest included, from which a chain is judged."""
_ALIKE = 0.5
"""The share of common words from which two sentences are about the same thing."""
_UNKNOWN = 0.5


class Result(msgspec.Struct, frozen=True):
    """One hop's result by its sentences."""

    speaker: str
    sentences: tuple[Sentence, ...]
    fault: bool = False
    """Whether it is a failure, or reads like one."""


class Measures(msgspec.Struct, frozen=True):
    """One hop beside all that was said before it; shares are 0..1."""

    new_words: float
    """Of its words, how many nobody has said."""
    new_facts: float
    """How many numbers, names and identifiers nobody has said (log1p)."""
    fact_news: float
    """Of its facts, how many nobody has said."""
    fact_density: float
    """Facts by words."""
    overlap: float
    """How much of a sentence stands in one earlier sentence, on the average."""
    task: float
    """Of its words, how many stand in the task."""
    beginning: float
    """Of its words, how many stand in the first two results."""
    previous: float
    """Of its words, how many stand in the result before."""
    conflict: float
    """Of its sentences with facts, how many say an earlier one with other facts."""
    questions: float
    asked_again: float
    """Of its questions, how many were asked in about the same words."""
    lines: float
    """New lines of code, tables and logs (log1p)."""
    length: float
    """Words (log1p)."""
    fault: float
    thanks: float
    approval: float
    restatement: float
    process: float
    report: float
    doubt: float
    cause: float
    intent: float
    you: float
    density: float
    """Of its words, how many mean something by themselves."""
    magnitude: float
    """Digits of its largest number."""
    revised: float
    """Of its numbers, how many count something that had another number before."""
    swings: float
    """Of its numbers, how many go down after one that went up, or up after one that went down."""
    ends_asking: float
    """Whether it ends with a question."""


class Meanings(msgspec.Struct, frozen=True):
    """The same by the vectors of the sentences."""

    near: float
    """How close a sentence is to the nearest earlier one, on the average."""
    nearest: float
    """The closest of them."""
    farthest: float
    """The one that is farthest from all that was said: what is new, if anything is."""
    near_task: float
    """How close the closest sentence is to the task."""
    near_beginning: float
    near_previous: float
    near_own: float
    """How close it is to what the same speaker said."""
    emptiness: float
    """How much its sentences sound like those that bring nothing, on the average."""
    fullest: float
    """The same of the one that sounds least like it."""


TRENDS = ("new_words", "new_facts", "fact_density", "task", "beginning", "overlap", "length", "report", "magnitude")
MOSTS = ("new_facts", "new_words", "fact_density", "report", "cause")
MEANING_TRENDS = ("near", "farthest", "near_task", "near_beginning", "emptiness")


class _Seen:
    """All that was said so far, hop by hop."""

    def __init__(self, task: Sequence[Sentence]) -> None:
        self.task = {word for sentence in task for word in sentence.words}
        self.words = set(self.task)
        self.facts = {fact for sentence in task for fact in sentence.facts}
        self.sentences = [(set(s.words), set(s.facts), s) for s in task]
        self.lines: set[tuple[str, str]] = set()
        self.beginning: set[str] = set()
        self.previous: set[str] = set()
        self.number = 0
        self.figures: dict[str, list[float]] = {}
        for sentence in task:
            self.count(sentence)

    def count(self, sentence: Sentence) -> None:
        for what, value in sentence.figures:
            known = self.figures.setdefault(what, [])
            if not known or known[-1] != value:
                known.append(value)

    def add(self, result: Result) -> None:
        words = {word for sentence in result.sentences if not sentence.formal for word in sentence.words}
        self.words |= {word for sentence in result.sentences for word in sentence.words}
        self.facts |= {fact for sentence in result.sentences for fact in sentence.facts}
        self.sentences += [(set(s.words), set(s.facts), s) for s in result.sentences if not s.formal]
        self.lines |= {(s.words, s.facts) for s in result.sentences if s.formal}
        for sentence in result.sentences:
            self.count(sentence)
        if self.number < 2:
            self.beginning |= words
        self.previous = words
        self.number += 1


def measure(task: Sequence[Sentence], results: Sequence[Result]) -> list[Measures]:
    """The latest results beside the task and all that was said before each, the oldest first."""
    seen = _Seen(task)
    found: list[Measures] = []
    for number, result in enumerate(results):
        if number >= len(results) - 2 * WINDOW:
            found.append(_measured(seen, result))
        seen.add(result)
    return found


def _measured(seen: _Seen, result: Result) -> Measures:
    prose = [sentence for sentence in result.sentences if not sentence.formal]
    formal = [sentence for sentence in result.sentences if sentence.formal]
    words = {word for sentence in prose for word in sentence.words}
    facts = {fact for sentence in result.sentences for fact in sentence.facts}
    size = sum(sentence.size for sentence in prose)
    overlaps: list[float] = []
    conflicts: list[bool] = []
    asked: list[bool] = []
    for sentence in prose:
        overlap, other = _nearest(seen, sentence)
        overlaps.append(overlap)
        if sentence.facts and other is not None and other[1]:
            conflicts.append(overlap >= _ALIKE and not set(sentence.facts) <= seen.facts)
        if sentence.question:
            asked.append(overlap >= _ALIKE and other is not None and other[2].question)
    count = len(prose) or 1
    figures = [figure for sentence in prose for figure in sentence.figures]

    def share(bit: int) -> float:
        return sum(1 for sentence in prose if sentence.tone & bit) / count

    return Measures(
        new_words=_part(words - seen.words, words),
        new_facts=log1p(len(facts - seen.facts)),
        fact_news=_part(facts - seen.facts, facts),
        fact_density=min(1.0, sum(len(sentence.facts) for sentence in prose) / (size or 1)),
        overlap=_mean(overlaps),
        task=_part(words & seen.task, words),
        beginning=_part(words & seen.beginning, words) if seen.number else _UNKNOWN,
        previous=_part(words & seen.previous, words) if seen.number else _UNKNOWN,
        conflict=_mean(conflicts),
        questions=sum(sentence.question for sentence in prose) / count,
        asked_again=_mean(asked),
        lines=log1p(len({(s.words, s.facts) for s in formal} - seen.lines)),
        length=log1p(size),
        fault=float(result.fault),
        thanks=share(tones.THANKS),
        approval=share(tones.APPROVAL),
        restatement=share(tones.RESTATEMENT),
        process=share(tones.PROCESS),
        report=share(tones.REPORT),
        doubt=share(tones.DOUBT),
        cause=share(tones.CAUSE),
        intent=share(tones.INTENT),
        you=share(tones.YOU),
        density=min(1.0, sum(len(sentence.words) for sentence in prose) / (size or 1)),
        magnitude=float(max((sentence.magnitude for sentence in prose), default=0)),
        revised=_mean([value not in known for what, value in figures if (known := seen.figures.get(what))]),
        swings=_mean([_swings(seen.figures.get(what, []), value) for what, value in figures]),
        ends_asking=float(bool(prose) and prose[-1].question),
    )


def _swings(before: Sequence[float], value: float) -> bool:
    """Whether a number turns round after those before it."""
    return len(before) > 1 and (before[-1] - before[-2]) * (value - before[-1]) < 0


def _nearest(seen: _Seen, sentence: Sentence) -> tuple[float, tuple[set[str], set[str], Sentence] | None]:
    """The earlier sentence with most of the words of this one, and how many of them that are."""
    words = set(sentence.words)
    if not words:
        return 0.0, None
    best, place = 0, None
    for other in seen.sentences:
        common = len(words & other[0])
        if common > best:
            best, place = common, other
    return best / len(words), place


def _part(some: set[str], of: set[str]) -> float:
    return len(some) / len(of) if of else _UNKNOWN


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# -- by vectors -------------------------------------------------------------------------------------------------------


class _Vectors(msgspec.Struct, frozen=True):
    speaker: str
    signs: tuple[int, ...]


def measure_meaning(task: Sequence[Sentence], results: Sequence[Result]) -> list[Meanings | None]:
    """The same as `measure` by vectors; None for a result that has none."""
    aim = _signs(task)
    before: list[_Vectors] = []
    found: list[Meanings | None] = []
    for number, result in enumerate(results):
        own = _signs(result.sentences)
        if number >= len(results) - 2 * WINDOW:
            found.append(_meant(aim, before, result, own) if own else None)
        before.append(_Vectors(result.speaker, own))
    return found


def _signs(sentences: Sequence[Sentence]) -> tuple[int, ...]:
    return tuple(int.from_bytes(sentence.vector) for sentence in sentences if sentence.vector)


def _meant(aim: tuple[int, ...], before: Sequence[_Vectors], result: Result, own: tuple[int, ...]) -> Meanings:
    earlier = [sign for hop in before for sign in hop.signs]
    same = [sign for hop in before if hop.speaker == result.speaker for sign in hop.signs]
    empty = [sentence.emptiness / 100 for sentence in result.sentences if sentence.vector]
    nearest = _closest(own, (*earlier, *aim))
    return Meanings(
        near=_mean(nearest),
        nearest=max(nearest),
        farthest=min(nearest),
        near_task=max(_closest(own, aim)),
        near_beginning=_mean(_closest(own, [sign for hop in before[:2] for sign in hop.signs])),
        near_previous=_mean(_closest(own, before[-1].signs if before else ())),
        near_own=_mean(_closest(own, same)),
        emptiness=_mean(empty),
        fullest=min(empty),
    )


_BITS = 384
_COSINES = tuple(cos(pi * differ / _BITS) for differ in range(_BITS + 1))


def _closest(own: Sequence[int], others: Sequence[int]) -> list[float]:
    """For each of `own` how close the closest of `others` is."""
    if not others:
        return [0.0] * len(own)
    return [_COSINES[min((sign ^ other).bit_count() for other in others)] for sign in own]


# -- windows ----------------------------------------------------------------------------------------------------------


def window(task: Sequence[Sentence], results: Sequence[Result]) -> dict[str, float] | None:
    """The features of the latest results, by their names; None where there are too few."""
    if len(results) < FEWEST:
        return None
    measured = [msgspec.structs.asdict(one) for one in measure(task, results)]
    found = _window(measured, Measures.__struct_fields__, TRENDS)
    found["hops"] = log1p(len(results))
    last = measured[-WINDOW:]
    found["least_new"] = min(one["new_facts"] for one in last)
    found["growth"] = last[-1]["length"] - last[0]["length"]
    by_speaker: dict[str, list[float]] = {}
    for result, one in zip(results[-WINDOW:], last, strict=True):
        by_speaker.setdefault(result.speaker, []).append(one["ends_asking"])
    found["all_ask"] = min(_mean(asked) for asked in by_speaker.values())
    for name in MOSTS:
        found[f"most_{name}"] = max(one[name] for one in last)
    meant = [msgspec.structs.asdict(one) for one in measure_meaning(task, results) if one is not None]
    if len(meant) >= FEWEST:
        found |= _window(meant, Meanings.__struct_fields__, MEANING_TRENDS)
        found["most_near_task"] = max(one["near_task"] for one in meant[-WINDOW:])
        found["farthest_of_all"] = min(one["farthest"] for one in meant[-WINDOW:])
    return found


def _window(hops: Sequence[dict[str, float]], names: Sequence[str], trends: Sequence[str]) -> dict[str, float]:
    last, before = hops[-WINDOW:], hops[:-WINDOW] or hops[:1]
    found = {name: _mean([hop[name] for hop in last]) for name in names}
    for name in trends:
        found[f"{name}_trend"] = found[name] - _mean([hop[name] for hop in before])
    return found
