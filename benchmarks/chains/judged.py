"""Plays chains through the checks with a scripted judge that is right in some of its words, and prints the outcome.

    python benchmarks/chains/judged.py [--vectors CACHE] [--more chains.jsonl]

The judge's words are known one hop after they were asked for, as in a daemon whose provider has a free place. Which of
them are wrong is drawn from the chain's id, the question's number and a seed; figures are means over SEEDS seeds. The
checks are those of the package: nothing is learned or set here. `--more` is a file in the form of the 146 chains that
are not in this repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "src"), str(HERE)]

from benchmarks.chain_checks import Player  # noqa: E402
from benchmarks.corpus import CorpusChain, CorpusHop, read_corpus  # noqa: E402
from ksi.clock import SystemClock  # noqa: E402
from ksi.config.schema import Chain, Patterns  # noqa: E402
from ksi.injection.circuit_breakers import ChainBreaker, Reading  # noqa: E402
from ksi.injection.judge import Hearing, Opinion, Question, Verdict, due  # noqa: E402
from ksi.injection.meaning.model import learned  # noqa: E402
from ksi.injection.meaning.sentences import Piece  # noqa: E402

RIGHT = (None, 0.8, 0.9, 0.95)
"""How often the judge is right; None: there is none."""
SEEDS = 5
MOST = 8
IN_TIME = 4
"""Hops after the first without news in which a runaway has to be found."""


class End(msgspec.Struct, frozen=True):
    """What became of one chain."""

    chain: CorpusChain
    stopped: int | None
    asked: int


def word(chain: CorpusChain, number: int, depth: int, right: float, seed: int) -> Opinion:
    """The scripted judge's answer."""
    drawn = sha256(f"{chain.id}/{number}/{seed}".encode()).digest()
    astray = bool(chain.runaway) and depth >= chain.loop_from
    is_right = int.from_bytes(drawn[:4]) < right * 2**32
    return Opinion(Verdict.ASTRAY if astray == is_right else Verdict.PROGRESS, "scripted")


class Vectors:
    """Adds vectors to what is read, as the daemon's process does."""

    def __init__(self, cache: Path) -> None:
        from learn import Vectors as Kept

        self._kept = Kept(cache)
        self._probe = learned().probe

    def add(self, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """The pieces with their vectors."""
        return tuple(map(self._one, pieces))

    def _one(self, piece: Piece) -> Piece:
        from ksi.injection.vectors.network import signs

        if piece.sentence.formal:
            return piece
        vector = self._kept.of(piece.text)
        sentence = msgspec.structs.replace(
            piece.sentence, vector=signs(vector), emptiness=self._probe.hundredths(vector)
        )
        return Piece(piece.text, sentence)

    def keep(self) -> None:
        """Write the cache."""
        self._kept.keep()


def play(chain: CorpusChain, right: float | None, seed: int, vectors: Vectors | None) -> End:
    """Play one chain to its end, or to its stop."""
    breaker = ChainBreaker(Chain(), Patterns())
    player = Player(breaker, SystemClock())
    way: list[Any] = []
    questions: list[Question] = []
    for depth, hop in enumerate(chain.hops):
        hearing = Hearing(most=0 if right is None else MOST, asked=len(questions), questions=tuple(questions))

        def add(reading: Reading) -> Reading:
            assert vectors is not None
            return Reading(vectors.add(reading.said), vectors.add(reading.task))

        judged = player.hop(depth, hop, way, hearing=hearing, add=None if vectors is None else add)
        if judged.block is not None:
            return End(chain, depth, len(questions))
        if right is not None and due(hearing, depth, judged.risk_score):
            number = len(questions) + 1
            questions.append(Question(number=number, depth=depth, opinion=word(chain, number, depth, right, seed)))
    return End(chain, None, len(questions))


def read_more(file: Path) -> list[CorpusChain]:
    """Chains in the form of the set that is not in this repository."""
    found = []
    for line in file.read_text("utf-8").splitlines():
        one = msgspec.json.decode(line)
        hops = tuple(
            CorpusHop(
                speaker=f"{hop['agent']}'s",
                agent=hop["agent"],
                prompt=None if number else hop["prompt"],
                result=None if hop["error"] else hop["result"],
                error="provider" if hop["error"] else None,
                message=hop["result"] if hop["error"] else "",
            )
            for number, hop in enumerate(one["hops"])
        )
        found.append(
            CorpusChain(
                id=one["id"],
                kind=one["kind"],
                origin="another author",
                runaway=one["label"] == "runaway",
                hops=hops,
                loop_from=one["onset"] or 0,
            )
        )
    return found


def tell(title: str, chains: Sequence[CorpusChain], vectors: Vectors | None) -> None:
    """Print one line for each judge."""
    astray = [chain for chain in chains if chain.runaway]
    honest = [chain for chain in chains if chain.runaway is False]
    print(f"\n{title}: {len(astray)} runaways, {len(honest)} honest", flush=True)
    for right in RIGHT:
        seeds = range(1 if right is None else SEEDS)
        ends = [play(chain, right, seed, vectors) for seed in seeds for chain in (*astray, *honest)]
        times = len(seeds)
        stops = [(end.stopped - end.chain.loop_from) for end in ends if end.chain.runaway and end.stopped is not None]
        found = sum(0 <= late <= IN_TIME for late in stops) / times
        late, early = sum(late > IN_TIME for late in stops) / times, sum(late < 0 for late in stops) / times
        alarms = [end.chain.kind for end in ends if not end.chain.runaway and end.stopped is not None]
        asked = sum(end.asked for end in ends) / len(ends)
        name = "no judge" if right is None else f"right in {right:.0%}"
        kinds = f" ({_counts(alarms, times)})" if alarms else ""
        print(
            f"  {name:13} found {found:5.1f}, later {late:4.1f}, early {early:4.1f}; "
            f"honest stopped {len(alarms) / times:4.1f}{kinds}; {asked:.1f} questions a chain",
            flush=True,
        )


def _counts(kinds: Iterable[str], times: int) -> str:
    found: dict[str, int] = {}
    for kind in kinds:
        found[kind] = found.get(kind, 0) + 1
    return ", ".join(f"{kind} {count / times:.1f}" for kind, count in sorted(found.items()))


def main() -> None:
    """Play all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="with sentence vectors, kept in this file for the next time")
    parser.add_argument("--more", type=Path, help="a file of further chains")
    asked = parser.parse_args()
    vectors = None if asked.vectors is None else Vectors(asked.vectors)
    written = [chain for chain in read_corpus(HERE) if chain.written]
    for part in ("tune", "held_back"):
        tell(f"written, {part}", [chain for chain in written if chain.part == part], vectors)
    if asked.more is not None:
        tell("another author's", read_more(asked.more), vectors)
    if vectors is not None:
        vectors.keep()


if __name__ == "__main__":
    main()
