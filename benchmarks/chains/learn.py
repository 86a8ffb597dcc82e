"""Learns the weights by which results are judged by what they say, from the chains in this folder.

    python benchmarks/chains/learn.py          # makes src/ksi/injection/meaning/weights.json anew, and prints figures
    python benchmarks/chains/learn.py --check  # says whether the weights in the package are those of these chains
    python benchmarks/chains/learn.py --check --words  # the same of the part without vectors, in seconds

The features are those of `ksi.injection.meaning.features`, the weights are a logistic regression. Only the chains of
the part `tune` are read. The threshold is set where chains that were left out of the learning, by chain, by kind and by
author, bring no more false alarms than `ALARMS`. Needs the extra `meaning`, and some minutes, most of them for the
vectors of the sentences (`--cache FILE` keeps them).

There are three parts: weights for results without vectors, weights for those with vectors, and the probe, a logistic
regression on the vectors themselves that tells sentences of runaways from others. The rows that the second part is
learned from have the probe's word as it is for chains that it was not learned with.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "src")]

from benchmarks.corpus import CorpusChain, read_corpus  # noqa: E402
from ksi.injection.meaning import model  # noqa: E402
from ksi.injection.meaning.features import Result, window  # noqa: E402
from ksi.injection.meaning.model import FARTHEST, Feature, Model, Probe, Weights  # noqa: E402
from ksi.injection.meaning.sentence import Sentence  # noqa: E402
from ksi.injection.meaning.sentences import read_sentences  # noqa: E402
from ksi.injection.vectors.encoder import LONGEST  # noqa: E402
from ksi.injection.vectors.network import Network, model_file, signs  # noqa: E402

WEIGHTS = Path(model.__file__).with_name("weights.json")
RIDGE = 60.0
PROBE_RIDGE = 6.0
FOLDS = 10
ALARMS = 0.01
"""Share of honest chains that may be stopped, of those that were left out of the learning."""
SURE = 2
"""Hops after the first without news from which a window counts as astray."""
IN_TIME = 4
"""Hops after the first without news in which a runaway has to be found."""
UNWRITTEN = 0.1
"""What a chain that was made by a script counts beside one that was written."""


class Vectors:
    """The vectors of sentences, each made once."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._found: dict[str, bytes] = {}
        if cache is not None and cache.exists():
            self._found = msgspec.msgpack.decode(cache.read_bytes())
        self._network: Network | None = None

    def of(self, text: str) -> np.ndarray:
        """The vector of a sentence."""
        text = text[:LONGEST]
        data = self._found.get(text)
        if data is None:
            if self._network is None:
                self._network = Network(model_file())
            data = self._found[text] = self._network.vector(text).astype(np.float16).tobytes()
        return np.frombuffer(data, np.float16).astype(float)

    def keep(self) -> None:
        """Write the cache."""
        if self._cache is not None:
            self._cache.write_bytes(msgspec.msgpack.encode(self._found))


class Said:
    """A text's sentences with their vectors."""

    def __init__(self, text: str, vectors: Vectors | None) -> None:
        pieces = read_sentences(text)
        self.bare = [piece.sentence for piece in pieces]
        self.vectors = [
            None if vectors is None or piece.sentence.formal else vectors.of(piece.text) for piece in pieces
        ]

    def sentences(self, probe: Probe | None) -> tuple[Sentence, ...]:
        """As the daemon would have them."""
        return tuple(
            bare
            if vector is None or probe is None
            else msgspec.structs.replace(bare, vector=signs(vector), emptiness=probe.hundredths(vector))
            for bare, vector in zip(self.bare, self.vectors, strict=True)
        )


class Read:
    """A chain with its sentences read."""

    def __init__(self, chain: CorpusChain, vectors: Vectors | None = None) -> None:
        self.chain = chain
        self.task = Said(chain.hops[0].prompt or "", vectors)
        self.said = [Said(hop.result or hop.message, vectors) for hop in chain.hops]

    def windows(self, probe: Probe | None) -> Iterable[tuple[int, dict[str, float]]]:
        """The features at each hop, as the daemon would have them."""
        task = self.task.sentences(probe)
        results: list[Result] = []
        for number, (hop, said) in enumerate(zip(self.chain.hops, self.said, strict=True)):
            if said.bare:
                results.append(Result(hop.agent or hop.speaker, said.sentences(probe), hop.error is not None))
            features = window(task, results)
            if features is not None:
                yield number, features


class Rows:
    """One line for each hop that is judged; the names of features with vectors come last."""

    def __init__(self, reads: Sequence[Read], probes: Sequence[Probe | None]) -> None:
        self.chains = [read.chain for read in reads]
        found: list[dict[str, float]] = []
        chain_of, hops, labels, weights = [], [], [], []
        for number, (read, probe) in enumerate(zip(reads, probes, strict=True)):
            seen = list(read.windows(probe))
            for hop, features in seen:
                found.append(features)
                chain_of.append(number)
                hops.append(hop)
                labels.append(label(read.chain, hop))
                weights.append(counts(read.chain) / len(seen))
        with_vectors = max(found, key=len)
        self.by_words = sorted(set.intersection(*(set(one) for one in found)))
        self.names = [*self.by_words, *sorted(set(with_vectors) - set(self.by_words))]
        # Of too few sentences with vectors the daemon uses the weights without; here they are taken as average.
        values = np.array([[one.get(name, np.nan) for name in self.names] for one in found])
        self.values = np.where(np.isnan(values), np.nanmean(values, 0), values)
        self.chain_of, self.hops = np.array(chain_of), np.array(hops)
        self.labels, self.weights = np.array(labels), np.array(weights)


def counts(chain: CorpusChain) -> float:
    """How much a chain counts."""
    return 1.0 if chain.written else UNWRITTEN


def probed(reads: Sequence[Read]) -> Probe:
    """A probe learned from the sentences of some chains."""
    vectors, labels, weights = [], [], []
    for read in reads:
        if not read.chain.written:
            continue
        known = [
            (v, label(read.chain, hop, 1)) for hop, said in enumerate(read.said) for v in said.vectors if v is not None
        ]
        for vector, value in known:
            if value >= 0:
                vectors.append(vector)
                labels.append(value)
                weights.append(1 / len(known))
    values, of, weight = np.array(vectors), np.array(labels), np.array(weights)
    for value in (0, 1):
        weight[of == value] *= len(of) / 2 / weight[of == value].sum()
    found = fit(values, of, weight, PROBE_RIDGE)
    return Probe(rounded(found[-1]), tuple(rounded(one) for one in found[:-1]))


def cross_probed(reads: Sequence[Read]) -> list[Probe]:
    """For each chain a probe that was learned without it."""
    fold = [int.from_bytes(sha256(read.chain.id.encode()).digest()[4:6]) % FOLDS for read in reads]
    by_fold = [probed([read for read, of in zip(reads, fold, strict=True) if of != number]) for number in range(FOLDS)]
    return [by_fold[number] for number in fold]


def is_known(chain: CorpusChain) -> bool:
    """Whether a chain is learned from: all that were written, and half of those that a script made. The labels of a
    small model's chains come from comparing letters, and say nothing about meaning."""
    return chain.runaway is not None and (
        chain.written or (chain.id[-1] in "02468" and not chain.id.startswith("local-"))
    )


def label(chain: CorpusChain, hop: int, sure: int = SURE) -> int:
    """1: astray, 0: not; -1: between."""
    if not chain.runaway or hop < chain.loop_from:
        return 0
    return 1 if hop >= chain.loop_from + sure else -1


def fit(values: np.ndarray, labels: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """Logistic regression with a penalty on all but the last weight, the bias; by Newton's method."""
    inputs = np.hstack([values, np.ones((len(values), 1))])
    found = np.zeros(inputs.shape[1])
    penalty = np.eye(len(found)) * ridge
    penalty[-1, -1] = 1e-6
    for _ in range(50):
        likely = 1 / (1 + np.exp(-np.clip(inputs @ found, -30, 30)))
        slope = inputs.T @ (weights * (likely - labels)) + penalty @ found
        curve = (inputs.T * (weights * likely * (1 - likely))) @ inputs + penalty
        step = np.linalg.solve(curve, slope)
        found -= step
        if np.abs(step).max() < 1e-7:
            break
    return found


class Fitted:
    """What was learned from some rows."""

    def __init__(self, rows: Rows, chosen: np.ndarray, names: Sequence[str]) -> None:
        known = chosen & (rows.labels >= 0)
        self.names = names
        values = rows.values[:, : len(names)]
        self.mean, self.scale = values[known].mean(0), values[known].std(0) + 1e-6
        weights = rows.weights.copy()
        for value in (0, 1):
            some = known & (rows.labels == value)
            weights[some] *= len(rows.chains) / weights[some].sum()
        self.found = fit(self.bounded(values[known]), rows.labels[known], weights[known], RIDGE)

    def scores(self, rows: Rows) -> np.ndarray:
        values = rows.values[:, : len(self.names)]
        return self.bounded(values) @ self.found[:-1] + self.found[-1]

    def bounded(self, values: np.ndarray) -> np.ndarray:
        """The features made comparable, none of them far from its mean."""
        return np.clip((values - self.mean) / self.scale, -FARTHEST, FARTHEST)


def cross_validated(rows: Rows, groups: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Scores of each row by weights learned without its chain's group."""
    places = {name: int.from_bytes(sha256(name.encode()).digest()[:4]) for name in groups}
    order = {name: number % FOLDS for number, name in enumerate(sorted(places, key=lambda one: places[one]))}
    fold = np.array([order[groups[chain]] for chain in rows.chain_of])
    scores = np.zeros(len(rows.labels))
    for number in range(FOLDS):
        if (fold == number).any():
            scores[fold == number] = Fitted(rows, fold != number, names).scores(rows)[fold == number]
    return scores


def threshold(rows: Rows, scores: np.ndarray, *, by_meaning: bool) -> float:
    """The least score that stops no more than `ALARMS` of the honest chains. By meaning, those that a script made count
    as little as in the learning: their sentences are drawn by chance and mean nothing."""
    highest = [
        (scores[rows.chain_of == n].max(), counts(c) if by_meaning else 1.0)
        for n, c in enumerate(rows.chains)
        if c.runaway is False and (rows.chain_of == n).any()
    ]
    left = ALARMS * sum(count for _, count in highest)
    for score, count in sorted(highest, reverse=True):
        left -= count
        if left < 0:
            return float(score) + 1e-3
    raise ValueError("no honest chain sets the threshold")


def stopped(rows: Rows, scores: np.ndarray, limit: float) -> dict[int, int]:
    """The hop at which each chain is stopped."""
    found: dict[int, int] = {}
    for chain, hop, score in zip(rows.chain_of, rows.hops, scores, strict=True):
        if score >= limit:
            found.setdefault(int(chain), int(hop))
    return found


def tell(title: str, rows: Rows, scores: np.ndarray, limit: float, *, short: bool = False) -> None:
    """Print what would be found, by kind, of the chains that were written."""
    ends = stopped(rows, scores, limit)
    caught, early, alarms, all_ = Counter(), Counter(), Counter(), Counter()
    for number, chain in enumerate(rows.chains):
        if not chain.written:
            continue
        side = "runaway" if chain.runaway else "honest"
        for key in ((side, "all"), (side, chain.kind)):
            all_[key] += 1
            end = ends.get(number)
            if end is None:
                continue
            if not chain.runaway:
                alarms[key] += 1
            elif end < chain.loop_from:
                early[key] += 1
            elif end <= chain.loop_from + IN_TIME:
                caught[key] += 1
    print(f"\n{title}")
    for key in sorted(all_, key=lambda one: (one[0] != "runaway", one[1] != "all", one[1])):
        side, kind = key
        if short and kind != "all":
            continue
        figure = f"{caught[key]} of {all_[key]}" if side == "runaway" else f"{alarms[key]} of {all_[key]} stopped"
        print(f"  {side:8} {kind:16} {figure}" + (f", {early[key]} too early" if early[key] else ""))


def rounded(value: float) -> float:
    """Few enough digits that every machine learns the same."""
    return float(f"{value:.3g}")


def learn(rows: Rows, names: Sequence[str], limit: float) -> Model:
    """The weights from all rows."""
    fitted = Fitted(rows, np.ones(len(rows.labels), bool), names)
    return Model(
        bias=rounded(fitted.found[-1]),
        threshold=rounded(limit),
        features={
            name: Feature(rounded(fitted.mean[n]), rounded(fitted.scale[n]), rounded(fitted.found[n]))
            for n, name in enumerate(names)
        },
    )


def learned_and_told(rows: Rows, names: Sequence[str], title: str) -> Model:
    """Learn one model, and print what it would find of chains that it was not learned with.

    The threshold is the strictest of those that chains, kinds and authors left out ask for.
    """
    ways = {
        "a tenth of the chains left out at a time": [chain.id for chain in rows.chains],
        "some kinds left out at a time": [chain.kind for chain in rows.chains],
        "some authors left out at a time": [chain.origin for chain in rows.chains],
    }
    scores = {way: cross_validated(rows, groups, names) for way, groups in ways.items()}
    by_meaning = len(names) > len(rows.by_words)
    limit = max(threshold(rows, one, by_meaning=by_meaning) for one in scores.values())
    print(f"\n== {title}: {len(names)} features, threshold {limit:.2f}")
    for number, (way, one) in enumerate(scores.items()):
        tell(way, rows, one, limit, short=number > 0)
    return learn(rows, names, limit)


def chains_to_learn_from() -> list[CorpusChain]:
    """Those of the part `tune`."""
    return [chain for chain in read_corpus(HERE) if chain.part == "tune" and is_known(chain)]


def digest(chains: Sequence[CorpusChain]) -> str:
    """Equal for equal chains."""
    return sha256(msgspec.json.encode(chains)).hexdigest()


def outdated(known: Weights) -> str | None:
    """What is not as these chains teach it, as far as that can be told without vectors: the weights for results
    without them, and the chains that all was learned from."""
    chains = chains_to_learn_from()
    rows = Rows([Read(chain) for chain in chains], [None] * len(chains))
    if learned_and_told(rows, rows.by_words, "without vectors") != known.words:
        return "the weights for results without vectors are not what these chains teach"
    return None if known.chains == digest(chains) else "the weights were learned from other chains"


def main() -> None:
    """Learn, print, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the package has other weights")
    parser.add_argument("--words", action="store_true", help="with --check: only what can be told without vectors")
    parser.add_argument("--cache", type=Path, help="where the sentences' vectors are kept for the next time")
    asked = parser.parse_args()
    if asked.words:
        sys.exit(outdated(model.learned()))
    vectors = Vectors(asked.cache)
    chains = chains_to_learn_from()
    reads = [Read(chain, vectors) for chain in chains]
    vectors.keep()
    rows = Rows(reads, cross_probed(reads))
    print(f"{len(chains)} chains, {len(rows.labels)} windows")
    weights = Weights(
        words=learned_and_told(rows, rows.by_words, "without vectors"),
        vectors=learned_and_told(rows, rows.names, "with vectors"),
        probe=probed(reads),
        chains=digest(chains),
    )
    text = msgspec.json.format(msgspec.json.encode(weights), indent=1)
    if asked.check:
        sys.exit(0 if WEIGHTS.read_bytes() == text + b"\n" else f"{WEIGHTS} is not what these chains teach")
    WEIGHTS.write_bytes(text + b"\n")


if __name__ == "__main__":
    main()
