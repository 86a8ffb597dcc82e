"""What is held back, and until when."""

from __future__ import annotations

import asyncio

import pytest

from ksi.clock import Moment, microseconds
from ksi.completion.pause.pauses import Pause, Pauses, Scope, decode_pauses, encode_pauses
from ksi.errors import InvalidData, NotFound, StoreUnavailable
from ksi.events.pauses import DrainData, PauseData, ResumeData
from ksi.request import State
from ksi.store.provider_records import KeptRecord, KeptRecords, PutRecord
from ksi.store.values import StoreRules
from ksi.testing import settle_down
from tests.unit.completion.parts import FaultyStore, Parts, Player, whole

NOW = microseconds(1_800_000_000)


def test_a_pause_of_the_same_thing_takes_the_place_of_the_earlier_one() -> None:
    first = Pause(scope=Scope.AGENT, name="ann", since=NOW, why="once")
    again = Pause(scope=Scope.AGENT, name="ann", since=NOW + 1, why="again")
    other = Pause(scope=Scope.SESSION, name="ann", since=NOW)
    pauses = Pauses().with_(first).with_(other).with_(again)
    assert pauses.items == (other, again)
    assert pauses.without(Scope.AGENT, "ann").items == (other,)


def test_a_pause_ends_by_itself_at_its_time() -> None:
    pauses = Pauses((Pause(scope=Scope.ALL, since=NOW, until=NOW + 5),))
    assert pauses.ends_next(NOW) == NOW + 5
    assert pauses.find(Scope.ALL, "", NOW + 4) is not None
    assert pauses.find(Scope.ALL, "", NOW + 5) is None
    assert pauses.ends_next(NOW + 5) is None
    assert pauses.since_ended(NOW + 5) == Pauses()


def test_its_sentence_says_who_and_why_and_until_when() -> None:
    pause = Pause(scope=Scope.AGENT, name="nightly", since=NOW, until=NOW + microseconds(60), by="ann", why="it burns")
    assert pause.sentence(NOW) == "agent nightly is paused since 08:00:00 by ann until 08:01:00: it burns"
    assert Pause(scope=Scope.ALL, since=NOW).sentence(NOW) == "everything is paused since 08:00:00"


def test_stored_pauses_are_read_again() -> None:
    pauses = Pauses((Pause(scope=Scope.ALL, since=NOW, until=NOW + 5, by="ann"),))
    assert decode_pauses(encode_pauses(pauses)) == pauses


@pytest.fixture
async def parts() -> Parts:
    parts = Parts()
    await parts.open()
    return parts


@pytest.mark.promise("B2")
@pytest.mark.parametrize("thing", [{}, {"agent_id": "ann"}, {"session_id": "talk"}, {"priority": "normal"}])
async def test_a_paused_request_waits_without_an_attempt_and_continues_when_it_is_resumed(
    parts: Parts, thing: dict[str, str]
) -> None:
    await parts.pauses.pause(PauseData(**thing, why="the bill"))  # type: ignore[arg-type]
    name = (await parts.enqueue(conversation="talk", agent_id="ann")).request_id
    parts.queue.on_work()
    await settle_down()
    assert not parts.player.calls
    assert (await parts.view(name)).state is State.QUEUED
    await parts.pauses.resume(ResumeData(**thing))  # type: ignore[arg-type]
    await settle_down()
    view = await parts.view(name)
    assert view.state is State.COMPLETED
    assert [(attempt.number, attempt.error) for attempt in view.attempts] == [(1, None)]
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_running_requests_continue_and_others_are_not_held_back(parts: Parts) -> None:
    await parts.pauses.pause(PauseData(agent_id="ann"))
    name = (await parts.enqueue(agent_id="bob")).request_id
    parts.queue.on_work()
    await settle_down()
    assert (await parts.view(name)).state is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_pause_with_a_time_ends_by_itself(parts: Parts) -> None:
    await parts.pauses.pause(PauseData(seconds=60.0))
    await parts.pauses.pause(PauseData(agent_id="ann", seconds=90.0))
    name = (await parts.enqueue(agent_id="ann")).request_id
    parts.queue.on_work()
    await settle_down()
    await parts.clock.advance(61)
    assert (await parts.view(name)).state is State.QUEUED
    await parts.clock.advance(30)
    assert (await parts.view(name)).state is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_paused_provider_leaves_its_work_to_the_next_of_the_route() -> None:
    parts = Parts(Player("a"), Player("b"))
    await parts.open()
    await parts.pauses.pause(PauseData(provider="a"))
    name = (await parts.enqueue()).request_id
    parts.queue.on_work()
    await settle_down()
    assert [attempt.provider for attempt in (await parts.view(name)).attempts] == ["b"]
    assert parts.providers.report()["a"].paused == "provider a is paused since 08:00:00"
    await parts.queue.stop(0)


class SlowRecords(FaultyStore):
    """A store that takes its time to keep a record, or cannot."""

    def __init__(self) -> None:
        super().__init__(StoreRules())
        self.gate = asyncio.Event()

    async def put_provider_record(self, name: str, version: int, value: bytes, now: Moment, *, tell: bool) -> PutRecord:
        await self.gate.wait()
        self._maybe("put")
        return await super().put_provider_record(name, version, value, now, tell=tell)


@pytest.mark.promise("B2")
async def test_nothing_starts_any_more_when_the_pause_is_answered_or_while_it_is_kept() -> None:
    store = SlowRecords()
    parts = Parts(store=store)
    await parts.open()
    pausing = asyncio.create_task(parts.pauses.pause(PauseData(agent_id="ann")))
    await settle_down()
    name = (await parts.enqueue(agent_id="ann")).request_id
    parts.queue.on_work()
    await settle_down()
    assert not pausing.done()
    assert (await parts.view(name)).state is State.QUEUED
    store.gate.set()
    assert (await pausing).paused[0].name == "ann"
    assert not parts.player.calls
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_pause_that_could_not_be_kept_holds_nowhere() -> None:
    store = SlowRecords()
    store.gate.set()
    store.faults["put"] = [StoreUnavailable("no disk")]
    parts = Parts(store=store)
    await parts.open()
    with pytest.raises(StoreUnavailable):
        await parts.pauses.pause(PauseData(agent_id="ann"))
    name = (await parts.enqueue(agent_id="ann")).request_id
    parts.queue.on_work()
    await settle_down()
    assert (await parts.view(name)).state is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_scheduled_or_retried_request_is_held_back_too_when_its_time_comes(parts: Parts) -> None:
    later = parts.clock.now().after(10).wall
    scheduled = (await parts.enqueue(agent_id="ann", due=later)).request_id
    expiring = (await parts.enqueue(agent_id="ann", expires=later)).request_id
    await parts.pauses.pause(PauseData(agent_id="ann"))
    parts.queue.on_due()
    await settle_down()
    await parts.clock.advance(11)
    assert [(await parts.view(name)).state for name in (scheduled, expiring)] == [State.QUEUED, State.EXPIRED]
    await parts.pauses.resume(ResumeData(agent_id="ann"))
    await settle_down()
    assert (await parts.view(scheduled)).state is State.COMPLETED
    await parts.queue.stop(0)


async def test_the_wrong_thing_is_refused_by_name(parts: Parts) -> None:
    with pytest.raises(InvalidData, match="name one of"):
        await parts.pauses.pause(PauseData(agent_id="ann", session_id="talk"))
    with pytest.raises(NotFound, match="no provider 'nobody'"):
        await parts.pauses.pause(PauseData(provider="nobody"))
    assert (await parts.pauses.resume(ResumeData(agent_id="never paused"))).paused == []
    await parts.queue.stop(0)


async def test_a_record_that_cannot_be_read_pauses_nothing(parts: Parts) -> None:
    parts.pauses.hear(KeptRecords(NOW, {":pauses": KeptRecord(3, b"\xc1 damaged")}))
    assert parts.providers.pauses == Pauses()
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_drain_starts_nothing_and_answers_when_nothing_runs(parts: Parts) -> None:
    parts.queue.drain()
    name = (await parts.enqueue()).request_id
    parts.queue.on_work()
    await settle_down()
    assert (await parts.view(name)).state is State.QUEUED
    assert await parts.queue.drained(None)
    await parts.pauses.undrain()
    await settle_down()
    assert (await parts.view(name)).state is State.COMPLETED
    await parts.queue.stop(0)


@pytest.mark.promise("B2")
async def test_a_waiting_drain_is_notified_of_its_cancellation(parts: Parts) -> None:
    gate = asyncio.Event()
    parts.player.play([gate, whole()])
    await parts.enqueue()
    parts.queue.on_work()
    await settle_down()
    waiting = asyncio.create_task(parts.pauses.drain(DrainData()))
    await settle_down()
    assert not waiting.done()
    await parts.pauses.undrain()
    reply = await asyncio.wait_for(waiting, 10)
    assert (reply.draining, reply.running) == (False, 1)
    gate.set()
    await settle_down()
    await parts.queue.stop(0)


async def test_the_operator_and_the_reason_of_a_disabled_provider_are_shown(parts: Parts) -> None:
    await parts.providers.set_enabled("p", False, by="ann", why="the bill")
    words = "provider p is disabled since 08:00:00 by ann: the bill"
    assert parts.providers.report()["p"].disabled == words
    assert f"{words}; `ksi providers enable p` asks it again" in parts.providers.problems()
    await parts.providers.set_enabled("p", True)
    assert parts.providers.report()["p"].disabled is None
    await parts.queue.stop(0)
