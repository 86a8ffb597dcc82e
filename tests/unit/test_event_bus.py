"""Who hears of what."""

from __future__ import annotations

import asyncio
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksi.errors import InvalidData
from ksi.events.bus import AT_ONCE, CHUNK, ENDINGS, LOCKED, RESULT, SLICE, EventBus, News
from ksi.testing import SimulatedClock, settle_down

PROGRESS = "completion:progress"
NAMES = (RESULT, CHUNK, LOCKED, PROGRESS, "provider:state_changed")


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def heard(self) -> list[dict[str, Any]]:
        """What was pushed since the last look, as JSON."""
        found = [msgspec.json.decode(line) for line in self.lines]
        self.lines.clear()
        return found

    def names(self) -> list[str]:
        return [event["event"] for event in self.heard()]


@pytest.fixture
def bus() -> EventBus:
    return EventBus(SimulatedClock(wall=1_800_000_000.5))


# -- subscribers ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R4")
def test_an_event_goes_over_the_wire_as_one_line_with_name_data_and_time(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, ["*"])
    bus.publish(PROGRESS, {"text": "two\nlines"})
    (line,) = ear.lines
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert ear.heard() == [{"event": PROGRESS, "data": {"text": "two\nlines"}, "timestamp": 1_800_000_000.5}]


@pytest.mark.promise("R4")
@pytest.mark.parametrize("known", [(), NAMES], ids=["names are new", "names are known"])
@given(
    patterns=st.lists(
        st.sampled_from(
            ["*", "completion:*", RESULT, "*:result", "conversation:lock*", "nothing", "**", "*o*e*", "c*n*n"]
        )
        | st.text("*:comletinrs")
    ),
    name=st.sampled_from(NAMES),
)
def test_a_listener_gets_an_event_once_exactly_if_one_of_its_patterns_matches(
    known: tuple[str, ...], patterns: list[str], name: str
) -> None:
    bus, ear = EventBus(SimulatedClock(), names=known), Ear()
    if patterns:
        bus.subscribe(ear, patterns)
    bus.publish(name, {})
    wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
    assert len(ear.lines) == (1 if wanted else 0)
    assert bus.wanted(name) == wanted


@pytest.mark.promise("R4", "O9")
def test_a_listener_has_a_hundred_patterns_at_most_and_keeps_those_that_it_has(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, [f"name{number}" for number in range(99)] + [RESULT])
    bus.subscribe(ear, [RESULT])
    with pytest.raises(InvalidData, match="at most 100"):
        bus.subscribe(ear, [CHUNK])
    bus.publish(CHUNK, {})
    bus.publish(RESULT, {})
    assert ear.names() == [RESULT]
    bus.unsubscribe(ear, ["name7"])
    bus.subscribe(ear, [CHUNK])
    bus.publish(CHUNK, {})
    assert ear.names() == [CHUNK]


@pytest.mark.promise("R4")
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["subscribe", "unsubscribe"]),
            st.integers(0, 2),
            st.lists(st.sampled_from(["*", "completion:*", RESULT, CHUNK, "*:result"]), min_size=1),
        )
    )
)
def test_in_any_order_the_receivers_are_the_subscribers(steps: list[tuple[str, int, list[str]]]) -> None:
    bus, ears = EventBus(SimulatedClock(), names=NAMES[:2]), [Ear(), Ear(), Ear()]
    wanted: list[set[str]] = [set(), set(), set()]
    for step, place, patterns in steps:
        if step == "subscribe":
            bus.subscribe(ears[place], patterns)
            wanted[place].update(patterns)
        else:
            bus.unsubscribe(ears[place], patterns)
            wanted[place].difference_update(patterns)
        for name in NAMES:
            bus.publish(name, {})
            heard = [ear.names() for ear in ears]
            assert heard == [[name] * any(fnmatchcase(name, pattern) for pattern in mine) for mine in wanted]


def test_patterns_of_two_calls_add_up_and_are_returned(bus: EventBus) -> None:
    ear = Ear()
    assert bus.subscribe(ear, [RESULT]) == [RESULT]
    assert bus.subscribe(ear, [CHUNK, RESULT]) == [RESULT, CHUNK]


def test_a_pattern_that_is_added_later_counts_from_then_on(bus: EventBus) -> None:
    ear, other = Ear(), Ear()
    bus.subscribe(other, [RESULT])
    bus.publish(PROGRESS, {})
    bus.subscribe(ear, ["completion:*"])
    bus.publish(PROGRESS, {})
    assert (ear.names(), other.names()) == ([PROGRESS], [])


def test_patterns_can_be_taken_away_one_by_one_or_all(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, [RESULT, CHUNK, PROGRESS])
    assert bus.unsubscribe(ear, [CHUNK, "never:there"]) == [RESULT, PROGRESS]
    bus.publish(CHUNK, {})
    bus.publish(RESULT, {})
    assert ear.names() == [RESULT]
    assert bus.unsubscribe(ear, None) == []
    bus.publish(RESULT, {})
    assert ear.names() == []
    assert not bus.awaits(ear)


def test_a_connection_that_never_subscribed_can_unsubscribe(bus: EventBus) -> None:
    assert bus.unsubscribe(Ear(), ["x"]) == []


def test_a_pattern_is_no_regular_expression(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, ["completion.*", "(", "[", "a{2}", "^completion:result$"])
    bus.publish(RESULT, {})
    assert ear.names() == []


# -- followers --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R1")
def test_a_follower_gets_the_end_of_its_request_once_and_no_other(bus: EventBus) -> None:
    ear, other = Ear(), Ear()
    bus.follow(ear, "r1")
    bus.follow(other, "r2")
    bus.publish(RESULT, {"n": 1}, "r1")
    bus.publish(RESULT, {"n": 2}, "r1")
    assert [event["data"]["n"] for event in ear.heard()] == [1]
    assert other.names() == []


@pytest.mark.promise("R1", "L5")
@given(st.data())
def test_each_listener_gets_an_event_at_most_once_whatever_it_subscribed_to_and_follows(data: st.DataObject) -> None:
    bus = EventBus(SimulatedClock())
    ears = [Ear() for _ in range(3)]
    expected: Counter[tuple[int, str]] = Counter()
    for number, ear in enumerate(ears):
        subscribed = data.draw(st.booleans())
        if subscribed:
            bus.subscribe(ear, ["*", "completion:*"])
        follows = data.draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=3))
        for end, chunks in follows:
            bus.follow(ear, "r", end=end, chunks=chunks)
        if subscribed or any(chunks for _, chunks in follows):
            expected[(number, CHUNK)] += 1
        if subscribed or any(end for end, _ in follows):
            expected[(number, RESULT)] += 1
        if subscribed:
            expected[(number, PROGRESS)] += 1
    for name in (PROGRESS, CHUNK, RESULT):
        bus.publish(name, {}, "r")
    assert expected == Counter((number, name) for number, ear in enumerate(ears) for name in ear.names())
    bus.publish(RESULT, {}, "r")
    assert [len(ear.lines) for ear in ears] == [expected[(number, PROGRESS)] for number in range(3)]


@pytest.mark.promise("R2")
def test_chunks_go_to_those_followers_who_asked_for_them(bus: EventBus) -> None:
    reads, waits = Ear(), Ear()
    bus.follow(reads, "r", end=False, chunks=True)
    bus.follow(waits, "r")
    assert bus.streams("r")
    assert not bus.streams("another")
    bus.publish(CHUNK, {"seq": 0}, "r")
    bus.publish(RESULT, {}, "r")
    assert reads.names() == [CHUNK]
    assert waits.names() == [RESULT]
    assert not bus.streams("r")


def test_to_follow_again_widens_the_interest_and_never_narrows_it(bus: EventBus) -> None:
    ear = Ear()
    assert bus.follow(ear, "r", end=True)
    assert not bus.follow(ear, "r", end=False, chunks=True)
    assert not bus.follow(ear, "r", end=False, chunks=False)
    bus.publish(CHUNK, {}, "r")
    bus.publish(RESULT, {}, "r")
    assert ear.names() == [CHUNK, RESULT]


def test_the_followers_can_be_asked_for(bus: EventBus) -> None:
    ear = Ear()
    bus.follow(ear, "r")
    assert bus.follows(ear, "r")
    assert not bus.follows(ear, "s")
    assert not bus.follows(Ear(), "r")
    bus.publish(RESULT, {}, "r")
    assert not bus.follows(ear, "r")


@pytest.mark.parametrize("name", sorted(ENDINGS))
def test_after_an_ending_nothing_is_kept_of_the_request(bus: EventBus, name: str) -> None:
    ear = Ear()
    bus.follow(ear, "r", end=False, chunks=True)
    assert bus.awaits(ear)
    bus.publish(name, {}, "r")
    assert ear.names() == []
    assert not bus.awaits(ear)
    assert not bus.wanted(name, "r")


def test_progress_ends_nothing_and_goes_to_subscribers_alone(bus: EventBus) -> None:
    ear = Ear()
    bus.follow(ear, "r", chunks=True)
    bus.publish(PROGRESS, {}, "r")
    assert ear.names() == []
    assert bus.awaits(ear)


def test_who_follows_no_more_hears_no_more(bus: EventBus) -> None:
    ear, other = Ear(), Ear()
    for one in (ear, other):
        bus.follow(one, "r")
    bus.unfollow(ear, "r")
    bus.unfollow(ear, "never followed")
    assert not bus.awaits(ear)
    bus.publish(RESULT, {}, "r")
    assert ear.names() == []
    assert other.names() == [RESULT]


def test_it_is_known_whether_anybody_follows(bus: EventBus) -> None:
    ear = Ear()
    bus.follow(ear, "r")
    assert bus.followed("r")
    assert not bus.followed("unknown")
    bus.publish(RESULT, {}, "r")
    assert not bus.followed("r")


@pytest.mark.promise("S4")
def test_nothing_is_kept_of_a_listener_that_is_gone(bus: EventBus) -> None:
    ear, other = Ear(), Ear()
    bus.subscribe(ear, ["*"])
    for request_id in ("r", "s"):
        bus.follow(ear, request_id, chunks=True)
    bus.follow(other, "s")
    bus.forget(ear)
    bus.forget(ear)
    assert not bus.awaits(ear)
    assert not bus.streams("r")
    assert not bus.wanted(RESULT, "r")
    bus.publish(RESULT, {}, "s")
    assert ear.names() == []
    assert other.names() == [RESULT]


def test_a_listener_may_leave_while_an_event_is_handed_out(bus: EventBus) -> None:
    class Leaver(Ear):
        def push(self, line: bytes) -> None:
            super().push(line)
            bus.forget(self)
            bus.forget(last)

        def news(self, news: News) -> None:
            self.push(news.line())

    first, last = Leaver(), Ear()
    for ear in (first, last):
        bus.subscribe(ear, ["*"])
        bus.follow(ear, "r")
    bus.publish(RESULT, {}, "r")
    bus.publish(RESULT, {}, "r")
    assert len(first.lines) == 1
    assert len(last.lines) <= 1


@pytest.mark.promise("D1", "R1")
def test_an_end_sent_to_followers_alone_reaches_other_subscribers_once_it_is_published(bus: EventBus) -> None:
    both, follower, subscriber = Ear(), Ear(), Ear()
    for ear in (both, follower):
        bus.follow(ear, "r")
    for ear in (both, subscriber):
        bus.subscribe(ear, [RESULT])
    bus.tell_followers(RESULT, {"status": "completed"}, "r")
    bus.tell_followers(RESULT, {"status": "completed"}, "r")
    assert [len(ear.heard()) for ear in (both, follower, subscriber)] == [1, 1, 0]
    bus.publish(RESULT, {"status": "completed"}, "r")
    assert [len(ear.heard()) for ear in (both, follower, subscriber)] == [0, 0, 1]
    bus.publish(RESULT, {"status": "completed"}, "another")
    assert [len(ear.heard()) for ear in (both, follower, subscriber)] == [1, 0, 1]


@pytest.mark.promise("D1")
def test_the_memory_of_ends_sent_to_followers_alone_is_bounded(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, [RESULT])
    for number in range(5_000):
        bus.follow(ear, f"r{number}")
        bus.tell_followers(RESULT, {}, f"r{number}")
    assert len(bus._told) == 1_000


# -- what nobody wants ------------------------------------------------------------------------------------------------


def test_an_event_without_receivers_is_not_even_encoded(bus: EventBus) -> None:
    ear = Ear()
    bus.subscribe(ear, [RESULT])
    unreadable = object()
    bus.publish(PROGRESS, unreadable)
    bus.follow(ear, "r", end=False)
    bus.publish(CHUNK, unreadable, "r")
    assert ear.lines == []


def test_one_event_for_many_is_encoded_once(bus: EventBus) -> None:
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        bus.subscribe(ear, ["*"])
    bus.publish(PROGRESS, {})
    assert len({id(ear.lines[0]) for ear in ears}) == 1


def test_an_event_can_be_sent_to_one_listener_alone(bus: EventBus) -> None:
    ear, other = Ear(), Ear()
    bus.subscribe(other, ["*"])
    bus.push(ear, CHUNK, {"seq": 3})
    assert ear.heard()[0]["data"] == {"seq": 3}
    assert other.names() == []


# -- large audiences --------------------------------------------------------------------------------------------------


@pytest.mark.promise("R4", "O9")
async def test_a_large_audience_is_told_in_slices_everything_once_and_in_order(bus: EventBus) -> None:
    ears = [Ear() for _ in range(3 * AT_ONCE)]
    for ear in ears:
        bus.subscribe(ear, ["*"])
    events = 2 * SLICE // len(ears)
    bus.follow(ears[5], "r")
    for number in range(events):
        bus.publish(PROGRESS, {"number": number})
    bus.publish(RESULT, {"number": "end"}, "r")
    assert len(ears[0].lines) == 0, "not in the turn of the publication"
    seen = []
    while len(ears[-1].lines) <= events:
        before = sum(len(ear.lines) for ear in ears)
        await asyncio.sleep(0)
        seen.append(sum(len(ear.lines) for ear in ears) - before)
    assert max(seen) <= SLICE
    await settle_down()
    for ear in ears:
        assert [event["data"]["number"] for event in ear.heard()] == [*range(events), "end"]


@pytest.mark.promise("R4", "O9")
async def test_what_is_for_one_listener_comes_behind_what_is_on_the_way_to_it(bus: EventBus) -> None:
    ears = [Ear() for _ in range(2 * AT_ONCE)]
    for ear in ears:
        bus.subscribe(ear, ["*"])
    bus.publish(PROGRESS, {"number": 1})
    bus.push(ears[-1], CHUNK, {"number": 2})
    bus.catch_up(ears[-2])
    assert [event["data"]["number"] for event in ears[-1].heard()] == [1, 2]
    assert [event["data"]["number"] for event in ears[-2].heard()] == [1]
    few = Ear()
    bus.subscribe(few, ["*"])
    bus.publish("system:new", {"number": 3})
    await settle_down()
    assert [event["data"]["number"] for event in few.heard()] == [3], "not what came before it"
    assert [event["data"]["number"] for event in ears[0].heard()] == [1, 3]
    assert [event["data"]["number"] for event in ears[-1].heard()] == [3]
