"""Makes the part of the corpus that a model really wrote: SmolLM2 talks to itself and to others, for many hops.

    python benchmarks/chains/make_local.py local.jsonl --chains 90

Each line gets a label by a rule that knows nothing of KSI's own checks (`label`): it compares whole texts, character by
character. Chains that the rule cannot tell are kept with `"runaway": null` and do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.fuzz import ratio

from ksi.clock import SystemClock
from ksi.content.blocks import Message
from ksi.providers.base import Call, Completion, Setting
from ksi.providers.local import LocalProvider, Options

KEPT = 4
"""Messages of its own conversation that a speaker sees."""
SUBJECTS = (
    "how tides work", "why leaves turn red", "how bread rises", "what makes a good map", "how a lock on a canal works",
    "why the sky is blue", "how bees find flowers", "how paper is made", "why glass is clear", "how a bicycle stays up",
    "what causes thunder", "how cheese is made", "how to plan a garden", "why ships float", "how a clock keeps time",
    "how coral grows", "what a library is for", "how rivers make valleys", "why we dream", "how to teach chess",
    "how wool becomes cloth", "why salt melts ice", "how a piano makes sound", "how birds navigate",
)  # fmt: skip
ASPECTS = (
    "Explain {}.", "Name three materials or tools that matter for this: {}.", "Tell a short story about {}.",
    "What do people often get wrong about {}?", "Who was important in the history of {}?",
    "Give a recipe or a list of steps for {}.", "What would a child ask about {}?", "Write two lines of verse on {}.",
    "What does {} cost, and who pays?", "Compare {} with how it was a hundred years ago.", "What is dangerous in {}?",
    "Where in the world would you go to see {}?",
)  # fmt: skip
ROLES = (
    "You are a helpful assistant. Answer in two or three sentences.",
    "You are a reviewer. Answer in two or three sentences.",
    "You are a planner. Say what to do next in two or three sentences.",
)


class Plan:
    """One chain to be made: who speaks, about what, how freely."""

    def __init__(self, number: int) -> None:
        self.kind = ("self_talk", "pair_talk", "interview", "triangle_talk")[number % 4]
        self.speakers = {"self_talk": 1, "pair_talk": 2, "triangle_talk": 3, "interview": 1}[self.kind]
        self.subject = SUBJECTS[(number * 7) % len(SUBJECTS)]
        self.temperature = (0.0, 0.8, 0.4)[(number // 4) % 3]
        self.name = f"local-{number:03d}-{self.kind}"


def asked(plan: Plan, hop: int, last: str) -> str:
    """What a hop's speaker is given: an interview's next question, else what was said last."""
    if plan.kind == "interview":
        subject = SUBJECTS[(SUBJECTS.index(plan.subject) + hop // 4) % len(SUBJECTS)]
        return ASPECTS[hop % len(ASPECTS)].format(subject)
    return f"Let us talk about {plan.subject}. What should we look at?" if hop == 0 else last


async def make(provider: LocalProvider, plan: Plan, length: int, tokens: int) -> dict[str, Any]:
    """Let one chain run for `length` hops of at most so many tokens."""
    memories: list[list[Message]] = [[] for _ in range(plan.speakers)]
    hops, last = [], ""
    for hop in range(length):
        who = hop % plan.speakers
        memory = memories[who]
        memory.append(Message("user", asked(plan, hop, last)))
        last = await answer(provider, plan, hop, who, memory[-KEPT - 1 :], tokens)
        memory.append(Message("assistant", last))
        hops.append({"speaker": f"agent-{who}", "result": last})
    return {
        "id": plan.name,
        "kind": plan.kind,
        "origin": (
            f"SmolLM2-135M-Instruct by make_local.py, {tokens} tokens, temperature {plan.temperature}, {plan.subject}"
        ),
        **label(hops, plan.speakers),
        "hops": hops,
    }


async def answer(
    provider: LocalProvider, plan: Plan, hop: int, who: int, memory: Sequence[Message], tokens: int
) -> str:
    """One turn."""
    call = Call(
        request_id=f"{plan.name}/{hop}",
        attempt=1,
        conversation=f"{plan.name}/{who}",
        model="smollm2",
        messages=memory if memory[0].role == "user" else memory[1:],
        system=ROLES[who],
        max_tokens=tokens,
        temperature=plan.temperature,
        stream=True,
    )
    async for piece in provider.complete(call):
        if isinstance(piece, Completion):
            return piece.text
    raise SystemExit("the model gave no answer")


def label(hops: Sequence[dict[str, str]], speakers: int) -> dict[str, Any]:
    """What a chain is, by its whole texts.

    Runaway: from some hop on to the end, at least two rounds long, each text is nearly (90 of 100 characters) the text
    one or two rounds before it; it began where near twins begin. Or three texts in a row are for the greater part one
    sentence said again. Honest: no two texts of one speaker are more than 60 of 100 alike, and none says a sentence
    three times. Else unclear.
    """
    texts = [hop["result"].lower() for hop in hops]
    for length in (speakers, 2 * speakers):
        first = len(texts)
        while first > length and ratio(texts[first - 1], texts[first - 1 - length]) >= 90:
            first -= 1
        if len(texts) - first >= 2 * length:
            return {"runaway": True, "loop_from": beginning(texts, first - length, 2 * speakers), "round": length}
    for number in range(len(texts) - 2):
        if all(map(babbles, texts[number : number + 3])):
            return {"runaway": True, "loop_from": number, "round": 1}
    if max(pairs(texts, speakers), default=0.0) <= 60 and not any(map(repeats_itself, texts)):
        return {"runaway": False}
    return {"runaway": None}


def beginning(texts: Sequence[str], loop: int, reach: int) -> int:
    """Where it began: a loop may change its length. The first text from which on each has a near twin not far off."""
    while loop and any(
        ratio(texts[loop - 1], other) >= 90
        for other in [*texts[loop : loop + reach], *texts[max(0, loop - 1 - reach) : loop - 1]]
    ):
        loop -= 1
    return loop


def pairs(texts: Sequence[str], speakers: int) -> Iterator[float]:
    """The likeness of every two texts of one speaker, of 100."""
    for later, text in enumerate(texts):
        for earlier in range(later - speakers, -1, -speakers):
            yield ratio(text, texts[earlier])


def sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[.!?\n]+", text) if len(part.strip()) > 3]


def babbles(text: str) -> bool:
    said = sentences(text)
    return len(said) >= 3 and max(map(said.count, said)) * 2 > len(said)


def repeats_itself(text: str) -> bool:
    said = sentences(text)
    return any(said.count(one) >= 3 for one in said)


async def main(out: Path, numbers: range, length: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        setting = Setting(name=out.stem, clock=SystemClock(), home=Path(home), log_dir=out.parent, environ=os.environ)
        provider = LocalProvider(setting, Options(parallel=2, context_tokens=2048, threads=1))
        await provider.start()
        try:
            await fill(out, provider, numbers, length, tokens)
        finally:
            await provider.stop()


async def fill(out: Path, provider: LocalProvider, numbers: range, length: int, tokens: int) -> None:
    """Make the chains, two at a time, and append each to the file when it is made."""
    todo = iter(numbers)
    with out.open("a", encoding="utf-8") as file:

        async def worker() -> None:
            for number in todo:
                chain = await make(provider, Plan(number), length, tokens)
                file.write(json.dumps(chain, ensure_ascii=False) + "\n")
                file.flush()
                print(chain["id"], chain["runaway"], flush=True)

        await asyncio.gather(worker(), worker())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--chains", type=int, default=90)
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--hops", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40, help="of one answer, at most")
    given = parser.parse_args()
    asyncio.run(main(given.out, range(given.first, given.first + given.chains), given.hops, given.tokens))
