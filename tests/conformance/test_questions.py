"""Requests that wait for a person's answer, on every store (B3, M3)."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ksi.clock import microseconds
from ksi.errors import NotFound
from ksi.request import Outcome, State
from ksi.store.chains import Aftermath
from ksi.store.questions import Question, QuestionKind
from ksi.store.values import Answered, Finish, Listing, Retry
from tests.conformance.chain_parts import begin, complete, direct, told
from tests.conformance.world import OFFER, World

REJECTED = Finish(state=State.CANCELLED, error="rejected", message="ada: not today")


def question(world: World, kind: QuestionKind = QuestionKind.HOLD, **fields: Any) -> Question:
    return Question(kind=kind, asked_at=world.clock.wall, text="may it go on?", **fields)


async def held(world: World, name: str, conversation: str = "talk", **fields: Any) -> Question:
    """A request that is held back."""
    asked = question(world)
    await world.enqueue(name, conversation, question=asked, **fields)
    return asked


async def answer(world: World, name: str, asked: Question, yes: bool = True, **fields: Any) -> Answered:
    answered = msgspec.structs.replace(
        asked, answer="yes" if yes else "no", by="ada", why="it is late", answered_at=world.clock.wall
    )
    return await world.store.answer(name, asked, answered, world.clock.now(), **fields)


async def asking(world: World, name: str, after: float = 600, **fields: Any) -> Question:
    """A request that ran until it asked for a permission."""
    claim = await world.run(name, **fields)
    asked = question(world, QuestionKind.PERMISSION, tool="Bash", input='{"command":"make"}')
    at = world.clock.wall + microseconds(after)
    await world.settle(claim, Retry(at=at, parked=True, question=asked), world.attempt(claim, Outcome.PARKED))
    return asked


@pytest.mark.promise("B3")
async def test_a_request_is_held_in_a_conversation_that_is_free_and_known(world: World) -> None:
    await world.complete(await world.run("before"))
    enqueued = await world.enqueue("a", offers=[OFFER], question=question(world))
    assert enqueued.claim is None
    assert (await world.view("a")).state is State.SCHEDULED


@pytest.mark.promise("B3")
async def test_a_held_request_is_outside_the_queue_until_it_is_released(world: World) -> None:
    asked = await held(world, "a")
    await world.enqueue("b")
    world.clock.forward(1_000_000)
    assert (await world.expire()).woken == 0
    (behind,) = await world.claim()
    assert behind.request_id == "b"
    view = await world.view("a")
    assert (view.state, view.due, view.question, view.message) == (State.SCHEDULED, None, asked, "may it go on?")
    assert await world.listed(Listing.ASKING) == ["a"]
    assert await world.listed(Listing.DELAYED) == []

    taken = await answer(world, "a", asked)
    assert (taken.taken, taken.state, taken.conversation) == (True, State.SCHEDULED, "talk")
    assert await world.listed(Listing.ASKING) == []
    assert (await world.expire()).woken == 1
    await world.complete(behind)
    assert await world.claim_ids() == ["a"]
    view = await world.view("a")
    assert view.question is not None
    assert (view.question.answer, view.question.by, view.question.why) == ("yes", "ada", "it is late")


@pytest.mark.promise("B3")
async def test_a_held_request_never_runs_at_once_and_takes_no_lock(world: World) -> None:
    enqueued = await world.enqueue("a", offers=[OFFER], question=question(world))
    assert (enqueued.state, enqueued.claim, enqueued.ready) == (State.SCHEDULED, None, False)
    await world.run("b")


@pytest.mark.promise("B3")
async def test_only_the_question_that_is_open_can_be_answered_and_only_once(world: World) -> None:
    asked = await held(world, "a")
    other = msgspec.structs.replace(asked, text="something else")
    assert not (await answer(world, "a", other)).taken
    assert (await answer(world, "a", asked)).taken
    again = await answer(world, "a", asked, yes=False, end=REJECTED)
    assert (again.taken, again.state) == (False, State.SCHEDULED)
    await world.expire()
    (claim,) = await world.claim()
    assert not (await answer(world, "a", asked)).taken
    await world.complete(claim)
    assert (await answer(world, "a", asked)).state is State.COMPLETED
    await world.acquire("lock", "elsewhere")
    for unknown in ("nobody", "lock"):
        with pytest.raises(NotFound, match=unknown):
            await answer(world, unknown, asked)


@pytest.mark.promise("B3")
async def test_a_no_ends_it_and_says_why(world: World) -> None:
    asked = await held(world, "a")
    ended = await answer(world, "a", asked, yes=False, end=REJECTED)
    assert (ended.taken, ended.state, ended.passing) == (True, State.CANCELLED, None)
    view = await world.view("a")
    assert (view.state, view.error, view.message) == (State.CANCELLED, "rejected", "ada: not today")
    assert view.question is not None and view.question.answer == "no"
    assert await world.listed(Listing.ASKING) == []
    assert (await world.store.totals()).cancelled == 1


@pytest.mark.promise("B3")
async def test_no_answer_in_time_is_a_no(world: World) -> None:
    until = world.clock.wall + microseconds(60)
    await held(world, "a", expires=until)
    assert (await world.expire()).next_wall == until
    world.clock.forward(60)
    (ended,) = (await world.expire()).ended
    assert (ended.request_id, ended.state) == ("a", State.EXPIRED)
    assert await world.listed(Listing.ASKING) == []


@pytest.mark.promise("B3")
async def test_an_answer_sets_when_it_is_due_and_how_long_it_may_wait(world: World) -> None:
    asked = await held(world, "a", expires=world.clock.wall + microseconds(60))
    due, expires = world.clock.wall + microseconds(100), world.clock.wall + microseconds(200)
    await answer(world, "a", asked, due=due, expires=expires)
    view = await world.view("a")
    assert (view.state, view.due, view.expires) == (State.SCHEDULED, due, expires)
    world.clock.forward(100)
    assert (await world.expire()).woken == 1
    other = await held(world, "b", "another", expires=world.clock.wall + microseconds(60))
    await answer(world, "b", other)
    assert (await world.view("b")).expires is None


@pytest.mark.promise("B3")
async def test_a_held_request_can_be_cancelled_and_counts_as_waiting(world: World) -> None:
    await held(world, "a")
    await held(world, "b")
    assert (await world.store.totals()).scheduled == 2
    await world.cancel("a")
    assert await world.listed(Listing.ASKING) == ["b"]


@pytest.mark.promise("B3", "Q3")
async def test_a_question_outlives_the_store(world: World) -> None:
    asked, permission = await held(world, "a"), await asking(world, "p", conversation="another")
    await world.crash()
    assert await world.listed(Listing.ASKING) == ["a", "p"]
    assert ((await world.view("a")).question, (await world.view("p")).question) == (asked, permission)
    await answer(world, "a", asked)
    await answer(world, "p", permission)
    await world.crash()
    assert await world.listed(Listing.ASKING) == []
    await world.expire()
    assert await world.claim_ids() == ["a", "p"]
    for name in ("a", "p"):
        found = (await world.view(name)).question
        assert found is not None and found.answer == "yes"


@pytest.mark.promise("M3", "L8")
async def test_a_request_that_asks_while_it_runs_keeps_its_lock_and_gives_back_its_slot(world: World) -> None:
    asked = await asking(world, "a", hold_on_retry=False)
    view = await world.view("a")
    assert (view.state, view.question) == (State.PARKED, asked)
    await world.enqueue("b")
    assert await world.claim_ids() == []
    await world.run("c", "another")
    assert (await world.look()).holder == "a"
    assert await world.listed(Listing.ASKING) == ["a"]

    assert await world.store.unpark("stub", world.clock.now()) == 0
    assert (await answer(world, "a", asked)).state is State.PARKED
    assert (await world.expire()).woken == 1
    (claim,) = await world.claim()
    assert (claim.request_id, claim.attempt) == ("a", 2)
    await world.complete(claim)
    assert await world.claim_ids() == ["b"]


@pytest.mark.promise("M3")
async def test_a_permission_that_is_never_given_runs_on_with_the_question_open(world: World) -> None:
    asked = await asking(world, "a", after=60)
    world.clock.forward(60)
    assert (await world.expire()).woken == 1
    assert await world.listed(Listing.ASKING) == []
    assert not (await answer(world, "a", asked)).taken
    (claim,) = await world.claim()
    assert (await world.view("a")).question == asked
    await world.retry(claim, 10, parked=True)
    view = await world.view("a")
    assert (view.state, view.question) == (State.PARKED, None)
    assert await world.store.unpark("stub", world.clock.now()) == 1


@pytest.mark.promise("M3")
async def test_an_answered_question_goes_with_the_request_through_a_wait_for_its_provider(world: World) -> None:
    asked = await asking(world, "a")
    await answer(world, "a", asked)
    await world.expire()
    (claim,) = await world.claim()
    answered = (await world.view("a")).question
    await world.retry(claim, 100, parked=True, question=answered)
    assert await world.listed(Listing.ASKING) == []
    assert await world.store.unpark("stub", world.clock.now()) == 1
    assert (await world.view("a")).question == answered


@pytest.mark.promise("B3", "C3")
async def test_a_delivery_may_wait_for_an_answer(world: World) -> None:
    claim = await begin(world, injects=True)
    asked = question(world, QuestionKind.APPROVAL, code="depth", expires=world.clock.wall + microseconds(60))
    sent = direct("root/1", "next")
    assert sent.child is not None
    sent = msgspec.structs.replace(sent, child=msgspec.structs.replace(sent.child, question=asked))
    await complete(world, claim, Aftermath(follow_ups=(sent,)))
    view = await world.view("root/1")
    assert (view.state, view.question, view.depth, view.expires) == (State.SCHEDULED, asked, 1, asked.expires)
    assert await world.claim_ids() == []
    rejected = await answer(world, "root/1", asked, yes=False, end=REJECTED)
    assert told(rejected) == [("root/1", "failed")]
