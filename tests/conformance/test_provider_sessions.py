"""Provider sessions as names of conversations, and the forks that a provider saw (L7)."""

from __future__ import annotations

import pytest

from tests.conformance.world import World


@pytest.mark.promise("L7")
async def test_a_provider_session_becomes_another_name_of_its_conversation(world: World) -> None:
    settled = await world.complete(await world.run("a"), provider_session="uuid", last_message="m1")
    second = await world.run("b", conversation="uuid")
    assert (second.conversation, second.head) == ("talk", settled.turn)
    waiting = await world.enqueue("c")
    assert waiting.holder == "b", "both names have one lock"
    for name in ("talk", "uuid"):
        session = await world.store.session(name)
        lock = await world.store.lock(name, 10)
        assert session is not None and session.conversation == "talk"
        assert lock is not None and (lock.conversation, lock.holder, lock.waiting) == ("talk", "b", 1)
    assert (await world.store.totals()).conversations == 1


@pytest.mark.promise("L7")
async def test_a_turn_keeps_the_position_in_its_provider_s_session(world: World) -> None:
    settled = await world.complete(await world.run("a"), provider_session="uuid", last_message="m1")
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 0)
    assert (turn.provider_session, turn.last_message, turn.conversation) == ("uuid", "m1", "talk")


@pytest.mark.promise("L7")
async def test_a_session_that_names_another_conversation_is_never_merged(world: World) -> None:
    await world.complete(await world.run("a", conversation="one"), provider_session="uuid", last_message="m1")
    settled = await world.complete(await world.run("b", conversation="two"), provider_session="uuid", last_message="m2")
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 0)
    assert (turn.provider_session, turn.last_message, turn.conversation) == (None, None, "two")
    session = await world.store.session("uuid")
    assert session is not None and session.conversation == "one"


@pytest.mark.promise("L7")
async def test_a_session_that_a_client_named_first_stays_that_conversation(world: World) -> None:
    await world.complete(await world.run("a", conversation="uuid"))
    settled = await world.complete(await world.run("b", conversation="talk"), provider_session="uuid")
    assert settled.turn is not None
    (turn,) = await world.store.history(settled.turn, 0)
    assert turn.provider_session is None


@pytest.mark.promise("L6", "L7")
@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        pytest.param("new_session", "first", id="another session"),
        pytest.param("foreign_turn", "talk", id="a foreign turn"),
    ],
)
async def test_a_fork_that_the_provider_saw_is_recorded(world: World, kind: str, parent: str) -> None:
    await world.complete(await world.run("a"), provider_session="first", last_message="m1")
    claim = await world.run("b")
    settled = await world.complete(claim, provider_session="second", last_message="m2", fork=kind)
    assert settled.fork is not None
    assert (settled.fork.parent, settled.fork.child, settled.fork.request_id) == (parent, "second", "b")
    assert (settled.fork.kind, settled.fork.at) == (kind, world.clock.wall)
    for name in (None, "talk", "second"):
        page = await world.store.forks(10, None, name)
        assert page.items == (settled.fork,)


@pytest.mark.promise("F10", "L7")
async def test_a_late_answer_names_nothing(world: World) -> None:
    late = await world.run("a")
    await world.crash()
    (again,) = await world.claim()
    assert again.request_id == "a"
    fenced = await world.complete(late, provider_session="uuid", fork="new_session")
    assert fenced.fenced and fenced.fork is None
    assert await world.store.session("uuid") is None
    assert (await world.store.forks(10)).items == ()
