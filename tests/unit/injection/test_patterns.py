"""Marks and detectors, one by one; how well they do together is in test_chains_corpus.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksi.injection.fingerprint import SAMPLE, Mark, containment, likeness, mark_failure, mark_text, read_mark, sample
from ksi.injection.patterns import Step, Suspicion, assess
from tests.effort import effort

PLANS = (
    "The migration needs a backup of the index and a short pause of all writers.",
    "Our supplier in Lyon raised the price of copper, so the margin shrinks.",
    "Children understand tides sooner when they build a small harbour from sand.",
    "A replica that lags behind can still serve reports about last quarter.",
)


def mark(text: str) -> Mark:
    found = read_mark(mark_text(text))
    assert found is not None
    return found


def alike(one: str, other: str) -> float:
    return likeness(mark(one), mark(other))


def told(*said: tuple[str, str], agents: bool = False) -> Suspicion:
    return assess(
        [
            Step(speaker=f"conv-{n}" if agents else who, agent=who if agents else None, result=mark_text(text))
            for n, (who, text) in enumerate(said)
        ]
    )


def codes(suspicion: Suspicion, least: float = 0.7) -> list[str]:
    return [finding.code for finding in suspicion.findings if finding.weight >= least]


# -- marks ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("C7")
@settings(max_examples=effort(100, 1000), deadline=None)
@given(text=st.text(max_size=9000))
def test_a_mark_is_small_can_be_read_again_and_is_like_itself(text: str) -> None:
    data = mark_text(text)
    assert len(data) < 500
    found = read_mark(data)
    assert found is not None
    assert likeness(found, found) == 1.0
    assert found.length == len(text)


def test_at_most_four_kibibytes_of_a_text_are_read() -> None:
    text = "".join(f"word{n} " for n in range(10_000))
    assert len(sample(text)) <= SAMPLE + 2
    assert sample(text).startswith("word0 ")
    assert sample(text).endswith("word9999 ")


@pytest.mark.parametrize("data", [None, b"", b"\x00", b"\x92\x63\x90", b"junk", mark_text("x")[:-3]])
def test_a_mark_that_cannot_be_read_is_none(data: bytes | None) -> None:
    assert read_mark(data) is None


@pytest.mark.promise("C7")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("[2026-03-01 12:00:01] Waiting for you.", "[2026-03-02 09:10:44] Waiting for you."),
        ("Waiting for you (message 3).", "Waiting for you (message 4)."),
        ("Attempt 3: waiting for you.", "Attempt 4: waiting for you."),
        ("Waiting for you. id: 00ff00ff00ff00aa", "Waiting for you. id: 11ff00ff00ff00bb"),
        ("Waiting for you, took 3.1 s.", "Waiting for you, took 8.9 s."),
        ("Waiting for you #3", "Waiting for you #77"),
        ("Waiting at 1700000001 for you", "Waiting at 1700009999 for you"),
        ("Waiting for 3f2504e0-4f89-11d3-9a0c-0305e82c3301.", "Waiting for 6fa459ea-ee8a-3ca4-894e-db77e160355e."),
        ("WAITING for you!", "waiting, for you"),
    ],
)
def test_clocks_counters_and_ids_do_not_make_a_text_another_one(one: str, other: str) -> None:
    assert alike(one, other) == 1.0


@pytest.mark.promise("C7")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Progress: 45%.", "Progress: 46%."),
        ("3 of 10 pods are ready.", "4 of 10 pods are ready."),
        ("| north | 17 | 3.5 |", "| north | 18 | 3.9 |"),
        ('{"done": 17, "left": 83}', '{"done": 20, "left": 80}'),
    ],
)
def test_other_figures_are_another_result(one: str, other: str) -> None:
    assert alike(one, other) == 0.0


def test_a_part_is_contained_in_the_whole_and_strangers_are_not_alike() -> None:
    assert containment(mark(PLANS[0]), mark(" ".join(PLANS))) == 1.0
    assert alike(PLANS[0], PLANS[1]) < 0.2


def test_failures_are_alike_by_class_and_message() -> None:
    one, same, other = (
        read_mark(mark_failure(error, message))
        for error, message in (("timeout", "no answer"), ("timeout", "no answer"), ("overloaded", "no answer"))
    )
    assert one is not None
    assert same is not None
    assert other is not None
    assert likeness(one, same) == 1.0
    assert likeness(one, other) == 0.0
    assert likeness(one, mark("no answer")) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        PLANS[0] + " " + "I will check again. " * 30,
        "Start.\n" + "\n".join(f"{n}. Collect the data." for n in range(40)),
        "so " * 300,
        ("First the one. Then the other. " * 20),
    ],
)
def test_a_text_that_goes_round_in_itself_is_seen(text: str) -> None:
    assert mark(text).looped >= 50


@pytest.mark.parametrize(
    "text",
    [
        " ".join(PLANS),
        "\n".join(f"{n},{n * n},ok" for n in range(200)),
        "|---|---|---|\n" * 3 + "\n".join(f"| row {n} | {n} | 0 |" for n in range(60)),
        "\n".join("0,0,0,0,0,0" for _ in range(100)),
        "\n".join(f'{{"id": {n}, "status": "ok", "errors": []}}' for n in range(80)),
        "=" * 400,
    ],
)
def test_tables_and_rules_do_not_go_round_in_themselves(text: str) -> None:
    assert mark(text).looped < 50


# -- detectors --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("C7")
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_a_round_of_any_length_is_seen_in_its_third_time_at_the_latest(length: int) -> None:
    said = [
        (f"s{n % length}", f"{PLANS[n % length % 4]} That is point {'abcdefghijklm'[n % length]}.")
        for n in range(3 * length)
    ]
    assert codes(told(*said[: length + 1])) == []
    assert codes(told(*said)) == ["repetition" if length == 1 else "cycle"]


@pytest.mark.promise("C7")
def test_a_loop_of_the_same_agents_in_ever_new_conversations_is_seen() -> None:
    said = [(f"agent-{n % 2}", PLANS[n % 2]) for n in range(6)]
    assert codes(told(*said, agents=True)) == ["cycle"]


@pytest.mark.promise("C7")
def test_equal_small_answers_of_one_agent_to_many_tasks_are_no_loop() -> None:
    assert codes(told(*[("mapper", "No issues found.")] * 20, agents=True)) == []


@pytest.mark.promise("C7")
def test_equal_answers_of_fifty_speakers_in_few_words_are_no_loop() -> None:
    assert codes(told(*[(f"mapper-{n}", f"Part {n} of 50: nothing to report.") for n in range(50)])) == []


@pytest.mark.promise("C7")
def test_one_long_text_from_one_speaker_after_the_other_is_a_repetition() -> None:
    said = [(f"conv-{n}", " ".join(PLANS)) for n in range(5)]
    assert codes(told(*said[:4])) == []
    assert codes(told(*said)) == ["repetition"]
    assert codes(told(*[(f"conv-{n}", "No issues were found in this part of the document.") for n in range(50)])) == []


@pytest.mark.promise("C7")
def test_the_same_call_with_another_result_is_no_loop() -> None:
    assert codes(told(*[("watcher", f"The job is running: {n * 3} of 100 files are done.") for n in range(30)])) == []


@pytest.mark.promise("C7")
def test_short_equal_answers_to_other_questions_are_no_loop() -> None:
    def steps(*asked: str) -> list[Step]:
        return [Step(speaker="judge", prompt=mark_text(text), result=mark_text("Positive.")) for text in asked]

    assert codes(assess(steps(*PLANS))) == []
    assert codes(assess(steps(*[PLANS[0]] * 4))) == ["repetition"]


@pytest.mark.promise("C7")
def test_drafts_of_one_text_with_comments_that_differ_are_no_loop() -> None:
    said = []
    for n, plan in enumerate(PLANS):
        said += [("author", " ".join(PLANS) + f" Ending {['one', 'two', 'three', 'four'][n]}."), ("critic", plan)]
    assert codes(told(*said)) == []


@pytest.mark.promise("C7")
def test_one_error_in_ever_other_company_is_an_error_loop() -> None:
    said = []
    for plan in PLANS[:3]:
        said += [("tester", "Error: could not open file report.csv: permission denied."), ("coder", plan)]
    assert codes(told(*said[:-1])) == ["error_loop"]
    assert codes(told(*said[:3])) == []


@pytest.mark.promise("C7")
def test_runaway_growth_and_collapse_are_seen_and_a_draft_that_gets_longer_once_is_not() -> None:
    words = [f"{plan.split()[n % 5]}{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600) for plan in PLANS[:1]]
    sizes = (40, 80, 160, 320)
    growing = [("a", " ".join(words[:size])) for size in sizes]
    assert codes(told(*growing)) == ["growth"]
    assert codes(told(*growing[:2])) == []
    assert codes(told(*[("a", " ".join(words[:size])) for size in (40, 320, 360, 400)])) == []
    shrinking = [("a", " ".join(words[:size])) for size in (120, 60, 25, 10)]
    assert codes(told(*shrinking)) == ["collapse"]


@pytest.mark.promise("C7")
def test_texts_that_loop_in_themselves_are_a_collapse_from_the_second_on() -> None:
    looping = [("a", plan + " And again." * 40) for plan in PLANS]
    assert codes(told(("a", PLANS[2]), looping[0])) == []
    assert codes(told(("a", PLANS[2]), *looping[:2])) == ["collapse"]


@pytest.mark.promise("C7")
@settings(max_examples=effort(60, 600), deadline=None)
@given(
    said=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([*PLANS, "", "OK.", "Error: no.", "x" * 5000])), max_size=20
    )
)
def test_whatever_is_said_has_findings_with_weights_and_words_the_heaviest_first(said: list[tuple[str, str]]) -> None:
    found = told(*said).findings
    assert [finding.weight for finding in found] == sorted((finding.weight for finding in found), reverse=True)
    assert len({finding.code for finding in found}) == len(found)
    for finding in found:
        assert 0 < finding.weight < 1
        assert finding.words
