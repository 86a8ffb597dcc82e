"""Names by their beginning."""

from __future__ import annotations

import pytest

from tests.conformance.world import World

NAMES = (
    "job-1",
    "job-10",
    "job-2",
    "jo",
    "JOB-1",
    "j*b",
    "j?b",
    "j[o]b",
    "j\\b",
    "caf\u00e9",
    "caf\U0010ffff",
    "caf",
    "100%_",
)


@pytest.mark.promise("U1")
async def test_names_are_found_by_their_beginning_whatever_characters_they_have(world: World) -> None:
    for number, name in enumerate(NAMES):
        await world.enqueue(name, f"talk {number}")
    for beginning in (
        "j",
        "jo",
        "job-1",
        "job-10",
        "J",
        "j*",
        "j?",
        "j[",
        "j\\",
        "caf",
        "caf\u00e9",
        "1",
        "100%",
        "100_",
        "x",
    ):
        found = await world.store.find("request", beginning, 100)
        assert found == tuple(sorted((name for name in NAMES if name.startswith(beginning)), key=str.encode)), beginning


@pytest.mark.promise("U1")
async def test_locks_and_their_waiters_are_found_among_requests_and_forgotten_with_them(world: World) -> None:
    await world.acquire("job-lock", "held")
    await world.acquire("job-waiter", "held")
    await world.enqueue("job-1", "held")
    assert await world.store.find("request", "job-", 100) == ("job-1", "job-lock", "job-waiter")
    await world.store.release("job-lock", world.clock.now())
    assert await world.store.find("request", "job-", 100) == ("job-1", "job-waiter")


@pytest.mark.promise("U1")
async def test_no_more_than_asked_for_are_given(world: World) -> None:
    for number in range(5):
        await world.enqueue(f"job-{number}", f"talk-{number}")
    assert len(await world.store.find("request", "job-", 3)) == 3
    assert len(await world.store.find("conversation", "talk-", 5)) == 5


@pytest.mark.promise("U1")
async def test_a_conversation_is_found_by_its_own_name_and_not_by_its_provider_s(world: World) -> None:
    await world.complete(await world.run("one", "talk"), provider_session="talk-of-claude")
    assert await world.store.session("talk-of-claude") is not None
    assert await world.store.find("conversation", "talk", 10) == ("talk",)
    assert await world.store.find("request", "talk", 10) == ()
