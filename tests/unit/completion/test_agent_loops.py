"""Loops of successes: what is told as one, what is honest work, and what it is told with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import pytest

from ksi.completion.notify.agent_loops import TOLD_FOR, Answered, Loop, LoopWatch
from ksi.config.schema import Loops

RULES = Loops(repeats=100, turns=200, pause=30.0)
SECOND = 1_000_000


class Agent:
    """Asks, and is answered after a while, on a time of its own."""

    def __init__(self, rules: Loops = RULES, name: str = "a") -> None:
        self.watch = LoopWatch(rules)
        self.name = name
        self.now = 1_700_000_000 * SECOND
        self.told: list[Loop] = []

    def one(self, text: str, *, session: str | None = None, pause: float = 0.1, took: float = 1.0) -> None:
        """One request, sent `pause` seconds after the last answer."""
        sent = self.now + int(pause * SECOND)
        self.now = sent + int(took * SECOND)
        self.take(text, sent, session)

    def row(self, texts: Iterable[str], sessions: Sequence[str | None] = (None,), pause: float = 0.1) -> None:
        """One request after the other, to each of these conversations in turn."""
        for text, session in zip(texts, cycle(sessions), strict=False):
            self.one(text, session=session, pause=pause)

    def at_once(self, texts: Iterable[str], session: str | None = None) -> None:
        """All of them are sent at once, and are answered one after the other."""
        sent = self.now
        for text in texts:
            self.now += SECOND // 100
            self.take(text, sent, session)

    def window(self, texts: Iterable[str], size: int) -> None:
        """So many are under way at a time; each answer lets the next one be sent."""
        sent = [self.now] * size
        for text in texts:
            self.now += SECOND // 100
            self.take(text, sent.pop(0), None)
            sent.append(self.now)

    def take(self, text: str, sent: int, session: str | None) -> None:
        self.told += self.watch.answered(
            Answered(
                request_id=f"r{self.now}",
                agent_id=self.name,
                conversation=session or f"new{self.now}",
                goes_on=session is not None,
                sent_at=sent,
                ended_at=self.now,
                tokens=1000,
                cost_usd=0.01,
            ),
            lambda: text,
        )


SAME: dict[str, Callable[[int], str]] = {
    "to the letter": lambda _: "Check the status and try again.",
    "with the time": lambda n: f"It is 12:{n % 60:02}. Check the status and try again.",
    "with a count": lambda n: f"Attempt {n}: check the status and try again.",
    "with an id": lambda n: f"Check the status of job {n * 7919:032x}aa and try again.",
    "long": lambda _: "Check the status of each of these. " * 1000,
}


@pytest.mark.promise("R4")
@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_an_agent_that_asks_the_same_in_ever_new_conversations_is_reported(text: Callable[[int], str]) -> None:
    agent = Agent()
    for number in range(RULES.repeats * 3 // 2):
        agent.one(text(number))
    (loop,) = agent.told
    assert (loop.kind, loop.agent_id, loop.session_id, loop.requests) == ("repeats", "a", None, RULES.repeats)
    assert loop.tokens == 100_000
    assert loop.cost_usd == pytest.approx(1.0)
    assert "agent 'a' asked the same 100 times in new conversations" in loop.said()
    assert "100,000 tokens and $1.00" in loop.said()
    assert f"ksi show {loop.request_id}" in loop.said()


@pytest.mark.promise("R4")
def test_a_crowd_that_waits_for_its_answers_and_asks_again_is_reported() -> None:
    agent = Agent()
    for _ in range(20):
        agent.at_once(["Check the status."] * 200)
    assert [loop.kind for loop in agent.told] == ["repeats", "repeats"], "at the tenth round, and at the double"


@pytest.mark.promise("R4")
def test_workers_that_ask_the_same_side_by_side_are_reported() -> None:
    agent = Agent()
    agent.window(["Check the status."] * 400, 16)
    assert agent.told[0].requests >= RULES.repeats


@pytest.mark.promise("R4")
def test_a_conversation_that_never_comes_to_its_end_is_reported_whatever_its_content() -> None:
    agent = Agent()
    for number in range(RULES.turns + 1):
        agent.one(f"Now look at the {number * 7919 % 10007} next things", session="s")
    (loop,) = agent.told
    assert (loop.kind, loop.session_id) == ("turns", "s")
    assert "sent a turn 200 times in conversation 's'" in loop.said()


@pytest.mark.promise("R4")
def test_a_conversation_that_gets_the_same_again_and_again_is_reported() -> None:
    agent = Agent()
    for _ in range(RULES.turns - 1):
        agent.one("continue", session="s")
    (loop,) = agent.told
    assert (loop.kind, loop.session_id) == ("repeats", "s")


HONEST: dict[str, Callable[[Agent], None]] = {
    "a batch sent at once": lambda a: a.at_once(f"Translate line {n}: {n * 7919}" for n in range(10_000)),
    "the same asked 10,000 times at once": lambda a: a.at_once(["Name a colour"] * 10_000),
    "a batch in a window": lambda a: a.window((f"Translate page {n * 7919}" for n in range(10_000)), 16),
    "one after the other": lambda a: a.row(f"Summarise document {n} of 5000" for n in range(5_000)),
    "a long batch in one conversation": lambda a: a.at_once((f"Row {n * 7919}" for n in range(10_000)), "s"),
    "a look every minute": lambda a: a.row(["Anything new?"] * 5_000, pause=60.0),
    "a talk with pauses": lambda a: a.row(["go on"] * 5_000, ["s"], pause=31.0),
    "one word to many conversations": lambda a: a.row(["go on"] * 5_000, [f"s{n}" for n in range(60)]),
}


@pytest.mark.promise("R4")
@pytest.mark.parametrize("work", HONEST.values(), ids=HONEST)
def test_honest_work_is_not_reported(work: Callable[[Agent], None]) -> None:
    agent = Agent(Loops())
    work(agent)
    assert agent.told == []
    assert agent.watch.standing(agent.now) == []


def test_a_loop_is_reported_again_at_each_doubling_and_stays_until_it_has_been_over_for_long() -> None:
    agent = Agent()
    for _ in range(RULES.repeats // 2 + 500):
        agent.one("Check the status.")
    assert [loop.requests for loop in agent.told] == [100, 200, 400]
    (stands,) = agent.watch.standing(agent.now)
    assert (stands.requests, stands.last_at) == (501, agent.now), "as it stands now"
    assert agent.watch.standing(agent.now + TOLD_FOR) == [stands]
    assert agent.watch.standing(agent.now + TOLD_FOR + 1) == []


def test_a_pause_restarts_the_count() -> None:
    agent = Agent()
    for _ in range(4):
        for _ in range(RULES.repeats * 3 // 2 - 2):
            agent.one("Check the status.")
        agent.now += 31 * SECOND
    assert agent.told == []


def test_a_bound_of_nothing_switches_a_look_off() -> None:
    agent = Agent(Loops(repeats=0, turns=0))
    for _ in range(3000):
        agent.one("Check the status.", session="s")
        agent.one("Check the status.")
    assert agent.told == []


def test_an_unknown_cost_is_not_reported() -> None:
    loop = Loop(
        kind="repeats",
        agent_id="",
        session_id=None,
        requests=5,
        began_at=0,
        last_at=0,
        tokens=7,
        cost_usd=None,
        request_id="r",
    )
    assert loop.said().startswith("an unnamed agent asked the same 5 times")
    assert "$" not in loop.said()
