"""How the moves of locks are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from ksi.conversation.conversation_lock import fork_reply
from ksi.conversation.lock_events import LockEvents
from ksi.events.bus import EventBus, News
from ksi.request import Priority
from ksi.store.values import Claimed, Fork, Lapsed, LockGrant, Passing
from ksi.testing import SimulatedClock


class Ear:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def push(self, line: bytes) -> None:
        self.lines.append(line)

    def news(self, news: News) -> None:
        self.push(news.line())

    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and data of what came since the last look."""
        events = [msgspec.json.decode(line) for line in self.lines]
        self.lines.clear()
        return [(event["event"], event["data"]) for event in events]


@pytest.fixture
def bus() -> EventBus:
    return EventBus(SimulatedClock())


@pytest.fixture
def events(bus: EventBus) -> LockEvents:
    return LockEvents(bus)


@pytest.fixture
def ear(bus: EventBus) -> Ear:
    """Somebody who hears it all."""
    ear = Ear()
    bus.subscribe(ear, ["*"])
    return ear


CLAIM = Claimed(
    key=1,
    request_id="r",
    conversation="talk",
    body=b"{}",
    route="p",
    provider="p",
    priority=Priority.NORMAL,
    attempt=1,
    fence=7,
    token=5,
    started_at=0,
    enqueued_at=0,
    head=None,
)
GRANT = LockGrant(request_id="w", conversation="talk", fence=8, expires_at=2_500_000)
FORK = Fork(parent="talk", child="child", request_id="r", at=1_500_000, kind="new_session")


def test_a_request_that_runs_holds_its_conversation_and_says_nothing_of_its_token(events: LockEvents, ear: Ear) -> None:
    events.held(CLAIM)
    assert ear.heard() == [
        ("conversation:locked", {"conversation_id": "talk", "request_id": "r", "fence": 7}),
    ]


def test_a_waiter_is_reported_with_its_place(events: LockEvents, ear: Ear) -> None:
    events.queued("talk", "w", 3, "h", external=True)
    events.queued("talk", "r", 0, None, external=False)
    assert ear.heard() == [
        (
            "conversation:queued",
            {"conversation_id": "talk", "request_id": "w", "position": 3, "holder": "h", "external": True},
        ),
        ("conversation:queued", {"conversation_id": "talk", "request_id": "r", "position": 0}),
    ]


@pytest.mark.promise("L5")
def test_a_lock_without_waiters_is_unlocked(events: LockEvents, ear: Ear) -> None:
    events.passed(Passing(conversation="talk", released_by="r"))
    assert ear.heard() == [("conversation:unlocked", {"conversation_id": "talk", "request_id": "r"})]


@pytest.mark.promise("L4", "L5")
def test_a_lock_passes_on_and_an_outside_holder_that_has_it_now_is_notified_too(
    bus: EventBus, events: LockEvents, ear: Ear
) -> None:
    waiter = Ear()
    bus.follow(waiter, "w")
    events.passed(Passing(conversation="talk", released_by="r", next_request="w", granted=GRANT))
    moved = ("conversation:lock_transferred", {"conversation_id": "talk", "request_id": "r", "next_request": "w"})
    locked = (
        "conversation:locked",
        {"conversation_id": "talk", "request_id": "w", "fence": 8, "external": True, "expires_at": 2.5},
    )
    assert ear.heard() == [moved, locked]
    assert waiter.heard() == [locked]
    assert not bus.awaits(waiter)


def test_a_request_that_is_next_is_reported_when_it_runs(bus: EventBus, events: LockEvents, ear: Ear) -> None:
    follower = Ear()
    bus.follow(follower, "r2")
    events.passed(Passing(conversation="talk", released_by="r", next_request="r2"))
    assert [name for name, _ in ear.heard()] == ["conversation:lock_transferred"]
    assert follower.heard() == []
    assert bus.awaits(follower)


@pytest.mark.promise("L5")
def test_an_outside_holder_s_grant_reaches_it_without_a_subscription(bus: EventBus, events: LockEvents) -> None:
    waiter = Ear()
    bus.follow(waiter, "w")
    events.passed(Passing(conversation="talk", released_by="r", next_request="w", granted=GRANT))
    assert [name for name, _ in waiter.heard()] == ["conversation:locked"]


@pytest.mark.promise("L4")
@pytest.mark.parametrize(("held", "waiting"), [(True, False), (False, True)])
def test_an_expiry_is_reported_to_the_former_holder_and_says_if_it_only_waited(
    bus: EventBus, events: LockEvents, ear: Ear, held: bool, waiting: bool
) -> None:
    one = Ear()
    bus.follow(one, "h")
    passing = Passing(conversation="talk", released_by="h", next_request="w", granted=GRANT) if held else None
    events.lapsed(Lapsed(request_id="h", conversation="talk", held=held, passing=passing))
    told = {"conversation_id": "talk", "request_id": "h", "external": True, "waiting": waiting}
    expected = ("conversation:lock_expired", {name: value for name, value in told.items() if value is not False})
    assert one.heard() == [expected]
    names = [name for name, _ in ear.heard()]
    moved = ["conversation:lock_transferred", "conversation:locked"] if held else []
    assert names == ["conversation:lock_expired", *moved]
    assert not bus.awaits(one)


@pytest.mark.promise("L7")
def test_a_fork_is_reported_with_its_parent_child_and_kind(events: LockEvents, ear: Ear) -> None:
    events.forked("talk", FORK)
    fields = {"parent": "talk", "child": "child", "request_id": "r", "kind": "new_session", "at": 1.5}
    assert ear.heard() == [("conversation:forked", {"conversation_id": "talk", **fields})]
    assert msgspec.to_builtins(fork_reply(FORK)) == fields


@pytest.mark.parametrize(
    "tell",
    [
        lambda events: events.held(CLAIM),
        lambda events: events.queued("talk", "w", 1, None, external=True),
        lambda events: events.passed(Passing(conversation="talk", released_by="r")),
        lambda events: events.passed(Passing(conversation="talk", released_by="r", next_request="x")),
        lambda events: events.granted(GRANT),
        lambda events: events.lapsed(Lapsed(request_id="h", conversation="talk", held=True)),
        lambda events: events.forked("talk", FORK),
    ],
)
def test_a_subscriber_of_other_events_gets_nothing(
    bus: EventBus, events: LockEvents, tell: Callable[[LockEvents], None]
) -> None:
    ear = Ear()
    bus.subscribe(ear, ["completion:*"])
    bus.follow(ear, "another")
    tell(events)
    assert ear.heard() == []
