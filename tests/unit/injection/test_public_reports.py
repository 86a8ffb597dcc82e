"""Situations that users of other products reported, played through the checks: what is stopped here, and what is not.

Each was told in an issue of its project; the texts are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from ksi.injection.fingerprint import mark_text
from ksi.request import State
from ksi.store.chains import Block, Hop
from tests.unit.injection.chain_facts import attempt, body, breaker, trail

pytestmark = pytest.mark.promise("C7")


def stopped(
    said: Sequence[tuple[str, str]], error: str | None = None, prompts: Sequence[str] = ()
) -> tuple[int, Block] | None:
    """The hop at which a chain of (speaker, text) is stopped, and why; with `error` all of them failed with it.
    `prompts` are what a client asked at each hop, where it did."""
    base = trail([("a", None)])
    hops: list[Hop] = []
    for depth, (speaker, text) in enumerate(said):
        state = State.COMPLETED if error is None else State.FAILED
        own = msgspec.structs.replace(
            base.hops[0], request_id=f"r{depth}", depth=depth, conversation=speaker, agent_id=speaker, state=state,
            error=error, mark=mark_text(prompts[depth]) if prompts else None,
        )  # fmt: skip
        done = attempt(text) if error is None else attempt(None, text)
        judged = breaker().judge_result(body(), done, error, msgspec.structs.replace(base, hops=(own, *hops)))
        if judged.block is not None:
            return depth, judged.block
        hops.insert(0, msgspec.structs.replace(own, result=judged.mark))
    return None


def one(*texts: str) -> list[tuple[str, str]]:
    """Results of one agent."""
    return [("a", text) for text in texts]


# -- what is not stopped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "poll", ["Status: running", "The background job is still running; nothing new yet.", "Der Auftrag läuft noch."]
)
def test_a_poll_that_gives_the_same_for_a_while_goes_on_until_it_is_over(poll: str) -> None:
    """https://github.com/StartupHakk/OpenMonoAgent.ai/issues/47, https://github.com/macanderson/stella/issues/359"""
    assert stopped(one(*[poll] * 7, "Done, exit code 0.")) is None


def test_a_poll_that_never_ends_is_stopped_all_the_same() -> None:
    """https://github.com/NorthlandPositronics/Cogtrix/pull/474"""
    end = stopped(one(*["Status: running"] * 30))
    assert end is not None
    assert end[0] <= 9


def test_a_poll_whose_figures_move_goes_on() -> None:
    """https://github.com/QwenLM/qwen-code/pull/9492"""
    assert stopped(one(*[f"Job 4711 is running: {5 * done} of 100 files." for done in range(15)])) is None


def test_one_file_after_the_other_goes_on() -> None:
    """https://github.com/google-gemini/gemini-cli/issues/5873"""
    names = ["Button", "Card", "Modal", "Table", "Input", "Select", "Tabs", "Badge", "Toast", "Menu"]
    moves = [f"Moved src/{name}.tsx to components/{name}.tsx, {n} imports updated." for n, name in enumerate(names, 2)]
    assert stopped(one(*moves)) is None


def test_a_search_for_one_name_after_the_other_goes_on_while_nothing_is_found() -> None:
    """https://github.com/zeroclaw-labs/zeroclaw/pull/10503"""
    names = ("Mira Oduya", "Jon Falk", "Petra Sands", "Lu Wen", "Ari Holm", "Tessa Brand", "Ivo Kern")
    assert stopped(one(*[f"Looked up {name} in the staff directory: no entry found." for name in names])) is None
    empty = "[]"
    assert stopped(one(*[empty] * 7), prompts=[f"Is {name} in the staff directory?" for name in names]) is None
    assert stopped(one(*[empty] * 7), prompts=["Is Jon Falk in the staff directory?"] * 7) is not None


def test_the_end_of_a_log_that_grows_goes_on() -> None:
    """https://github.com/QwenLM/qwen-code/pull/9492"""
    steps = (
        "resolve workspace", "fetch index", "unpack tokio", "compile syn", "compile quote", "compile serde",
        "compile hyper", "compile axum", "link server", "strip symbols", "run unit tests", "run doc tests",
        "pack image", "push image", "roll out canary", "watch error rate", "roll out all", "drain old pods",
        "close ticket", "send report", "archive logs", "tag release",
    )  # fmt: skip
    lines = [f"2026-05-01 10:{minute:02d}:00 INFO build {step}" for minute, step in enumerate(steps)]
    tails = ["\n".join(lines[end - 10 : end]) for end in range(10, len(lines) + 1)]
    assert stopped(one(*tails)) is None
    assert stopped(one(*["\n".join(lines[:end]) for end in range(10, len(lines) + 1)])) is None
    assert stopped(one(*[tails[0]] * 5)) is not None


# -- what is stopped --------------------------------------------------------------------------------------------------


def test_a_cycle_of_three_steps_is_stopped() -> None:
    """https://github.com/anomalyco/opencode/issues/47759, https://github.com/macanderson/stella/issues/359"""
    steps = ("parser.py: line 40 returns None.", "Edit failed: old string not found.", "pytest: test_empty got None.")
    end = stopped([("c", step) for _ in range(4) for step in steps])
    assert end is not None
    assert end[0] < 9


def test_two_agents_that_delegate_to_each_other_are_stopped() -> None:
    """https://github.com/crewAIInc/crewAI/issues/6414, https://github.com/langchain-ai/langgraph-swarm-py/issues/6"""
    words = ("I hand this to the writer: please write it.", "I hand this back: please gather the sources first.")
    end = stopped([("ab"[hop % 2], words[hop % 2]) for hop in range(10)])
    assert end is not None
    assert end[1].code == "cycle"


@pytest.mark.parametrize("error", [None, "invalid_request"])
def test_the_same_failing_query_is_stopped_at_its_third_time(error: str | None) -> None:
    """https://github.com/langchain-ai/langgraph/issues/6731
    https://github.com/OpenHands/software-agent-sdk/issues/4331"""
    end = stopped(one(*["Error: [REQUIRES_SINGLE_PART_NAMESPACE] got `x`.`y`."] * 5), error)
    assert end is not None
    assert (end[0], end[1].code) == (2, "error_loop")


def test_a_call_whose_result_is_the_time_does_not_hide_behind_it() -> None:
    """https://github.com/BaseIntelligence/bounty-challenge/issues/50173"""
    end = stopped(one(*[f"The current time is 2026-05-01T10:{minute:02d}:00Z." for minute in range(20)]))
    assert end is not None
    assert end[0] == 2


def test_other_thoughts_around_the_same_action_do_not_hide_it() -> None:
    """https://github.com/OpenHands/OpenHands/issues/15087"""
    thoughts = ("Let me look first.", "Maybe the listing helps.", "I should check.", "Looking again is wise.", "Hmm.")
    end = stopped(one(*[f"{thought} I run `ls -la src` and see 3 files: a.py, b.py, c.py." for thought in thoughts]))
    assert end is not None


def test_blank_messages_are_stopped() -> None:
    """https://github.com/microsoft/autogen/issues/108"""
    assert stopped([("ab"[hop % 2], "") for hop in range(8)]) is not None
