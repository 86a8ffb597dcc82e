"""Results are judged by what their sentences say: how they are read, what is measured, and what is said of a chain."""

from __future__ import annotations

from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.corpus import CORPUS, read_corpus
from ksi.injection.fingerprint import mark_text, read_mark, with_sentences
from ksi.injection.meaning import tones
from ksi.injection.meaning.features import Result, measure, window
from ksi.injection.meaning.model import judge, learned
from ksi.injection.meaning.sentences import MOST, MOST_LINES, Piece, read_sentences

THANKS = [
    "Great, thank you. Thursday is a really good choice.",
    "Thank you! I'm happy that we decided this together so quickly.",
    "It is always a pleasure when things fall into place like this.",
    "Your quick reaction was just as valuable, I appreciate that a lot.",
    "Absolutely, I'm all for keeping this spirit. We make a fine team.",
    "We do! Thanks again for everything, and for your trust.",
    "I'm looking forward to the next time, thank you for yours.",
    "So am I. It was wonderful, and I agree with all of it once more.",
]
WORK = [
    "The import opens a connection for each of the 180,000 rows, 38 ms each.",
    "One shared connection on a copy: 11 minutes instead of two hours.",
    "70 % of the rest is validate_iban, which compiles its regex per call.",
    "Compiled once at module level: 4 min 20 s. Next is the commit after each row.",
    "Commits of 500 rows: 58 s. Member number 40117 is there twice.",
    "Both entries are of the merger with Lund; the later one counts since 2019.",
    "14 such pairs are in the log, sent to the office for cleaning.",
    "Deployed last night: 61 s, 180,212 rows. Alert above five minutes.",
]


def results(texts: list[str]) -> list[Result]:
    return [
        Result(speaker, tuple(piece.sentence for piece in read_sentences(text)))
        for speaker, text in zip(cycle("ab"), texts, strict=False)
    ]


def texts_of(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


@pytest.mark.promise("C7")
def test_code_tables_and_logs_are_lines_of_their_own_kind() -> None:
    text = (
        "The query scans the table. Is there an index?\n```\nSELECT id FROM docs;\nrows 20\n```\n"
        "| field | value |\n| core temperature | 58 |\n2024-03-11 08:02:19 ERROR pool is full\nIt was not used."
    )
    pieces = read_sentences(text)
    prose = [piece for piece in pieces if not piece.sentence.formal]
    assert texts_of(prose) == ["The query scans the table.", "Is there an index?", "It was not used."]
    assert [piece.sentence.question for piece in prose] == [False, True, False]
    assert len(pieces) == 8


def test_chinese_sentences_end_at_their_own_stops() -> None:
    assert len(read_sentences("报表任务六点启动。问题在哪里？我们不知道。")) == 3


def test_a_value_that_changes_by_itself_is_no_fact() -> None:
    one, other = (read_sentences(f"Run of {when}: 14 rows were kept.")[0] for when in ("10:41:07", "10:52:33"))
    assert one.sentence.facts == other.sentence.facts != ""


@given(st.text(max_size=3000))
def test_any_text_is_read_within_its_bounds_and_kept_in_its_mark(text: str) -> None:
    said = tuple(piece.sentence for piece in read_sentences(text))
    assert len(said) <= MOST + MOST_LINES
    mark = read_mark(with_sentences(mark_text(text), said))
    assert mark is not None
    assert mark.said == said


@pytest.mark.parametrize(
    ("text", "tone"),
    [
        ("Thank you for catching it.", tones.THANKS),
        ("Vielen Dank dafür!", tones.THANKS),
        ("非常感谢你的安排。", tones.THANKS),
        ("In other words, the bucket is too small.", tones.RESTATEMENT),
        ("Estoy totalmente de acuerdo.", tones.APPROVAL),
        ("We should define a protocol for our collaboration.", tones.PROCESS),
        ("Removed the lock and measured again.", tones.REPORT),
    ],
)
def test_the_tone_of_a_sentence_is_heard_in_several_languages(text: str, tone: int) -> None:
    assert read_sentences(text)[0].sentence.tone & tone


def test_a_result_is_compared_with_all_earlier_texts() -> None:
    first, again, other = measure(
        (), results(["Pod 5 runs build 7781.", "Build 7781 is what pod 5 runs.", "The bank closed 17 orders."])
    )
    assert first.new_words == 1.0
    assert again.new_words == 0.0
    assert again.fact_news == 0.0
    assert other.fact_news == 1.0
    assert other.overlap < again.overlap


def test_a_chain_of_few_results_is_not_judged() -> None:
    assert window((), results(THANKS[:3])) is None
    assert judge(learned(), (), results(THANKS[:3])) is None


@pytest.mark.promise("C7")
def test_thanks_without_content_weigh_more_than_work() -> None:
    task = tuple(piece.sentence for piece in read_sentences("Decide whether the newsletter goes out on Thursday."))
    astray, honest = judge(learned(), task, results(THANKS)), judge(learned(), task, results(WORK))
    assert astray is not None
    assert astray.weight > (honest.weight if honest is not None else 0.0)
    assert "without getting on" in astray.words


def test_the_written_chains_name_their_speakers_and_their_turning_points() -> None:
    written = [chain for chain in read_corpus(CORPUS) if chain.written]
    assert len([chain for chain in written if chain.runaway]) >= 60
    assert all(0 < chain.loop_from < len(chain.hops) for chain in written if chain.runaway)
    assert all(chain.hops[0].prompt for chain in written)
    assert {hop.error for chain in written for hop in chain.hops} == {None, "provider"}
