"""Lists and their pages, sessions, locks, forks, totals, the response log's source."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ksi.clock import microseconds
from ksi.errors import InvalidData
from ksi.request import Outcome, Priority, State
from ksi.store.questions import Question, QuestionKind
from ksi.store.values import Finish, Listing, Page, Totals
from tests.conformance.conftest import StoreFactory
from tests.conformance.world import OFFER, ROUTE, World, items, recount


async def fill(world: World) -> None:
    """Something of everything, over several conversations and routes."""
    for number in range(5):
        await world.run(f"run {number}", f"busy {number}")
        world.clock.forward(0.1)
    for number in range(5):
        await world.complete(await world.run(f"done {number}", f"past {number}", agent_id=f"agent {number % 2}"))
        await world.fail(await world.run(f"bad {number}", f"past {number}"))
        await world.retry(await world.run(f"again {number}", f"retry {number}"), after=50 - number)
        world.clock.forward(0.1)
    for number in range(5):
        await world.enqueue(f"later {number}", f"busy {number}", due=world.clock.wall + microseconds(30 + number))
        for place, priority in enumerate((Priority.LOW, Priority.HIGH)):
            await world.enqueue(f"line {number}.{place}", f"busy {number}", priority=priority)
        await world.enqueue(f"ready {number}", f"free {number}", route="xy"[number % 2], priority=Priority(number))
        await world.enqueue(f"gone {number}", f"free {number}")
        await world.cancel(f"gone {number}")
        await world.acquire(f"lock {number}", f"held {number}")
        await world.acquire(f"waiter {number}", f"held {number}")
        await world.enqueue(f"fork {number}", f"child {number}", fork_of=f"past {number}")
        asked = Question(kind=QuestionKind.HOLD, asked_at=world.clock.wall, text="may it run?")
        await world.enqueue(f"asks {number}", f"busy {number}", question=asked)
        world.clock.forward(0.1)


ORDERS: dict[Listing, list[str]] = {
    Listing.ACTIVE: [f"run {n}" for n in range(5)],
    Listing.READY: [*(f"fork {n}" for n in range(5)), "ready 0", "ready 2", "ready 4", "ready 1", "ready 3"],
    Listing.DELAYED: [*(f"later {n}" for n in range(5)), *(f"again {n}" for n in reversed(range(5)))],
    Listing.ASKING: [f"asks {n}" for n in range(5)],
    Listing.FAILED: [f"bad {n}" for n in reversed(range(5))],
}


@pytest.mark.promise("R4", "Q8")
@pytest.mark.parametrize("listing", list(ORDERS))
@pytest.mark.parametrize("limit", [1, 3, 5, 100])
async def test_a_listing_is_paged_in_order_without_gap_or_repetition(
    world: World, listing: Listing, limit: int
) -> None:
    await fill(world)
    pages: list[list[str]] = []
    cursor: str | None = None
    while True:
        page = await world.store.requests(listing, limit, cursor)
        pages.append([row.request_id for row in page.items])
        cursor = page.cursor
        if cursor is None:
            break
        assert len(page.items) == limit
    assert [name for page in pages for name in page] == ORDERS[listing]
    assert all(pages)


@pytest.mark.promise("L6", "Q8")
@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_all_lines_are_paged_by_conversation_in_order_without_external_waiters(world: World, limit: int) -> None:
    await fill(world)
    rows = [row async for row in items(lambda cursor: world.store.requests(Listing.WAITING, limit, cursor))]
    lines: dict[str, list[str]] = {}
    seen: list[str] = []
    for row in rows:
        lines.setdefault(row.conversation, []).append(row.request_id)
        if row.conversation not in seen[-1:]:
            seen.append(row.conversation)
    assert len(seen) == len(lines), "a conversation's line came in two pieces"
    expected = {f"busy {n}": [f"line {n}.1", f"line {n}.0"] for n in range(5)}
    expected |= {f"free {n}": [f"ready {n}"] for n in range(5)} | {f"child {n}": [f"fork {n}"] for n in range(5)}
    assert lines == expected


@pytest.mark.promise("R4", "Q8")
async def test_finished_requests_are_listed_the_newest_first(world: World) -> None:
    await fill(world)
    names = [f"gone {n}" for n in reversed(range(5))]
    for number in reversed(range(5)):
        names += [f"bad {number}", f"done {number}"]
    assert await world.listed(Listing.FINISHED) == names


@pytest.mark.promise("R4")
async def test_a_row_tells_a_request_in_short(world: World) -> None:
    enqueued_at = world.clock.wall
    claim = await world.run("a", agent_id="ann", priority=Priority.HIGH)
    started_at = world.clock.wall
    (row,) = (await world.store.requests(Listing.ACTIVE, 10)).items
    assert (row.request_id, row.conversation, row.state, row.priority) == ("a", "talk", State.RUNNING, Priority.HIGH)
    assert (row.model, row.agent_id, row.attempt, row.enqueued_at) == ("stub/echo", "ann", 1, enqueued_at)
    assert (row.started_at, row.finished_at, row.due, row.provider) == (started_at, None, None, "stub")
    world.clock.forward(1)
    await world.retry(claim, after=1, error="timeout", message="slow")
    (row,) = (await world.store.requests(Listing.DELAYED, 10)).items
    assert (row.state, row.due, row.error, row.message, row.provider) == (
        State.RETRYING,
        world.clock.wall + microseconds(1),
        "timeout",
        "slow",
        None,
    )
    world.clock.forward(1)
    await world.expire()
    await world.fail(await world.claim_one(), "authentication", "log in first")
    (row,) = (await world.store.requests(Listing.FAILED, 10)).items
    assert (row.state, row.error, row.message, row.attempt) == (State.FAILED, "authentication", "log in first", 2)
    assert row.finished_at == world.clock.wall


@pytest.mark.promise("F2")
@pytest.mark.parametrize("parked", [False, True], ids=["retrying", "parked"])
async def test_a_row_that_waits_for_another_try_says_since_when(world: World, parked: bool) -> None:
    await world.enqueue("later", "other", due=world.clock.wall + microseconds(600))
    claim = await world.run("a")
    failed_at = world.clock.forward(3).wall
    await world.retry(claim, after=1, parked=parked)
    world.clock.forward(1)
    rows = {row.request_id: row for row in (await world.store.requests(Listing.DELAYED, 10)).items}
    assert (rows["a"].failed_at, rows["later"].failed_at) == (failed_at, None)
    await world.expire()
    (row,) = (await world.store.requests(Listing.READY, 10)).items
    assert row.failed_at is None
    claim = await world.claim_one()
    (row,) = (await world.store.requests(Listing.ACTIVE, 10)).items
    assert row.failed_at is None
    failed_again_at = world.clock.forward(2).wall
    await world.retry(claim, after=1, parked=parked)
    (row, _) = (await world.store.requests(Listing.DELAYED, 10)).items
    assert row.failed_at == failed_again_at
    await world.cancel("a")
    (row,) = (await world.store.requests(Listing.FINISHED, 10)).items
    assert (row.failed_at, row.finished_at) == (None, world.clock.wall)


@pytest.mark.promise("Q8")
async def test_a_page_that_was_asked_for_stays_good_while_the_list_changes(world: World) -> None:
    for number in range(6):
        await world.enqueue(str(number), f"talk {number}")
    page = await world.store.requests(Listing.READY, 2)
    assert [row.request_id for row in page.items] == ["0", "1"]
    for name in "013":
        await world.cancel(name)
    await world.enqueue("6", "talk 6")
    rest = await world.store.requests(Listing.READY, 10, page.cursor)
    assert [row.request_id for row in rest.items] == ["2", "4", "5", "6"]


@pytest.mark.promise("Q8")
async def test_a_held_place_is_ready_and_in_no_line_when_its_request_is_queued_again(world: World) -> None:
    await world.give_back(await world.run("a"))
    await world.enqueue("b")
    assert await world.listed(Listing.READY) == ["a"]
    assert await world.listed(Listing.WAITING) == ["b"]


WRONG = ["", "x", "!!!", "eyJ4IjoxfQ==", "bnVsbA==", "WyJmYWlsZWQiXQ==", "ü", "\ud800", "A" * 5_000, "W1tbW1tb" * 500]


@pytest.mark.promise("S1", "Q8")
@pytest.mark.parametrize("cursor", WRONG, ids=range(len(WRONG)))
async def test_a_cursor_that_is_none_is_invalid_data(world: World, cursor: str) -> None:
    await fill(world)
    lists: list[Callable[[], Awaitable[Page[Any]]]] = [
        *(lambda listing=listing: world.store.requests(listing, 5, cursor) for listing in Listing),
        lambda: world.store.sessions(5, cursor),
        lambda: world.store.sessions(5, cursor, "agent 1"),
        lambda: world.store.locks(5, cursor),
        lambda: world.store.forks(5, cursor),
        lambda: world.store.forks(5, cursor, "past 1"),
    ]
    for asked in lists:
        with pytest.raises(InvalidData) as refused:
            await asked()
        assert refused.value.details["path"] == "cursor"


@pytest.mark.promise("S1", "Q8")
async def test_a_cursor_is_good_for_its_own_list_alone(world: World) -> None:
    await fill(world)
    store = world.store
    cursors = {listing.value: (await store.requests(listing, 1)).cursor for listing in Listing}
    cursors["sessions"] = (await store.sessions(1)).cursor
    cursors["locks"] = (await store.locks(1)).cursor
    cursors["forks"] = (await store.forks(1)).cursor
    assert all(cursors.values())
    for name, cursor in cursors.items():
        for listing in Listing:
            if listing.value != name:
                with pytest.raises(InvalidData):
                    await store.requests(listing, 1, cursor)
        if name != "sessions":
            with pytest.raises(InvalidData):
                await store.sessions(1, cursor)
        if name != "locks":
            with pytest.raises(InvalidData):
                await store.locks(1, cursor)
        if name != "forks":
            with pytest.raises(InvalidData):
                await store.forks(1, cursor)


@pytest.mark.promise("Q8")
@pytest.mark.parametrize("listing", list(Listing))
async def test_an_empty_listing_is_one_empty_page(world: World, listing: Listing) -> None:
    page = await world.store.requests(listing, 5)
    assert (page.items, page.cursor) == ((), None)


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("L10")
async def test_a_session_shows_its_life(world: World) -> None:
    created = world.clock.wall
    claim = await world.run("a", agent_id="ann")
    session = await world.store.session("talk")
    assert session is not None
    assert (session.conversation, session.created_at, session.active_at) == ("talk", created, created)
    assert (session.turns, session.head, session.provider, session.provider_session) == (0, None, None, None)
    assert (session.agents, session.locked, session.forked_from) == (("ann",), True, None)
    settled_at = world.clock.forward(9).wall
    await world.complete(claim)
    session = await world.store.session("talk")
    assert session is not None
    assert (session.created_at, session.active_at, session.locked) == (created, settled_at, False)
    enqueued_at = world.clock.forward(9).wall
    for name, agent in (("b", "bob"), ("c", "ann"), ("d", None), ("e", "cat")):
        await world.enqueue(name, agent_id=agent)
    world.clock.forward(9)
    await world.claim()
    session = await world.store.session("talk")
    assert session is not None
    assert (session.agents, session.active_at) == (("ann", "bob", "cat"), enqueued_at)


@pytest.mark.promise("L10")
async def test_every_end_and_every_move_of_a_lock_is_activity(world: World) -> None:
    async def active(after: Awaitable[object]) -> bool:
        world.clock.forward(1)
        await after
        session = await world.store.session("talk")
        assert session is not None
        return session.active_at == world.clock.wall

    clock = world.clock
    assert await active(world.acquire("lock"))
    assert await active(world.acquire("lock"))
    assert await active(world.acquire("waiter"))
    assert await active(world.renew_lock("lock"))
    assert await active(world.cancel("waiter"))
    assert await active(world.enqueue("a", expires=clock.wall + microseconds(3)))
    assert await active(world.cancel("lock"))
    clock.forward(5)
    assert await active(world.expire())
    assert await active(world.enqueue("b"))
    assert await active(world.cancel("b"))
    claim = await world.run("c")
    assert await active(world.retry(claim, after=2))
    clock.forward(5)
    assert not await active(world.expire())
    assert not await active(world.claim())


@pytest.mark.promise("L10")
async def test_an_unknown_session_and_its_lock_are_none(world: World) -> None:
    assert await world.store.session("nobody") is None
    assert await world.store.lock("nobody", 10) is None
    assert await world.store.get("nobody") is None


@pytest.mark.promise("L10", "Q8")
@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_sessions_are_paged_the_newest_first_and_by_agent(world: World, limit: int) -> None:
    for number in range(5):
        await world.enqueue(f"a{number}", f"talk {number}", agent_id=("odd" if number % 2 else "even"))
    await world.enqueue("more", "talk 0", agent_id="odd")

    async def names(agent: str | None) -> list[str]:
        pages = items(lambda cursor: world.store.sessions(limit, cursor, agent))
        return [session.conversation async for session in pages]

    assert await names(None) == [f"talk {n}" for n in (4, 3, 2, 1, 0)]
    assert await names("even") == ["talk 4", "talk 2", "talk 0"]
    assert await names("odd") == ["talk 3", "talk 1", "talk 0"]
    assert await names("nobody") == []


# -- locks and forks --------------------------------------------------------------------------------------------------


@pytest.mark.promise("L6", "Q8")
@pytest.mark.parametrize("limit", [1, 4, 100])
async def test_all_held_locks_are_paged_each_once_without_their_lines(world: World, limit: int) -> None:
    await fill(world)
    locks = [lock async for lock in items(lambda cursor: world.store.locks(limit, cursor))]
    assert all(lock.line == () for lock in locks)
    held = {lock.conversation: (lock.holder, lock.external, lock.state, lock.waiting) for lock in locks}
    assert len(held) == len(locks) == 15
    assert held["busy 1"] == ("run 1", False, State.RUNNING, 2)
    assert held["retry 1"] == ("again 1", False, State.RETRYING, 0)
    assert held["held 1"] == ("lock 1", True, State.RUNNING, 1)
    for lock in locks:
        seen = await world.store.lock(lock.conversation, 0)
        assert seen == lock


@pytest.mark.promise("L6")
async def test_since_is_when_the_holder_took_the_lock(world: World) -> None:
    since = world.clock.wall
    claim = await world.run("a")
    world.clock.forward(5)
    await world.retry(claim, after=5)
    assert (await world.look()).since == since
    world.clock.forward(5)
    await world.expire()
    again = await world.claim_one()
    lock = await world.look()
    assert (lock.since, lock.fence, lock.state, lock.expires_at, lock.metadata) == (
        since,
        again.fence,
        State.RUNNING,
        None,
        None,
    )
    await world.complete(again)
    later = world.clock.forward(5).wall
    await world.run("b")
    assert (await world.look()).since == later


@pytest.mark.promise("L7", "L6")
async def test_forks_are_listed_in_the_order_they_happened_and_by_tree(world: World) -> None:
    for name in ("root", "other"):
        await world.enqueue(name, name)
    tree = [("one", "root"), ("alien", "other"), ("two", "root"), ("deep", "one"), ("deeper", "deep")]
    for child, parent in tree:
        await world.enqueue(f"to {child}", child, fork_of=parent)
        world.clock.forward(1)

    async def children(conversation: str | None, limit: int) -> list[str]:
        return [fork.child async for fork in items(lambda cursor: world.store.forks(limit, cursor, conversation))]

    for limit in (1, 2, 100):
        assert await children(None, limit) == ["one", "alien", "two", "deep", "deeper"]
        for name in ("root", "one", "two", "deep", "deeper"):
            assert await children(name, limit) == ["one", "two", "deep", "deeper"]
        assert await children("other", limit) == await children("alien", limit) == ["alien"]
        assert await children("nobody", limit) == []


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("Q8", "R4")
async def test_a_new_stores_totals_are_zero(world: World) -> None:
    assert await world.store.totals() == Totals()


@pytest.mark.promise("Q8", "R4")
async def test_totals_count_every_state_and_lock(world: World) -> None:
    await fill(world)
    totals = await world.store.totals()
    assert totals == await recount(world.store)
    assert (totals.scheduled, totals.queued, totals.running, totals.retrying, totals.parked) == (10, 20, 5, 5, 0)
    assert (totals.completed, totals.failed, totals.cancelled, totals.expired, totals.blocked) == (5, 5, 5, 0, 0)
    assert (totals.locks, totals.external_locks, totals.external_waiters, totals.conversations) == (15, 5, 5, 30)


@pytest.mark.promise("Q8", "R4")
async def test_ready_requests_are_counted_by_route_and_known_routes_stay(store_factory: StoreFactory) -> None:
    world = await store_factory(position_limit=2)
    assert await world.store.waiting_by_route() == {}
    await world.complete(await world.run("a", "talk a"))
    await world.enqueue("b", "talk b", route="slow")
    await world.enqueue("c", "talk b", route="slow")
    for number in range(3):
        await world.enqueue(f"d{number}", f"talk d{number}", route="full")
    await world.enqueue("e", "talk e", due=world.clock.wall + 1, route="later")
    assert await world.store.waiting_by_route() == {ROUTE: 0, "slow": 1, "full": 2, "later": 0}
    await world.cancel("b")
    await world.cancel("c")
    assert (await world.store.waiting_by_route())["slow"] == 0


@pytest.mark.promise("Q8")
async def test_a_route_that_a_retry_chose_is_known(world: World) -> None:
    await world.retry(await world.run("a"), after=0, route="spare")
    assert await world.store.waiting_by_route() == {ROUTE: 0, "spare": 0}
    await world.expire()
    assert await world.store.waiting_by_route() == {ROUTE: 0, "spare": 1}


# -- the response log's source ----------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
async def test_answers_are_logged_once_in_order_above_the_watermark(world: World) -> None:
    names = ["a", "b", "c", "d"]
    attempts = []
    for name in names:
        claim = await world.run(name, f"talk {name}", agent_id=f"agent {name}")
        attempts.append(world.attempt(claim, raw=b"{}"))
        await world.settle(claim, Finish(state=State.COMPLETED), attempts[-1])
    logged = await world.store.log_after(0, 10)
    assert [turn.request_id for turn in logged] == names
    assert [turn.conversation for turn in logged] == [f"talk {name}" for name in names]
    assert [turn.agent_id for turn in logged] == [f"agent {name}" for name in names]
    assert [turn.attempt for turn in logged] == attempts
    ids = [turn.id for turn in logged]
    assert ids == sorted(set(ids))
    assert ids[0] > 0
    assert [turn.id for turn in await world.store.log_after(0, 2)] == ids[:2]
    assert [turn.id for turn in await world.store.log_after(ids[1], 10)] == ids[2:]
    assert await world.store.log_after(ids[-1], 10) == []


@pytest.mark.promise("R3")
async def test_a_logged_answer_is_the_conversations_turn(world: World) -> None:
    settled = await world.complete(await world.run("a"))
    (logged,) = await world.store.log_after(0, 10)
    assert logged.id == settled.turn


@pytest.mark.promise("R3", "F10")
async def test_an_attempt_without_an_answer_to_its_request_is_not_logged(world: World) -> None:
    await world.fail(await world.run("failed"))
    claim = await world.run("retried")
    await world.retry(claim, after=0)
    await world.cancel("retried")
    old = await world.run("interrupted", "talk 2")
    await world.crash()
    await world.complete(old, text="late")
    cancelled = await world.claim_one()
    await world.settle(
        cancelled, Finish(state=State.CANCELLED), world.attempt(cancelled, Outcome.CANCELLED, text="half")
    )
    assert await world.store.log_after(0, 10) == []
    assert await world.claim_ids(OFFER) == []
