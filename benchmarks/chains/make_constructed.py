"""Makes runaway chains by construction, from a seed: every kind of loop, growth and decay that is known.

python benchmarks/chains/make_constructed.py constructed.jsonl --seed 7 --each 24
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from texts import DETAILS, Writer

ROUNDS = 6
"""How long each would go on if nobody stopped it."""
Hop = dict[str, Any]
Loop = tuple[list[Hop], int]
"""The hops of the loop, and how many make a round."""


def names(chance: random.Random, number: int) -> list[str]:
    """Speakers."""
    return chance.sample(["planner", "coder", "tester", "critic", "scout", "writer", "judge", "clerk", "guide"], number)


def noisy(chance: random.Random, text: str, turn: int) -> str:
    """The text with something that changes by itself: a clock, a counter, an id."""
    clock = f"2026-03-{1 + turn % 27:02d} {chance.randint(0, 23):02d}:{chance.randint(0, 59):02d}:{turn % 60:02d}"
    return chance.choice((
        f"[{clock}] {text}",
        f"{text} (message {turn + 1})",
        f"Attempt {turn + 1}: {text}",
        f"{text}\n\nid: {chance.getrandbits(64):016x}",
        f"Turn #{turn + 1} at {clock.split()[1]}. {text}",
        f"{text} It took {chance.randint(1, 90)}.{chance.randint(0, 9)} s.",
    ))  # fmt: skip


def circle(chance: random.Random, length: int, *, noise: bool) -> Loop:
    """The same texts, round after round, by `length` speakers."""
    writer = Writer(chance)
    said = [writer.paragraph(1, 4) for _ in range(length)]
    hops = []
    for turn in range(ROUNDS * length):
        text = said[turn % length]
        hops.append(noisy(chance, text, turn) if noise else text)
    made = spoken(names(chance, length), hops)
    # One agent that gives one short answer in ever new conversations may as well have many small tasks.
    told_apart = length > 1 or len(said[0].split()) >= 30
    return (wandering(chance, made) if told_apart and chance.random() < 0.25 else made), length


def wandering(chance: random.Random, hops: list[Hop]) -> list[Hop]:
    """The same agents, each time in a conversation of its own."""
    return [{**hop, "agent": hop["speaker"], "speaker": f"conv-{chance.getrandbits(40):010x}"} for hop in hops]


def spoken(speakers: Sequence[str], texts: Sequence[str]) -> list[Hop]:
    """Texts said in turn."""
    return [{"speaker": speakers[turn % len(speakers)], "result": text} for turn, text in enumerate(texts)]


def self_repeat(chance: random.Random) -> Loop:
    """One speaker that says one thing."""
    return circle(chance, 1, noise=chance.random() < 0.5)


def ping_pong(chance: random.Random) -> Loop:
    """Two that hand the same two texts to and fro."""
    return circle(chance, 2, noise=chance.random() < 0.5)


def triangle(chance: random.Random) -> Loop:
    """Three."""
    return circle(chance, 3, noise=chance.random() < 0.5)


def n_cycle(chance: random.Random) -> Loop:
    """Four to eight."""
    return circle(chance, chance.randint(4, 8), noise=chance.random() < 0.5)


OFFERS = (
    (("I will", "I am going to", "Let me"), ("look into", "check", "go through", "review"),
     ("the open points", "the points that are open", "what is still open"),
     ("and report back", "and come back to you", "then tell you what I found", "and write a report")),
    (("Could you", "Can you", "Would you", "Please"), ("confirm", "verify", "make sure of"),
     ("the deadline for the release", "the release deadline", "when the release is due"),
     ("before I go on", "so that I can go on", "first", "as a first step")),
    (("As soon as", "Once", "When"),
     ("you have confirmed,", "there is a confirmation,", "I have your confirmation,"),
     ("I will start", "I can begin", "the work begins", "I shall begin"),
     ("with the first task", "on the first task", "on task one")),
    (("Everything is", "All is", "The whole setup is"), ("ready", "in place", "prepared"),
     ("on my side", "here", "from my end"),
     ("and I await instructions", "and I am waiting for instructions", "so just give me instructions")),
    (("The plan", "Our plan", "The agreed plan"), ("remains", "stays", "is still"),
     ("the same as before", "as it was", "unchanged"),
     ("with three phases", "in three phases", "and has three phases")),
    (("We should", "We need to", "It is time to"), ("gather", "collect", "bring together"),
     ("the requirements", "all requirements"), ("from every team", "of all teams", "of each team")),
)  # fmt: skip
THANKS = (
    ("Thank you so much", "Thanks a lot", "Many thanks", "Thank you very much"),
    ("for your help", "for the help", "for helping"),
    ("It was great working with you", "It was a pleasure to work with you", "Working with you was great"),
    ("Have a wonderful day", "Have a great day", "I wish you a wonderful day"),
)
WELCOME = (
    ("You are welcome", "You are very welcome", "Most welcome"),
    ("Happy to help", "Glad to help", "Always happy to help"),
    ("Let me know if you need anything else", "If you need anything else, let me know", "Just say if you need more"),
    ("Have a wonderful day too", "A wonderful day to you too", "Have a great day as well"),
)


def reworded(chance: random.Random, sentences: Sequence[Sequence[Sequence[str]]]) -> str:
    """The same said again in other words and another order."""
    order = list(sentences)
    chance.shuffle(order)
    return " ".join(" ".join(chance.choice(words) for words in sentence) + "." for sentence in order)


def paraphrase(chance: random.Random) -> Loop:
    """One to three speakers that say the same in ever other words."""
    length = chance.randint(1, 3)
    meant = [chance.sample(OFFERS, chance.randint(3, 5)) for _ in range(length)]
    return spoken(
        names(chance, length), [reworded(chance, meant[turn % length]) for turn in range(ROUNDS * length)]
    ), length


def politeness(chance: random.Random) -> Loop:
    """Two that cannot stop thanking each other."""
    texts = []
    for turn in range(2 * ROUNDS):
        parts = [chance.choice(words) for words in (WELCOME if turn % 2 else THANKS)]
        texts.append(f"{parts[0]} {parts[1]}! {parts[2]}. {parts[3]}!" if turn % 2 == 0 else "! ".join(parts) + ".")
    return spoken(names(chance, 2), texts), 2


def elaboration(chance: random.Random) -> Loop:
    """Ever longer: what was said is said again with more to it."""
    length = chance.choice((1, 1, 2))
    writer = Writer(chance)
    said = [writer.sentence() for _ in range(chance.randint(3, 7))]
    texts = []
    for _ in range(max(5, 3 * length + 2)):
        texts.append(" ".join(said))
        more = round(len(said) * chance.uniform(0.7, 1.3))
        for _ in range(more):
            said.insert(chance.randint(0, len(said)), f"It is {chance.choice(DETAILS)}. {writer.sentence()}")
    return spoken(names(chance, length), texts), length


def collapse(chance: random.Random) -> Loop:
    """Ever shorter: each a piece of what was before."""
    words = Writer(chance).paragraph(8, 14).split()
    texts = []
    while words and len(texts) < 7:
        texts.append(" ".join(words))
        words = words[: max(1, round(len(words) * chance.uniform(0.3, 0.55)))] if len(words) > 1 else []
    return spoken(names(chance, 1), texts), 1


def stuck_text(chance: random.Random) -> Loop:
    """Results that say one piece over and over within themselves."""
    writer = Writer(chance)
    length = chance.randint(1, 2)
    texts = []
    for _ in range(5 * length):
        piece = writer.sentence()
        form = chance.randrange(4)
        times = chance.randint(8, 30)
        if form == 0:
            texts.append(" ".join([writer.sentence(), *[piece] * times]))
        elif form == 1:
            texts.append(writer.sentence() + "\n" + "\n".join(f"{line}. {piece}" for line in range(1, times)))
        elif form == 2:
            phrase = " ".join(piece.rstrip(".").split()[:4])
            texts.append(f"{writer.sentence()} " + f"{phrase} " * (3 * times))
        else:
            other = writer.sentence()
            texts.append("\n\n".join([f"{piece} {other}"] * times))
    return spoken(names(chance, length), texts), length


ERRORS = (
    ("network_error", "connection to the tool server was refused"),
    ("timeout", "no answer within 600 s"),
    ("invalid_request", "the field `query` is missing"),
    ("authentication", "the key was not accepted"),
    ("provider_error", "the tool answered 500"),
)
TEXT_ERRORS = (
    "Error: could not open file 'report.csv': permission denied.",
    "Traceback: KeyError: 'total' in summarise(), line 88.",
    "The command failed with exit code 2: no such option --deep.",
    "Request failed: 403 access denied for project atlas.",
)
RETRIES = (
    "I will try that again.", "Let us run it once more.", "Retrying now with the same input.",
    "Please run the step again.",
    "That did not work, try again.", "Once more, please.",
)  # fmt: skip


def error_loop(chance: random.Random) -> Loop:
    """The same failure again and again, alone or with somebody who says: once more."""
    form = chance.randrange(3)
    error, message = chance.choice(ERRORS)
    if form == 0:
        speaker = names(chance, 1)[0]
        return [{"speaker": speaker, "error": error, "message": message} for _ in range(ROUNDS)], 1
    one, other = names(chance, 2)
    hops: list[Hop] = []
    text = chance.choice(TEXT_ERRORS)
    for turn in range(ROUNDS):
        said = noisy(chance, text, turn) if chance.random() < 0.5 else text
        hops.append(
            {"speaker": one, "error": error, "message": message} if form == 1 else {"speaker": one, "result": said}
        )
        hops.append({"speaker": other, "result": chance.choice(RETRIES)})
    return hops, 2


KINDS: dict[str, Callable[[random.Random], Loop]] = {
    made.__name__: made
    for made in (
        self_repeat, ping_pong, triangle, n_cycle, paraphrase,
        politeness, elaboration, collapse, stuck_text, error_loop,
    )
}  # fmt: skip


def chains(seed: int, each: int) -> Iterator[dict[str, Any]]:
    """All of them: `each` of every kind, most with some honest hops before they go astray."""
    for kind, make in KINDS.items():
        for number in range(each):
            chance = random.Random(f"{seed} {kind} {number}")
            hops, length = make(chance)
            writer = Writer(chance)
            speakers = list(dict.fromkeys(hop["speaker"] for hop in hops))
            before = spoken(speakers, [writer.paragraph() for _ in range(chance.choice((0, 1, 2, 4)))])
            yield {
                "id": f"constructed-{kind}-{number:03d}",
                "kind": kind,
                "origin": f"constructed by make_constructed.py, seed {seed}",
                "runaway": True,
                # Of what grows or shrinks, a round is a step, and the first text is before the first step.
                "loop_from": len(before) + (kind in {"elaboration", "collapse"}),
                "round": length,
                "hops": [*before, *hops],
            }


def main(out: Path, seed: int, each: int) -> None:
    written = count()
    with out.open("w", encoding="utf-8") as file:
        for chain in chains(seed, each):
            file.write(json.dumps(chain, ensure_ascii=False) + "\n")
            next(written)
    print(next(written), "chains in", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--each", type=int, default=24, help="chains of every kind")
    given = parser.parse_args()
    main(given.out, given.seed, given.each)
