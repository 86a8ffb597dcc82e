"""Detects chains that go in circles or fall apart, by the fingerprints of their hops: pure detectors with weights.

A chain is a sequence of steps, each by a speaker (a conversation, or an agent over several). Only *answers* count: the
same call with another result is polling, and no loop. Each finding has a description and a weight; the weights together
make the risk score.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import msgspec

from ksi.injection.fingerprint import SAMPLE, Mark, containment, likeness, read_mark, waits


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a chain: the speaker, and the marks of the prompt and of the result."""

    speaker: str
    prompt: bytes | None = None
    result: bytes | None = None
    agent: str | None = None


class Finding(msgspec.Struct, frozen=True):
    """One thing that speaks against a chain."""

    code: str
    """`repetition`, `cycle`, `growth`, `collapse`, `error_loop`."""
    weight: float
    """0..1: how sure it is alone."""
    words: str
    """One finding."""


class Suspicion(msgspec.Struct, frozen=True):
    """All findings, the weightiest first."""

    findings: tuple[Finding, ...] = ()


class _Said(msgspec.Struct, frozen=True):
    """A step that has a result or a failure."""

    speaker: str
    agent: str | None
    mark: Mark
    asked: Mark | None


LONGEST_CYCLE = 16
SAME = 0.88
"""Likeness from which two texts of one size are the same but for small things."""
SAME_SIZE = 0.05
"""By how much of its length the size of the other may differ."""
NEAR = 0.5
"""Mean likeness from which rounds of several say the same in other words ..."""
NEAR_ALONE = 0.5
"""... and the results of one that answers itself."""
NEAR_EACH = 0.3
"""The least for each text."""
NEAR_SIZE = 2
"""By which factor their sizes may differ at most."""
LONG = 120
"""Words from which a text is a draft rather than a message: those are alike by nature."""
SHORT = 8
"""Words up to which equal answers to unequal questions say nothing."""
CHORUS = 25
"""Words from which the same text from one speaker after the other is no coincidence: "nothing found" may be one."""
LOOPED = 50
"""Percent of a text that is one piece said again and again, from which it counts."""
PATIENCE = 8
"""Equal rounds in which one speaker may say that something is not over yet: it polls."""
STEPS = 4
"""Texts that make a trend: three steps."""


def assess(steps: Sequence[Step]) -> Suspicion:
    """Judge a chain by its steps, the oldest first."""
    said = _said(steps)
    if len(said) < 2:
        return Suspicion()
    found = [*_rounds(said), *_chorus(said), *_errors(said), *_lengths(said), *_inner_loops(said)]
    best: dict[str, Finding] = {}
    for finding in found:
        known = best.get(finding.code)
        if known is None or finding.weight > known.weight:
            best[finding.code] = finding
    return Suspicion(tuple(sorted(best.values(), key=lambda finding: -finding.weight)))


def _said(steps: Sequence[Step]) -> list[_Said]:
    found = []
    for step in steps:
        mark = read_mark(step.result)
        if mark is not None:
            found.append(_Said(step.speaker, step.agent, mark, read_mark(step.prompt)))
    return found


# -- rounds -----------------------------------------------------------------------------------------------------------


class _Match(msgspec.Struct, frozen=True):
    """One step compared with those of the rounds before."""

    near: float
    """Its greatest likeness to one of up to three before."""
    same: bool
    """True if it equals the one a round before, except for small changes."""


def _rounds(said: Sequence[_Said]) -> list[Finding]:
    """Rounds of n steps, by the same speakers, that repeat the previous round."""
    best: Finding | None = None
    for length in range(1, min(LONGEST_CYCLE, len(said) - 1) + 1):
        agents = len({step.agent for step in said[-length:]}) > 1
        polls = waits(said[-1].mark) and len({step.speaker for step in said[-2 * length :]}) == 1
        if polls and length > 1:
            continue  # one that polls goes round with nobody
        enough = PATIENCE if polls else 2 * length
        matches: list[_Match] = []
        for number in range(len(said) - 1, length - 1, -1):
            match = _match(said, number, length, agents=agents)
            if match is None:
                break
            matches.append(match)
            if len(matches) >= enough:
                break
        weight = _round_weight(matches, length, said[-1].mark)
        if polls and len(matches) < PATIENCE:
            weight = min(weight, 0.5)
        if weight and (best is None or weight > best.weight):
            fault = any(step.mark.fault for step in said[-length:])
            best = _round_finding(length, matches, weight, fault=fault)
    return [best] if best is not None else []


def _match(said: Sequence[_Said], number: int, length: int, *, agents: bool) -> _Match | None:
    """A step compared with the same speaker's one, two and three rounds before; None if it differs."""
    now, before = said[number], said[number - length]
    if not _one_speaker(now, before, agents=agents) or _is_another(now, before):
        return None
    like = likeness(now.mark, before.mark)
    near = like
    for earlier in (number - 2 * length, number - 3 * length):
        if earlier >= 0 and _one_speaker(now, said[earlier], agents=agents):
            near = max(near, likeness(now.mark, said[earlier].mark))
    if near < NEAR_EACH or like == 0.0 or not _comparable_size(now.mark, before.mark):
        return None
    return _Match(near, same=like >= SAME and _one_size(now.mark, before.mark))


def _one_speaker(now: _Said, before: _Said, *, agents: bool) -> bool:
    """True if both were in one conversation; or by one agent in two, if the round has several `agents` or the texts are
    long: one agent with many small tasks gives equal small answers."""
    if now.speaker == before.speaker:
        return True
    return now.agent is not None and now.agent == before.agent and (agents or now.mark.size >= CHORUS)


def _one_size(one: Mark, other: Mark) -> bool:
    a, b = (one.size, other.size) if one.length <= SAMPLE or other.length <= SAMPLE else (one.length, other.length)
    return abs(a - b) <= max(3, SAME_SIZE * max(a, b))


def _comparable_size(one: Mark, other: Mark) -> bool:
    return max(one.size, other.size) <= NEAR_SIZE * min(one.size, other.size) + SHORT


def _is_another(now: _Said, before: _Said) -> bool:
    """True if two texts are different results, however alike they are."""
    return _other_question(now, before) or _went_on(now, before)


def _other_question(now: _Said, before: _Said) -> bool:
    """True if a short answer came to another question: to one that differs in a name at least, or names it itself."""
    if now.mark.size > CHORUS:
        return False
    if now.asked is not None and before.asked is not None:
        return now.asked.digest != before.asked.digest
    return now.mark.nothing and before.mark.nothing and now.mark.digest != before.mark.digest


def _went_on(now: _Said, before: _Said) -> bool:
    """True if a log moved on: the line that was its last has others behind it."""
    ends, ended = _lines(now), _lines(before)
    return bool(ends and ended) and ended[-1] in ends[:-1] and ends[-1] not in ended


def _lines(said: _Said) -> list[tuple[str, str]]:
    """A text's lines of code, tables and logs by their words and facts."""
    return [(line.words, line.facts) for line in said.mark.said if line.formal]


def _round_weight(matches: Sequence[_Match], length: int, last: Mark) -> float:
    """How much a run of steps that repeat those of the rounds before weighs; `matches` has the latest first."""
    if not matches:
        return 0.0
    same = next((number for number, match in enumerate(matches) if not match.same), len(matches))
    if same >= max(2, length + 1):
        return 0.9
    weight = 0.0
    if same >= length:
        weight = 0.5 if length > 1 else 0.35
    if last.formal or (length == 1 and last.size > LONG):
        return weight
    mean = sum(match.near for match in matches) / len(matches)
    if mean >= (NEAR if length > 1 else NEAR_ALONE):
        weight = max(weight, 0.8 if len(matches) >= 2 * length else 0.3 if len(matches) >= length else 0.0)
    return weight


def _round_finding(length: int, matches: Sequence[_Match], weight: float, *, fault: bool) -> Finding:
    mean = sum(match.near for match in matches) / len(matches)
    if length == 1:
        words = f"the last {len(matches) + 1} results of one conversation are {mean:.0%} alike"
    else:
        words = f"the last {len(matches) + length} results go round in {length} steps, {mean:.0%} alike"
    return Finding("error_loop" if fault else "repetition" if length == 1 else "cycle", weight, words)


def _chorus(said: Sequence[_Said]) -> list[Finding]:
    """The very same text from one conversation after the other."""
    last = said[-1].mark
    same = 1
    for step in reversed(said[:-1]):
        if step.mark.digest != last.digest or step.mark.error != last.error:
            break
        same += 1
    if same < 3 or last.size < CHORUS:
        return []
    return [Finding("repetition", 0.45 if same < 5 else 0.85, f"the last {same} results are the same text")]


# -- failures ---------------------------------------------------------------------------------------------------------


def _errors(said: Sequence[_Said]) -> list[Finding]:
    """One failure again and again, whatever others said between."""
    last = said[-1]
    if not last.mark.fault:
        return []
    row = _row(said, last)
    if last.mark.error is not None and row >= 3:
        return [Finding("error_loop", 0.9, f"the last {row} requests failed with {last.mark.error}")]
    own = _row([step for step in said if step.speaker == last.speaker], last)
    if own < 2:
        return []
    what = f"failed with {last.mark.error}" if last.mark.error is not None else "reported the same error"
    return [Finding("error_loop", 0.75 if own >= 3 else 0.35, f"the last {own} results of one conversation {what}")]


def _row(said: Sequence[_Said], last: _Said) -> int:
    """How many of the latest steps say the same failure, each as the one after it."""
    row, after = 0, last
    for step in reversed(said):
        if not step.mark.fault or likeness(step.mark, after.mark) < SAME:
            break
        if step.mark.error is None and _is_another(after, step):
            break
        row, after = row + 1, step
    return row


# -- growth and decay -------------------------------------------------------------------------------------------------


def _lengths(said: Sequence[_Said]) -> list[Finding]:
    """Ever longer, or ever shorter, with the same things said: by one speaker, or from hop to hop."""
    own = [step.mark for step in said if step.speaker == said[-1].speaker and step.mark.error is None]
    everybody = [step.mark for step in said if step.mark.error is None]
    return [*_trend(own, STEPS), *(_trend(everybody, STEPS + 1) if len(own) != len(everybody) else [])]


def _trend(marks: Sequence[Mark], number: int) -> list[Finding]:
    last = marks[-number:]
    if len(last) < number or not all(mark.length for mark in last):
        return []
    ratios = [after.length / before.length for before, after in pairwise(last)]
    kept = min(containment(before, after) for before, after in pairwise(last))
    middle, overall = median(ratios), last[-1].length / last[0].length
    if min(ratios) >= 1.4 and middle >= 1.5 and last[0].length >= 150 and last[-1].length >= 1200 and kept >= 0.6:
        words = f"{number} results grew {overall:.1f} times longer, {kept:.0%} of each in the next"
        return [Finding("growth", 0.75, words)]
    if max(ratios) <= 0.75 and middle <= 0.6 and last[-1].length <= 300 and kept >= 0.75:
        words = f"{number} results shrank to {overall:.0%} of the length, {kept:.0%} of each from the one before"
        return [Finding("collapse", 0.75, words)]
    return []


def _inner_loops(said: Sequence[_Said]) -> list[Finding]:
    """Results that say one piece over and over within themselves."""
    looping = [step.mark.looped for step in said[-3:] if step.mark.looped >= LOOPED]
    if said[-1].mark.looped < LOOPED:
        return []
    weight = 0.8 if len(looping) >= 2 else 0.45
    return [Finding("collapse", weight, f"{looping[-1]} % of the last result is one piece said over and over")]
