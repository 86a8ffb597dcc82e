"""Judges a window of results by weights that `benchmarks/chains/learn.py` makes, and says in words what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import exp, log
from operator import mul
from pathlib import Path

import msgspec

from ksi.injection.meaning.features import WINDOW, Result, window
from ksi.injection.meaning.sentence import Sentence

NO_PROGRESS = "no_progress"
_FILE = Path(__file__).with_name("weights.json")
FARTHEST = 2.5
"""Scales from its mean that a feature counts at most: nothing is decided by one thing alone."""
_LIKELY = 0.7
"""The weight of a finding at the learned threshold."""
_STEEP = 1.5
"""How fast the weight grows with the score."""
_REASONS = 3
"""What is said of a window, at most."""
_LEAST_SHARE = 0.08
"""How much of all that speaks against a chain a reason has to make up to be said."""


class Feature(msgspec.Struct, frozen=True):
    """One feature's part in the score."""

    mean: float
    scale: float
    weight: float


class Model(msgspec.Struct, frozen=True):
    """Weights for one set of features: the score is their sum over the features, each made comparable first."""

    bias: float
    threshold: float
    """The score from which a chain counts as gone astray."""
    features: dict[str, Feature]

    def contributions(self, found: Mapping[str, float]) -> dict[str, float]:
        """What each feature adds to the score."""
        return {
            name: feature.weight * max(-FARTHEST, min(FARTHEST, (found[name] - feature.mean) / feature.scale))
            for name, feature in self.features.items()
        }

    def fits(self, found: Mapping[str, float]) -> bool:
        """Whether all of its features are there."""
        return all(name in found for name in self.features)


class Probe(msgspec.Struct, frozen=True):
    """How much a sentence sounds like those that bring nothing, by its vector."""

    bias: float
    weights: tuple[float, ...]

    def hundredths(self, vector: Sequence[float]) -> int:
        """The score of a vector."""
        return round(100 * (self.bias + float(sum(map(mul, self.weights, vector)))))


class Weights(msgspec.Struct, frozen=True):
    """All that was learned."""

    words: Model
    """For results without vectors."""
    vectors: Model
    """For results with vectors."""
    probe: Probe
    chains: str
    """A digest of the chains that it was learned from."""


class Seen(msgspec.Struct, frozen=True):
    """What a window of results looks like."""

    weight: float
    """How sure it is that the chain goes on without getting on, 0..1."""
    words: str
    """What was seen."""


@cache
def learned() -> Weights:
    """The weights in the package, read once."""
    return msgspec.json.decode(_FILE.read_bytes(), type=Weights)


def judge(weights: Weights, task: Sequence[Sentence], results: Sequence[Result]) -> Seen | None:
    """Judge the latest results; None where they are too few, or where nothing speaks against them."""
    found = window(task, results)
    if found is None:
        return None
    model = weights.vectors if weights.vectors.fits(found) else weights.words
    parts = model.contributions(found)
    weight = _weight(model.bias + sum(parts.values()) - model.threshold)
    if weight < 0.05:
        return None
    return Seen(round(weight, 3), _reasons(found, parts))


def _weight(over: float) -> float:
    """The weight of a score, by how far it is over the threshold."""
    return 1.0 / (1.0 + exp(-_STEEP * over - log(_LIKELY / (1.0 - _LIKELY))))


# -- in words ---------------------------------------------------------------------------------------------------------


def _reasons(found: Mapping[str, float], parts: Mapping[str, float]) -> str:
    """The weightiest of what speaks against it, as one sentence."""
    by_words: dict[str, float] = {}
    for name, part in parts.items():
        said = _SAID.get(name.removesuffix("_trend"))
        if part > 0 and said is not None:
            text = said(found)
            by_words[text] = by_words.get(text, 0.0) + part
    against = sum(part for part in parts.values() if part > 0) or 1.0
    best = sorted(by_words.items(), key=lambda item: -item[1])
    reasons = [text for text, part in best[:_REASONS] if part >= _LEAST_SHARE * against]
    return f"the last {WINDOW} results go on without getting on: " + (", ".join(reasons) or "nothing in them is new")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _facts(found: Mapping[str, float]) -> str:
    count = WINDOW * (exp(found["new_facts"]) - 1)
    if count < 0.5:
        return "no new number or name"
    return f"about {count:.0f} new numbers and names"


_SAID: dict[str, Callable[[Mapping[str, float]], str]] = {
    "new_facts": _facts,
    "least_new": _facts,
    "fact_news": _facts,
    "fact_density": _facts,
    "new_words": lambda found: f"{_percent(found['new_words'])} new words",
    "overlap": lambda found: f"{_percent(found['overlap'])} of a sentence stands in an earlier one",
    "previous": lambda found: f"{_percent(found['previous'])} of the words are those of the result before",
    "task": lambda found: f"{_percent(found['task'])} of the words are the task's",
    "beginning": lambda found: f"{_percent(found['beginning'])} of the words are those of the beginning",
    "conflict": lambda _: "facts that change",
    "questions": lambda found: f"{_percent(found['questions'])} of the sentences are questions",
    "asked_again": lambda _: "questions that were asked before",
    "thanks": lambda found: f"thanks and praise in {_percent(found['thanks'])} of the sentences",
    "approval": lambda found: f"approval in {_percent(found['approval'])} of the sentences",
    "restatement": lambda found: f"restatements in {_percent(found['restatement'])} of the sentences",
    "process": lambda found: f"talk about the work itself in {_percent(found['process'])} of the sentences",
    "report": lambda found: f"{_percent(found['report'])} of the sentences tell of something done",
    "all_ask": lambda _: "everybody asks",
    "intent": lambda found: f"{_percent(found['intent'])} of the sentences only promise or wait",
    "growth": lambda _: "results that grow",
    "magnitude": lambda _: "numbers that grow",
    "fault": lambda _: "failures",
    "near": lambda _: "what is said is close to what was said before",
    "nearest": lambda _: "what is said is close to what was said before",
    "near_previous": lambda _: "each result is close to the one before",
    "near_own": lambda _: "each speaker stays close to what it said before",
    "near_task": lambda _: "the task is far from what is said",
    "near_beginning": lambda _: "the beginning is far from what is said",
    "farthest": lambda _: "no sentence leads away from what was said",
    "emptiness": lambda _: "sentences that sound as if they bring nothing",
    "fullest": lambda _: "sentences that sound as if they bring nothing",
}
