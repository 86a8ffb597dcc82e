"""The corpus of chains: what a chain is, and how the files of `benchmarks/chains/` are read.

Chains that were written by hand are text, one after the other:

    @ paraphrase runaway 2 en ana,ben        kind, label, first hop without news (of a runaway), language, who speaks
    ? Why does the import take two hours?    the task
    - It opens a connection for each row.    what the first of them answered, then the next in turn ...
      A second line of it.
    -! Port 7070 is closed.                  ... and a request that failed
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import msgspec

from ksi.errors import InvalidData

CORPUS = Path(__file__).with_name("chains")
PARTS = ("tune", "held_back")
WRITTEN = "written"
"""The folder of the chains that were written by hand."""


class CorpusHop(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a chain: who, what was asked where it is no other's result, what came or why nothing did."""

    speaker: str
    """Its conversation."""
    agent: str | None = None
    result: str | None = None
    prompt: str | None = None
    error: str | None = None
    message: str = ""


class CorpusChain(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the corpus."""

    id: str
    kind: str
    origin: str
    """Where it comes from."""
    runaway: bool | None
    """None: its label is unclear, it does not count."""
    hops: tuple[CorpusHop, ...]
    loop_from: int = 0
    """Where it goes astray, of a runaway."""
    round: int = 1
    """Hops in one round of its loop."""

    @property
    def part(self) -> str:
        """`tune` or `held_back`: of the chains that were written by hand a quarter is held back, of the others half."""
        place = sha256(self.id.encode()).digest()[0]
        return PARTS[place % 4 == 0] if self.written else PARTS[place % 2]

    @property
    def written(self) -> bool:
        """Whether it was written by hand."""
        return self.origin.startswith(WRITTEN)

    @property
    def constructed(self) -> bool:
        """Whether its loop was made by construction."""
        return self.id.startswith("constructed-")


def read_corpus(folder: Path) -> list[CorpusChain]:
    """All chains of the folder's `*.jsonl` and of its `written/*.txt`, in the order of the files' names.

    Raises:
        InvalidData: a line that is no chain, or no chain at all.
    """
    chains: list[CorpusChain] = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                chains.append(msgspec.json.decode(line, type=CorpusChain))
            except msgspec.DecodeError as error:
                raise InvalidData(f"{file}, line {number}: {error}", path=str(file)) from None
    for file in sorted((folder / WRITTEN).glob("*.txt")):
        chains += read_written(file)
    if not chains:
        raise InvalidData(f"{folder} has no chains: give the folder of the corpus", path=str(folder))
    return chains


def read_written(file: Path) -> Iterator[CorpusChain]:
    """All chains of one file.

    Raises:
        InvalidData: a line that is none of those above.
    """
    chain: list[tuple[int, str]] = []
    number = 0
    for place, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if line.startswith("@ ") and chain:
            yield _chain(file, number, chain)
            chain, number = [], number + 1
        if line or chain:
            chain.append((place, line))
    if chain:
        yield _chain(file, number, chain)


def _chain(file: Path, number: int, lines: list[tuple[int, str]]) -> CorpusChain:
    (place, head), *rest = lines
    words = head.split()
    runaway = words[2:3] == ["runaway"]
    if len(words) != (6 if runaway else 5) or words[0] != "@" or (runaway and not words[3].isdigit()):
        raise InvalidData(
            f"{file}, line {place}: a chain begins with '@ kind runaway ONSET language speakers' or "
            "'@ kind honest language speakers'",
            path=str(file),
        )
    task, said = _read(file, rest)
    speakers = cycle(words[-1].split(","))
    hops = [
        CorpusHop(
            speaker=f"{speaker}'s",
            agent=speaker,
            prompt=task if not turn else None,
            result=None if failed else text,
            error="provider" if failed else None,
            message=text if failed else "",
        )
        for turn, (speaker, (failed, text)) in enumerate(zip(speakers, said, strict=False))
    ]
    return CorpusChain(
        id=f"{WRITTEN}-{file.stem}-{number:03d}",
        kind=words[1],
        origin=f"{WRITTEN}: {file.stem}",
        runaway=runaway,
        hops=tuple(hops),
        loop_from=int(words[3]) if runaway else 0,
    )


def _read(file: Path, lines: list[tuple[int, str]]) -> tuple[str, list[tuple[bool, str]]]:
    """The task, and of each hop whether it failed, and its text."""
    task: str | None = None
    said: list[tuple[bool, list[str]]] = []
    for place, line in lines:
        if line.startswith("? ") and task is None:
            task = line[2:]
        elif line.startswith(("- ", "-! ")) and task is not None:
            failed = line.startswith("-!")
            said.append((failed, [line[3:] if failed else line[2:]]))
        elif line.startswith("  ") and said:
            said[-1][1].append(line[2:])
        elif line.strip():
            raise InvalidData(
                f"{file}, line {place}: begins with none of '@ ', '? ', '- ', '-! ', '  '", path=str(file)
            )
    if task is None or not said:
        raise InvalidData(f"{file}, line {lines[0][0] if lines else 0}: a chain without a task or hops", path=str(file))
    return task, [(failed, "\n".join(text)) for failed, text in said]
