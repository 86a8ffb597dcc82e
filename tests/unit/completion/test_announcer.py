"""Who is told what became of a request."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ksi.completion.notify.announcer import Announcer
from ksi.completion.notify.injection_events import InjectionEvents
from ksi.completion.replies import Teller
from ksi.completion.usage.prices import Prices
from ksi.conversation.lock_events import LockEvents
from ksi.events.bus import CHUNK, RESULT
from ksi.events.completions import ChunkPush, RequestReply
from ksi.providers.base import Chunk, Frame, Piece
from ksi.request import Attempt, Outcome, State, Usage
from ksi.store.values import Claimed, Ended, Finish, Passing, Retry, Settled, Verdict
from ksi.testing import settle_down
from tests.unit.completion.parts import Ear, Parts


@pytest.fixture
def parts() -> Parts:
    return Parts()


DONE = Finish(state=State.COMPLETED)


async def settle(parts: Parts, claim: Claimed, verdict: Verdict = DONE, **fields: Any) -> Settled:
    """End an attempt and tell of it, as the runner does."""
    good = isinstance(verdict, Finish) and verdict.state is State.COMPLETED
    known: dict[str, Any] = {"text": "hi", "model": "echo-1", "usage": Usage(input_tokens=3)} if good else {}
    attempt = Attempt(
        number=claim.attempt,
        provider=claim.provider,
        outcome=Outcome.COMPLETED if good else Outcome.FAILED,
        started_at=claim.started_at,
        finished_at=parts.clock.now().wall,
        **(known | fields),
    )
    settled = await parts.store.settle(claim, attempt, verdict, parts.clock.now())
    await parts.announcer.settled(claim, "m/echo", attempt, verdict, settled)
    return settled


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("R1")
async def test_each_waiting_client_is_answered_once_at_the_end(parts: Parts) -> None:
    claim = await parts.claim()
    one, other, elsewhere = parts.wait_for("r1"), parts.wait_for("r1"), parts.wait_for("r2")
    await settle(parts, claim)
    await parts.announcer.ended("r1")
    assert [[reply.result for reply in replies] for replies in (one, other, elsewhere)] == [["hi"], ["hi"], []]


@pytest.mark.promise("R1")
async def test_who_took_its_wait_back_is_not_answered_and_learns_whether_it_was_in_time(parts: Parts) -> None:
    claim = await parts.claim()
    replies: list[RequestReply] = []
    wait = parts.announcer.wait_for("r1", replies.append)
    others = parts.wait_for("r1")
    assert wait.take_back()
    assert not wait.take_back()
    await settle(parts, claim)
    assert replies == []
    assert len(others) == 1


async def test_a_wait_that_was_answered_can_not_be_withdrawn_even_if_another_waits_again(parts: Parts) -> None:
    claim = await parts.claim()
    replies: list[RequestReply] = []
    wait = parts.announcer.wait_for("r1", replies.append)
    await settle(parts, claim)
    later = parts.wait_for("r1")
    assert not wait.take_back()
    await parts.announcer.ended("r1")
    assert (len(replies), len(later)) == (1, 1)


async def test_a_client_that_waits_twice_is_answered_twice_and_withdraws_once(parts: Parts) -> None:
    claim = await parts.claim()
    replies: list[RequestReply] = []
    wait = parts.announcer.wait_for("r1", replies.append)
    parts.announcer.wait_for("r1", replies.append)
    assert wait.take_back()
    await settle(parts, claim)
    assert len(replies) == 1


# -- what is told at the end ------------------------------------------------------------------------------------------


@pytest.mark.promise("R1", "Q4")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"agent_id": "a", "metadata": {"b": 1}, "priority": 1},
        {"expires": 1_900_000_000_000_000},
        {"due": 1},
        {"model": "m/echo", "session_id": "talk", "conversation": "talk"},
    ],
)
async def test_the_answer_of_a_first_try_equals_the_store_s_record(parts: Parts, fields: dict[str, Any]) -> None:
    claim = await parts.claim(**fields)
    replies = parts.wait_for("r1")
    await parts.clock.advance(1.5)
    await settle(parts, claim)
    reads = parts.store.counts.get("get", 0)
    again = parts.wait_for("r1")
    await parts.announcer.ended("r1")
    assert reads == 0
    assert replies == again


@pytest.mark.promise("R1", "F2")
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_that_was_asked_again_says_so_at_its_end(parts: Parts, at_once: bool) -> None:
    enqueued = await parts.enqueue(*([parts.offer] if at_once else []), requeued_from="old")
    claim = enqueued.claim or (await parts.store.claim([parts.offer], 1, parts.clock.now())).started[0]
    replies = parts.wait_for("r1")
    await settle(parts, claim)
    assert replies[0].requeued_from == "old"


@pytest.mark.promise("F2", "F4")
async def test_a_later_try_s_answer_has_the_whole_trail(parts: Parts) -> None:
    claim = await parts.claim()
    replies = parts.wait_for("r1")
    now = parts.clock.now().wall
    await settle(parts, claim, Retry(at=now, error="overloaded", message="busy"), error="overloaded")
    assert replies == []
    await parts.store.expire(parts.clock.now())
    (again,) = (await parts.store.claim([parts.offer], 1, parts.clock.now())).started
    await settle(parts, again)
    (reply,) = replies
    assert [attempt.outcome for attempt in reply.attempts] == ["failed", "completed"]
    assert (reply.status, reply.result) == ("completed", "hi")


@pytest.mark.promise("R1")
async def test_a_failure_is_reported_with_its_code(parts: Parts) -> None:
    claim = await parts.claim()
    replies = parts.wait_for("r1")
    await settle(parts, claim, Finish(state=State.FAILED, error="timeout", message="too slow"), error="timeout")
    (reply,) = replies
    assert (reply.status, reply.result) == ("failed", None)
    assert reply.error is not None
    assert (reply.error.code, reply.error.message) == ("timeout", "too slow")


@pytest.mark.promise("R1")
async def test_the_result_goes_to_followers_and_subscribers_once_each(parts: Parts) -> None:
    follower, subscriber, both = Ear(), Ear(), Ear()
    parts.bus.follow(follower, "r1")
    parts.bus.follow(both, "r1")
    for ear in (subscriber, both):
        parts.bus.subscribe(ear, [RESULT])
    await settle(parts, await parts.claim())
    heard = [ear.heard() for ear in (follower, subscriber, both)]
    assert [[name for name, _ in events] for events in heard] == [[RESULT]] * 3
    assert heard[0][0][1]["result"] == "hi"
    assert heard[0] == heard[1] == heard[2]


@pytest.mark.promise("F10")
async def test_a_late_settlement_is_reported_to_no_client(parts: Parts) -> None:
    claim = await parts.claim()
    replies, ear = parts.wait_for("r1"), Ear()
    parts.bus.subscribe(ear, ["*"])
    settled = await settle(parts, msgspec.structs.replace(claim, token=claim.token + 1))
    assert settled.fenced
    assert replies == []
    assert ear.heard() == []


async def test_a_request_without_waiting_clients_is_not_even_read(parts: Parts) -> None:
    claim = await parts.claim()
    await settle(parts, claim, Finish(state=State.FAILED, error="timeout"))
    await parts.announcer.ended("r1")
    assert parts.store.counts.get("get", 0) == 0


async def test_a_request_that_is_not_kept_any_more_answers_none(parts: Parts) -> None:
    replies = parts.wait_for("gone")
    await parts.announcer.ended("gone")
    assert replies == []


# -- on the way -------------------------------------------------------------------------------------------------------


@pytest.mark.promise("F2")
async def test_a_retry_is_progress_and_no_end(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, ["completion:*"])
    claim = await parts.claim()
    due = parts.clock.now().wall + 2_000_000
    await settle(parts, claim, Retry(at=due, error="overloaded", message="busy"), error="overloaded")
    assert ear.heard() == [
        (
            "completion:progress",
            {
                "request_id": "r1",
                "session_id": "c1",
                "status": "retrying",
                "attempt": 1,
                "due_at": 1_800_000_002.0,
                "error": "overloaded",
            },
        )
    ]


async def test_a_start_is_progress_and_a_new_holder(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, ["*"])
    parts.announcer.started(await parts.claim())
    (locked, progress) = ear.heard()
    assert locked[0] == "conversation:locked"
    assert progress == (
        "completion:progress",
        {"request_id": "r1", "session_id": "c1", "status": "running", "attempt": 1, "provider": "p"},
    )


@pytest.mark.promise("R2")
async def test_chunks_go_to_their_readers_and_missed_ones_to_one_alone(parts: Parts) -> None:
    reader, other = Ear(), Ear()
    parts.bus.follow(reader, "r1", end=False, chunks=True)
    parts.bus.follow(other, "r1")
    push = ChunkPush(request_id="r1", attempt=1, seq=0, text="a")
    parts.announcer.chunk(push, Chunk("a"))
    parts.announcer.chunk_to(other, push)
    assert reader.heard() == other.heard() == [(CHUNK, msgspec.to_builtins(push))]


# -- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L5")
async def test_an_end_passes_the_lock_on_before_the_result_is_published(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, ["*"])
    claim = await parts.claim(conversation="talk")
    await parts.enqueue(conversation="talk")
    await settle(parts, claim)
    assert ear.names() == ["conversation:lock_transferred", RESULT]


class Client:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.replies: list[RequestReply] = []

    def piece(self, attempt: int, piece: Piece) -> None:
        """See `Watcher`."""

    def frame(self, attempt: int, frame: Frame) -> None:
        """See `Watcher`."""

    def answered(self, attempt: Attempt) -> None:
        """See `Watcher`."""

    def ended(self, reply: RequestReply) -> None:
        """See `Watcher`."""
        self.replies.append(reply)


@pytest.mark.promise("R3", "H5")
async def test_a_watcher_is_told_of_an_end_before_its_line_is_written_and_a_waiting_client_after_it(
    parts: Parts,
) -> None:
    written = asyncio.get_running_loop().create_future()
    announcer = Announcer(
        parts.store,
        Teller(Prices({}, {})),
        parts.bus,
        LockEvents(parts.bus),
        InjectionEvents(parts.bus),
        lambda: written,
        parts.clock,
    )
    claim = await parts.claim()
    client, waited = Client(), list[RequestReply]()
    announcer.watch("r1", client)
    announcer.wait_for("r1", waited.append)
    attempt = Attempt(
        number=1,
        provider=claim.provider,
        outcome=Outcome.COMPLETED,
        started_at=claim.started_at,
        finished_at=parts.clock.now().wall,
        text="hi",
    )
    settled = await parts.store.settle(claim, attempt, DONE, parts.clock.now())
    await announcer.settled(claim, "m/echo", attempt, DONE, settled)
    assert ([reply.result for reply in client.replies], waited) == (["hi"], [])
    written.set_result(None)
    await settle_down()
    assert waited == client.replies


@pytest.mark.promise("L7")
async def test_a_fork_that_the_provider_saw_is_reported(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, ["conversation:forked"])
    first = await parts.claim(conversation="talk")
    await settle(parts, first, provider_session="ps1")
    claim = await parts.claim(conversation="talk")
    await settle(parts, claim, provider_session="ps2", fork="new_session")
    ((_, data),) = ear.heard()
    assert (data["conversation_id"], data["kind"], data["request_id"]) == ("talk", "new_session", "r2")


@pytest.mark.promise("Q7", "R1")
async def test_a_request_that_ended_without_running_is_reported_with_the_lock_it_left(parts: Parts) -> None:
    ear = Ear()
    parts.bus.subscribe(ear, ["*"])
    await parts.enqueue(expires=1)
    replies = parts.wait_for("r1")
    (ended,) = (await parts.store.expire(parts.clock.now())).ended
    await parts.announcer.ended_unrun(ended)
    assert [reply.status for reply in replies] == ["expired"]
    assert ear.names() == [RESULT]
    passing = Passing(conversation="talk", released_by="r1")
    await parts.announcer.ended_unrun(Ended(request_id="r1", conversation="talk", state=State.EXPIRED, passing=passing))
    assert ear.names() == ["conversation:unlocked", RESULT]
