"""Makes honest chains: long, alike in form, repetitive by nature, and no loop.

    python benchmarks/chains/make_honest.py honest.jsonl --seed 7 --each 20

`documents` and `code` are real text: sections of this repository's documents and functions of its modules, in order.
The rest is made from a seed.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from texts import DETAILS, SUBJECTS, Writer

ROOT = Path(__file__).parents[2]
Hop = dict[str, Any]


def research(chance: random.Random) -> list[Hop]:
    """One subject, a long way: each hop a new side of it."""
    writer = Writer(chance)
    speakers = ["researcher"] if chance.random() < 0.5 else ["researcher", "coordinator"]
    hops = []
    for turn in range(chance.randint(10, 24)):
        opening = f"On {writer.thing()}: " if chance.random() < 0.5 else ""
        hops.append({"speaker": speakers[turn % len(speakers)], "result": opening + writer.paragraph(4, 12)})
    return hops


STEPS = (
    "queued", "fetching sources", "compiling", "linking", "running unit tests", "running integration tests",
    "packaging", "uploading", "waiting for approval", "rolling out to canary", "rolling out to region",
)  # fmt: skip


def polling(chance: random.Random) -> list[Hop]:
    """The same call, again and again, with results that change."""
    form = chance.randrange(5)
    prompt = chance.choice(("What is the status of the job?", "Check the deployment.", "Is the import done?"))
    done, stage, still = 0, 0, False
    hops = []
    for _ in range(chance.randint(8, 20)):
        still = not still and chance.random() < 0.15  # Now and then nothing has happened since.
        if not still:
            done, stage = min(100, done + chance.randint(1, 9)), stage + 1
        step = STEPS[stage % len(STEPS)]
        if done == 100:
            break
        text = (
            f"Progress: {done}%.",
            f"The job is still running: {done} of 100 files are done.",
            f"Status: {step}. {done} items processed, {100 - done} to go.",
            f'{{"state": "running", "step": "{step}", "done": {done}, "errors": 0}}',
            f"Still {step}. Throughput is {chance.randint(200, 900)} rows/s, {chance.randint(3, 90)} MB in memory.",
        )[form]
        hop = {"speaker": "watcher", "result": text}
        if chance.random() < 0.9:
            hop["prompt"] = prompt
        hops.append(hop)
    return hops


def review(chance: random.Random) -> list[Hop]:
    """Drafts of one text, and comments on them that differ from round to round."""
    writer, critic = Writer(chance), Writer(chance)
    draft = [writer.sentence() for _ in range(chance.randint(6, 14))]
    hops = []
    for turn in range(chance.randint(4, 7)):
        hops.append({"speaker": "author", "result": f"Draft {turn + 1}:\n\n" + " ".join(draft)})
        line = chance.randrange(len(draft))
        remark = chance.choice((
            f"Sentence {line + 1} is unclear: what does it say about {critic.thing()}? {critic.sentence()}",
            f"Please add something on {critic.thing()}. {critic.sentence()}",
            f"The part on {critic.thing()} is wrong; as far as I know, {critic.sentence().lower()}",
            f"Better now. I would still drop sentence {line + 1}, {critic.thing()} is not the subject here.",
        ))  # fmt: skip
        hops.append({"speaker": "reviewer", "result": remark})
        for _ in range(chance.randint(1, 3)):
            draft[chance.randrange(len(draft))] = writer.sentence()
        if chance.random() < 0.4:
            draft.append(writer.sentence())
    hops.append({"speaker": "reviewer", "result": "Approved."})
    return hops


def map_reduce(chance: random.Random) -> list[Hop]:
    """Fifty agents, each with its part, reporting in one form; in the end one that sums up."""
    writer = Writer(chance)
    form = chance.randrange(4)
    nothing = chance.choice(("No issues were found in this part of the document.", "I found nothing to report here."))
    agent = {"agent": "mapper"} if chance.random() < 0.4 else {}
    hops: list[Hop] = []
    for part in range(1, 51):
        if form == 0:
            found = chance.choice(("nothing to report", "nothing to report", writer.sentence()))
            text = f"Part {part} of 50: {found}"
        elif form == 1:
            text = f"Chunk {part}: {chance.randint(0, 9)} mentions of {writer.thing()}, {chance.randint(0, 40)} links."
        elif form == 2:
            text = chance.choice((nothing, nothing, nothing, writer.sentence()))
        else:
            text = f"## Part {part}\n\nSummary: {writer.paragraph(1, 3)}\nConfidence: {chance.choice(('high', 'low'))}"
        hops.append({"speaker": f"mapper-{part:02d}", **agent, "result": text})
    return [*hops, {"speaker": "reducer", "result": writer.paragraph(6, 12)}]


def tables(chance: random.Random) -> list[Hop]:
    """One table per hop: the same columns, other figures."""
    columns = chance.sample(["region", "orders", "returns", "revenue", "visits", "errors", "latency"], 4)
    rows = chance.sample(["north", "south", "east", "west", "centre", "coast", "islands"], 5)
    form = chance.randrange(3)
    hops = []
    for month in range(chance.randint(6, 14)):
        figures = [[chance.randint(0, 9000) for _ in columns[1:]] for _ in rows]
        if form == 0:
            lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
            lines += [" | ".join([row, *map(str, line)]) for row, line in zip(rows, figures, strict=True)]
        elif form == 1:
            lines = [
                ",".join(columns),
                *(",".join([row, *map(str, line)]) for row, line in zip(rows, figures, strict=True)),
            ]
        else:
            lines = [
                json.dumps(dict(zip(columns, [row, *line], strict=True)))
                for row, line in zip(rows, figures, strict=True)
            ]
        title = f"Month {month + 1}\n" if chance.random() < 0.5 else ""
        hops.append({"speaker": "analyst", "result": title + "\n".join(lines)})
    return hops


def code(chance: random.Random) -> list[Hop]:
    """The functions of one module, one after the other."""
    modules = sorted((ROOT / "src" / "ksi").rglob("*.py"))
    while True:
        text = chance.choice(modules).read_text("utf-8")
        found = [
            ast.get_source_segment(text, node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        found = [function for function in found if len(function) > 80][:16]
        if len(found) >= 6:
            speakers = ["coder"] if chance.random() < 0.6 else ["coder", "typist"]
            return [
                {"speaker": speakers[turn % len(speakers)], "result": f"```python\n{function}\n```"}
                for turn, function in enumerate(found)
            ]


def documents(chance: random.Random) -> list[Hop]:
    """The sections of one document, one after the other."""
    pages = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    while True:
        parts = re.split(r"^(?=#)", chance.choice(pages).read_text("utf-8"), flags=re.MULTILINE)
        parts = [part.strip() for part in parts if len(part) > 60]
        if len(parts) >= 4:
            start = chance.randrange(max(1, len(parts) - 14))
            return [{"speaker": "writer", "result": part[:6000]} for part in parts[start : start + 14]]


FAULTS = (
    "ImportError: cannot import name '{}'", "TypeError: {} takes 2 positional arguments but 3 were given",
    "AssertionError: expected {} to be sorted", "KeyError: '{}'", "timeout while waiting for {}", "404 for /api/{}",
    "syntax error near '{}'", "permission denied: {}",
)  # fmt: skip


def debugging(chance: random.Random) -> list[Hop]:
    """Errors, but each another one; now and then the same twice."""
    writer = Writer(chance, "software")
    hops: list[Hop] = []
    fault = ""
    for turn in range(chance.randint(5, 9)):
        if turn == 0 or chance.random() < 0.85:
            fault = chance.choice(FAULTS).format(chance.choice(DETAILS) + "_" + chance.choice(DETAILS))
        hops.append(
            {"speaker": "tester", "result": f"Run {turn + 1} failed: {fault}. {chance.randint(3, 80)} tests passed."}
        )
        hops.append({"speaker": "coder", "result": f"I changed {writer.thing()}. {writer.paragraph(1, 3)}"})
        if chance.random() < 0.15:
            hops.append({"speaker": "tester", "error": "timeout", "message": "no answer within 600 s"})
    return [*hops, {"speaker": "tester", "result": "All tests pass."}]


def drafting(chance: random.Random) -> list[Hop]:
    """From a question to an outline to a draft to a text, or the way back to a headline."""
    writer = Writer(chance)
    full = [writer.sentence() for _ in range(chance.randint(24, 40))]
    outline = [f"{number}. {sentence.split('.')[0][:50]}" for number, sentence in enumerate(full[::4], 1)]
    steps = [writer.sentence(), "\n".join(outline), " ".join(full[::2]), " ".join(full)]
    steps += [
        " ".join([*full[: part * 4], *(writer.sentence() for _ in range(4)), *full[part * 4 :]]) for part in (1, 2)
    ]
    if chance.random() < 0.4:
        steps = [" ".join(full), writer.paragraph(5, 8), writer.paragraph(2, 3), writer.sentence()]
    return [{"speaker": "writer", "result": text} for text in steps]


def labels(chance: random.Random) -> list[Hop]:
    """Short answers to ever other questions: many are the same."""
    choices = chance.choice(
        (("spam", "not spam"), ("positive", "negative", "neutral"), ("yes", "no"), ("A", "B", "C", "D"))
    )
    writer = Writer(chance)
    return [
        {
            "speaker": "judge",
            "prompt": f"Which is it: {', '.join(choices)}? {writer.paragraph(1, 3)}",
            "result": chance.choice(choices),
        }
        for _ in range(chance.randint(8, 20))
    ]


def reports(chance: random.Random) -> list[Hop]:
    """One form, filled in anew each day by the same few."""
    writer = Writer(chance)
    speakers = chance.sample(["ann", "bo", "cy", "di"], chance.randint(1, 3))
    return [
        {
            "speaker": speakers[turn % len(speakers)],
            "result": (
                f"Status report\n\nDone: {writer.sentence()} {writer.sentence()}\nNext: {writer.sentence()}\n"
                f"Blocked by: {chance.choice(('nothing', 'nothing', writer.thing()))}\nHours: {chance.randint(2, 9)}"
            ),
        }
        for turn in range(chance.randint(6, 16))
    ]


def game(chance: random.Random) -> list[Hop]:
    """Two in a dialogue with short turns, some of which come again."""
    moves = [
        f"{piece}{column}{row}" for piece in ("", "N", "B", "R", "Q") for column in "abcdefgh" for row in range(1, 9)
    ]
    talk = ("Good move.", "Interesting.", "I did not see that.", "Your turn.", "Check!", "Hm.")
    hops = []
    for turn in range(chance.randint(10, 24)):
        said = chance.choice(moves) + (f". {chance.choice(talk)}" if chance.random() < 0.5 else "")
        hops.append({"speaker": ("white", "black")[turn % 2], "result": said})
    return hops


def tour(chance: random.Random) -> list[Hop]:
    """One agent that goes through all subjects in turn, in one form."""
    subjects = chance.sample(sorted(SUBJECTS), len(SUBJECTS))
    return [
        {"speaker": "guide", "result": f"Next subject: {name}. {Writer(chance, name).paragraph(3, 6)}"}
        for name in subjects
    ]


KINDS: dict[str, Callable[[random.Random], list[Hop]]] = {
    made.__name__: made
    for made in (
        research, polling, review, map_reduce, tables, code, documents,
        debugging, drafting, labels, reports, game, tour,
    )
}  # fmt: skip


def chains(seed: int, each: int) -> Iterator[dict[str, Any]]:
    """All of them: `each` of every kind."""
    for kind, make in KINDS.items():
        for number in range(each):
            chance = random.Random(f"{seed} {kind} {number}")
            source = "of this repository's files" if kind in {"code", "documents"} else "constructed"
            yield {
                "id": f"honest-{kind}-{number:03d}",
                "kind": kind,
                "origin": f"{source} by make_honest.py, seed {seed}",
                "runaway": False,
                "hops": make(chance),
            }


def main(out: Path, seed: int, each: int) -> None:
    made = list(chains(seed, each))
    out.write_text("".join(json.dumps(chain, ensure_ascii=False) + "\n" for chain in made), "utf-8")
    print(len(made), "chains in", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--each", type=int, default=20, help="chains of every kind")
    given = parser.parse_args()
    main(given.out, given.seed, given.each)
